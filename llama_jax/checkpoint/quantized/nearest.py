"""Matrices rounded to nearest on the host: the grid of each group of a row, and the values on it.

The invariant: a value is off by half a step of its group's grid at most, which is its scale as it is stored (for FP8
the gap between two of its values times the scale).
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.quantized.nested import nearest_nf4
from llama_jax.checkpoint.quantized.packed import Packed
from llama_jax.schemes import Scheme

_LIMITS = {"int8": (-128, 127), "int4": (-8, 7), "float8_e4m3fn": (-448, 448)}


class Grid(NamedTuple):
    """What the values of N groups can be: (value - zeros) * scales, value of the scheme's dtype.

    scales [N, 1] in the dtype in which they are stored; zeros int8 [N, 1] or None.
    """

    scheme: Scheme
    scales: np.ndarray
    zeros: np.ndarray | None

    def nearest(self, weights: np.ndarray) -> np.ndarray:
        """The values next to weights float32 [N, C], int8 or float8."""
        low, high = _LIMITS[self.scheme.dtype]
        scales = self.scales.astype(np.float32)
        values = weights / np.where(scales > 0, scales, 1)
        values = np.clip(values if self.zeros is None else values + self.zeros, low, high)
        if self.scheme.dtype == "float8_e4m3fn":
            return values.astype(ml_dtypes.float8_e4m3fn)
        return np.rint(values).astype(np.int8)

    def wide(self, values: np.ndarray) -> np.ndarray:
        """What values [N, C] stand for, float32."""
        values = values.astype(np.float32)
        return (values if self.zeros is None else values - self.zeros) * self.scales.astype(np.float32)


def fit(groups: np.ndarray, scheme: Scheme, dtype: np.dtype) -> Grid:
    """The grid on which the largest of each of N groups float32 [N, C] still lie.

    dtype: of the scales, if a scheme has several for a row; those of whole rows are float32.
    """
    low, high = _LIMITS[scheme.dtype]
    least, most = groups.min(axis=1, initial=0, keepdims=True), groups.max(axis=1, initial=0, keepdims=True)
    span = 2 * np.maximum(most, -least) if scheme.symmetric else most - least
    scales = (span / np.float32(high - low)).astype(dtype if scheme.group else np.float32)
    if scheme.symmetric:
        return Grid(scheme, scales, None)
    steps = np.where(scales > 0, scales, 1).astype(np.float32)  # quotients by the scale as it is stored
    return Grid(scheme, scales, np.clip(np.rint(low - least / steps), low, high).astype(np.int8))


def nearest(matrix: np.ndarray, scheme: Scheme, dtype: np.dtype) -> Packed:
    """A matrix [out, in] rounded by a scheme; dtype as in `fit`."""
    if scheme.rest.code == "nf4":
        return nearest_nf4(matrix, scheme.group)
    groups = matrix.astype(np.float32).reshape(-1, scheme.group or matrix.shape[1])
    grid = fit(groups, scheme, dtype)
    return packed(grid.nearest(groups).reshape(matrix.shape), [grid])


def packed(values: np.ndarray, grids: list[Grid]) -> Packed:
    """Values [out, in] on their grids: one of all groups, row by row, or one for each column of groups."""

    def by_row(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts, axis=1).reshape(len(values), -1)

    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    bits = 4 if grids[0].scheme.dtype == "int4" else 8
    return Packed(values, by_row([grid.scales for grid in grids]), bits, by_row(zeros) if zeros else None)
