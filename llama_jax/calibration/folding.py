"""Inputs of products scaled so that less is lost in rounding, the scales folded into the op before: AWQ, SmoothQuant.

Sources: AWQ (arXiv 2306.00978), SmoothQuant (arXiv 2211.10438). The invariant: a layer folded computes what it did, to
float rounding, and is a plain layer.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.rounding import quantized
from llama_jax.schemes import Scheme

ALPHA = 0.5  # of SmoothQuant: the share of outliers that weights take over from activations

_EXPONENTS = np.linspace(0, 1, 20, endpoint=False, dtype=np.float32)  # AWQ's grid, where 0 is no scaling
_LEAST = 1e-4  # of the largest, for inputs that are next to never there


class Place(NamedTuple):
    """Products that take the same inputs, and the op before, whose outputs these are: a norm or a product."""

    before: str
    products: tuple[str, ...]


# The SwiGLU is linear in `up`, attention in the values, of which each head is the input of a group of query heads.
PLACES = (
    Place("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Place("self_attn.v_proj", ("self_attn.o_proj",)),
    Place("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Place("mlp.up_proj", ("mlp.down_proj",)),
)


def fold(
    layer: Mapping[str, np.ndarray], place: Place, scales: np.ndarray, head_dim: int, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """A layer with the columns of the products at a place multiplied by scales, and the op before divided by them.

    scales float32 [outputs of the op before]. dtype: in which norms are stored; what that costs, the
    products make up for.
    """
    before = layer[place.before]
    if before.ndim == 1:
        divided = (before / scales).astype(dtype).astype(np.float32)
        scales = np.divide(before, divided, out=np.ones_like(before), where=divided != 0)
    else:
        divided = before / scales[:, None]
    multiplied = {name: layer[name] * _spread(scales, layer[name].shape[1], head_dim) for name in place.products}
    return {**layer, place.before: divided, **multiplied}


def awq(
    matrices: Sequence[np.ndarray], products: np.ndarray, num_scales: int, head_dim: int, scheme: Scheme
) -> np.ndarray:
    """Scales float32 [num_scales] for the inputs of matrices [out, in]: powers of the inputs' size.

    The power is the one by which the outputs lose the least. products float32 [in, in]: the sum over tokens of
    their inputs' outer products; its diagonal has the size of each input, as a root mean square.
    """
    size = _at_least(_merged(np.sqrt(np.diag(products)), num_scales, head_dim))
    seen, weights = jnp.asarray(products), [jnp.asarray(matrix) for matrix in matrices]
    tried, lost = [], []
    for exponent in _EXPONENTS:
        scales = size**exponent
        scales /= np.sqrt(scales.max() * scales.min())
        spread = jnp.asarray(_spread(scales, len(products), head_dim))
        tried.append(scales)
        lost.append(sum(float(_lost(weight, seen, spread, scheme)) for weight in weights))
    return tried[int(np.argmin(lost))]


@functools.partial(jax.jit, static_argnums=3)
def _lost(matrix: Array, products: Array, scales: Array, scheme: Scheme) -> Array:
    """The squared error, summed, of the outputs of a matrix whose columns are scaled while it is rounded."""
    error = quantized(matrix * scales, scheme, (-1,)).dequantize() / scales - matrix
    return jnp.sum((error @ products) * error)


def smoothquant(
    matrices: Sequence[np.ndarray], largest: np.ndarray, num_scales: int, head_dim: int, scheme: Scheme
) -> np.ndarray:
    """Scales as of `awq`, which share out the outliers; largest float32 [in]: the inputs' largest magnitudes."""
    weights = np.max([np.abs(matrix).max(axis=0) for matrix in matrices], axis=0)
    inputs, weights = (_at_least(_merged(size, num_scales, head_dim)) for size in (largest, weights))
    return inputs**ALPHA / weights ** (1 - ALPHA)


def _at_least(size: np.ndarray) -> np.ndarray:
    return np.maximum(size, _LEAST * size.max()) if size.any() else np.ones_like(size)


def _merged(inputs: np.ndarray, num_scales: int, head_dim: int) -> np.ndarray:
    """The largest of the inputs [in] that share a scale: those of a group of query heads."""
    if len(inputs) == num_scales:
        return inputs
    return inputs.reshape(-1, len(inputs) // num_scales, head_dim).max(axis=1).reshape(-1)


def _spread(scales: np.ndarray, num_inputs: int, head_dim: int) -> np.ndarray:
    """A scale for each input, from `_merged` ones."""
    if len(scales) == num_inputs:
        return scales
    return scales.reshape(-1, 1, head_dim).repeat(num_inputs // len(scales), axis=1).reshape(-1)
