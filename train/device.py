"""Host batches onto the mesh, each process bringing the rows that its devices hold a part of."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, get_mesh

from llama_jax.mesh import ShardingRules
from train.data.packing import Batch


def local_rows(num_rows: int, seq_len: int, rules: ShardingRules) -> list[int]:
    """The rows of a global batch [num_rows, seq_len] that this process's devices hold any part of, rising."""
    held = _sharding(rules).addressable_devices_indices_map((num_rows, seq_len))
    return sorted({row for index in held.values() if index for row in range(num_rows)[index[0]]})


def put_batch(
    batch: Batch, rules: ShardingRules, *, rows: Sequence[int] | None = None, num_rows: int | None = None
) -> Batch:
    """A batch [B, T] on the mesh, split as the model splits it.

    rows: which rows of the global batch [num_rows, T] it holds, in rising order and at least `local_rows`;
    without them it is the global batch itself.
    """
    sharding = _sharding(rules)
    shape = (len(batch.tokens) if num_rows is None else num_rows, batch.tokens.shape[1])
    numbers = np.arange(shape[0]) if rows is None else np.asarray(rows)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            first = np.searchsorted(numbers, start)
            return array[first : first + stop - start, index[1]]

        return jax.make_array_from_callback(shape, sharding, part)

    return Batch(*map(place, batch))


def _sharding(rules: ShardingRules) -> NamedSharding:
    return NamedSharding(get_mesh(), rules("batch", "sequence"))
