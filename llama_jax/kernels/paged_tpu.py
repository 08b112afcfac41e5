"""Attention over pages on TPUs: a step of the grid fetches the next pages of a row as its table says.

Source: FlashAttention-2 (arXiv 2307.08691) over the pages of PagedAttention (arXiv 2309.06180). The tables are
in scalar memory, so that Pallas fetches the pages of the next step while this one is computed. The kernels
that ship with JAX take heads of 128 alone, and give neither what has to be known to merge a softmax over
devices nor scales that need not be widened to the whole pool. The invariant: a page beyond the last that a
block of queries sees is neither fetched nor computed; within pages the positions decide.

Letters: P pages, S slots, B rows, N pages of a row, T tokens, K KV heads, G query heads per KV head,
H head dimension, M = T * G.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama_jax.kernels.paged import Pages, slots_here

# What one step of the grid may take of the 16 MiB of vector memory that a kernel of v4 and v5e has: pages and
# queries are there twice, and of the scores of a head the mask and the exponentials too.
_PAGE_BYTES = _QUERY_BYTES = 5 * 2**20
_MAX_PAGES = 8  # each is an argument of its own
_MAX_SLOTS = 512
_MAX_ROWS = 256  # as many as there are operations a byte that v4 computes in the time of reading it
_MAX_SCORES = _MAX_ROWS * _MAX_SLOTS
_MAX_TABLE = 2**17  # numbers in scalar memory, which has 1 MiB

# What the last two dimensions of an array are padded to.
_SUBLANES, _LANES = 16, 128

Kernel = Callable[..., Array]

_FLOOR = float(jnp.finfo(jnp.float32).min)


def paged_attention(
    q: Array,
    pages: Pages,
    table: Array,
    positions: Array,
    *,
    otherwise: Kernel,
    axes: tuple[str, ...] = (),
    interpret: bool = False,
) -> Array:
    """Softmax attention of q [B, T, K, G, H] at positions int32 [B, T] over the pages of table int32 [B, N].

    Sums are float32. axes: those of the mesh that split the slots of a page. A query sees what is in the
    table and not after it; one at a negative position, or beyond the table, gives zeros. otherwise: what
    attends where pages or the table are too large for the kernel.
    """
    if _bytes_of_page(pages) > _PAGE_BYTES or pages.k.shape[2] > _MAX_SLOTS or table.size > _MAX_TABLE:
        return otherwise(q, pages, table, positions, axes=axes)
    batch, length, num_kv_heads, num_groups, head_dim = q.shape
    first, page_size = slots_here(pages, axes)
    rows = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(batch, num_kv_heads, length * num_groups, head_dim)
    places = jnp.repeat(jnp.where(positions < table.shape[1] * page_size, positions, -1), num_groups, axis=1)
    run = functools.partial(_call, page_size=page_size, interpret=interpret)
    out, sums = run(rows, pages, table, places, jnp.asarray(first, jnp.int32))
    highest, total = sums[..., :1], sums[..., 1:]
    if axes:
        scale = jnp.exp(highest - jax.lax.pmax(highest, axes))
        out, total = jax.lax.psum((out * scale, total * scale), axes)
    out = (out / jnp.where(total > 0, total, 1.0)).astype(q.dtype)
    out = out[:, :, : length * num_groups, :head_dim].reshape(batch, num_kv_heads, length, num_groups, head_dim)
    return out.transpose(0, 2, 1, 3, 4)


def _pages_of_step(pages: Pages, num_pages: int) -> int:
    """How many of a row's pages one step of the grid fetches."""
    most = min(_MAX_PAGES, _MAX_SLOTS // pages.k.shape[2], _PAGE_BYTES // _bytes_of_page(pages))
    return max(1, min(most, num_pages))


def _bytes_of_page(pages: Pages) -> int:
    """Vector memory of a page's keys and values, each twice."""
    _, num_kv_heads, num_slots, head_dim = pages.k.shape
    return 4 * num_kv_heads * num_slots * max(head_dim, _LANES) * pages.k.dtype.itemsize


def _query_block(rows: Array, num_slots: int) -> int:
    """Rows of queries [B, K, M, H] in a block that meets so many slots at once: whole tiles."""
    num_kv_heads, length, head_dim = rows.shape[1:]
    # The queries in their dtype, their results and sums in float32.
    of_row = 2 * num_kv_heads * (max(head_dim, _LANES) * (rows.dtype.itemsize + 4) + _LANES * 4)
    most = min(_MAX_ROWS, _MAX_SCORES // num_slots, _QUERY_BYTES // of_row)
    num_blocks = -(-length // max(_SUBLANES, most // _SUBLANES * _SUBLANES))
    return -(-length // (num_blocks * _SUBLANES)) * _SUBLANES


@functools.partial(jax.jit, static_argnames=("page_size", "interpret"))
def _call(
    rows: Array, pages: Pages, table: Array, places: Array, first: Array, *, page_size: int, interpret: bool
) -> tuple[Array, Array]:
    """Products of rows [B, K, M, H] at places int32 [B, M] with exponentials, and their maxima and sums.

    These are float32 [B, K, M, H] and [B, K, M, 2], where M and H are padded.
    """
    num_pages = table.shape[1]
    step = _pages_of_step(pages, num_pages)
    block = _query_block(rows, step * pages.k.shape[2])
    pad = (0, -rows.shape[2] % block)
    rows = jnp.pad(rows, ((0, 0), (0, 0), pad, (0, pages.k.shape[3] - rows.shape[3])))
    places = jnp.pad(places, ((0, 0), pad), constant_values=-1)
    batch, num_kv_heads, length, head_dim = rows.shape
    num_blocks = length // block
    # The last page that any query of a block sees; -1 for none.
    last = places.reshape(batch, num_blocks, block).max(axis=2) // page_size
    scalars = table.reshape(-1), last.reshape(-1), first.reshape(1)

    def of_queries(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, num_kv_heads, block, *shape), lambda b, t, c, *_: (b, 0, t, 0))

    def of_page(i: int, *shape: int) -> pl.BlockSpec:
        def index(b, t, c, table, last, _):
            # After its last page a block stays there, and nothing is fetched.
            place = jnp.clip(c * step + i, 0, jnp.maximum(last[b * num_blocks + t], 0))
            return jnp.maximum(table[b * num_pages + place], 0), *(0,) * (len(shape) + 1)

        return pl.BlockSpec((1, num_kv_heads, *shape), index)

    arguments, specs = [rows, places[..., None]], [of_queries(head_dim)]
    specs.append(pl.BlockSpec((1, block, 1), lambda b, t, c, *_: (b, t, 0)))
    for pool in pages:
        if pool is not None:
            arguments += [pool] * step
            specs += [of_page(i, *pool.shape[2:]) for i in range(step)]
    return pl.pallas_call(
        functools.partial(_kernel, step=step, page_size=page_size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, num_blocks, -(-num_pages // step)),
            in_specs=specs,
            out_specs=[of_queries(head_dim), of_queries(2)],
        ),
        out_shape=[jax.ShapeDtypeStruct((*rows.shape[:3], n), jnp.float32) for n in (head_dim, 2)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="paged_attention",
    )(*scalars, *arguments)


def _kernel(table, last, first, rows, places, *refs, step: int, page_size: int):
    """One block of queries and the next few pages: refs are those of keys, values, any scales, results and sums."""
    *pools, out, sums = refs
    keys, values, *scales = (pools[i : i + step] for i in range(0, len(pools), step))
    row, block, column = (pl.program_id(axis) for axis in range(3))
    last_page = last[row * pl.num_programs(1) + block]
    num_pages = table.shape[0] // pl.num_programs(0)
    num_kv_heads, num_slots = keys[0].shape[1:3]

    @pl.when(column == 0)
    def _():
        out[...] = jnp.zeros(out.shape, out.dtype)
        sums[..., :1] = jnp.full((*sums.shape[:-1], 1), _FLOOR, sums.dtype)
        sums[..., 1:] = jnp.zeros((*sums.shape[:-1], 1), sums.dtype)

    def seen(i: int) -> Array:
        """Which slots of a page each query sees, bool [M, S]."""
        page = column * step + i
        held = (page < num_pages) & (table[row * num_pages + jnp.minimum(page, num_pages - 1)] >= 0)
        slots = jax.lax.broadcasted_iota(jnp.int32, (places.shape[1], num_slots), 1)
        return slots + (page * page_size + first[0]) <= jnp.where(held, places[0], -1)

    @pl.when(column * step <= last_page)
    def _():
        visible = [seen(i) for i in range(step)]
        for head in range(num_kv_heads):
            q = rows[0, head]
            scores = [_product(q, key[0, head].astype(q.dtype), 1) for key in keys]
            if scales:
                scores = [x * scale[0, head][None] for x, scale in zip(scores, scales[0], strict=True)]
            scores = [jnp.where(mask, x, _FLOOR) for x, mask in zip(scores, visible, strict=True)]
            before, total = sums[0, head, :, :1], sums[0, head, :, 1:]
            highest = functools.reduce(jnp.maximum, [x.max(axis=1, keepdims=True) for x in scores], before)
            rescale = jnp.exp(before - highest)
            # A query that has seen nothing yet has no maximum: its weights are zero and not one.
            weights = [jnp.where(mask, jnp.exp(x - highest), 0.0) for x, mask in zip(scores, visible, strict=True)]
            sums[0, head, :, :1] = highest
            sums[0, head, :, 1:] = total * rescale + sum(x.sum(axis=1, keepdims=True) for x in weights)
            if scales:
                weights = [x * scale[0, head][None] for x, scale in zip(weights, scales[1], strict=True)]
            products = [
                _product(x.astype(q.dtype), value[0, head].astype(q.dtype), 0)
                for x, value in zip(weights, values, strict=True)
            ]
            out[0, head] = out[0, head] * rescale + sum(products)


def _product(a: Array, b: Array, axis: int) -> Array:
    """A [M, X] times b over b's axis of size X, float32."""
    return jax.lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)
