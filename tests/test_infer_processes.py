"""Inference in two processes: the tokens of one, whatever the mesh; a signal or a death of one ends both."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

import llama_jax
from infer.engine import Engine
from infer.entry import DEMO
from infer.sampling import SamplingParams
from llama_jax.peers import EXIT_PEER_LOST
from tests.processes import ROOT, free_address

SMALL = ("--max-seq-len", "128")
SERVING = (*SMALL, "--port", "0", "--max-batch-size", "4", "--prefill-chunk", "32")


class Run:
    """A command in two processes of one device each."""

    def __init__(self, directory: Path, module: str, *options: str, stdin: str = ""):
        address, self.processes = free_address(), []
        self.logs = [directory / f"log-{process}" for process in range(2)]
        self.printed = directory / "printed"
        for process, log in enumerate(self.logs):
            own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
            own["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
            own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(process)}
            given = directory / f"stdin-{process}"  # the first alone has the prompt
            given.write_text(stdin if process == 0 else "")
            command = [sys.executable, "-m", module, *options]
            with given.open() as stdin_file, log.open("w") as stderr, self.printed.open("a") as stdout:
                self.processes.append(
                    subprocess.Popen(command, env=os.environ | own, stdin=stdin_file, stdout=stdout, stderr=stderr)
                )

    def statuses(self) -> list[int]:
        return [process.wait(timeout=120) for process in self.processes]

    def said(self, process: int) -> str:
        return self.logs[process].read_text()

    def errors(self, process: int) -> list[str]:
        return [line for line in self.said(process).splitlines() if line.startswith("error: ")]

    def address(self) -> str:
        """Of the server, once it listens and is warm."""
        self.until(lambda: "Ctrl-C stops" in self.said(0))
        address = re.search(r"at (http://127\.0\.0\.1:\d+)/", self.said(0))
        assert address is not None

        def ready() -> bool:
            try:
                return urllib.request.urlopen(f"{address[1]}/ready").status == 200
            except urllib.error.HTTPError:
                return False

        self.until(ready)
        return address[1]

    def until(self, condition, seconds: float = 240.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            assert all(process.poll() is None for process in self.processes), [self.said(i) for i in range(2)]
            time.sleep(0.05)


@contextlib.contextmanager
def running(*args, **options):
    run = Run(*args, **options)
    try:
        yield run
    finally:
        for process in run.processes:
            process.kill()
            process.wait()


def open_stream(address: str, **body):
    """A connection on which a completion comes in pieces, and its first piece."""
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps({"stream": True, **body}).encode())
    request.add_header("Content-Type", "application/json")
    answer = urllib.request.urlopen(request, timeout=120)
    return answer, answer.readline()


def text_of(lines: list[bytes]) -> str:
    pieces = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    return "".join(piece["choices"][0]["text"] for piece in pieces)


@pytest.fixture(scope="module")
def alone():
    """The text that one process gives."""
    with llama_jax.use_mesh("data=1"):
        model = llama_jax.load(DEMO, layout="layers")
    engine = Engine(model, llama_jax.load_tokenizer(DEMO), max_seq_len=128)
    return lambda prompt, **settings: engine.generate(prompt, SamplingParams(**settings))[0].text


@pytest.mark.parametrize("guesses", [(), ("--draft", str(DEMO), "--num-draft-tokens", "2")], ids=["plain", "draft"])
def test_two_processes_continue_what_is_piped_to_the_first_as_one_does(alone, tmp_path, guesses):
    options = ("--json", "--max-new-tokens", "12", "--temperature", "1", "--top-p", "1", "--seed", "3", *guesses)
    with running(tmp_path, "infer.generate", *SMALL, *options, "--mesh", "tensor=2", stdin="import os\n\n") as run:
        assert run.statuses() == [0, 0], [run.said(process) for process in range(2)]
    *_, line = run.printed.read_text().splitlines()  # gloo prints lines of its own
    result = json.loads(line)
    assert (result["accepted_tokens"] > 4) == bool(guesses)
    assert result["text"] == alone("import os\n\n", max_new_tokens=12, temperature=1.0, seed=3)


def test_two_processes_serve_as_one_does_and_a_signal_to_any_lets_what_runs_end(alone, tmp_path):
    with running(tmp_path, "infer.serve", *SERVING, "--mesh", "data=2", "--warmup") as run:
        address = run.address()
        compiled = compilations(address)
        asked = [
            ("def f(", {"temperature": 0.0}),
            ("class A", {"temperature": 1.0, "seed": 5}),
            ("x" * 40, {"seed": 1}),
        ]
        asked = [(prompt, {"temperature": 0.6, "top_p": 0.9} | settings) for prompt, settings in asked]
        streams = [open_stream(address, prompt=text, max_tokens=16, **settings) for text, settings in asked]
        for (stream, first), (text, settings) in zip(streams, asked, strict=True):
            assert text_of([first, *stream]) == alone(text, max_new_tokens=16, **settings)
        assert compilations(address) == compiled > 0
        stream, first = open_stream(address, prompt="def f(", max_tokens=100, temperature=0, ignore_eos=True)
        run.processes[1].send_signal(signal.SIGTERM)
        text = text_of([first, *stream])
        assert run.statuses() == [0, 0], [run.said(process) for process in range(2)]
    assert text == alone("def f(", max_new_tokens=100, ignore_eos=True)
    assert run.errors(0) == run.errors(1) == []


@pytest.mark.parametrize("dies", [0, 1])
def test_if_one_of_two_processes_dies_the_other_says_so_in_a_line_and_ends(dies, tmp_path):
    with running(tmp_path, "infer.serve", *SERVING, "--mesh", "data=2") as run:
        stream, _ = open_stream(run.address(), prompt="def f(", max_tokens=100, ignore_eos=True)
        run.processes[dies].kill()
        died = time.monotonic()
        assert run.processes[1 - dies].wait(timeout=60) == EXIT_PEER_LOST
        assert time.monotonic() - died < 20
        stream.close()
    (error,) = run.errors(1 - dies)
    assert re.fullmatch(rf"error: process {dies} (\(\S+\) has gone|at localhost:\d+ is lost .*)", error)
    assert "Traceback" not in run.said(1 - dies)


def compilations(address: str) -> float:
    page = urllib.request.urlopen(f"{address}/metrics").read().decode()
    found = re.search(r"^llama_jax_compilations_total (\S+)$", page, re.MULTILINE)
    assert found is not None
    return float(found[1])
