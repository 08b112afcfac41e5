"""Weights that lie in memory with their outputs first, where the model names their inputs first.

XLA:CPU multiplies a few tokens with such a weight two to four times as fast (`quantize.einsum`), and files store it so.
The invariant: the model, its adapters and whoever writes it see the weight in its own order.
"""

from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from llama_jax.quantize import einsum

Model = TypeVar("Model")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OutputsFirst:
    """A weight [*inputs, *outputs] as an array [*outputs, *inputs]."""

    array: Any
    num_inputs: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self._turned(self.array.shape)

    @property
    def dtype(self) -> Any:
        """That of its values."""
        return self.array.dtype

    @property
    def sharding(self) -> jax.sharding.NamedSharding:
        """How the mesh splits the weight."""
        mesh, spec = self.array.sharding.mesh, self.array.sharding.spec
        spec = (*spec, *(None,) * (self.array.ndim - len(spec)))
        return jax.sharding.NamedSharding(mesh, PartitionSpec(*self._turned(spec)))

    def __getitem__(self, index: Any) -> "OutputsFirst":
        """Itself for `...`, by which modules take the value of a parameter."""
        if index is not ...:
            raise TypeError("a weight with its outputs first is not indexed; index what `in_own_order` gives")
        return self

    def in_own_order(self) -> Array:
        """The weight as an array [*inputs, *outputs]."""
        return jnp.transpose(self.array, self._turned(tuple(range(self.array.ndim))))

    def product(
        self, subscripts: str, x: Array, *, out_sharding: PartitionSpec, out_dtype: DTypeLike | None = None
    ) -> Array:
        """`einsum` with this weight."""
        operands, result = subscripts.split("->")
        of_x, of_weight = operands.split(",")
        inputs, outputs = of_weight[: self.num_inputs], of_weight[self.num_inputs :]
        subscripts = f"{of_x},{outputs}{inputs}->{result}"
        return einsum(subscripts, x, self.array, out_sharding=out_sharding, out_dtype=out_dtype)

    def _turned(self, of_dims: tuple) -> tuple:
        """What belongs to the dimensions of the array, in the order of the weight's."""
        num_outputs = len(of_dims) - self.num_inputs
        return of_dims[num_outputs:] + of_dims[:num_outputs]


def in_own_order(model: Model) -> Model:
    """The model with arrays in place of all such weights."""

    def is_turned(leaf: Any) -> bool:
        return isinstance(leaf, OutputsFirst)

    return jax.tree.map(lambda leaf: leaf.in_own_order() if is_turned(leaf) else leaf, model, is_leaf=is_turned)
