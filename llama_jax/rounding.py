"""Weights rounded to the nearest of few values, one or those of a whole model; and as if they were, in training.

Source of the training: the straight-through estimator (arXiv 1308.3432). The invariant: a value is off by half a step
of its group at most, which is its scale, or for FP8 and NF4 the gap between two of their values times the scale.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from llama_jax.kernels.narrow import NF4, in_blocks, limits, out_of_blocks, round_inputs, rounded
from llama_jax.outputs_first import in_own_order
from llama_jax.quantize import QuantizedArray, block_spec, einsum
from llama_jax.schemes import INPUT_DIMS, Scheme
from llama_jax.tree import leaf_name

Model = TypeVar("Model")


def quantize_model(model: Model, scheme: Scheme | None, num_layers: int) -> Model:
    """A model, or an abstract one inside jax.eval_shape, with the weights that a scheme covers rounded to nearest."""

    def at(path: Any, weight: Array) -> Any:
        name = leaf_name(path)
        return quantize_weight(weight, name, scheme) if scheme and scheme.covers(name, num_layers) else weight

    return jax.tree.map_with_path(at, in_own_order(model))


def quantize_weight(weight: Array, path: str, scheme: Scheme) -> QuantizedArray:
    """The weight at a path in the model, by a scheme that covers it, compiled once for each shape."""
    return _quantized(weight, scheme, INPUT_DIMS[path.rpartition(".")[2]])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoundedWeight:
    """A float32 weight that multiplies as if a scheme had rounded it, for training towards that.

    Its product is that of the quantized weight, up to float rounding; the gradient passes the rounding, of weight and
    activations, as if it were not there.
    """

    weight: Any
    scheme: Scheme = field(metadata={"static": True})
    input_dims: tuple[int, ...] = field(metadata={"static": True})

    def __getitem__(self, index: Any) -> "RoundedWeight":
        """Itself for `...`, by which modules take the value of a parameter."""
        if index is not ...:
            raise TypeError("a rounded weight is not indexed")
        return self

    def product(
        self, subscripts: str, x: Array, *, out_sharding: PartitionSpec, out_dtype: DTypeLike | None = None
    ) -> Array:
        """`einsum` of x with the rounded weight, whose rounding is done anew each time."""
        narrow = quantized(jax.lax.stop_gradient(self.weight), self.scheme, self.input_dims)
        weight = _straight_through(self.weight, narrow.dequantize())
        if (dtype := self.scheme.rest.inputs) is not None:
            of_x, _, result = re.split(",|->", subscripts)
            num_inputs = sum(letter not in result for letter in of_x)
            values, scale = round_inputs(jax.lax.stop_gradient(x), num_inputs, dtype, self.scheme.rest.bound)
            near = values.astype(jnp.float32) * jnp.expand_dims(scale, tuple(range(-num_inputs, 0)))
            x = _straight_through(x, near.astype(x.dtype))
        return einsum(subscripts, x, weight, out_sharding=out_sharding, out_dtype=out_dtype)


@jax.custom_jvp
def _straight_through(x: Array, rounded: Array) -> Array:
    """What x was rounded to, with the gradient of x."""
    return rounded


_straight_through.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


def rounded_in_training(model: Model, scheme: Scheme | None, num_layers: int) -> Model:
    """A model of float32 weights, of which those that a scheme covers multiply as if it had rounded them."""
    if scheme is None:
        return model

    def at(path: Any, weight: Array) -> Any:
        name = leaf_name(path)
        covered = scheme.covers(name, num_layers)
        return RoundedWeight(weight, scheme, INPUT_DIMS[name.rpartition(".")[2]]) if covered else weight

    return jax.tree.map_with_path(at, model)


def computed_in(model: Model, dtype: DTypeLike) -> Model:
    """A model with its weights in a dtype, but for rounded ones, which are rounded from float32."""

    def is_rounded(leaf: Any) -> bool:
        return isinstance(leaf, RoundedWeight)

    return jax.tree.map(lambda w: w if is_rounded(w) else w.astype(dtype), model, is_leaf=is_rounded)


def quantized(weight: Array, scheme: Scheme, input_dims: Sequence[int]) -> QuantizedArray:
    """A weight rounded to nearest by a scheme. Raises ValueError if groups do not divide it or are split."""
    counts = num_blocks(weight.shape, scheme.group, input_dims)
    block_spec(counts, jax.typeof(weight).sharding.spec)
    blocks = in_blocks(weight.astype(jnp.float32), counts)
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


_quantized = jax.jit(quantized, static_argnums=(1, 2))


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
    for dim in reversed(input_dims):  # of which -1 is the last
        shared = math.gcd(left, shape[dim])
        if shared not in (left, shape[dim]):
            return None
        counts[dim], left = shape[dim] // shared, left // shared
    return counts if left == 1 else None
