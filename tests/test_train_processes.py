"""Training in several processes, and runs that are stopped and killed: the same weights as one left alone."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT, free_address
from tests.test_train import run, weights
from tests.test_train import workdir as workdir
from train.checkpoints import newest_whole
from train.faults.interruption import EXIT_PREEMPTED
from train.watching.metrics import read_metrics

# Small programs compile quickly without the passes that make them fast.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def start(run_dir: str, *options: str, processes: int = 1, mesh: str = "fsdp=-1") -> list[subprocess.Popen]:
    """Stage 1 of the tiny run, in so many processes of one device each."""
    address, started = free_address(), []
    for process in range(processes):
        own = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": FLAGS}
        if processes > 1:
            own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_PROCESS_ID": str(process)}
            own["JAX_NUM_PROCESSES"] = str(processes)
        command = [
            sys.executable,
            "-m",
            "train.pretrain",
            "--config",
            "tiny.toml",
            "--stage",
            "1",
            "--run-dir",
            run_dir,
        ]
        options_here = ["--set", f"run.mesh={mesh}", "--set", "run.trackers=[]", *options]
        started.append(
            subprocess.Popen([*command, *options_here], env=os.environ | own, stderr=subprocess.PIPE, text=True)
        )
    return started


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """The status of each, and what it wrote to stderr."""
    try:
        written = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, written, strict=True)]


def losses(run_dir: str) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(run_dir)) if "loss" in line]


def test_two_processes_train_as_one_does_and_one_goes_on_from_two(workdir, capsys):
    run("1", "--run-dir", "one")
    for status, text in ended(start("two", "--set", "run.keep_checkpoints=9", processes=2)):
        assert status == 0, text
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
    for step in (6, 8):  # back to step 3, as after a crash
        shutil.rmtree(f"two/checkpoints/{step}")
    run("1", "--run-dir", "two")
    assert "resuming at step 3" in capsys.readouterr().err
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)


def test_four_processes_that_split_rows_and_sequences_train_as_one_does(workdir):
    often = ("--set", "run.log_every=1")
    run("1", "--run-dir", "one", *often)
    for status, text in ended(start("four", *often, processes=4, mesh="fsdp=2,context=2")):
        assert status == 0, text
    assert len(losses("one")) == 8 and losses("four") == pytest.approx(losses("one"), rel=1e-5)


def test_sigterm_to_one_of_two_saves_one_step_in_both_and_ends_with_its_status(workdir):
    long = ("--set", "stage.1.phases=[{seq_len=16, tokens=2560000}]", "--set", "run.log_every=20")
    processes = start("two", *long, "--set", "run.save_every=100000", "--set", "run.eval_every=100000", processes=2)
    first = processes[0].stderr
    assert first is not None
    assert any("step 20/" in line for line in first)
    with pytest.raises(OSError, match=f"process {processes[0].pid} on {socket.gethostname()} trains in .*/two; wait"):
        run("1", "--run-dir", "two")
    processes[1].send_signal(signal.SIGTERM)
    ends = ended(processes)
    assert [status for status, _ in ends] == [EXIT_PREEMPTED] * 2, ends
    progress = newest_whole(Path("two"))
    assert progress is not None and progress.step > 20


def kill(run_dir: str, *options: str, num_kills: int) -> tuple[list[int], int]:
    """Start a run so often and kill it at a random moment, every other time as it saves.

    The statuses of those that were not done by then, and how often a checkpoint was begun and not whole.
    """
    draws, statuses, in_a_save = random.Random(num_kills), [], 0
    for number in range(num_kills):
        (process,) = start(run_dir, *options, mesh="data=1")
        assert process.stderr is not None
        moment, longest = ("saving", 0.02) if number % 2 else ("compiled", 0.6)
        reached = any(moment in line for line in process.stderr)
        time.sleep(draws.uniform(0, longest))
        process.kill()
        process.communicate()
        if not reached:
            break
        statuses.append(process.returncode)
        in_a_save += any(Path(run_dir, "checkpoints").glob(".*.partial-*"))
    return statuses, in_a_save


def bits(run_dir: str, step: int) -> dict[str, bytes]:
    return {name: values.tobytes() for name, values in weights(run_dir, step).items()}


@pytest.mark.parametrize(("num_kills", "num_steps"), [(2, 60), pytest.param(20, 125, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_weights(workdir, num_kills, num_steps):
    options = ("--set", f"stage.1.phases=[{{seq_len=16, tokens={128 * num_steps}}}]", "--set", "run.save_every=5")
    options += ("--set", "run.eval_every=100000")
    run("1", "--run-dir", "whole", *options)
    statuses, in_a_save = kill("killed", *options, num_kills=num_kills)
    assert statuses and set(statuses) == {-signal.SIGKILL}
    assert in_a_save > 0 or num_kills < 20
    run("1", "--run-dir", "killed", *options)
    assert bits("killed", num_steps) == bits("whole", num_steps)
