"""GPTQ: a matrix rounded column by column, where what a column loses is made up for by those that follow.

Source: GPTQ (arXiv 2210.17323) with its columns in their own order. The invariant: where inputs do not correlate, the
result is rounding to nearest.
"""

import math

import numpy as np

from llama_jax.checkpoint.quantized.nearest import fit, packed
from llama_jax.checkpoint.quantized.packed import Packed
from llama_jax.schemes import Scheme

DAMPING = 0.01  # of the mean of the diagonal, without which few or equal inputs have no inverse

_BLOCK = 128


def gptq(matrix: np.ndarray, products: np.ndarray, scheme: Scheme, dtype: np.dtype) -> Packed:
    """A matrix [out, in] rounded by a scheme so that its outputs lose little; dtype as in `nearest.fit`.

    products float32 [in, in]: the sum over tokens of their inputs' outer products.
    """
    rest, columns = matrix.astype(np.float32), matrix.shape[1]
    inverse = _factor(products)
    size = scheme.group or math.gcd(columns, _BLOCK)
    grids, values = [], []
    for start in range(0, columns, size):
        stop = start + size
        block, here = rest[:, start:stop], inverse[start:stop, start:stop]
        if scheme.group or not grids:
            grids.append(fit(block if scheme.group else rest, scheme, dtype))  # of what earlier columns have left
        lost = np.empty_like(block)
        for i in range(size):
            column = block[:, i : i + 1]
            values.append(grids[-1].nearest(column))
            lost[:, i : i + 1] = error = (column - grids[-1].wide(values[-1])) / here[i, i]
            block[:, i + 1 :] -= error * here[i, i + 1 :]
        rest[:, stop:] -= lost @ inverse[start:stop, stop:]
    return packed(np.concatenate(values, axis=1), grids)


def _factor(products: np.ndarray) -> np.ndarray:
    """The upper Cholesky factor of the inverse of the damped products, float32.

    It is the inverse of the lower factor of the products in reverse order, which needs no second factorization.
    """
    damped = products.astype(np.float64)
    diagonal = np.diag(damped)
    damped += np.diag(np.where(diagonal == 0, 1.0, DAMPING * diagonal.mean()))
    return np.linalg.inv(np.linalg.cholesky(damped[::-1, ::-1]))[::-1, ::-1].astype(np.float32)
