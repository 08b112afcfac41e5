"""Checkpoints of a run in one process: to the bit on any mesh, beside the training, damage passed over, averages."""

import dataclasses
import json
import os
import re
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import llama_jax
from llama_jax.checkpoint.formats import open_checkpoint
from llama_jax.checkpoint.layout import read_model
from llama_jax.checkpoint.names import canonical_shapes
from llama_jax.checkpoint.orbax import OrbaxSource, TreeWriter, finish_tree
from llama_jax.checkpoint.snapshot import Snapshot
from llama_jax.checkpoint.source import TensorSpec
from tests.tiny import TINY
from train.checkpoints import (
    MOMENTS,
    Checkpoints,
    Progress,
    newest_whole,
    read_progress,
    resumed_state,
    saved_steps,
    write_progress,
)
from train.config import OptimizerConfig, PhaseConfig, StageConfig
from train.optimizer import TrainState, make_optimizer

CFG = dataclasses.replace(TINY, vocab_size=131, num_layers=2)  # a vocabulary that no mesh divides
STAGE = StageConfig((PhaseConfig(8, 64),), batch_tokens=8, learning_rate=1e-3, final_learning_rate=0.0)
OPTIMIZER = make_optimizer(OptimizerConfig(), STAGE)
SMALL = dataclasses.replace(TINY, num_layers=1, embed_dim=32, mlp_dim=32, num_heads=2, num_kv_heads=1)


class InMemory(NamedTuple):
    """Tensors as a source."""

    arrays: dict[str, np.ndarray]

    @property
    def tensors(self):
        return {name: TensorSpec(array.shape, array.dtype) for name, array in self.arrays.items()}

    def read(self, name, index=None):
        return self.arrays[name][index or ()]


def random_tensors(cfg, seed) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in canonical_shapes(cfg).items()}


def random_state(cfg, seed=0) -> TrainState:
    """Weights and moments on the ambient mesh, which are random_trees of the same seed."""
    read = {name: read_model(cfg, InMemory(tree), dtype="float32") for name, tree in random_trees(cfg, seed).items()}
    params = read.pop("params")
    return TrainState(params, optax.tree.set(jax.eval_shape(OPTIMIZER.init, params), **read))


def random_trees(cfg, seed=0) -> dict[str, dict[str, np.ndarray]]:
    return {name: random_tensors(cfg, [seed, i]) for i, name in enumerate(("params", *MOMENTS))}


def trees(state: TrainState) -> dict[str, dict[str, np.ndarray]]:
    """All that is stored of a state, by tree and canonical name."""
    moments = {name: optax.tree.get(state.opt_state, name) for name in MOMENTS}
    return {name: put_together(Snapshot(tree)) for name, tree in ({"params": state.params} | moments).items()}


def put_together(snapshot: Snapshot) -> dict[str, np.ndarray]:
    whole = {name: np.full(spec.shape, np.nan, spec.dtype) for name, spec in snapshot.specs.items()}
    for name, box, part in snapshot.parts():
        whole[name][box] = part
    return whole


def stored(directory: Path) -> dict[str, np.ndarray]:
    source = OrbaxSource(directory)
    return {name: source.read(name) for name in source.tensors}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].shape, a[name].tobytes()) == (b[name].shape, b[name].tobytes()), name


@pytest.fixture(autouse=True)
def one_device():
    with llama_jax.use_mesh("data=1"):
        yield


def save(run_dir, *steps, keep=9, average=False, start=None) -> Progress:
    """Save these steps, each with its own weights."""
    checkpoints, progress = Checkpoints(run_dir, SMALL, keep=keep), start or Progress(stage="1")
    for step in steps:
        progress = dataclasses.replace(progress, step=step, phase_step=step)
        progress = checkpoints.save(random_state(SMALL, step), progress, average=average)
    checkpoints.wait()
    return progress


# To the bit


@pytest.mark.parametrize("layout", ["stacked", "layers"])
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "tensor=8", "fsdp=2,context=2,tensor=2", "data=2,tensor=4"])
def test_parts_of_any_mesh_make_up_every_tensor_and_each_element_once(mesh, layout):
    expected = random_tensors(CFG, 0)
    with llama_jax.use_mesh(mesh):
        snapshot = Snapshot(read_model(CFG, InMemory(expected), dtype="float32", layout=layout))
    written = {name: np.zeros(spec.shape, np.int32) for name, spec in snapshot.specs.items()}
    for name, box, part in snapshot.parts():
        written[name][box] += 1
        np.testing.assert_array_equal(part, expected[name][box])
        for side, step, size in zip(box, snapshot.chunks[name], written[name].shape, strict=True):
            assert side.start % step == 0 and (side.stop % step == 0 or side.stop == size)
    assert written.keys() == expected.keys()
    assert all((count == 1).all() for count in written.values())


def test_a_state_comes_back_to_the_bit_on_another_mesh(tmp_path):
    progress = Progress("run", step=7, stage="1", phase_step=3, rows={"web": (5, -9)}, averaged=2)
    expected = random_trees(CFG)
    with llama_jax.use_mesh("fsdp=2,tensor=4"):
        checkpoints = Checkpoints(tmp_path, CFG, keep=1)
        assert checkpoints.save(random_state(CFG), progress) == progress
        checkpoints.wait()
    for name, tree in expected.items():
        assert_same_bits(stored(tmp_path / "checkpoints/7" / name), tree)
    with llama_jax.use_mesh("data=2,fsdp=2,context=2"):
        assert newest_whole(tmp_path) == progress
        restored = resumed_state(tmp_path, 7, CFG, OPTIMIZER)
    for name, tree in trees(restored).items():
        assert_same_bits(tree, expected[name])
    counts = optax.tree.get_all_with_path(restored.opt_state, "count")
    assert [int(count) for _, count in counts] == [3, 3]


def test_orbax_itself_restores_what_a_mesh_has_written(tmp_path):
    expected = random_tensors(CFG, 0)
    with llama_jax.use_mesh("fsdp=4,tensor=2"):
        snapshot = Snapshot(read_model(CFG, InMemory(expected), dtype="float32"))
    snapshot.write(tmp_path)
    finish_tree(tmp_path, snapshot.specs)
    with ocp.PyTreeCheckpointer() as checkpointer:
        assert_same_bits(checkpointer.restore(tmp_path), expected)


def test_the_weights_may_be_donated_as_soon_as_save_returns(tmp_path, monkeypatch):
    write, begin = Checkpoints._write, threading.Event()

    def write_later(*args):
        assert begin.wait(60)
        write(*args)

    monkeypatch.setattr(Checkpoints, "_write", write_later)
    checkpoints, state = Checkpoints(tmp_path, SMALL, keep=1), random_state(SMALL)
    checkpoints.save(state, Progress(step=1))
    zeros = jax.jit(lambda params: jax.tree.map(lambda w: w * 0, params), donate_argnums=0)(state.params)
    assert not jax.block_until_ready(zeros).embedding[...].any()
    assert saved_steps(tmp_path) == []
    begin.set()
    checkpoints.wait()
    assert_same_bits(stored(tmp_path / "checkpoints/1/params"), random_trees(SMALL)["params"])


# Retention and failures


def test_the_newest_and_the_last_of_every_stage_are_kept(tmp_path):
    save(tmp_path, 1, 2)
    write_progress(tmp_path, Progress(step=2, stage="1", stage_done=True))
    save(tmp_path, 3, 4, 5, keep=2)
    assert saved_steps(tmp_path) == [2, 4, 5]


def test_the_newest_step_is_not_written_again_but_where_the_run_stands(tmp_path):
    progress = save(tmp_path, 1, average=True)
    before = stored(tmp_path / "checkpoints/1/params")
    checkpoints = Checkpoints(tmp_path, SMALL, keep=1)
    done = dataclasses.replace(progress, stage_done=True)
    assert checkpoints.save(random_state(SMALL), done, average=True) == done
    assert newest_whole(tmp_path) == done
    assert_same_bits(stored(tmp_path / "checkpoints/1/params"), before)


def test_a_full_disk_is_one_error_of_the_next_call_and_costs_no_other_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    checkpoints = Checkpoints(tmp_path, SMALL, keep=1)

    write, written = TreeWriter.write, []

    def full(self, name, box, part):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(name)
        write(self, name, box, part)

    with monkeypatch.context() as patch:
        patch.setattr(TreeWriter, "write", full)
        checkpoints.save(random_state(SMALL), Progress(step=2))
        with pytest.raises(OSError, match="checkpoints/2 could not be written: .*No space left on device"):
            checkpoints.save(random_state(SMALL), Progress(step=3))
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    assert newest_whole(tmp_path) == Progress(step=1, stage="1", phase_step=1)
    checkpoints.save(random_state(SMALL), Progress(step=3))
    checkpoints.wait()
    assert saved_steps(tmp_path) == [3]


# Damage


def largest_file(directory: Path) -> Path:
    files = (path for path in directory.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def flip(path: Path):
    """Change a bit in three places: one in thirty bytes of a database is superseded and never read."""
    content = bytearray(path.read_bytes())
    for quarter in (1, 2, 3):
        content[quarter * len(content) // 4] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "flipped": (lambda step: flip(largest_file(step / "params")), "params: array '.*' is damaged"),
    "truncated": (lambda step: os.truncate(largest_file(step / "nu"), 99), "nu: array '.*' is damaged"),
    "missing": (lambda step: largest_file(step / "mu").unlink(), "mu: array '.*' is damaged"),
    "average": (lambda step: flip(largest_file(step / "average")), "average/params: array '.*' is damaged"),
    "tree": (lambda step: (step / "mu/manifest.ocdbt").unlink(), "mu is no finished Orbax checkpoint"),
    "names": (lambda step: flip(step / "mu/_METADATA"), "mu"),
    "state": (lambda step: (step / "state.json").write_text("{"), "state.json is damaged: Expecting"),
    "no state": (lambda step: (step / "state.json").unlink(), "No such file .*state.json"),
    "model": (lambda step: (step / "model.json").write_text("{}"), "model.json is not a model description"),
    "no model": (lambda step: (step / "model.json").unlink(), "it was never finished"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage, capsys):
    progress = save(tmp_path, 1, 2, average=True)
    spoil, reason = DAMAGES[damage]
    spoil(tmp_path / "checkpoints/2")
    first = dataclasses.replace(progress, step=1, phase_step=1, averaged=1)
    assert newest_whole(tmp_path) == first
    pattern = rf"passed over {tmp_path}/checkpoints/2: .*{reason}.*; going on from step 1"
    [line] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(pattern, line), line
    assert saved_steps(tmp_path) == [1]
    save(tmp_path, 2, average=True, start=first)
    assert newest_whole(tmp_path) == progress


def test_a_run_whose_only_checkpoint_is_damaged_does_not_begin_anew(tmp_path):
    assert newest_whole(tmp_path) is None
    save(tmp_path, 1)
    flip(largest_file(tmp_path / "checkpoints/1/params"))
    with pytest.raises(ValueError, match=f"no checkpoint of {tmp_path} reads whole; .*/1: .* is damaged"):
        newest_whole(tmp_path)
    assert saved_steps(tmp_path) == [1]


@pytest.mark.parametrize("change", [{"step": 8}, {"steps": 7}, {"step": None}, {"rows": {"web": [1]}}])
def test_a_state_file_is_taken_as_it_was_written_or_not_at_all(tmp_path, change):
    progress = Progress("run", step=7, rows={"web": (1, -2), "recall": (3, 4)}, retries=1, extra_steps=5)
    (tmp_path / "checkpoints/7").mkdir(parents=True)
    write_progress(tmp_path, progress)
    assert read_progress(tmp_path, 7) == progress
    path = tmp_path / "checkpoints/7/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="7/state.json is damaged"):
        read_progress(tmp_path, 7)


# Averages


def test_the_average_is_the_mean_of_a_stages_checkpoints_also_of_a_resumed_run(tmp_path):
    progress = save(tmp_path / "whole", 1, 2, 3, average=True)
    assert progress.averaged == 3
    half = save(tmp_path / "halves", 1, average=True)
    assert save(tmp_path / "halves", 2, 3, average=True, start=half) == progress
    averages = [stored(tmp_path / run / "checkpoints/3/average/params") for run in ("whole", "halves")]
    assert_same_bits(*averages)
    steps = [stored(tmp_path / f"whole/checkpoints/{step}/params") for step in (1, 2, 3)]
    for name, average in averages[0].items():
        assert average.dtype == np.float32
        np.testing.assert_allclose(average, np.mean([step[name] for step in steps], axis=0), rtol=1e-5, atol=1e-6)


def test_a_run_is_opened_at_its_newest_step_a_step_or_the_average(tmp_path):
    save(tmp_path, 1, average=True)
    save(tmp_path, 2)
    opened = {at: open_checkpoint(f"{tmp_path}{at}") for at in ("", "@1", "@2", "@average")}
    assert {at: str(found.directory.relative_to(tmp_path)) for at, found in opened.items()} == {
        "": "checkpoints/2",
        "@1": "checkpoints/1",
        "@2": "checkpoints/2",
        "@average": "checkpoints/1/average",
    }
    assert all(found.companions == tmp_path for found in opened.values())


def test_a_step_or_an_average_that_is_not_there_is_told_with_those_that_are(tmp_path):
    save(tmp_path, 1, 2)
    with pytest.raises(FileNotFoundError, match="has no checkpoint '3'; it has 1, 2$"):
        open_checkpoint(f"{tmp_path}@3")
    with pytest.raises(FileNotFoundError, match="has no average, which a stage with average = true keeps; it has 1, 2"):
        open_checkpoint(f"{tmp_path}@average")
