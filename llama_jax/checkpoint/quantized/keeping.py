"""Packed weights as the model itself can hold them: their values, scales and zero points as tensors to be read.

A weight "X.weight" is seen as "X.weight:values" of its own shape, and ":scales" and ":zeros" [out, in / group]. Numbers
from 0 up are lowered by half their range, and their zero points with them, so that values are int4 or int8.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.quantized.packed import Narrow, PackedWeight
from llama_jax.checkpoint.source import Source, TensorSpec

PARTS = ("values", "scales", "zeros")


class KeptSource:
    """A source with the parts of its packed weights beside it; `forms` says how each can be held that can."""

    def __init__(self, source: Source, packed: Mapping[str, PackedWeight]):
        """Nothing is read."""
        self._source, self._packed = source, packed
        forms = {name: weight.narrow for name, weight in packed.items()}
        self.forms: dict[str, Narrow] = {name: form for name, form in forms.items() if form is not None}
        self.tensors = dict(source.tensors)
        for name, form in self.forms.items():
            rows, columns = packed[name].shape
            by_group = (rows, columns // form.group)
            self.tensors[f"{name}:values"] = TensorSpec((rows, columns), np.dtype(form.dtype))
            self.tensors[f"{name}:scales"] = TensorSpec(by_group, form.scale_dtype)
            self.tensors[f"{name}:zeros"] = TensorSpec(by_group, np.dtype(np.int8))

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, the part or its slice."""
        name, _, part = name.partition(":")
        if not part:
            return self._source.read(name, index)
        weight, form = self._packed[name], self.forms[name]
        shape = self.tensors[f"{name}:{part}"].shape
        whole = (*(index or ()), slice(None), slice(None))[:2]
        rows, columns = (slice(*s.indices(size)[:2]) for s, size in zip(whole, shape, strict=True))
        if part == "scales":
            scales = weight.scales(rows, columns)
            return np.broadcast_to(scales, (rows.stop - rows.start, columns.stop - columns.start))
        if part == "values":
            numbers = weight.read(rows, columns).values
        else:
            assert weight.zeros is not None
            numbers = weight.zeros(rows, columns)
        if numbers.dtype == np.uint8:
            numbers = (numbers - np.uint8(8 if form.dtype == ml_dtypes.int4 else 128)).view(np.int8)
        return numbers.astype(form.dtype if part == "values" else np.int8, copy=False)
