"""Attention of grouped queries over keys and values that are never repeated.

The one place that picks a kernel by platform: tiles on CPUs (kernels/tiled.py), elsewhere still the
reference, which XLA compiles everywhere. The invariant: a query sees a key if the key's position is
not after its own and both belong to the same document. Positions and documents are data, so packed
rows, right padding and any order of the sequence over the mesh need no other mask.

Letters: B batch, T queries, S keys, K KV heads, G query heads per KV head, H head dimension, M = T * G.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec, reshard

from llama_jax.kernels.tiled import tiled_attention

_MAX_BLOCKS = 8
_MIN_BLOCK = 128


class Tokens(NamedTuple):
    """Where each token of a batch stands: positions int32 [B, T] and, or None, segment_ids int32 [B, T]."""

    positions: Array
    segment_ids: Array | None


def attend(q: Array, k: Array, v: Array, *, queries: Tokens, keys: Tokens, out_sharding: PartitionSpec) -> Array:
    """Softmax attention of q [B, T, K, G, H] over k and v [B, K, S, H]; returns [B, T, K, G, H].

    Every device attends with the queries and keys that it holds. Where the mesh splits S (a cache),
    it does not split T and G, and the partial softmaxes are merged by their maximum and sum.
    """
    q_split, kv_split = jax.typeof(q).sharding.spec, jax.typeof(k).sharding.spec
    slots = kv_split[2]
    merged_axes = () if slots is None else (slots,) if isinstance(slots, str) else tuple(slots)
    key_rows = None if keys.positions.shape[0] == 1 else kv_split[0]
    query_split, key_split = PartitionSpec(*q_split[:2]), PartitionSpec(key_rows, slots)
    keys = jax.tree.map(lambda ids: reshard(ids, key_split), keys)
    out = jax.shard_map(
        partial(_attend_here, merged_axes=merged_axes),
        in_specs=(q_split, kv_split, kv_split, query_split, key_split),
        out_specs=q_split,
    )(q, k, v, queries, keys)
    return reshard(out, out_sharding)


def _attend_here(q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, *, merged_axes: tuple[str, ...]) -> Array:
    """`attend` on one device. Scores and sums are float32, exponentials enter the product with v in its dtype.

    Queries and their groups are one matrix side, M = T * G, so that forward and backward are plain
    batched products; contracting T and G apart transposes the scores on CPU.
    """
    batch, length, num_kv_heads, num_groups, head_dim = q.shape
    q = q.transpose(0, 2, 1, 3, 4).reshape(batch, num_kv_heads, length * num_groups, head_dim)
    scores = jnp.einsum("BKMH,BKSH->BKMS", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = scores.reshape(batch, num_kv_heads, length, num_groups, k.shape[2])
    visible = keys.positions[:, None, :] <= queries.positions[:, :, None]
    if queries.segment_ids is not None and keys.segment_ids is not None:
        visible &= keys.segment_ids[:, None, :] == queries.segment_ids[:, :, None]
    # A finite floor: a row of padding that sees nothing then averages instead of giving NaN.
    scores = jnp.where(visible[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    if merged_axes:
        highest = jax.lax.pmax(highest, merged_axes)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1)
    weights = weights.reshape(batch, num_kv_heads, length * num_groups, -1).astype(v.dtype)
    out = jnp.einsum("BKMS,BKSH->BKMH", weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, num_kv_heads, length, num_groups, head_dim)
    if merged_axes:
        out, total = jax.lax.psum((out, total), merged_axes)
    return (out / total[..., None]).transpose(0, 2, 1, 3, 4).astype(v.dtype)


def self_attend(q: Array, k: Array, v: Array, *, tokens: Tokens, out_sharding: PartitionSpec) -> Array:
    """`attend` of a sequence over itself, in order; here k and v are [B, S, K, H], whole in S.

    The kernel is that of the mesh's platform. Where the mesh splits the queries, each device scores
    its own in one piece.
    """
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    whole = out_sharding[1] is None
    if whole and jax.sharding.get_abstract_mesh().abstract_device.platform == "cpu":
        return _tiled_self_attend(q, k, v, tokens)
    if whole:
        return _blocked_self_attend(q, k, v, tokens, out_sharding)
    keys = jax.tree.map(lambda ids: reshard(ids, PartitionSpec(out_sharding[0], None)), tokens)
    return attend(q, k, v, queries=tokens, keys=keys, out_sharding=out_sharding)


def _tiled_self_attend(q: Array, k: Array, v: Array, tokens: Tokens) -> Array:
    """`self_attend` on CPUs, on every device with what it holds."""
    q_split, kv_split = jax.typeof(q).sharding.spec, jax.typeof(k).sharding.spec
    # Without check_vma, or every loop in the kernel would have to say what its first values vary over.
    run = jax.shard_map(
        lambda q, k, v, tokens: tiled_attention(q, k, v, *tokens),
        in_specs=(q_split, kv_split, kv_split, PartitionSpec(q_split[0], None)),
        out_specs=q_split,
        check_vma=False,
    )
    return run(q, k, v, tokens)


def _blocked_self_attend(q: Array, k: Array, v: Array, tokens: Tokens, out_sharding: PartitionSpec) -> Array:
    """`self_attend` by XLA alone: a block of queries skips the keys after it, which halves work and memory."""
    length = q.shape[1]
    block = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))

    @jax.checkpoint
    def attend_block(q, k, v, queries, keys):
        return attend(q, k, v, queries=queries, keys=keys, out_sharding=out_sharding)

    def part(tokens: Tokens, start: int, stop: int) -> Tokens:
        return jax.tree.map(lambda x: x[:, start:stop], tokens)

    blocks = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        queries, keys = part(tokens, start, stop), part(tokens, 0, stop)
        blocks.append(attend_block(q[:, start:stop], k[:, :, :stop], v[:, :, :stop], queries, keys))
    return jnp.concatenate(blocks, axis=1)
