"""A cache is what its raw pictures are, whoever made it in how many pieces; and it is never taken for another."""

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dit_jax import build, precompute
from dit_jax.config import load_config
from dit_jax.data.cache import files
from dit_jax.data.cache.files import open_cache
from dit_jax.encoders.places import ASSETS
from dit_jax.errors import ConfigError, DataError, WorkdirError
from dit_jax.feed import check_cache
from tests.data.same_pictures import TFDS, write_folder, write_wds
from tests.noise_pictures import SQUARE, TALL, WIDE, draw_noise
from tests.tiny_run import CONFIG, TINY, tiny_config, train_tiny

STEPS = {"total_steps": "5", "log_every": "1", "save_every": "0", "sample_every": "0", "model__dropout": "0"}


def make(output, part=0, parts=1, per_file=4096, **changes):
    """A cache of the shapes world, or of other data."""
    precompute.precompute(tiny_config(**changes), output, part, parts, per_file)
    return output


def losses(workdir, **changes):
    train_tiny(workdir, **STEPS, **changes)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    return [row["loss"] for row in rows]


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A finished cache of 28 pictures in 6 files and their captions in as many; tests leave it as it is."""
    return make(tmp_path_factory.mktemp("caches") / "shapes", per_file=5)


# --- the same numbers ---------------------------------------------------------------------------------------


SAME = {"data__storage_dtype": "float16", "data__flip": "on", "batch_size": "4"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same eight pictures as sources of three kinds."""
    folder = tmp_path_factory.mktemp("same")
    return {"folder": write_folder(folder / "folder"), "wds": write_wds(folder / "wds"), "tfds": TFDS}


@pytest.fixture(scope="module")
def expected(places, tmp_path_factory):
    """The losses of a run on the folder."""
    return losses(tmp_path_factory.mktemp("runs") / "once", data__source=places["folder"], **SAME)


@pytest.mark.parametrize("kind", ["folder", "wds", "tfds"])
def test_raw_pictures_of_any_kind_and_their_cache_give_the_same_losses(kind, places, expected, tmp_path):
    cache = make(tmp_path / "cache", data__source=places[kind], **SAME)
    runs = [
        losses(tmp_path / "every_step", data__source=places[kind], data__encode="every_step", **SAME),
        losses(tmp_path / "cached", data__source=f"cache:{cache}", **SAME),
    ]
    np.testing.assert_allclose(runs, [expected] * 2, rtol=1e-5)
    assert len(set(np.round(expected, 4))) > 2  # they are those of different batches


@pytest.mark.slow
def test_buckets_bad_records_several_captions_and_a_validation_part_survive_the_cache(tmp_path, capsys):
    source = draw_noise(tmp_path / "pictures", [WIDE, TALL, SQUARE] * 10, bad=(3, 7))
    changes = {
        "data__buckets": "5",
        "data__max_bad_fraction": "0.2",
        "data__validation_fraction": "0.2",
        "data__flip": "on",
        "batch_size": "4",
        "latents__normalize": "measured",
    }
    cache = make(tmp_path / "cache", data__source=source, **changes)
    assert len((cache / "bad_records.jsonl").read_text().splitlines()) == 2
    runs = [
        losses(tmp_path / "once", data__source=source, **changes),
        losses(tmp_path / "every_step", data__source=source, data__encode="every_step", **changes),
        losses(tmp_path / "cached", data__source=f"cache:{cache}", **changes),
    ]
    np.testing.assert_allclose(runs[1:], [runs[0]] * 2, rtol=1e-5)
    told = re.findall(r"^bad records: 1, replaced by others, listed in", capsys.readouterr().out, re.MULTILINE)
    assert len(told) == 2  # every_step finds them on the way


def test_a_mixture_of_caches_is_the_mixture_of_their_sources(tmp_path):
    sources = [draw_noise(tmp_path / "a", [SQUARE] * 6), draw_noise(tmp_path / "b", [SQUARE] * 9)]
    caches = [f"cache:{make(tmp_path / f'cache_{i}', data__source=one)}" for i, one in enumerate(sources)]
    runs = [
        losses(tmp_path / name, data__source=f"3*{a} + {b}", batch_size="4")
        for name, (a, b) in {"raw": sources, "cached": caches}.items()
    ]
    np.testing.assert_allclose(runs[0], runs[1], rtol=1e-5)


def test_a_run_on_raw_pictures_goes_on_from_their_cache(places, expected, tmp_path):
    cache = make(tmp_path / "cache", data__source=places["folder"], **SAME)
    halves = train_tiny(tmp_path / "halves", data__source=places["folder"], stop_at_step="2", **STEPS, **SAME)
    assert losses(halves, data__source=f"cache:{cache}", **SAME) == expected


# --- made in pieces -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_made_in_any_order_are_the_same_cache_byte_for_byte(parts, cache, tmp_path, capsys):
    for part in reversed(range(parts)):
        assert not (tmp_path / "manifest.json").exists()
        make(tmp_path, part, parts, per_file=5)
    assert content(tmp_path) == content(cache)
    assert "missing still; the other parts make them" in capsys.readouterr().out


def test_files_that_are_there_are_not_made_again(cache, tmp_path, capsys):
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    for gone in ("manifest.json", "pictures-00003-of-00006.safetensors"):
        (tmp_path / gone).unlink()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*-of-*")}
    make(tmp_path, per_file=5)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*-of-*")}
    assert before.items() <= after.items() and len(after) == len(before) + 1
    assert content(tmp_path) == content(cache)
    assert "1 of 12 files to make" in capsys.readouterr().out


def command(output, *flags, **changes):
    overrides = TINY | {"data.num_pictures": "200", "data.source": "shapes"} | changes
    keys = [f"--config.{key}={value}" for key, value in overrides.items()]
    return [sys.executable, "-m", "dit_jax.precompute", f"--config={CONFIG}", f"--output={output}", *flags, *keys]


def killed_and_finished(output, kills):
    """Kill the program as soon as it has written another file, some times, then let it end."""
    for _ in range(kills):
        before = len(list(output.glob("*-of-*")))
        process = subprocess.Popen(command(output, "--records_per_file=2"), stdout=subprocess.DEVNULL)
        while len(list(output.glob("*-of-*"))) == before:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command(output, "--records_per_file=2"), check=True, stdout=subprocess.DEVNULL)
    return output


@pytest.mark.slow
def test_a_cache_that_was_killed_ten_times_is_the_same_byte_for_byte(tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    subprocess.run(command(whole, "--records_per_file=2"), check=True, stdout=subprocess.DEVNULL)
    assert content(killed_and_finished(pieces, 10)) == content(whole)


# --- never taken for another --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data__image_size": "32"}, "config: image_size: cache 64, run 32; set"),
        ({"data__buckets": "3"}, r"buckets: cache 0, run 3 \(\d+x\d+ 64x64 \d+x\d+\)"),
        ({"data__flip": "on"}, "mirrored: cache False, run True"),
        ({"data__storage_dtype": "float16"}, "storage_dtype: cache float32, run float16"),
        ({"data__crop": "random", "data__encode": "every_step"}, "crop: cache center, run random"),
    ],
)
def test_a_cache_of_another_config_is_refused_by_the_name_of_the_field(changes, field, cache, tmp_path):
    with pytest.raises(ConfigError, match=field):
        train_tiny(tmp_path, data__source=f"cache:{cache}", **changes)


def another(encoder, tmp_path, change):
    """A copy of an embedded encoder with another config."""
    folder = shutil.copytree(ASSETS / encoder, tmp_path / encoder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    return str(folder)


def test_a_cache_of_another_vae_or_scale_is_refused(cache, tmp_path):
    vae = another("tiny_vae", tmp_path, lambda config: config | {"scaling_factor": 2.0})
    with pytest.raises(ConfigError, match=r"vae\.sha256: cache \w+\.\., run \w+\.\.; vae\.scale: cache .*, run \[2\.0"):
        train_tiny(tmp_path / "run", data__source=f"cache:{cache}", vae=vae)


def test_a_cache_of_another_text_encoder_is_refused(cache, tmp_path):
    text = another("tiny_clip", tmp_path, lambda config: config | {"note": "another"})
    with pytest.raises(ConfigError, match=r"text_encoder\.sha256: cache \w+\.\., run"):
        train_tiny(tmp_path / "run", data__source=f"cache:{cache}", text_encoder=text)


def test_another_cache_in_the_folder_is_left_as_it_is(cache, tmp_path):
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    with pytest.raises(DataError, match="the data set is another one.*or has changed since.*data.records"):
        make(tmp_path, per_file=5, data__num_pictures="20")
    with pytest.raises(DataError, match="in files of 5 records: --records_per_file=5 goes on") as error:
        make(tmp_path, per_file=6)
    assert "delete" not in str(error.value)
    assert content(tmp_path) == content(cache)


def test_too_many_bad_records_stop_the_work_and_a_run(tmp_path):
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 12, bad=range(4))
    with pytest.raises(DataError, match=r"\d of 12 records are bad.*00\.png: not a picture"):
        make(tmp_path / "cache", data__source=source)
    cache = make(tmp_path / "cache", data__source=source, data__max_bad_fraction="0.5")
    with pytest.raises(DataError, match="4 of 12 records are bad, more than data.max_bad_fraction=0.01 allows"):
        train_tiny(tmp_path / "run", data__source=f"cache:{cache}")


def test_bad_records_of_files_that_are_there_count_whoever_made_them(tmp_path):
    """Two bad records in each of two files: one file is borne, both are not, also by the part that finishes."""
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 12, bad=(0, 1, 10, 11))
    few = {"data__source": source, "data__max_bad_fraction": "0.25"}
    for name, parts in (("again", [(0, 1), (0, 1)]), ("parts", [(1, 2), (0, 2), (1, 2)])):
        cache = tmp_path / name
        for part in parts:
            with contextlib.suppress(DataError):
                make(cache, *part, per_file=4, **few)
        with pytest.raises(DataError, match=r"4 of 12 records are bad.*all so far in .*bad_records\.jsonl"):
            make(cache, per_file=4, **few)
        assert len((cache / "bad_records.jsonl").read_text().splitlines()) == 4
        assert not (cache / "manifest.json").exists()
        make(cache, per_file=4, **few | {"data__max_bad_fraction": "0.5"})
    assert content(tmp_path / "again") == content(tmp_path / "parts")


def test_parts_that_bear_their_own_bad_records_do_not_finish_a_cache_with_too_many(tmp_path, monkeypatch):
    """Both begin before either has written anything."""
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 12, bad=(0, 1, 10, 11))
    few = {"data__source": source, "data__max_bad_fraction": "0.25"}
    missing = files.missing

    def and_meanwhile(folder, identity):
        monkeypatch.setattr(files, "missing", missing)
        found = missing(folder, identity)
        make(folder, 1, 2, per_file=6, **few)
        return found

    monkeypatch.setattr(files, "missing", and_meanwhile)
    with pytest.raises(DataError, match="4 of 12 records are bad"):
        make(tmp_path / "cache", 0, 2, per_file=6, **few)
    assert not (tmp_path / "cache" / "manifest.json").exists()


# --- wrong words and small disks ----------------------------------------------------------------------------


def run(*flags, cwd=None):
    command = [sys.executable, "-m", "dit_jax.precompute", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "--config is needed"),
        ([f"--config={CONFIG}", "--shard=2/2"], "'2/2' is not i/n with i from 0 to n - 1"),
        ([f"--config={CONFIG}", "--records_per_file=0"], "'0' is not a number of 1 or more"),
        ([f"--config={CONFIG}", "--config.data.source=flder:x"], "folder"),
        ([f"--config={CONFIG}", "--inspect=shapes", "--shard=0/2"], "--shard does not go with --inspect"),
        ([f"--config={CONFIG}", "--inspect=shapes", "--output=x"], "--output does not go with --inspect"),
        ([f"--config={CONFIG}", "--inspect=shapes", "--records_per_file=4096"], "--records_per_file does not go"),
        ([f"--config={CONFIG}", "--sheet=x.png"], "--sheet needs --inspect"),
        ([f"--config={CONFIG}", "--inspect=shapes", "--sheet=nowhere/x.png"], "there is no folder nowhere"),
        ([f"--config={CONFIG}", "--inspect=shapes", "--config.data.image_size=-3"], "image_size is -3; it must be 1"),
        ([f"--config={CONFIG}", "--inspect=shapes + cache:x"], "look at a cache alone"),
    ],
)
def test_a_wrong_word_gets_one_line(flags, told):
    done = run(*flags)
    assert done.returncode == 2 and told in done.stderr.splitlines()[-1]


def test_inspection_outside_of_the_repository_asks_for_a_config(tmp_path):
    done = run("--inspect=shapes", cwd=tmp_path)
    assert done.returncode == 2 and "--inspect needs --config=FILE" in done.stderr.splitlines()[-1]


def test_a_sheet_is_not_written_into_the_data(tmp_path):
    draw_noise(tmp_path / "pictures", [SQUARE] * 3)
    before = content(tmp_path)
    for flags in (["--inspect=folder:."], [f"--inspect=folder:{tmp_path}", "--sheet=pictures/new.png"]):
        done = run(f"--config={CONFIG}", *flags, cwd=tmp_path)
        assert done.returncode == 2 and "give another place: --sheet=PATH.png" in done.stderr
    assert content(tmp_path) == before


def test_what_is_a_cache_or_is_cut_at_random_is_not_cached(cache, tmp_path):
    with pytest.raises(ConfigError, match="encoded already"):
        make(tmp_path / "x", data__source=f"cache:{cache}")
    with pytest.raises(ConfigError, match="cut once"):
        make(tmp_path / "x", data__crop="random", data__encode="every_step")
    with pytest.raises(ConfigError, match="mix their caches"):
        make(tmp_path / "x", data__source="shapes + shapes")
    assert not (tmp_path / "x").exists()


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    with pytest.raises(WorkdirError, match=r"has 1\.00 MiB free, and the cache needs .* MiB and 256\.00 MiB to spare"):
        make(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*-of-*"))


def test_a_finished_cache_that_cannot_be_written_to_is_done(cache, tmp_path, monkeypatch, capsys):
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)

    def refuse(*rest):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files, "_write_whole", refuse)
    make(tmp_path, per_file=5)
    assert "done: " in capsys.readouterr().out
    (tmp_path / "texts-00000-of-00006.safetensors").unlink()
    with pytest.raises(WorkdirError, match="cannot write to .*: Read-only file system"):
        make(tmp_path, per_file=5)


def test_a_read_only_place_is_told_before_the_work(cache, tmp_path, monkeypatch, capsys):
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    (tmp_path / "texts-00000-of-00006.safetensors").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 0))
    with pytest.raises(WorkdirError, match="cannot be written to, and files are missing there: 1"):
        make(tmp_path, per_file=5)
    assert "forecast" not in capsys.readouterr().out


def test_the_command_that_is_told_is_one_that_training_accepts(tmp_path):
    """With the keys that were given as flags, and a folder that a shell would cut in two."""
    keys = {"data.image_size": "32", "data.buckets": "3", "data.storage_dtype": "float16", "data.flip": "on"}
    done = subprocess.run(command(tmp_path / "my cache", **keys), check=True, capture_output=True, text=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("train from it: ")]
    words = shlex.split(line.removeprefix("train from it: "))
    assert words[:4] == ["python", "-m", "dit_jax.main", f"--config={CONFIG}"]
    config = load_config(str(CONFIG), dict(flag.removeprefix("--config.").split("=", 1) for flag in words[4:]))
    assert config.data.source == f"cache:{tmp_path / 'my cache'}"
    check_cache(config, open_cache(tmp_path / "my cache"), build.make_vae(config), build.make_text_encoder(config))


def test_captions_that_are_cut_are_told(tmp_path, capsys):
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 4)
    rows = tmp_path / "pictures" / "metadata.jsonl"
    rows.write_text(rows.read_text().replace("a picture 2", "a red circle and " * 40))
    make(tmp_path / "cache", data__source=source)
    assert "may be cut: 1, the first 'a red circle and" in capsys.readouterr().out


def test_the_forecast_of_the_disk_is_what_it_takes(tmp_path, capsys):
    folder = make(tmp_path, data__num_pictures="300", per_file=64)
    said = capsys.readouterr().out
    pictures = sum(path.stat().st_size for path in folder.glob("pictures-*"))
    texts = sum(path.stat().st_size for path in folder.glob("texts-*"))
    forecast = [float(size) for size in re.findall(r"(?:latents|text) ([\d.]+) MiB", said)]
    np.testing.assert_allclose(forecast, [pictures / 2**20, texts / 2**20], atol=0.03)


# --- inspection ---------------------------------------------------------------------------------------------


def test_inspecting_a_set_and_its_cache_writes_nothing_but_a_sheet(cache, tmp_path):
    before = content(cache)
    for source, told in (("shapes", "28 records"), (f"cache:{cache}", "all 13 have the sha256")):
        sheet = tmp_path / f"{source[:5]}.png"
        done = run(f"--config={CONFIG}", "--config.data.num_pictures=28", f"--inspect={source}", f"--sheet={sheet}")
        assert done.returncode == 0 and told in done.stdout, done.stdout + done.stderr
        with Image.open(sheet) as image:
            assert np.asarray(image.convert("RGB")).std() > 10
    assert content(cache) == before


def test_inspecting_a_folder_tells_of_pictures_in_formats_that_are_not_read(tmp_path):
    folder = tmp_path / "phone"
    folder.mkdir()
    Image.new("RGB", (80, 64), "red").save(folder / "IMG_1.jpg")
    (folder / "IMG_2.HEIC").write_bytes(b"ftypheic")
    for i in (1, 2):
        (folder / f"IMG_{i}.txt").write_text(f"wall {i}")
    done = run(f"--config={CONFIG}", f"--inspect=folder:{folder}", f"--sheet={tmp_path / 'sheet.png'}")
    assert done.returncode == 0, done.stderr
    assert "1 records" in done.stdout and "passed over: 1 .heic: not read, convert them to JPEG" in done.stdout


def test_inspecting_a_damaged_cache_tells_all_of_it_and_fails(cache, tmp_path):
    folder = shutil.copytree(cache, tmp_path / "copy")
    shard = folder / "pictures-00003-of-00006.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    done = run(f"--config={CONFIG}", f"--inspect=cache:{folder}", f"--sheet={tmp_path / 'sheet.png'}")
    assert done.returncode == 3 and done.stderr.startswith("data error: ") and shard.name in done.stderr
    assert "1 of 13 files (7.7%) are damaged or absent" in done.stdout and "28 records" in done.stdout


def test_the_records_of_a_cache_are_decoded_as_they_were(cache):
    config = tiny_config(data__source=f"cache:{cache}")
    shown = list(precompute.decoded(config, open_cache(cache)))
    source = build.make_source(tiny_config(), "all")
    raw = {source[i].id: source[i] for i in range(28)}
    assert len(shown) == 24
    for record in shown:
        assert record.captions == raw[record.id].captions
        error = np.square(record.image.astype(float) - raw[record.id].image).mean()
        assert 10 * np.log10(255**2 / error) > 20
