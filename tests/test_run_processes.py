"""Checkpoints of a run of several processes: each writes what it holds, all fail if one does, any number goes on."""

import os

import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint.orbax import OrbaxSource
from llama_jax.checkpoint.snapshot import Snapshot
from tests.processes import free_address, outputs, start_python
from tests.test_run_checkpoints import SMALL, assert_same_bits, put_together, random_trees, stored
from train.checkpoints import Progress, newest_whole

START = """
import json, os, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 2)
address, num_processes, process, run_dir = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
jax.distributed.initialize(address, num_processes=num_processes, process_id=process)
import llama_jax
from tests.test_run_checkpoints import OPTIMIZER, SMALL, random_state
from train.checkpoints import Checkpoints, Progress, newest_whole, resumed_state
"""


def run(code: str, num_processes: int, run_dir) -> list:
    """What each process printed last."""
    address = free_address()
    return outputs(*(start_python(START + code, address, num_processes, i, run_dir) for i in range(num_processes)))


SAVE = """
with llama_jax.use_mesh("data=2,fsdp=2"):  # the second process holds replicas alone
    state = random_state(SMALL)
    llama_jax.save(state.params, run_dir / "model", format="orbax")
    try:
        llama_jax.save(state.params, run_dir / "hf")
    except ValueError as error:
        refused = str(error)
with llama_jax.use_mesh("fsdp=2,tensor=2"):
    state, checkpoints = random_state(SMALL), Checkpoints(run_dir, SMALL, keep=2)
    checkpoints.save(state, Progress("r", step=1), average=True)
    checkpoints.save(random_state(SMALL, 2), Progress("r", step=2, averaged=1, phase_step=4), average=True)
    checkpoints.wait()
    if process == 1:  # its disk is full
        from llama_jax.checkpoint.orbax import TreeWriter
        def full(*args):
            raise OSError(28, "No space left on device")
        TreeWriter.write = full
    checkpoints.save(state, Progress("r", step=3))
    try:
        checkpoints.wait()
    except OSError as error:
        print(json.dumps([refused, str(error)]))
"""

RESUME = """
with llama_jax.use_mesh("fsdp=4,tensor=2"):
    progress = newest_whole(run_dir)
    state = resumed_state(run_dir, progress.step, SMALL, OPTIMIZER)
    checkpoints = Checkpoints(run_dir, SMALL, keep=9)
    checkpoints.save(state, Progress("r", step=3, averaged=progress.averaged))
    checkpoints.wait()
    print(json.dumps([progress.step, progress.averaged]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of two processes, whose third save failed in one of them, and what each said."""
    run_dir = tmp_path_factory.mktemp("run")
    return run_dir, run(SAVE, 2, run_dir)


def test_what_two_processes_have_written_is_whole_in_one(saved):
    run_dir, _ = saved
    for name, tree in random_trees(SMALL, 2).items():
        assert_same_bits(stored(run_dir / "checkpoints/2" / name), tree)
    mean = [(random_trees(SMALL, seed)["params"]) for seed in (0, 2)]
    for name, average in stored(run_dir / "checkpoints/2/average/params").items():
        np.testing.assert_array_equal(average, mean[0][name] + (mean[1][name] - mean[0][name]) / np.float32(2))


def test_each_of_two_processes_writes_half_of_what_is_split_and_replicas_once(saved):
    run_dir, _ = saved
    folders = [run_dir / f"checkpoints/2/params/ocdbt.process_{i}/d" for i in range(2)]
    first, second = (sum(path.stat().st_size for path in folder.iterdir()) for folder in folders)
    weights = 4 * SMALL.num_params()
    assert weights <= first + second < 1.4 * weights  # with what describes the arrays
    assert min(first, second) >= 0.45 * weights


def test_a_model_is_saved_by_two_processes_as_orbax_alone(saved):
    run_dir, said = saved
    assert {refused for refused, _ in said} == {
        "hf is not written by several processes; save as orbax and convert that in one"
    }
    with llama_jax.use_mesh("data=1"):
        model = llama_jax.load(run_dir / "model")
        assert_same_bits(put_together(Snapshot(model)), random_trees(SMALL)["params"])


def test_a_full_disk_of_one_process_is_an_error_of_both_and_leaves_nothing(saved):
    run_dir, ((_, first), (_, second)) = saved
    assert "checkpoints/3 could not be written: process 1 failed: OSError: [Errno 28] No space left" in first
    assert "checkpoints/3 could not be written: [Errno 28] No space left" in second


def test_four_processes_go_on_with_the_very_state_of_two(saved):
    run_dir, _ = saved
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["1", "2"]
    assert run(RESUME, 4, run_dir) == [[2, 2]] * 4
    assert newest_whole(run_dir) == Progress("r", step=3, averaged=2)
    assert OrbaxSource(run_dir / "checkpoints/3/mu").tensors
    for name, tree in random_trees(SMALL, 2).items():
        assert_same_bits(stored(run_dir / "checkpoints/3" / name), tree)
