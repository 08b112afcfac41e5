"""Weights in few bits on one device: how blocks of them share a scale, and products that never widen a whole weight.

Sources: QLoRA (arXiv 2305.14314) for NF4; LLM.int8() (arXiv 2208.07339) for products of int8 by int8. The invariant:
`product` is the product with what `widen` gives, up to float rounding.

Letters: N tokens; a contracted letter (D) in lower case (d) counts its blocks, of which each has its own scale.
"""

import math
import string
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

# The sixteen values of NF4: quantiles of the normal distribution, in QLoRA's own rounding.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)

_SLAB = 2**24  # weights that are widened at a time where there are too many tokens for products a block


class Narrow(NamedTuple):
    """A weight on one device as (values - zeros) * scales, or with code "nf4" as NF4[values + 8] * scales.

    scales and zeros have the rank of values, and each dimension of values is a multiple of theirs: a block.
    """

    values: Array
    scales: Array
    zeros: Array | None
    code: str | None

    def coded(self, dtype: DTypeLike) -> Array:
        """The values without scales and zeros, which is exact in 8 bits of mantissa and more but for NF4."""
        if self.code is None:
            return self.values.astype(dtype)
        table, places = jnp.asarray(NF4, dtype), self.values.astype(jnp.int32) + 8
        spec = jax.typeof(places).sharding.spec
        return table.at[places].get(out_sharding=spec) if any(spec) else table[places]


def in_blocks(x: Array, counts: Sequence[int]) -> Array:
    """Each dimension of x as two, the blocks and what lies within one, split over the mesh as x is."""
    shape = [size for dim, count in zip(x.shape, counts, strict=True) for size in (count, dim // count)]
    spec = jax.typeof(x).sharding.spec
    if not any(spec):
        return x.reshape(shape)
    axes = [side for axes, n in zip(spec, counts, strict=True) for side in ((axes, None) if n > 1 else (None, axes))]
    return jnp.reshape(x, shape, out_sharding=PartitionSpec(*axes))


def out_of_blocks(x: Array, like: Array) -> Array:
    """What `in_blocks` made of an array of the shape and split of like, as it was."""
    spec = jax.typeof(like).sharding.spec
    return jnp.reshape(x, like.shape, out_sharding=spec) if any(spec) else x.reshape(like.shape)


def widen(weight: Narrow) -> Array:
    """The whole weight in float32."""
    values = in_blocks(weight.coded(jnp.float32), weight.scales.shape)
    within = tuple(range(1, values.ndim, 2))
    if weight.zeros is not None:
        values = values - jnp.expand_dims(weight.zeros.astype(jnp.float32), within)
    return out_of_blocks(values * jnp.expand_dims(weight.scales.astype(jnp.float32), within), weight.values)


def round_inputs(x: Array, num_inputs: int, dtype: DTypeLike, bound: float) -> tuple[Array, Array]:
    """Activations in a narrow dtype, and each token's scale float32 [B, T]: its largest value, at most bound.

    num_inputs: how many of the last dimensions of x [B, T, ...] are one token's. What is beyond bound is cut off.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=tuple(range(-num_inputs, 0)), keepdims=True)
    _, high = limits(dtype)
    scale = jnp.minimum(largest, bound) / high
    x = jnp.clip(x / jnp.where(scale > 0, scale, 1.0), -high, high)
    return rounded(x, dtype), jnp.squeeze(scale, tuple(range(2, scale.ndim)))


def round_inputs_alike(x: Array, dtype: DTypeLike, scale: float, zero: int) -> Array:
    """Activations in a narrow dtype by a scale that is known before, still to be multiplied by it.

    Where a zero point takes whole numbers beyond that dtype they have the one of x, which holds them up to 256.
    """
    low, high = limits(dtype)
    values = x.astype(jnp.float32) / scale
    if zero:
        return (jnp.clip(jnp.round(values + zero), low, high) - zero).astype(x.dtype)
    return rounded(jnp.clip(values, low, high), dtype)


def limits(dtype: DTypeLike) -> tuple[float, float]:
    """The least and the largest value of a narrow dtype."""
    info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)
    return float(info.min), float(info.max)


def rounded(x: Array, dtype: DTypeLike) -> Array:
    """X in a narrow dtype that holds its values."""
    return (jnp.round(x) if jnp.issubdtype(dtype, jnp.integer) else x).astype(dtype)


def product(subscripts: str, x: Array, weight: Narrow, *, depth: int = 0) -> Array:
    """Float32 product of x [B, T, ...] with a weight; subscripts name batch and sequence "BT".

    x may be int8: what it is multiplied with are then whole numbers too, summed in int32. depth: how many inputs a
    product should have for the device's matrix unit; those of smaller groups are made together.
    """
    operands, result = subscripts.replace("BT", "N").split("->")
    x_letters, letters = operands.split(",")
    rows, x = x.shape[:2], x.reshape(-1, *x.shape[2:])
    counts = dict(zip(letters, weight.scales.shape, strict=True))
    blocks = {letter: n for letter, n in counts.items() if letter not in result and n > 1}
    # Of many tokens the products of each block, in float32, take more memory than the weight as floats.
    widened = math.prod(x.shape[1:]) * x.dtype.itemsize
    if blocks and jnp.issubdtype(x.dtype, jnp.floating) and 4 * math.prod(blocks.values()) * len(x) > widened:
        out = _by_slabs((x_letters, letters, result), x, weight)
    else:
        out = _by_blocks((x_letters, letters, result), x, weight, blocks, depth)
    return out.reshape(*rows, *out.shape[1:])


def _by_blocks(letters: tuple[str, str, str], x: Array, weight: Narrow, blocks: dict[str, int], depth: int) -> Array:
    """Products of each block, scaled and summed: the weight is only converted, which fuses with the products."""
    x_letters, w_letters, result = letters
    block_letters, outputs = "".join(blocks).lower(), result.replace("N", "")
    parts = _of_blocks(letters, x, weight, blocks, depth)

    def spread(scales: Array) -> Array:
        """Scales or zeros in float32, one for each block and output."""
        for dim, letter in enumerate(w_letters):
            if letter in result:
                scales = jnp.repeat(scales, weight.values.shape[dim] // scales.shape[dim], axis=dim)
        names = "".join(letter.lower() if letter in blocks else letter for letter in w_letters)
        return jnp.einsum(f"{names}->{block_letters}{outputs}", scales.astype(jnp.float32))

    scales, summed = spread(weight.scales), f"{block_letters}{outputs}->{result}"
    out = jnp.einsum(f"{block_letters}{result},{summed}", parts.astype(jnp.float32), scales)
    if weight.zeros is None:
        return out
    x_letters, x = _split(x_letters, x, blocks)
    sums = jnp.einsum(f"{x_letters}->{block_letters}N", x.astype(jnp.float32))
    return out - jnp.einsum(f"{block_letters}N,{summed}", sums, spread(weight.zeros) * scales)


def _of_blocks(letters: tuple[str, str, str], x: Array, weight: Narrow, blocks: dict[str, int], depth: int) -> Array:
    """The product of each block, before all other dimensions of the result.

    Neighbouring blocks that are not as deep share a product: each has rows of its own, which are zero where the others
    are. Those cost nothing until there are more than the matrix unit is deep.
    """
    x_letters, w_letters, result = letters
    integers = jnp.issubdtype(x.dtype, jnp.integer)
    values, total = weight.coded(jnp.int8 if integers else x.dtype), jnp.int32 if integers else jnp.float32
    last, shared = next(reversed(blocks), ""), 1
    if last:
        size = math.prod(x.shape[1:]) // math.prod(blocks.values())
        shared = math.gcd(blocks[last], max(1, depth // size))
    if shared > 1:
        dim = x_letters.index(last)
        block = jnp.arange(x.shape[dim]) // (x.shape[dim] // blocks[last]) % shared
        own = jnp.expand_dims(block == jnp.arange(shared)[:, None], [i + 1 for i in range(x.ndim) if i != dim])
        x_letters, x = f"z{x_letters}", jnp.where(own, x, jnp.zeros((), x.dtype))
    together = blocks | {last: blocks[last] // shared} if last else blocks
    x_letters, x = _split(x_letters, x, together)
    w_letters, values = _split(w_letters, values, together)
    by_block = "".join(together).lower() + ("z" if shared > 1 else "")
    subscripts = in_weight_order(f"{x_letters},{w_letters}->{by_block}{result}")
    parts = jnp.einsum(subscripts, x, values, preferred_element_type=total)
    return parts.reshape(*blocks.values(), *parts.shape[len(by_block) :])


def in_weight_order(subscripts: str) -> str:
    """The same product with contracted letters renamed to rise in the order of the weight's dimensions.

    jnp.einsum contracts letters in alphabetical order; where that is not the weight's own
    ("NKGH,KGHD->ND"), XLA transposes the whole weight at every decode step.
    """
    operands, result = subscripts.split("->")
    contracted = "".join(letter for letter in operands.split(",")[1] if letter not in result)
    free = "".join(letter for letter in sorted(string.ascii_letters) if letter not in subscripts)
    return subscripts.translate(str.maketrans(contracted, free[: len(contracted)]))


def _split(letters: str, x: Array, blocks: dict[str, int]) -> tuple[str, Array]:
    """X with the dimension of each letter in blocks as two, "D" as "dD"."""
    sides = [(blocks[a], n // blocks[a]) if a in blocks else (n,) for a, n in zip(letters, x.shape, strict=True)]
    names = "".join(a.lower() + a if a in blocks else a for a in letters)
    return names, x.reshape([size for side in sides for size in side])


def _by_slabs(letters: tuple[str, str, str], x: Array, weight: Narrow) -> Array:
    """The product with parts of the weight's first dimension, each widened by itself."""
    x_letters, w_letters, result = letters
    num_slabs = math.gcd(weight.scales.shape[0], 2 ** math.ceil(math.log2(max(1.0, weight.values.size / _SLAB))))
    slabs = [None if part is None else part.reshape(num_slabs, -1, *part.shape[1:]) for part in weight[:3]]

    def multiply(x: Array, slab: Sequence[Array | None]) -> Array:
        wide = widen(Narrow(*slab, code=weight.code)).astype(x.dtype)  # type: ignore[arg-type]
        return jnp.einsum(f"{x_letters},{w_letters}->{result}", x, wide, preferred_element_type=jnp.float32)

    if num_slabs == 1:
        return multiply(x, weight[:3])
    first = w_letters[0]
    if first in result:
        out = jnp.moveaxis(jax.lax.map(lambda slab: multiply(x, slab), slabs), 0, result.index(first))
        shape = list(out.shape)
        dim = result.index(first)
        return out.reshape(*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :])
    dim = x_letters.index(first)
    parts = jnp.moveaxis(x.reshape(*x.shape[:dim], num_slabs, -1, *x.shape[dim + 1 :]), dim, 0)
    # The zeros of one slab's product vary over the mesh as the sum will; itself it is not computed.
    start = jnp.zeros_like(multiply(parts[0], [None if slab is None else slab[0] for slab in slabs]))
    return jax.lax.scan(lambda total, part: (total + multiply(*part), None), start, (parts, slabs))[0]
