"""The training step and decoding on slices that are not here, beside what others compile and publish.

Each row is one workload of the shipped configs on one slice, compiled as `--plan` does. Time, for
MaxText as for us, is one measure: the compiler's cycles over the clock, plus the FLOPs of attention
kernels at 60 % of peak, plus the bytes of blocking collectives over the links. MaxText's figures are
of its commit e591f30cb (2026-08-22), compiled with jax 0.10.2 and libtpu 0.0.42. The invariant: a row
of ours is one program, its memory and its time together.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import environment
from infer.plan import GenerationPlan, plan_generation
from infer.workload import Workload
from llama_jax.chips import GIB
from llama_jax.config import PRESETS
from llama_jax.entry import run_entry
from llama_jax.plan import KERNEL_EFFICIENCY, Plan, table
from llama_jax.slices import parse_slice
from train.config import read_config
from train.plan import plan_phase


@dataclass(frozen=True)
class Published:
    """MaxText's program: GiB of a chip, TFLOP of matrix products, seconds of cycles, GiB moved.

    products: those of attention that its kernels compute, of which a model counts 6: 11 where nothing is saved, 2 fewer
    where attention's result is, 2 fewer where one kernel computes all gradients. overlapped: by its compiler options
    the gathers ride along with products, as ours do.
    """

    settings: str
    peak: float
    matmul: float
    cycles: float
    gathered: float = 0.0
    reduced: float = 0.0
    products: int = 11
    overlapped: bool = False


@dataclass(frozen=True)
class Training:
    """A step of a preset on a slice: rows of seq_len in all, and how they are computed."""

    preset: str
    slice: str
    rows: int
    seq_len: int
    mesh: str
    remat: str = "full"
    loss_chunks: int = 6
    micro_batch_tokens: int = 0
    peers: tuple[Published, ...] = ()


@dataclass(frozen=True)
class Serving:
    """A batch of one prompt of a preset on a slice, in bfloat16 or with weights in the few bits of a scheme."""

    preset: str
    slice: str
    context: int
    mesh: str
    quantize: str | None = None


_FULL_8B = Published("default", 8.57, 452.4, 2.229, 28.2, 14.0)
_FULL_405B = Published("offload of 31.5 GiB, vocab tiling; upper bound", 16.6, 24780, 107.69, 1635.7, 783.4)

TRAINING = {
    "8b-v4-64-b1": Training(
        "llama3.1-8b",
        "v4:4x4x4",
        64,
        8192,
        "fsdp=64",
        peers=(_FULL_8B, Published("num_vocab_tiling=8", 5.68, 478.3, 2.389, 43.9, 21.8)),
    ),
    "8b-v4-64-b1-fast": Training(
        "llama3.1-8b",
        "v4:4x4x4",
        64,
        8192,
        "fsdp=64",
        remat="dots",
        peers=(Published("minimal_with_context", 28.62, 386.1, 1.973, 28.9, 15.0, 9),),
    ),
    "8b-v4-64-b2": Training(
        "llama3.1-8b",
        "v4:4x4x4",
        128,
        8192,
        "fsdp=64",
        remat="attention",
        peers=(Published("default", 14.55, 904.9, 4.463, 27.0, 14.0),),
    ),
    "8b-v4-64-b4": Training(
        "llama3.1-8b",
        "v4:4x4x4",
        256,
        8192,
        "fsdp=64",
        remat="attention",
        peers=(Published("default", 26.50, 1809.7, 8.658, 27.0, 14.0),),
    ),
    "8b-v5p-64-b2": Training(
        "llama3.1-8b",
        "v5p:4x4x4",
        128,
        8192,
        "fsdp=64",
        remat="attention",
        peers=(Published("default", 14.54, 904.9, 2.793, 27.0, 14.0),),
    ),
    "8b-v4-64-128k": Training(
        "llama3.1-8b",
        "v4:4x4x4",
        4,
        131_072,
        "fsdp=4,context=16",
        remat="attention",
        peers=(Published("default, all-gather", 8.57, 452.4, 2.900, 61.5, 31.0),),
    ),
    "70b-v4-128-b1": Training(
        "llama3.1-70b",
        "v4:4x4x8",
        128,
        8192,
        "fsdp=128",
        peers=(Published("default", 25.26, 4229.8, 19.092, 268.2, 129.5),),
    ),
    "70b-v5p-128-b2": Training(
        "llama3.1-70b",
        "v5p:4x4x8",
        256,
        8192,
        "fsdp=128",
        remat="offload_qkv",
        peers=(
            Published("recipe, 45 GiB offloaded; upper bound", 22.0, 8337, 20.056, 260.5, 131.4, 9, overlapped=True),
        ),
    ),
    "70b-v5p-128-128k": Training(
        "llama3.1-70b",
        "v5p:4x4x8",
        8,
        131_072,
        "fsdp=8,context=16",
        remat="offload_qkv",
        peers=(
            Published("recipe, 32.5 GiB offloaded; upper bound", 26.3, 4080, 13.30, 341.0, 171.4, 9, overlapped=True),
        ),
    ),
    "405b-v4-2048-b1": Training(
        "llama3.1-405b", "v4:8x16x16", 2048, 8192, "fsdp=1024,tensor=2", remat="offload", peers=(_FULL_405B,)
    ),
    "405b-v5p-512-b2": Training(
        "llama3.1-405b",
        "v5p:8x8x8",
        1024,
        8192,
        "fsdp=512",
        remat="offload",
        peers=(Published("recipe, 64 GiB offloaded; under", 95.0, 50660, 116.76, 1545.2, 767.7, 9, overlapped=True),),
    ),
    "405b-v4-2048-128k": Training("llama3.1-405b", "v4:8x16x16", 128, 131_072, "fsdp=128,context=16", remat="offload"),
}

SERVING = {
    "-".join(filter(None, ("serve", size, quantize, kind, str(chips), name))): Serving(
        f"llama3.1-{size}", f"{kind}:{shape}", context, f"tensor={chips}", quantize
    )
    for size, quantize, kind, shape, chips in (
        ("8b", None, "v4", "1x1x1", 1),
        ("8b", None, "v5e", "2x2", 4),
        ("8b", None, "v5e", "2x4", 8),
        ("70b", None, "v4", "2x2x2", 8),
        ("70b", None, "v4", "2x2x4", 16),
        ("405b", None, "v4", "2x4x4", 32),
        ("405b", None, "v5p", "2x2x4", 16),
        ("8b", "int8", "v4", "1x1x1", 1),
        ("8b", "int8", "v5e", "1x1", 1),
        ("70b", "int8", "v5e", "2x4", 8),
        ("70b", "int4", "v5e", "2x4", 8),
        ("405b", "int8", "v4", "2x4x4", 32),
        ("405b", "int8", "v5p", "2x2x4", 16),
    )
    for name, context in (("8k", 8192), ("128k", 131_072))
}


def plan_training(row: Training, hlo: Path | None = None) -> Plan:
    """Compile the row's step."""
    settings = {
        "run.mesh": row.mesh,
        "run.remat": row.remat,
        "run.loss_chunks": row.loss_chunks,
        "run.micro_batch_tokens": row.micro_batch_tokens,
        "stage.1.batch_tokens": row.rows * row.seq_len,
        "stage.1.phases": [{"seq_len": row.seq_len, "tokens": 10**12}],
    }
    config = read_config(row.preset, settings)
    return plan_phase(config, "1", config.stage["1"].phases[0], parse_slice(row.slice), hlo=hlo)


def plan_serving(row: Serving, hlo: Path | None = None) -> GenerationPlan:
    """Compile the row's prefill and decode, of a prompt that leaves room for 128 tokens."""
    work = Workload(
        PRESETS[row.preset],
        "bfloat16",
        1,
        row.context - 128,
        row.context,
        {"steps_per_dispatch": 1},
        quantize=row.quantize,
    )
    return plan_generation(work, parse_slice(row.slice), row.mesh, hlo=hlo)


def peer_seconds(row: Training, peer: Published) -> float:
    """Seconds of MaxText's step by the measure that holds for both."""
    target = parse_slice(row.slice)
    chip = target.chip
    cfg = PRESETS[row.preset]
    # Of each product half: what a causal mask hides is not computed.
    kernels = peer.products * cfg.num_layers * cfg.num_heads * cfg.head_dim * row.seq_len * row.rows * row.seq_len
    kernels /= target.num_chips
    links = 2 * len([side for side in target.shape if side > 1]) * chip.link_bandwidth
    moved = GIB * (peer.gathered * (not peer.overlapped) + 2 * peer.reduced)
    return peer.cycles + kernels / (KERNEL_EFFICIENCY * chip.flops) + moved / links


def moved_bytes(found: Plan, kind: str) -> float:
    """GiB of one kind of collective a chip and step."""
    return sum(found.collectives.get(kind, {}).values()) / GIB


def training_lines(name: str, row: Training, found: Plan) -> list[tuple[str, ...]]:
    """Our program and MaxText's: peak GiB, matmul TFLOP, seconds, GiB gathered and reduced."""
    reduced = moved_bytes(found, "all-reduce") + moved_bytes(found, "reduce-scatter")
    ours = (
        f"llama_jax, {found.mesh}, {row.remat}",
        f"{found.hbm_peak_bytes / GIB:.2f}" + ("" if found.fits else " does NOT fit"),
        f"{(found.matmul_flops_per_chip or 0) / 1e12:,.1f}",
        f"{found.estimated_step_seconds or 0:.2f}",
        f"{moved_bytes(found, 'all-gather'):,.1f} / {reduced:,.1f}",
    )
    lines: list[tuple[str, ...]] = [(name, *ours)]
    for peer in row.peers:
        time = f"{peer_seconds(row, peer):.2f}"
        moved = f"{peer.gathered:,.1f} / {peer.reduced:,.1f}"
        lines.append(("", f"MaxText, {peer.settings}", f"{peer.peak:.2f}", f"{peer.matmul:,.1f}", time, moved))
    return lines


def serving_line(name: str, found: GenerationPlan) -> tuple[str, ...]:
    """A row of decoding in the columns of `training_lines`, of which three do not apply."""
    fits = "" if found.fits else " does NOT fit"
    step, least = found.decode.estimated_step_seconds, found.decode_read_seconds
    time = f"{1e3 * (step or 0):.2f} ms, bytes {1e3 * (least or 0):.2f} ms"
    few = f", weights in {found.quantize}" if found.quantize else ""
    return name, f"llama_jax, {found.mesh}, decode{few}", f"{found.hbm_peak_bytes / GIB:.2f}{fits}", "", time, ""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_table", description="Planned rows beside MaxText's."
    )
    rows = {**TRAINING, **SERVING}
    parser.add_argument("--row", action="append", choices=rows, metavar="ID", help=f"of {', '.join(rows)}")
    parser.add_argument("--hlo", type=Path, metavar="F", help="write the compiled module's text there, of one row")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    args = parser.parse_args(argv)
    names = args.row or list(rows)
    if args.hlo and len(names) > 1:
        parser.error("--hlo is for one --row")
    lines: list[tuple[str, ...]] = [("row", "program", "peak GiB", "matmul TF", "s", "AG / AR GiB")]
    for name in names:
        row = rows[name]
        found = plan_training(row, args.hlo) if isinstance(row, Training) else plan_serving(row, args.hlo)
        if args.json:
            peers = [dataclasses.asdict(p) | {"seconds": peer_seconds(row, p)} for p in getattr(row, "peers", ())]
            print(json.dumps({"row": name, **dataclasses.asdict(found), "peers": peers, "environment": environment()}))
        elif isinstance(found, GenerationPlan):
            lines.append(serving_line(name, found))
        else:
            lines += training_lines(name, row, found)
    if not args.json:
        print(table(lines))


if __name__ == "__main__":
    run_entry(main)
