"""TensorBoard's files hold what was told, at once, and a disk that takes no more is an error."""

import io
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from dit_jax.training.tensorboard import Board


def events(folder: Path) -> list[Event]:
    """The events of all files, as TensorBoard reads them: it looks at every checksum."""
    return [event for path in sorted(folder.iterdir()) for event in LegacyEventFileLoader(str(path)).Load()]


def test_what_is_told_is_on_disk_at_once_and_a_resumed_run_hides_what_it_does_again(tmp_path):
    Board(tmp_path, 0).numbers(7, {"loss": 0.5, "validation_x0_error/log_snr=3": 0.25})
    Board(tmp_path, 5).image(6, "samples", np.full((4, 8, 3), 200, np.uint8))
    first, begin, row, second, again, grid = events(tmp_path)
    assert first.file_version == second.file_version == "brain.Event:2"
    assert (begin.session_log.status, begin.step, again.session_log.status, again.step) == (
        *(SessionLog.START, 1),
        *(SessionLog.START, 6),  # what was told of steps from here on is of a life that was lost
    )
    assert row.step == 7
    assert [(v.tag, v.simple_value) for v in row.summary.value] == [
        ("loss", 0.5),
        ("validation_x0_error/log_snr=3", 0.25),
    ]
    (value,) = grid.summary.value
    with Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
        assert (grid.step, value.tag, image.size, image.getpixel((0, 0))) == (6, "samples", (8, 4), (200, 200, 200))


def test_a_disk_that_takes_no_more_is_an_error(tmp_path):
    """And not a thread that dies while the run waits for it."""
    board = Board(tmp_path, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            board.image(1, "samples", np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
