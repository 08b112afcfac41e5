"""A model rounded a layer at a time while text runs through it, as it was and as it becomes.

Source: GPTQ (arXiv 2210.17323): a layer is rounded by what comes out of the rounded layers before it. The invariant: of
the weights no more than a layer is in memory, beside it the embedding or the head, and of the text what passes between
two layers, on the host.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from llama_jax.calibration.folding import PLACES, awq, fold, smoothquant
from llama_jax.calibration.gptq import gptq
from llama_jax.calibration.text import Rows
from llama_jax.checkpoint.names import StoredWeight, canonical_shapes, stored_weights
from llama_jax.checkpoint.quantized.compressing import Report, Weights
from llama_jax.checkpoint.quantized.nearest import nearest
from llama_jax.checkpoint.quantized.packed import Packed
from llama_jax.checkpoint.source import Source
from llama_jax.config import LlamaConfig
from llama_jax.kernels import Tokens
from llama_jax.kernels.narrow import round_inputs
from llama_jax.mesh import sharding_rules
from llama_jax.model import Block, RMSNorm
from llama_jax.quantize import einsum
from llama_jax.rope import rope_angles
from llama_jax.schemes import Quantization, Scheme
from llama_jax.tree import leaf_name

_FOLDS = {"awq": awq, "smoothquant": smoothquant}

Layer = Mapping[str, np.ndarray]  # by names such as "mlp.up_proj"


@dataclass(frozen=True)
class Calibration:
    """How a model is rounded by text: method is one of llama_jax.schemes that suits the scheme."""

    cfg: LlamaConfig
    scheme: Scheme
    method: str
    rows: Rows

    def weights(self, source: Source, covered: Collection[str], report: Report) -> Weights:
        """All tensors in canonical order, those that are covered rounded, on the ambient mesh of one device.

        The report takes the errors of the layers' outputs on held-out rows, and perplexities.
        """
        first, *rest = canonical_shapes(self.cfg)
        table = source.read(first)
        yield first, table
        texts = {"calibration": _Text(self.cfg, self.rows.calibration, table)}
        texts["held-out"] = _Text(self.cfg, self.rows.held_out, table)
        if not self.cfg.tie_embeddings:
            del table
        for index in range(self.cfg.num_layers):
            names = {_within(name): name for name in rest if name.startswith(f"model.layers.{index}.")}
            narrow = frozenset(name for name in names if names[name] in covered)
            stored = {name: source.read(names[name]) for name in names}
            made = self._passed(stored, narrow, texts, functools.partial(report.add, index))
            del stored  # before the next is read
            yield from ((names[name], values) for name, values in made.items())
        ends = {name: source.read(name) for name in rest if not name.startswith("model.layers.")}
        yield from ends.items()
        norm, *head = ends.values()
        for label, text in texts.items():
            report.perplexities[label] = text.perplexities(norm, head[0] if head else table)

    def _passed(
        self, stored: Layer, narrow: frozenset[str], texts: "dict[str, _Text]", add: Callable[..., None]
    ) -> dict[str, np.ndarray | Packed]:
        """The tensors of a layer as they are written, through which the texts have gone then."""
        plain = _block(self.cfg, {name: values.astype(np.float32) for name, values in stored.items()})
        seen = {} if self.method == "rtn" else texts["calibration"].inputs(plain, self.method)
        made = self._rounded(stored, narrow, seen)
        wide = {n: v.dequantize() if isinstance(v, Packed) else v.astype(np.float32) for n, v in made.items()}
        rounded = _block(self.cfg, wide)
        for label, text in texts.items():
            for outputs in text.advance(plain, rounded, narrow, self.scheme.rest):
                if label == "held-out":
                    add(*outputs)
        return made

    def _rounded(
        self, stored: Layer, narrow: frozenset[str], seen: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray | Packed]:
        """The tensors of a layer, with what is seen of the inputs at each place."""
        layer = {name: values.astype(np.float32) for name, values in stored.items()}
        if self.method in _FOLDS:
            for place in PLACES:
                matrices, count = [layer[name] for name in place.products], len(layer[place.before])
                scales = _FOLDS[self.method](matrices, seen[place.before], count, self.cfg.head_dim, self.scheme)
                layer = fold(layer, place, scales, self.cfg.head_dim, stored[place.before].dtype)
        made: dict[str, np.ndarray | Packed] = {n: values.astype(stored[n].dtype) for n, values in layer.items()}
        for name in narrow:
            if self.method == "gptq":
                place = next(place for place in PLACES if name in place.products)
                made[name] = gptq(layer[name], seen[place.before], self.scheme, stored[name].dtype)
            else:
                made[name] = nearest(layer[name], self.scheme, stored[name].dtype)
        return made


class _Text:
    """Rows of tokens on their way through the layers, as these were and as they are rounded."""

    def __init__(self, cfg: LlamaConfig, tokens: np.ndarray, table: np.ndarray):
        """Tokens int32 [N, T] at the embedding [V, D]."""
        self._cfg, self._tokens = cfg, tokens
        self._plain = table[tokens].astype(np.float32)
        self._rounded = self._plain.copy()

    def inputs(self, layer: Block, method: str) -> dict[str, np.ndarray]:
        """By place of a layer (the op before), what a method asks of its inputs, after rounded layers."""
        found: dict[str, Array] = {}
        for x in self._rounded:
            for name, of_row in _observe(layer, x[None], self._cfg, method).items():
                found[name] = _STATISTICS[method][1](found[name], of_row) if name in found else of_row
        return {name: np.asarray(values) for name, values in found.items()}

    def advance(
        self, plain: Block, rounded: Block, narrow: frozenset[str], rest: Quantization
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Through a layer, whose narrow products may round their inputs too; yields each row's output in both forms."""
        narrow = narrow if rest.inputs else frozenset()
        for i in range(len(self._tokens)):
            self._plain[i] = _run(plain, self._plain[i][None], self._cfg, frozenset(), rest)[0]
            self._rounded[i] = _run(rounded, self._rounded[i][None], self._cfg, narrow, rest)[0]
            yield self._plain[i], self._rounded[i]

    def perplexities(self, norm: np.ndarray, head: np.ndarray) -> tuple[float, float]:
        """Of all tokens but the first of each row, before and after; norm and head are the model's last."""
        final = RMSNorm(self._cfg, sharding_rules(self._cfg))
        final.scale[...] = jnp.asarray(norm.astype(np.float32))
        table = jnp.asarray(head.astype(np.float32))
        before, after = (
            np.mean([_loss(final, table, x[None], row) for x, row in zip(states, self._tokens, strict=True)])
            for states in (self._plain, self._rounded)
        )
        return math.exp(before), math.exp(after)


def _outer(x: Array) -> Array:
    return jnp.matmul(x.T, x, precision="highest")


def _largest(x: Array) -> Array:
    return jnp.max(jnp.abs(x), axis=0)


# What a method asks of inputs [N, in], and how that of two rows becomes that of both.
_STATISTICS: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]] = {
    "gptq": (_outer, jnp.add),
    "awq": (_outer, jnp.add),
    "smoothquant": (_largest, jnp.maximum),
}


@dataclass(frozen=True)
class _Through:
    """A weight whose inputs [B, T, ...] pass through a function before they are multiplied."""

    weight: Array
    function: Callable[[Array], Array]

    def __getitem__(self, index: Any) -> "_Through":
        return self

    def product(self, subscripts: str, x: Array, **options: Any) -> Array:
        """`einsum` with this weight."""
        return einsum(subscripts, self.function(x), self.weight, **options)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _run(layer: Block, x: Array, cfg: LlamaConfig, narrow: frozenset[str], rest: Quantization) -> Array:
    """A layer's output [1, T, D], float32, with the inputs of its narrow products rounded as `rest` has it."""

    def rounded(x: Array) -> Array:
        assert rest.inputs is not None
        values, scales = round_inputs(x, x.ndim - 2, rest.inputs, rest.bound)
        return values.astype(jnp.float32) * scales.reshape(*scales.shape, *(1,) * (x.ndim - 2))

    def at(path: Any, weight: Array) -> Any:
        return _Through(weight, rounded) if _within(_stored(path).name) in narrow else weight

    return _output(jax.tree.map_with_path(at, layer), x, cfg)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _observe(layer: Block, x: Array, cfg: LlamaConfig, method: str) -> dict[str, Array]:
    """What a method asks of the inputs at each place of a layer, by the name of the op before."""
    places, seen = {place.products[0]: place.before for place in PLACES}, {}

    def at(path: Any, weight: Array) -> Any:
        name = _within(_stored(path).name)

        def observe(x: Array) -> Array:
            seen[places[name]] = _STATISTICS[method][0](x.reshape(-1, math.prod(x.shape[2:])))
            return x

        return _Through(weight, observe) if name in places else weight

    _output(jax.tree.map_with_path(at, layer), x, cfg)
    return seen


def _output(layer: Block, x: Array, cfg: LlamaConfig) -> Array:
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return layer(x, rope_angles(cfg.rope, cfg.head_dim, positions), Tokens(positions, None), None)[0]


@jax.jit
def _loss(norm: RMSNorm, table: Array, x: Array, row: Array) -> Array:
    """Mean loss in nats of the tokens of a row [T] but the first, from the last layer's output [1, T, D]."""
    logits = jnp.matmul(norm(x)[0, :-1], table.T, precision="highest")
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, row[1:, None], axis=-1)[:, 0])


def _block(cfg: LlamaConfig, layer: Layer) -> Block:
    """A layer in float32."""
    rules = sharding_rules(cfg)

    def filled(path: Any, leaf: Any) -> Array:
        weight, out = _stored(path), np.empty(leaf.shape, np.float32)
        weight.as_matrix(out)[...] = layer[_within(weight.name)]
        return jnp.asarray(out)

    return jax.tree.map_with_path(filled, jax.eval_shape(lambda: Block(cfg, rules, rngs=nnx.Rngs(0))))


def _stored(path: Any) -> StoredWeight:
    """How the weight at a path in a layer is stored."""
    return stored_weights(f"layers.0.{leaf_name(path)}", 1)[0][0]


def _within(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> mlp.up_proj."""
    return name.split(".", 3)[3].removesuffix(".weight")
