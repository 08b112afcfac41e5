"""Attention of grouped queries over keys and values that are never repeated.

The one place that will pick a kernel by platform; today there is the reference alone, which XLA
compiles everywhere. The invariant: a query sees a key if the key's position is not after its own
and both belong to the same document. Positions and documents are data, so packed rows, right
padding and any order of the sequence over the mesh need no other mask.

Letters: B batch, T queries, S keys, K KV heads, G query heads per KV head, H head dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec, reshard

_MAX_BLOCKS = 8
_MIN_BLOCK = 128


class Tokens(NamedTuple):
    """Where each token of a batch stands: positions int32 [B, T] and, or None, segment_ids int32 [B, T]."""

    positions: Array
    segment_ids: Array | None


def attend(q: Array, k: Array, v: Array, *, queries: Tokens, keys: Tokens, out_sharding: PartitionSpec) -> Array:
    """Softmax attention of q [B, T, K, G, H] over k and v [B, S, K, H]; returns [B, T, K, G, H].

    Scores and softmax are float32, the probabilities enter the product with v in the dtype of v.
    A split S (a cache over the mesh) is reduced across devices, which is the merge of partial
    softmaxes by their maximum and sum.
    """
    # T before G, as in q: any other order transposes the largest array of the layer on CPU, 3.4x slower.
    scores = jnp.einsum("BTKGH,BSKH->BKTGS", q, k, preferred_element_type=jnp.float32)
    visible = keys.positions[:, None, :] <= queries.positions[:, :, None]
    if queries.segment_ids is not None and keys.segment_ids is not None:
        visible &= keys.segment_ids[:, None, :] == queries.segment_ids[:, :, None]
    # A finite floor: a row of padding that sees nothing then averages instead of giving NaN.
    scores = jnp.where(visible[:, None, :, None], scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    scores = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    probs = scores / scores.sum(axis=-1, keepdims=True)
    return jnp.einsum("BKTGS,BSKH->BTKGH", probs.astype(v.dtype), v, out_sharding=out_sharding)


def self_attend(q: Array, k: Array, v: Array, *, tokens: Tokens, out_sharding: PartitionSpec) -> Array:
    """`attend` of a sequence over itself, in order: a block of queries skips the keys after it.

    Halves the work and bounds the memory to one block of scores, also in the backward pass. Where
    the mesh splits the queries, each device scores its own in one piece. k and v are whole in S.
    """
    length = q.shape[1]
    block = max(_MIN_BLOCK, -(-length // _MAX_BLOCKS))
    if length <= block or out_sharding[1] is not None:
        keys = jax.tree.map(lambda ids: reshard(ids, PartitionSpec(out_sharding[0], None)), tokens)
        return attend(q, k, v, queries=tokens, keys=keys, out_sharding=out_sharding)

    @jax.checkpoint
    def attend_block(q, k, v, queries, keys):
        return attend(q, k, v, queries=queries, keys=keys, out_sharding=out_sharding)

    def part(tokens: Tokens, start: int, stop: int) -> Tokens:
        return jax.tree.map(lambda x: x[:, start:stop], tokens)

    blocks = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        queries, keys = part(tokens, start, stop), part(tokens, 0, stop)
        blocks.append(attend_block(q[:, start:stop], k[:, :stop], v[:, :stop], queries, keys))
    return jnp.concatenate(blocks, axis=1)
