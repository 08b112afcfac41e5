"""How long a save holds up training, beside a training step and how long the checkpoint takes to be whole.

The state is a shape's parameters and both moments in float32. Each round takes a step alone, begins a save, takes a
step while a thread writes, and waits until the checkpoint is whole; the first round is not counted, because it
compiles, imports and fills the host's memory for the first time.
"""

import argparse
import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax
from benchmarks.environment import environment, print_results, spread
from benchmarks.shapes import OPTIMIZER, SHAPES, constant_rate_stage, random_tokens
from llama_jax.devices import open_devices
from llama_jax.entry import run_entry
from train.checkpoints import Checkpoints, Progress, initial_state
from train.data.packing import Batch
from train.device import put_batch
from train.optimizer import TrainState, make_optimizer, train_step


class Training:
    """A state, and the step of one document a row that takes it further."""

    def __init__(self, shape: str, rows: int, length: int):
        """Fresh weights on the ambient mesh."""
        cfg, optimizer = SHAPES[shape], make_optimizer(OPTIMIZER, constant_rate_stage(length))
        self.state: TrainState = initial_state(cfg, optimizer, 0)
        tokens = random_tokens(cfg.vocab_size, rows, length + 1)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
        ones = np.ones((rows, length), np.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, ones, ones.astype(np.float32))
        self._batch = put_batch(batch, self.state.params.rules)
        step = functools.partial(train_step, optimizer, jnp.dtype("float32"), remat="dots", num_chunks=1)
        self._step = jax.jit(step, donate_argnums=0)

    def step(self) -> None:
        """One step, to its end."""
        self.state, _ = jax.block_until_ready(self._step(self.state, self._batch))


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """How long a call takes, and what it returns."""
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.save", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="100m", choices=SHAPES)
    parser.add_argument("--directory", help="on the disk that is measured; default: TMPDIR")
    parser.add_argument("--mesh", help="default: one device")
    parser.add_argument("--average", action="store_true", help="keep the mean of the checkpoints, too")
    parser.add_argument("--rows", type=int, default=2, help="of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    open_devices()
    rounds: list[dict[str, float]] = []
    with llama_jax.use_mesh(args.mesh or "data=1"), tempfile.TemporaryDirectory(dir=args.directory) as folder:
        training = Training(args.shape, args.rows, args.length)
        training.step()
        checkpoints, progress = Checkpoints(Path(folder), SHAPES[args.shape], keep=1), Progress()
        for step in range(1, args.repeats + 2):
            alone, _ = seconds(training.step)
            progress, began = dataclasses.replace(progress, step=step), time.perf_counter()
            blocked, progress = seconds(lambda p=progress: checkpoints.save(training.state, p, average=args.average))
            beside, _ = seconds(training.step)
            checkpoints.wait()
            whole = time.perf_counter() - began
            rounds.append({"step_s": alone, "blocked_s": blocked, "step_beside_s": beside, "whole_s": whole})
            print(f"round {step}: " + ", ".join(f"{key} {value:.3f}" for key, value in rounds[-1].items()), flush=True)
        num_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    counted = rounds[1:]
    row = {"shape": args.shape, "tokens_a_step": args.rows * args.length, "GB": round(num_bytes / 1e9, 2)}
    row |= {key: spread([values[key] for values in counted], 3) for key in counted[0]}
    row["blocked_share_of_a_step"] = spread([values["blocked_s"] / values["step_s"] for values in counted], 3)
    print_results([row], environment(), mesh=args.mesh, average=args.average)


if __name__ == "__main__":
    run_entry(main)
