"""Products of a few rows with weights in few bits on CPUs, where XLA's own take up to ten times those of floats.

Of a weight that has its inputs first, sums of a few inputs are unrolled: XLA makes one loop of them over the outputs,
which reads each value once, in vectors and in several threads. Of one with its outputs first, a few are widened at a
time, to where the cache holds them. The invariant: the product is that with the widened weight, up to float rounding.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from llama_jax.kernels.narrow import Narrow, widen

# Beyond it XLA's products are faster, which convert the weight once for all rows.
_MOST_ROWS = 8

_UNROLLED = 16  # inputs
_WIDENED = 64  # outputs


def suits(subscripts: str, x: Array, weight: Narrow) -> bool:
    """Whether `product` is for this product of `narrow.product`: of few rows, not of NF4, a scale or more an output."""
    x_letters, letters, result = subscripts.replace("->", ",").split(",")
    inputs, outputs = x_letters[2:], result[2:]
    counts = zip(letters, weight.values.shape, weight.scales.shape, strict=True)
    scaled = all(num_values == num_scales for letter, num_values, num_scales in counts if letter in outputs)
    few = x.shape[0] * x.shape[1] <= _MOST_ROWS
    return few and scaled and weight.code is None and letters in (inputs + outputs, outputs + inputs)


def product(subscripts: str, x: Array, weight: Narrow) -> Array:
    """Float32 product of x [B, T, ...] with a weight whose groups of inputs lie one after the other."""
    x_letters, letters, result = subscripts.replace("->", ",").split(",")
    is_first = letters[0] in x_letters
    num_leading = len(x_letters if is_first else result) - 2

    def matrix(array: Array) -> Array:
        return array.reshape(math.prod(array.shape[:num_leading]), -1)

    rows = x.astype(jnp.float32).reshape(x.shape[0] * x.shape[1], -1)
    parts = [None if array is None else matrix(array) for array in weight[:3]]
    # Else a loop of decode steps would widen the weight once, before it, and hold all of it as floats.
    rows, parts[0] = jax.lax.optimization_barrier((rows, parts[0]))
    out = (_inputs_first if is_first else _outputs_first)(rows, Narrow(*parts, None))  # type: ignore[arg-type]
    outputs = weight.values.shape[num_leading:] if is_first else weight.values.shape[:num_leading]
    return out.reshape(*x.shape[:2], *outputs)


def _inputs_first(x: Array, weight: Narrow) -> Array:
    """The product [N, F] of x [N, D] with a weight [D, F]."""
    values, scales = weight.values, weight.scales.astype(jnp.float32)
    if values.dtype == jnp.float8_e4m3fn:
        values, scales = jax.lax.bitcast_convert_type(values, jnp.uint8), scales * 2.0**8
    size = math.gcd(len(values) // len(scales), _UNROLLED)
    values = values.reshape(-1, size, values.shape[1])
    columns = [_floats(values[:, i]) for i in range(size)]
    repeats = len(values) // len(scales)
    scales = jnp.repeat(scales, repeats, axis=0)
    zeros = None if weight.zeros is None else jnp.repeat(weight.zeros.astype(jnp.float32), repeats, axis=0)

    def row(x: Array) -> Array:
        x = x.reshape(-1, size)
        sums = sum(x[:, i, None] * column for i, column in enumerate(columns))
        if zeros is not None:
            sums -= x.sum(axis=1, keepdims=True) * zeros
        return jnp.ones(len(x)) @ (sums * scales)

    return jnp.stack([row(one) for one in x])


def _floats(values: Array) -> Array:
    """Integers in float32, and float8 that is given by its bits, which are those of a float16 of 2 ** -8 as much.

    XLA:CPU would convert float8 a number at a time.
    """
    if values.dtype != jnp.uint8:
        return values.astype(jnp.float32)
    bits = values.astype(jnp.uint16)
    return jax.lax.bitcast_convert_type((bits & 0x80) << 8 | (bits & 0x7F) << 7, jnp.float16).astype(jnp.float32)


def _outputs_first(x: Array, weight: Narrow) -> Array:
    """The product [N, F] of x [N, D] with a weight [F, D]."""
    size = math.gcd(len(weight.values), _WIDENED)
    parts = [None if part is None else part.reshape(-1, size, part.shape[1]) for part in weight[:3]]

    def multiply(parts: list[Array | None]) -> Array:
        wide = widen(Narrow(*parts, None))  # type: ignore[arg-type]
        return jnp.einsum("ND,FD->FN", x, jax.lax.optimization_barrier(wide))

    return jax.lax.map(multiply, parts).reshape(-1, len(x)).T
