"""Loading a checkpoint beside the speed of the disk under it and safetensors' own loader into numpy.

Cold drops the files from the page cache before each reading (posix_fadvise), warm reads them once before.
GB/s are bytes of the files by the wall clock, from opening to weights that are ready on the devices.
"""

import argparse
import functools
import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

import llama_jax
from benchmarks.environment import environment, print_results, spread
from llama_jax.checkpoint import open_checkpoint
from llama_jax.devices import open_devices
from llama_jax.entry import run_entry

BLOCK_BYTES = 32 * 2**20
THREADS = 8


def read_plainly(files: list[Path]) -> None:
    """Read every byte into a buffer that is thrown away: what the disk or the page cache can do."""
    blocks = [(file, start) for file in files for start in range(0, file.stat().st_size, BLOCK_BYTES)]

    def read(part: list[tuple[Path, int]]) -> None:
        buffer = bytearray(BLOCK_BYTES)
        for file, start in part:
            with open(file, "rb", buffering=0) as opened:
                opened.seek(start)
                opened.readinto(buffer)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, (blocks[i::THREADS] for i in range(THREADS))))


def load_with_safetensors(files: list[Path]) -> None:
    """The reference package, a file at a time, into numpy (it needs ml_dtypes for bfloat16)."""
    from safetensors.numpy import load_file

    for file in files:
        load_file(file)


def load_model(path: Path, dtype: str | None, layout: str) -> None:
    """Ours, until the weights are on the devices."""
    jax.block_until_ready(llama_jax.load(path, dtype=dtype, layout=layout))  # pyright: ignore[reportArgumentType]


def drop_from_cache(files: list[Path]) -> None:
    """Let the page cache forget the files; it keeps what someone has mapped."""
    for file in files:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(work: Callable[[], None], files: list[Path], *, cold: bool, repeats: int) -> list[float]:
    """GB/s of each repeat."""
    num_bytes = sum(file.stat().st_size for file in files)
    rates = []
    for _ in range(repeats):
        gc.collect()
        if cold:
            drop_from_cache(files)
        start = time.perf_counter()
        work()
        rates.append(num_bytes / (time.perf_counter() - start) / 1e9)
    return rates


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="directory in any format, or GGUF file")
    parser.add_argument("--cpu-devices", type=int, help="run on so many CPU devices")
    parser.add_argument("--mesh", help="default: the one that inference takes")
    parser.add_argument("--dtype")
    parser.add_argument("--layout", default="layers", choices=("stacked", "layers"))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    open_devices()
    found = open_checkpoint(args.checkpoint).directory
    files = [found] if found.is_file() else sorted(path for path in found.rglob("*") if path.is_file())
    if args.mesh:
        jax.set_mesh(llama_jax.make_mesh(args.mesh))
    works = {"disk": functools.partial(read_plainly, files)}
    if weights := [file for file in files if file.suffix == ".safetensors"]:
        works["safetensors.numpy"] = functools.partial(load_with_safetensors, weights)
    works["llama_jax.load"] = functools.partial(load_model, args.checkpoint, args.dtype, args.layout)
    where, rows = environment(), []
    for cold in (False, True):
        read_plainly(files)
        for name, work in works.items():
            rates = spread(measure(work, files, cold=cold, repeats=args.repeats), 3)
            rows.append({"what": name, "cache": "cold" if cold else "warm", "GB_per_s": rates})
            print(f"{name:>18}, {rows[-1]['cache']}: {rates['median']:.2f} GB/s", flush=True)
    print_results(rows, where, num_devices=jax.device_count(), layout=args.layout, mesh=args.mesh)


if __name__ == "__main__":
    run_entry(main)
