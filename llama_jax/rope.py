"""Rotary position embedding with the Llama 3.1 frequency scaling.

Source: RoFormer (arXiv 2104.09864); the scaling is Meta's `apply_scaling` (llama3/model.py), which
transformers calls rope_type "llama3". Pairs are (i, i + H/2), Hugging Face's half-split order; the
checkpoint readers permute Meta's interleaved weights to it.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of every rotated pair: float32 [H/2], fastest first.

    Every step is rounded to float32 where Meta's code and transformers round, so the values are
    equal to theirs to the bit: one unit in the last place moves logits by 1e-3 of their range at
    position 90,000.
    """
    f32 = np.float32
    exponents = np.arange(0, head_dim, 2, dtype=f32) / f32(head_dim)
    inv_freq = f32(1) / np.power(rope.theta, exponents.astype(np.float64)).astype(f32)
    wavelength = f32(2 * np.pi) / inv_freq
    longest_kept = rope.original_max_seq_len / rope.high_freq_factor
    shortest_divided = rope.original_max_seq_len / rope.low_freq_factor
    keep = (f32(rope.original_max_seq_len) / wavelength - f32(rope.low_freq_factor)) / f32(
        rope.high_freq_factor - rope.low_freq_factor
    )
    divided = inv_freq / f32(rope.factor)
    interpolated = (f32(1) - keep) * inv_freq / f32(rope.factor) + keep * inv_freq
    return np.select(
        [wavelength < longest_kept, wavelength > shortest_divided], [inv_freq, divided], interpolated
    ).astype(f32)


def rope_angles(rope: RopeConfig, head_dim: int, positions: Array) -> tuple[Array, Array]:
    """Sines and cosines for positions int32 [B, T]: two float32 [B, T, H/2].

    float32 because bfloat16 rounds 257 to 256.
    """
    angles = positions.astype(jnp.float32)[..., None] * inverse_frequencies(rope, head_dim)
    return jnp.sin(angles), jnp.cos(angles)


def rotate(x: Array, sin: Array, cos: Array) -> Array:
    """Rotate the pairs of x [B, T, ..., H] by angles whose sin and cos are float32 [B, T, H/2].

    The rotation runs in float32; the result has the dtype of x.
    """
    between = tuple(range(2, x.ndim - 1))
    sin, cos = jnp.expand_dims(sin, between), jnp.expand_dims(cos, between)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
