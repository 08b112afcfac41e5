"""The server under an open load, beside `transformers serve`, in turns; its cost over the bare engine; shared prompts.

Both servers have the same float32 weights and the same requests, greedy. While one is measured the other is stopped
(SIGSTOP), so that it takes nothing of the machine. The overhead is processor time a token, of the server's process
and of one that steps the engine and does nothing else: seconds would tell of what else the machine does.
"""

import argparse
import asyncio
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.environment import ROOT, environment, print_results, spread
from benchmarks.load_client import Asked, ask, drawn, offer, report
from benchmarks.shapes import SHAPES, written_weights
from benchmarks.worker import Worker
from llama_jax.entry import run_entry
from llama_jax.tokenizer import load_tokenizer

DEMO = ROOT / "llama_jax" / "demo"
CONTEXT = 2560  # tokens a row may have


class Process:
    """A server in a process of its own, stopped but while it is measured."""

    def __init__(self, name: str, command: Sequence[str], port: int, model: str, log: Path):
        """Start it and wait until it answers."""
        self.name, self.port, self.model = name, port, model
        with log.open("w") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = time.monotonic() + 900
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not answer: {log.read_text()[-2000:]}")
            time.sleep(0.5)

    def _answers(self) -> bool:
        one = Asked(0.0, "x", 2)
        try:
            asyncio.run(ask(self.port, self.model, one))
        except OSError:
            return False
        return bool(one.pieces)

    def __enter__(self):
        """Let it run."""
        self._process.send_signal(signal.SIGCONT)
        return self

    def __exit__(self, *_):
        """Stop it."""
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def processor_seconds(self) -> float:
        """Of all its threads so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def checkpoint(shape: str, folder: Path) -> Path:
    """The demo model, or one of benchmarks/shapes.py with random weights that say what the demo's tokenizer has."""
    if shape == "demo":
        return DEMO
    path = written_weights(shape, folder, num_tokens=load_tokenizer(DEMO).vocab_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, path)
    return path


def start_ours(model: Path, log: Path, port: int, rows: int) -> Process:
    """This project's, all programs compiled before it answers."""
    command = [sys.executable, "-m", "infer.serve", "--checkpoint", str(model), "--dtype", "float32", "--warmup"]
    command += ["--port", str(port), "--max-seq-len", str(CONTEXT), "--max-batch-size", str(rows)]
    return Process("llama_jax", [*command, "--served-model-name", "ours"], port, "ours", log)


def start_theirs(model: Path, log: Path, port: int, rows: int, batching: bool) -> Process:
    """Transformers' own, with continuous batching or without."""
    serve = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    command = [sys.executable, "-c", serve, "serve", str(model), "--port", str(port), "--device", "cpu"]
    command += ["--dtype", "float32"]
    if batching:  # on its own it takes 9 GB for a cache; this is as many tokens as ours has, in chunks as long
        command += ["--continuous-batching", "--attn-implementation", "sdpa", "--cb-max-batch-tokens", "512"]
        command += ["--cb-block-size", "32", "--cb-num-blocks", str(rows * CONTEXT // 32)]
    return Process("transformers serve", command, port, str(model), log)


def words() -> list[str]:
    """Text like what the demo model has read: Python's own library."""
    return re.findall(r"\S+", Path(argparse.__file__).read_text(encoding="utf-8"))


def measure_load(servers: Sequence[Process], args: argparse.Namespace) -> list[dict]:
    """At each rate, each server in turns, the same requests."""
    rows, text = [], words()
    for server in servers:  # what compiles or is loaded at first use
        with server:
            for seed in range(2):
                load = drawn(text, args.rates[-1], args.seconds / 2, args.scale, 1000 + seed)
                asyncio.run(offer(server.port, server.model, load))
    for rate in args.rates:
        for repeat in range(args.repeats):
            for server in servers:
                load = drawn(text, rate, args.seconds, args.scale, repeat)
                with server:
                    seconds = asyncio.run(offer(server.port, server.model, load))
                row = {"server": server.name, "rate": rate, "repeat": repeat, **report(load, seconds)}
                print(row, flush=True)
                rows.append(row)
    return rows


def measure_prefix(server: Process, repeats: int) -> dict:
    """Milliseconds to the first token of a prompt of about 2,000 tokens, cold and when others began like it."""
    text, cold, shared = words(), [], []

    def first_token(prompt: str) -> float:
        one = Asked(0.0, prompt, 1)
        asyncio.run(ask(server.port, server.model, one))
        assert not one.error and one.usage, one.error
        tokens.append(one.usage["prompt_tokens"])
        return 1000 * (one.pieces[0] - one.sent)

    tokens: list[int] = []
    with server:
        for turn in range(repeats + 1):
            begin = f"# {turn}\n" + " ".join(text[turn * 40 : turn * 40 + 900])
            cold.append(first_token(begin))
            shared += [first_token(f"{begin} and {end}") for end in ("one", "two", "three")]
    return {
        "prompt_tokens": [min(tokens), max(tokens)],
        "cold_ms": spread(cold[1:]),
        "shared_ms": spread(shared[3:]),
        "ratio": round(statistics.median(shared[3:]) / statistics.median(cold[1:]), 3),
    }


def measure_overhead(server: Process, model: Path, streams: int, tokens: int, args: argparse.Namespace) -> dict:
    """Processor time a token, in turns: an engine as the server's alone, and the server with so many streams at a time.

    They are asked for in one request, so that both decode the same batches.
    """
    engine = Worker("benchmarks.worker_engine", str(model), str(CONTEXT), str(args.rows))
    prompts = [" ".join(words()[i * 20 : i * 20 + 20]) for i in range(streams)]
    bare, served = [], []
    for _ in range(args.repeats + 2):  # of the first two, the second finds its prompts in the cache, all compile
        bare.append(1e6 * engine.ask("run", prompts=prompts, tokens=tokens)["processor_seconds"] / (streams * tokens))
        one = Asked(0.0, prompts, tokens)
        with server:
            before = server.processor_seconds()
            asyncio.run(ask(server.port, server.model, one))
            used = server.processor_seconds() - before
        served.append(1e6 * used / one.generated)
    engine.close()
    ratios = [s / b for s, b in zip(served[2:], bare[2:], strict=True)]
    return {
        "streams": streams,
        "engine_us_a_token": spread(bare[2:]),
        "server_us_a_token": spread(served[2:]),
        "ratio": spread(ratios),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="load,prefix,overhead", help="of load, prefix, overhead, apart by commas")
    parser.add_argument("--shape", default="demo", choices=[*SHAPES], help="the model; its tokenizer is the demo's")
    parser.add_argument("--rates", default="1,2,4", help="requests a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a load")
    parser.add_argument("--scale", type=float, default=0.25, help="of ShareGPT's lengths")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="--max-batch-size")
    parser.add_argument("--alone", action="store_true", help="without transformers serve")
    parser.add_argument("--no-batching", action="store_true", help="transformers serve without continuous batching")
    args = parser.parse_args()
    args.rates = [float(rate) for rate in args.rates.split(",")]
    what, results = args.what.split(","), {}
    with tempfile.TemporaryDirectory() as folder:
        model, log = checkpoint(args.shape, Path(folder)), Path(folder, "log")
        servers = [start_ours(model, log.with_suffix(".ours"), 8180, args.rows)]
        try:
            if "overhead" in what:
                results["overhead"] = [measure_overhead(servers[0], model, streams, 512, args) for streams in (1, 8)]
                print(results["overhead"], flush=True)
            if "prefix" in what:
                results["prefix"] = measure_prefix(servers[0], args.repeats)
                print(results["prefix"], flush=True)
            if "load" in what:
                servers[0].__exit__()
                theirs = log.with_suffix(".theirs")
                servers += [] if args.alone else [start_theirs(model, theirs, 8181, args.rows, not args.no_batching)]
                results["load"] = measure_load(servers, args)
        finally:
            for server in servers:
                server.close()
    print_results(results.pop("load", []), environment(), **results)


if __name__ == "__main__":
    run_entry(main)
