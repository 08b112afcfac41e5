"""The KV cache of one layer, behind the only protocol that attention knows: update, then read.

The contiguous cache keeps the token at position p of a row in slot p. What a right-padded prompt
writes beyond its end is overwritten by the tokens that follow before any query can see it, so no
length is stored. Caches are values: update returns a new one, and jitted callers donate the old.
"""

from dataclasses import dataclass, field
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from llama_jax.attention import Tokens
from llama_jax.config import LlamaConfig
from llama_jax.mesh import ShardingRules


class LayerCache(Protocol):
    """Keys and values of one layer.

    empty is static: nothing has been stored yet, so the first tokens see each other alone and
    need not read the cache.
    """

    @property
    def empty(self) -> bool:
        """Whether update was never called."""
        ...

    def update(self, k: Array, v: Array, positions: Array) -> Self:
        """The cache with k and v [B, T, K, H] of tokens at positions int32 [B, T] stored."""
        ...

    def read(self) -> tuple[Array, Array, Tokens]:
        """Keys and values [B, K, S, H] and where each stands; slots never written are ahead of every query."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ContiguousCache:
    """One array of keys and one of values [B, K, S, H], S split over `context` and the query-group axes.

    A head's slots lie together, as the products of attention read them; [B, S, K, H] is copied into
    that order at every step on CPU.
    """

    k: Array
    v: Array
    empty: bool = field(default=False, metadata={"static": True})

    def update(self, k: Array, v: Array, positions: Array) -> "ContiguousCache":
        """Store k and v [B, T, K, H] in the slots named by positions; those outside the cache are dropped."""
        sharding = jax.typeof(self.k).sharding.spec
        return ContiguousCache(_write(self.k, k, positions, sharding), _write(self.v, v, positions, sharding))

    def read(self) -> tuple[Array, Array, Tokens]:
        """All slots; slot s is position s."""
        slots = jnp.arange(self.k.shape[2], dtype=jnp.int32)[None]
        return self.k, self.v, Tokens(slots, None)


def _write(cache: Array, values: Array, positions: Array, sharding: PartitionSpec) -> Array:
    """Scatter values [B, T, K, H] into cache [B, K, S, H], on every device into the slots that it holds."""
    batch, heads, sequence, _ = sharding
    sequence_axes = (sequence,) if isinstance(sequence, str) else tuple(sequence or ())

    def write_local(cache, values, positions):
        num_slots = cache.shape[2]
        first = jax.lax.axis_index(sequence_axes) * num_slots if sequence_axes else 0
        slots = positions - first
        # Out of range on the left would wrap around; num_slots is out of range and so dropped.
        slots = jnp.where(slots < 0, num_slots, slots)
        rows = jnp.arange(cache.shape[0])[:, None]
        return cache.at[rows, :, slots].set(values.astype(cache.dtype), mode="drop")

    values = jax.sharding.reshard(values, PartitionSpec(batch, None, heads, None))
    positions = jax.sharding.reshard(positions, PartitionSpec(batch, None))
    return jax.shard_map(
        write_local,
        in_specs=(sharding, PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)),
        out_specs=sharding,
    )(cache, values, positions)


def init_cache(
    cfg: LlamaConfig, rules: ShardingRules, batch_size: int, num_slots: int, *, dtype: DTypeLike
) -> tuple[ContiguousCache, ...]:
    """An empty cache for every layer, batch_size rows of num_slots tokens.

    Raises ValueError if the mesh does not divide the rows or the slots.
    """
    if batch_size % rules.batch_multiple or num_slots % rules.cache_multiple:
        raise ValueError(
            f"a cache of {batch_size} rows x {num_slots} tokens cannot be split: rows must be a multiple of "
            f"{rules.batch_multiple} and tokens of {rules.cache_multiple}"
        )
    shape = (batch_size, cfg.num_kv_heads, num_slots, cfg.head_dim)
    sharding = rules("batch", "kv_heads", "cache_sequence", None)

    def zeros() -> Array:
        return jnp.zeros(shape, dtype, out_sharding=sharding)

    return tuple(ContiguousCache(zeros(), zeros(), empty=True) for _ in range(cfg.num_layers))
