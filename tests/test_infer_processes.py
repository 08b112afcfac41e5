"""Inference in two processes, by every command: the tokens of one; a signal or a death of one ends both."""

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
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

import llama_jax
from infer.engine import Engine
from infer.entry import DEMO
from infer.sampling import SamplingParams
from llama_jax.peers import EXIT_PEER_LOST
from tests.processes import ROOT, free_address
from tests.test_conversation import GENERATE, Terminal

SMALL = ("--max-seq-len", "128")
SERVING = (*SMALL, "--port", "0", "--max-batch-size", "2", "--prefill-chunk", "16")


class Run:
    """A command in two processes of one device each, the first on a terminal if there is one to type at."""

    def __init__(self, directory: Path, module: str, *options: str, on_a_terminal: bool = False):
        address, self.processes, self.terminal = free_address(), [], None
        self.logs = [directory / f"log-{process}" for process in range(2)]
        for process, log in enumerate(self.logs):
            own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
            own["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
            own["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
            own |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(process)}
            if on_a_terminal and process == 0:
                self.terminal = Terminal(GENERATE, *options, **own)
                self.processes.append(self.terminal.program)
                continue
            command = [sys.executable, "-m", module, *options]
            nothing = subprocess.DEVNULL
            with log.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(command, env=os.environ | own, stdin=nothing, stdout=nothing, stderr=stderr)
                )

    def statuses(self) -> list[int]:
        return [process.wait(timeout=240) for process in self.processes]

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
        if run.terminal is not None:
            run.terminal.close()


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
def engine():
    """One process alone."""
    with llama_jax.use_mesh("data=1"):
        model = llama_jax.load(DEMO, layout="layers")
    return Engine(model, llama_jax.load_tokenizer(DEMO), max_seq_len=128)


@pytest.fixture(scope="module")
def alone(engine):
    """The text that one process gives."""
    return lambda prompt, **settings: engine.generate(prompt, SamplingParams(**settings))[0].text


def test_two_processes_talk_as_one_does_and_if_the_first_dies_the_other_says_so(alone, tmp_path):
    """Ctrl-C, which a terminal sends to both, is the first one's."""
    options = ("--chat", *SMALL, "--mesh", "tensor=2", "--temperature", "0", "--max-new-tokens", "12")
    messages = []
    with running(tmp_path, "infer.generate", *options, on_a_terminal=True) as run:
        for said in ("Why?", "Why not?"):
            run.terminal.see("> ", seconds=120)
            run.processes[1].send_signal(signal.SIGINT)
            run.terminal.send(f"{said}\n")
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": alone(messages, max_new_tokens=12)})
            shown = run.terminal.see(r"\[\d+ of 128 tokens", seconds=120).replace("\r\n", "\n")
            assert messages[-1]["content"] + "\n[" in shown
        assert_the_other_ends(run, dies=0)


def test_two_processes_answer_a_file_as_one_does_with_guesses(engine, alone, tmp_path):
    asked = [
        {"prompt": "import os\n\n", "temperature": 1.0, "top_p": 1.0, "seed": 3},
        {"prompt": "def f(", "temperature": 0.0},
        {"prompt": "class A", "temperature": 0.0},
    ]
    bodies = [("/v1/completions", {"max_tokens": 12} | settings) for settings in asked]
    bodies.append(("/v1/embeddings", {"input": [5, 6, 7]}))
    lines = [{"custom_id": str(i), "url": url, "body": body} for i, (url, body) in enumerate(bodies)]
    source, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = (*SMALL, "--mesh", "data=2", "--max-batch-size", "2", "--draft", str(DEMO), "--num-draft-tokens", "2")
    with running(tmp_path, "infer.batch", str(source), str(answers), *options) as run:
        assert run.statuses() == [0, 0], [run.said(process) for process in range(2)]
    accepted = re.search(r"(\d+)% of \d+ draft tokens accepted", run.said(0))
    assert accepted is not None and int(accepted[1]) > 50
    answered = (json.loads(line) for line in answers.read_text().splitlines())
    *texts, embedded = (body for _, body in sorted((line["custom_id"], line["response"]["body"]) for line in answered))
    for settings, body in zip(asked, texts, strict=True):
        assert body["choices"][0]["text"] == alone(max_new_tokens=12, **settings)
    np.testing.assert_allclose(embedded["data"][0]["embedding"], engine.embed([5, 6, 7]), atol=1e-5)  # float32


def test_two_processes_serve_as_one_does_and_a_signal_to_any_lets_what_runs_end(alone, tmp_path):
    with running(tmp_path, "infer.serve", *SERVING, "--mesh", "data=2", "--warmup") as run:
        address = run.address()
        compiled = compilations(address)
        asked = [
            ("def f(", {"temperature": 0.0}),
            ("class A", {"temperature": 1.0, "seed": 5}),
            ("x" * 40, {"seed": 1, "presence_penalty": 1.0}),
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


def test_if_the_second_process_dies_the_server_says_so_in_a_line_and_ends(tmp_path):
    with running(tmp_path, "infer.serve", *SERVING, "--mesh", "data=2") as run:
        stream, _ = open_stream(run.address(), prompt="def f(", max_tokens=100, ignore_eos=True)
        assert_the_other_ends(run, dies=1)
        stream.close()


def assert_the_other_ends(run: Run, dies: int) -> None:
    """Once this process has died."""
    run.processes[dies].kill()
    died = time.monotonic()
    assert run.processes[1 - dies].wait(timeout=60) == EXIT_PEER_LOST
    assert time.monotonic() - died < 20
    (error,) = run.errors(1 - dies)
    assert re.fullmatch(rf"error: process {dies} (\(\S+\) has gone|at localhost:\d+ is lost .*)", error)
    assert "Traceback" not in run.said(1 - dies)


def compilations(address: str) -> float:
    page = urllib.request.urlopen(f"{address}/metrics").read().decode()
    found = re.search(r"^llama_jax_compilations_total (\S+)$", page, re.MULTILINE)
    assert found is not None
    return float(found[1])
