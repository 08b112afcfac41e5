"""llama_jax alone on one GPU or TPU chip: decode against memory bandwidth, prefill and training against FLOP/s.

Random weights, bfloat16 (optimizer state float32). The limit is the one that the maker states for
the device; what this device really gives to one large product is measured beside it. Attention is
splash on a TPU and XLA's own in blocks on a GPU. With --shape tiny the same code runs on a CPU.
"""

import argparse

import jax
import jax.numpy as jnp
from flax import nnx

import llama_jax
from benchmarks.environment import environment, print_results, spread
from benchmarks.shapes import SHAPES, decode_bytes, describe, prefill_flops, train_flops
from benchmarks.worker_llama_jax import Inference, Training, product_limits
from llama_jax.chips import CHIPS
from llama_jax.config import LlamaConfig
from llama_jax.devices import open_devices
from llama_jax.entry import run_entry
from llama_jax.model import Llama
from llama_jax.slices import chip_kind

DECODE_ROWS = (1, 8, 32)
DECODE_LENGTH, DECODE_STEPS = 512, 64
PREFILL_LENGTHS = (512, 2048, 8192)
TRAIN_ROWS, TRAIN_LENGTH = 8, 2048


def peaks(device: jax.Device) -> tuple[float, float] | None:
    """FLOP/s and bytes/s of a device, None where they are not known."""
    chip = CHIPS[chip_kind(device)]
    return (chip.flops, chip.hbm_bandwidth) if chip.flops else None


def random_model(cfg: LlamaConfig, layout: str, dtype: str) -> Llama:
    """Fresh weights on the ambient mesh."""

    def init() -> Llama:
        model = Llama(cfg, rngs=nnx.Rngs(0), layout=layout)  # type: ignore[arg-type]
        return jax.tree.map(lambda w: w.astype(dtype), model)

    return jax.jit(init)()


def row(what: str, tokens: int, work: float, answers: list[dict], limit: float | None) -> dict:
    """Speed and share of the limit from repeated answers, the first of which warmed up."""
    seconds = [answer["seconds"] for answer in answers[1:]]
    measured = {
        "what": what,
        "tokens_per_second": spread([tokens / s for s in seconds]),
        "work_per_second": spread([work / s for s in seconds])["median"],
        "share_of_peak": spread([work / s / limit for s in seconds], 3) if limit else None,
        "compile_seconds": round(answers[0]["compile_seconds"], 1),
    }
    share = f"{measured['share_of_peak']['median']:.1%} of peak" if limit else "no known peak"
    print(f"{what}: {measured['tokens_per_second']} tokens/s, {share}", flush=True)
    return measured


def inference_rows(cfg: LlamaConfig, dtype: str, repeats: int, peak: tuple[float, float] | None) -> list[dict]:
    """Decode at several batch sizes and prefill at several lengths."""
    inference = Inference(random_model(cfg, "layers", dtype))
    flops, bandwidth = peak or (None, None)
    rows = []
    for count in DECODE_ROWS:
        context = DECODE_LENGTH + DECODE_STEPS / 2
        work = DECODE_STEPS * decode_bytes(cfg, count, context, jnp.dtype(dtype).itemsize)
        answers = [inference.decode(count, DECODE_LENGTH, DECODE_STEPS) for _ in range(1 + repeats)]
        rows.append(row(f"decode batch {count}", count * DECODE_STEPS, work, answers, bandwidth))
    for length in [n for n in PREFILL_LENGTHS if n < cfg.max_seq_len]:
        answers = [inference.prefill(1, length) for _ in range(1 + repeats)]
        rows.append(row(f"prefill {length}", length, prefill_flops(cfg, 1, length), answers, flops))
    return rows


def train_row(cfg: LlamaConfig, dtype: str, repeats: int, peak: tuple[float, float] | None) -> dict:
    """A training step as the entries run it; the FLOPs that remat repeats are not counted."""
    rows, length = TRAIN_ROWS, min(TRAIN_LENGTH, cfg.max_seq_len)
    params = random_model(cfg, "stacked", "float32")
    training = Training(params, rows, length, compute_dtype=jnp.dtype(dtype), remat="full", num_chunks=8)
    answers = [training.step() for _ in range(1 + repeats)]
    what = f"train {rows} x {length}"
    return row(what, rows * length, train_flops(cfg, rows, length), answers, peak[0] if peak else None)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="8b", choices=tuple(SHAPES), help="of decode and prefill")
    parser.add_argument("--train-shape", choices=tuple(SHAPES), help="of the training step; default: 1b, or tiny")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    train_shape = args.train_shape or ("tiny" if args.shape == "tiny" else "1b")
    device = open_devices()[0]
    if device.platform == "cpu" and (args.shape, train_shape) != ("tiny", "tiny"):
        raise ValueError("JAX sees no accelerator, only a CPU; install llama_jax[cuda] or [tpu], or use --shape tiny")
    where, peak = environment(), peaks(device)
    print(f"{device.device_kind}: " + (f"{peak[0] / 1e12:.0f} TFLOP/s, {peak[1] / 1e12:.2f} TB/s" if peak else "-"))
    size, vector = (256, 1024) if device.platform == "cpu" else (8192, 32_768)
    seconds = product_limits(args.dtype, size, vector)
    limits = {
        "product_flops_per_second": 2 * size**3 / seconds["product_seconds"],
        "vector_bytes_per_second": jnp.dtype(args.dtype).itemsize * vector**2 / seconds["vector_seconds"],
    }
    print(f"measured: {limits}", flush=True)
    with llama_jax.use_mesh("data=1"):
        rows = [{"shape": args.shape, **r} for r in inference_rows(SHAPES[args.shape], args.dtype, args.repeats, peak)]
        rows.append({"shape": train_shape, **train_row(SHAPES[train_shape], args.dtype, args.repeats, peak)})
    shapes = {shape: describe(SHAPES[shape]) for shape in (args.shape, train_shape)}
    print_results(rows, where, device=device.device_kind, dtype=args.dtype, peak=peak, measured=limits, shapes=shapes)


if __name__ == "__main__":
    run_entry(main)
