"""Planned steps beside published runs of the same model, chips, sequence length and rows a chip, in bfloat16.

The published runs are of other programs (MaxText's, some offloading activations to the host): a difference is that
of two programs and of an estimate together. Sources are pages of AI-Hypercomputer's repositories on GitHub, by
their names there. The invariant: a row of ours is one program that was compiled, and its own estimate.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from llama_jax.chips import GIB
from llama_jax.entry import run_entry
from llama_jax.plan import Plan, table
from llama_jax.slices import parse_slice
from train.config import read_config
from train.plan import plan_phase


@dataclass(frozen=True)
class Published:
    """A run of rows of seq_len tokens in all on a slice, and what was reported of it.

    reported: tokens a second and chip, or, below 1, the share of the chip's peak. vocab_size is 32,000 for Llama 2.
    part_tokens: tokens of a micro-batch on a device, 0 for all at once.
    """

    preset: str
    slice: str
    rows: int
    seq_len: int
    reported: float
    source: str
    mesh: str = "fsdp=-1"
    vocab_size: int = 128_256
    part_tokens: int = 0

    @property
    def settings(self) -> dict:
        """Those of the shipped config that make it this run."""
        return {
            "model.vocab_size": self.vocab_size,
            "run.mesh": self.mesh,
            "run.remat": "full",
            "run.loss_chunks": 2 if self.vocab_size < 100_000 else 6,
            "run.micro_batch_tokens": self.part_tokens,
            "stage.1.batch_tokens": self.rows * self.seq_len,
            "stage.1.phases": [{"seq_len": self.seq_len, "tokens": 10**12}],
        }


_LLAMA2 = "maxtext getting_started/Run_Llama2.md"
_TIERS = "maxtext docs/reference/models/tiering.md"
_IRONWOOD = "tpu-recipes training/ironwood/README.md"

ROWS = {
    "llama2-70b-v4-64": Published("llama3.1-70b", "v4:4x4x4", 128, 4096, 0.57, _LLAMA2, vocab_size=32_000),
    "llama2-70b-v5p-512": Published("llama3.1-70b", "v5p:8x8x8", 2048, 4096, 692, _TIERS, vocab_size=32_000),
    "llama2-70b-v5e-256": Published(
        "llama3.1-70b", "v5e:16x16", 512, 4096, 0.57, _LLAMA2, vocab_size=32_000, part_tokens=4096
    ),
    "llama2-70b-v6e-256": Published(
        "llama3.1-70b", "v6e:16x16", 1024, 4096, 900, _TIERS, vocab_size=32_000, part_tokens=8192
    ),
    "8b-v6e-8": Published("llama3.1-8b", "v6e:2x4", 16, 8192, 7139, "tpu-recipes training/trillium"),
    "8b-v6e-256": Published("llama3.1-8b", "v6e:16x16", 1024, 8192, 7207, _TIERS),
    "70b-v6e-256": Published("llama3.1-70b", "v6e:16x16", 1280, 8192, 960, _TIERS, part_tokens=8192),
    "70b-tpu7x-64": Published("llama3.1-70b", "tpu7x:4x4x4", 256, 8192, 2687, _IRONWOOD),
    "405b-tpu7x-256": Published("llama3.1-405b", "tpu7x:4x8x8", 1536, 8192, 500, _IRONWOOD, part_tokens=8192),
    "70b-128k-tpu7x-256": Published(
        "llama3.1-70b", "tpu7x:4x8x8", 64, 131_072, 963, _IRONWOOD, mesh="fsdp=64,context=8"
    ),
    "70b-h200-256": Published("llama3.1-70b", "32xh200:8", 512, 8192, 1056, "gpu-recipes training/a3ultra"),
}


def plan_row(row: Published) -> tuple[Plan, float | None]:
    """The program of our step, and what it is planned to reach, in the unit of what was reported."""
    config, target = read_config(row.preset, row.settings), parse_slice(row.slice)
    found = plan_phase(config, "1", config.stage["1"].phases[0], target)
    if found.estimated_step_seconds is None or not found.fits:
        return found, None
    if row.reported < 1:
        return found, found.estimated_mfu
    chips = found.chips / target.chip.devices
    return found, row.rows * row.seq_len / found.estimated_step_seconds / chips


def line(name: str, row: Published, found: Plan, planned: float | None) -> tuple[str, ...]:
    """A row of the table."""

    def shown(value: float) -> str:
        return f"{value:.1%} of peak" if row.reported < 1 else f"{value:,.0f} tokens/s"

    memory = f"{found.hbm_peak_bytes / GIB:.1f} of {found.hbm_capacity_bytes / GIB:.1f}"
    if planned is None:
        return name, row.slice, memory, "does not fit", shown(row.reported), "", row.source
    return (
        name,
        row.slice,
        memory,
        shown(planned),
        shown(row.reported),
        f"{planned / row.reported - 1:+.0%}",
        row.source,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_published", description="Planned steps beside published runs."
    )
    parser.add_argument("--row", action="append", choices=ROWS, metavar="ID", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row")
    args = parser.parse_args(argv)
    lines: list[tuple[str, ...]] = [("row", "slice", "GiB a device", "planned", "reported", "difference", "source")]
    for name in args.row or ROWS:
        found, planned = plan_row(ROWS[name])
        lines.append(line(name, ROWS[name], found, planned))
        if args.json:
            print(
                json.dumps(
                    {
                        "row": name,
                        "planned": planned,
                        "reported": ROWS[name].reported,
                        "source": ROWS[name].source,
                        "peak_bytes": found.hbm_peak_bytes,
                        "compute_seconds": found.estimated_compute_seconds,
                        "collective_seconds": found.estimated_collective_seconds,
                        "step_seconds": found.estimated_step_seconds,
                        "compile_seconds": found.compile_seconds,
                    }
                ),
                flush=True,
            )
    if not args.json:
        print(table(lines))


if __name__ == "__main__":
    run_entry(main)
