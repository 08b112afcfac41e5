"""`--check`: before a long run, is every host, device, link, disk and source of this slice as it should be?

The one invariant: it does what the run will do, on the devices and in the directory that the run will use, and
leaves nothing behind. What each process found goes to all of them, so that all end alike.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax import lax

import llama_jax
from llama_jax.checkpoint.together import together
from llama_jax.devices import open_devices, use_compilation_cache
from llama_jax.entry import say
from llama_jax.mesh import mesh_text, sharding_rules
from llama_jax.paths import make_directory, remove_directory
from llama_jax.peers import Peers
from llama_jax.tokenizer import load_tokenizer
from train.checkpoints import Checkpoints, Progress, initial_state, resumed_state
from train.config import PhaseConfig, TrainConfig
from train.data.inputs import Inputs
from train.data.packing import Batch
from train.device import local_rows, put_batch
from train.faults.watchdog import Watchdog
from train.loop import jit_step
from train.optimizer import TrainState, make_optimizer
from train.preflight.speeds import SLOW_SHARE, link_speeds, matrix_speeds, slow_devices

PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "orbax-checkpoint")

# Variables that change what is compiled or how devices talk.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64", "NCCL_PROTO", "NCCL_ALGO")

_FILE_BYTES = 2**20
_NUM_STEPS = 3


class Finding(NamedTuple):
    """What one check has found, over all processes."""

    name: str
    passed: bool
    detail: str


def check(config: TrainConfig, stage: str, run_dir: Path, *, as_json: bool = False) -> bool:
    """Make every check, print a line each or one JSON object, and say whether all passed.

    Raises what the devices raise, and ValueError if the config has no such stage.
    """
    if stage not in config.stage:
        raise ValueError(f"config {config.name} has no stage {stage!r}; it has {', '.join(config.stage)}")
    use_compilation_cache()
    open_devices()
    findings = []
    with Peers() as peers, Watchdog(config.run.watchdog_seconds, peers):
        for finding in _findings(config, stage, run_dir):
            findings.append(finding)
            if not as_json:
                print(f"{'pass' if finding.passed else 'FAIL'}  {finding.name}: {finding.detail}", flush=True)
    passed = all(finding.passed for finding in findings)
    if as_json:
        print(json.dumps({"passed": passed, "checks": [finding._asdict() for finding in findings]}))
    return passed


def _findings(config: TrainConfig, stage: str, run_dir: Path) -> Iterator[Finding]:
    phase = config.stage[stage].phases[0]
    yield _same(_identity(config, stage))
    yield _found("topology", lambda: _topology(config.stage_mesh(stage)))
    yield _compared("matrix products", matrix_speeds, 1e12, "TFLOP/s")
    yield _compared("links", link_speeds, 1e9, "GB/s")
    with _own_directory(run_dir) as directory:
        yield _found("run directory", lambda: _write(directory))
        yield _found("its sharing", lambda: _read_next(directory))
        batch: list[Batch] = []
        finding = _found("data", lambda: _read_data(config, stage, phase, batch))
        yield finding
        if finding.passed:
            yield _steps(config, stage, phase, batch[0], directory)


def _found(name: str, work: Callable[[], str]) -> Finding:
    """The finding of a check whose work returns a detail, or raises ValueError or OSError, in each process."""
    say(f"checking {name}")

    def outcome() -> str:
        try:
            return json.dumps([True, work()])
        except (ValueError, OSError) as error:
            return json.dumps([False, " ".join(str(error).split())])

    outcomes = [json.loads(text) for text in together(f"check {name}", outcome)]
    failures = {process: detail for process, (passed, detail) in enumerate(outcomes) if not passed}
    if not failures:
        return Finding(name, True, outcomes[0][1])
    alike = len(failures) == len(outcomes) and len(set(failures.values())) == 1
    detail = failures[0] if alike else "; ".join(f"process {p}: {text}" for p, text in failures.items())
    return Finding(name, False, detail)


# Hosts


def _identity(config: TrainConfig, stage: str) -> dict[str, str]:
    """What must be the same in every process, by name."""
    packages = [Path(llama_jax.__file__).parent, Path(__file__).parents[1]]
    files = [path for package in packages for path in sorted(package.rglob("*.py"))]
    versions = dict.fromkeys(PACKAGES, "none")
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "code": _digest(b"".join(path.read_bytes() for path in files)),
        "config": _digest(f"{config} {stage}".encode()),
        "python": sys.version.split()[0],
        **versions,
        **{name: os.environ.get(name, "") for name in VARIABLES},
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _same(identity: Mapping[str, str]) -> Finding:
    """Whether all processes give the same values; those that differ from most are named."""
    told = [json.loads(text) for text in together("check hosts", lambda: json.dumps([socket.gethostname(), identity]))]
    differences = []
    for key in identity:
        common = Counter(values[key] for _, values in told).most_common(1)[0][0]
        differences += [
            f"process {process} ({host}) has {key} {values[key] or 'unset'}, most have {common or 'unset'}"
            for process, (host, values) in enumerate(told)
            if values[key] != common
        ]
    versions = f"jax {identity['jax']}, Python {identity['python']}"
    detail = f"{len(told)} with code {identity['code']}, config {identity['config']}, {versions}"
    return Finding("hosts", not differences, "; ".join(differences) or detail)


# Devices


def _topology(spec: str) -> str:
    """Raises ValueError if the mesh leaves devices out, or they are not alike."""
    devices = jax.devices()
    kinds = Counter(device.device_kind for device in devices)
    counts = Counter(Counter(device.process_index for device in devices).values())
    with llama_jax.use_mesh(spec) as mesh:
        if mesh.size != len(devices):
            raise ValueError(f"mesh {spec} takes {mesh.size} of {len(devices)} devices; give an axis -1")
        if len(kinds) > 1 or len(counts) > 1:
            raise ValueError(f"devices differ: {dict(kinds)}, {' or '.join(map(str, counts))} of them a process")
        return f"{len(devices)} x {next(iter(kinds))} in {jax.process_count()} processes, {mesh_text(mesh)}"


def _compared(name: str, measure: Callable[[], Mapping[int, float]], unit: float, unit_name: str) -> Finding:
    """Whether all devices are about as fast as most."""
    say(f"checking {name}")
    told = together(f"check {name}", lambda: json.dumps(list(measure().items())))
    speeds = {(process, device): speed for process, text in enumerate(told) for device, speed in json.loads(text)}
    if not speeds:
        return Finding(name, True, "one device has none")
    detail = f"{min(speeds.values()) / unit:.3g} to {max(speeds.values()) / unit:.3g} {unit_name} a device"
    if jax.devices()[0].platform == "cpu":
        return Finding(name, True, f"{detail}; not compared, because CPU devices share cores")
    slow = [
        f"device {device} of process {process} reaches {share:.0%} of the median, expected {SLOW_SHARE:.0%}"
        for (process, device), share in slow_devices(speeds).items()
    ]
    return Finding(name, not slow, "; ".join([*slow, detail]))


# The run directory


@contextmanager
def _own_directory(run_dir: Path) -> Iterator[Path]:
    """A new directory in the run's, the same for all processes, which is removed at the end."""
    is_first, was_there = jax.process_index() == 0, run_dir.exists()
    directory = run_dir / f"check-{together('check begins', lambda: secrets.token_hex(4))[0]}"
    try:
        yield directory
        together("check ends", lambda: None)
    finally:
        if is_first:
            remove_directory(directory if was_there else run_dir)


def _content(process: int) -> bytes:
    return np.random.default_rng(process).bytes(_FILE_BYTES)


def _write(directory: Path) -> str:
    """Write and read a file of this process, and remove another. Raises OSError."""
    path, began = directory / str(jax.process_index()), time.perf_counter()
    make_directory(directory)
    path.write_bytes(_content(jax.process_index()))
    if path.read_bytes() != _content(jax.process_index()):
        raise OSError(f"{path} does not hold what was written to it")
    removed = directory / f"{path.name}-removed"
    removed.write_bytes(b"x")
    removed.unlink()
    if removed.exists():
        raise OSError(f"{removed} is there after it was removed")
    return f"{directory.parent}: 1 MiB written and read in {time.perf_counter() - began:.2f} s"


def _read_next(directory: Path) -> str:
    """Read the file of the next process. Raises OSError if it is not there, as on a disk that hosts do not share."""
    process = (jax.process_index() + 1) % jax.process_count()
    path = directory / str(process)
    if not path.exists() or path.read_bytes() != _content(process):
        raise OSError(f"{path}, which process {process} has written, is not seen; give a --run-dir that all share")
    return "each process reads what another has written"


# Training


def _read_data(config: TrainConfig, stage: str, phase: PhaseConfig, batch: list[Batch]) -> str:
    """Read a row of every source and this process's rows of the first batch, which go into `batch`."""
    began = time.perf_counter()
    inputs = Inputs(config, stage, load_tokenizer(config.data.directory))
    sources = inputs.rows(phase)
    for rows in sources.values():
        rows.row(jax.process_index())
    with llama_jax.use_mesh(config.stage_mesh(stage)):
        stream, _ = inputs.stream(phase, Progress(stage=stage), sharding_rules(config.stage_model(stage)))
        with stream:
            batch.append(next(stream))
    return f"{', '.join(sources)}, and a batch of them, in {time.perf_counter() - began:.2f} s"


def _steps(config: TrainConfig, stage: str, phase: PhaseConfig, batch: Batch, directory: Path) -> Finding:
    """Train some steps, save, restore, compare. An error in one process is not caught: the others wait for it."""
    say("checking steps")
    model, num_rows = config.stage_model(stage), config.stage[stage].phase_rows(phase)
    optimizer = make_optimizer(config.optimizer, config.stage[stage])
    with llama_jax.use_mesh(config.stage_mesh(stage)):
        state = initial_state(model, optimizer, config.run.seed)
        rules = state.params.rules
        placed = put_batch(batch, rules, rows=local_rows(num_rows, phase.seq_len, rules), num_rows=num_rows)
        step = jit_step(config, stage, phase=phase, optimizer=optimizer, rules=rules).lower(state, placed).compile()
        seconds, losses = [], []
        for _ in range(_NUM_STEPS):
            began = time.perf_counter()
            state, metrics = step(state, placed)
            losses.append(float(metrics.loss))
            seconds.append(time.perf_counter() - began)
        if not all(map(math.isfinite, losses)):
            return Finding("steps", False, f"losses are {losses}; expected finite ones")
        before, began = _fingerprint(state), time.perf_counter()
        checkpoints = Checkpoints(directory, model, keep=1)
        checkpoints.save(state, Progress(step=_NUM_STEPS, stage=stage, phase_step=_NUM_STEPS))
        checkpoints.wait()
        del state  # makes room for the one that is read
        saved = time.perf_counter() - began
        if _fingerprint(resumed_state(directory, _NUM_STEPS, model, optimizer)) != before:
            return Finding("steps", False, "what was restored is not what was saved; look at the storage")
    detail = (
        f"loss {losses[0]:.3f} to {losses[-1]:.3f}, {min(seconds):.3g} s a step; saved in {saved:.3g} s, "
        f"restored in {time.perf_counter() - began - saved:.3g} s, the same to the bit"
    )
    return Finding("steps", True, detail)


@jax.jit
def _sums(state: TrainState) -> list[jax.Array]:
    """Of each leaf, its bits as integers, each times an odd number of its place, summed modulo 2**32."""

    def weighted_sum(x: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(x, {2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).astype(np.uint32)
        for dim, size in enumerate(x.shape):
            places = 2 * np.arange(size, dtype=np.uint32) + 2 * dim + 1
            bits = bits * places.reshape(-1, *[1] * (x.ndim - dim - 1))
        return bits.sum(dtype=np.uint32)

    return [weighted_sum(leaf) for leaf in jax.tree.leaves(state)]


def _fingerprint(state: TrainState) -> list[int]:
    return [int(total) for total in _sums(state)]
