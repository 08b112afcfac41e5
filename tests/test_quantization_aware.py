"""Training towards few bits: products as if weights were rounded, gradients as if they were not."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import llama_jax
from llama_jax.kernels.narrow import round_inputs
from llama_jax.mesh import use_mesh
from llama_jax.model import Llama
from llama_jax.quantize import QuantizedArray, einsum
from llama_jax.rounding import RoundedWeight, computed_in, quantize_model, quantized, rounded_in_training
from llama_jax.schemes import find_scheme
from llama_jax.slices import parse_slice, use_slice
from tests import test_train
from tests.test_train import assert_same_weights, random_batch, run, weights
from tests.tiny import TINY
from train.config import DataConfig, PhaseConfig, RunConfig, StageConfig, TrainConfig
from train.data.packing import heldout_by_source
from train.data.shards import open_sources
from train.device import put_batch
from train.loss import loss_sum
from train.optimizer import make_optimizer
from train.plan import abstract_state, lower_phase
from train.watching.metrics import read_metrics

workdir = test_train.workdir

CFG = dataclasses.replace(TINY, num_layers=2, mlp_dim=128)


@jax.jit
def fresh() -> Llama:
    """A model with weights so large that a mistake shows."""
    return jax.tree.map(lambda w: w * (3 if w.ndim > 2 else 1), Llama(CFG, rngs=nnx.Rngs(0)))


def widened(model: Llama) -> Llama:
    return jax.tree.map(
        lambda w: w.dequantize() if isinstance(w, QuantizedArray) else w,
        model,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedArray),
    )


@pytest.mark.parametrize("name", ["int8", "int4-asym", "nf4"])
def test_logits_are_those_of_the_quantized_model(name):
    tokens, scheme = random_batch(CFG).tokens, find_scheme(name)
    with use_mesh("data=1"):
        model = fresh()
        found = rounded_in_training(model, scheme, CFG.num_layers)(tokens)
        expected = quantize_model(model, scheme, CFG.num_layers)(tokens)
        floats = model(tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - floats).max() > 1e-3


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2"])
def test_the_gradient_is_that_of_floats_where_the_weights_were_rounded_to(mesh):
    scheme = find_scheme("int4-asym")

    def loss(params: Llama, batch, scheme=None):
        model = computed_in(rounded_in_training(params, scheme, CFG.num_layers), jnp.float32)
        return loss_sum(model, batch, remat="full", num_chunks=1)[0]

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    with use_mesh("data=1"):
        model = fresh()
        rounded = jax.jit(lambda model: widened(quantize_model(model, scheme, CFG.num_layers)))(model)
        value, expected = jax.tree.map(np.asarray, gradient(rounded, random_batch(CFG)))
    with use_mesh(mesh):
        model = fresh()
        found_value, found = gradient(model, put_batch(random_batch(CFG), model.rules), scheme)
        assert [*map(jax.typeof, jax.tree.leaves(found))] == [*map(jax.typeof, jax.tree.leaves(model))]
    assert float(found_value) == pytest.approx(float(value), rel=1e-5)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


def test_activations_are_rounded_too_and_passed_by_the_gradient():
    scheme, sharding = find_scheme("int8-a8"), P(None, None, None)
    keys = jax.random.split(jax.random.key(0), 3)
    with use_mesh("data=1"):
        x, weight, away = (
            jax.random.normal(k, s) for k, s in zip(keys, [(2, 8, 64), (64, 32), (2, 8, 32)], strict=True)
        )
        narrow = quantized(weight, scheme, (-2,))

        def product(x, weight):
            return einsum("BTD,DF->BTF", x, RoundedWeight(weight, scheme, (-2,)), out_sharding=sharding)

        out, back = jax.vjp(product, x, weight)
        of_x, of_weight = back(away)
        expected = einsum("BTD,DF->BTF", x, narrow, out_sharding=sharding)
    values, scale = round_inputs(x, 1, "int8", np.inf)
    np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(of_x, away @ narrow.dequantize().T, atol=1e-4)
    np.testing.assert_allclose(of_weight, jnp.einsum("BTD,BTF->DF", values * scale[..., None], away), atol=1e-4)


def test_a_run_goes_on_to_the_same_weights_and_what_it_held_out_it_quantized(workdir):
    options = ["--set", "run.quantize=int4", "--set", "run.keep_checkpoints=9"]
    run("1", *options)
    whole = weights("runs/tiny", 8)
    (reported,) = [line["heldout_loss"] for line in read_metrics(Path("runs/tiny")) if line.get("heldout_loss")][1:]
    with use_mesh("data=1"):
        model = llama_jax.load("runs/tiny", quantize="int4")
        (batch,) = heldout_by_source(open_sources("data", "heldout", vocab_size=540), 16, count=4).values()
        logits = model(batch.tokens, batch.positions, batch.segment_ids)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
    assert reported == pytest.approx(float(losses.mean()), rel=1e-5)
    for step in (6, 8):  # back to step 3, as after a crash
        shutil.rmtree(f"runs/tiny/checkpoints/{step}")
    run("1", *options)
    assert_same_weights(weights("runs/tiny", 8), whole)
    assert {values.dtype for values in whole.values()} == {np.dtype("float32")}


TRAINING = TrainConfig(
    name="tiny",
    model=CFG,
    data=DataConfig("data/tiny"),
    stage={"1": StageConfig((PhaseConfig(16, 6400),), 256, 1e-3, 1e-4)},
    run=RunConfig(mesh="fsdp=2,tensor=4", compute_dtype="float32"),
)


def test_a_plan_lowers_the_step_that_rounds():
    def text(quantize: str) -> str:
        config = dataclasses.replace(TRAINING, run=dataclasses.replace(TRAINING.run, quantize=quantize))
        stage = config.stage["1"]
        optimizer = make_optimizer(config.optimizer, stage)
        with use_slice(parse_slice("cpu:8"), config.run.mesh):
            state = abstract_state(config, "1", optimizer)
            return lower_phase(config, "1", stage.phases[0], optimizer=optimizer, state=state)[0].as_text()

    assert "round_nearest_even" in text("int4") and "round_nearest_even" not in text("")
