"""The training step of a row of the plan's table through the real TPU compiler; skipped where libtpu is not.

Layers are scanned, so the published depth compiles as fast as two layers would.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which holds the TPU compiler, is not installed"
)

GIB = 2**30

# What the program may take at most; docs/tpu-step.md says what it took, and what MaxText's does.
BOUNDS = {
    "8b-v4-64-b1": {"peak": 5.5 * GIB, "matmul": 462e12, "copied": 12.5 * GIB, "moved": 43.5 * GIB, "seconds": 3.0},
}


@pytest.mark.parametrize("row", BOUNDS)
def test_the_step_needs_no_more_memory_work_copies_or_traffic_than_it_did(row):
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_table", "--row", row, "--json"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    found = json.loads(process.stdout.splitlines()[-1])
    moved = sum(size for networks in found["collectives"].values() for size in networks.values())
    measured = {
        "peak": found["hbm_peak_bytes"],
        "matmul": found["matmul_flops_per_chip"],
        "copied": found["copied_bytes"],
        "moved": moved,
        "seconds": found["estimated_step_seconds"],
    }
    assert all(measured[name] <= bound for name, bound in BOUNDS[row].items()), measured
    # Attention's kernels are found and counted: with full remat 11 products over half of all pairs.
    assert found["kernel_flops_per_chip"] == pytest.approx(32 * 11 * 32 * 8192**2 * 128, rel=1e-3)
