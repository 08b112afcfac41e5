"""Training in several processes, and runs that are stopped and killed: the same weights as one left alone."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.processes import ROOT, free_address
from tests.test_train import assert_same_weights, run, weights
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


def test_two_processes_train_as_one_does_and_one_goes_on_from_two(workdir):
    (alone,) = ended(start("one"))
    assert alone[0] == 0, alone[1]
    for status, text in ended(start("two", "--set", "run.keep_checkpoints=9", processes=2)):
        assert status == 0, text
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
    for step in (6, 8):  # back to step 3, as after a crash
        subprocess.run(["rm", "-rf", f"two/checkpoints/{step}"], check=True)
    (alone,) = ended(start("two"))
    assert alone[0] == 0 and "resuming at step 3" in alone[1], alone[1]
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)


def test_four_processes_that_split_rows_and_sequences_train_as_one_does(workdir):
    often = ("--set", "run.log_every=1")
    (alone,) = ended(start("one", *often))
    assert alone[0] == 0, alone[1]
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


def killed_and_resumed(num_kills: int) -> int:
    """Kill a run at random moments, every other time as it saves; then compare it with one that was left alone.

    How often a checkpoint was begun and not whole.
    """
    options = ("--set", "stage.1.phases=[{seq_len=16, tokens=16000}]", "--set", "run.save_every=5")
    options += ("--set", "run.eval_every=100000")
    ((status, text),) = ended(start("whole", *options))
    assert status == 0, text
    draws, in_a_save = random.Random(num_kills), 0
    for number in range(num_kills):
        (process,) = start("killed", *options)
        assert process.stderr is not None
        moment, longest = ("saving", 0.02) if number % 2 else ("compiled", 0.6)
        reached = any(moment in line for line in process.stderr)
        time.sleep(draws.uniform(0, longest))
        process.kill()
        process.communicate()
        in_a_save += any(Path("killed/checkpoints").glob(".*.partial-*"))
        if not reached:
            break  # it was done
    ((status, text),) = ended(start("killed", *options))
    assert status == 0, text
    assert_same_weights(weights("whole", 125), weights("killed", 125))
    return in_a_save


def test_a_run_that_is_killed_at_random_moments_ends_with_the_same_weights(workdir):
    killed_and_resumed(2)


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_weights(workdir):
    assert killed_and_resumed(20) > 0
