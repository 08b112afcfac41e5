"""Runs of two processes that are stopped, that hang or lose one: what is said, when, and with which status."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest

from llama_jax.peers import EXIT_PEER_LOST, Peers, slow_processes
from tests.processes import ROOT, free_address, until
from train.faults.interruption import EXIT_PREEMPTED, Interruption
from train.faults.watchdog import EXIT_HUNG, Watchdog

# Steps of one collective each, sent ahead of the devices as a run does.
STEPS = """
import itertools, sys, time
from pathlib import Path
from llama_jax.devices import open_devices
from llama_jax.entry import run_entry

def main():
    devices = open_devices()
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec as P
    from train.faults.interruption import Interruption
    from llama_jax.peers import Peers
    from train.faults.watchdog import Watchdog
    sharding = NamedSharding(jax.make_mesh((len(devices),), ("data",)), P("data"))
    step = jax.jit(lambda x: x / x.sum() + 1, out_shardings=sharding)
    x = jax.make_array_from_callback((len(devices),), sharding, lambda index: jnp.ones(1))
    seconds, silent_seconds, failing_step, run_dir = *map(int, sys.argv[1:4]), Path(sys.argv[4])
    peers = Peers(silent_seconds=silent_seconds)
    with peers, Interruption(peers) as stop, Watchdog(seconds, peers, run_dir=run_dir) as watchdog:
        for number in itertools.count(1):
            x = step(x)
            watchdog.step_done(x)
            if number == 20:
                print("started", file=sys.stderr, flush=True)
            if number == failing_step and jax.process_index() == 1:
                raise ValueError("shard 7 is damaged")
            if number % 8 == 0:
                x.block_until_ready()
            if stop.agreed():
                print("stopped at", number, file=sys.stderr, flush=True)
                stop.leave()
            time.sleep(0.02 + 0.01 * jax.process_index())

run_entry(main)
"""


class Run:
    """Two processes that step until something happens."""

    def __init__(self, run_dir: Path, *, watchdog_seconds: int = 600, silent_seconds: int = 4, failing_step: int = 0):
        address = free_address()
        arguments = [str(value) for value in (watchdog_seconds, silent_seconds, failing_step, run_dir)]
        self.files = [run_dir / f"stderr-{process}" for process in range(2)]
        self.processes = []
        for process, path in enumerate(self.files):
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "PYTHONPATH": str(ROOT),
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(process),
            }
            with path.open("w") as file:
                command = [sys.executable, "-c", STEPS, *arguments]
                self.processes.append(subprocess.Popen(command, env=environment, stderr=file, stdout=file))

    def send(self, number: signal.Signals, process: int) -> None:
        """A signal, once both have started."""
        until(lambda: all("started" in path.read_text() for path in self.files), seconds=300)
        self.processes[process].send_signal(number)

    def status(self, process: int) -> int:
        return self.processes[process].wait(timeout=120)

    def said(self, process: int) -> str:
        return self.files[process].read_text()

    def errors(self, process: int) -> list[str]:
        return [line for line in self.said(process).splitlines() if line.startswith("error: ")]


@pytest.fixture
def start(tmp_path):
    runs = []

    def start_run(**options) -> Run:
        runs.append(Run(tmp_path, **options))
        return runs[-1]

    yield start_run
    for process in [process for run in runs for process in run.processes]:
        process.kill()
        process.wait()


# One process.


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_stops_after_the_step_and_says_by_its_error_which_it_was(number, error):
    before = signal.getsignal(number)
    with pytest.raises(error) as raised, Peers() as peers, Interruption(peers) as stop:
        assert not stop.agreed()
        signal.raise_signal(number)
        assert stop.agreed()
        stop.leave()
    assert getattr(raised.value, "code", EXIT_PREEMPTED) == EXIT_PREEMPTED == 75
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once():
    with pytest.raises(KeyboardInterrupt), Peers() as peers, Interruption(peers):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


class NoPeers:
    """In place of Peers: writes down how the run is ended."""

    process = 0

    def __init__(self):
        self.told, self.ended = {}, []

    def tell(self, **values):
        self.told |= values

    def behind(self) -> str:
        return "process 1 is behind"

    def end(self, reason, status):
        self.ended.append((reason, status))


class Result:
    """An array that is there from when it is told so."""

    ready = False

    def is_ready(self) -> bool:
        return self.ready


def test_a_run_whose_steps_end_goes_on_and_one_whose_last_does_not_is_ended_with_its_stacks(tmp_path, capfd):
    peers, result = NoPeers(), Result()
    with Watchdog(2.0, cast(Peers, peers), run_dir=tmp_path) as dog:
        for number in range(1, 6):
            dog.step_done()
            until(lambda number=number: peers.told.get("step") == number)
        assert not peers.ended
        dog.step_done(result)
        until(lambda: peers.ended)
    reason, status = peers.ended[0]
    assert status == EXIT_HUNG == 76
    assert re.match(r"no step has finished for \d+ s; process 1 is behind; the stacks of all threads are in /", reason)
    assert "test_a_run_whose_steps_end" in (tmp_path / "hung-0.txt").read_text()
    assert "test_a_run_whose_steps_end" in capfd.readouterr().err


def test_pauses_have_a_limit_of_their_own_and_nothing_counts_before_the_first_step(tmp_path):
    peers = NoPeers()
    with Watchdog(1.0, cast(Peers, peers), run_dir=tmp_path) as dog:
        time.sleep(1.3)
        dog.step_done()
        with dog.paused():
            time.sleep(1.3)
        assert not peers.ended
        with dog.paused(1.1):
            until(lambda: peers.ended)
    assert peers.ended[0][0].startswith("compiling, evaluating or saving has taken ")


def test_the_limit_is_a_multiple_of_the_median_step():
    dog = Watchdog(600.0, cast(Peers, NoPeers()))
    dog.step_done()
    assert dog.limit() == 600.0
    dog._durations.extend([90.0, 100.0, 7000.0])
    assert dog.limit() == 1000.0


def test_processes_that_are_slower_than_most_are_named():
    records = {
        process: {"host": f"host-{process}", "step_seconds": 1.0, "data_seconds": 0.01 * (1 + process)}
        for process in range(5)
    }
    assert slow_processes(records) == []  # ten times the data wait of another, and nothing beside the step
    records[3] |= {"step_seconds": 1.6}
    records[4] |= {"data_seconds": 0.5}
    assert slow_processes(records) == [
        "process 3 (host-3): step_seconds 1.6, median 1",
        "process 4 (host-4): data_seconds 0.5, median 0.03",
    ]
    assert slow_processes({0: {"host": "alone"}}) == []


@pytest.mark.parametrize("seed", range(50))
def test_all_processes_stop_in_the_same_call_however_signals_and_steps_fall(seed, monkeypatch):
    random, store = Random(seed), {"news": {}, "calls": {}}
    monkeypatch.setattr(signal, "signal", lambda *_: signal.SIG_DFL)

    def peers_of(process):
        return SimpleNamespace(
            process=process,
            num_processes=3,
            each_beat=lambda listener: None,
            write=lambda folder, name, text: store[folder].update({str(name): text}),
            read=lambda folder: dict(store[folder]),
        )

    stops = [Interruption(cast(Peers, peers_of(process))).__enter__() for process in range(3)]
    for process in random.sample(range(3), random.randint(1, 2)):  # who gets the signal
        stops[process]._receive(signal.SIGTERM, None)
    calls, stopped = [0, 0, 0], {}
    while len(stopped) < 3:
        process = random.randrange(3)
        if random.random() < 0.3:
            stops[process]._agree(store["news"])
        elif process not in stopped and not stops[process]._holding and calls[process] < min(calls) + 8:
            calls[process] += 1
            if stops[process].agreed():
                stopped[process] = calls[process]
    assert len(set(stopped.values())) == 1


# Two processes.


def test_a_signal_to_one_process_stops_both_after_the_same_step(start):
    run = start()
    run.send(signal.SIGTERM, 1)
    assert [run.status(process) for process in (0, 1)] == [EXIT_PREEMPTED] * 2, run.said(0) + run.said(1)
    stops = [line for process in (0, 1) for line in run.said(process).splitlines() if "stopped at" in line]
    assert len(stops) == 2 and len(set(stops)) == 1
    assert "SIGTERM: stopping after this step" in run.said(1)


def test_a_process_that_is_stopped_by_the_system_is_named_with_the_stacks_of_the_other(start, tmp_path):
    run = start(watchdog_seconds=2, silent_seconds=60)
    run.send(signal.SIGSTOP, 1)
    assert run.status(0) == EXIT_HUNG
    (line,) = run.errors(0)
    assert "no step has finished for" in line and "process 1" in line and "does not answer" in line
    assert " in main\n" in (tmp_path / "hung-0.txt").read_text()


def test_a_killed_process_ends_the_other_with_one_line_that_names_it(start):
    run = start()
    run.send(signal.SIGKILL, 1)
    began = time.monotonic()
    assert run.status(0) == EXIT_PEER_LOST
    assert time.monotonic() - began < 60  # jax itself would end it after 100
    (line,) = run.errors(0)
    assert line.startswith("error: process 1 (") and "has not answered for" in line
    assert "Traceback" not in run.said(0)


def test_a_killed_first_process_which_connects_the_others_ends_them_too(start):
    run = start()
    run.send(signal.SIGKILL, 0)
    assert run.status(1) == EXIT_PEER_LOST
    assert "process 0 at localhost:" in run.errors(1)[-1] and "is lost" in run.errors(1)[-1]


def test_an_error_in_one_process_ends_the_other_with_its_line(start):
    run = start(failing_step=25)
    assert [run.status(process) for process in (0, 1)] == [EXIT_PEER_LOST, 1]
    assert run.errors(1) == ["error: shard 7 is damaged"]
    (line,) = run.errors(0)
    assert line.startswith("error: process 1 (") and line.endswith("ended: shard 7 is damaged")
