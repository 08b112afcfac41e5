"""The blocks of GGUF: so many values of a row with their scales, to numbers and back.

Source: ggml-quants.c of ggml-org/ggml and gguf/quants.py of its Python package. Scales are float16; those of the K
types are small integers under one float16 for each 256 values.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.quantized.packed import Narrow, Packed

FLOAT_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


_INT4, _INT8, _F16 = np.dtype(ml_dtypes.int4), np.dtype(np.int8), np.dtype(np.float16)

# The types whose numbers are integers times a scale.
NARROW = {
    "Q4_0": Narrow(_INT4, 32, _F16),
    "Q5_0": Narrow(_INT8, 32, _F16),
    "Q8_0": Narrow(_INT8, 32, _F16),
    "Q6_K": Narrow(_INT8, 16, np.dtype(np.float32)),
}


def unpack_blocks(name: str, blocks: np.ndarray) -> Packed:
    """Blocks uint8 [R, N, bytes] of a type by name, as R rows."""
    values, scales, offsets, bits = _UNPACK[name](np.ascontiguousarray(blocks).reshape(-1, blocks.shape[-1]))
    rows = len(blocks)
    return Packed(
        values.reshape(rows, -1),
        scales.reshape(rows, -1),
        bits,
        offsets=None if offsets is None else offsets.reshape(rows, -1),
    )


_Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray | None, int]


def _half(octets: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(octets).view("<f2").astype(np.float32)


def _nibbles(octets: np.ndarray) -> np.ndarray:
    """[N, B] bytes -> [N, 2, B], the low halves first."""
    return np.stack([octets & 15, octets >> 4], axis=1)


def _bits(octets: np.ndarray, count: int) -> np.ndarray:
    """[N, B] bytes -> [N, 8 / count, B]: numbers of count bits, the lowest first."""
    shifts = np.arange(0, 8, count, dtype=np.uint8)[:, None]
    return octets[:, None] >> shifts & ((1 << count) - 1)


def _q4_0(b: np.ndarray) -> _Unpacked:
    return _nibbles(b[:, 2:]).view(np.int8) - np.int8(8), _half(b[:, :2]), None, 4


def _q4_1(b: np.ndarray) -> _Unpacked:
    return _nibbles(b[:, 4:]), _half(b[:, :2]), -_half(b[:, 2:4]), 4


def _five(low: np.ndarray, fifth: np.ndarray) -> np.ndarray:
    bits = np.unpackbits(np.ascontiguousarray(fifth), axis=1, bitorder="little")
    return _nibbles(low).reshape(len(low), -1) | bits << 4


def _q5_0(b: np.ndarray) -> _Unpacked:
    return _five(b[:, 6:], b[:, 2:6]).view(np.int8) - np.int8(16), _half(b[:, :2]), None, 5


def _q5_1(b: np.ndarray) -> _Unpacked:
    return _five(b[:, 8:], b[:, 4:8]), _half(b[:, :2]), -_half(b[:, 2:4]), 5


def _q8_0(b: np.ndarray) -> _Unpacked:
    return b[:, 2:].view(np.int8), _half(b[:, :2]), None, 8


def _scales_and_minima(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a K block's 8 groups: 6 bits each, the high ones of the last four in the bytes of the first four."""
    first, second, third = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return _half(b[:, :2]) * scales, _half(b[:, 2:4]) * minima


def _q4_k(b: np.ndarray) -> _Unpacked:
    scales, minima = _scales_and_minima(b)
    return _nibbles(b[:, 16:].reshape(-1, 32)), scales, minima, 4


def _q5_k(b: np.ndarray) -> _Unpacked:
    scales, minima = _scales_and_minima(b)
    low = _nibbles(b[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32)
    return low | _bits(b[:, 16:48], 1) << 4, scales, minima, 5


def _q6_k(b: np.ndarray) -> _Unpacked:
    low = _nibbles(b[:, :128].reshape(-1, 64)).reshape(-1, 8, 32)
    high = _bits(b[:, 128:192].reshape(-1, 32), 2).reshape(-1, 8, 32)
    values = (low | high << 4).view(np.int8) - np.int8(32)
    return values, _half(b[:, 208:]) * np.ascontiguousarray(b[:, 192:208]).view(np.int8), None, 6


_UNPACK: dict[str, Callable[[np.ndarray], _Unpacked]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def pack_rows(name: str, rows: np.ndarray) -> np.ndarray:
    """Rows of numbers as bytes of a type by name, as llama.cpp rounds them: F32, F16, BF16, Q8_0 or Q4_0.

    Raises ValueError for a width that its blocks do not divide.
    """
    if name in FLOAT_DTYPES:
        return np.ascontiguousarray(rows.astype(FLOAT_DTYPES[name])).view(np.uint8)
    if rows.shape[-1] % 32:
        raise ValueError(f"rows of {rows.shape[-1]} values are no blocks of 32; use f16 or bf16")
    blocks = rows.astype(np.float32).reshape(-1, 32)
    return _PACK[name](blocks).reshape(len(rows), -1)


def _pack_q8_0(x: np.ndarray) -> np.ndarray:
    scales = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    quotients = x * _inverse(scales)
    values = np.trunc(quotients + np.copysign(np.float32(0.5), quotients))  # halves away from zero, as in C
    return np.concatenate([scales.astype("<f2").view(np.uint8), values.astype(np.int8).view(np.uint8)], axis=1)


def _pack_q4_0(x: np.ndarray) -> np.ndarray:
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    scales = largest / np.float32(-8)
    values = np.minimum(x * _inverse(scales) + np.float32(8.5), 15).astype(np.uint8)
    return np.concatenate([scales.astype("<f2").view(np.uint8), values[:, :16] | values[:, 16:] << 4], axis=1)


def _inverse(scales: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)


_PACK = {"Q8_0": _pack_q8_0, "Q4_0": _pack_q4_0}
