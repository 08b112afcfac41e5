"""AWQ's files of 4 bits in the order of its GEMM kernel (quant_method awq).

Source: awq/modules/linear/gemm.py and awq/utils/packing_utils.py. `X.qweight` int32 [in, out / 8] and `X.qzeros`
int32 [in / group, out / 8] hold eight neighbouring outputs a word, in the order 0, 2, 4, 6, 1, 3, 5, 7 from the
lowest bits; `X.scales` [in / group, out].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.checkpoint.quantized.packed import (
    GroupedWeight,
    PackedWeight,
    expect,
    group_size,
    matrix_shape,
    modules,
    setting,
    unpack,
    words_of,
)
from llama_jax.checkpoint.source import Source

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of each output within its word


def read(described: Mapping[str, Any], stored: Source) -> Mapping[str, PackedWeight]:
    """The weights that are stored as qweight. Raises ValueError for what is not supported or does not fit."""
    setting(described, "w_bit" if "w_bit" in described else "bits", None, (4,))
    setting({"version": str(described.get("version", "gemm")).lower()}, "version", None, ("gemm",))
    setting(described, "zero_point", True, (True,))
    size = group_size(described, "q_group_size" if "q_group_size" in described else "group_size")
    return {f"{name}.weight": _weight(stored, name, size) for name in modules(stored, "qweight")}


def _weight(stored: Source, module: str, size: int | None) -> GroupedWeight:
    qweight, qzeros, scales = parts = [f"{module}.{part}" for part in ("qweight", "qzeros", "scales")]
    columns, num_words = matrix_shape(stored, qweight)
    size, rows = size or columns, num_words * 8
    if columns % size:
        raise ValueError(f"tensor {qweight} is of a matrix {(rows, columns)}, in which groups of {size} do not fit")
    expect(stored, qweight, (columns, num_words), ["int32"])
    expect(stored, qzeros, (columns // size, num_words), ["int32"])
    expect(stored, scales, (columns // size, rows))

    def numbers(name: str, rows: slice, columns: slice) -> np.ndarray:
        words, within = words_of(rows, 4)
        return unpack(stored.read(name, (columns, words)), 4, _PLACES)[:, within].T

    return GroupedWeight(
        (rows, columns),
        parts,
        bits=4,
        group=size,
        values=lambda rows, columns: numbers(qweight, rows, columns),
        scales=lambda rows, groups: stored.read(scales, (groups, rows)).T,
        zeros=lambda rows, groups: numbers(qzeros, rows, groups),
    )
