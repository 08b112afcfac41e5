"""Training: the loss and its gradients on any mesh, two stages, resume to the bit, configs, errors."""

import dataclasses
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llama_jax
from llama_jax.checkpoint.snapshot import Snapshot
from llama_jax.model import Llama
from tests.tiny import TINY
from train import evaluation, loop
from train.checkpoints import read_progress, saved_steps
from train.config import find_config, read_config
from train.data.packing import Batch
from train.device import put_batch
from train.evaluation import position_ranges, row_losses
from train.loss import loss_sum
from train.optimizer import TrainState, learning_rate_schedule, make_optimizer, train_step
from train.prepare import prepare
from train.pretrain import _prepare_data, main
from train.watching.metrics import read_metrics

CONFIG = """
[model]
vocab_size = 540
num_layers = 2
embed_dim = 32
mlp_dim = 64
num_heads = 4
num_kv_heads = 2
head_dim = 8
tie_embeddings = true
max_seq_len = 256
rope = { factor = 1.0, original_max_seq_len = 16 }
[data]
directory = "data"
sources = ["text.jsonl"]
holdout = 0.2
[run]
compute_dtype = "float32"
mesh = "data=1"
log_every = 2
eval_every = 4
save_every = 3
eval_rows = 4
[stage.1]
phases = [{ seq_len = 16, tokens = 1024 }]
batch_tokens = 128
learning_rate = 1e-2
final_learning_rate = 1e-3
warmup_steps = 2
rope_factor = 1.0
[stage.2]
phases = [{ seq_len = 64, tokens = 512 }, { seq_len = 256, tokens = 512, min_document_tokens = 256 }]
batch_tokens = 256
learning_rate = 1e-3
final_learning_rate = 1e-4
rope_factor = 8.0
"""


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A folder with a config and its text, in which the command runs."""
    words = "the cat sat on a mat and then it ran to find some milk in house of its friend".split()
    generator = random.Random(0)
    documents = [" ".join(generator.choices(words, k=300 + 20 * i)) for i in range(30)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (tmp_path / "tiny.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(stage, *options):
    main(["--config", "tiny.toml", "--stage", stage, *options])


def weights(run_dir, step) -> dict[str, np.ndarray]:
    from llama_jax.checkpoint.orbax import OrbaxSource

    source = OrbaxSource(Path(run_dir) / "checkpoints" / str(step) / "params")
    return {name: source.read(name) for name in source.tensors}


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def random_batch(cfg, shape=(8, 16)):
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, cfg.vocab_size, (2, *shape)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, shape), axis=1).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in np.bincount(row)]) for row in segments])
    return Batch(tokens, targets, positions.astype(np.int32), segments, rng.integers(0, 2, shape).astype(np.float32))


def test_loss_is_the_masked_mean_of_the_cross_entropy():
    batch = random_batch(TINY)
    with llama_jax.use_mesh("data=1"):
        model = jax.jit(lambda: Llama(TINY, rngs=nnx.Rngs(0)))()
        total, count = loss_sum(model, batch, remat="none", num_chunks=1)
        logits = model(batch.tokens, jnp.asarray(batch.positions), jnp.asarray(batch.segment_ids))
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    assert float(count) == batch.loss_mask.sum()
    assert float(total) == pytest.approx((expected * batch.loss_mask).sum(), rel=1e-5)


STEP_CASES = [
    ("data=1", "full", 1),
    ("data=1", "dots", 4),
    ("fsdp=8", "full", 2),
    ("fsdp=2,tensor=4", "none", 1),
    ("data=2,context=2,tensor=2", "attention", 2),
    ("tensor=8", "qkv", 5),  # 131 rows, filled up to 136: 17 a device in parts of 4
    ("context=4,tensor=2", "offload_qkv", 3),
    ("fsdp=2,tensor=2", "gate", 1),
    ("data=1", "offload", 1),
]


def one_step(mesh, remat, chunks):
    cfg = dataclasses.replace(TINY, vocab_size=131, num_layers=2)
    stage = dataclasses.replace(read_config("demo").stage["1"], warmup_steps=0, batch_tokens=4096)
    optimizer = make_optimizer(read_config("demo").optimizer, stage)
    with llama_jax.use_mesh(mesh):

        def init():
            params = Llama(cfg, rngs=nnx.Rngs(0))
            return TrainState(params, optimizer.init(params))

        step = jax.jit(functools.partial(train_step, optimizer, jnp.float32, remat=remat, num_chunks=chunks))
        state = jax.jit(init)()
        batch = put_batch(random_batch(cfg), state.params.rules)
        after, metrics = step(state, batch)
        _, second = step(after, batch)
        return [float(metrics.loss), float(metrics.grad_norm), float(second.loss), float(second.grad_norm)]


@pytest.fixture(scope="module")
def plain_step():
    return one_step("data=1", "none", 1)


@pytest.mark.parametrize(("mesh", "remat", "chunks"), STEP_CASES)
def test_steps_are_the_same_on_any_mesh_with_any_remat_and_chunks(mesh, remat, chunks, plain_step):
    assert one_step(mesh, remat, chunks) == pytest.approx(plain_step, rel=2e-5)


def test_two_stages_extend_the_context_and_a_checkpoint_generates(workdir, capsys):
    run("1")
    first = [line["heldout_loss"] for line in read_metrics(Path("runs/tiny")) if "heldout_loss" in line]
    assert first[-1] < math.log(540) - 0.5  # it has learned something, from whatever start this jax draws
    run("2")
    assert saved_steps(Path("runs/tiny")) == [8, 11, 12]
    first, second = json.loads(Path("runs/tiny/gates.json").read_text())
    assert (first["seq_len"], second["seq_len"], first["passed"], second["needles"]) == (64, 256, True, [])
    rows = first["perplexity"]
    assert [row["positions"] for row in rows] == [[0, 16], [16, 32], [32, 64]]
    assert all(row["perplexity_after"] < row["perplexity_before"] for row in rows)
    assert Path("runs/tiny/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "perplexity before" in capsys.readouterr().err
    with llama_jax.use_mesh("data=1"):
        model = llama_jax.load("runs/tiny")
        assert model.cfg.rope.factor == 8.0 and model.cfg.max_seq_len == 256
        assert llama_jax.load("runs/tiny@8").cfg.rope.factor == 1.0
    assert llama_jax.load_tokenizer("runs/tiny").vocab_size == 540


def test_resume_gives_the_same_weights_to_the_bit(workdir):
    run("1", "--run-dir", "whole")
    run("1", "--run-dir", "cut", "--set", "run.keep_checkpoints=9")
    for step in (6, 8):  # back to step 3, as after a crash
        subprocess.run(["rm", "-r", f"cut/checkpoints/{step}"], check=True)
    Path("cut/checkpoints/.6.partial-0a1b2c3d/params").mkdir(parents=True)
    run("1", "--run-dir", "cut")
    assert sorted(path.name for path in Path("cut/checkpoints").iterdir()) == ["6", "8"]
    assert_same_weights(weights("whole", 8), weights("cut", 8))
    whole, cut = ([line for line in read_metrics(Path(name)) if "loss" in line] for name in ("whole", "cut"))
    assert [(line["step"], line["loss"]) for line in whole] == [(line["step"], line["loss"]) for line in cut]


def test_bfloat16_computes_over_float32_parameters(workdir):
    run("1", "--run-dir", "float32")
    run("1", "--run-dir", "bfloat16", "--set", "run.compute_dtype=bfloat16")
    losses = [[line["loss"] for line in read_metrics(Path(name)) if "loss" in line] for name in ("float32", "bfloat16")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert {values.dtype for values in weights("bfloat16", 8).values()} == {np.dtype("float32")}


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_weights(workdir):
    code = (
        "import jax; jax.config.update('jax_platforms', 'cpu')\n"
        "from llama_jax.entry import run_entry; from train.pretrain import main\n"
        "run_entry(lambda: main(['--config', 'tiny.toml', '--stage', '1']))"
    )
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "step 2/" in line)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130 and "interrupted" in rest, rest
    run("1")
    run("1", "--run-dir", "whole")
    assert_same_weights(weights("runs/tiny", 8), weights("whole", 8))


def test_ctrl_c_in_the_last_evaluation_leaves_a_stage_that_the_next_command_ends(workdir, monkeypatch):
    evaluate = loop.Stage._evaluate

    def interrupted(stage, state, progress):
        evaluate(stage, state, progress)
        if progress.phase_step == 8:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stage, "_evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("1")
    assert not read_progress(Path("runs/tiny"), 8).stage_done
    run("1")
    assert read_progress(Path("runs/tiny"), 8).stage_done


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(workdir, monkeypatch):
    write, calls = Snapshot.write, []

    def fail_on_second_step(snapshot, directory, *parts):
        calls.append(directory)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        write(snapshot, directory, *parts)

    monkeypatch.setattr(Snapshot, "write", fail_on_second_step)
    with pytest.raises(OSError, match="No space left"):
        run("1")
    assert saved_steps(Path("runs/tiny")) == [3]
    assert sorted(p.name for p in Path("runs/tiny/checkpoints").iterdir()) == ["3"]
    assert read_progress(Path("runs/tiny"), 3).phase_step == 3


def test_stages_say_what_they_need(workdir):
    with pytest.raises(ValueError, match="run --stage 1 first, or give --init"):
        run("2")
    with pytest.raises(ValueError, match="no stage 'anneal'; it has 1, 2"):
        run("anneal")
    run("1")
    run("1")  # done: says so and trains nothing
    with pytest.raises(ValueError, match="already holds stage 1"):
        run("1", "--init", "runs/tiny@8")
    run("1", "--init", "runs/tiny@8", "--run-dir", "again")
    assert read_progress(Path("again"), 8).step == 8
    run("1", "--init", "runs/tiny@8", "--run-dir", "again")  # as a launcher does that starts it again
    with pytest.raises(ValueError, match="already holds stage 1, begun from runs/tiny@8; give another --run-dir"):
        run("1", "--init", "runs/tiny@3", "--run-dir", "again")


DEMO = Path(llama_jax.__file__).parent / "demo"


def test_absent_data_are_prepared_from_sources_or_for_the_demo_and_never_for_given_weights(workdir):
    missing = "absent is not there; prepare it: python -m train.prepare TEXT... --tokenizer {} --out absent"
    config = read_config("tiny.toml", {"data.directory": "absent"})
    with pytest.raises(FileNotFoundError, match=missing.format(DEMO)):
        _prepare_data(config, Path("run"), str(DEMO))
    without_sources = read_config("tiny.toml", {"data.directory": "absent", "data.sources": []})
    with pytest.raises(FileNotFoundError, match=missing.format("T")):
        _prepare_data(without_sources, Path("run"), None)
    assert not Path("absent").exists()
    _prepare_data(config, Path("run"), None)
    assert llama_jax.load_tokenizer("absent").vocab_size == llama_jax.load_tokenizer("run").vocab_size == 540


def test_data_of_another_tokenizer_than_the_weights_are_refused(workdir):
    Path("swapped").mkdir()
    description = json.loads((DEMO / "tokenizer.json").read_text())
    ids = description["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    Path("swapped/tokenizer.json").write_text(json.dumps(description))
    prepare(["text.jsonl"], "data", tokenizer="swapped", holdout=0.2)
    with pytest.raises(ValueError, match=f"data was prepared with another tokenizer than that of {DEMO}; prepare it"):
        _prepare_data(read_config("tiny.toml"), Path("run"), str(DEMO))
    assert not Path("run").exists()


def test_weights_bring_their_licence_into_the_run(workdir):
    prepare(["text.jsonl"], "data", tokenizer=DEMO, holdout=0.2)
    shutil.copytree(DEMO, "weights")
    Path("weights/USE_POLICY.md").write_text("terms")
    _prepare_data(read_config("tiny.toml"), Path("run"), "weights")
    assert Path("run/USE_POLICY.md").read_text() == "terms"


def test_init_of_another_shape_is_refused(workdir):
    run("1")
    with pytest.raises(ValueError, match="tensor .* has shape .* the config says"):
        run("2", "--init", "runs/tiny", "--run-dir", "other", "--set", "model.mlp_dim=96")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("run.sed=1", "unknown key run.sed"),
        ("run.seed=1.5", "run.seed=1.5 must be of type int"),
        ("run.seed=true", "run.seed=True must be of type int"),
        ("model.num_heads=3", "not a multiple of num_kv_heads"),
        ("stage.1.batch_tokens=100", "not a multiple of seq_len=16"),
        ("stage.3.learning_rate=1.0", "stage.3.batch_tokens is missing"),
        ("model.preset=gpt2", "unknown model.preset 'gpt2'"),
        ("run.seed.x=1", "run.seed=.* must be of type int"),
    ],
)
def test_config_errors_name_the_key(workdir, setting, message):
    with pytest.raises(ValueError, match=message):
        run("1", "--set", setting)


def test_a_preset_gives_the_published_shape(workdir):
    settings = {"model": {"preset": "llama3.2-1b", "rope": {"factor": 1.0}}}
    assert read_config("tiny.toml", settings).model == dataclasses.replace(
        llama_jax.PRESETS["llama3.2-1b"], rope=llama_jax.RopeConfig(factor=1.0)
    )


def test_an_unknown_config_names_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match="give a TOML file or one of demo"):
        find_config("llama9")


def test_schedule_warms_up_and_ends_at_the_final_rate():
    stage = dataclasses.replace(read_config("demo").stage["1"], warmup_steps=10)
    schedule, last = learning_rate_schedule(stage), sum(stage.phase_steps())
    assert float(schedule(0)) == 0
    assert float(schedule(10)) == pytest.approx(stage.learning_rate)
    assert float(schedule(last)) == pytest.approx(stage.final_learning_rate)


def test_gradients_that_stay_not_finite_stop_the_run(workdir):
    with pytest.raises(ValueError, match="gradient norm nan, 4 steps in a row"):
        run("1", "--set", "stage.1.learning_rate=1e30", "--set", "optimizer.clip_norm=1e30")


def test_held_out_losses_take_a_chunk_of_the_vocabulary_at_a_time(monkeypatch):
    counts, token_losses = [], evaluation.token_losses

    def record(model, x, targets, *, num_chunks):
        counts.append(num_chunks)
        return token_losses(model, x, targets, num_chunks=num_chunks)

    monkeypatch.setattr(evaluation, "token_losses", record)
    with llama_jax.use_mesh("fsdp=2,context=2,tensor=2"):
        model = jax.jit(lambda: Llama(TINY, rngs=nnx.Rngs(0)))()
        batch = put_batch(random_batch(TINY), model.rules)
        whole, parts = (row_losses(model, batch, "float32", num_chunks=n) for n in (1, 4))
        assert jax.typeof(parts) == jax.typeof(whole)
    assert counts == [1, 4]
    np.testing.assert_allclose(np.asarray(parts), np.asarray(whole), rtol=1e-6)


def test_position_ranges_double():
    assert position_ranges(16, 128) == [(0, 16), (16, 32), (32, 64), (64, 128)]


def test_the_demo_config_is_whole():
    config = read_config("demo")
    assert list(config.stage) == ["1", "2", "anneal"]
    assert config.stage_model("2").max_seq_len == 16 * config.stage["1"].phases[0].seq_len
    assert config.stage_model("1").num_params() * 2 < 10e6
