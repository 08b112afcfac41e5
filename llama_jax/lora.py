"""LoRA adapters beside the weights of a model: several at once, one for each row of a batch.

Source: LoRA (arXiv 2106.09685); many adapters on one base as in S-LoRA (arXiv 2311.03285). The adapters of a weight are
two arrays, so that a batch multiplies with all of them in two products and each row keeps the part that is its own:
at ranks of 16 eight adapters are as wide as one tile of a matrix unit, and nothing is gathered.

The invariant: a row's product is that of the base with its adapter merged in, up to float rounding, whatever other
rows ask for; without one it is the base's own.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from llama_jax.model import Llama
from llama_jax.quantize import einsum


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedWeight:
    """A weight and its A adapters of rank R: down [*inputs, A, R], then up [A, R, *outputs], which holds their scale.

    names are those of the adapters. rows int32 [B] says which of them each row of a batch has, -1 for none; None where
    no row has one.
    """

    base: Any
    down: Array
    up: Array
    names: tuple[str, ...] = field(metadata={"static": True})
    rows: Any = None

    def __getitem__(self, index: Any) -> "AdaptedWeight":
        """Itself for `...`, by which modules take the value of a parameter."""
        if index is not ...:
            raise TypeError("a weight with adapters is not indexed")
        return self

    def product(
        self, subscripts: str, x: Array, *, out_sharding: PartitionSpec, out_dtype: DTypeLike | None = None
    ) -> Array:
        """`einsum` of x [B, T, ...] with the base and with each row's adapter."""
        out = einsum(subscripts, x, self.base, out_sharding=out_sharding, out_dtype=out_dtype)
        if self.rows is None:
            return out
        inputs, outputs = _sides(subscripts)
        split = jax.typeof(x).sharding.spec[:2]
        low = einsum(f"BT{inputs},{inputs}AR->BTAR", x, self.down, out_sharding=PartitionSpec(*split, None, None))
        mine = self.rows[:, None] == jnp.arange(self.up.shape[0])
        low = jnp.where(_over_tokens(mine, low), low, 0)
        rise = f"BTAR,AR{outputs}->BT{outputs}"
        return out + einsum(rise, low, self.up, out_sharding=out_sharding, out_dtype=out.dtype)


def _over_tokens(mine: Array, low: Array) -> Array:
    """Which adapter is a row's, bool [B, A], as [B, T, A, R], split like low."""
    split = PartitionSpec(*jax.typeof(low).sharding.spec)
    return jax.lax.broadcast_in_dim(mine, low.shape, (0, 2), out_sharding=split)


def _sides(subscripts: str) -> tuple[str, str]:
    """The letters of a weight that are contracted, and those of its result after "BT"."""
    operands, result = subscripts.split("->")
    weight = operands.split(",")[1]
    return "".join(letter for letter in weight if letter not in result), result.removeprefix("BT")


def for_rows(model: Llama, rows: Array) -> Llama:
    """The model for a batch whose rows int32 [B] have these adapters, by number, -1: none."""

    def choose(leaf: Any) -> Any:
        return dataclasses.replace(leaf, rows=rows) if _is_adapted(leaf) else leaf

    return jax.tree.map(choose, model, is_leaf=_is_adapted)


def adapter_names(model: Llama) -> tuple[str, ...]:
    """The names of a model's adapters, in the order of their numbers."""
    return next((leaf.names for leaf in jax.tree.leaves(model, is_leaf=_is_adapted) if _is_adapted(leaf)), ())


def _is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, AdaptedWeight)
