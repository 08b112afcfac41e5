"""How weights in few bits lie in files of Hugging Face's form: as compressed-tensors, or for NF4 as bitsandbytes.

Sources: compressed_tensors/compressors (naive_quantized, pack_quantized), which vLLM reads; QuantState of bitsandbytes
(functional.py). The invariant: what a form writes, its reader beside it gives back to the bit.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from llama_jax.checkpoint.quantized.nested import DYNAMIC, OUTER_BLOCK
from llama_jax.checkpoint.quantized.packed import NF4, Packed
from llama_jax.checkpoint.source import TensorSpec
from llama_jax.schemes import Scheme

Tensors = Iterator[tuple[str, np.ndarray]]


class Form(Protocol):
    """What a format makes of a matrix "X.weight": several tensors."""

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The tensors, in order."""
        ...

    def parts(self, name: str, weight: Packed) -> Tensors:
        """Their values."""
        ...

    def described(self, floats: Sequence[str]) -> dict[str, Any]:
        """quantization_config of config.json; floats: the modules that stay so."""
        ...


class CompressedTensors:
    """Integers packed in words, or int8 and float8 as they are where activations are rounded too."""

    def __init__(self, scheme: Scheme):
        """Any scheme of linear values."""
        self._scheme, self._bits = scheme, 4 if scheme.dtype == "int4" else 8
        self._packed = scheme.dtype != "float8_e4m3fn" and scheme.rest.inputs is None

    def described(self, floats: Sequence[str]) -> dict[str, Any]:
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
        return {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": form,
            "config_groups": {"group_0": group | {"format": form}},
            "ignore": list(floats),
            "kv_cache_scheme": None,
        }

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The tensors of a matrix."""
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

    def parts(self, name: str, weight: Packed) -> Tensors:
        """Their values."""
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


class BitsAndBytes:
    """NF4 with its scales in 8 bits, two values a byte, the first in the high half."""

    def __init__(self, scheme: Scheme, dtype: np.dtype):
        """dtype: that of the weights as they were, in which bitsandbytes will multiply."""
        self._block, self._dtype = scheme.group, dtype.name

    def described(self, floats: Sequence[str]) -> dict[str, Any]:
        """quantization_config of config.json."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": self._dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": list(floats),
        }

    def specs(self, name: str, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The tensors of a matrix."""
        size, octet, real = math.prod(spec.shape), np.dtype(np.uint8), np.dtype(np.float32)
        count = size // self._block
        return {
            name: TensorSpec((size // 2, 1), octet),
            f"{name}.absmax": TensorSpec((count,), octet),
            f"{name}.quant_map": TensorSpec((len(NF4),), real),
            f"{name}.nested_absmax": TensorSpec((math.ceil(count / OUTER_BLOCK),), real),
            f"{name}.nested_quant_map": TensorSpec((len(DYNAMIC),), real),
            f"{name}.quant_state.bitsandbytes__nf4": TensorSpec((_DESCRIPTION_BYTES,), octet),
        }

    def parts(self, name: str, weight: Packed) -> Tensors:
        """Their values."""
        assert weight.nested is not None
        numbers = weight.values.reshape(-1)
        state = {
            "quant_type": "nf4",
            "blocksize": self._block,
            "dtype": self._dtype,
            "shape": weight.values.shape,
            "nested_blocksize": OUTER_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": float(weight.nested.offset),
        }
        yield name, (numbers[::2] << 4 | numbers[1::2])[:, None]
        yield f"{name}.absmax", weight.nested.codes
        yield f"{name}.quant_map", NF4
        yield f"{name}.nested_absmax", weight.nested.outer
        yield f"{name}.nested_quant_map", DYNAMIC
        # Padded, for its size is told before its number is known.
        text = json.dumps(state).encode().ljust(_DESCRIPTION_BYTES)
        yield f"{name}.quant_state.bitsandbytes__nf4", np.frombuffer(text, np.uint8)


_DESCRIPTION_BYTES = 256


def _words(values: np.ndarray, bits: int) -> np.ndarray:
    """Signed numbers [R, C] in int32 words along C, raised to be positive, the lowest bits first."""
    octets = (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    octets = np.pad(octets, ((0, 0), (0, -octets.shape[1] % (32 // bits))))
    if bits == 4:
        octets = octets[:, ::2] | octets[:, 1::2] << 4
    return np.ascontiguousarray(octets).view("<i4")
