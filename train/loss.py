"""Next-token cross-entropy without ever holding the logits of all tokens over the whole vocabulary.

At a vocabulary of 128,256 the float32 logits of one row of 8,192 tokens are 3.9 GiB. They are made a chunk of
the vocabulary at a time, forward and again backward, and the softmax's denominator is carried as FlashAttention
carries it (arXiv 2205.14135). The invariant: in each direction every chunk of the head is gathered once, and its
gradient, one product over all tokens, is reduced once.

Letters, all of one device: N tokens, D model width, R rows of a chunk of the head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from llama_jax.attention import mesh_axes
from llama_jax.mesh import MeshAxes
from llama_jax.model import Llama
from llama_jax.remat import REMAT_POLICIES
from train.data.packing import Batch


def loss_sum(model: Llama, batch: Batch, *, remat: str, num_chunks: int, z_loss: float = 0.0) -> tuple[Array, Array]:
    """Summed loss in nats and the number of tokens that it counts, both float32 scalars.

    The gradient is that of the loss plus z_loss times the squared log-normalizer (arXiv 2204.02311,
    section 5); the value leaves that out, so that runs with and without it compare. Raises
    ValueError for an unknown remat.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"run.remat={remat!r} is not one of {', '.join(REMAT_POLICIES)}")
    x = model.hidden(batch.tokens, batch.positions, batch.segment_ids, remat=remat)
    losses, normalizers = token_losses(model, x, batch.targets, num_chunks=num_chunks)
    if z_loss:
        penalty = z_loss * jnp.square(normalizers)
        losses += penalty - lax.stop_gradient(penalty)
    return jnp.sum(losses * batch.loss_mask), jnp.sum(batch.loss_mask)


def token_losses(model: Llama, x: Array, targets: Array, *, num_chunks: int) -> tuple[Array, Array]:
    """Cross-entropy in nats and the logarithm of the softmax's denominator, both float32 [B, T].

    x: normed outputs [B, T, D]; targets: int32 [B, T]. Any number of chunks: what they do not divide
    is filled up.
    """
    rules, table = model.rules, model.output_table()
    split = PartitionSpec(*jax.typeof(x).sharding.spec[:2])
    tokens = tuple(axis for part in split for axis in mesh_axes(part))
    chunks = _Chunks(num_chunks, model.cfg.vocab_size, tokens, rules.vocab, rules.embed)
    run = jax.shard_map(
        functools.partial(_losses_here, chunks),
        in_specs=(PartitionSpec(*split, None), jax.typeof(table).sharding.spec, split),
        out_specs=(split, split),
    )
    return run(x, table, targets)


class _Chunks(NamedTuple):
    """How the head [V, D] is cut: count chunks of a device's rows; the mesh axes that split tokens, V and D."""

    count: int
    vocab_size: int
    tokens: MeshAxes
    rows: MeshAxes
    columns: MeshAxes

    def split(self, table: Array) -> Array:
        """[V, D] of this device as [count, R, D], filled up with zeros."""
        size = -(-table.shape[0] // self.count)
        table = jnp.pad(table, ((0, size * self.count - table.shape[0]), (0, 0)))
        return table.reshape(self.count, size, -1)

    def logits(self, x: Array, chunk: Array, ids: Array) -> Array:
        """float32 [N, R] of x [N, D] and the gathered chunk; what is not in the vocabulary has the lowest float."""
        logits = jnp.einsum("ND,RD->NR", x, chunk, preferred_element_type=jnp.float32)
        return jnp.where(ids < self.vocab_size, logits, jnp.finfo(jnp.float32).min)

    def ids(self, num_rows: int) -> Array:
        """Tokens of the rows, int32 [count, R]; those of filled up ones are past the vocabulary."""
        size = -(-num_rows // self.count)
        row = jnp.arange(self.count * size, dtype=jnp.int32)
        first = lax.axis_index(self.rows) * num_rows if self.rows else 0
        return jnp.where(row < num_rows, first + row, self.vocab_size).reshape(self.count, size)

    def gather(self, chunk: Array) -> Array:
        """A chunk [R, D] whole in D."""
        return lax.all_gather(chunk, self.columns, axis=1, tiled=True) if self.columns else chunk

    def reduce(self, gradient: Array) -> Array:
        """A gathered chunk's gradient, summed over the devices that gathered it, this one's part."""
        return lax.psum_scatter(gradient, self.columns, scatter_dimension=1, tiled=True) if self.columns else gradient


def _losses_here(chunks: _Chunks, x: Array, table: Array, targets: Array) -> tuple[Array, Array]:
    """`token_losses` of one device's x [B, T, D], rows and columns of the head [V, D], targets [B, T]."""
    # Gradients differ also between devices whose x or head is the same: the transposes of these casts add them.
    x = lax.pcast(x.reshape(-1, x.shape[-1]), chunks.rows, to="varying")
    flat = lax.pcast(targets.reshape(-1), chunks.rows, to="varying")
    table = lax.pcast(table, tuple(axis for axis in chunks.tokens if axis not in chunks.columns), to="varying")
    losses, normalizers = _cross_entropy(chunks, x, chunks.split(table), chunks.ids(len(table)), flat)
    return losses.reshape(targets.shape), normalizers.reshape(targets.shape)


def _values(chunks: _Chunks, x: Array, table: Array, ids: Array, targets: Array) -> tuple[Array, Array]:
    """Losses and normalizers, float32 [N], of x [N, D], table [C, R, D], ids [C, R] and targets [N]."""

    def add(so_far: tuple[Array, Array, Array], chunk: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        highest, total, picked = so_far
        table, ids = chunk
        logits = chunks.logits(x, chunks.gather(table), ids)
        higher = jnp.maximum(highest, logits.max(axis=1))
        total = total * jnp.exp(highest - higher) + jnp.sum(jnp.exp(logits - higher[:, None]), axis=1)
        # The target is picked by comparison, not by indexing, so that a split vocabulary needs no gather.
        picked += jnp.sum(jnp.where(ids == targets[:, None], logits, 0.0), axis=1)
        return (higher, total, picked), None

    nothing = jnp.zeros_like(targets, jnp.float32)
    lowest = jnp.full_like(nothing, jnp.finfo(jnp.float32).min)
    (highest, total, picked), _ = lax.scan(add, (lowest, nothing, nothing), (table, ids))
    if chunks.rows:
        everywhere = lax.pmax(highest, chunks.rows)
        total, picked = lax.psum((total * jnp.exp(highest - everywhere), picked), chunks.rows)
        highest = everywhere
    normalizers = highest + jnp.log(total)
    return normalizers - picked, normalizers


def _forward(chunks: _Chunks, x: Array, table: Array, ids: Array, targets: Array):
    losses, normalizers = _values(chunks, x, table, ids, targets)
    return (losses, normalizers), (x, table, ids, targets, normalizers)


def _backward(chunks: _Chunks, saved: tuple[Array, ...], gradients: tuple[Array, Array]):
    """The gradient of a logit is its probability's share, less the loss's at the target; over chunks x's is float32."""
    x, table, ids, targets, normalizers = saved
    d_loss, d_normalizer = gradients
    d_all = (d_loss + d_normalizer)[:, None]

    def add(d_x: Array, chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        table, ids = chunk
        table = chunks.gather(table)
        shares = d_all * jnp.exp(chunks.logits(x, table, ids) - normalizers[:, None])
        d_logits = (shares - jnp.where(ids == targets[:, None], d_loss[:, None], 0.0)).astype(x.dtype)
        d_x += jnp.einsum("NR,RD->ND", d_logits, table, preferred_element_type=jnp.float32)
        return d_x, chunks.reduce(jnp.einsum("NR,ND->RD", d_logits, x))

    d_x, d_table = lax.scan(add, jnp.zeros_like(x, jnp.float32), (table, ids))
    return d_x.astype(x.dtype), d_table, None, None


_cross_entropy = jax.custom_vjp(_values, nondiff_argnums=(0,))
_cross_entropy.defvjp(_forward, _backward)
