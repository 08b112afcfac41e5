"""Python processes of their own, for tests of several processes and of what a fresh one does; waiting for them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_address() -> str:
    """A port of this machine where processes can meet."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait until something is so; a machine with other work has long to make it so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def start_python(code: str, *args) -> subprocess.Popen:
    """A fresh Python with this project, on CPU."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def outputs(*processes: subprocess.Popen) -> list:
    """What each printed as JSON; fails with what any wrote to stderr."""
    try:
        results = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * len(processes), [errors for _, errors in results]
    # gloo prints lines of its own to stdout, before ours or after.
    said = [[line for line in printed.splitlines() if not line.startswith("[Gloo]")] for printed, _ in results]
    return [json.loads(lines[-1]) for lines in said]
