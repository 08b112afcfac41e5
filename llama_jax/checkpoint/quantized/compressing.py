"""Checkpoints in few bits as vLLM and others read them: compressed-tensors in Hugging Face's form, written.

Source: compressed_tensors/compressors (naive_quantized, pack_quantized). The embedding, the head and the norms stay
floats; who chooses the values of the other weights may be anyone, by default they are rounded to nearest, one matrix at
a time.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llama_jax.checkpoint.quantized.nearest import nearest
from llama_jax.checkpoint.quantized.packed import Packed
from llama_jax.checkpoint.safetensors import num_bytes
from llama_jax.checkpoint.source import Source, TensorSpec
from llama_jax.schemes import Scheme

Tensors = Iterator[tuple[str, np.ndarray]]

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
    """A model's canonical tensors as those of compressed-tensors: `specs` of all, `tensors` one by one."""

    def __init__(self, source: Source, scheme: Scheme, num_layers: int, rounding: Rounding | None = None):
        """rounding: by default to nearest, one tensor at a time.

        Raises ValueError for a scheme that the format does not hold and for widths that its groups do not divide.
        """
        if scheme.rest.code is not None:
            raise ValueError(f"compressed-tensors holds no {scheme.rest.code}; int8, int4 and fp8 can be written")
        self._source, self._scheme, self._rounding = source, scheme, rounding or self._nearest
        self._bits = 4 if scheme.dtype == "int4" else 8
        self._packed = scheme.dtype != "float8_e4m3fn" and scheme.rest.inputs is None
        self._covered = {name for name in source.tensors if _covers(scheme, name, num_layers)}
        for name in self._covered:
            columns = source.tensors[name].shape[1]
            if scheme.group and columns % scheme.group:
                raise ValueError(f"groups of {scheme.group} do not divide the {columns} inputs of {name}; use int8")
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in source.tensors.items():
            self.specs |= self._specs(name, spec) if name in self._covered else {name: spec}
        sizes = [sum(map(num_bytes, specs.values())) for specs in (source.tensors, self.specs)]
        self.report = Report(sum(math.prod(spec.shape) for spec in source.tensors.values()), (sizes[0], sizes[1]))

    def described(self) -> dict[str, Any]:
        """quantization_config of config.json."""
        scheme, is_float = self._scheme, self._scheme.dtype == "float8_e4m3fn"
        kind = {"num_bits": self._bits, "type": "float" if is_float else "int", "dynamic": False}
        kind |= {"symmetric": scheme.symmetric, "strategy": "group" if scheme.group else "channel"}
        kind |= {"group_size": scheme.group or None}
        inputs = None
        if scheme.rest.inputs is not None:
            inputs = kind | {"num_bits": 8, "dynamic": True, "symmetric": True, "strategy": "token", "group_size": None}
        form = "pack-quantized" if self._packed else "float-quantized" if is_float else "int-quantized"
        group = {"targets": ["Linear"], "weights": kind, "input_activations": inputs, "output_activations": None}
        modules = [name.removesuffix(".weight") for name, spec in self._source.tensors.items() if len(spec.shape) == 2]
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": form,
            "config_groups": {"group_0": group | {"format": form}},
            "ignore": [
                "lm_head",
                *(name for name in modules if "proj" in name and f"{name}.weight" not in self._covered),
            ],
            "kv_cache_scheme": None,
        }

    def _specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = spec.shape
        groups = columns // (self._scheme.group or columns)
        scales = TensorSpec((rows, groups), spec.dtype if self._scheme.group else np.dtype(np.float32))
        if not self._packed:
            return {name: TensorSpec(spec.shape, np.dtype(self._scheme.dtype)), f"{name}_scale": scales}
        words, integers = math.ceil(columns * self._bits / 32), np.dtype(np.int32)
        specs = {f"{name}_packed": TensorSpec((rows, words), integers), f"{name}_scale": scales}
        specs[f"{name}_shape"] = TensorSpec((2,), np.dtype(np.int64))
        if not self._scheme.symmetric:
            specs[f"{name}_zero_point"] = TensorSpec((math.ceil(rows * self._bits / 32), groups), integers)
        return specs

    def tensors(self) -> Tensors:
        """Names and values in the order of `specs`."""
        for name, weight in self._rounding(self._source, self._covered, self.report):
            if isinstance(weight, Packed):
                yield from self._parts(name, weight)
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

    def _parts(self, name: str, weight: Packed) -> Tensors:
        values, scales, zeros = weight.values, weight.scales, weight.zeros
        if not self._packed:
            yield name, values
            yield f"{name}_scale", scales
            return
        yield f"{name}_packed", _words(values, self._bits)
        yield f"{name}_scale", scales
        yield f"{name}_shape", np.array(values.shape, np.int64)
        if zeros is not None:
            yield f"{name}_zero_point", np.ascontiguousarray(_words(zeros.T, self._bits).T)


def _covers(scheme: Scheme, name: str, num_layers: int) -> bool:
    if "_proj." not in name:
        return False
    return not scheme.inner_mlp_only or (".mlp." in name and 0 < int(name.split(".")[2]) < num_layers - 1)


def _words(values: np.ndarray, bits: int) -> np.ndarray:
    """Signed numbers [R, C] in int32 words along C, raised to be positive, the lowest bits first."""
    octets = (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    octets = np.pad(octets, ((0, 0), (0, -octets.shape[1] % (32 // bits))))
    if bits == 4:
        octets = octets[:, ::2] | octets[:, 1::2] << 4
    return np.ascontiguousarray(octets).view("<i4")
