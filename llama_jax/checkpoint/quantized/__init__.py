"""Quantized weights that others publish in Hugging Face's form, read as they are: one file a format.

Each format turns the tensors of a module into a `PackedWeight`; `QuantizedSource` shows them to the loader under
their canonical names, as float32 or packed. The one invariant: a tensor that no format understands stays visible
under its own name, so that the loader refuses it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoint.quantized import awq, bitsandbytes, compressed_tensors, fbgemm, gptq
from llama_jax.checkpoint.quantized.packed import Packed, PackedWeight
from llama_jax.checkpoint.source import Source, TensorSpec

Reader = Callable[[Mapping[str, Any], Source], Mapping[str, PackedWeight]]

# By quant_method of config.json. The readers take the description and the stored tensors.
METHODS: dict[str, Reader] = {
    "awq": awq.read,
    "bitsandbytes": bitsandbytes.read,
    "compressed-tensors": compressed_tensors.read,
    "fbgemm_fp8": fbgemm.read,
    "gptq": gptq.read,
}


class QuantizedSource:
    """Canonical tensors over stored ones; those in `packed` are dequantized to float32 as they are read."""

    def __init__(self, stored: Source, packed: Mapping[str, PackedWeight]):
        """packed: by canonical name. Nothing is read."""
        self._stored, self.packed = stored, packed
        taken = {part for weight in packed.values() for part in weight.parts}
        self.tensors = {name: spec for name, spec in stored.tensors.items() if name not in taken}
        self.tensors |= {name: TensorSpec(weight.shape, np.dtype(np.float32)) for name, weight in packed.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor or its slice."""
        if name not in self.packed:
            return self._stored.read(name, index)
        return self.read_packed(name, index).dequantize()

    def read_packed(self, name: str, index: tuple[slice, ...] | None = None) -> Packed:
        """The slice of a tensor that is in `packed`."""
        weight = self.packed[name]
        whole = (*(index or ()), slice(None), slice(None))[:2]
        rows, columns = (slice(*s.indices(size)[:2]) for s, size in zip(whole, weight.shape, strict=True))
        return weight.read(rows, columns)


def open_quantized(described: Any, stored: Source) -> QuantizedSource:
    """The stored tensors of a checkpoint whose config.json says quantization_config.

    Raises ValueError for a method or a setting of it that is not supported, and for tensors that do not fit it.
    """
    if not isinstance(described, dict):
        raise ValueError(f"quantization_config must be a JSON object, not {described!r:.80}")
    method = described.get("quant_method")
    if method not in METHODS:
        raise ValueError(f"quant_method={method!r:.80} is not supported; these are: {', '.join(METHODS)}")
    try:
        return QuantizedSource(stored, METHODS[method](described, stored))
    except ValueError as error:
        raise ValueError(f"{method}: {error}") from None
