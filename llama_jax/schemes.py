"""How weights are rounded to few bits: the schemes by name, and one weight rounded to nearest.

Sources: QLoRA (arXiv 2305.14314) for NF4 and scales that are quantized themselves; The Llama 3 Herd of Models section
6.2 for FP8. The invariant: a value is off by half a step of its group at most, which is its scale, or for FP8 and NF4
the gap between two of their values times the scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from llama_jax.kernels.narrow import NF4, in_blocks, limits, out_of_blocks, rounded
from llama_jax.quantize import Quantization, QuantizedArray


@dataclass(frozen=True)
class Scheme:
    """How a model is quantized: values of dtype, each group of inputs (0: all) of each output with its own scale.

    symmetric: without zero points. nested: the scales are quantized themselves, to int8, those of an output together.
    inner_mlp_only: Llama 3's rule for FP8, by which attention and the first and the last layer stay float.
    """

    dtype: str
    group: int = 0
    symmetric: bool = True
    nested: bool = False
    inner_mlp_only: bool = False
    rest: Quantization = Quantization()


_FP8 = Quantization(inputs="float8_e4m3fn", bound=1200.0)

SCHEMES = {
    "int8": Scheme("int8"),
    "int8-a8": Scheme("int8", rest=Quantization(inputs="int8")),
    "int4": Scheme("int4", 32),
    "int4-g64": Scheme("int4", 64),
    "int4-g128": Scheme("int4", 128),
    "int4-asym": Scheme("int4", 32, symmetric=False),
    "int4-g64-asym": Scheme("int4", 64, symmetric=False),
    "int4-g128-asym": Scheme("int4", 128, symmetric=False),
    "fp8": Scheme("float8_e4m3fn", inner_mlp_only=True, rest=_FP8),
    "nf4": Scheme("int4", 64, nested=True, rest=Quantization("nf4")),
}


def find_scheme(name: str) -> Scheme:
    """The scheme of this name. Raises ValueError that lists those there are."""
    if name not in SCHEMES:
        raise ValueError(f"unknown quantization {name!r}; expected one of {', '.join(SCHEMES)}")
    return SCHEMES[name]


def quantized(weight: Array, scheme: Scheme, input_dims: Sequence[int]) -> QuantizedArray:
    """A weight rounded to nearest by a scheme. Raises ValueError for a shape that its groups do not divide."""
    blocks = in_blocks(weight.astype(jnp.float32), num_blocks(weight.shape, scheme.group, input_dims))
    within = tuple(range(1, blocks.ndim, 2))
    if scheme.rest.code == "nf4":
        scales = jnp.max(jnp.abs(blocks), within)
        if scheme.nested:
            scales = quantized(scales, Scheme("int8", symmetric=False), input_dims)
        values = blocks / _steps(scales.dequantize() if isinstance(scales, QuantizedArray) else scales, within)
        edges = jnp.asarray((NF4[1:] + NF4[:-1]) / 2)
        values = jnp.searchsorted(edges, values, method="compare_all") - 8
        return QuantizedArray(out_of_blocks(values, weight).astype(jnp.int4), scales, rest=scheme.rest)
    low, high = limits(scheme.dtype)
    if scheme.symmetric:
        span = 2 * jnp.max(jnp.abs(blocks), within)
    else:
        span = jnp.max(blocks, within, initial=0) - jnp.min(blocks, within, initial=0)
    # What is rounded are quotients by the scale as it is stored.
    scales = (span / (high - low)).astype(jnp.bfloat16 if scheme.group else jnp.float32)
    values, zeros = blocks / _steps(scales, within), None
    if not scheme.symmetric:
        zeros = jnp.clip(jnp.round(low - jnp.min(values, within, initial=0)), low, high)
        values = values + jnp.expand_dims(zeros, within)
        zeros = zeros.astype(jnp.int8)
    values = rounded(jnp.clip(values, low, high), scheme.dtype)
    return QuantizedArray(out_of_blocks(values, weight), scales, zeros, rest=scheme.rest)


def _steps(scales: Array, within: tuple[int, ...]) -> Array:
    """Scales in float32 over the values of their blocks, 1 for groups of zeros."""
    scales = scales.astype(jnp.float32)
    return jnp.expand_dims(jnp.where(scales > 0, scales, 1.0), within)


def num_blocks(shape: Sequence[int], group: int, input_dims: Sequence[int]) -> list[int]:
    """How many groups of inputs lie along each dimension: 1 for group 0; each output is its own.

    The inputs of a weight with several input dimensions are those flattened. Raises ValueError for a shape that
    groups do not divide.
    """
    counts = _num_blocks(shape, group, input_dims)
    if counts is None:
        works = [f"groups of {size}" for size in (128, 64, 32) if _num_blocks(shape, size, input_dims)]
        raise ValueError(
            f"groups of {group} inputs do not divide a weight of shape {tuple(shape)} with its inputs in dimensions "
            f"{tuple(input_dims)}; use {' or '.join(works) or 'int8'}"
        )
    return counts


def _num_blocks(shape: Sequence[int], group: int, input_dims: Sequence[int]) -> list[int] | None:
    counts, left = list(shape), group or math.prod(shape[dim] for dim in input_dims)
    for dim in reversed(input_dims):
        shared = math.gcd(left, shape[dim])
        if shared not in (left, shape[dim]):
            return None
        counts[dim], left = shape[dim] // shared, left // shared
    return counts if left == 1 else None
