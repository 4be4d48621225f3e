"""What travels between the devices of a compiled train step, read in its program.

The compiler inserts it (`dit_jax.sharding`), so it is counted where it can be seen: in the optimised program that every
device runs. Devices need not be there for that: a program for 64 is compiled on any machine.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
INSTRUCTION = re.compile(rf"^\s*(?:ROOT )?%?[\w.-]+ = (.+?) ({'|'.join(KINDS)})(?:-start)?\(", re.MULTILINE)
ARRAY = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")


class Traffic(NamedTuple):
    """What one kind of collective moves in a step.

    Attributes:
      calls: how many there are; the compiler may make one of several.
      numbers: of all their results on a device.
    """

    calls: int
    numbers: int


def traffic(program: str) -> dict[str, Traffic]:
    """By kind, of the text of a compiled program; a kind that is not there is left out."""
    counts: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for kind, sizes in _instructions(program):
        counts[kind] += 1
        numbers[kind] += sum(sizes)
    return {kind: Traffic(counts[kind], numbers[kind]) for kind in KINDS if kind in counts}


def _instructions(program: str) -> Iterator[tuple[str, list[int]]]:
    """The kind of every collective and how many numbers each of its results has."""
    for result, kind in INSTRUCTION.findall(program):
        yield kind, [math.prod(map(int, filter(None, shape.split(",")))) for shape in ARRAY.findall(result)]
