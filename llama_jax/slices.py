"""Slices of accelerators that need not be here: what their chips can do, and their devices for a compiler.

Sources: the Cloud TPU pages on each version and its price, and "How to Scale Your Model" for links;
memory is what libtpu 0.0.42 says is there, and clocks follow from peak and matrix units. The
invariant: a slice that can be named here can be rented; any other is refused with the nearest.
"""

import contextlib
import functools
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30

# A jax.Device or the description of one; jax's own name for it is no type to a type checker.
Device = Any


@dataclass(frozen=True)
class Chip:
    """One chip; 0 where nothing is known.

    hbm_bytes: what the compiler may use. flops: peak in bfloat16 a second. hbm_bandwidth and
    link_bandwidth: bytes a second, of a link in one direction. num_links: to its neighbours in the
    torus. clock: cycles a second, those that the compiler's estimates count. price: US dollars an
    hour. host_bytes: memory of its host, shared out among the host's chips. cores: how many the
    vendor's names count. most: chips of the largest slice.
    """

    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    num_links: int
    clock: float
    price: float
    host_bytes: int
    cores: int
    most: int


# Edit prices to yours: these are list prices on demand in US regions, as of 2025.
CHIPS = {
    "v4": Chip(int(30.75 * GIB), 275e12, 1.228e12, 4.5e10, 6, 1.05e9, 3.22, 100 * GIB, 2, 4096),
    "v5p": Chip(int(95.74 * GIB), 459e12, 2.765e12, 9.0e10, 6, 1.75e9, 4.20, 112 * GIB, 2, 6144),
    "v5e": Chip(int(15.75 * GIB), 197e12, 8.19e11, 5.0e10, 4, 1.50e9, 1.20, 48 * GIB, 1, 256),
    "v6e": Chip(int(31.25 * GIB), 918e12, 1.640e12, 9.0e10, 4, 1.75e9, 2.70, 180 * GIB, 1, 256),
    "cpu": Chip(0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0, 1, 4096),
}

_ALIASES = {"v5litepod": "v5e"}
_GPUS = ("a100-40", "a100-80", "h100", "h200", "b200")

# Those of two dimensions are a list; of three, small ones and then whole cubes of 4 x 4 x 4.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

# Read by libtpu when it is loaded: nothing is asked of a network, several processes may compile at
# once, and its warnings about a TPU that is not there stay unsaid.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Slice:
    """Chips with fast links among them, as a torus of this shape, or several such (see parse_slice)."""

    kind: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        """What one of its chips can do."""
        return CHIPS[self.kind]

    @property
    def num_chips(self) -> int:
        """Chips of all slices together."""
        return self.num_slices * math.prod(self.shape)

    def __str__(self) -> str:
        several = f"{self.num_slices}x" if self.num_slices > 1 else ""
        return f"{several}{self.kind}:{'x'.join(map(str, self.shape))}"


def parse_slice(text: str) -> Slice:
    """The slice of `v4:4x4x8`, of a vendor's name as `v4-256` or `v5litepod-16`, of `2xv5p:8x8x8` or `cpu:8`.

    Raises ValueError that names the nearest slice for one that does not exist.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*?)(?::(\d+(?:x\d+)*)|-(\d+))", text)
    if text.partition(":")[0] in _GPUS:
        raise ValueError(f"slice {text!r}: planning for absent GPUs is not built yet; plan a TPU or a cpu:8")
    kind = _ALIASES.get(found[2], found[2]) if found else ""
    if found is None or kind not in CHIPS or (kind == "cpu" and (found[1] or found[4])):
        known = ", ".join(CHIPS)
        raise ValueError(f"unknown slice {text!r}; expected as v4:4x4x8, v4-256, 2xv5p:8x8x8 or cpu:8, of {known}")
    num_slices = int(found[1] or 1)
    if found[4]:
        return Slice(kind, _named_shape(text, kind, int(found[4])), num_slices)
    shape = tuple(int(size) for size in found[3].split("x"))
    if kind == "cpu":
        if len(shape) > 1 or not 1 <= math.prod(shape) <= CHIPS["cpu"].most:
            raise ValueError(f"unknown slice {text!r}; CPU devices are one number, as in cpu:8")
        return Slice(kind, shape)
    legal = next((known for known in slice_shapes(kind) if sorted(known) == sorted(shape)), None)
    if legal is None:
        raise ValueError(f"there is no slice {text}; the nearest is {Slice(kind, _nearest(kind, shape))}")
    return Slice(kind, legal, num_slices)


def smallest_slice(kind: str, num_bytes: int) -> Slice | None:
    """The slice with the fewest chips that hold so many bytes together, split evenly; None if there is none."""
    if not CHIPS[kind].hbm_bytes:
        return None
    slices = (Slice(kind, shape) for shape in sorted(slice_shapes(kind), key=math.prod))
    return next((found for found in slices if found.num_chips * found.chip.hbm_bytes > num_bytes), None)


@functools.cache
def slice_shapes(kind: str) -> Sequence[tuple[int, ...]]:
    """Every shape in which chips of a kind can be rented."""
    chip = CHIPS[kind]
    if chip.num_links == 4:
        return _FLAT
    cubes = itertools.combinations_with_replacement(range(4, chip.most // 16 + 1, 4), 3)
    return [*_SMALL, *(shape for shape in cubes if math.prod(shape) <= chip.most)]


def wraps(shape: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Which sides of a torus are rings: all of whole cubes, joined by optical switches; of a flat one those of 16."""
    if len(shape) == 3:
        whole = all(size % 4 == 0 for size in shape)
        return whole, whole, whole
    rows, columns = shape
    return rows == 16, columns == 16, False


def _named_shape(text: str, kind: str, count: int) -> tuple[int, ...]:
    """The most cubic shape with this count in a vendor's name."""
    cores = CHIPS[kind].cores
    shapes = [shape for shape in slice_shapes(kind) if math.prod(shape) * cores == count]
    if not shapes:
        near = _nearest(kind, (count // cores,))
        raise ValueError(f"there is no slice {text}; the nearest is {kind}-{math.prod(near) * cores}")
    return min(shapes, key=sum)


def _nearest(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The legal shape of the nearest count of chips; of several, the one whose sides are nearest."""
    count, sides = math.prod(shape), sorted(shape)

    def distance(legal: tuple[int, ...]) -> tuple[float, int]:
        ratio = math.prod(legal) / max(count, 1)
        return max(ratio, 1 / ratio), sum(abs(a - b) for a, b in zip(sorted(legal), sides, strict=False))

    return min(slice_shapes(kind), key=distance)


def open_slice(target: Slice) -> list[Device]:
    """Its devices, one a chip, in the order of its torus: real ones of a cpu, else descriptions for libtpu's compiler.

    To be called in place of opening the devices of this machine. Raises ValueError with the command that
    installs libtpu where it is missing, and if this process cannot have so many CPU devices.
    """
    import jax

    # A TPU of this machine is left alone. Where devices are open already, they are what there is.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        if target.kind == "cpu":
            known = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", max(known, target.num_chips))
    if target.kind == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < target.num_chips:
            raise ValueError(f"{target}: this process has {len(devices)} CPU devices open; plan in one of its own")
        return devices[: target.num_chips]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("planning for a TPU needs its compiler: pip install --no-deps libtpu")
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    # Without devices jax writes programs to its cache, warns when it finds one, and compiles again.
    jax.config.update("jax_enable_compilation_cache", False)
    return _described(target)


def _described(target: Slice) -> list[Device]:
    from jax.experimental import topologies

    shape, chip = target.shape, target.chip
    options: dict[str, Any] = {"num_slices": target.num_slices}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    elif len(shape) == 2 and math.prod(shape) == 8:  # v5litepod-8 and v6e-8 are one host
        options["chips_per_host_bounds"] = (2, 4, 1)
    if chip.cores == 2:  # as one device: by itself libtpu counts a v4 as two
        options["chip_config_name"] = "megacore"
    options["wrap"] = wraps(shape)
    name = f"{target.kind}:{'x'.join(map(str, shape))}"
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)
