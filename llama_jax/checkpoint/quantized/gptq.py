"""GPTQ's files, of 4 and 8 bits (quant_method gptq).

Source: gptqmodel/nn_modules/qlinear and gptqmodel/utils/model.py. `X.qweight` int32 [in * bits / 32, out] holds the
values, the lowest bits first, `X.qzeros` int32 [in / group, out * bits / 32] the zero points, `X.scales`
[in / group, out]. `X.g_idx` int32 [in] is the group of each input, out of order after act-order. A zero point of
the first form (checkpoint_format gptq) is stored less one: its words are less 0x11111111, borrowing across numbers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoint.quantized.packed import (
    GroupedWeight,
    PackedWeight,
    check_order,
    expect,
    group_size,
    matrix_shape,
    modules,
    setting,
    unpack,
    words_of,
)
from llama_jax.checkpoint.source import Source

_ONES = {4: 0x11111111, 8: 0x01010101}


def read(described: Mapping[str, Any], stored: Source) -> Mapping[str, PackedWeight]:
    """The weights that are stored as qweight. Raises ValueError for what is not supported or does not fit."""
    bits = setting(described, "bits", None, (4, 8))
    form = setting(described, "checkpoint_format", "gptq", ("gptq", "gptq_v2"))
    setting(described, "pack_dtype", "int32", ("int32",))
    if described.get("dynamic"):
        raise ValueError("dynamic: settings of single modules are not supported")
    size, ones = group_size(described), _ONES[bits] if form == "gptq" else 0
    return {f"{name}.weight": _weight(stored, name, bits, size, ones) for name in modules(stored, "qweight")}


def _weight(stored: Source, module: str, bits: int, size: int | None, ones: int) -> GroupedWeight:
    qweight, qzeros, scales = (f"{module}.{part}" for part in ("qweight", "qzeros", "scales"))
    num_words, rows = matrix_shape(stored, qweight)
    columns = num_words * 32 // bits
    size = size or columns
    if columns % size or rows * bits % 32:
        raise ValueError(f"tensor {qweight} is of a matrix {(rows, columns)}, in which groups of {size} do not fit")
    expect(stored, qweight, (num_words, rows), ["int32"])
    expect(stored, qzeros, (columns // size, rows * bits // 32), ["int32"])
    expect(stored, scales, (columns // size, rows))
    parts, order = [qweight, qzeros, scales], None
    if (g_idx := f"{module}.g_idx") in stored.tensors:
        order = check_order(g_idx, stored.read(expect(stored, g_idx, (columns,), ["int32"])), size)
        parts.append(g_idx)

    def values(rows: slice, columns: slice) -> np.ndarray:
        words, within = words_of(columns, bits)
        return unpack(stored.read(qweight, (words, rows)).T, bits)[:, within]

    def zeros(rows: slice, groups: slice) -> np.ndarray:
        words, within = words_of(rows, bits)
        return unpack(stored.read(qzeros, (groups, words)).view(np.uint32) + np.uint32(ones), bits)[:, within].T

    return GroupedWeight(
        (rows, columns),
        parts,
        bits,
        size,
        values,
        scales=lambda rows, groups: stored.read(scales, (groups, rows)).T,
        zeros=zeros,
        order=order,
    )
