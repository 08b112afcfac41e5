"""FP8 weights with a scale for each row, as Meta published Llama 3.1 405B (quant_method fbgemm_fp8).

Source: transformers/integrations/fbgemm_fp8.py. `X.weight` float8 [out, in] is to be multiplied by `X.weight_scale`
[out, 1]; modules_to_not_convert names the modules that stay float, in full. Activations are rounded a token at a
time, their largest value taken as at most activation_scale_ub.
"""

from collections.abc import Mapping
from typing import Any

from llama_jax.checkpoint.quantized.packed import GroupedWeight, PackedWeight, expect, matrix_shape
from llama_jax.checkpoint.source import Source
from llama_jax.schemes import Quantization

FLOAT8 = "float8_e4m3fn"


def read(described: Mapping[str, Any], stored: Source) -> Mapping[str, PackedWeight]:
    """The weights of float8, each with its scale. Raises ValueError for one without, or that should not be float8."""
    bound = described.get("activation_scale_ub", 1200.0)
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not bound > 0:
        raise ValueError(f"activation_scale_ub={bound!r:.80}; a positive number was expected")
    floats = described.get("modules_to_not_convert") or []
    if not isinstance(floats, list):
        raise ValueError(f"modules_to_not_convert={floats!r:.80}; a list of names was expected")
    found = [name for name, spec in stored.tensors.items() if spec.dtype.name == FLOAT8]
    for name in found:
        if name.removesuffix(".weight") in floats:
            raise ValueError(f"tensor {name} is {FLOAT8}, though modules_to_not_convert names its module")
    return {name: float8_rows(stored, name, f"{name}_scale", bound=float(bound)) for name in found}


def float8_rows(stored: Source, name: str, scale: str, *, bound: float) -> GroupedWeight:
    """A matrix of float8 with a scale for each row."""
    rows, columns = matrix_shape(stored, name)
    expect(stored, scale, (rows, 1))
    return GroupedWeight(
        (rows, columns),
        (name, scale),
        bits=8,
        group=columns,
        values=lambda *index: stored.read(name, index),
        scales=lambda *index: stored.read(scale, index),
        rest=Quantization(inputs=FLOAT8, bound=bound),
    )
