"""Checkpoints in few bits as vLLM and others read them: compressed-tensors in Hugging Face's form, written.

Source: compressed_tensors/compressors (naive_quantized, pack_quantized). Weights are rounded to nearest, one matrix
at a time: a value is off by half a step of its scale at most. The embedding, the head and the norms stay as they are.
"""

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.source import Source, TensorSpec
from llama_jax.schemes import Scheme

Tensors = Iterator[tuple[str, np.ndarray]]

_LIMITS = {"int8": (-128, 127, 8), "int4": (-8, 7, 4), "float8_e4m3fn": (-448, 448, 8)}


class Compression:
    """A model's canonical tensors as those of compressed-tensors: `specs` of all, `tensors` one by one."""

    def __init__(self, source: Source, scheme: Scheme, num_layers: int):
        """Raises ValueError for a scheme that the format does not hold and for widths that its groups do not divide."""
        if scheme.rest.code is not None:
            raise ValueError(f"compressed-tensors holds no {scheme.rest.code}; int8, int4 and fp8 can be written")
        self._source, self._scheme = source, scheme
        self._low, self._high, self._bits = _LIMITS[scheme.dtype]
        self._packed = scheme.dtype != "float8_e4m3fn" and scheme.rest.inputs is None
        self._covered = {name for name in source.tensors if _covers(scheme, name, num_layers)}
        for name in self._covered:
            columns = source.tensors[name].shape[1]
            if scheme.group and columns % scheme.group:
                raise ValueError(f"groups of {scheme.group} do not divide the {columns} inputs of {name}; use int8")
        self.specs: dict[str, TensorSpec] = {}
        for name, spec in source.tensors.items():
            self.specs |= self._specs(name, spec) if name in self._covered else {name: spec}

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
        for name in self._source.tensors:
            if name in self._covered:
                yield from self._compressed(name, self._source.read(name))
            else:
                yield name, self._source.read(name)

    def _compressed(self, name: str, weight: np.ndarray) -> Tensors:
        values, scales, zeros = _rounded(weight, self._scheme, self.specs[f"{name}_scale"].dtype)
        if not self._packed:
            yield name, values
            yield f"{name}_scale", scales
            return
        yield f"{name}_packed", _words(values, self._bits)
        yield f"{name}_scale", scales
        yield f"{name}_shape", np.array(weight.shape, np.int64)
        if zeros is not None:
            yield f"{name}_zero_point", np.ascontiguousarray(_words(zeros.T, self._bits).T)


def _covers(scheme: Scheme, name: str, num_layers: int) -> bool:
    if "_proj." not in name:
        return False
    return not scheme.inner_mlp_only or (".mlp." in name and 0 < int(name.split(".")[2]) < num_layers - 1)


def _rounded(
    weight: np.ndarray, scheme: Scheme, scale_dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Values [out, in], scales and zero points [out, groups] of a matrix."""
    low, high, _ = _LIMITS[scheme.dtype]
    groups = weight.astype(np.float32).reshape(len(weight), -1, scheme.group or weight.shape[1])
    least, most = groups.min(axis=2, initial=0), groups.max(axis=2, initial=0)
    span = 2 * np.maximum(most, -least) if scheme.symmetric else most - least
    scales = (span / np.float32(high - low)).astype(scale_dtype)
    steps = np.where(scales > 0, scales, 1).astype(np.float32)  # quotients by the scale as it is stored
    values, zeros = groups / steps[..., None], None
    if not scheme.symmetric:
        zeros = np.clip(np.rint(low - least / steps), low, high)
        values, zeros = values + zeros[..., None], zeros.astype(np.int8)
    values = np.clip(values, low, high).reshape(weight.shape)
    if scheme.dtype == "float8_e4m3fn":
        return values.astype(ml_dtypes.float8_e4m3fn), scales, zeros
    return np.rint(values).astype(np.int8), scales, zeros


def _words(values: np.ndarray, bits: int) -> np.ndarray:
    """Signed numbers [R, C] in int32 words along C, raised to be positive, the lowest bits first."""
    octets = (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    octets = np.pad(octets, ((0, 0), (0, -octets.shape[1] % (32 // bits))))
    if bits == 4:
        octets = octets[:, ::2] | octets[:, 1::2] << 4
    return np.ascontiguousarray(octets).view("<i4")
