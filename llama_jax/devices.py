"""Open the devices of a run, or say in one line why they cannot be used.

The invariant: hardware that is there but that jax does not use is an error and not a slow run on
the CPU, unless the CPU was asked for (JAX_PLATFORMS=cpu). jax is imported when devices are opened
and not before.
"""

import contextlib
import importlib.util
import os
import shlex
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_jax.config import PRESETS, LlamaConfig
from llama_jax.paths import cache_directory

if TYPE_CHECKING:
    from jax.sharding import Mesh

# Seconds that opening devices may take before the user is told what it may be waiting for.
PATIENCE = 20.0

_GOOGLE = "0x1ae0"
_STORAGE_OR_NETWORK = ("0x01", "0x02")  # PCI classes: Google makes disks and network cards, too

_INSTALL = "jax cannot use it: python -m pip install 'jax[{}]'"
_ON_CPU = "set JAX_PLATFORMS=cpu to run on the CPU"

# What the user says of a run of several processes, and where launchers of clusters say how many there are.
_COORDINATES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_WORKER_NAMES = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")

# Read by libtpu when it is loaded: nothing is asked of a network, several processes may compile at
# once, and its warnings about a TPU that is not there stay unsaid.
_ABSENT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def use_compilation_cache() -> None:
    """Keep compiled programs for the next run in the user's cache, if no other place is set."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def without_tpu() -> None:
    """Let libtpu, which is yet to be loaded, be no more than a compiler; what the environment already says stays."""
    for key, value in _ABSENT_TPU.items():
        os.environ.setdefault(key, value)


def open_devices(
    root: Path = Path("/"), environ: Mapping[str, str] = os.environ, *, patience: float = PATIENCE
) -> list:
    """Every device of the run, all its processes connected; all but the first lose their stdout.

    root is where /dev, /sys and /proc are looked for. After `patience` seconds of waiting stderr says
    what for; jax itself gives up after five minutes. Raises ValueError with the remedy for hardware
    that jax does not use.
    """
    import jax

    on_cpu = _cpu_is_asked_for()
    tpus = [] if on_cpu else tpu_files(root)
    workers = num_processes(environ, on_tpu=bool(tpus))
    if not tpus:
        without_tpu()
    with _told(patience, _waiting_for(workers, tpus, environ)):
        if workers > 1 and not jax.distributed.is_initialized():
            _connect(workers, environ)
        try:
            devices = jax.devices()
        except RuntimeError as error:
            raise ValueError(f"{_unused(tpus, root) or 'jax found no devices'} ({error})") from error
    reason = None if on_cpu or devices[0].platform != "cpu" else _unused(tpus, root)
    if reason:
        raise ValueError(reason)
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")
    return devices


def _cpu_is_asked_for() -> bool:
    import jax

    return jax.config.jax_platforms == "cpu"  # type: ignore[attr-defined]


def tpu_files(root: Path = Path("/")) -> list[Path]:
    """Device files of the TPU chips in this host; none without a PCI device of Google's that can be one."""
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        kind = vendor.with_name("class")
        other = kind.exists() and kind.read_text().startswith(_STORAGE_OR_NETWORK)
        if vendor.read_text().strip() == _GOOGLE and not other:
            return sorted([*root.glob("dev/accel[0-9]*"), *root.glob("dev/vfio/[0-9]*")])
    return []


def num_processes(environ: Mapping[str, str] = os.environ, *, on_tpu: bool) -> int:
    """How many processes the environment, or on a TPU the pod's own records, say that the run has.

    Raises ValueError if the environment says only half of it.
    """
    counts = [_number(environ, name) for name in ("JAX_NUM_PROCESSES", *_LAUNCHERS) if name in environ]
    missing = [name for name in _COORDINATES if name not in environ]
    launched = on_tpu or any(name in environ for name in _LAUNCHERS)
    if 0 < len(missing) < len(_COORDINATES) and not launched:
        raise ValueError(f"{' and '.join(missing)} must be set, too, for a run of several processes")
    if counts:
        return counts[0]
    if not on_tpu or environ.get("TPU_PROCESS_BOUNDS") == "1,1,1":  # this host's chips alone were asked for
        return 1
    names = next((environ[name] for name in _WORKER_NAMES if name in environ), None)
    if names is None and "TPU_SKIP_MDS_QUERY" not in environ:
        names = _metadata("worker-network-endpoints", environ)
    num_slices = _number(environ, "MEGASCALE_NUM_SLICES") if "MEGASCALE_NUM_SLICES" in environ else 1
    return num_slices * len((names or "").split(","))


def _metadata(key: str, environ: Mapping[str, str]) -> str | None:
    """What the cloud knows about this machine; None outside Google's."""
    host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:  # past any proxy: the address means this machine
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as response:
            return response.read().decode()
    except OSError:
        return None


def _connect(workers: int, environ: Mapping[str, str]) -> None:
    import jax

    # Its handler would swallow every SIGTERM; training has its own, the rest ends as processes do.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**_coordinates(environ))
    except RuntimeError as error:
        where = environ.get("JAX_COORDINATOR_ADDRESS", "the first of them")
        raise ValueError(
            f"the {workers} processes of the run did not find each other: start the same command in all, "
            f"and see that {where} can be reached from each ({error})"
        ) from error


def _coordinates(environ: Mapping[str, str]) -> dict[str, Any]:
    """What jax.distributed does not read from the environment by itself."""
    names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    return {key: _number(environ, name) for key, name in names.items() if name in environ}


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise ValueError(f"{name}={environ[name]!r}: expected a number")
    return int(environ[name])


@contextlib.contextmanager
def _told(seconds: float, line: str) -> Iterator[None]:
    """Print a line on stderr if the block takes longer than this, on whichever process it does."""
    timer = threading.Timer(seconds, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _waiting_for(workers: int, tpus: list[Path], environ: Mapping[str, str]) -> str:
    if workers == 1:
        return "still waiting for the devices to answer"
    if not tpus:
        return (
            f"still waiting for the other processes: all {workers} must run the same command, "
            "each with its own JAX_PROCESS_ID"
        )
    command = shlex.quote(f"cd {shlex.quote(os.getcwd())} && {shlex.join(sys.orig_argv)}")
    return (
        f"still waiting for the other workers: this TPU slice has {workers}, and all must run the same command: "
        f"gcloud compute tpus tpu-vm ssh {environ.get('TPU_NAME', 'NAME')} --worker=all --command={command}"
    )


def _unused(tpus: list[Path], root: Path) -> str | None:
    """Which hardware jax does not use, why, and what to do; None if there is none."""
    if tpus:
        found, ways = f"there is a TPU (/{tpus[0].relative_to(root)}), but", f"or {_ON_CPU}"
        holders = device_holders(tpus, root)
        if not _installed("libtpu"):
            return f"{found} {_INSTALL.format('tpu')}, {ways}"
        if holders:
            listed = ", ".join(f"process {pid} ({command})" for pid, command in holders.items())
            return f"{found} it is held by {listed}: end that, {ways}"
        return f"{found} jax could not open it: see whether another user's process holds it, {ways}"
    gpu = next(iter(sorted(root.glob("dev/nvidia[0-9]*"))), None)
    if gpu is None:
        return None
    found, ways = f"there is an NVIDIA GPU (/{gpu.relative_to(root)}), but", f"or {_ON_CPU}"
    if not _installed("jax_cuda13_plugin", "jax_cuda12_plugin"):
        return f"{found} {_INSTALL.format('cuda13')} ('jax[cuda12]' for a driver before 580), {ways}"
    return f"{found} jax could not open it: see its warning above, nvidia-smi and CUDA_VISIBLE_DEVICES, {ways}"


def _installed(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) for module in modules)


def device_holders(files: list[Path], root: Path = Path("/")) -> dict[int, str]:
    """Process id to command of the other processes that hold one of these files, as far as this user may see."""
    names = {f"/{file.relative_to(root)}" for file in files}
    holders = {}
    for link in root.glob("proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # a process that has ended or is not ours to look at
            pid = int(link.parts[-3])
            if pid != os.getpid() and os.readlink(link) in names:
                holders[pid] = link.parents[1].joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    return holders


def describe_run(cfg: LlamaConfig, mesh: "Mesh", dtype: Any, where: str) -> str:
    """The line that a run begins with: "4 x TPU v4, tensor=4, bfloat16, llama3.1-8b from models/8b"."""
    from llama_jax.mesh import mesh_text

    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind}, {mesh_text(mesh)}, {dtype}, {model_name(cfg)} from {where}"


def model_name(cfg: LlamaConfig) -> str:
    """The published model with this architecture, "llama3.1-8b", else the number of parameters, "4.3M parameters"."""
    count = cfg.num_params()
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    return "/".join(name for name, preset in PRESETS.items() if preset == cfg) or f"{size} parameters"
