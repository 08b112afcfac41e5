"""What one decode dispatch costs on the host: a model of many layers, each too small to take time.

The engine runs once with one step a dispatch and once with several; what a step takes more in the
first is the cost of the dispatch and of reading its token. The target is under 1 ms a step at 32
layers, which an accelerator hides behind a step of 8B.
"""

import argparse
import dataclasses

import jax
from flax import nnx

import llama_jax
from benchmarks.environment import environment, print_results, spread
from benchmarks.shapes import SHAPES, random_tokens
from infer.engine import Engine
from infer.sampling import SamplingParams
from llama_jax.devices import open_devices
from llama_jax.entry import run_entry
from llama_jax.model import Llama

STEPS = 256
MANY = 8  # steps a dispatch, against one


def seconds_a_step(model: Llama, steps_per_dispatch: int, repeats: int) -> list[float]:
    """Of several runs after one that compiles."""
    engine = Engine(model, steps_per_dispatch=steps_per_dispatch)
    prompt = random_tokens(model.cfg.vocab_size, 1, 16)[0].tolist()
    seconds = []
    for _ in range(1 + repeats):
        engine.generate([prompt], SamplingParams(max_new_tokens=STEPS + 1, ignore_eos=True))
        seconds.append(engine.throughput.decode_seconds / STEPS)
    return seconds[1:]


def main() -> None:
    """The command line."""
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine_dispatch", description=description)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    open_devices()
    cfg = dataclasses.replace(SHAPES["tiny"], num_layers=args.layers)
    where = environment()
    with llama_jax.use_mesh("data=1"):
        model = jax.jit(lambda: Llama(cfg, rngs=nnx.Rngs(0), layout="layers"))()
        one, many = (seconds_a_step(model, steps, args.repeats) for steps in (1, MANY))
    # A step takes compute + dispatch / steps, so the difference holds the share 1 - 1 / MANY of a dispatch.
    dispatch = [(a - b) / (1 - 1 / MANY) for a, b in zip(one, many, strict=True)]
    row = {
        "what": f"decode dispatch, {args.layers} layers, {len(jax.tree.leaves(model))} weights",
        "step_ms_at_1_a_dispatch": spread([1e3 * s for s in one]),
        f"step_ms_at_{MANY}_a_dispatch": spread([1e3 * s for s in many]),
        "dispatch_ms": spread([1e3 * s for s in dispatch]),
    }
    print(f"{row['what']}: {row['dispatch_ms']} ms")
    print_results([row], where, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    run_entry(main)
