"""The order of a sequence that is split over devices, in which each has the same causal work.

Source: The Llama 3 Herd of Models (arXiv 2407.21783) section 3.3.2. Of C devices the i-th holds chunks
i and 2C-1-i of the sequence's 2C: a chunk near the beginning, whose queries see few keys, beside one near
the end. The invariant: only `Llama` turns to this order and back; what it takes and gives is in plain order.

Letters: B batch, T tokens of the whole sequence, C devices that it is split over.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import get_abstract_mesh


def two_ended(x: Array, num_shards: int) -> Array:
    """From plain into two-ended order: x [B, T, ...], whole in T; C = num_shards, and 2C divides T."""
    batch, length, *rest = x.shape
    chunks = x.reshape(batch, 2 * num_shards, -1, *rest)
    pairs = jnp.stack([chunks[:, :num_shards], chunks[:, : num_shards - 1 : -1]], axis=2)
    return pairs.reshape(batch, length, *rest)


def plain(x: Array, num_shards: int) -> Array:
    """From two-ended into plain order: x [B, T, ...], whole in T."""
    batch, length, *rest = x.shape
    pairs = x.reshape(batch, num_shards, 2, -1, *rest)
    return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1).reshape(batch, length, *rest)


def places(shard: Array | int, num_shards: int, length: int) -> Array:
    """Plain indices int32 [length] of the tokens that one of num_shards devices holds, length = T / C."""
    chunk, index = length // 2, jnp.arange(length, dtype=jnp.int32)
    later = index + (2 * num_shards - 2 - shard) * chunk
    return jnp.where(index < chunk, index + shard * chunk, later) if num_shards > 1 else index


def plain_split(x: Array) -> Array:
    """From two-ended into plain order: x [B, T, ...], split in T over one mesh axis; as it is if T is not split.

    Of a device's two chunks one is even and one odd, and chunks 2i and 2i + 1 go to device i: two
    exchanges, each between different devices.
    """
    spec = jax.typeof(x).sharding.spec
    axis = spec[1]
    if axis is None:
        return x
    num_shards = get_abstract_mesh().shape[axis]
    holders = [min(chunk, 2 * num_shards - 1 - chunk) for chunk in range(2 * num_shards)]

    def exchange(x: Array) -> Array:
        early, late = jnp.split(x, 2, axis=1)
        is_even = lax.axis_index(axis) % 2 == 0
        even, odd = jnp.where(is_even, early, late), jnp.where(is_even, late, early)
        even = lax.ppermute(even, axis, [(holder, i) for i, holder in enumerate(holders[::2])])
        odd = lax.ppermute(odd, axis, [(holder, i) for i, holder in enumerate(holders[1::2])])
        return jnp.concatenate([even, odd], axis=1)

    return jax.shard_map(exchange, in_specs=spec, out_specs=spec)(x)
