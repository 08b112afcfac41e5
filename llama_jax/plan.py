"""What a jitted step would need and how fast it should be on a slice that is not here, from compiling it.

The invariant: the plan is the run. What is compiled is the very program that the run would execute,
by the compiler that the run would use, with abstract values in place of arrays; there is no second
model of its cost. Memory, FLOPs, bytes and cycles are the compiler's; that attention kernels reach
KERNEL_EFFICIENCY and that collectives move at the speed of their links is assumed.
"""

import dataclasses
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, get_mesh

from llama_jax.memory import bytes_left
from llama_jax.mesh import mesh_text
from llama_jax.program import Collective, Program, read_program
from llama_jax.slices import GIB, Device, Slice, wraps

# Share of a chip's peak at which attention kernels are taken to run.
KERNEL_EFFICIENCY = 0.6

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Plan:
    """One program on one slice. Bytes, FLOPs and seconds are those of one chip and step; None is not known.

    hbm_temporaries_bytes: what is alive beside the arguments when most is. parts: the arguments in
    terms of the model. collectives: kind -> network ("ici" within a slice, "dcn" between slices) ->
    bytes of the arrays exchanged. kernels: calls of each Pallas kernel.
    """

    slice: str
    chips: int
    mesh: str
    fits: bool
    hbm_capacity_bytes: int
    hbm_peak_bytes: int
    hbm_arguments_bytes: int
    hbm_temporaries_bytes: int
    host_bytes: int
    parts: Mapping[str, int]
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


def plan(lowered: jax.stages.Lowered, target: Slice, *, parts: Mapping[str, int], model_flops: float = 0.0) -> Plan:
    """Compile a step that was lowered with abstract arguments on the ambient mesh of the slice's devices.

    parts: bytes a chip of the arguments, by name. model_flops: those of all chips together.
    """
    mesh, capacity, began = get_mesh(), _capacity(target), time.perf_counter()
    here = {"slice": str(target), "mesh": mesh_text(mesh), "parts": dict(parts)}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory, done = _refused(str(error), sum(parts.values())), {}
    else:
        memory = _memory(compiled, target)
        done = _work(read_program(compiled.as_text() or ""), target, mesh, model_flops / mesh.size)
    return Plan(
        **here,
        chips=mesh.size,
        fits=memory.peak <= capacity,
        hbm_capacity_bytes=capacity,
        hbm_peak_bytes=memory.peak,
        hbm_arguments_bytes=memory.arguments,
        hbm_temporaries_bytes=memory.peak - memory.arguments,
        host_bytes=memory.host,
        compile_seconds=time.perf_counter() - began,
        **done,
    )


def _capacity(target: Slice) -> int:
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
    peak = bound if host or target.kind == "cpu" else stats.peak_memory_in_bytes
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
        "collectives": _by_network(program, mesh),
        **_seconds(program, target, mesh, model_flops),
    }


def _by_network(program: Program, mesh: Mesh) -> dict[str, dict[str, float]]:
    moved: dict[str, dict[str, float]] = defaultdict(lambda: {"ici": 0.0, "dcn": 0.0})
    for collective, size in program.collectives.items():
        slices = {getattr(device, "slice_index", None) for device in _members(collective, mesh)}
        moved[collective.kind]["dcn" if len(slices) > 1 else "ici"] += size
    return dict(moved)


def _members(collective: Collective, mesh: Mesh) -> list[Device]:
    devices = mesh.devices.flatten()
    return [devices[place] for place in collective.group or range(len(devices))]


def _seconds(program: Program, target: Slice, mesh: Mesh, model_flops: float) -> dict[str, float]:
    chip = target.chip
    if not chip.clock:
        return {}
    compute = program.cycles / chip.clock + program.kernel_flops / (KERNEL_EFFICIENCY * chip.flops)
    blocking = hidden = 0.0
    for collective, size in program.collectives.items():
        seconds = collective_seconds(collective, size, _members(collective, mesh), target)
        hidden, blocking = (hidden + seconds, blocking) if collective.overlapped else (hidden, blocking + seconds)
    step = max(compute, hidden) + blocking
    return {
        "estimated_compute_seconds": compute,
        "estimated_collective_seconds": blocking + hidden,
        "estimated_step_seconds": step,
        "estimated_mfu": model_flops / (step * chip.flops) if step else 0.0,
    }


def collective_seconds(collective: Collective, size: float, members: Iterable[Device], target: Slice) -> float:
    """Seconds to exchange an array of this size on the links of the torus's sides along which the members lie.

    A side that is a ring sends both ways round it, one that is a line is as slow as its middle.
    """
    places = [device.coords for device in members]
    if len(places) < 2 or not target.chip.link_bandwidth:
        return 0.0
    if collective.kind == "collective-permute":
        return size / target.chip.link_bandwidth
    rings = wraps(target.shape)
    sides = [side for side in range(3) if len({place[side] for place in places}) > 1]
    links = sum(2 if rings[side] and len({p[side] for p in places}) == _side(target, side) else 1 for side in sides)
    passes = 2 if collective.kind == "all-reduce" else 1
    return passes * size * (len(places) - 1) / len(places) / (max(links, 1) * target.chip.link_bandwidth)


def _side(target: Slice, side: int) -> int:
    return target.shape[side] if side < len(target.shape) else 1


def rows(found: Plan) -> list[tuple[str, str, str]]:
    """What a plan says, for people: name, where it is from, value."""
    spare = found.hbm_capacity_bytes - found.hbm_peak_bytes
    verdict = f"yes, {gib(spare)} to spare" if found.fits else f"NO, {gib(-spare)} too much"
    parts = ", ".join(f"{name} {gib(size)}" for name, size in found.parts.items())
    lines = [
        ("fits", "compiled", verdict),
        ("memory a chip", "compiled", f"{gib(found.hbm_peak_bytes)} of {gib(found.hbm_capacity_bytes)}"),
        ("  arguments", "compiled", f"{gib(found.hbm_arguments_bytes)}: {parts}"),
        ("  temporaries", "compiled", gib(found.hbm_temporaries_bytes)),
    ]
    if found.host_bytes:
        lines.append(("  on the host", "compiled", gib(found.host_bytes)))
    if found.matmul_flops_per_chip is None:
        return lines
    lines.append(("matrix products", "compiled", f"{found.matmul_flops_per_chip / 1e12:.4g} TFLOP"))
    if found.kernels:
        lines.append(("in kernels", "counted", f"{(found.kernel_flops_per_chip or 0) / 1e12:.4g} TFLOP"))
    lines += [(f"  {name}", "compiled", f"{calls:.0f} calls") for name, calls in found.kernels.items()]
    for kind, networks in found.collectives.items():
        sizes = " and ".join(f"{gib(size)} over {network}" for network, size in networks.items() if size)
        lines.append((kind, "compiled", sizes))
    if found.estimated_step_seconds is not None:
        assumed = f"the compiler's cycles, and kernels at {KERNEL_EFFICIENCY:.0%} of peak"
        lines += [
            ("computing", "estimated", f"{found.estimated_compute_seconds:.4g} s: {assumed}"),
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
