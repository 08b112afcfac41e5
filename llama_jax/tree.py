"""The leaves of a model, which is a tree of arrays, by name."""

from typing import Any

import jax


def leaf_name(path: Any) -> str:
    """A leaf's path, as `jax.tree.map_with_path` gives it, dotted, without nnx's `value`: "layers.3.attention.wq"."""
    parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    return ".".join(part for part in parts if part != "value")
