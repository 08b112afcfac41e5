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
    "8b-v4-64-b1": {"peak": 6.0 * GIB, "matmul": 462e12, "copied": 12.5 * GIB, "moved": 43.5 * GIB, "seconds": 2.9},
    "8b-v4-64-b2": {"peak": 13.2 * GIB, "matmul": 923e12, "copied": 24 * GIB, "moved": 43.5 * GIB, "seconds": 5.45},
}

# Products over half of all pairs that attention's kernels compute: 11 a row of a chip, and 9 where its result is kept.
PRODUCTS = {"8b-v4-64-b1": 11, "8b-v4-64-b2": 2 * 9}


@pytest.mark.parametrize("row", ["8b-v4-64-b1", pytest.param("8b-v4-64-b2", marks=pytest.mark.slow)])
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
    assert found["kernel_flops_per_chip"] == pytest.approx(32 * PRODUCTS[row] * 32 * 8192**2 * 128, rel=1e-3)
