"""Attention of single tokens over pages on GPUs: the kernel that ships with JAX, told one head a row.

Source: jax.experimental.pallas.ops.gpu.paged_attention, FlashAttention-2 (arXiv 2307.08691) with the keys of a
row split among blocks. It wants the pools of every head apart; as a head's slots of a page lie together, the
pools are read as pages of one head, and rows and heads are rows of a table over them, without a copy. The
invariant: what the kernel has not, several queries a row, partial softmaxes, sizes that are no powers of two or
too large for it, goes to `otherwise`, which is exact.

Letters: P pages, S slots, B rows, N pages of a row, T tokens, K KV heads, G query heads per KV head,
H head dimension.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.gpu import paged_attention as triton

from llama_jax.kernels.paged import Pages

# Bytes of the keys that a block of the kernel reads at once, and at most: with the values, and those that are
# read ahead, they are in shared memory. And splits of a row's keys, so that a few long rows fill a GPU.
_BLOCK_BYTES, _MAX_BLOCK_BYTES, _SPLITS = 2**14, 2**15, 16


def paged_attention(
    q: Array,
    pages: Pages,
    table: Array,
    positions: Array,
    *,
    otherwise: Callable[..., Array],
    axes: tuple[str, ...] = (),
    interpret: bool = False,
) -> Array:
    """Softmax attention of q [B, T, K, G, H] at positions int32 [B, T] over the pages of table int32 [B, N].

    Sums are float32. A query sees what is not after it: the table holds all its pages. One at a negative
    position gives zeros. axes: those of the mesh that split the slots of a page. otherwise: what attends
    where the kernel cannot.
    """
    batch, length, num_kv_heads, num_groups, head_dim = q.shape
    num_slots, num_pages = pages.k.shape[2], table.shape[1]
    powers_of_two = (num_slots, 16), (head_dim, 16), (num_pages, 1)  # and what they are at least
    of_page = num_slots * head_dim * q.dtype.itemsize
    has = length == 1 and not axes and pages.k.shape[3] == head_dim and of_page <= _MAX_BLOCK_BYTES
    if not has or any(size < least or size & (size - 1) for size, least in powers_of_two):
        return otherwise(q, pages, table, positions, axes=axes)
    heads = jnp.maximum(table, 0)[:, None] * num_kv_heads + jnp.arange(num_kv_heads)[:, None]
    k, v, k_scale, v_scale = (None if pool is None else pool.reshape(1, -1, *pool.shape[2:]) for pool in pages)
    out = triton.paged_attention(
        (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype).reshape(-1, num_groups, head_dim),
        k,  # type: ignore[arg-type]
        v,  # type: ignore[arg-type]
        heads.reshape(-1, num_pages),
        jnp.repeat(jnp.clip(positions[:, 0] + 1, 0, num_pages * num_slots), num_kv_heads),
        k_scale,
        v_scale,
        pages_per_compute_block=max(1, _BLOCK_BYTES // of_page),
        k_splits=min(_SPLITS, num_pages),
        interpret=interpret,
    )
    return out.reshape(q.shape)
