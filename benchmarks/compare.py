"""llama_jax beside transformers on this CPU: prefill, decode and a training step, in one run.

Each library has its own process with the same weights; rounds alternate between them, so that what
else the machine does falls on both. Every row says what share of the machine's own limit it
reaches: products a second for prefill and training, memory bandwidth for decode, both measured in
the same processes. The invariant: a row counts only if both gave the same tokens, or the same loss.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.environment import environment, print_results, spread
from benchmarks.shapes import (
    SHAPES,
    decode_bytes,
    describe,
    prefill_flops,
    train_flops,
    written_weights,
)
from benchmarks.worker import Worker
from llama_jax.entry import run_entry

# What is measured of each shape when --what is not given.
DEFAULT = {
    "demo": ("prefill", "decode1", "decode8", "train"),
    "12m": ("train", "train2048"),
    "100m": ("train", "train2048"),
    "1b": ("prefill", "decode1", "decode8"),
}
REQUESTS = {
    "prefill": {"task": "prefill", "rows": 1, "length": 512},
    "decode1": {"task": "decode", "rows": 1, "length": 64, "steps": 32},
    "decode8": {"task": "decode", "rows": 8, "length": 64, "steps": 32},
    "train": {"task": "train", "length": 512},
    "train2048": {"task": "train", "length": 2048},
}
TRAIN_TOKENS = {"demo": 4096, "12m": 4096}  # of a step; of other shapes 1,024, or one row

PRODUCT_SIZE = 4096
VECTOR_SIZE = 16_384  # 1 GiB of float32, more than any cache

LOSS_TOLERANCE = 1e-3  # relative; Adam's first steps turn rounding of tiny gradients into whole steps

LIBRARIES = ("llama_jax", "transformers")


def measure_shape(shape: str, what: Sequence[str], repeats: int, dtypes: Sequence[str], weights: Path) -> list[dict]:
    """Rows of one shape; prints each when it is known."""
    checkpoint = str(written_weights(shape, weights))
    workers = [
        Worker(f"benchmarks.worker_{name}", checkpoint, "--dtype", dtype)
        for name, dtype in zip(LIBRARIES, dtypes, strict=True)
    ]
    limits = measured_limits(workers, dtypes)
    rows = []
    for name in what:
        request = dict(REQUESTS[name])
        if request["task"] == "train":
            request["rows"] = max(1, TRAIN_TOKENS.get(shape, 1024) // request["length"])
        rows.append({"shape": shape, "what": name, **measure_row(shape, request, repeats, workers, limits)})
        print(table_row(rows[-1]), flush=True)
    for worker in workers:
        worker.close()
    return rows


def measured_limits(workers: Sequence[Worker], dtypes: Sequence[str]) -> list[dict]:
    """FLOP/s of a large product and bytes/s of a matrix times a vector, the best of what runs in this dtype."""
    limits = []
    for worker, dtype in zip(workers, dtypes, strict=True):
        seconds = worker.ask("limits", size=PRODUCT_SIZE, rows=VECTOR_SIZE)
        flops = 2 * PRODUCT_SIZE**3 / seconds["product_seconds"]
        read = num_bytes(dtype) * VECTOR_SIZE**2 / seconds["vector_seconds"]
        limits.append({"dtype": dtype, "flops_per_second": flops, "bytes_per_second": read})
    for library, limit in zip(LIBRARIES, limits, strict=True):
        print(
            f"{library} {limit['dtype']}: product {limit['flops_per_second'] / 1e9:.0f} GFLOP/s, "
            f"matrix times vector {limit['bytes_per_second'] / 1e9:.1f} GB/s",
            flush=True,
        )
    return limits


def num_bytes(dtype: str) -> int:
    """Bytes of one value."""
    return {"float32": 4, "bfloat16": 2}[dtype]


def measure_row(shape: str, request: dict, repeats: int, workers: Sequence[Worker], limits: Sequence[dict]) -> dict:
    """One request asked of both libraries, in turns; the first round warms up and is not counted."""
    warm_up = [worker.ask(**request) for worker in workers]
    rounds = [[worker.ask(**request) for worker in workers] for _ in range(repeats)]
    dtypes = [limit["dtype"] for limit in limits]
    row: dict = {"request": request, "repeats": repeats}
    for i, library in enumerate(LIBRARIES):
        seconds = [answers[i]["seconds"] for answers in rounds]
        units, limit = _work(shape, request, dtypes[i], limits)
        row[library] = {
            "dtype": dtypes[i],
            "tokens_per_second": spread([request["rows"] * _columns(request) / s for s in seconds]),
            "share_of_limit": spread([units / s / limit for s in seconds], 2)["median"],
            "compile_seconds": round(warm_up[i].get("compile_seconds", 0.0), 1),
            "choice": warm_up[i].get("choice", ""),
        }
    row["ratio"] = spread([theirs["seconds"] / ours["seconds"] for ours, theirs in rounds], 3)
    row["answers"] = agreement([warm_up, *rounds])
    row["same"] = row["answers"] <= LOSS_TOLERANCE if request["task"] == "train" else row["answers"] == 1.0
    return row


def _columns(request: dict) -> int:
    return request["steps"] if request["task"] == "decode" else request["length"]


def _work(shape: str, request: dict, dtype: str, limits: Sequence[dict]) -> tuple[float, float]:
    """FLOPs and FLOP/s, or for decode bytes and bytes/s: what a request takes, and the machine's limit."""
    cfg, rows, length = SHAPES[shape], request["rows"], request["length"]
    unit = "bytes_per_second" if request["task"] == "decode" else "flops_per_second"
    limit = max(limit[unit] for limit in limits if unit == "bytes_per_second" or limit["dtype"] == dtype)
    if request["task"] == "decode":
        steps = request["steps"]
        return steps * decode_bytes(cfg, rows, length + steps / 2, num_bytes(dtype)), limit
    return (train_flops if request["task"] == "train" else prefill_flops)(cfg, rows, length), limit


def agreement(rounds: Sequence[Sequence[dict]]) -> float:
    """Share of equal tokens over all rounds or, for losses, the largest relative difference."""
    ours, theirs = (np.array([answers[i]["answer"] for answers in rounds]) for i in (0, 1))
    if ours.dtype.kind == "f":
        return float(np.max(np.abs(ours - theirs) / theirs))
    return float(np.mean(ours == theirs))


def table_row(row: dict) -> str:
    """A row of the table in docs/performance.md."""
    cells = [row["shape"], row["what"]]
    for library in LIBRARIES:
        speed = row[library]["tokens_per_second"]
        cells.append(f"{speed['median']:,.4g} ({speed['min']:,.4g}-{speed['max']:,.4g})")
        cells.append(f"{row[library]['share_of_limit']:.0%}")
    ratio = row["ratio"]
    cells.append(f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})")
    cells.append("same" if row["same"] else f"DIFFERENT {row['answers']:.2g}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=("tiny", "demo", "12m", "100m", "1b"), help="default: all but tiny")
    parser.add_argument(
        "--what", help="some of prefill,decode1,decode8,train,train2048; default: what the shape is for"
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds of each library")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of llama_jax")
    parser.add_argument("--transformers-dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--weights", type=Path, help="where random weights are kept; default: nowhere")
    args = parser.parse_args()
    what = args.what.split(",") if args.what else None
    if unknown := set(what or ()) - set(REQUESTS):
        raise ValueError(f"--what {unknown.pop()}: expected some of {', '.join(REQUESTS)}")
    where, rows = environment(), []
    dtypes = args.dtype, args.transformers_dtype
    with tempfile.TemporaryDirectory() as temporary:
        print("| shape | what | llama_jax tokens/s | of limit | transformers tokens/s | of limit | ratio | answers |")
        print("|---|---|---|---|---|---|---|---|")
        for shape in [args.shape] if args.shape else DEFAULT:
            print(f"{shape}: {describe(SHAPES[shape])}")
            chosen = what or DEFAULT.get(shape, tuple(REQUESTS))
            rows += measure_shape(shape, chosen, args.repeats, dtypes, args.weights or Path(temporary))
    print_results(rows, where)
    wrong = [f"{row['shape']} {row['what']}" for row in rows if not row["same"]]
    if wrong and len(set(dtypes)) == 1:
        raise ValueError(f"the libraries gave different answers, so these rows do not count: {', '.join(wrong)}")


if __name__ == "__main__":
    run_entry(main)
