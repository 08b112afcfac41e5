"""The one einsum through which every weight of the model is multiplied.

Quantized weights and adapters plug in here; the model never asks what a weight is made of. Today
a weight is a float array.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike


def einsum(
    subscripts: str,
    x: Array,
    weight: Array,
    *,
    out_sharding: PartitionSpec,
    out_dtype: DTypeLike | None = None,
) -> Array:
    """Product of an activation [B, T, ...] with a weight, computed in the dtype of x.

    subscripts name batch and sequence "BT" in x and in the result. out_sharding places the result,
    and with it the reduction over a contracted axis that the mesh splits. Returns out_dtype, by
    default the dtype of x; sums are float32 inside the product.
    """
    out_dtype = out_dtype or x.dtype
    subscripts = _contract_in_weight_order(subscripts)
    batch, sequence, *inputs = jax.typeof(x).sharding.spec
    if sequence is not None:
        return jnp.einsum(
            subscripts, x, weight.astype(x.dtype), out_sharding=out_sharding, preferred_element_type=out_dtype
        )
    # B and T as one dimension N: a weight's gradient then contracts one dimension. Contracting two
    # makes XLA:CPU transpose activations within the fusion that computes them, a quarter of a step.
    rows = x.shape[:2]
    x = jnp.reshape(x, (-1, *x.shape[2:]), out_sharding=PartitionSpec(batch, *inputs))
    out = jnp.einsum(
        subscripts.replace("BT", "N"),
        x,
        weight.astype(x.dtype),
        out_sharding=PartitionSpec(out_sharding[0], *out_sharding[2:]),
        preferred_element_type=out_dtype,
    )
    return jnp.reshape(out, (*rows, *out.shape[1:]), out_sharding=out_sharding)


def _contract_in_weight_order(subscripts: str) -> str:
    """The same product with contracted letters renamed to rise in the order of the weight's dimensions.

    jnp.einsum contracts letters in alphabetical order; where that is not the weight's own
    ("BTKGH,KGHD->BTD"), XLA:CPU transposes the whole weight at every decode step.
    """
    operands, result = subscripts.split("->")
    contracted = "".join(letter for letter in operands.split(",")[1] if letter not in result)
    return subscripts.translate(str.maketrans(contracted, "abcd"[: len(contracted)]))
