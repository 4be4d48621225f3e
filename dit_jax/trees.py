"""Names, masks and counts of the leaves of a parameter tree."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def leaf_name(path: tuple) -> str:
    """A tree path as one string, e.g. ``blocks_0/attention/qkv/kernel``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """All leaves by name, in tree order."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def mask_by_name(tree: Any, keep: Callable[[str], bool]) -> Any:
    """A tree of the same structure with ``keep(name)`` at every leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, _: keep(leaf_name(path)), tree)


def count_parameters(tree: Any) -> int:
    """How many numbers the leaves hold together (arrays or their shapes)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def mismatches(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, Any]) -> list[str]:
    """Why leaves cannot stand for others of the same names, a line for each that does not fit.

    Args:
      found: their shapes by name.
      expected: the leaves, or their shapes and dtypes, that are wanted.
    """
    return [
        *(f"missing {name}" for name in expected if name not in found),
        *(f"extra {name}" for name in found if name not in expected),
        *(
            f"misshapen {name} {found[name]}, expected {leaf.shape}"
            for name, leaf in expected.items()
            if found.get(name, leaf.shape) != leaf.shape
        ),
    ]
