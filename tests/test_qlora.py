"""LoRA trained on a frozen base in few bits, under the scanned layers: gradients, what is trained, memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import reshard

from llama_jax.config import LlamaConfig
from llama_jax.kernels import narrow
from llama_jax.lora import for_rows, join_adapters, split_adapters, with_fresh_adapter
from llama_jax.memory import bytes_a_device
from llama_jax.mesh import use_mesh
from llama_jax.model import Llama
from llama_jax.quantize import QuantizedArray
from llama_jax.rounding import quantize_model
from llama_jax.schemes import find_scheme
from tests.tiny import TINY
from train.config import OptimizerConfig, PhaseConfig, StageConfig
from train.data.packing import Batch
from train.loss import loss_sum
from train.optimizer import make_optimizer

CFG = dataclasses.replace(TINY, num_layers=2, embed_dim=128, mlp_dim=256)
STAGE = StageConfig(phases=(PhaseConfig(16, 160),), batch_tokens=16, learning_rate=1e-3, final_learning_rate=0.0)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def adapted(name: str, widen: bool = False, cfg: LlamaConfig = CFG) -> tuple[Llama, Llama]:
    """Adapters, none of them zero, and the base of a model in few bits, or the same widened to floats."""
    model = jax.tree.map(lambda w: w * (3 if w.ndim > 2 else 1), Llama(cfg, rngs=nnx.Rngs(0)))
    model = quantize_model(model, find_scheme(name), cfg.num_layers)
    if widen:
        model = jax.tree.map(lambda w: w.dequantize() if is_quantized(w) else w, model, is_leaf=is_quantized)
    trained, frozen = split_adapters(with_fresh_adapter(model, jax.random.key(1), rank=4))
    return jax.tree.map(lambda w: w + 0.1 * jax.nn.relu(jax.random.normal(jax.random.key(2), w.shape)), trained), frozen


def is_quantized(leaf) -> bool:
    return isinstance(leaf, QuantizedArray)


def batch(num_rows: int, length: int) -> Batch:
    ids = np.random.default_rng(0).integers(0, CFG.vocab_size, (num_rows, length + 1), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (num_rows, length))
    segments, mask = np.zeros_like(positions), np.ones((num_rows, length), np.float32)
    return Batch(ids[:, :-1], ids[:, 1:], positions, segments, mask)


def loss(trained: Llama, frozen: Llama, batch: Batch, *, remat: str) -> jax.Array:
    model = join_adapters(trained, frozen)
    batch = jax.tree.map(lambda x: reshard(x, model.rules("batch", "sequence")), batch)
    rows = reshard(jnp.zeros(len(batch.tokens), jnp.int32), model.rules("batch"))
    total, count = loss_sum(for_rows(model, rows), batch, remat=remat, num_chunks=1)
    return total / count


@functools.cache
def gradient(name: str, mesh: str, *, widen: bool = False):
    with use_mesh(mesh):
        trained, frozen = adapted(name, widen)
        run = jax.jit(jax.value_and_grad(functools.partial(loss, remat="full")))
        return jax.tree.map(np.asarray, run(trained, frozen, batch(8, 32)))


MESH = "data=2,fsdp=2,tensor=2"


@pytest.mark.parametrize(("name", "mesh"), [("nf4", "data=1"), ("nf4", MESH), ("int4", MESH)])
def test_the_gradient_of_an_adapter_is_that_over_the_same_weights_as_floats(name, mesh, monkeypatch):
    monkeypatch.setattr(narrow, "_SLAB", 2**12)  # several slabs of a weight here, too
    value, expected = gradient(name, "data=1", widen=True)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-4
    found_value, found = gradient(name, mesh)
    assert found_value == pytest.approx(value, rel=1e-5)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("name", ["nf4", "int4"])
def test_a_layer_of_the_base_at_a_time_is_held_as_floats(name):
    cfg = dataclasses.replace(CFG, num_layers=16, embed_dim=256, mlp_dim=512)
    with use_mesh("data=1"):
        trained, frozen = jax.eval_shape(functools.partial(adapted, name, False, cfg))
        # XLA:CPU makes bytes of all 4-bit arguments first; so they come as bytes, as the engine keeps them there.
        frozen = jax.tree.map(lambda w: w.update(dtype=jnp.int8) if w.dtype == jnp.int4 else w, frozen)
        run = jax.jit(jax.grad(functools.partial(loss, remat="full")))
        program = run.lower(trained, frozen, batch(1, 16)).compile()
        held = program.memory_analysis().temp_size_in_bytes
        base = [w for w in jax.tree.leaves(frozen, is_leaf=is_quantized) if is_quantized(w)]
        layer = 4 * sum(np.prod(w.shape[1:]) for w in base)
    assert held < layer + 3 * bytes_a_device(trained)  # and copies of gradients; all sixteen layers would be 16


def test_only_adapters_have_gradients_and_moments():
    optimizer = make_optimizer(OptimizerConfig(), STAGE)
    with use_mesh("fsdp=2,tensor=2"):
        trained, frozen = jax.eval_shape(functools.partial(adapted, "nf4"))
        grads = jax.eval_shape(jax.grad(functools.partial(loss, remat="full")), trained, frozen, batch(4, 16))
        moments = [leaf for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, trained)) if leaf.ndim]
    assert jax.tree.structure(grads) == jax.tree.structure(trained)
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in jax.tree.leaves(trained))
