"""How long a call takes from the first of two processes to the second and back, by each way that there is.

The call is a decode dispatch of 64 rows of 32 pages, as `infer/hosts.py` sends one for every round. Beside TCP: the
key-value store of jax.distributed, and a broadcast by the devices, which would also wait for what runs on them.
"""

import argparse
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from benchmarks.environment import ROOT, environment, print_results, spread
from infer.hosts import Call, Hosts
from llama_jax.devices import open_devices
from llama_jax.entry import run_entry
from tests.processes import free_address

CALL = ("decode", (np.zeros((64, 32), np.int32), np.zeros(64, np.int32)))
TIMEOUT_MS = 60_000


def timed(repeats: int, call: Callable[[int], object]) -> list[float]:
    """Microseconds of each of several calls, after some that are not counted."""
    seconds = []
    for i in range(-20, repeats):
        began = time.perf_counter()
        call(i)
        seconds.append(1e6 * (time.perf_counter() - began))
    return seconds[20:]


def by_tcp(hosts: Hosts, calls: Iterator[Call]) -> Callable[[int], object]:
    if hosts.leads:
        return lambda _: (hosts.tell(*CALL), hosts.answers())
    return lambda _: (next(calls), hosts.answer(None))


def sending_alone(hosts: Hosts, calls: Iterator[Call]) -> Callable[[int], object]:
    return lambda _: hosts.tell(*CALL) if hosts.leads else next(calls)


def by_store(hosts: Hosts, calls: Iterator[Call]) -> Callable[[int], object]:
    del calls
    client = distributed.global_state.client

    def there(i: int) -> None:
        client.key_value_set_bytes(f"there/{i}", pickle.dumps(CALL))
        client.blocking_key_value_get_bytes(f"back/{i}", TIMEOUT_MS)

    def back(i: int) -> None:
        pickle.loads(client.blocking_key_value_get_bytes(f"there/{i}", TIMEOUT_MS))
        client.key_value_set_bytes(f"back/{i}", b"")

    return there if hosts.leads else back


def by_devices(hosts: Hosts, calls: Iterator[Call]) -> Callable[[int], object]:
    del hosts, calls
    return lambda _: multihost_utils.broadcast_one_to_all(CALL[1])


def measure(repeats: int) -> None:
    open_devices()
    where = environment()
    rows = []
    with Hosts() as hosts:
        calls = hosts.calls()
        for way in (by_tcp, sending_alone, by_store, by_devices):
            rows.append({"what": way.__name__, "microseconds": spread(timed(repeats, way(hosts, calls)))})
        if hosts.leads:
            print_results(rows, where, device=jax.devices()[0].device_kind)
        else:
            assert not list(calls)  # until the first parts


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=500)
    args = parser.parse_args()
    if "JAX_PROCESS_ID" in os.environ:
        return measure(args.repeats)
    own = {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": free_address(), "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", "benchmarks.hosts", *sys.argv[1:]]
    environments = [os.environ | own | {"JAX_PROCESS_ID": process} for process in "01"]
    processes = [subprocess.Popen(command, cwd=ROOT, env=variables) for variables in environments]
    sys.exit(max(process.wait() for process in processes))


if __name__ == "__main__":
    run_entry(main)
