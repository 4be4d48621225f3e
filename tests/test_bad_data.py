"""Data as they are: bad records are replaced alike however a run is fed, and readers may be killed, stopped or fail."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image

from dit_jax import main
from dit_jax.precompute import precompute
from tests.noise_pictures import SQUARE, draw_noise
from tests.tiny_run import tiny_config, tiny_flags, train_tiny

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = {"sample_every": "0", "save_every": "0", "log_every": "1"}

# --- bad records --------------------------------------------------------------------------------------------

BAD = {  # by the beginning of the reason
    "cannot be decoded": "truncated.png",
    "too small: 1x1": "dot.png",
    "too many pixels": "bomb.png",
    "empty file": "zero.png",
    "not a picture": "html.png",
    "cannot be read: No such file": "gone.png",
    "no caption": "silent.png",
    "caption is not valid UTF-8": "latin.png",
    "caption is longer than 65,536": "endless.png",
}
ODD = ("rgba.png", "cmyk.tif", "deep.png", "moving.gif")  # are converted


def draw_all_kinds(folder):
    """A folder with each kind of bad record, each kind of unusual one, and 19 plain ones: 32 in all."""
    draw_noise(folder, [SQUARE] * 19)
    plain = Image.open(folder / "00.png")
    for name in BAD.values():
        plain.save(folder / name)
    (folder / "truncated.png").write_bytes((folder / "00.png").read_bytes()[:-2000])
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("1", (10_000, 9_000)).save(folder / "bomb.png")
    (folder / "zero.png").write_bytes(b"")
    (folder / "html.png").write_bytes(b"<html>404</html>")
    (folder / "gone.png").unlink()
    Image.new("RGBA", SQUARE, (255, 0, 0, 100)).save(folder / "rgba.png")
    Image.new("CMYK", SQUARE, (0, 255, 255, 0)).save(folder / "cmyk.tif")
    Image.new("I;16", SQUARE, 0x80FF).save(folder / "deep.png")
    Image.new("RGB", SQUARE, "red").save(
        folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", SQUARE, "blue")]
    )
    captions = dict.fromkeys((*BAD.values(), *ODD), b'"a picture"')
    captions |= {"silent.png": b"null", "latin.png": b'"caf\xe9"', "endless.png": b'"%s"' % (b"word " * 20_000)}
    rows = [b'{"file_name": "%s", "text": %s}' % (name.encode(), text) for name, text in captions.items()]
    with (folder / "metadata.jsonl").open("ab") as file:
        file.write(b"\n" + b"\n".join(rows))
    return f"folder:{folder}"


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_bad_records_are_replaced_alike_in_every_way_of_feeding_and_listed(tmp_path, capfd):
    source = draw_all_kinds(tmp_path / "pictures")
    common = {"data__source": source, "data__max_bad_fraction": "0.5", "total_steps": "6", **QUICK}
    precompute(tiny_config(**common), tmp_path / "cache", 0, 1, 4096)
    ways = {
        "once": {},
        "threads": {"data__encode": "every_step"},
        "workers": {"data__encode": "every_step", "data__workers": "2"},
        "cache": {"data__source": f"cache:{tmp_path / 'cache'}"},
    }
    runs = {name: train_tiny(tmp_path / name, **common | way) for name, way in ways.items()}
    lists = {name: rows_of(run / "bad_records.jsonl") for name, run in runs.items() if name != "cache"}
    lists["cache"] = rows_of(tmp_path / "cache" / "bad_records.jsonl")
    for name, listed in lists.items():
        found = {row["id"]: row["reason"] for row in listed}
        assert len(listed) == len(found) and found.keys() == set(BAD.values()), name
        assert all(found[id].startswith(reason) for reason, id in BAD.items()), (name, found)
    assert lists["threads"] == lists["workers"]
    assert not {row["replaced_by"] for row in lists["threads"]} & {*BAD.values(), None}
    losses = {name: [row["loss"] for row in rows_of(run / "metrics.jsonl")] for name, run in runs.items()}
    assert losses["threads"] == losses["workers"] and losses["once"] == losses["cache"]
    assert "Warning" not in capfd.readouterr().err  # of Pillow, in the workers
    assert losses["once"] == pytest.approx(losses["threads"], rel=1e-4) and len(losses["once"]) == 6


@pytest.mark.parametrize("encode", ["once", "every_step"])
def test_too_many_bad_records_end_the_program_with_code_3(encode, tmp_path, capsys):
    source = draw_all_kinds(tmp_path / "pictures")
    flags = tiny_flags(
        tmp_path / "run", data__source=source, data__max_bad_fraction="0.1", data__encode=encode, **QUICK
    )
    with pytest.raises(SystemExit) as exit:
        main.main(flags)
    error = capsys.readouterr().err
    assert exit.value.code == 3 and error.count("\n") == 1
    assert "4 of 32 records are bad, more than data.max_bad_fraction=0.1 allows; the first: " in error
    assert len(rows_of(tmp_path / "run" / "bad_records.jsonl")) == 4


# --- workers ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(workdir, **changes):
    """A real run that goes on for long, and is not left behind."""
    flags = tiny_flags(workdir, total_steps="100000", data__encode="every_step", data__workers="2", **QUICK, **changes)
    command = [sys.executable, "-m", "dit_jax.main", *flags]
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        try:
            yield run
        finally:
            run.kill()


def steps_done(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_step(run, workdir, step):
    end = time.monotonic() + 120
    while steps_done(workdir) < step:
        assert run.poll() is None and time.monotonic() < end, run.stderr.read()
        time.sleep(0.01)


def workers_of(run):
    """Ids of its workers; Python starts another process beside them."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    threads = [path.read_text().split() for path in Path(f"/proc/{run.pid}/task").glob("*/children")]
    every = {int(pid) for pids in [children, *threads] for pid in pids}
    return sorted(pid for pid in every if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at /proc")
def test_a_run_goes_on_when_a_worker_is_killed_and_ends_when_one_hangs(tmp_path):
    source = draw_noise(tmp_path / "pictures", [SQUARE] * 40)
    with program(tmp_path / "run", data__source=source, data__patience="15") as run:
        wait_for_step(run, tmp_path / "run", 3)
        killed, _ = workers_of(run)
        os.kill(killed, signal.SIGKILL)
        begin = steps_done(tmp_path / "run")
        wait_for_step(run, tmp_path / "run", begin + 60)
        assert len(workers_of(run)) == 2 and killed not in workers_of(run)
        os.kill(workers_of(run)[0], signal.SIGSTOP)
        assert run.wait(60) == 3
        told = run.stderr.read().splitlines()
    assert "was killed by SIGKILL" in told[0] and "it is started again, at item" in told[0]
    assert len(told) == 2, told
    assert told[1].startswith("data error: ") and "nothing came for 15 seconds" in told[1]
    expected = train_tiny(
        tmp_path / "alone",
        data__source=source,
        total_steps="100000",
        stop_at_step=str(begin + 60),
        data__encode="every_step",
        **QUICK,
    )
    rows = (expected / "metrics.jsonl").read_text()
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(rows)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at /proc")
def test_a_run_ends_when_workers_cannot_read(tmp_path):
    """The disk that the tars are on goes away."""
    draw_noise(tmp_path / "pictures", [SQUARE] * 40)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for picture in sorted((tmp_path / "pictures").glob("*.png")):
            tar.add(picture, picture.name)
            text = tarfile.TarInfo(f"{picture.stem}.txt")
            text.size = 9
            tar.addfile(text, io.BytesIO(b"a picture"))
    with program(tmp_path / "run", data__source=f"wds:{tmp_path / 'tars'}") as run:
        wait_for_step(run, tmp_path / "run", 3)
        (tmp_path / "tars").rename(tmp_path / "away")
        assert run.wait(60) == 3
        told = run.stderr.read()
    assert told.count("\n") == 1 and told.startswith("data error: cannot read ") and "is the disk" in told
