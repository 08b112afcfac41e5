"""Slices of accelerators that need not be here: their shapes, and their devices for a compiler.

Sources: the Cloud TPU pages on each version; of GPUs NVIDIA's DGX systems of eight. The invariant: a
slice that can be named here can be rented; any other is refused with the nearest.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from llama_jax.chips import CHIPS, Chip
from llama_jax.devices import without_tpu
from llama_jax.mesh import make_mesh, parse_mesh

# A jax.Device or the description of one; jax's own name for it is no type to a type checker.
Device = Any


_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x"}

# A part of jax's device_kind, the longer names first.
_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7x": "tpu7x",
    "A100-SXM4-40GB": "a100-40",
    "A100-PCIE-40GB": "a100-40",
    "A100": "a100-80",
    "H100 PCIe": "h100-pcie",
    "H100 NVL": "h100-nvl",
    "H100": "h100",
    "H200": "h200",
    "GB200": "gb200",
    "B200": "b200",
}

# Those of two dimensions are a list; of three, small ones and then whole cubes of 4 x 4 x 4.
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


@dataclass(frozen=True)
class Slice:
    """Chips with fast links among them, as a torus of this shape, or several such (see parse_slice).

    Of GPUs a node is a slice, and its shape their count.
    """

    kind: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        """What one of its chips can do."""
        return CHIPS[self.kind]

    @property
    def is_gpu(self) -> bool:
        """Whether its chips are GPUs, whose programs are compiled for CPU devices here."""
        return self.kind != "cpu" and not self.chip.num_links

    @property
    def num_chips(self) -> int:
        """Chips of all slices together, or as many devices as jax counts."""
        return self.num_slices * math.prod(self.shape) * self.chip.devices

    @property
    def price(self) -> float:
        """US dollars an hour of one chip, from the TOML file that LLAMA_JAX_PRICES names (`v4 = 2.10`), else as listed.

        0 if nobody knows. Raises ValueError for a file that does not hold numbers by the kind of chip.
        """
        return _prices(os.environ.get("LLAMA_JAX_PRICES", "")).get(self.kind, self.chip.price)

    @property
    def chips_per_host(self) -> int:
        """Chips that one process has: those of a node of GPUs, of a TPU's host, all CPU devices."""
        if not self.chip.num_links:
            return self.shape[0]
        one_host = len(self.shape) == 2 and math.prod(self.shape) == 8  # v5litepod-8 and v6e-8
        return 8 if one_host else min(4, math.prod(self.shape)) * self.chip.devices

    @property
    def networks(self) -> tuple[str, str]:
        """What its collectives cross: within a slice or node, and between them."""
        return ("nvlink", "network") if self.is_gpu else ("ici", "dcn")

    def __str__(self) -> str:
        several = f"{self.num_slices}x" if self.num_slices > 1 else ""
        return f"{several}{self.kind}:{'x'.join(map(str, self.shape))}"


@functools.cache
def _prices(path: str) -> dict[str, float]:
    if not path:
        return {}
    try:
        prices = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"LLAMA_JAX_PRICES={path} is not TOML: {error}; expected lines as v4 = 2.10") from None
    for kind, price in prices.items():
        if kind not in CHIPS or isinstance(price, bool) or not isinstance(price, (int, float)) or price < 0:
            raise ValueError(
                f"{path}: {kind} = {price!r}; expected dollars an hour of a chip, as v4 = 2.10, of {', '.join(CHIPS)}"
            )
    return prices


def parse_slice(text: str) -> Slice:
    """The slice of `v4:4x4x8`, a vendor's `v4-256` or `v5litepod-16`, `2xv5p:8x8x8`, `h100:8`, `8xh100:8` or `cpu:8`.

    Raises ValueError that names the nearest slice for one that does not exist.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*?(?:-40|-80)?)(?::(\d+(?:x\d+)*)|-(\d+))", text)
    kind = _ALIASES.get(found[2], found[2]) if found else ""
    if found is None or kind not in CHIPS or (not CHIPS[kind].num_links and found[4]) or (kind == "cpu" and found[1]):
        known = ", ".join(CHIPS)
        raise ValueError(
            f"unknown slice {text!r}; expected as v4:4x4x8, v4-256, 2xv5p:8x8x8, h100:8, 8xh100:8 or cpu:8, of {known}"
        )
    num_slices = int(found[1] or 1)
    if found[4]:
        return Slice(kind, _named_shape(text, kind, int(found[4])), num_slices)
    shape = tuple(int(size) for size in found[3].split("x"))
    if not CHIPS[kind].num_links:
        return _counted(text, kind, shape, num_slices)
    legal = next((known for known in slice_shapes(kind) if sorted(known) == sorted(shape)), None)
    if legal is None:
        raise ValueError(f"there is no slice {text}; the nearest is {Slice(kind, _nearest(kind, shape))}")
    return Slice(kind, legal, num_slices)


def _counted(text: str, kind: str, shape: tuple[int, ...], num_slices: int) -> Slice:
    """CPU devices, or GPUs: h100:64 is eight nodes of eight."""
    count, most = shape[0], CHIPS[kind].most
    if kind != "cpu" and len(shape) == 1 and num_slices == 1 and count > most and count % most == 0:
        count, num_slices = most, count // most
    if len(shape) > 1 or not 1 <= count <= most:
        name = "CPU devices" if kind == "cpu" else "GPUs of a node"
        raise ValueError(f"unknown slice {text!r}; {name} are one number up to {most}, as in {kind}:8")
    if num_slices * count > CHIPS["cpu"].most:
        raise ValueError(f"{text}: {num_slices * count} GPUs are more than can be planned, {CHIPS['cpu'].most}")
    return Slice(kind, (count,), num_slices)


def chip_kind(device: Device) -> str:
    """Which of CHIPS a device of jax is; where nothing is known of it, "cpu"."""
    return next((kind for part, kind in _DEVICE_KINDS.items() if part in device.device_kind), "cpu")


def attached_slice(devices: Sequence[Device]) -> Slice:
    """What slice these devices of a running mesh are; where nothing is known of them, CPU devices."""
    kind = chip_kind(devices[0])
    num_slices = len({getattr(device, "slice_index", 0) for device in devices}) if kind != "cpu" else 1
    if not CHIPS[kind].num_links:
        return Slice(kind, (len(devices) // num_slices,), num_slices)
    sides = zip(*(device.coords for device in devices), strict=True)
    shape = tuple(max(side) - min(side) + 1 for side in sides)
    return Slice(kind, shape if CHIPS[kind].num_links == 6 else shape[:2], num_slices)


def smallest_slice(kind: str, num_bytes: int) -> Slice | None:
    """The slice with the fewest chips that hold so many bytes together, split evenly; None if there is none."""
    return next((found for found in all_slices(kind) if found.num_chips * found.chip.hbm_bytes > num_bytes), None)


def all_slices(kind: str) -> Iterator[Slice]:
    """Every slice of a kind, the smallest first; of GPUs nodes whose count is a power of two, of CPUs none."""
    if kind == "cpu":
        return
    shapes = sorted(slice_shapes(kind), key=math.prod)
    yield from (Slice(kind, shape) for shape in shapes)
    if not CHIPS[kind].num_links:
        yield from (Slice(kind, shapes[-1], 2**power) for power in range(1, 10))


@functools.cache
def slice_shapes(kind: str) -> Sequence[tuple[int, ...]]:
    """Every shape in which chips of a kind can be rented."""
    chip = CHIPS[kind]
    if not chip.num_links:
        return [(1,), (2,), (4,), (8,)]
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
    """Its devices, one a chip, slice after slice, each in the order of its torus.

    Descriptions for libtpu's compiler, for CPUs real devices, and for GPUs as many CPU devices. To be
    called in place of opening the devices of this machine. Raises ValueError with the command that
    installs libtpu where it is missing, and if this process cannot have so many CPU devices.
    """
    on_cpu = target.kind == "cpu" or target.is_gpu
    # A TPU of this machine is left alone. Where devices are open already, they are what there is.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        if on_cpu:
            known = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", max(known, target.num_chips))
    if on_cpu:
        devices = jax.devices("cpu")
        if len(devices) < target.num_chips:
            raise ValueError(f"{target}: this process has {len(devices)} CPU devices open; plan in one of its own")
        return devices[: target.num_chips]
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"planning for a TPU needs its compiler: pip install --no-deps '{libtpu_requirement()}'")
    without_tpu()
    # Without devices jax writes programs to its cache, warns when it finds one, and compiles again.
    jax.config.update("jax_enable_compilation_cache", False)
    return _described(target)


def libtpu_requirement() -> str:
    """The libtpu that this jax is made for, as "libtpu==0.0.42.*"; another one may not compile its programs."""
    wanted = (text.partition(";")[0].strip() for text in importlib.metadata.requires("jax") or ())
    return next((text for text in wanted if text.startswith("libtpu")), "libtpu")


def _described(target: Slice) -> list[Device]:
    from jax.experimental import topologies

    shape, chip = target.shape, target.chip
    options: dict[str, Any] = {"num_slices": target.num_slices}
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    elif len(shape) == 2 and target.chips_per_host == 8:
        options["chips_per_host_bounds"] = (2, 4, 1)
    if chip.cores > chip.devices:  # as one device: by itself libtpu counts a v4 as two
        options["chip_config_name"] = "megacore"
    options["wrap"] = wraps(shape)
    name = f"{target.kind}:{'x'.join(map(str, shape))}"
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)


@contextlib.contextmanager
def use_slice(target: Slice, spec: str) -> Iterator[Mesh]:
    """Enter a mesh of the slice's devices, of TPUs all of them. Raises ValueError if the text does not fit them."""
    count = math.prod(parse_mesh(spec, target.num_chips).values())
    if target.chip.num_links and count != target.num_chips:
        raise ValueError(f"mesh {spec!r} uses {count} of the {target.num_chips} chips of {target}; give one axis -1")
    mesh = make_mesh(spec, open_slice(target))
    with jax.set_mesh(mesh):
        yield mesh
