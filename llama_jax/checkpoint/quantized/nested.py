"""NF4 with scales that are quantized themselves, rounded to nearest on the host as bitsandbytes does.

Sources: QLoRA (arXiv 2305.14314), 8-bit dynamic numbers (2110.02861), bitsandbytes (functional.py). The invariant:
values are rounded by the exact largest of their block, and stand for what the stored scales give.
"""

import numpy as np

from llama_jax.checkpoint.quantized.packed import NF4, NestedScales, Packed

OUTER_BLOCK = 256  # scales that share an outer scale


def _dynamic_map() -> np.ndarray:
    """The 256 numbers: a sign, an exponent of ten by the place of the first bit, and a fraction of what follows."""
    numbers = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1, dtype=np.float32)
        middles = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]).astype(np.float32) / 2
        numbers += [*middles, *-middles]
    return np.sort(np.array(numbers, np.float32))


DYNAMIC = _dynamic_map()


def nearest_nf4(matrix: np.ndarray, block: int) -> Packed:
    """A matrix [out, in] in NF4, each `block` inputs of an output with a scale."""
    groups = matrix.astype(np.float32).reshape(-1, block)
    largest = np.abs(groups).max(axis=1, initial=0)
    values = _nearest(groups / np.where(largest > 0, largest, 1)[:, None], NF4).reshape(matrix.shape)
    nested = _nested(largest)
    return Packed(values, nested.wide().reshape(len(matrix), -1), 4, levels=NF4, nested=nested)


def _nested(scales: np.ndarray) -> NestedScales:
    offset = np.float32(scales.mean())
    blocks = np.pad(scales - offset, (0, -len(scales) % OUTER_BLOCK)).reshape(-1, OUTER_BLOCK)
    outer = np.abs(blocks).max(axis=1)
    codes = _nearest(blocks / np.where(outer > 0, outer, 1)[:, None], DYNAMIC).reshape(-1)[: len(scales)]
    return NestedScales(codes, DYNAMIC, outer, offset, OUTER_BLOCK)


def _nearest(numbers: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The places of the levels next to numbers, uint8."""
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, numbers).astype(np.uint8)
