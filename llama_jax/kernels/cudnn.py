"""Attention by cuDNN on GPUs from Hopper on: the kernel that ships with JAX, told where each document begins.

Source: jax._src.cudnn.fused_attention_stablehlo, FlashAttention-2 (arXiv 2307.08691) forward and backward. Its
public face, jax.nn.dot_product_attention, takes no documents; the packed form behind it takes offsets and
lengths, and as it aligns a causal mask top-left, queries and keys must be the same tokens. The invariant: what
the kernel could not keep apart does not reach it: a row of too many documents, one whose documents stand in
several places, a sequence split over devices, or a dtype that it lacks goes to `otherwise`, which is exact.

Letters: B batch, T queries and keys, K KV heads, G query heads per KV head, H head dimension, N = K * G,
M = MOST_DOCUMENTS.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name

from llama_jax.kernels import SAVED_NAME, Tokens

Kernel = Callable[[Array, Array, Array, Tokens, Tokens, Array], Array]

# The kernel takes packed documents from compute capability 9.0 on. Names that the driver gives to data center
# GPUs; what is not known to keep documents apart is not picked.
_KINDS = re.compile(r"NVIDIA (H20|G?[HB]\d{3})\b")

# Below it the offsets of keys are counted in the heads of queries, silently wrong (jax pull request 39521).
_GROUPED_OFFSETS = (0, 12)

# Documents of a row at most. The kernel writes sums in float32 for each of them, [B, M, N, T]: as many bytes as q.
MOST_DOCUMENTS = 64


def suits(device_kind: str) -> bool:
    """Whether GPUs of this name ("NVIDIA H100 80GB HBM3") have the kernel."""
    return _KINDS.match(device_kind) is not None


def cudnn_attention(
    q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, places: Array, *, otherwise: Kernel
) -> Array:
    """Softmax attention with sums in float32, returned in the dtype of q.

    Takes and gives what `tiled_attention` does: q [B, T, K, G, H], k and v [B, K, S, H]. otherwise: what
    attends where the kernel cannot.
    """
    batch, length, num_kv_heads, num_groups, head_dim = q.shape
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 256
    if not fits or k.shape[2] != length:  # other lengths: S is split over devices
        return otherwise(q, k, v, queries, keys, places)

    def attend(*documents: Array) -> Array:
        heads = q.reshape(batch, length, num_kv_heads * num_groups, head_dim)
        out = _attend(heads, k.swapaxes(1, 2), v.swapaxes(1, 2), *documents)
        return out.reshape(q.shape)

    if queries.segment_ids is None:
        return checkpoint_name(attend(), SAVED_NAME)
    starts, lengths, apart = documents(queries.segment_ids)
    return lax.cond(
        apart,
        lambda: checkpoint_name(attend(starts, lengths), SAVED_NAME),
        lambda: otherwise(q, k, v, queries, keys, places),
    )


def documents(segment_ids: Array) -> tuple[Array, Array, Array]:
    """Where the documents of each row begin, and their lengths, as the kernel takes them.

    segment_ids: int32 [B, T]. Returns starts int32 [B, M + 1] and lengths int32 [B, M], both -1 beyond a row's
    last document; and whether these are all, and each id stands in one place of its row: bool [].
    """
    length = segment_ids.shape[1]
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    firsts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    starts = jax.vmap(lambda row: jnp.nonzero(row, size=MOST_DOCUMENTS + 1, fill_value=-1)[0])(firsts)
    starts = starts.astype(jnp.int32)
    ends = jnp.where(starts[:, 1:] < 0, length, starts[:, 1:])
    used = starts[:, :-1] >= 0
    lengths = jnp.where(used, ends - starts[:, :-1], -1)
    # Each slot that is not used gets an id of its own, far from those of documents and of padding.
    unused = jnp.iinfo(jnp.int32).min + jnp.arange(MOST_DOCUMENTS, dtype=jnp.int32)
    ids = jnp.where(used, jnp.take_along_axis(segment_ids, starts[:, :-1], axis=1), unused)
    ids = jnp.sort(ids, axis=1)
    return starts, lengths, (starts[:, -1] < 0).all() & (ids[:, 1:] != ids[:, :-1]).all()


def _attend(q: Array, k: Array, v: Array, starts: Array | None = None, lengths: Array | None = None) -> Array:
    """Causal attention of q [B, T, N, H] over k and v [B, T, K, H], in each document alone where there are any."""
    scale = q.shape[-1] ** -0.5
    if starts is None:
        return cudnn.dot_product_attention(q, k, v, scale=scale, mask_type=cudnn.MaskType.CAUSAL)  # type: ignore
    if jax.__version_info__ < _GROUPED_OFFSETS:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    return cudnn.dot_product_attention(  # type: ignore[return-value]
        q,
        k,
        v,
        q_seqlen=lengths,
        kv_seqlen=lengths,
        q_offsets=starts,
        kv_offsets=starts,
        scale=scale,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )
