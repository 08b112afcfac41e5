"""Splash attention on TPUs: the kernel that ships with JAX, with its causal mask told by numbers.

Source: jax.experimental.pallas.ops.tpu.splash_attention, forward and backward as FlashAttention-2 (arXiv
2307.08691), keys and values of grouped queries never repeated. JAX's own make_splash_mha looks at every
block of the mask on the host, 80 s at 131,072 tokens; which blocks of a causal mask are empty follows from
the places of the queries, which may be known to the device alone. The invariant: a query sees the keys of
its document whose index is not above its place, so positions that do not rise with the index inside a
document must not come here.

Letters: B batch, T queries, S keys, K KV heads, G query heads per KV head, H head dimension, N = K * G.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, QKVLayout, SegmentIds
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
    DEFAULT_MASK_VALUE,
    SplashAttentionKernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from llama_jax.kernels import SAVED_NAME, Tokens

# Queries and keys in a block. Larger ones read the keys less often; the scores of this one and what the
# backward pass keeps beside them still fit the 16 MiB of vector memory that a kernel of v4 and v5e has.
BLOCK = 1024

# What the kernel can cut.
_LANES = 128


def splash_attention(
    q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, places: Array, *, interpret: bool = False
) -> Array:
    """Softmax attention with sums in float32, returned in the dtype of q; interpret runs it on a CPU.

    Takes and gives what `tiled_attention` does: q [B, T, K, G, H], k and v [B, K, S, H], places int32 [T].
    """
    batch, length, num_kv_heads, num_groups, head_dim = q.shape
    # Padded queries see the first key or nothing and their result is cut off; no query sees padded keys.
    pad, key_pad = -length % _LANES, -k.shape[2] % _LANES
    rows = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype).transpose(0, 2, 3, 1, 4)
    rows = _longer(rows.reshape(batch, num_kv_heads * num_groups, length, head_dim), pad)
    segments = None
    if queries.segment_ids is not None and keys.segment_ids is not None:
        segments = SegmentIds(*map(_padded_ids, (queries.segment_ids, keys.segment_ids), (pad, key_pad)))
    kernel = _causal_kernel(jnp.pad(places, (0, pad)), k.shape[2] + key_pad, interpret=interpret)
    out: Array = jax.vmap(kernel)(rows, _longer(k, key_pad), _longer(v, key_pad), segments)  # type: ignore[assignment]
    out = out[:, :, :length].reshape(batch, num_kv_heads, num_groups, length, head_dim)
    return out.transpose(0, 3, 1, 2, 4)


def _causal_kernel(places: Array, num_keys: int, *, interpret: bool) -> SplashAttentionKernel:
    """The kernel of queries at these places, int32 [T], over num_keys keys."""
    block_q, block_kv = math.gcd(BLOCK, len(places)), math.gcd(BLOCK, num_keys)
    # The products before it leave q, k and v with the sequence along the lanes: read so, they are not copied.
    layouts = dict.fromkeys(("q_layout", "k_layout", "v_layout"), QKVLayout.SEQ_MINOR)
    by_queries, by_keys = _causal_blocks(places, num_keys, block_q, block_kv)
    return SplashAttentionKernel(
        by_queries,
        by_queries,
        by_keys,
        block_sizes=BlockSizes(
            *(block_q, block_kv, block_kv), *(block_q, block_kv, block_kv), *(block_q, block_kv), **layouts
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=SAVED_NAME,
        mask_function=_not_after,
        interpret=interpret,
    )


def _causal_blocks(places: Array, num_keys: int, block_q: int, block_kv: int) -> tuple[MaskInfo, MaskInfo]:
    """Which blocks are scored, and which block is fetched ahead of those that are not.

    By queries (forward and their gradient) the grid goes over the keys of a block of queries: after
    the last that it sees comes the first for the next. By keys (their gradients) it goes over the
    queries of a block of keys: before the first that sees it comes that first.
    """
    last_places = places.reshape(-1, block_q).max(axis=1)
    num_q, num_kv = len(last_places), num_keys // block_kv
    scored = last_places[:, None] >= jnp.arange(num_kv) * block_kv
    small = jnp.int8 if max(num_q, num_kv) <= 128 else jnp.int32  # scalar memory is scarce
    next_kv = jnp.where(scored, jnp.arange(num_kv), 0)
    next_q = lax.cummin(jnp.where(scored, jnp.arange(num_q)[:, None], num_q - 1), axis=0, reverse=True)

    def info(fetched: Array) -> MaskInfo:
        return MaskInfo(
            data_next=fetched[None].astype(small),
            mask_next=None,
            block_mask=scored[None].astype(small),
            partial_mask_blocks=None,
            q_sequence=places,  # type: ignore[arg-type]
        )

    return info(next_kv), info(next_q)


def _not_after(places: Array, keys: Array) -> Array:
    return places >= keys


def _longer(x: Array, pad: int) -> Array:
    """[B, N, T, H] with pad more along T."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0)))


def _padded_ids(ids: Array, pad: int) -> Array:
    return jnp.pad(ids, ((0, 0), (0, pad)), constant_values=-1)
