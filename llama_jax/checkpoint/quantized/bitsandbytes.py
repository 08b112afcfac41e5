"""The files of bitsandbytes: NF4 and FP4, also with their scales quantized, and LLM.int8() (quant_method bitsandbytes).

Source: QuantState and Linear8bitLt of bitsandbytes (functional.py, nn/modules.py). 4 bits: `X.weight` uint8
[out * in / 2, 1] holds the matrix as one row, two values a byte, the high half first, in blocks (64 values) of one
scale; the 16 levels are stored, and so is a description in JSON. 8 bits: `X.weight` int8 [out, in] is to be
multiplied by `X.SCB` [out] / 127.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.quantized.packed import (
    NF4,
    GroupedWeight,
    Narrow,
    Packed,
    PackedWeight,
    expect,
    grouped,
    matrix_shape,
    modules,
    setting,
)
from llama_jax.checkpoint.source import Source
from llama_jax.schemes import Quantization

_STATE = "weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_MAX_DESCRIPTION = 4096  # bytes; bitsandbytes' own have about 200


def read(described: Mapping[str, Any], stored: Source) -> Mapping[str, PackedWeight]:
    """The weights of 4 and 8 bits. Raises ValueError for what is not supported or does not fit."""
    setting(described, "bnb_4bit_quant_storage", "uint8", ("uint8",))
    packed: dict[str, PackedWeight] = {f"{name}.weight": _int8(stored, name) for name in modules(stored, "SCB")}
    for kind in _KINDS:
        for name in modules(stored, f"{_STATE}{kind}"):
            packed[f"{name}.weight"] = _FourBits(stored, name, kind)
    return packed


def _int8(stored: Source, module: str) -> GroupedWeight:
    name, scale, form = f"{module}.weight", f"{module}.SCB", f"{module}.weight_format"
    if name not in stored.tensors:
        raise ValueError(f"tensor {name} is missing, though there is its scale {scale}")
    rows, columns = matrix_shape(stored, name)
    expect(stored, name, (rows, columns), ["int8"])
    expect(stored, scale, (rows,), ["float32"])
    parts = [name, scale]
    if form in stored.tensors:
        if stored.read(expect(stored, form, (), ["uint8"])) != 0:
            raise ValueError(f"tensor {form} is not 0: weights that are not stored by rows are not supported")
        parts.append(form)

    def scales(rows: slice, groups: slice) -> np.ndarray:
        return stored.read(scale, (rows,))[:, None] / np.float32(127)

    return GroupedWeight((rows, columns), parts, 8, columns, lambda *index: stored.read(name, index), scales)


class _FourBits:
    """A PackedWeight of levels by number."""

    zeros = None

    def __init__(self, stored: Source, module: str, kind: str):
        self._stored, self._name, description = stored, f"{module}.weight", f"{module}.{_STATE}{kind}"
        state = _Description(description, stored)
        self.shape, self._block = state.shape(), state.positive("blocksize")
        size = self.shape[0] * self.shape[1]
        if size % 2 or size % self._block:
            raise ValueError(f"tensor {self._name} of shape {self.shape} is not a number of blocks of {self._block}")
        expect(stored, self._name, (size // 2, 1), ["uint8"])
        count, levels = size // self._block, self._part("quant_map", 16)
        self._levels = stored.read(levels)
        self._outer, self._offset = 0, np.float32(0)
        self.parts = [self._name, description, levels]
        if f"{self._name}.nested_absmax" in stored.tensors:
            self._outer, self._offset = state.positive("nested_blocksize"), np.float32(state.number("nested_offset"))
            self.parts += [self._part("nested_absmax", -(-count // self._outer)), self._part("nested_quant_map", 256)]
        self.parts.append(self._part("absmax", count, "uint8" if self._outer else "float32"))

    @property
    def narrow(self) -> Narrow | None:
        """NF4, if its blocks begin with rows."""
        if self.shape[1] % self._block or not np.array_equal(self._levels, NF4):
            return None
        return Narrow(np.dtype(ml_dtypes.int4), self._block, np.dtype(np.float32), rest=Quantization("nf4"))

    def scales(self, rows: slice, groups: slice) -> np.ndarray:
        """Of blocks of rows, where they begin with rows."""
        count = self.shape[1] // self._block
        return self._scales(slice(rows.start * count, rows.stop * count)).reshape(-1, count)[:, groups]

    def _part(self, part: str, size: int, dtype: str = "float32") -> str:
        return expect(self._stored, f"{self._name}.{part}", (size,), [dtype])

    def read(self, rows: slice, columns: slice) -> Packed:
        """The slice. Where blocks do not begin with a row, each value has its own scale."""
        width, block = self.shape[1], self._block
        start, stop = rows.start * width, rows.stop * width
        octets = self._stored.read(self._name, (slice(start // 2, -(-stop // 2)),))
        values = np.concatenate([octets >> 4, octets & 15], axis=1).reshape(-1)[start % 2 :][: stop - start]
        values = values.reshape(-1, width)[:, columns]
        groups = None
        if width % block == 0:
            taken, groups = grouped(columns, block)
            scales = self.scales(rows, taken)
        else:
            scales = (
                self._scales(slice(start // block, -(-stop // block)))
                .repeat(block)[start % block :][: stop - start]
                .reshape(-1, width)[:, columns]
            )
        return Packed(values, scales, 4, groups=groups, levels=self._levels)

    def _scales(self, blocks: slice) -> np.ndarray:
        """Of these blocks, float32."""
        scales = self._stored.read(f"{self._name}.absmax", (blocks,))
        if not self._outer:
            return scales
        outer = slice(blocks.start // self._outer, -(-blocks.stop // self._outer))
        of_outer = self._stored.read(f"{self._name}.nested_absmax", (outer,))[
            np.arange(blocks.start, blocks.stop) // self._outer - outer.start
        ]
        return self._stored.read(f"{self._name}.nested_quant_map")[scales] * of_outer + self._offset


class _Description:
    """The JSON object that a tensor of bytes holds. Raises ValueError if it is none or lacks what is asked for."""

    def __init__(self, name: str, stored: Source):
        spec = stored.tensors[name]
        if len(spec.shape) != 1 or spec.shape[0] > _MAX_DESCRIPTION:
            raise ValueError(f"tensor {name} has shape {spec.shape}; at most {_MAX_DESCRIPTION} bytes were expected")
        self._name = name
        text = stored.read(expect(stored, name, spec.shape, ["uint8"])).tobytes()
        try:
            self._fields = json.loads(text.decode())
            if not isinstance(self._fields, dict):
                raise ValueError(f"an object was expected, not {self._fields!r:.80}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tensor {name} holds no description: {error}") from None

    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        shape = self._fields.get("shape")
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"tensor {self._name}: shape={shape!r:.80}; two positive numbers were expected")
        return shape[0], shape[1]

    def positive(self, key: str) -> int:
        """A whole number."""
        if type(value := self._fields.get(key)) is not int or not 0 < value < 2**31:
            raise ValueError(f"tensor {self._name}: {key}={value!r:.80}; a positive whole number was expected")
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        if type(value := self._fields.get(key)) is not float or not math.isfinite(value):
            raise ValueError(f"tensor {self._name}: {key}={value!r:.80}; a number was expected")
        return value
