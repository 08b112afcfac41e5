"""Next-token cross-entropy without ever holding the logits of a whole batch.

At a vocabulary of 128,256 the float32 logits of one row of 8,192 tokens are 3.9 GiB. They are made
a chunk of the sequence at a time, forward and again backward, with the head gathered once for all.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from llama_jax.model import REMAT_POLICIES, Llama
from train.data.packing import Batch


def token_losses(model: Llama, x: Array, targets: Array, table: Array) -> Array:
    """Cross-entropy float32 [B, T] in nats of normed outputs x [B, T, D] against targets int32 [B, T].

    The target's logit is picked by comparison, not by indexing, so a vocabulary split over the
    mesh needs two all-reduces and no gather.
    """
    return _losses(model, x, targets, table)[0]


def _losses(model: Llama, x: Array, targets: Array, table: Array) -> tuple[Array, Array]:
    """Cross-entropy and the logarithm of the softmax's denominator, both float32 [B, T]."""
    logits = model.unembed(x, table)
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    return normalizer - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), normalizer


def loss_sum(model: Llama, batch: Batch, *, remat: str, num_chunks: int, z_loss: float = 0.0) -> tuple[Array, Array]:
    """Summed loss in nats and the number of tokens that it counts, both float32 scalars.

    The gradient is that of the loss plus z_loss times the squared log-normalizer (arXiv 2204.02311,
    section 5); the value leaves that out, so that runs with and without it compare. Raises
    ValueError for an unknown remat or if the chunks do not divide the sequence.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"run.remat={remat!r} is not one of {', '.join(REMAT_POLICIES)}")
    x = model.hidden(batch.tokens, batch.positions, batch.segment_ids, remat=remat)
    length = x.shape[1]
    if length % num_chunks:
        raise ValueError(f"run.loss_chunks={num_chunks} does not divide seq_len={length}")
    table = model.output_table()

    @jax.checkpoint
    def chunk_loss(x: Array, targets: Array, mask: Array) -> Array:
        losses, normalizer = _losses(model, x, targets, table)
        if z_loss:
            penalty = z_loss * jnp.square(normalizer)
            losses += penalty - jax.lax.stop_gradient(penalty)
        return jnp.sum(losses * mask)

    def add(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + chunk_loss(*chunk), None

    chunks = jax.tree.map(lambda a: sequence_chunks(a, num_chunks), (x, batch.targets, batch.loss_mask))
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)
    return total, jnp.sum(batch.loss_mask)


def sequence_chunks(x: Array, num_chunks: int) -> Array:
    """[B, T, ...] -> [N, B, T / N, ...]; every chunk takes each N-th token, so a split of T stays where it is."""
    batch, sequence, *rest = jax.typeof(x).sharding.spec
    shape = (x.shape[0], x.shape[1] // num_chunks, num_chunks, *x.shape[2:])
    return jnp.moveaxis(jnp.reshape(x, shape, out_sharding=PartitionSpec(batch, sequence, None, *rest)), 2, 0)
