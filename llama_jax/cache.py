"""The KV cache of one layer, behind the only protocol that attention knows: update, then attend.

The contiguous cache keeps the token at position p of a row in slot p; the paged one in a slot of the page
that the row's table names, of a pool that all rows share. What a right-padded prompt writes beyond its end
is overwritten by the tokens that follow before any query can see it, so no length is stored. Caches are
values: update returns a new one, and jitted callers donate the old.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec, reshard
from jax.typing import DTypeLike

from llama_jax.attention import Tokens, attend, attend_pages, mesh_axes, page_head_dim
from llama_jax.config import LlamaConfig
from llama_jax.kernels.paged import Pages, is_narrow, write_pages
from llama_jax.mesh import ShardingRules

Stored = TypeVar("Stored")


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

    def attend(self, q: Array, positions: Array) -> Array:
        """Attention of q [B, T, K, G, H] over what is stored and not after its position; split as q is."""
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
        axes = mesh_axes(jax.typeof(self.k).sharding.spec[2])

        def write(cache: ContiguousCache, k: Array, v: Array, positions: Array) -> ContiguousCache:
            num_slots = cache.k.shape[2]
            slots = positions - (jax.lax.axis_index(axes) * num_slots if axes else 0)
            # Out of range on the left would wrap around; num_slots is out of range and so dropped.
            slots = jnp.where(slots < 0, num_slots, slots)
            # A head at a time: of whole tokens a TPU would keep the cache as [B, S, K, H], and copy it to read it.
            rows, heads = jnp.arange(len(slots))[:, None, None], jnp.arange(k.shape[2])
            k, v = (
                old.at[rows, heads, slots[..., None]].set(new.astype(old.dtype), mode="drop")
                for old, new in ((cache.k, k), (cache.v, v))
            )
            return ContiguousCache(k, v)

        return _update(write, ContiguousCache(self.k, self.v), k, v, positions)

    def attend(self, q: Array, positions: Array) -> Array:
        """Over all slots; slot s is position s."""
        rows, heads, *_ = jax.typeof(self.k).sharding.spec
        queries = Tokens(reshard(positions, PartitionSpec(rows, None)), None)
        keys = Tokens(jnp.arange(self.k.shape[2], dtype=jnp.int32)[None], None)
        # The mesh axes that split queries elsewhere split the slots here: every device scores all
        # queries of its KV heads against the slots that it holds.
        whole = reshard(q, PartitionSpec(rows, None, heads, None, None))
        return attend(whole, self.k, self.v, queries=queries, keys=keys, out_sharding=jax.typeof(q).sharding.spec)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """Pools of pages and, for each row, the numbers of its pages in order: table int32 [B, N], -1 for none.

    The pages are split over the batch axes, so that every data shard has rows and pages of its own and
    counts them from 0; the slots of a page like those of the contiguous cache. All layers share one table.
    """

    pages: Pages
    table: Array
    empty: bool = field(default=False, metadata={"static": True})

    def update(self, k: Array, v: Array, positions: Array) -> "PagedCache":
        """Store k and v [B, T, K, H]; dropped is what has a negative position or no page in the table."""
        write = partial(write_pages, axes=mesh_axes(jax.typeof(self.pages.k).sharding.spec[2]))
        return PagedCache(_update(write, self.pages, k, v, positions, self.table), self.table)

    def attend(self, q: Array, positions: Array) -> Array:
        """Over the pages of the table, of which there should be no more than the longest row needs."""
        return attend_pages(q, self.pages, self.table, positions)


def _update(write: Callable[..., Stored], stored: Stored, k: Array, v: Array, *of_rows: Array) -> Stored:
    """write(stored, k, v, *of_rows) on every device, into the slots that it holds; of_rows are [B, ...]."""
    split = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, stored)
    rows, heads, *_ = jax.tree.leaves(split, is_leaf=lambda x: isinstance(x, PartitionSpec))[0]
    tokens, whole = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, None)
    run = jax.shard_map(write, in_specs=(split, tokens, tokens, *(whole for _ in of_rows)), out_specs=split)
    return run(stored, reshard(k, tokens), reshard(v, tokens), *(reshard(array, whole) for array in of_rows))


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
    zeros = partial(_zeros, cfg, rules, (batch_size, num_slots, cfg.head_dim), dtype)
    return tuple(ContiguousCache(zeros(), zeros(), empty=True) for _ in range(cfg.num_layers))


def init_pages(
    cfg: LlamaConfig, rules: ShardingRules, num_pages: int, page_size: int, *, dtype: DTypeLike
) -> tuple[Pages, ...]:
    """Pools of num_pages pages of page_size tokens for every layer; int8 and fp8 ones with their scales.

    num_pages counts those of all data shards. On TPUs a head is padded to whole lanes. Raises ValueError
    if the mesh does not divide the pages or their slots.
    """
    if num_pages % rules.batch_multiple or page_size % rules.cache_multiple:
        raise ValueError(
            f"{num_pages} pages of {page_size} tokens cannot be split: pages must be a multiple of "
            f"{rules.batch_multiple} and tokens of {rules.cache_multiple}"
        )
    zeros = partial(_zeros, cfg, rules, (num_pages, page_size, page_head_dim(cfg.head_dim)), dtype)
    scales = partial(_zeros, cfg, rules, (num_pages, page_size), jnp.float32)
    if is_narrow(dtype):
        return tuple(Pages(zeros(), zeros(), scales(), scales()) for _ in range(cfg.num_layers))
    return tuple(Pages(zeros(), zeros()) for _ in range(cfg.num_layers))


def _zeros(cfg: LlamaConfig, rules: ShardingRules, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """[rows, K, slots, ...] of a shape without K."""
    rows, *rest = shape
    axes = ("batch", "kv_heads", "cache_sequence", None)[: len(shape) + 1]
    return jnp.zeros((rows, cfg.num_kv_heads, *rest), dtype, out_sharding=rules(*axes))
