"""Files of pictures: what is there is not drawn again, what is not ours is not touched, what is killed goes on."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from dit_jax.drawing import pictures
from dit_jax.drawing.pictures import Archive, Folder, cut_into_batches, make_grid
from dit_jax.errors import ConfigError

PROMPTS = ["a", "b", "ein grüner\nStern", "d", "e"]
SETTINGS = {"steps": 4}


@pytest.fixture(autouse=True)
def batches_of_two(monkeypatch):
    monkeypatch.setattr(pictures, "BATCH", 2)


def draw(batch):
    """In place of a model: every picture follows from its prompt and seed."""
    rows = zip(batch.prompts, batch.seeds, strict=True)
    return np.stack([np.full((4, 6, 3), 40 * seed + len(prompt), np.uint8) for prompt, seed in rows])


def open_output(path, prompts, settings):
    batches = cut_into_batches(prompts, range(len(prompts)), settings)
    if path.suffix == ".npz":
        return batches, Archive(path, batches, settings)
    return batches, Folder(path, batches, step=7, columns=2)


def run(path, prompts=PROMPTS, settings=SETTINGS, stop_after=None):
    """Draw what is missing; returns the numbers of the batches that were drawn, and the last line if it ended."""
    batches, output = open_output(path, prompts, settings)
    drawn = []
    for batch in batches:
        if not output.has(batch):
            if len(drawn) == stop_after:
                return drawn, None
            output.write(batch, draw(batch))
            drawn.append(batch.number)
    return drawn, output.close()


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sheet_is_no_wider_than_its_pictures():
    images = [Image.new("RGB", (6, 4), colour) for colour in ("red", "green", "blue")]
    assert make_grid(images, 1000).size == (18, 4)
    sheet = make_grid(images, 2)
    assert sheet.size == (12, 8) and sheet.getpixel((11, 7)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["out", "x.npz"])
def test_a_killed_command_goes_on_and_ends_with_the_same_files(tmp_path, name):
    (tmp_path / "one").mkdir()
    assert run(tmp_path / "one" / name)[0] == [0, 1, 2]
    other = tmp_path / "other" / name
    assert run(other, stop_after=1) == ([0], None)
    assert run(other, stop_after=1) == ([1], None)
    assert run(other)[0] == [2]
    assert contents(tmp_path / "other") == contents(tmp_path / "one")
    before = contents(tmp_path / "other")
    assert run(other)[0] == [] and contents(tmp_path / "other") == before


def test_every_file_says_what_it_is(tmp_path):
    run(tmp_path / "out")
    with Image.open(tmp_path / "out" / "00002.png") as image:
        assert image.size == (6, 4)
        digest = image.info.pop("digest")
        assert image.info == {"prompt": PROMPTS[2], "seed": "2", "step": "7"} and len(digest) == 64
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (2 * 6, 3 * 4)


def test_the_archive_holds_pictures_seeds_prompts_and_settings(tmp_path):
    run(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as archive:
        assert archive["images"].dtype == np.uint8 and archive["images"].shape == (5, 4, 6, 3)
        expected = [40 * i + len(prompt) for i, prompt in enumerate(PROMPTS)]
        assert archive["images"][:, 3, 5, 2].tolist() == expected
        assert archive["seeds"].tolist() == [0, 1, 2, 3, 4] and archive["prompts"].tolist() == PROMPTS
        assert json.loads(str(archive["settings"]))["steps"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    with zipfile.ZipFile(tmp_path / "x.npz") as members:  # no clock in it: the same pictures are the same file
        assert {member.date_time for member in members.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize(
    ("prompts", "settings", "replaced"),
    [
        (PROMPTS, {"steps": 5}, 5),
        (PROMPTS[:3], SETTINGS, 3),  # the second batch has another size, the third is gone
        ([*PROMPTS, "f"], SETTINGS, 1),
        (["A", *PROMPTS[1:]], SETTINGS, 2),
    ],
)
def test_pictures_of_another_drawing_are_replaced_and_that_is_said(tmp_path, capsys, prompts, settings, replaced):
    run(tmp_path / "out")
    before = contents(tmp_path / "out")
    open_output(tmp_path / "out", prompts, settings)
    assert contents(tmp_path / "out") == before, "nothing is lost before the first new picture is drawn"
    capsys.readouterr()
    run(tmp_path / "out", prompts, settings)
    assert capsys.readouterr().out == (
        f"{tmp_path / 'out'}: {replaced} pictures of other prompts or settings will be replaced\n"
    )
    run(tmp_path / "new", prompts, settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_other_seeds_make_another_digest_of_the_whole_batch():
    one, other = (cut_into_batches(PROMPTS, seeds, SETTINGS) for seeds in ([0, 1, 2, 3, 4], [0, 1, 2, 9, 4]))
    assert [a.digest == b.digest for a, b in zip(one, other, strict=True)] == [True, False, True]


def test_files_of_others_are_never_replaced(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    run(folder)  # beside it is fine
    with pytest.raises(ConfigError, match=r"holds notes.txt, which no drawing wrote; choose another --output"):
        run(folder, settings={"steps": 5})
    assert (folder / "notes.txt").read_text() == "mine"
    holiday = tmp_path / "holiday"
    holiday.mkdir()
    Image.new("RGB", (4, 4)).save(holiday / "00001.png")
    before = contents(holiday)
    with pytest.raises(ConfigError, match=r"holds 00001.png, which no drawing wrote"):
        run(holiday)
    assert contents(holiday) == before


def test_a_file_that_was_torn_is_not_taken_for_a_picture(tmp_path):
    run(tmp_path / "out", stop_after=1)
    (tmp_path / "out" / "00002.png.tmp").write_bytes(b"half")
    run(tmp_path / "out")
    run(tmp_path / "new")
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_an_archive_of_another_drawing_is_refused_and_parts_of_one_are_drawn_again(tmp_path, capsys):
    run(tmp_path / "x.npz")
    before = contents(tmp_path)
    for prompts, settings in ((PROMPTS[:4], SETTINGS), (PROMPTS, {"steps": 5})):
        with pytest.raises(ConfigError, match=r"x.npz holds other pictures; choose another --output"):
            run(tmp_path / "x.npz", prompts, settings)
    assert contents(tmp_path) == before
    run(tmp_path / "y.npz", settings={"steps": 5}, stop_after=2)
    capsys.readouterr()
    assert run(tmp_path / "y.npz")[0] == [0, 1, 2]
    assert "y.npz.parts: 2 parts of other prompts or settings are drawn again" in capsys.readouterr().out
    assert (tmp_path / "y.npz").read_bytes() == (tmp_path / "x.npz").read_bytes()


@pytest.mark.parametrize("content", [b"nothing", b""])
def test_a_damaged_archive_is_refused(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ConfigError, match="choose another --output"):
        run(tmp_path / "x.npz")


def test_a_grid_that_no_drawing_wrote_is_never_replaced(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "grid.png")
    with pytest.raises(ConfigError, match="holds grid.png, which no drawing wrote"):
        Folder(tmp_path, cut_into_batches(["a"], [0], {}), step=1, columns=1)
