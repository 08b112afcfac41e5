"""The one einsum through which every weight of the model is multiplied.

Quantized weights and adapters plug in here; the model never asks what a weight is made of. Today
a weight is a float array.
"""

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
    """Product of an activation with a weight, computed in the dtype of x.

    out_sharding places the result, and with it the reduction over a contracted axis that the mesh
    splits. Returns out_dtype, by default the dtype of x; sums are float32 inside the product.
    """
    return jnp.einsum(
        subscripts,
        x,
        weight.astype(x.dtype),
        out_sharding=out_sharding,
        preferred_element_type=out_dtype or x.dtype,
    )
