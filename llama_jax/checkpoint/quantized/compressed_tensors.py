"""The files of llm-compressor and compressed-tensors, which vLLM reads (quant_method compressed-tensors).

Source: compressed_tensors/compressors (naive_quantized, pack_quantized) and quantization/quant_scheme.py. Plain:
`X.weight` int8 or float8 [out, in]. Packed: `X.weight_packed` int32 [out, in * bits / 32], the lowest bits first, of
values that are 2 ** (bits - 1) too large, and `X.weight_shape`. Both with `X.weight_scale` [out, in / group], [out, 1]
or [1], and perhaps `X.weight_zero_point` (packed along out) and `X.weight_g_idx`, the group of each input. What the
files say of weights is what their tensors are; the description must agree, and says how activations are rounded.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoint.quantized.packed import (
    GroupedWeight,
    PackedWeight,
    Reader,
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
from llama_jax.schemes import Quantization

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_INTEGERS = ("int32", "int64")
_DTYPES = {"int": "int8", "float": "float8_e4m3fn"}
_SCALES_OF_INPUTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_SCALES_OF_CACHE = ("k_scale", "v_scale")


class _Scheme(NamedTuple):
    """What a config group says of the weights: group None is all of a row, 0 all of the matrix."""

    bits: int
    dtype: str
    group: int | None
    symmetric: bool


def read(described: Mapping[str, Any], stored: Source) -> Mapping[str, PackedWeight]:
    """The weights that have a scale. Raises ValueError for what is not supported or does not fit the description."""
    setting(described, "format", None, _FORMATS)
    setting(described, "quantization_status", "compressed", ("compressed",))
    for key in ("transform_config", "sparsity_config"):
        if isinstance(value := described.get(key), dict) and value.get("format", value) not in ("dense", {}):
            raise ValueError(f"{key}={value!r:.80} is not supported")
    groups = described.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"config_groups={groups!r:.80}; an object of objects was expected")
    schemes = [_parse_scheme(group.get("weights")) for group in groups.values()]
    inputs = {_parse_inputs(group.get("input_activations")) for group in groups.values()}
    if len(inputs) > 1:
        raise ValueError("config_groups that round activations in different ways are not supported")
    return {f"{name}.weight": _weight(stored, name, schemes, *inputs) for name in modules(stored, "weight_scale")}


def _parse_scheme(weights: Any) -> _Scheme:
    if not isinstance(weights, dict):
        raise ValueError(f"weights={weights!r:.80}; an object was expected")
    kind = setting(weights, "type", "int", tuple(_DTYPES))
    bits = setting(weights, "num_bits", 8, (4, 8) if kind == "int" else (8,))
    strategy = setting(weights, "strategy", "tensor", ("tensor", "channel", "group"))
    size = group_size(weights)
    if (strategy == "group") != (size is not None):
        raise ValueError(f"strategy={strategy!r} with group_size={size}")
    return _Scheme(bits, _DTYPES[kind], 0 if strategy == "tensor" else size, bool(weights.get("symmetric", True)))


class _Inputs(NamedTuple):
    """How activations are rounded: dtype None is not at all; is_stored: by scales beside the weights, else by token."""

    dtype: str | None = None
    is_stored: bool = False


def _parse_inputs(inputs: Any) -> _Inputs:
    """Activations that are rounded in another way than these stay as they are."""
    if inputs is None:
        return _Inputs()
    if not isinstance(inputs, dict):
        raise ValueError(f"input_activations={inputs!r:.80}; an object was expected")
    setting(inputs, "num_bits", 8, (8,))
    dtype = _DTYPES[setting(inputs, "type", "int", tuple(_DTYPES))]
    dynamic, strategy = inputs.get("dynamic", False), inputs.get("strategy", "tensor")
    if dynamic is False and strategy == "tensor":
        return _Inputs(dtype, is_stored=True)
    per_token = dynamic is True and strategy == "token" and inputs.get("symmetric", True)
    return _Inputs(dtype) if per_token else _Inputs()


def _rounding(stored: Source, module: str, inputs: _Inputs) -> Quantization:
    """How the activations that a module multiplies are rounded. Raises ValueError for a scale that cannot be one."""
    if not inputs.is_stored:
        return Quantization(inputs=inputs.dtype)
    name, zero_name = f"{module}.input_scale", f"{module}.input_zero_point"
    scale, zero = stored.read(expect(stored, name, (1,))).item(), 0
    if not 0 < scale < math.inf:
        raise ValueError(f"tensor {name} is {scale}; a positive number was expected")
    if zero_name in stored.tensors and inputs.dtype == "int8":
        zero = int(stored.read(expect(stored, zero_name, (1,), ["int8"])).item())
    return Quantization(inputs=inputs.dtype, scale=float(scale), zero=zero)


def _weight(stored: Source, module: str, schemes: list[_Scheme], inputs: _Inputs) -> GroupedWeight:
    scale, zero, g_idx = (f"{module}.weight_{part}" for part in ("scale", "zero_point", "g_idx"))
    is_packed = f"{module}.weight_packed" in stored.tensors
    shape, bits, dtype, parts, values = (_packed if is_packed else _plain)(stored, module)
    rows, columns = shape
    symmetric = zero not in stored.tensors
    fitting = [_scale_shape(stored, scale, s, shape) for s in schemes if (s.bits, s.dtype) == (bits, dtype)]
    sizes = [size for size in fitting if size is not None]
    if not sizes or symmetric not in [s.symmetric for s in schemes]:
        found = f"{scale} {stored.tensors[scale].shape}, {'no ' if symmetric else ''}zero point"
        raise ValueError(f"tensors of {module} ({bits} bits, {dtype} {shape}, {found}) fit none of config_groups")
    size = sizes[0]
    zeros = None if symmetric else _zeros(stored, zero, (rows, columns // size), bits if is_packed else None)
    order = None
    if g_idx in stored.tensors:
        groups = stored.read(expect(stored, g_idx, (columns,), _INTEGERS))
        order = None if -1 in groups else check_order(g_idx, groups, size)
    beside = [f"{module}.{name}" for name in _SCALES_OF_INPUTS]
    beside += [f"{module.rpartition('.')[0]}.{name}" for name in _SCALES_OF_CACHE]
    parts = [*parts, scale, *(name for name in (zero, g_idx, *beside) if name in stored.tensors)]
    one_for_all = len(stored.tensors[scale].shape) == 1

    def scales(rows: slice, groups: slice) -> np.ndarray:
        return stored.read(scale).reshape(1, 1) if one_for_all else stored.read(scale, (rows, groups))

    return GroupedWeight(shape, parts, bits, size, values, scales, zeros, order, _rounding(stored, module, inputs))


def _scale_shape(stored: Source, name: str, scheme: _Scheme, shape: tuple[int, int]) -> int | None:
    """Columns for each scale if the tensor of scales fits the scheme, else None."""
    rows, columns = shape
    size = scheme.group or columns
    found = stored.tensors[name].shape
    fits = columns % size == 0 and found == ((1,) if scheme.group == 0 else (rows, columns // size))
    return size if fits and expect(stored, name, found) else None


_Values = tuple[tuple[int, int], int, str, list[str], Reader]


def _plain(stored: Source, module: str) -> _Values:
    name = f"{module}.weight"
    if name not in stored.tensors:
        raise ValueError(f"tensor {name} is missing, though there is its scale")
    shape = matrix_shape(stored, name)
    expect(stored, name, shape, list(_DTYPES.values()))
    return shape, 8, stored.tensors[name].dtype.name, [name], lambda *index: stored.read(name, index)


def _packed(stored: Source, module: str) -> _Values:
    """The bits follow from the widths: of 4 and 8 one fits."""
    name, said = f"{module}.weight_packed", f"{module}.weight_shape"
    rows, num_words = matrix_shape(stored, name)
    expect(stored, name, (rows, num_words), ["int32"])
    shape = tuple(map(int, stored.read(expect(stored, said, (2,), _INTEGERS))))
    bits = next((bits for bits in (4, 8) if shape[1] > 0 and num_words == -(-shape[1] * bits // 32)), None)
    if shape[0] != rows or bits is None:
        raise ValueError(f"tensor {name} {(rows, num_words)} does not hold 4 or 8 bits of a matrix {shape}")

    def values(rows: slice, columns: slice) -> np.ndarray:
        words, within = words_of(columns, bits)
        return _signed(unpack(stored.read(name, (rows, words)), bits), bits)[:, within]

    return (rows, shape[1]), bits, "int8", [name, said], values


def _zeros(stored: Source, name: str, shape: tuple[int, int], bits: int | None) -> Reader:
    """Zero points, packed along the rows of the matrix if bits are given."""
    rows, columns = shape
    if bits is None:
        expect(stored, name, shape, ["int8"])
        return lambda *index: stored.read(name, index)
    expect(stored, name, (-(-rows * bits // 32), columns), ["int32"])

    def zeros(rows: slice, groups: slice) -> np.ndarray:
        words, within = words_of(rows, bits)
        return _signed(unpack(stored.read(name, (words, groups)).T, bits), bits)[:, within].T

    return zeros


def _signed(values: np.ndarray, bits: int) -> np.ndarray:
    return (values - np.uint8(1 << (bits - 1))).view(np.int8)
