"""Checkpoints in few bits in Hugging Face's form, written a matrix at a time.

The embedding, the head and the norms stay floats; who chooses the values of the other weights may be anyone, by default
they are rounded to nearest. The invariant: which tensors there will be, and how large, is known before any is read.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_jax.checkpoint.quantized.forms import BitsAndBytes, CompressedTensors, Form, Tensors
from llama_jax.checkpoint.quantized.nearest import nearest
from llama_jax.checkpoint.quantized.packed import Packed
from llama_jax.checkpoint.safetensors import num_bytes
from llama_jax.checkpoint.source import Source, TensorSpec
from llama_jax.schemes import Scheme

Weights = Iterator[tuple[str, np.ndarray | Packed]]  # canonical tensors, some of them rounded


@dataclass
class Report:
    """What fewer bits cost, known once all tensors are written.

    num_bytes of the files' tensors before and after. squares: for each layer the sum of squared errors and of squares
    of what the errors are in. perplexities: of each text before and after, if there was any.
    """

    num_weights: int
    num_bytes: tuple[int, int]
    squares: dict[int, np.ndarray] = field(default_factory=lambda: defaultdict(lambda: np.zeros(2)))
    perplexities: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, layer: int, before: np.ndarray, after: np.ndarray) -> None:
        """Count how far numbers of a layer are off."""
        before = before.astype(np.float32)
        self.squares[layer] += [np.sum(np.square(after - before), dtype=float), np.sum(np.square(before), dtype=float)]

    def errors(self) -> dict[int, float]:
        """Of each layer, as a ratio of root mean squares."""
        return {layer: math.sqrt(error / whole) if whole else 0.0 for layer, (error, whole) in self.squares.items()}

    def lines(self) -> list[str]:
        """For people."""
        sizes = [f"{size / 1e6:,.1f} MB, {8 * size / self.num_weights:.2f} bits a weight" for size in self.num_bytes]
        what = "outputs" if self.perplexities else "weights"
        lines = [f"size: {sizes[0]} -> {sizes[1]}"]
        lines += [f"layer {layer}: {what} off by {100 * error:.2f} %" for layer, error in self.errors().items()]
        for text, (before, after) in self.perplexities.items():
            change = 100 * (after / before - 1)
            lines.append(f"perplexity, {text} text: {before:.3f} -> {after:.3f} ({change:+.2f} %)")
        return lines


# All tensors of a source in order, rounded those that are in the collection; what that costs goes into the report.
Rounding = Callable[[Source, Collection[str], Report], Weights]


class Compression:
    """A model's canonical tensors in few bits: `specs` of all, `tensors` one by one."""

    def __init__(self, source: Source, scheme: Scheme, num_layers: int, rounding: Rounding | None = None):
        """rounding: by default to nearest, one tensor at a time.

        Raises ValueError for widths that groups do not divide.
        """
        self._source, self._scheme, self._rounding = source, scheme, rounding or self._nearest
        dtype = source.tensors["model.embed_tokens.weight"].dtype
        self._form: Form = BitsAndBytes(scheme, dtype) if scheme.rest.code == "nf4" else CompressedTensors(scheme)
        self._covered = {name for name in source.tensors if _covers(scheme, name, num_layers)}
        for name in self._covered:
            columns = source.tensors[name].shape[1]
            if scheme.group and columns % scheme.group:
                raise ValueError(f"groups of {scheme.group} do not divide the {columns} inputs of {name}; use int8")
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in source.tensors.items():
            self.specs |= self._form.specs(name, spec) if name in self._covered else {name: spec}
        sizes = [sum(map(num_bytes, specs.values())) for specs in (source.tensors, self.specs)]
        self.report = Report(sum(math.prod(spec.shape) for spec in source.tensors.values()), (sizes[0], sizes[1]))

    def described(self) -> dict[str, Any]:
        """quantization_config of config.json."""
        modules = [name.removesuffix(".weight") for name in self._source.tensors if "proj" in name]
        floats = ["lm_head", *(module for module in modules if f"{module}.weight" not in self._covered)]
        return self._form.described(floats)

    def tensors(self) -> Tensors:
        """Names and values in the order of `specs`."""
        for name, weight in self._rounding(self._source, self._covered, self.report):
            if isinstance(weight, Packed):
                yield from self._form.parts(name, weight)
            else:
                yield name, weight

    def _nearest(self, source: Source, covered: Collection[str], report: Report) -> Weights:
        for name, spec in source.tensors.items():
            weight = source.read(name)
            if name not in covered:
                yield name, weight
                continue
            rounded = nearest(weight, self._scheme, spec.dtype)
            report.add(int(name.split(".")[2]), weight, rounded.dequantize())
            yield name, rounded


def _covers(scheme: Scheme, name: str, num_layers: int) -> bool:
    if "_proj." not in name:
        return False
    return not scheme.inner_mlp_only or (".mlp." in name and 0 < int(name.split(".")[2]) < num_layers - 1)
