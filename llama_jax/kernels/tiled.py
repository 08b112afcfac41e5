"""Causal attention in tiles that stay in a CPU's cache, forward and backward.

Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2. XLA:CPU writes the scores of a whole
sequence to memory between any two operations on them; here a tile of queries meets one tile of keys
after the other, and only the result and the log of its softmax's sum are kept for the backward pass.
The invariant: queries and keys stand in the same order, so that tiles of keys after the queries are
skipped; who sees whom within a tile is said by positions and segments alone.

Letters: B batch, T queries, S keys, K KV heads, G query heads per KV head, H head dimension; M = T * G
rows of queries; t and s a tile's queries and keys.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

TILE = 64

# What a remat policy can ask to keep, so that the backward pass does not attend again.
SAVED_NAME = "attention"

_LOWEST = float(jnp.finfo(jnp.float32).min)

# Arrays [B, T] that say who sees whom: positions and, or not, segment ids.
_Ids = tuple[Array, ...]


def tiled_attention(q: Array, k: Array, v: Array, positions: Array, segment_ids: Array | None) -> Array:
    """Softmax attention of a sequence over itself, computed in float32, returned in the dtype of v.

    q [B, T, K, G, H], k and v [B, K, T, H]; positions and segment_ids int32 [B, T]; returns
    [B, T, K, G, H]. A query sees the keys of its segment at positions up to its own.
    """
    batch, length, num_kv_heads, num_groups, head_dim = q.shape
    tile = min(TILE, length)
    pad = -length % tile
    # Padding stands after every query, so that it is seen by itself alone.
    ids = (jnp.pad(positions, ((0, 0), (0, pad)), constant_values=jnp.iinfo(jnp.int32).max),)
    if segment_ids is not None:
        ids += (jnp.pad(segment_ids, ((0, 0), (0, pad)), constant_values=-1),)
    rows = (q.astype(jnp.float32) * head_dim**-0.5).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(batch, num_kv_heads, length * num_groups, head_dim)
    k, v, dtype = k.astype(jnp.float32), v.astype(jnp.float32), v.dtype
    out = _attend(tile, _longer(rows, pad * num_groups), _longer(k, pad), _longer(v, pad), ids)
    out = out[:, :, : length * num_groups]  # type: ignore[index]
    out = out.reshape(batch, num_kv_heads, length, num_groups, head_dim)
    return out.transpose(0, 2, 1, 3, 4).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tile: int, q: Array, k: Array, v: Array, ids: _Ids) -> Array:
    """Scaled q [B, K, M, H] over k and v [B, K, S, H] with ids [B, S]; tile divides S."""
    return _forward(tile, q, k, v, ids)[0]


def _forward(tile: int, q: Array, k: Array, v: Array, ids: _Ids) -> tuple[Array, tuple]:
    num_tiles = k.shape[2] // tile
    rows = q.shape[2] // num_tiles

    def attend_tile(i: Array) -> tuple[Array, Array]:
        queries = _cut(q, i, rows)

        def meet(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, total, out = carry
            scores = _scores(queries, _cut(k, j, tile), _visible(ids, i, j, tile))
            now_highest = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - now_highest), jnp.exp(highest - now_highest)
            seen = jnp.einsum("BKMS,BKSH->BKMH", _flat(weights), _cut(v, j, tile))
            return now_highest, total * shrink + weights.sum(axis=-1, keepdims=True), out * _flat(shrink) + seen

        zero = jnp.zeros((*q.shape[:2], tile, rows // tile, 1))
        highest, total, out = lax.fori_loop(0, i + 1, meet, (zero + _LOWEST, zero, jnp.zeros_like(queries)))
        return out / _flat(total), _flat(highest + jnp.log(total))

    out, log_total = (_joined(x) for x in lax.map(attend_tile, jnp.arange(num_tiles)))
    out, log_total = checkpoint_name(out, SAVED_NAME), checkpoint_name(log_total, SAVED_NAME)
    return out, (q, k, v, ids, out, log_total)


def _backward(tile: int, saved: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, ids, out, log_total = saved
    num_tiles = k.shape[2] // tile
    rows = q.shape[2] // num_tiles
    # What would be subtracted from every score rides along in the products, as one more column:
    # q k - log_total, whose exponential is the softmax, and d_out v - sum(d_out out).
    ones = jnp.ones((*k.shape[:3], 1), k.dtype)
    q_more, k_more = _beside(q, -log_total), _beside(k, ones)
    d_more, v_more = _beside(d_out, -jnp.sum(d_out * out, axis=-1, keepdims=True)), _beside(v, ones)

    def attend_tile(gradients: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        queries, d_queries = _cut(q_more, i, rows), _cut(d_more, i, rows)

        def meet(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            keys = _cut(k_more, j, tile)
            weights = jnp.exp(_scores(queries, keys, _visible(ids, i, j, tile)))
            d_weights = jnp.einsum("BKMH,BKSH->BKMS", d_queries, _cut(v_more, j, tile))
            d_scores = _flat(weights * d_weights.reshape(weights.shape))
            dq += jnp.einsum("BKMS,BKSH->BKMH", d_scores, keys[..., :-1])
            dk = _add(dk, j, jnp.einsum("BKMS,BKMH->BKSH", d_scores, queries[..., :-1]))
            dv = _add(dv, j, jnp.einsum("BKMS,BKMH->BKSH", _flat(weights), d_queries[..., :-1]))
            return dq, dk, dv

        dq, dk, dv = lax.fori_loop(0, i + 1, meet, (jnp.zeros_like(queries[..., :-1]), *gradients))
        return (dk, dv), dq

    (dk, dv), dq = lax.scan(attend_tile, (jnp.zeros_like(k), jnp.zeros_like(v)), jnp.arange(num_tiles))
    return _joined(dq), dk, dv, None


_attend.defvjp(_forward, _backward)


def _scores(q: Array, k: Array, visible: Array) -> Array:
    """Products of queries [B, K, t * G, H] and keys [B, K, s, H] as [B, K, t, G, s], lowest where not visible."""
    scores = jnp.einsum("BKMH,BKSH->BKMS", q, k)
    return jnp.where(visible, scores.reshape(*scores.shape[:2], visible.shape[2], -1, scores.shape[-1]), _LOWEST)


def _visible(ids: _Ids, i: Array, j: Array, tile: int) -> Array:
    """Whether each query of tile i sees each key of tile j: bool [B, 1, t, 1, s]."""
    queries = [lax.dynamic_slice_in_dim(x, i * tile, tile, axis=1)[:, None, :, None, None] for x in ids]
    keys = [lax.dynamic_slice_in_dim(x, j * tile, tile, axis=1)[:, None, None, None, :] for x in ids]
    visible = keys[0] <= queries[0]
    return visible if len(ids) == 1 else visible & (keys[1] == queries[1])


def _longer(x: Array, pad: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0)))


def _cut(x: Array, i: Array, size: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * size, size, axis=2)


def _add(x: Array, i: Array, part: Array) -> Array:
    """The sum of x and a part that stands at its i-th tile."""
    size = part.shape[2]
    return lax.dynamic_update_slice_in_dim(x, _cut(x, i, size) + part, i * size, axis=2)


def _beside(x: Array, column: Array) -> Array:
    return jnp.concatenate([x, column], axis=-1)


def _flat(x: Array) -> Array:
    """[B, K, t, G, ...] -> [B, K, t * G, ...]."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _joined(x: Array) -> Array:
    """Tiles [n, B, K, m, ...] -> [B, K, n * m, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
