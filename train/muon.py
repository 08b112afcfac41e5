"""Muon (arXiv 2502.16982): each step of a matrix is its momentum with the singular values drawn towards one.

The Newton-Schulz iteration is Keller Jordan's. The weights of the layers are matrices between their
input and their output dimensions; embedding, head and norms follow Adam. The invariants: the step is
the same on any mesh, because the compiler splits the products; and the state is Adam's, so that
checkpoints are. (A matrix has no use for its nu, which is kept for that alone.)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from llama_jax.checkpoint.names import stored_weights
from llama_jax.tree import leaf_name

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5

# Root mean square of AdamW's steps: with it, learning rates and weight decay serve both (section 2.2).
STEP_RMS = 0.2


def scale_by_muon(b1: float, b2: float, eps: float) -> Any:
    """The optax transformation; b1 is the decay of Muon's momentum and of Adam's, b2 and eps are Adam's."""
    adam = optax.scale_by_adam(b1, b2, eps)

    def update(updates, state: Any, params=None):
        grads = updates
        updates, state = adam.update(grads, state, params)

        def choose(path, update: Array, grad: Array, mu: Array) -> Array:
            (stored, *_), _ = stored_weights(leaf_name(path), 1)
            if stored.num_leading == 0:
                return update
            return orthogonalized(b1 * mu + (1 - b1) * grad, stored.num_leading, eps)

        return jax.tree.map_with_path(choose, updates, grads, optax.tree.get(state, "mu")), state

    return optax.GradientTransformation(adam.init, update)


def orthogonalized(x: Array, num_leading: int, eps: float) -> Array:
    """Matrices float32 [L, rows..., columns...] with singular values near one, scaled to STEP_RMS.

    num_leading: how many dimensions are rows.
    """
    rows, columns = math.prod(x.shape[1 : 1 + num_leading]), math.prod(x.shape[1 + num_leading :])

    def iterate(x: Array) -> Array:
        wide = rows <= columns
        m = x.reshape(-1, rows, columns)
        m = m if wide else m.mT
        m = m / (jnp.linalg.norm(m, axis=(1, 2), keepdims=True) + eps)
        a, b, c = COEFFICIENTS
        for _ in range(NUM_ITERATIONS):
            gram = m @ m.mT
            m = a * m + (b * gram + c * gram @ gram) @ m
        return (m if wide else m.mT).reshape(x.shape) * (STEP_RMS * max(rows, columns) ** 0.5)

    split_by_compiler: Any = jax.sharding.auto_axes(iterate, out_sharding=jax.typeof(x).sharding)
    return split_by_compiler(x)
