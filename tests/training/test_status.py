"""The status of a run says how it is and how it ended, over all of its processes."""

import json
from datetime import UTC, datetime

import pytest

from dit_jax.errors import DataError, DivergedError, PreemptedError, Told
from dit_jax.training.status import EARLIER, Status
from dit_jax.workdir import STATUS

NOW = datetime.now(UTC)


def read(workdir):
    return json.loads((workdir / STATUS).read_text())


def test_a_status_goes_through_the_life_of_a_run(tmp_path):
    with Status(tmp_path, 0, 10, 0.0, NOW) as status:
        assert not status.earlier and read(tmp_path)["state"] == "starting"
        assert status.done(4, 2.5) == 2.5
        status.saved(3)
    first = read(tmp_path)
    assert (first["state"], first["step"], first["total_steps"], first["restarts"]) == ("stopped", 4, 10, 0)
    assert first["productive_seconds"] == 2.5 and first["saved"] == 3
    with Status(tmp_path, 4, 10, 2.5, datetime.now(UTC)) as status:
        assert status.earlier == first
        assert status.done(10, 1.0) == 3.5  # what the checkpoint says, and what came since
    last = read(tmp_path)
    assert (last["state"], last["step"], last["restarts"], last["begun"]) == ("done", 10, 1, first["begun"])
    ended = {"start": 0, "step": 4, "state": "stopped", "reason": "", "updated": first["updated"]}
    assert first["earlier"] == [] and last["start"] == 4 and last["earlier"] == [ended]
    assert last["productive_seconds"] == 3.5 and last["wall_seconds"] >= first["wall_seconds"]


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (PreemptedError("SIGTERM: step 3 is saved"), "preempted", "SIGTERM: step 3 is saved"),
        (Told("SIGUSR1"), "preempted", "SIGUSR1"),
        (DivergedError("nan"), "diverged", "nan"),
        (DataError("no such file"), "failed", "no such file"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (ZeroDivisionError("a bug"), "failed", "a bug"),
    ],
)
def test_the_reason_of_an_end_is_kept(tmp_path, error, state, reason):
    with pytest.raises(type(error)), Status(tmp_path, 0, 10, 0.0, NOW) as status:
        status.done(3, 1.0)
        raise error
    found = read(tmp_path)
    assert (found["state"], found["step"], found["reason"]) == (state, 3, reason)


def test_a_run_that_was_killed_when_all_was_done_is_done(tmp_path):
    path = tmp_path / STATUS
    with Status(tmp_path, 9, 10, 0.0, NOW):
        training = path.read_text()
    path.write_text(training)  # as a process leaves it that is killed
    Status(tmp_path, 10, 10, 0.0, NOW).settle()
    done = path.read_text()
    assert (read(tmp_path)["state"], read(tmp_path)["step"]) == ("done", 10)
    Status(tmp_path, 10, 10, 0.0, NOW).settle()
    assert path.read_text() == done


def test_only_the_latest_processes_are_remembered(tmp_path):
    for start in range(EARLIER + 3):
        Status(tmp_path, start, 100, 0.0, NOW).stalled("again")
    found = read(tmp_path)
    assert [one["start"] for one in found["earlier"]] == list(range(2, EARLIER + 2)) and found["start"] == EARLIER + 2


def test_one_that_stalls_says_so_before_it_ends(tmp_path):
    with Status(tmp_path, 0, 10, 0.0, NOW) as status:
        status.stalled("step 4 has not ended")
        assert (read(tmp_path)["state"], read(tmp_path)["reason"]) == ("stalled", "step 4 has not ended")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"restarts": 3}', '{"begun": "long ago", "restarts": 1}'])
def test_what_cannot_be_read_begins_anew(tmp_path, text):
    (tmp_path / STATUS).write_text(text)
    with Status(tmp_path, 0, 10, 0.0, NOW):
        assert read(tmp_path)["restarts"] == 0


def test_a_full_disk_hides_no_reason(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="no such file"), Status(tmp_path, 0, 10, 0.0, NOW):
        monkeypatch.setattr("dit_jax.training.status.write_whole", full)
        raise DataError("no such file")
