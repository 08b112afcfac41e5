"""The pages of a KV cache on one device: how tokens are stored in them and read back in order.

Source: PagedAttention (arXiv 2309.06180). A pool holds pages of S slots; a row's table names its pages in
order, so that the token at position p of a row is in slot p % S of page table[p // S]. The invariant: what
lies beyond a row's tokens is garbage of whoever had the page before, finite, and hidden by its position.
In a narrow type each slot of a head has a scale of its own, its largest value over the type's.

Letters: P pages, S slots, B rows, N pages of a row, T tokens, K KV heads, H head dimension.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

# A position after every query.
_NEVER = jnp.iinfo(jnp.int32).max


class Pages(NamedTuple):
    """The pools of one layer: k and v [P, K, S, H], and, where they are int8 or fp8, scales float32 [P, K, S].

    A head's slots of one page lie together, so that [P * K, S, H] is the same memory. H may be more than
    the model's: what is beyond is zero.
    """

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None


def is_narrow(dtype: DTypeLike) -> bool:
    """Whether values of this dtype need a scale."""
    return jnp.dtype(dtype).itemsize == 1


def quantized(x: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """Values [..., H] in a narrow dtype and their scales float32 [...]; int8 is off by half a scale at most."""
    x = x.astype(jnp.float32)
    dtype = jnp.dtype(dtype)
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    scale = jnp.max(jnp.abs(x), axis=-1) / largest
    x = x / jnp.where(scale > 0, scale, 1.0)[..., None]
    return (jnp.round(x) if dtype == jnp.int8 else x).astype(dtype), scale


def write_pages(
    pages: Pages, k: Array, v: Array, positions: Array, table: Array, *, axes: tuple[str, ...] = ()
) -> Pages:
    """Store k and v [B, T, K, H] of tokens at positions int32 [B, T] in the pages of table int32 [B, N].

    axes are those of the mesh that split the slots of a page. Dropped are positions that are negative
    or on another device, and those whose page is not in the table or -1.
    """
    first, page_size = slots_here(pages, axes)
    num_pages, _, num_slots, head_dim = pages.k.shape
    pad = (0, 0), (0, 0), (0, 0), (0, head_dim - k.shape[3])
    k, v = jnp.pad(k, pad), jnp.pad(v, pad)
    page = jnp.take_along_axis(table, positions // page_size, axis=1, mode="fill", fill_value=-1)
    slot = positions % page_size - first
    here = (positions >= 0) & (page >= 0) & (slot >= 0) & (slot < num_slots)
    page = jnp.where(here, page, num_pages)  # out of range and so dropped
    # A head at a time: of whole tokens a TPU would keep the pool as [P, S, K, H], and copy it to read it.
    where = page[..., None], jnp.arange(k.shape[2]), slot[..., None]

    def stored(pool: Array, values: Array) -> Array:
        return pool.at[where].set(values.astype(pool.dtype), mode="drop")

    if pages.k_scale is None or pages.v_scale is None:
        return Pages(stored(pages.k, k), stored(pages.v, v))
    (k, k_scale), (v, v_scale) = (quantized(x, pages.k.dtype) for x in (k, v))
    new = (k, v, k_scale, v_scale)
    return Pages(*(stored(pool, values) for pool, values in zip(pages, new, strict=True)))  # type: ignore[arg-type]


def gather_pages(pages: Pages, table: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """Keys and values [B, K, N * S, H] of each row's pages in order; those of a page -1 are any."""
    batch, num_pages = table.shape
    num_kv_heads, num_slots, head_dim = pages.k.shape[1:]
    heads = jnp.maximum(table, 0)[:, None] * num_kv_heads + jnp.arange(num_kv_heads)[:, None]

    def read(pool: Array, scale: Array | None) -> Array:
        x = pool.reshape(-1, num_slots, head_dim)[heads]
        if scale is not None:
            x = x.astype(jnp.float32) * scale.reshape(-1, num_slots)[heads][..., None]
        return x.astype(dtype).reshape(batch, num_kv_heads, num_pages * num_slots, head_dim)

    return read(pages.k, pages.k_scale), read(pages.v, pages.v_scale)


def page_positions(pages: Pages, table: Array, *, axes: tuple[str, ...] = ()) -> Array:
    """Positions int32 [B, N * S] of what `gather_pages` gives; those of a page -1 are after every query."""
    first, page_size = slots_here(pages, axes)
    slots = jnp.arange(table.shape[1])[:, None] * page_size + first + jnp.arange(pages.k.shape[2])
    return jnp.where(table[:, :, None] >= 0, slots, _NEVER).reshape(table.shape[0], -1)


def slots_here(pages: Pages, axes: tuple[str, ...]) -> tuple[Array | int, int]:
    """The first of the slots of a page that are here, and how many there are on all devices."""
    num_slots = pages.k.shape[2]
    if not axes:
        return 0, num_slots
    return jax.lax.axis_index(axes) * num_slots, num_slots * math.prod(jax.lax.axis_size(axis) for axis in axes)
