"""What a jitted step would need and how fast it should be on a slice that is not here, from compiling it.

The invariant: the plan is the run. What is compiled is the very program that the run would execute,
by the compiler that the run would use, with abstract values in place of arrays; there is no second
model of its cost. Memory, FLOPs, bytes and cycles are the compiler's; that attention kernels reach
KERNEL_EFFICIENCY and that collectives move at the speed of their links is assumed. For a GPU that is
not here there is no compiler: its program is compiled for as many CPU devices, which makes the
arguments exact and all else an estimate.
"""

import dataclasses
import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, get_mesh

from llama_jax.chips import GIB
from llama_jax.memory import bytes_left
from llama_jax.mesh import mesh_text
from llama_jax.program import Buffer, Collective, Program, read_program
from llama_jax.slices import Device, Slice, attached_slice, wraps

# Share of a chip's peak at which attention kernels are taken to run, and of a GPU's all that it computes.
KERNEL_EFFICIENCY = 0.6

# What a buffer is in terms of the model, by its count of values; None is not known.
Terms = Callable[[Buffer], str | None]

_NUM_LARGEST = 6

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Plan:
    """One program on one slice. Bytes, FLOPs and seconds are those of one chip and step; None is not known.

    compiler: "tpu" or "cpu", which for a GPU stands in. hbm_temporaries_bytes: what is alive beside the
    arguments when most is. parts: the arguments in terms of the model. largest: the largest arrays
    that the program makes, not all at once, likewise. collectives: kind -> network (Slice.networks)
    -> bytes of the arrays exchanged. kernels: calls of each Pallas kernel.
    """

    slice: str
    chips: int
    mesh: str
    compiler: str
    fits: bool
    hbm_capacity_bytes: int
    hbm_peak_bytes: int
    hbm_arguments_bytes: int
    hbm_temporaries_bytes: int
    host_bytes: int
    parts: Mapping[str, int]
    largest: Mapping[str, int] = dataclasses.field(default_factory=dict)
    matmul_flops_per_chip: float | None = None
    model_flops_per_chip: float | None = None
    kernel_flops_per_chip: float | None = None
    kernels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    copied_bytes: float | None = None
    collectives: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    estimated_compute_seconds: float | None = None
    estimated_collective_seconds: float | None = None
    estimated_step_seconds: float | None = None
    estimated_mfu: float | None = None
    compile_seconds: float = 0.0


def plan(
    lowered: jax.stages.Lowered,
    target: Slice,
    *,
    parts: Mapping[str, int],
    model_flops: float = 0.0,
    terms: Terms = lambda _: None,
    hlo: Path | None = None,
) -> Plan:
    """Compile a step that was lowered with abstract arguments on the ambient mesh of the slice's devices.

    parts: bytes a chip of the arguments, by name. model_flops: those of all chips together. hlo: where
    the compiled module's text is written, if the compiler does not refuse the program.
    """
    mesh, most, began = get_mesh(), capacity(target), time.perf_counter()
    done: dict[str, Any] = {}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = _refused(str(error), sum(parts.values()))
    else:
        memory, text = _memory(compiled, target), compiled.as_text() or ""
        program = read_program(text)
        done = _work(program, target, mesh, model_flops / mesh.size) | {"largest": _largest(program, terms)}
        if hlo is not None:
            hlo.write_text(text, encoding="utf-8")
    return Plan(
        slice=str(target),
        chips=mesh.size,
        mesh=mesh_text(mesh),
        compiler=mesh.devices.flat[0].platform,
        parts=dict(parts),
        fits=memory.peak <= most,
        hbm_capacity_bytes=most,
        hbm_peak_bytes=memory.peak,
        hbm_arguments_bytes=memory.arguments,
        hbm_temporaries_bytes=memory.peak - memory.arguments,
        host_bytes=memory.host,
        compile_seconds=time.perf_counter() - began,
        **done,
    )


class Expectation(NamedTuple):
    """What a compiled step should need: bytes of a chip when most are in use, and seconds where its chips are known."""

    peak_bytes: int
    seconds: float | None


def expectation(compiled: jax.stages.Compiled, *, model_flops: float) -> Expectation:
    """What a plan says of a step that has been compiled for the devices of the ambient mesh, which are here."""
    mesh = get_mesh()
    target = attached_slice(list(mesh.devices.flat))
    peak = _memory(compiled, target).peak
    if not target.chip.flops:
        return Expectation(peak, None)
    seconds = _seconds(read_program(compiled.as_text() or ""), target, mesh, model_flops / mesh.size)
    return Expectation(peak, seconds["estimated_step_seconds"] or None)


def check_directory(hlo: Path | None) -> None:
    """Raise FileNotFoundError, before anything is compiled, if a program's text cannot be written there."""
    if hlo is not None and not hlo.parent.is_dir():
        raise FileNotFoundError(f"--hlo {hlo}: there is no directory {hlo.parent}; make it or name another")


def capacity(target: Slice) -> int:
    """Bytes that a compiler may use of a chip, or a device of the ambient mesh of CPUs, has left."""
    return target.chip.hbm_bytes or bytes_left(get_mesh().devices.flat) or 0


class _Memory(NamedTuple):
    """Bytes of a chip, and of its host, when most are in use."""

    peak: int
    arguments: int
    host: int


def _memory(compiled: jax.stages.Compiled, target: Slice) -> _Memory:
    stats = compiled.memory_analysis()
    assert stats is not None
    arguments, host = stats.argument_size_in_bytes, stats.host_temp_size_in_bytes
    # The compiler's peak holds temporaries on the host too, and a CPU's holds none: then only a bound is known.
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    bound = arguments + stats.temp_size_in_bytes + results
    peak = bound if host or not target.chip.num_links else stats.peak_memory_in_bytes
    return _Memory(peak, arguments, host + stats.host_argument_size_in_bytes)


def _refused(message: str, arguments: int) -> _Memory:
    """What a program wants, from its compiler's refusal, which counts donated arguments among temporaries."""
    found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGT])", message)
    if found is None:
        raise ValueError(f"the compiler refuses the program: {message.partition(chr(10))[0]}")
    return _Memory(max(arguments, int(float(found[1]) * _UNITS[found[2]])), arguments, 0)


def _work(program: Program, target: Slice, mesh: Mesh, model_flops: float) -> dict[str, Any]:
    """The fields of a plan that are read from its program."""
    return {
        "matmul_flops_per_chip": program.matmul_flops,
        "model_flops_per_chip": model_flops,
        "kernel_flops_per_chip": program.kernel_flops,
        "kernels": dict(program.kernels),
        "copied_bytes": program.copied_bytes,
        "collectives": _by_network(program, target, mesh),
        **_seconds(program, target, mesh, model_flops),
    }


def _largest(program: Program, terms: Terms) -> dict[str, int]:
    """The largest buffers by name, each name once, in terms of the model where they are known."""
    sizes: dict[str, int] = {}
    for buffer in sorted(program.buffers, key=lambda buffer: -buffer.num_bytes):
        shape = f"{buffer.kind}[{','.join(map(str, buffer.dims))}]"
        name = terms(buffer) or f"{shape} of {'/'.join(buffer.operation.split('/')[-2:])}"
        sizes.setdefault(name, buffer.num_bytes)
        if len(sizes) == _NUM_LARGEST:
            break
    return sizes


def _by_network(program: Program, target: Slice, mesh: Mesh) -> dict[str, dict[str, float]]:
    moved: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(target.networks, 0.0))
    for collective, size in program.collectives.items():
        slices = {_slice_index(device, target) for device in _members(collective, mesh)}
        across = collective.across or len(slices) > 1
        moved[collective.kind][target.networks[across]] += size
    return dict(moved)


def _slice_index(device: Device, target: Slice) -> int:
    """Which slice, or node of GPUs, a device belongs to."""
    return device.id // target.shape[0] if target.is_gpu else getattr(device, "slice_index", 0) or 0


def _members(collective: Collective, mesh: Mesh) -> list[Device]:
    devices = mesh.devices.flatten()
    return [devices[place] for place in collective.group or range(len(devices))]


def _seconds(program: Program, target: Slice, mesh: Mesh, model_flops: float) -> dict[str, float]:
    chip = target.chip
    if not chip.flops:
        return {}
    if target.is_gpu:  # of what a kernel would do the stand-in's text may tell too little, of rematerialization all
        compute = max(program.matmul_flops, model_flops) / (KERNEL_EFFICIENCY * chip.flops)
    else:
        compute = program.cycles / chip.clock + program.kernel_flops / (KERNEL_EFFICIENCY * chip.flops)
    blocking = hidden = 0.0
    for collective, size in program.collectives.items():
        seconds = collective_seconds(collective, size, _members(collective, mesh), target)
        overlapped = collective.overlapped or target.is_gpu
        hidden, blocking = (hidden + seconds, blocking) if overlapped else (hidden, blocking + seconds)
    step = max(compute, hidden) + blocking
    return {
        "estimated_compute_seconds": compute,
        "estimated_collective_seconds": blocking + hidden,
        "estimated_step_seconds": step,
        "estimated_mfu": model_flops / (step * chip.flops) if step else 0.0,
    }


def collective_seconds(collective: Collective, size: float, members: Iterable[Device], target: Slice) -> float:
    """Seconds to exchange an array of this size, at the full speed of the links that the members share.

    In a torus these are the links of its sides along which the members lie. A side that is a ring sends
    both ways round it, one that is a line is as slow as its middle.
    """
    chip, members = target.chip, list(members)
    if len(members) < 2 or not chip.link_bandwidth:
        return 0.0
    passes = 2 if collective.kind == "all-reduce" else 1
    if collective.across:
        return passes * size * (1 - 1 / target.num_slices) / chip.network_bandwidth
    if collective.kind == "collective-permute":
        return size / chip.link_bandwidth
    if target.is_gpu:
        nodes = len({_slice_index(device, target) for device in members})
        each = len(members) / nodes
        between = (1 - 1 / nodes) / (each * chip.network_bandwidth)
        return passes * size * max(between, (1 - 1 / each) / chip.link_bandwidth)
    places = [device.coords for device in members]
    rings = wraps(target.shape)
    sides = [side for side in range(3) if len({place[side] for place in places}) > 1]
    links = sum(2 if rings[side] and len({p[side] for p in places}) == _side(target, side) else 1 for side in sides)
    return passes * size * (1 - 1 / len(places)) / (max(links, 1) * chip.link_bandwidth)


def _side(target: Slice, side: int) -> int:
    return target.shape[side] if side < len(target.shape) else 1


def rank(found: Plan) -> tuple[bool, float, int]:
    """The better plan has the lower one: it fits, it is fast, it needs little memory."""
    return not found.fits, found.estimated_step_seconds or math.inf, found.hbm_peak_bytes


def summary(found: Plan) -> str:
    """A plan in a few words: "fsdp=64: 3.14 s a step, 7.63 of 30.75 GiB"."""
    speed = "" if found.estimated_step_seconds is None else f"{found.estimated_step_seconds:.4g} s a step, "
    verdict = "" if found.fits else "does NOT fit, "
    return f"{found.mesh}: {verdict}{speed}{gib(found.hbm_peak_bytes)} of {gib(found.hbm_capacity_bytes)}"


def sources(found: Plan) -> dict[str, str]:
    """Where the numbers of a plan are from, by their names: exact, compiled, measured, estimated or assumed."""
    stands_in = found.compiler == "cpu" and found.estimated_step_seconds is not None
    compiled = "compiled for CPU" if stands_in else "compiled"
    of_program = ("hbm_peak_bytes", "hbm_temporaries_bytes", "host_bytes", "matmul_flops_per_chip", "collectives")
    return dict.fromkeys(of_program, compiled) | {
        "hbm_arguments_bytes": "exact",
        "model_flops_per_chip": "exact",
        "kernel_flops_per_chip": compiled,
        "estimated_compute_seconds": "assumed" if stands_in else "estimated",
        "estimated_collective_seconds": "assumed",
        "estimated_step_seconds": "estimated",
        "estimated_mfu": "estimated",
        "tokens_per_second": "estimated",
        "compile_seconds": "measured",
    }


def rows(found: Plan) -> list[tuple[str, str, str]]:
    """What a plan says, for people: name, where it is from, value."""
    spare = found.hbm_capacity_bytes - found.hbm_peak_bytes
    verdict = f"yes, {gib(spare)} to spare" if found.fits else f"NO, {gib(-spare)} too much"
    parts = ", ".join(f"{name} {gib(size)}" for name, size in found.parts.items())
    origin = sources(found)
    source, is_gpu = origin["hbm_peak_bytes"], origin["estimated_compute_seconds"] == "assumed"
    lines = [
        ("fits", source, verdict),
        ("memory a chip", source, f"{gib(found.hbm_peak_bytes)} of {gib(found.hbm_capacity_bytes)}"),
        ("  arguments", "exact", f"{gib(found.hbm_arguments_bytes)}: {parts}"),
        ("  temporaries", source, gib(found.hbm_temporaries_bytes)),
    ]
    if found.host_bytes:
        lines.append(("  on the host", source, gib(found.host_bytes)))
    lines += [("  among them", source, f"{gib(size)} {name}") for name, size in found.largest.items()]
    if found.matmul_flops_per_chip is None:
        return lines
    lines.append(("matrix products", source, f"{found.matmul_flops_per_chip / 1e12:.4g} TFLOP"))
    if found.kernels:
        lines.append(("in kernels", "counted", f"{(found.kernel_flops_per_chip or 0) / 1e12:.4g} TFLOP"))
    lines += [(f"  {name}", source, f"{calls:.0f} calls") for name, calls in found.kernels.items()]
    for kind, networks in found.collectives.items():
        sizes = " and ".join(f"{gib(size)} over {network}" for network, size in networks.items() if size)
        lines.append((kind, source, sizes))
    if found.estimated_step_seconds is not None:
        kernels = f"the compiler's cycles, and kernels at {KERNEL_EFFICIENCY:.0%} of peak"
        assumed = f"all FLOPs at {KERNEL_EFFICIENCY:.0%} of peak" if is_gpu else kernels
        lines += [
            ("computing", "assumed" if is_gpu else "estimated", f"{found.estimated_compute_seconds:.4g} s: {assumed}"),
            ("collectives", "assumed", f"{found.estimated_collective_seconds:.4g} s: links at full speed"),
            ("a step", "estimated", f"{found.estimated_step_seconds:.4g} s"),
        ]
    if found.estimated_mfu:
        lines.append(("model FLOPs of peak", "estimated", f"{found.estimated_mfu:.1%}"))
    return lines


def table(lines: Iterable[tuple[str, ...]]) -> str:
    """Columns side by side, each as wide as its widest cell."""
    lines = list(lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:.2f} GiB" if abs(size) >= GIB / 100 else f"{math.ceil(size / 2**10)} KiB"
