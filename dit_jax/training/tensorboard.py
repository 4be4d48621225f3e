"""What TensorBoard shows of a run: an event file for every start of it.

An event is on disk when the call returns. The writers of TensorBoard's libraries leave that to a thread, minutes
later: a killed run would lose what it told, and where the thread meets a full disk it dies, and the run waits for it
for ever. Here that is an OSError like any other.

The file is a sequence of records: length (8 bytes), its checksum (4), an ``Event``, its checksum (4); little-endian,
checksums are masked CRC-32C (the format TFRecord).
"""

import io
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class Board:
    """Events of one start of a run.

    Args:
      folder: for the event files; made if it is not there.
      step: that the run starts from. What earlier starts told of later steps is hidden.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        self._path = folder / f"events.out.tfevents.{now:.6f}.{socket.gethostname()}"
        self._add(step + 1, file_version="brain.Event:2")
        self._add(step + 1, session_log={"status": "START"})

    def numbers(self, step: int, row: Mapping[str, float]) -> None:
        """A point in the curve of each number."""
        self._add(step, summary={"value": [{"tag": name, "simple_value": value} for name, value in row.items()]})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 ``[height, width, 3]``."""
        from PIL import Image

        height, width, channels = image.shape
        png = io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        told = {"height": height, "width": width, "colorspace": channels, "encoded_image_string": png.getvalue()}
        self._add(step, summary={"value": [{"tag": name, "image": told}]})

    def _add(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        data = Event(wall_time=time.time(), step=step, **what).SerializeToString()
        length = struct.pack("<Q", len(data))
        with self._path.open("ab") as file:
            file.write(length + _checksum(length) + data + _checksum(data))


def _checksum(data: bytes) -> bytes:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    return struct.pack("<I", masked_crc32c(data))
