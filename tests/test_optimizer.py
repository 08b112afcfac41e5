"""The training step: micro-batches, schedules, decay, moments, z-loss, skipped steps, Muon; and runs with them."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import llama_jax
from llama_jax.mesh import sharding_rules
from llama_jax.model import Llama
from tests import test_train
from tests.test_train import CONFIG, assert_same_weights, random_batch, run, weights
from tests.tiny import TINY
from train import loop
from train.checkpoints import read_progress, saved_steps
from train.config import OptimizerConfig, PhaseConfig, StageConfig
from train.device import put_batch
from train.loss import loss_sum
from train.muon import STEP_RMS, orthogonalized
from train.optimizer import (
    TrainState,
    guarded,
    learning_rate_schedule,
    make_optimizer,
    num_micro_batches,
    train_step,
)
from train.watching.metrics import read_metrics

CFG = dataclasses.replace(TINY, vocab_size=131, num_layers=2)
STAGE = StageConfig((PhaseConfig(16, 16 * 128),), 128, learning_rate=1e-2, final_learning_rate=1e-2)

workdir = test_train.workdir


def fresh_state(optimizer) -> TrainState:
    def init():
        params = Llama(CFG, rngs=nnx.Rngs(0))
        return TrainState(params, optimizer.init(params))

    return jax.jit(init)()


def stepped(optimizer, batch, *, steps=1, **options):
    """The state before and after some steps on the ambient mesh, and the metrics of the last."""
    state = before = fresh_state(optimizer)
    step = jax.jit(functools.partial(train_step, optimizer, jnp.float32, remat="full", num_chunks=1, **options))
    metrics = None
    for _ in range(steps):
        state, metrics = step(state, put_batch(batch, state.params.rules))
    assert metrics is not None
    return before, state, metrics


def host(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(tree))]


def types(tree) -> list:
    """Shape, dtype and split of every leaf."""
    return [jax.typeof(leaf) for leaf in jax.tree.leaves(tree)]


def lopsided_batch(num_parts=4):
    """Eight rows; the micro-batches count 16, 8, 4 and 2 times as many tokens as the last would alone."""
    batch = random_batch(CFG)
    rows, columns = np.indices(batch.loss_mask.shape)
    return batch._replace(loss_mask=(columns < 16 >> rows % num_parts).astype(np.float32))


@pytest.mark.parametrize("mesh", ["data=1", "fsdp=2,context=2,tensor=2"])
def test_four_micro_batches_of_unequal_token_counts_equal_one_batch(mesh):
    descent = guarded(optax.sgd(1.0), max_loss=math.inf, max_grad_norm=math.inf)
    batch = lopsided_batch()
    with llama_jax.use_mesh(mesh):
        before, whole, expected = stepped(descent, batch)
        _, parts, metrics = stepped(descent, batch, num_parts=4)
        params = host(before.params)
        assert types(parts.params) == types(whole.params) == types(before.params)
        gradients = [[p - q for p, q in zip(params, host(state.params), strict=True)] for state in (whole, parts)]
    assert float(metrics.tokens) == 60 == batch.loss_mask.sum()
    assert float(metrics.loss) == pytest.approx(float(expected.loss), rel=1e-6)
    assert float(metrics.grad_norm) == pytest.approx(float(expected.grad_norm), rel=1e-6)
    for one, four in zip(*gradients, strict=True):  # read off weights of size one, which round at 1e-7
        np.testing.assert_allclose(four, one, atol=3e-7)


def test_rows_a_device_and_accumulation_follow_from_batch_and_mesh():
    with llama_jax.use_mesh("data=2,fsdp=2,context=2"):
        parts = functools.partial(num_micro_batches, rules=sharding_rules(TINY))
        assert parts(32, 1024, 0) == 1  # no bound: 8 rows a device at once
        assert parts(32, 1024, 4096) == 1  # 8 rows of 512 tokens each, for context halves a row
        assert parts(32, 1024, 1024) == 4
        assert parts(32, 1024, 100) == 8  # never less than a row
        assert parts(24, 1024, 2048) == 2  # 4 of 6 rows would fit, 3 divide them
        with pytest.raises(ValueError, match="6 rows of 1024 tokens cannot be split over data . fsdp = 4"):
            parts(6, 1024, 0)


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"warmup_steps": 4}, {0: 0.0, 1: 2.5e-3, 4: 1e-2, 10: 5.5e-3, 16: 1e-3, 99: 1e-3}),
        ({}, {0: 1e-2, 8: 5.5e-3, 16: 1e-3}),
        ({"schedule": "linear", "final_learning_rate": 0.0}, {0: 1e-2, 4: 7.5e-3, 16: 0.0}),
        ({"schedule": "linear", "warmup_steps": 8}, {4: 5e-3, 8: 1e-2, 12: 5.5e-3, 16: 1e-3}),
        ({"decay_steps": 32}, {16: 5.5e-3, 32: 1e-3}),
        ({"final_learning_rate": 1e-2}, {0: 1e-2, 7: 1e-2, 16: 1e-2}),
    ],
)
def test_learning_rates_rise_and_fall_as_the_stage_says(settings, rates):
    schedule = learning_rate_schedule(dataclasses.replace(STAGE, **{"final_learning_rate": 1e-3} | settings))
    assert {step: np.asarray(schedule(step)).item() for step in rates} == pytest.approx(rates, abs=1e-9)


def test_decay_shrinks_every_weight_but_the_norms():
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5), STAGE)

    def step():
        params = Llama(CFG, rngs=nnx.Rngs(0))
        still = jax.tree.map(jnp.zeros_like, params)
        return params, optimizer.update(still, optimizer.init(params), params, loss=jnp.float32(0))[0]

    with llama_jax.use_mesh("data=1"):
        params, updates = jax.jit(step)()
    for (path, weight), update in zip(jax.tree.leaves_with_path(params), host(updates), strict=True):
        decay = 0.0 if "norm" in jax.tree_util.keystr(path) else 0.5 * 1e-2
        np.testing.assert_allclose(update, -decay * np.asarray(weight), rtol=1e-6, err_msg=str(path))


def test_bfloat16_moments_are_rounded_between_steps_and_not_within():
    with llama_jax.use_mesh("fsdp=8"):
        spread = jax.NamedSharding(jax.sharding.get_mesh(), jax.P("fsdp"))
        params = {"w": jax.device_put(np.linspace(0.1, 1, 16, dtype=np.float32), spread)}
        updates, states = {}, {}
        for dtype in ("float32", "bfloat16"):
            optimizer = make_optimizer(OptimizerConfig(moment_dtype=dtype), STAGE)
            updates[dtype], states[dtype] = optimizer.update(
                params, optimizer.init(params), params, loss=jnp.float32(1)
            )
        for name in ("mu", "nu"):
            exact, rounded = (optax.tree.get(state, name)["w"] for state in states.values())
            assert types(rounded) == types(params["w"].astype(jnp.bfloat16))
            np.testing.assert_array_equal(exact.astype(jnp.bfloat16), rounded)
    np.testing.assert_array_equal(updates["float32"]["w"], updates["bfloat16"]["w"])


def test_z_loss_moves_the_gradient_and_not_the_value():
    batch = random_batch(CFG)

    def penalized(model):
        logits = model(batch.tokens, jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids))
        penalty = 0.1 * jnp.square(jax.nn.logsumexp(logits, axis=-1)) * batch.loss_mask
        return loss_sum(model, batch, remat="none", num_chunks=1)[0] + jnp.sum(penalty), jnp.sum(penalty)

    def ours(model):
        return loss_sum(model, batch, remat="none", num_chunks=2, z_loss=0.1)

    with llama_jax.use_mesh("data=1"):
        model = jax.jit(lambda: Llama(CFG, rngs=nnx.Rngs(0)))()
        both = jax.jit(lambda model: [jax.value_and_grad(f, has_aux=True)(model) for f in (ours, penalized)])
        ((value, _), grads), ((expected, penalty), expected_grads) = both(model)
    assert float(value) == pytest.approx(float(expected) - float(penalty), rel=1e-5)
    for one, other in zip(host(grads), host(expected_grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(
    ("loss", "grad", "bounds"),
    [
        (math.nan, 1.0, {}),
        (math.inf, 1.0, {}),
        (1.0, math.nan, {}),
        (1.0, math.inf, {}),
        (4.5, 1.0, {"max_loss": 4.0}),
        (1.0, 3.0, {"max_grad_norm": 5.0}),  # four of them have a norm of 6
    ],
)
def test_a_step_out_of_bounds_changes_nothing_but_counts(loss, grad, bounds):
    optimizer = make_optimizer(OptimizerConfig(**bounds), STAGE)
    params = {"w": jnp.ones(4)}
    counts, state, good, bad = [], optimizer.init(params), (1.0, 1.0), (loss, grad)
    for given in (good, bad, bad, good, bad):
        before = state
        updates, state = optimizer.update({"w": jnp.full(4, given[1])}, state, params, loss=jnp.float32(given[0]))
        counts.append((int(state.skipped), int(state.total_skipped)))
        moved = float(jnp.abs(updates["w"]).max())
        old, new = ([optax.tree.get(of, name)["w"] for name in ("mu", "nu")] for of in (before, state))
        assert (moved == 0) == np.array_equal(old, new) == (given is bad)
    assert counts == [(0, 0), (1, 1), (2, 2), (0, 2), (1, 3)]
    assert {int(count) for _, count in optax.tree.get_all_with_path(state, "count")} == {5}


def test_orthogonalized_matrices_equal_optax_and_have_singular_values_near_one():
    momentum = np.random.default_rng(0).standard_normal((3, 12, 2, 4, 5)).astype(np.float32)
    dims = optax.contrib.MuonDimensionNumbers((1,), (2, 3, 4))
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=lambda _: dims, nesterov=False)
    theirs, _ = jax.jit(lambda: muon.update(momentum, muon.init(momentum)))()
    with llama_jax.use_mesh("data=1") as mesh:
        placed = jax.device_put(momentum, jax.NamedSharding(mesh, jax.P()))
        ours = np.asarray(jax.jit(functools.partial(orthogonalized, num_leading=1, eps=1e-8))(placed))
    scale = STEP_RMS * math.sqrt(40)
    np.testing.assert_allclose(ours, np.asarray(theirs) * scale, atol=1e-5)
    values = np.linalg.svd(ours.reshape(3, 12, 40), compute_uv=False) / scale
    assert values.shape == (3, 12) and values.min() > 0.6 and values.max() < 1.3


def test_muon_takes_the_same_steps_on_any_mesh_with_its_state_split_like_the_weights():
    results = []
    for mesh in ("data=1", "fsdp=2,context=2,tensor=2"):
        with llama_jax.use_mesh(mesh):
            optimizer = make_optimizer(OptimizerConfig(name="muon", b1=0.95), STAGE)
            _, state, metrics = stepped(optimizer, random_batch(CFG), steps=3)
            matrices = [leaf for leaf in host(state.params.layers) if leaf.ndim > 2]
            results.append((matrices, float(metrics.loss)))
            for name in ("mu", "nu"):
                assert types(optax.tree.get(state.opt_state, name)) == types(state.params)
    (plain, loss), (split, split_loss) = results
    assert split_loss == pytest.approx(loss, rel=1e-5) and loss < math.log(131) - 0.1
    for one, other in zip(plain, split, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-5)  # three steps of about 2e-3


def test_an_unknown_remat_names_those_that_exist():
    with pytest.raises(
        ValueError, match="run.remat='some' is not one of full, attention, qkv, gate, dots, none, offload"
    ):
        loss_sum(None, None, remat="some", num_chunks=1)  # pyright: ignore[reportArgumentType]


# What follows trains through the command.


def logged(name: str, key: str = "loss") -> list[float]:
    return [line[key] for line in read_metrics(Path(name)) if key in line]


def test_one_two_and_eight_devices_accumulate_to_the_same_losses(workdir):
    for mesh in ("data=1", "fsdp=2", "fsdp=-1"):  # 8, 4 and 1 micro-batches
        run("1", "--run-dir", mesh, "--set", f"run.mesh={mesh}", "--set", "run.micro_batch_tokens=16")
    assert logged("fsdp=2") == pytest.approx(logged("data=1"), rel=2e-5)
    assert logged("fsdp=-1") == pytest.approx(logged("data=1"), rel=2e-5)


def test_a_batch_grows_over_phases_whose_rows_go_on(workdir):
    ramp = "stage.1.phases=[{seq_len=16, tokens=256, batch_tokens=64}, {seq_len=16, tokens=256}]"
    run("1", "--set", ramp, "--set", "run.log_every=1")
    assert logged("runs/tiny", "tokens")[:1] == [64]
    assert sorted(set(logged("runs/tiny", "tokens"))) == [64, 128, 192, 256, 384, 512]
    assert read_progress(Path("runs/tiny"), 6).rows["text"][0] == 512 // 16


def test_the_anneal_stage_goes_on_from_the_one_before_to_a_rate_of_zero(workdir):
    anneal = "[stage.anneal]\nphases = [{ seq_len = 64, tokens = 1024 }]\nbatch_tokens = 256\nlearning_rate = 4e-3\n"
    anneal += 'final_learning_rate = 0.0\nschedule = "linear"\n'
    Path("tiny.toml").write_text(CONFIG.partition("[stage.2]")[0] + anneal)
    run("1", "--set", "stage.1.phases=[{seq_len=64, tokens=1024}]")
    run("anneal", "--set", "run.log_every=1")
    lines = [line for line in read_metrics(Path("runs/tiny")) if line["stage"] == "anneal" and "loss" in line]
    assert [line["learning_rate"] for line in lines] == pytest.approx([4e-3, 3e-3, 2e-3, 1e-3])
    assert read_progress(Path("runs/tiny"), saved_steps(Path("runs/tiny"))[-1]).stage_done


@pytest.fixture
def spike(monkeypatch):
    """Makes the n-th batch that a run reads, from 1, one whose loss is not a number."""

    def poison(*numbers: int):
        calls = []

        def put(batch, rules, **where):
            calls.append(batch)
            scale = math.nan if len(calls) in numbers else 1.0
            return put_batch(batch._replace(loss_mask=batch.loss_mask * np.float32(scale)), rules, **where)

        monkeypatch.setattr(loop, "put_batch", put)

    return poison


def test_a_spike_is_skipped_and_told_and_the_run_ends_well(workdir, spike, capsys):
    spike(4)
    run("1")
    assert "1 steps up to 4 skipped: loss nan" in capsys.readouterr().err
    assert logged("runs/tiny", "skipped") == [1]
    assert len(logged("runs/tiny")) == 3 and np.isfinite(logged("runs/tiny")).all()
    assert all(np.isfinite(values).all() for values in weights("runs/tiny", 8).values())


def test_a_rollback_returns_to_the_checkpoint_and_leaves_out_the_data_since(workdir, spike):
    spike(6)  # step 4 was saved: the two batches since are left out, two more are read in their place
    run("1", "--set", "optimizer.on_spike=rollback", "--set", "run.save_every=4", "--set", "run.keep_checkpoints=9")
    assert saved_steps(Path("runs/tiny")) == [4, 8]
    assert logged("runs/tiny", "rolled_back_from") == [6]
    assert read_progress(Path("runs/tiny"), 8).rows["text"][0] == 8 * (8 + 2)


def test_a_run_that_only_rolls_back_stops(workdir, spike):
    spike(*range(4, 99))
    with pytest.raises(ValueError, match="4 were rolled back; lower the learning rate"):
        run("1", "--set", "optimizer.on_spike=rollback", "--set", "run.log_every=1")
    assert read_progress(Path("runs/tiny"), 3).rows["text"][0] == 8 * (3 + 4)  # where the next command goes on


def test_a_run_with_muon_bfloat16_moments_and_micro_batches_resumes_to_the_bit(workdir):
    settings = ("optimizer.name=muon", "optimizer.moment_dtype=bfloat16", "run.micro_batch_tokens=32")
    options = [option for setting in (*settings, "run.keep_checkpoints=9") for option in ("--set", setting)]
    run("1", *options)
    whole = weights("runs/tiny", 8)
    for step in (6, 8):
        Path(f"runs/tiny/checkpoints/{step}").rename(f"gone-{step}")
    run("1", *options)
    assert_same_weights(whole, weights("runs/tiny", 8))
