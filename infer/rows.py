"""Rows of a dispatch on the devices: taken from those that stay there and put back, each shard for itself.

Rows and pages are numbered within their shard of the batch axes. The invariant: what pads a batch is a row or a
page beyond all; it reads zeros and writes nowhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec, reshard

from llama_jax.cache import ContiguousCache, LayerCache, PagedCache
from llama_jax.kernels.paged import Pages, gather_pages
from llama_jax.mesh import ShardingRules, platform
from llama_jax.model import Llama


def of_rows(rules: ShardingRules, function: Callable, *trees: Any) -> Any:
    """Function of arrays [B, ...], each shard for itself."""
    return jax.shard_map(function, in_specs=rules("batch"), out_specs=rules("batch"), check_vma=False)(*trees)


def take_rows(rules: ShardingRules, tree: Any, rows: Array) -> Any:
    """Rows [B, ...] of arrays [R, ...]; zeros for those beyond all."""

    def take(tree: Any, rows: Array) -> Any:
        return jax.tree.map(lambda x: x.at[rows].get(mode="fill", fill_value=0), tree)

    return of_rows(rules, take, tree, rows)


def put_rows(rules: ShardingRules, tree: Any, rows: Array, new: Any) -> Any:
    """Arrays [R, ...] with rows [B, ...] replaced; those beyond all are dropped."""

    def put(tree: Any, rows: Array, new: Any) -> Any:
        return jax.tree.map(lambda old, x: old.at[rows].set(x, mode="drop"), tree, new)

    return of_rows(rules, put, tree, rows, new)


def split_rows(rules: ShardingRules, tree: Any) -> Any:
    """Arrays [B, ...], split over the batch axes."""
    return jax.tree.map(lambda x: reshard(x, PartitionSpec(*rules("batch"), *(None,) * (x.ndim - 1))), tree)


def readable(tree: Any) -> Any:
    """Whole on every device, so that every process can read them."""
    return jax.tree.map(lambda x: reshard(x, PartitionSpec()), tree)


def row_logits(model: Llama, hidden: Array) -> Array:
    """Logits float32 [B, T, V] of normed outputs [B, T, D], split over the batch axes alone."""
    return reshard(model.unembed(hidden), model.rules("batch", None, None))[..., : model.cfg.vocab_size]


# The pages of rows, a layer each.


def opened(model: Llama, pages: tuple[Pages, ...], table: Array, *, often: bool) -> tuple[LayerCache, ...]:
    """Caches of the rows whose pages a table int32 [B, N] names.

    Where a dispatch reads them often, a CPU reads its pages into rows once, and not in every step: there a gather
    costs as much as the attention itself. Values in a narrow type are read where they are, or what a step sees
    would depend on when its dispatch began.
    """
    paged = tuple(PagedCache(layer, table) for layer in pages)
    if often and platform() == "cpu" and model.rules.cache_multiple == 1 and pages[0].k_scale is None:
        return tuple(map(_gathered, paged))
    return paged


def closed(
    pages: tuple[Pages, ...], table: Array, caches: Any, *, began: Array, ended: Array, most: int
) -> tuple[Pages, ...]:
    """The pages with what rows now hold at positions began to ended int32 [B], of which there are at most so many."""
    if isinstance(caches[0], PagedCache):
        return tuple(cache.pages for cache in caches)
    stored = partial(_stored, began=began, ended=ended, most=most)
    return tuple(stored(layer, table, cache) for layer, cache in zip(pages, caches, strict=True))


def _gathered(cache: PagedCache) -> ContiguousCache:
    """The pages of every row, in order, as a cache of its own."""
    rows, heads, *_ = jax.typeof(cache.pages.k).sharding.spec
    split = PartitionSpec(rows, heads)
    run = jax.shard_map(
        partial(gather_pages, dtype=cache.pages.k.dtype), in_specs=(split, PartitionSpec(rows)), out_specs=split
    )
    return ContiguousCache(*run(cache.pages, cache.table))


def _stored(pages: Pages, table: Array, cache: ContiguousCache, *, began: Array, ended: Array, most: int) -> Pages:
    """`closed` of a layer. Whole pages are written: one that tokens are added to is its row's alone."""
    rows, heads, *_ = jax.typeof(cache.k).sharding.spec

    def store(pages: Pages, table: Array, cache: ContiguousCache, began: Array, ended: Array) -> Pages:
        num_pages, _, size, _ = pages.k.shape
        index = began[:, None] // size + jnp.arange((most + size - 2) // size + 1)
        page = jnp.take_along_axis(table, index, axis=1, mode="fill", fill_value=-1)
        page = jnp.where((index * size < ended[:, None]) & (page >= 0), page, num_pages)  # else dropped

        def put(pool: Array, values: Array) -> Array:
            values = values.reshape(*values.shape[:2], -1, size, values.shape[-1])
            new = jnp.take_along_axis(values, index[:, None, :, None, None], axis=2, mode="clip")
            return pool.at[page].set(new.swapaxes(1, 2), mode="drop")

        return Pages(put(pages.k, cache.k), put(pages.v, cache.v))

    of_heads, of_rows = PartitionSpec(rows, heads), PartitionSpec(rows)
    run = jax.shard_map(store, in_specs=(of_heads, of_rows, of_heads, of_rows, of_rows), out_specs=of_heads)
    return run(pages, table, cache, began, ended)
