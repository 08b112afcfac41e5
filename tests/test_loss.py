"""The loss in chunks of the vocabulary against the plain formula over whole logits: values and gradients."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, reshard

from llama_jax.mesh import use_mesh
from llama_jax.model import Llama
from tests.tiny import TINY
from train.data.packing import Batch
from train.loss import loss_sum, token_losses

# 131 rows are padded on most meshes, 128 on none.
CONFIGS = {size: dataclasses.replace(TINY, num_layers=1, vocab_size=size) for size in (131, 128)}


def inputs(vocab_size: int) -> tuple[np.ndarray, ...]:
    """Normed outputs [B, T, D], targets and weights of the losses [B, T], the head [V, D]; logits of size 8."""
    rng = np.random.default_rng(0)
    x, head = rng.normal(size=(4, 8, 64)), rng.normal(size=(vocab_size, 64))
    targets, weights = rng.integers(0, vocab_size, (4, 8)), rng.normal(size=(4, 8))
    return (*(a.astype(np.float32) for a in (x, head)), targets.astype(np.int32), weights.astype(np.float32))


def objective(losses, normalizers, weights):
    """A sum in which the gradients of both results count."""
    return jnp.sum(losses * weights + 0.1 * jnp.square(normalizers))


def plain(x, head, targets, weights):
    logits = jnp.einsum("BTD,VD->BTV", x, head)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return objective(losses, jax.nn.logsumexp(logits, axis=-1), weights)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("mesh", "num_chunks", "vocab_size"),
    [
        ("data=1", 1, 128),
        ("data=1", 3, 131),
        ("data=2,fsdp=2,context=2", 4, 131),
        ("fsdp=2,context=2,tensor=2", 1, 131),
        ("fsdp=2,context=2,tensor=2", 5, 131),
        ("data=2,tensor=4", 4, 128),
    ],
)
def test_losses_and_gradients_equal_those_of_whole_logits(mesh, num_chunks, vocab_size, tied):
    cfg = dataclasses.replace(CONFIGS[vocab_size], tie_embeddings=tied)
    x, head, targets, weights = inputs(vocab_size)
    with use_mesh("data=1"):
        expected, gradients = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, head, targets, weights)
    with use_mesh(mesh):
        model = jax.jit(lambda: Llama(cfg, rngs=nnx.Rngs(0)))()
        name = "embedding" if tied else "head"
        spec = jax.typeof(getattr(model, name)[...]).sharding.spec
        padded = np.pad(head, ((0, len(getattr(model, name)[...]) - vocab_size), (0, 0)))
        here = (jax.device_put(x, model.rules("batch", "sequence", None)), jax.device_put(padded, spec))

        @jax.jit
        def chunked(x, head):
            here = jax.tree.map_with_path(
                lambda path, leaf: head if name in jax.tree_util.keystr(path) else leaf, model
            )
            rows, shares = (reshard(a, model.rules("batch", "sequence")) for a in (targets, weights))
            return objective(*token_losses(here, x, rows, num_chunks=num_chunks), shares)

        value, (d_x, d_head) = jax.value_and_grad(chunked, (0, 1))(*here)
        assert (jax.typeof(d_x), jax.typeof(d_head)) == tuple(map(jax.typeof, here))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    d_head = np.asarray(d_head)
    np.testing.assert_allclose(d_x, gradients[0], atol=1e-5 * np.abs(gradients[0]).max())
    np.testing.assert_allclose(d_head[:vocab_size], gradients[1], atol=1e-5 * np.abs(gradients[1]).max())
    assert not np.any(d_head[vocab_size:])


def test_no_logits_of_the_whole_vocabulary_are_held():
    cfg = dataclasses.replace(TINY, num_layers=1, vocab_size=4096)
    with use_mesh("data=1"):
        model = jax.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0)))
        x = jax.ShapeDtypeStruct((1, 512, 64), jnp.float32)
        targets = jax.ShapeDtypeStruct((1, 512), jnp.int32)

        def temporaries(num_chunks: int) -> int:
            def loss(x, model, targets):
                return jnp.sum(token_losses(model, x, targets, num_chunks=num_chunks)[0])

            compiled = jax.jit(jax.grad(loss)).lower(x, model, targets).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        whole, eighth = temporaries(1), temporaries(8)
    assert whole > 4 * 512 * 4096 > math.ceil(2.5 * eighth)


def test_a_row_of_131_072_tokens_over_128_256_entries_needs_a_hundredth_of_its_logits():
    """Loss and gradient, compiled and not run: on eight devices less than 1 % each of what the logits would be."""
    length, vocab_size = 131_072, 128_256
    cfg = dataclasses.replace(TINY, num_layers=1, vocab_size=vocab_size, max_seq_len=length)
    with use_mesh("context=8") as mesh:
        model = jax.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0)))
        sharding = NamedSharding(mesh, model.rules("batch", "sequence"))
        ids, mask = (jax.ShapeDtypeStruct((1, length), dtype, sharding=sharding) for dtype in (jnp.int32, jnp.float32))

        def loss(model, batch):
            return loss_sum(model, batch, remat="full", num_chunks=64)[0]

        program = jax.jit(jax.value_and_grad(loss)).lower(model, Batch(ids, ids, ids, ids, mask)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4 * length * vocab_size / 100
