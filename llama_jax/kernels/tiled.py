"""Causal attention in tiles that stay in a CPU's cache, forward and backward.

Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2. XLA:CPU writes the scores of a whole
sequence to memory between any two operations on them; here a tile of queries meets one tile of keys
after the other, and only the result and the log of its softmax's sum are kept for the backward pass.
The invariant: a tile of queries meets the tiles of keys up to the last of its places and skips those after
it; who sees whom within a tile is said by positions and segments alone.

Letters: B batch, T queries, S keys, K KV heads, G query heads per KV head, H head dimension; M = T * G
rows of queries; t and s a tile's queries and keys.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from llama_jax.kernels import SAVED_NAME, Tokens, visible

TILE = 128  # the least; of long sequences an eighth, up to four times as much

_LOWEST = float(jnp.finfo(jnp.float32).min)


def tiled_attention(
    q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, places: Array, *, tile: int | None = None
) -> Array:
    """Softmax attention computed in float32, returned in the dtype of v.

    q [B, T, K, G, H], k and v [B, K, S, H], keys in plain order; places int32 [T] are the indices of
    the queries among the keys. Returns [B, T, K, G, H]. A query sees the keys of its segment at
    positions up to its own, none of which may stand after its place. tile: tokens of a tile, by default what is best
    where queries and keys are one sequence, of which tiles skip half.
    """
    batch, length, num_kv_heads, num_groups, head_dim = q.shape
    tile = min(length, tile or max(TILE, min(4 * TILE, 1 << (-(-length // 8) - 1).bit_length())))
    pad = -length % tile
    last_places = jnp.pad(places, (0, pad)).reshape(-1, tile).max(axis=1)
    rows = (q.astype(jnp.float32) * head_dim**-0.5).transpose(0, 2, 1, 3, 4)
    rows = _longer(rows.reshape(batch, num_kv_heads, length * num_groups, head_dim), pad * num_groups)
    k32, v32 = (_longer(x.astype(jnp.float32), -k.shape[2] % tile) for x in (k, v))
    out = _attend(tile, rows, k32, v32, _padded(queries, tile), _padded(keys, tile), last_places // tile + 1)
    out = out[:, :, : length * num_groups]  # type: ignore[index]
    out = out.reshape(batch, num_kv_heads, length, num_groups, head_dim)
    return out.transpose(0, 2, 1, 3, 4).astype(v.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tile: int, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, stops: Array) -> Array:
    """Scaled q [B, K, M, H] over k and v [B, K, S, H]; tile divides T and S.

    The i-th tile of queries meets the first stops[i] tiles of keys.
    """
    return _forward(tile, q, k, v, queries, keys, stops)[0]


def _forward(
    tile: int, q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, stops: Array
) -> tuple[Array, tuple]:
    num_tiles = len(stops)
    rows = q.shape[2] // num_tiles

    def attend_tile(i: Array) -> tuple[Array, Array]:
        q_tile = _cut(q, i, rows)

        def meet(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, total, out = carry
            scores = _scores(q_tile, _cut(k, j, tile), _visible(queries, keys, i, j, tile))
            now_highest = jnp.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights, shrink = jnp.exp(scores - now_highest), jnp.exp(highest - now_highest)
            seen = jnp.einsum("BKMS,BKSH->BKMH", _flat(weights), _cut(v, j, tile))
            return now_highest, total * shrink + weights.sum(axis=-1, keepdims=True), out * _flat(shrink) + seen

        zero = jnp.zeros((*q.shape[:2], tile, rows // tile, 1))
        highest, total, out = lax.fori_loop(0, stops[i], meet, (zero + _LOWEST, zero, jnp.zeros_like(q_tile)))
        return out / _flat(total), _flat(highest + jnp.log(total))

    out, log_total = (_joined(x) for x in lax.map(attend_tile, jnp.arange(num_tiles)))
    out, log_total = checkpoint_name(out, SAVED_NAME), checkpoint_name(log_total, SAVED_NAME)
    return out, (q, k, v, queries, keys, stops, out, log_total)


def _backward(tile: int, saved: tuple, d_out: Array) -> tuple[Array, Array, Array, None, None, None]:
    q, k, v, queries, keys, stops, out, log_total = saved
    num_tiles = len(stops)
    rows = q.shape[2] // num_tiles
    # What would be subtracted from every score rides along in the products, as one more column:
    # q k - log_total, whose exponential is the softmax, and d_out v - sum(d_out out).
    ones = jnp.ones((*k.shape[:3], 1), k.dtype)
    q_more, k_more = _beside(q, -log_total), _beside(k, ones)
    d_more, v_more = _beside(d_out, -jnp.sum(d_out * out, axis=-1, keepdims=True)), _beside(v, ones)

    def attend_tile(gradients: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        q_tile, d_tile = _cut(q_more, i, rows), _cut(d_more, i, rows)

        def meet(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            k_tile = _cut(k_more, j, tile)
            weights = jnp.exp(_scores(q_tile, k_tile, _visible(queries, keys, i, j, tile)))
            d_weights = jnp.einsum("BKMH,BKSH->BKMS", d_tile, _cut(v_more, j, tile))
            d_scores = _flat(weights * d_weights.reshape(weights.shape))
            dq += jnp.einsum("BKMS,BKSH->BKMH", d_scores, k_tile[..., :-1])
            dk = _add(dk, j, jnp.einsum("BKMS,BKMH->BKSH", d_scores, q_tile[..., :-1]))
            dv = _add(dv, j, jnp.einsum("BKMS,BKMH->BKSH", _flat(weights), d_tile[..., :-1]))
            return dq, dk, dv

        dq, dk, dv = lax.fori_loop(0, stops[i], meet, (jnp.zeros_like(q_tile[..., :-1]), *gradients))
        return (dk, dv), dq

    (dk, dv), dq = lax.scan(attend_tile, (jnp.zeros_like(k), jnp.zeros_like(v)), jnp.arange(num_tiles))
    return _joined(dq), dk, dv, None, None, None


_attend.defvjp(_forward, _backward)


def _scores(q: Array, k: Array, visible: Array) -> Array:
    """Products of queries [B, K, t * G, H] and keys [B, K, s, H] as [B, K, t, G, s], lowest where not visible."""
    scores = jnp.einsum("BKMH,BKSH->BKMS", q, k)
    return jnp.where(visible, scores.reshape(*scores.shape[:2], visible.shape[2], -1, scores.shape[-1]), _LOWEST)


def _visible(queries: Tokens, keys: Tokens, i: Array, j: Array, tile: int) -> Array:
    """Whether each query of tile i sees each key of tile j: bool [B, 1, t, 1, s]."""

    def cut(tokens: Tokens, i: Array) -> Tokens:
        return jax.tree.map(lambda ids: lax.dynamic_slice_in_dim(ids, i * tile, tile, axis=1), tokens)

    seen = visible(cut(queries, i), cut(keys, j))
    return seen[:, None, :, None]


def _padded(tokens: Tokens, multiple: int) -> Tokens:
    """Padding at the end, which no query before it sees."""
    pad = ((0, 0), (0, -tokens.positions.shape[1] % multiple))
    positions = jnp.pad(tokens.positions, pad, constant_values=jnp.iinfo(jnp.int32).max)
    segment_ids = tokens.segment_ids
    return Tokens(positions, None if segment_ids is None else jnp.pad(segment_ids, pad, constant_values=-1))


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
