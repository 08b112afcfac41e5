"""The one table between the model's weights and their canonical (Hugging Face) names and shapes.

A linear weight of the model has its inputs and outputs in several dimensions, as the mesh splits them
([K, G, H, D] for queries); its canonical form is one matrix [out, in]. Everything else is stored
as it is.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from llama_jax.config import LlamaConfig

T = TypeVar("T")


class StoredWeight(NamedTuple):
    """Canonical name, and how the model's weight is a matrix.

    num_leading: how many of its dimensions are its first side (0: it is no matrix, and stored as it is).
    transposed: these are the inputs, which the stored matrix has last.
    """

    name: str
    num_leading: int = 0
    transposed: bool = False

    def sides(self, of_dims: Sequence[T]) -> tuple[Sequence[T], Sequence[T]]:
        """What belongs to the output and to the input dimensions, in the order of the stored matrix."""
        first, second = of_dims[: self.num_leading], of_dims[self.num_leading :]
        return (second, first) if self.transposed else (first, second)

    def ranges(self, dims: tuple[int, ...], index: tuple[slice, ...]) -> list[list[slice]]:
        """By side of the stored tensor, the ranges that an index into the model's weight of these dims covers."""
        if not self.num_leading:
            return [[s] for s in index]
        return [matrix_slices(*side) for side in zip(self.sides(dims), self.sides(index), strict=True)]

    def as_matrix(self, values: np.ndarray) -> np.ndarray:
        """A part of the model's weight as the stored tensor has it, not copied."""
        if not self.num_leading:
            return values
        matrix = values.reshape(math.prod(values.shape[: self.num_leading]), -1)
        return matrix.T if self.transposed else matrix


_LAYER = {
    "attention_norm.scale": StoredWeight("input_layernorm.weight"),
    "attention.wq": StoredWeight("self_attn.q_proj.weight", 3),
    "attention.wk": StoredWeight("self_attn.k_proj.weight", 2),
    "attention.wv": StoredWeight("self_attn.v_proj.weight", 2),
    "attention.wo": StoredWeight("self_attn.o_proj.weight", 3, transposed=True),
    "mlp_norm.scale": StoredWeight("post_attention_layernorm.weight"),
    "mlp.w_gate": StoredWeight("mlp.gate_proj.weight", 1, transposed=True),
    "mlp.w_up": StoredWeight("mlp.up_proj.weight", 1, transposed=True),
    "mlp.w_down": StoredWeight("mlp.down_proj.weight", 1, transposed=True),
}

_MODEL = {
    "embedding": StoredWeight("model.embed_tokens.weight"),
    "final_norm.scale": StoredWeight("model.norm.weight"),
    "head": StoredWeight("lm_head.weight"),
}


def stored_weights(path: str, num_layers: int) -> tuple[list[StoredWeight], bool]:
    """What a weight of the model is stored as, from its path in the module tree.

    "layers.attention.wq" is stacked: one stored weight a layer; "layers.3.attention.wq" and
    "embedding" are one. Returns the stored weights and whether the model's array stacks them.
    """
    if not path.startswith("layers."):
        return [_MODEL[path]], False
    first, _, rest = path.removeprefix("layers.").partition(".")
    stacked = not first.isdigit()
    weight = _LAYER[f"{first}.{rest}" if stacked else rest]
    layers = range(num_layers) if stacked else [int(first)]
    return [weight._replace(name=f"model.layers.{layer}.{weight.name}") for layer in layers], stacked


def canonical_shapes(cfg: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor of a model by name, with its shape, in the order of the computation."""
    d, f = cfg.embed_dim, cfg.mlp_dim
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    layer = {
        "attention_norm.scale": (d,),
        "attention.wq": (q, d),
        "attention.wk": (kv, d),
        "attention.wv": (kv, d),
        "attention.wo": (d, q),
        "mlp_norm.scale": (d,),
        "mlp.w_gate": (f, d),
        "mlp.w_up": (f, d),
        "mlp.w_down": (d, f),
    }
    shapes: dict[str, tuple[int, ...]] = {_MODEL["embedding"].name: (cfg.vocab_size, d)}
    for i in range(cfg.num_layers):
        shapes |= {f"model.layers.{i}.{_LAYER[name].name}": shape for name, shape in layer.items()}
    shapes[_MODEL["final_norm.scale"].name] = (d,)
    if not cfg.tie_embeddings:
        shapes[_MODEL["head"].name] = (cfg.vocab_size, d)
    return shapes


def matrix_slices(dims: Sequence[int], index: Sequence[slice]) -> list[slice]:
    """The flat ranges of a matrix side that an index into its dims covers: one where it is contiguous.

    dims (K, G, H) with part of G gives one range for each K, with part of H one for each K and G.
    """
    starts = [s.indices(dim)[:2] for s, dim in zip(index, dims, strict=True)]
    if len(dims) == 1:
        return [slice(*starts[0])]
    inner = math.prod(dims[1:])
    first, last = starts[0]
    if all(start == 0 and stop == dim for (start, stop), dim in zip(starts[1:], dims[1:], strict=True)):
        return [slice(first * inner, last * inner)]
    rest = matrix_slices(dims[1:], index[1:])
    return [slice(i * inner + r.start, i * inner + r.stop) for i in range(first, last) for r in rest]
