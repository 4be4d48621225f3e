"""Laws of the shapes world: what it draws, that its captions are true, and what it keeps for evaluation."""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations as pairs_of

import numpy as np
import pytest

from dit_jax.data.shapes_world import (
    BACKGROUNDS,
    COLOURS,
    EVALUATION_CLASSES,
    EVALUATION_SEED,
    HELD_OUT,
    IMAGE_SIZE,
    MIN_GAP,
    OUTLINES,
    RADII,
    RELATIONS,
    Object,
    Scene,
    ShapesWorld,
    draw_scene,
    evaluation_scenes,
    render,
)

ALL_COUNTS = (1, 2, 3)


def _digest(records) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(record.image.tobytes() + record.captions[0].encode() + record.id.encode())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    world = ShapesWorld(seed=5, num_pictures=6000, objects=ALL_COUNTS, combinations="seen")
    return [world.scene(i) for i in range(len(world))]


def test_a_picture_depends_on_seed_and_index_alone():
    world = ShapesWorld(7, 40, ALL_COUNTS, "seen")
    forwards = [world[i] for i in range(40)]
    longer = ShapesWorld(7, 10_000, ALL_COUNTS, "seen")
    backwards = [longer[i] for i in reversed(range(40))][::-1]
    assert _digest(forwards) == _digest(backwards)
    program = (
        "from dit_jax.data.shapes_world import ShapesWorld; import hashlib; digest = hashlib.sha256()\n"
        "for record in map(ShapesWorld(7, 40, (1, 2, 3), 'seen').__getitem__, range(40)):\n"
        "    digest.update(record.image.tobytes() + record.captions[0].encode() + record.id.encode())\n"
        "print(digest.hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == _digest(forwards)


def test_no_two_seeds_share_a_picture():
    seeds = [0, 1, 2, EVALUATION_SEED - 1, EVALUATION_SEED, EVALUATION_SEED + 1, EVALUATION_SEED + 2]
    scenes = [draw_scene(seed, i, (1,), "seen") for seed in seeds for i in range(50)]
    assert len(set(scenes)) == len(scenes)


def test_training_cannot_use_a_seed_of_evaluation():
    assert all(kind.seed >= EVALUATION_SEED for kind in EVALUATION_CLASSES.values())
    assert len({kind.seed for kind in EVALUATION_CLASSES.values()}) == len(EVALUATION_CLASSES)
    for kind in EVALUATION_CLASSES.values():
        with pytest.raises(ValueError, match=str(kind.seed)):
            ShapesWorld(kind.seed, 10, (1,), "seen")


def test_six_combinations_are_held_out_one_of_each_shape():
    assert len(HELD_OUT) == 6
    assert {shape for _, shape in HELD_OUT} == set(OUTLINES)
    assert len({colour for colour, _ in HELD_OUT}) == 6


@pytest.mark.parametrize("seed", [0, 1, 123_456, EVALUATION_SEED - 1])
def test_held_out_combinations_are_never_seen_and_always_new(seed):
    seen = ShapesWorld(seed, 1500, ALL_COUNTS, "seen")
    drawn = {(item.colour, item.shape) for i in range(1500) for item in seen.scene(i).objects}
    assert drawn == {(c, s) for c in COLOURS for s in OUTLINES} - HELD_OUT
    new = ShapesWorld(seed, 300, ALL_COUNTS, "new")
    assert {(item.colour, item.shape) for i in range(300) for item in new.scene(i).objects} == HELD_OUT


def test_objects_lie_inside_the_frame_and_never_touch(scenes):
    for scene in scenes:
        for item in scene.objects:
            assert item.outline.min() >= 0.99 and item.outline.max() <= IMAGE_SIZE - 0.99
        for first, second in pairs_of((item.outline for item in scene.objects), 2):
            gaps = np.maximum(first.min(axis=0) - second.max(axis=0), second.min(axis=0) - first.max(axis=0))
            assert gaps.max() >= MIN_GAP - 1e-9


def test_relations_hold_without_doubt(scenes):
    for scene in scenes:
        assert (scene.relation is None) == (len(scene.objects) == 1)
        if scene.relation is None:
            continue
        first, second = scene.objects[:2]
        right, down = first.x - second.x, first.y - second.y
        towards, across = {
            "to the left of": (-right, down),
            "to the right of": (right, down),
            "above": (-down, right),
            "below": (down, right),
        }[scene.relation]
        assert towards > 4 * abs(across)


def test_a_caption_says_what_the_picture_shows_in_at_most_20_words(scenes):
    thing = r"a (small|large) (\w+) (\w+)"
    relation = "|".join(RELATIONS)
    sentence = re.compile(rf"(.*? )??{thing}(?: ({relation}) {thing}(?:, and {thing})?)?")
    phrasings = set()
    for scene in scenes:
        assert len(scene.caption.split()) <= 20
        phrasing, *said = sentence.fullmatch(scene.caption).groups()
        phrasings.add(phrasing)
        assert said.pop(3) == scene.relation
        shown = [word for item in scene.objects for word in (item.size, item.colour, item.shape)]
        assert [word for word in said if word] == shown
    assert len(phrasings) >= 4


def test_sizes_are_the_radii_they_name(scenes):
    for item in (item for scene in scenes for item in scene.objects):
        assert abs(item.radius - RADII[item.size]) <= 1


def test_all_attributes_are_about_equally_frequent(scenes):
    items = [item for scene in scenes for item in scene.objects]
    counts = {
        "number of objects": Counter(len(scene.objects) for scene in scenes),
        "size": Counter(item.size for item in items),
        "colour": Counter(item.colour for item in items),  # six of the eight lack one of six shapes
        "shape": Counter(item.shape for item in items),
        "relation": Counter(scene.relation for scene in scenes if scene.relation),
        "background": Counter(scene.background for scene in scenes),
    }
    sizes = [len(ALL_COUNTS), len(RADII), len(COLOURS), len(OUTLINES), len(RELATIONS), len(BACKGROUNDS)]
    for (name, counter), number in zip(counts.items(), sizes, strict=True):
        shares = np.array(list(counter.values())) / counter.total() * number
        assert len(counter) == number, name
        assert np.all((shares > 0.8) & (shares < 1.25)), (name, counter)


@pytest.mark.parametrize("shape", OUTLINES)
def test_a_rendered_shape_covers_its_outline(shape):
    rng = np.random.default_rng(0)
    white, red = BACKGROUNDS["white"][2], COLOURS["red"][2]
    errors = []
    for x, y, radius in rng.uniform((20, 20, 7), (44, 44, 14), size=(50, 3)):
        item = Object("large", "red", shape, x, y, radius)
        image = render(Scene((item,), None, "white", "")).astype(float)
        np.testing.assert_array_equal(image[int(y), int(x)], COLOURS["red"])
        np.testing.assert_array_equal(image[0, 0], BACKGROUNDS["white"])

        covered = (image[..., 2] - white) / (red - white)
        px, py = item.outline.T
        pieces = np.roll(px, -1) * py - px * np.roll(py, -1)  # shoelace formula: twice the signed area
        assert 1 < covered.sum() / abs(pieces.sum() / 2) < 1.1  # Pillow draws the border line of a polygon, too
        centroid = [(p + np.roll(p, -1)) @ pieces / pieces.sum() / 3 for p in (px, py)]
        middles = np.arange(IMAGE_SIZE) + 0.5
        drawn = [covered.sum(axis=axis) @ middles / covered.sum() for axis in (0, 1)]
        errors.append(np.subtract(drawn, centroid))
    assert np.abs(errors).max() < 0.25  # px
    assert np.abs(np.mean(errors, axis=0)).max() < 0.04  # no shift to one side


def test_evaluation_classes_are_what_they_are_called():
    one, two, new = (evaluation_scenes(name, 200) for name in ("one_object", "two_objects", "new_combinations"))
    assert {len(scene.objects) for scene in one + new} == {1}
    assert {len(scene.objects) for scene in two} == {2}
    assert {(item.colour, item.shape) for scene in new for item in scene.objects} == HELD_OUT
    assert not {(item.colour, item.shape) for scene in one + two for item in scene.objects} & HELD_OUT
    assert evaluation_scenes("two_objects", 50) == two[:50]  # the quick score is a part of the full one
    with pytest.raises(ValueError, match="three_objects.*new_combinations"):
        evaluation_scenes("three_objects", 1)


def test_it_is_a_source():
    world = ShapesWorld(3, 12, (1, 2), "seen")
    records = [world[i] for i in range(len(world))]
    assert [record.id for record in records] == list(world.ids())
    assert [record.captions for record in records] == list(world.captions())
    assert all(record.image.dtype == np.uint8 for record in records)
    with pytest.raises(IndexError):
        world[12]


def test_its_fingerprint_changes_with_every_argument():
    arguments = [
        (3, 12, (1, 2), "seen"),
        (4, 12, (1, 2), "seen"),
        (3, 13, (1, 2), "seen"),
        (3, 12, (1,), "seen"),
        (3, 12, (1, 2), "new"),
    ]
    prints = [ShapesWorld(*chosen).fingerprint() for chosen in arguments]
    assert len(set(prints)) == len(arguments)
    assert ShapesWorld(*arguments[0]).fingerprint() == prints[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 10, (1,), "seen"), "seed.*-1"),
        ((0, 0, (1,), "seen"), "num_pictures.*0"),
        ((0, 10, (), "seen"), "objects"),
        ((0, 10, (1, 4), "seen"), "objects.*4"),
        ((0, 10, (1,), "all"), "'all'.*new.*seen"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShapesWorld(*arguments)
