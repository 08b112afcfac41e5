"""Attention for one platform each, every one tested against the reference in attention.py; here, what they share."""

from typing import NamedTuple

from jax import Array

# What a remat policy can ask to keep of attention, so that the backward pass does not attend again.
SAVED_NAME = "attention"


class Tokens(NamedTuple):
    """Where each token of a batch stands: positions int32 [B, T] and, or None, segment_ids int32 [B, T]."""

    positions: Array
    segment_ids: Array | None


def visible(queries: Tokens, keys: Tokens) -> Array:
    """Whether each query sees each key, bool [B, T, S]: the key is of its document and not after it."""
    seen = keys.positions[:, None, :] <= queries.positions[:, :, None]
    if queries.segment_ids is None or keys.segment_ids is None:
        return seen
    return seen & (keys.segment_ids[:, None, :] == queries.segment_ids[:, :, None])
