"""From the command to the first step of a run that goes on, with and without the compilation cache.

A run is begun and stopped by SIGTERM, which saves; then the same command is started again and again, in turns with an
empty and a filled cache, and killed when it logs its first step. Every start resumes the very same checkpoint.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.environment import ROOT, environment, print_results, spread
from benchmarks.shapes import SHAPES
from llama_jax.config import LlamaConfig
from llama_jax.entry import run_entry
from train.faults.interruption import EXIT_PREEMPTED
from train.prepare import prepare

DEMO = ROOT / "llama_jax" / "demo"  # its tokenizer is that of the data

# What the log says when a part of the start is over.
MARKS = {"resumed": "resuming at step", "compiled": "compiled in", "first_step": "  step "}


def run_command(folder: Path, cfg: LlamaConfig, *, seq_len: int, batch_tokens: int) -> list[str]:
    """A run of this architecture with the data's vocabulary, longer than anyone waits."""
    data = prepare([str(text_file(folder))], folder / "data", tokenizer=DEMO, holdout=0.2)
    model = dataclasses.asdict(cfg) | {"vocab_size": data["vocab_size"]}
    settings = {f"model.{key}": value for key, value in model.items() if key not in ("rope", "norm_eps")}
    settings["model.rope.original_max_seq_len"] = seq_len  # what is held out is read at this length
    settings["stage.1.phases"] = [{"seq_len": seq_len, "tokens": 10**6 * batch_tokens}]
    settings |= {"stage.1.batch_tokens": batch_tokens, "data.directory": str(folder / "data")}
    settings |= {"run.log_every": 1, "run.save_every": 10**6, "run.eval_every": 10**6, "run.trackers": []}
    texts = [f"{key}={json.dumps(value).replace(': ', '=')}" for key, value in settings.items()]
    options = [word for text in texts for word in ("--set", text)]
    return [*"-m train.pretrain --config demo --stage 1 --run-dir".split(), str(folder / "run"), *options]


def text_file(folder: Path) -> Path:
    """Documents of random words."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, length))) for length in rng.integers(2, 9, 500)]
    texts = [" ".join(rng.choice(words, 3000)) for _ in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder / "text.jsonl"


def start(command: list[str], cache: Path, how_it_ends: int) -> dict[str, float]:
    """Seconds until the log says each of MARKS; the process is sent the signal after the last.

    Raises ValueError with what it wrote if it ends before.
    """
    environ = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environ |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    began, reached, written = time.perf_counter(), {}, []
    command = [sys.executable, *command]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ, cwd=ROOT) as process:
        assert process.stderr is not None
        for line in process.stderr:
            written.append(line)
            for name, text in MARKS.items():
                if text in line:
                    reached.setdefault(name, time.perf_counter() - began)
            if "first_step" in reached:
                process.send_signal(how_it_ends)
                break
        process.stderr.read()
    if "first_step" not in reached or process.returncode not in (EXIT_PREEMPTED, -signal.SIGKILL):
        raise ValueError(f"the run ended with status {process.returncode}: {' '.join(written[-3:])}")
    return reached


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.restart", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="demo", choices=SHAPES)
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {"empty": [], "filled": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        batch = args.rows * args.length
        command = run_command(folder, SHAPES[args.shape], seq_len=args.length, batch_tokens=batch)
        start(command, folder / "filled", signal.SIGTERM)
        for number in range(args.repeats + 1):
            for kind in found:
                cache = folder / (f"empty-{number}" if kind == "empty" else kind)
                reached = start(command, cache, signal.SIGKILL)
                if number:  # the first round fills the cache of a resumed run and of the disk
                    found[kind].append(reached)
                print(f"{kind}: " + ", ".join(f"{name} {value:.1f} s" for name, value in reached.items()), flush=True)
    rows = [
        {"shape": args.shape, "cache": kind} | {name: spread([times[name] for times in starts], 3) for name in MARKS}
        for kind, starts in found.items()
    ]
    pairs = zip(*found.values(), strict=True)
    ratio = spread([empty["first_step"] / filled["first_step"] for empty, filled in pairs], 3)
    print_results(rows, environment(), ratio=ratio, tokens_a_step=batch)


if __name__ == "__main__":
    run_entry(main)
