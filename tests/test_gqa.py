"""benchmarks.gqa: what its variants differ by, what it scores, and that a finished run is not trained again."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llama_jax
from benchmarks import gqa
from benchmarks.gqa import VARIANTS, heldout_loss, result_row, table_row, trained_loss, variant_config, variant_model
from llama_jax.model import Llama
from tests.prepared import write_prepared
from tests.tiny import TINY
from train.data.packing import PackedRows
from train.data.shards import open_sources


def test_variants_at_equal_width_differ_by_their_kv_heads_alone():
    names = ["MHA", "GQA-4", "GQA-2", "MQA"]
    models = [variant_model(name) for name in names]
    assert [cfg.num_kv_heads for cfg in models] == [8, 4, 2, 1]
    assert [cfg.cache_bytes_per_token(4) for cfg in models] == [10_240, 5_120, 2_560, 1_280]
    configs = [variant_config(name, 1, 4096) for name in names]
    assert all(config.stage == configs[0].stage and config.run == configs[0].run for config in configs)
    overrides = {key for name in names for key in VARIANTS[name]}
    assert overrides == {"model.num_kv_heads"}


def test_the_narrow_variant_has_the_parameters_of_gqa():
    assert variant_model("MHA-narrow").num_params() == variant_model("GQA-2").num_params() == 4_328_192
    assert variant_model("MHA").num_params() == 4_819_712


def test_the_seed_and_the_tokens_reach_the_run():
    config = variant_config("MQA", 2, 40_960)
    assert (config.run.seed, config.stage["1"].phase_steps()) == (2, [10])


def test_a_run_reads_text_alone():
    config = variant_config("MHA", 0, 4096)
    stage = config.stage["1"]
    assert not (config.data.mixture or stage.mixture or stage.mixture_changes)


@pytest.fixture
def dataset(tmp_path):
    """Five held-out documents of 60 tokens of TINY's vocabulary."""
    documents = np.random.default_rng(0).integers(0, TINY.vocab_size, (5, 60))
    write_prepared(tmp_path, {"text": {"heldout": documents.tolist()}}, TINY.vocab_size)
    return open_sources(tmp_path, "heldout")["text"]


def test_every_held_out_row_is_scored_once(dataset, monkeypatch):
    rows = PackedRows(dataset, 16, seed=0)
    assert len(rows) % gqa.EVAL_ROWS, "the last batch must be filled up with rows that do not count"
    # Losses that say which token they are of, so that a row missed or scored twice changes the mean.
    monkeypatch.setattr(gqa, "row_losses", lambda params, batch, dtype: batch.targets)
    with llama_jax.use_mesh("data=1"):
        params = jax.jit(lambda: Llama(TINY, rngs=nnx.Rngs(0)))()
        loss = heldout_loss(params, dataset, 16)
    batch = [rows.row(i) for i in range(len(rows))]
    total = sum((row.targets * row.loss_mask).sum() for row in batch)
    assert loss == pytest.approx(total / sum(row.loss_mask.sum() for row in batch), rel=1e-12)


def test_uniform_logits_lose_the_logarithm_of_the_vocabulary(dataset):
    with llama_jax.use_mesh("data=1"):
        params = jax.jit(lambda: jax.tree.map(jnp.zeros_like, Llama(TINY, rngs=nnx.Rngs(0))))()
        assert heldout_loss(params, dataset, 16) == pytest.approx(math.log(TINY.vocab_size), rel=1e-6)


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gqa, "pretrain", lambda *_: pytest.fail("trained"))
    path = tmp_path / "MQA-seed0-4096" / "result.json"
    path.parent.mkdir()
    path.write_text('{"heldout_loss": 5.25}')
    assert trained_loss("MQA", 0, 4096, tmp_path) == 5.25
    assert trained_loss("MQA", 0, 8192, tmp_path, train=False) is None


def test_losses_are_compared_seed_by_seed():
    speeds = {"MHA": [100.0, 200.0, 400.0], "GQA-2": [300.0, 400.0, 1200.0]}
    row = result_row("GQA-2", {0: 5.0, 1: 6.0}, {1: 6.25, 0: 4.5, 2: 9.0}, speeds)
    assert row["heldout_loss"] == {"mean": 5.5, "min": 5.0, "max": 6.0, "by_seed": {0: 5.0, 1: 6.0}}
    assert row["loss_difference"] == {"mean": 0.125, "min": -0.25, "max": 0.5}
    assert row["decode_ratio"] == {"median": 3.0, "min": 2.0, "max": 3.0}
    assert "5.500 (5.000 to 6.000) | +0.125 (-0.250 to +0.500) | 400 (300 to 1,200)" in table_row(row)


def test_without_training_only_the_losses_are_missing(tmp_path):
    rows = [result_row(name, {}, {}, {"MHA": [1.0], name: [2.0]}) for name in ("MHA", "MQA")]
    assert "| not trained | not trained | 2 (2 to 2) |" in table_row(rows[1])
    gqa.plot(rows, tmp_path / "gqa.png")
    assert (tmp_path / "gqa.png").read_bytes().startswith(b"\x89PNG")
