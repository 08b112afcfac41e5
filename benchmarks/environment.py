"""What a number needs beside it: date, commit, hardware, versions and command."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")


def environment() -> dict:
    """Where and when this runs; versions are those installed."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "llama_jax", "train", "infer")
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit + (" with changes" if changed else ""),
        "hardware": f"{_processor()}, {len(os.sched_getaffinity(0))} cores",
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
        "command": shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return run.stdout.strip() or ("unknown" if run.returncode else "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """The processor's name, and the widest matrix instructions that it has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split("\t: ", 1) for line in (x.replace("\t\t: ", "\t: ") for x in lines) if "\t: " in line)
    flags = fields.get("flags", "").split()
    widest = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags), "")
    return f"{fields.get('model name', platform.processor() or platform.machine())} {widest}".strip()


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, least and greatest of repeated measurements, to so many significant digits."""
    numbers = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.{digits}g}") for name, value in numbers.items()}


def print_results(rows: Sequence[dict], where: dict, **more) -> None:
    """The results as one JSON object, the last line of stdout."""
    print(json.dumps({"rows": list(rows), **more, "environment": where}), flush=True)
