"""The checker accepts what is right, also when softened, and names the part that is wrong."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from scipy import ndimage

from dit_jax.data.shapes_world import (
    BACKGROUNDS,
    COLOURS,
    EVALUATION_CLASSES,
    OUTLINES,
    RADII,
    RELATIONS,
    Object,
    Scene,
    ShapesWorld,
    evaluation_scenes,
    render,
)
from dit_jax.metrics.shapes_checker import check, find_objects

COUNT = 200


@cache
def _pictures(class_name: str) -> list[tuple[np.ndarray, Scene]]:
    return [(render(scene), scene) for scene in evaluation_scenes(class_name, COUNT)]


def _one(shape="circle", size="large", colour="red", background="white", radius=None) -> Scene:
    item = Object(size, colour, shape, 24.3, 30.6, radius or RADII[size])
    return Scene((item,), None, background, "")


def _disc(image: np.ndarray, x: float, y: float, radius: float, colour) -> np.ndarray:
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return np.where(np.hypot(columns - x, rows - y)[..., None] < radius, colour, image).astype(np.uint8)


def _other(rng: np.random.Generator, names, name: str) -> str:
    return rng.choice([other for other in names if other != name])


@pytest.mark.parametrize("class_name", EVALUATION_CLASSES)
def test_clean_renders_are_right(class_name):
    right = [check(image, scene).right for image, scene in _pictures(class_name)]
    assert np.mean(right) >= 0.99


def test_clean_renders_of_three_objects_are_right():
    world = ShapesWorld(0, 100, (3,), "seen")
    right = [check(world[i].image, world.scene(i)).right for i in range(len(world))]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("class_name", EVALUATION_CLASSES)
def test_soft_edges_and_noise_are_forgiven(class_name):
    rng = np.random.default_rng(0)
    right = []
    for image, scene in _pictures(class_name):
        soft = ndimage.gaussian_filter(image.astype(float), (0.7, 0.7, 0)) + rng.normal(0, 5, image.shape)
        right.append(check(soft.round().clip(0, 255).astype(np.uint8), scene).right)
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize("class_name", EVALUATION_CLASSES)
@pytest.mark.parametrize("part", ["colour", "shape", "size"])
def test_a_caption_with_one_word_changed_is_wrong_in_that_part_alone(class_name, part):
    rng = np.random.default_rng(1)
    names = {"colour": COLOURS, "shape": OUTLINES, "size": RADII}[part]
    as_expected = []
    for image, scene in _pictures(class_name):
        k = rng.integers(len(scene.objects))
        objects = list(scene.objects)
        objects[k] = replace(objects[k], **{part: _other(rng, names, getattr(objects[k], part))})
        verdict = check(image, replace(scene, objects=tuple(objects)))
        assert not verdict.right
        as_expected.append([name for name, holds in verdict._asdict().items() if not holds] == [part])
    assert np.mean(as_expected) >= 0.99


def test_a_caption_with_another_relation_is_wrong_in_the_relation_alone():
    rng = np.random.default_rng(2)
    for image, scene in _pictures("two_objects"):
        verdict = check(image, replace(scene, relation=_other(rng, RELATIONS, scene.relation)))
        assert verdict == (True, True, True, True, False)


def test_a_caption_with_another_number_of_objects_is_wrong():
    for image, scene in _pictures("two_objects"):
        fewer = check(image, replace(scene, objects=scene.objects[1:], relation=None))
        assert fewer == (False, True, True, True, True)  # the one it names is there
        third = replace(scene.objects[0], colour="green", shape="star")
        assert not check(image, replace(scene, objects=(*scene.objects, third))).object


@pytest.mark.parametrize("part", ["colour", "shape", "size"])
def test_attributes_must_belong_to_the_right_object(part):
    exchanged = 0
    for image, scene in _pictures("two_objects"):
        first, second = scene.objects
        if getattr(first, part) == getattr(second, part):
            continue
        exchanged += 1
        objects = (
            replace(first, **{part: getattr(second, part)}),
            replace(second, **{part: getattr(first, part)}),
        )
        assert not check(image, replace(scene, objects=objects)).right
    assert exchanged > COUNT / 4


def test_where_an_object_lies_and_on_what_does_not_matter():
    scene = _one()
    elsewhere = replace(scene.objects[0], x=40.0, y=45.0, radius=RADII["large"] - 0.7)
    for background in BACKGROUNDS:
        image = render(Scene((elsewhere,), None, background, ""))
        assert check(image, scene).right


@pytest.mark.parametrize("colour", [(128, 128, 128), (10, 10, 10), COLOURS["red"], COLOURS["yellow"]])
def test_a_thing_too_many_is_wrong_and_a_speck_is_not(colour):
    image, scene = render(_one()), _one()
    assert check(_disc(image, 54, 12, 1.2, colour), scene).right
    assert check(_disc(image, 54, 12, 2.5, colour), scene) == (False, True, True, True, True)


def test_malformed_shapes_have_no_name():
    whole = render(_one())
    white = BACKGROUNDS["white"]
    ring = _disc(whole, 24.3, 30.6, 5, white)
    assert check(ring, _one()) == (True, True, False, True, True)
    half = whole.copy()
    half[31:] = white
    assert not check(half, _one()).shape


def test_an_object_of_two_colours_has_no_colour():
    image = render(_one())
    patched = image.copy()
    patched[31:] = render(_one(colour="blue"))[31:]
    assert not check(patched, _one()).colour
    assert not check(patched, _one(colour="blue")).colour


def test_a_size_between_small_and_large_is_neither():
    between = sum(RADII.values()) / 2
    image = render(_one(radius=between))
    assert not check(image, _one(size="small")).size
    assert not check(image, _one(size="large")).size


@pytest.mark.parametrize("level", [0, 130, 255])
def test_an_empty_picture_shows_nothing(level):
    image = np.full((64, 64, 3), level, np.uint8)
    assert find_objects(image) == []
    assert check(image, _one()) == (False, False, False, False, True)
    assert not any(check(image, evaluation_scenes("two_objects", 1)[0]))


def test_noise_shows_nothing_right():
    image = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for scene in evaluation_scenes("one_object", 20):
        assert not check(image, scene).right


@pytest.mark.parametrize(
    "image", [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3), np.float32)], ids=["size", "type"]
)
def test_other_pictures_are_refused(image):
    with pytest.raises(ValueError, match="reads uint8"):
        check(image, _one())
