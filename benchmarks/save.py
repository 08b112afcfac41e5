"""How long a save holds up training, beside how long the checkpoint takes to be whole.

The state is a shape's parameters and both moments in float32; the first save is not counted, because it
imports and fills the host's memory for the first time.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import jax

import llama_jax
from benchmarks.environment import environment, print_results, spread
from benchmarks.shapes import OPTIMIZER, SHAPES, constant_rate_stage
from llama_jax.entry import run_entry
from train.checkpoints import Checkpoints, Progress, initial_state
from train.optimizer import make_optimizer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.save", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="100m", choices=SHAPES)
    parser.add_argument("--directory", help="on the disk that is measured; default: TMPDIR")
    parser.add_argument("--mesh", help="default: one device")
    parser.add_argument("--average", action="store_true", help="keep the mean of the checkpoints, too")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cfg, optimizer = SHAPES[args.shape], make_optimizer(OPTIMIZER, constant_rate_stage(512))
    blocked, whole = [], []
    with llama_jax.use_mesh(args.mesh or "data=1"), tempfile.TemporaryDirectory(dir=args.directory) as folder:
        state = jax.block_until_ready(initial_state(cfg, optimizer, 0))
        checkpoints, progress = Checkpoints(Path(folder), cfg, keep=1), Progress()
        for step in range(1, args.repeats + 2):
            progress = dataclasses.replace(progress, step=step)
            start = time.perf_counter()
            progress = checkpoints.save(state, progress, average=args.average)
            blocked.append(time.perf_counter() - start)
            checkpoints.wait()
            whole.append(time.perf_counter() - start)
        num_bytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    row = {"shape": args.shape, "GB": round(num_bytes / 1e9, 2), "blocked_s": spread(blocked[1:], 3)}
    print_results([row | {"whole_s": spread(whole[1:], 3)}], environment(), mesh=args.mesh, average=args.average)


if __name__ == "__main__":
    run_entry(main)
