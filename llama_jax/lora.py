"""LoRA adapters beside the weights of a model: several at once, one for each row of a batch.

Source: LoRA (arXiv 2106.09685); many adapters on one base as in S-LoRA (arXiv 2311.03285). The adapters of a weight are
two arrays, so that a batch multiplies with all of them in two products and each row keeps the part that is its own:
at ranks of 16 eight adapters are as wide as one tile of a matrix unit, and nothing is gathered.

The invariant: a row's product is that of the base with its adapter merged in, up to float rounding, whatever other
rows ask for; without one it is the base's own.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from llama_jax.model import Block, Llama
from llama_jax.outputs_first import in_own_order
from llama_jax.quantize import QuantizedArray, einsum
from llama_jax.schemes import INPUT_DIMS
from llama_jax.tree import leaf_name


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedWeight:
    """A weight and its A adapters of rank R: down [*inputs, A, R], then up [A, R, *outputs], which holds their scale.

    names are those of the adapters. rows int32 [B] says which of them each row of a batch has, -1 for none; None where
    no row has one. Those of stacked layers have a leading L, rows too.
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
    if isinstance(model.layers, Block):
        spec = PartitionSpec(None, *jax.typeof(rows).sharding.spec)
        rows = jax.lax.broadcast_in_dim(rows, (model.cfg.num_layers, *rows.shape), (1,), out_sharding=spec)

    def choose(leaf: Any) -> Any:
        return dataclasses.replace(leaf, rows=rows) if _is_adapted(leaf) else leaf

    return jax.tree.map(choose, model, is_leaf=_is_adapted)


def adapter_names(model: Llama) -> tuple[str, ...]:
    """The names of a model's adapters, in the order of their numbers."""
    return next((leaf.names for leaf in jax.tree.leaves(model, is_leaf=_is_adapted) if _is_adapted(leaf)), ())


def with_fresh_adapter(model: Llama, key: Array, *, rank: int, name: str = "default") -> Llama:
    """The model with a float32 adapter beside every weight of a product, which changes nothing before it is trained.

    down is uniform within 1 / sqrt(inputs) and up is zero, as PEFT begins; both are split as the weight is.
    """
    num_leading = int(isinstance(model.layers, Block))

    def at(path: Any, base: Any) -> Any:
        module = leaf_name(path)
        dims = INPUT_DIMS.get(module.rpartition(".")[2])
        if dims is None:
            return base
        spec = tuple(jax.typeof(base.values if isinstance(base, QuantizedArray) else base).sharding.spec)
        inputs = [len(base.shape) + dim for dim in dims]
        leading, outputs = [*range(num_leading)], [i for i in range(num_leading, len(base.shape)) if i not in inputs]

        def sides(values: Sequence[Any], mine: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            """Of down and of up, for the values of each dimension of the weight and those of A and R."""
            before, ins, outs = ([values[i] for i in dims] for dims in (leading, inputs, outputs))
            return [*before, *ins, *mine], [*before, *mine, *outs]

        (down, up), specs = sides(base.shape, (1, rank)), sides(spec, (None, None))
        bound = math.prod(base.shape[i] for i in inputs) ** -0.5
        of_weight = jax.random.fold_in(key, zlib.crc32(module.encode()))
        down_spec, up_spec = (PartitionSpec(*spec) for spec in specs)
        down = jax.random.uniform(of_weight, down, jnp.float32, -bound, bound, out_sharding=down_spec)
        return AdaptedWeight(base, down, jnp.zeros(up, jnp.float32, out_sharding=up_spec), (name,))

    return jax.tree.map_with_path(at, in_own_order(model), is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))


def split_adapters(model: Llama) -> tuple[Llama, Llama]:
    """The adapters, which are trained, and all else, which is not: each a model with None in place of the other's."""

    def trained(leaf: Any) -> Any:
        return dataclasses.replace(leaf, base=None, rows=None) if _is_adapted(leaf) else None

    def frozen(leaf: Any) -> Any:
        return dataclasses.replace(leaf, down=None, up=None) if _is_adapted(leaf) else leaf

    return tuple(jax.tree.map(side, model, is_leaf=_is_adapted) for side in (trained, frozen))


def join_adapters(trained: Llama, frozen: Llama) -> Llama:
    """The model that `split_adapters` made two of."""

    def join(mine: Any, rest: Any) -> Any:
        return rest if mine is None else dataclasses.replace(rest, down=mine.down, up=mine.up)

    return jax.tree.map(join, trained, frozen, is_leaf=lambda leaf: leaf is None or _is_adapted(leaf))


def _is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, AdaptedWeight)
