"""What a compiled program does, read from the text of its optimized HLO: products, traffic, cycles, kernels.

Source: XLA's HLO text as jax.stages.Compiled.as_text() gives it, for TPU and CPU. XLA's own
cost_analysis counts a loop's body once and a kernel as nothing; here the invariant is that whatever
stands in a loop counts as often as the loop runs. A loop whose length is known only when it runs
(decoding until every row has ended) counts once, so that its numbers are those of one turn.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|true_computation=(\S+), false_computation=(\S+?)[,\s])")

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "u2": 2, "s2": 2, "u4": 4, "s4": 4, "bf16": 16, "c64": 64, "c128": 128}

# Products of queries and keys, or of as much work, in one call of an attention kernel, by a part of its name.
_ATTENTION_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "flash_attention": 2}

# Instructions that make no array of their own.
_NO_ARRAY = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "constant", "call")

Group = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Collective:
    """One kind of exchange among one group of devices (their places in the mesh; the others do the same).

    Bytes are those of the whole array, before it is scattered or after it is gathered. Where it is
    overlapped, the program goes on computing meanwhile. Where it is across slices of TPUs, the
    compiler hands each device's own array to the network, and the group is ().
    """

    kind: str
    group: Group
    overlapped: bool
    across: bool = False


@dataclass(frozen=True)
class Buffer:
    """An array that the program makes in its device's memory: element type, dimensions, and the operation's name."""

    kind: str
    dims: Shape
    operation: str

    @property
    def num_bytes(self) -> int:
        """Its size without padding."""
        return _size(self.kind, self.dims)


@dataclass
class Program:
    """Work of one device in one run: FLOPs of matrix products, the compiler's estimated cycles, bytes, calls.

    collectives: bytes of each. kernels: calls of each Pallas kernel by name; kernel_flops: their
    FLOPs, of those known to be attention. copied_bytes: of copies within one memory, in a fusion of
    one that it makes. buffers: the arrays that it makes, not all of them at once.
    """

    matmul_flops: float = 0.0
    cycles: float = 0.0
    copied_bytes: float = 0.0
    kernel_flops: float = 0.0
    collectives: Counter[Collective] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    buffers: set[Buffer] = field(default_factory=set)


def read_program(text: str) -> Program:
    """What the program does whose optimized HLO module has this text. Raises ValueError if it is none."""
    computations, entry = _parse(text)
    if entry is None:
        raise ValueError("expected the text of an HLO module, which has an ENTRY computation")
    program = Program()
    _count(program, computations, entry, 1.0)
    return program


@dataclass(frozen=True)
class _Instruction:
    """name = type opcode(rest."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def shapes(self) -> list[tuple[str, Shape]]:
        """Element types and dimensions: one, or those of a tuple."""
        return [(kind, _integers(dims)) for kind, dims in _SHAPE.findall(self.type)]

    def attribute(self, name: str) -> str | None:
        """The value of `name=...`, of one in braces what is within them."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.rest)
        return None if found is None else found[1] if found[1] is not None else found[2].lstrip("%")


_Computation = dict[str, _Instruction]


def _parse(text: str) -> tuple[dict[str, _Computation], str | None]:
    computations: dict[str, _Computation] = {}
    entry, current = None, {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[1]] = _Instruction(*found.groups())
    return computations, entry


def _count(
    program: Program, computations: dict[str, _Computation], name: str, times: float, *, fusions: int = 0
) -> None:
    """Add what a computation does, run this often, within so many fusions, which make no arrays in between."""
    inside = computations[name]
    *_, root = inside.values()
    for instruction in inside.values():
        if not fusions and instruction.opcode not in _NO_ARRAY:
            program.buffers.update(_buffers(instruction))
        if found := _CYCLES.search(instruction.rest):
            program.cycles += times * int(found[1])
        opcode = instruction.opcode
        if opcode in ("dot", "convolution"):
            flops = _dot_flops if opcode == "dot" else _convolution_flops
            program.matmul_flops += times * flops(instruction, inside)
        elif opcode == "copy" and (not fusions or (fusions == 1 and instruction is root)):
            program.copied_bytes += times * _num_bytes(instruction)
        elif opcode.removesuffix("-start") in COLLECTIVES:
            _count_collective(program, instruction, inside, name, times)
        elif opcode == "send" and (found := _MEGASCALE.search(instruction.rest)):
            across = Collective(found[1].lower().replace("_", "-"), (), True, across=True)
            program.collectives[across] += times * _size(*instruction.shapes[0])  # type: ignore[assignment]
        elif opcode == "custom-call":
            _count_kernel(program, instruction, inside, times)
        for called, turns in _called(instruction, inside, computations):
            _count(program, computations, called, times * turns, fusions=fusions + (opcode == "fusion"))


def _buffers(instruction: _Instruction) -> Iterator[Buffer]:
    """The arrays of an instruction's result that lie in the device's main memory, which has the number 0."""
    found = _OP_NAME.search(instruction.rest)
    for kind, dims, layout in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^{}]*\})?", instruction.type):
        if not re.search(r"S\([1-9]", layout):
            yield Buffer(kind, _integers(dims), found[1] if found else instruction.opcode)


def _called(
    instruction: _Instruction, inside: _Computation, computations: dict[str, _Computation]
) -> Iterator[tuple[str, float]]:
    """Computations that an instruction runs, each with how often; of a condition's branches each its share."""
    if instruction.opcode == "while":
        yield instruction.attribute("body") or "", _num_turns(instruction, inside, computations)
    elif instruction.opcode == "conditional":
        found = _BRANCHES.search(instruction.rest)
        branches = re.findall(r"[\w.\-]+", " ".join(filter(None, found.groups()))) if found else []
        yield from ((branch, 1 / len(branches)) for branch in branches)
    elif instruction.opcode in ("fusion", "call", "async-start"):
        called = instruction.attribute("calls") or instruction.attribute("to_apply")
        if called:
            yield called, 1.0


def _num_turns(loop: _Instruction, inside: _Computation, computations: dict[str, _Computation]) -> float:
    """How often a loop runs: what the compiler says, else the constant below which its condition keeps a counter."""
    if found := _TRIPS.search(loop.rest):
        return float(found[1])
    condition = computations[loop.attribute("condition") or ""]
    root = list(condition.values())[-1]
    operands = [condition.get(name) for name in root.operands]
    if root.opcode != "compare" or "direction=LT" not in root.rest or None in operands:
        return 1.0
    counter, bound = operands
    assert counter is not None and bound is not None
    if counter.opcode != "get-tuple-element" or bound.opcode != "constant":
        return 1.0
    index = int(counter.attribute("index") or 0)
    initial = inside.get(loop.operands[0])
    start = _value(inside.get(initial.operands[index]), inside) if initial and initial.opcode == "tuple" else None
    body = computations[loop.attribute("body") or ""]
    root = list(body.values())[-1]
    step = body.get(root.operands[index]) if root.opcode == "tuple" else None
    steps = [_value(body.get(name), body) for name in step.operands] if step and step.opcode == "add" else []
    # A product whose operands come round a ring may take several parts a turn.
    each = next((value for value in steps if value), 1)
    return float(-(-(_constant(bound) - (start or 0)) // each))


def _value(instruction: _Instruction | None, inside: _Computation) -> int | None:
    """The constant that an instruction passes on, if it is one."""
    while instruction is not None and instruction.opcode in ("copy", "bitcast"):
        instruction = inside.get(instruction.operands[0])
    return _constant(instruction) if instruction is not None and instruction.opcode == "constant" else None


def _constant(instruction: _Instruction) -> int:
    return int(instruction.rest.partition(")")[0])


def _dot_flops(dot: _Instruction, inside: _Computation) -> int:
    (_, result), (_, left) = dot.shapes[0], inside[dot.operands[0]].shapes[0]
    contracted = _integers(dot.attribute("lhs_contracting_dims") or "")
    return 2 * math.prod(result) * math.prod(left[dim] for dim in contracted)


def _convolution_flops(convolution: _Instruction, inside: _Computation) -> int:
    """As XLA counts: products with padding are none. TPUs write every product so, and its heads as padded windows."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest)
    assert labels is not None
    operands = [inside[name].shapes[0][1] for name in convolution.operands[:2]]
    # For each array the size of every dimension by its letter: b, f, i, o and the window's 0, 1, ...
    left, right, result = (
        dict(zip(letters, dims, strict=True))
        for letters, dims in zip(labels.groups(), (*operands, convolution.shapes[0][1]), strict=True)
    )
    dims = sorted(set(left) - {"b", "f"})
    window = convolution.attribute("window") or ""

    def of_window(name: str, default: str) -> list[str]:
        found = re.search(rf"\b{name}=(\S+)", window)
        return found[1].split("x") if found else [default] * len(dims)

    settings = zip(*(of_window(name, "1") for name in ("stride", "lhs_dilate", "rhs_dilate")), strict=True)
    positions = math.prod(
        _num_positions((left[dim], right[dim], result[dim]), int(pad.partition("_")[0]), *map(int, steps))
        for dim, pad, steps in zip(dims, of_window("pad", "0_0"), settings, strict=True)
    )
    rows = left["b"] // int(convolution.attribute("batch_group_count") or 1)
    return 2 * rows * right["i"] * result["f"] * positions


def _num_positions(sizes: tuple[int, int, int], pad: int, stride: int, spread: int, gap: int) -> int:
    """In one dimension, how often a tap of the window meets a value of the input; sizes: input, window, result."""
    size, taps, places = sizes
    reach = (place * stride + tap * gap - pad for place in range(places) for tap in range(taps))
    return sum(0 <= at <= (size - 1) * spread and at % spread == 0 for at in reach)


def _count_collective(
    program: Program, instruction: _Instruction, inside: _Computation, name: str, times: float
) -> None:
    # A chain is one exchange that rides along with computing: it stands in the fusion that starts it, in each that
    # carries it on, which may be an inner loop's, and in the one that ends it.
    chained = "chain_id=" in instruction.rest
    if chained and not any("AsyncCollectiveStart" in other.rest for other in inside.values()):
        return
    started = instruction.opcode.endswith("-start")
    kind, overlapped = instruction.opcode.removesuffix("-start"), started or chained
    sizes = [_size(*shape) for shape in instruction.shapes]
    # A start gives its operands, its results and marks of a few bytes; a plain one its results.
    size = max(sizes) if started else sum(sizes)
    if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"  # TPU's form of one is a fusion of a reduction and a slice
    elif kind == "reduce-scatter":
        size *= len(_first_group(instruction.rest))
    program.collectives[Collective(kind, _first_group(instruction.rest), overlapped)] += times * size  # type: ignore


def _first_group(rest: str) -> Group:
    """The first of the groups of devices that exchange with one another; () for all devices."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", rest):
        return _integers(found[1])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        groups, dims = _integers(found[1]), _integers(found[2])
        order = _integers(found[3]) if found[3] else tuple(range(len(dims)))
        return _transposed(dims, order)[: groups[-1]]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        inner = [axis for axis in re.findall(r"'([^']+)'", found[2]) if axis in sizes]
        order = [*(axis for axis in sizes if axis not in inner), *inner]
        ids = _transposed(tuple(sizes.values()), tuple(list(sizes).index(axis) for axis in order))
        return ids[: math.prod(sizes[axis] for axis in inner)]
    return ()


def _transposed(dims: Shape, order: Shape) -> Group:
    """Numbers 0, 1, 2, ... of an array [dims], with its dimensions in another order, flat."""
    steps = [math.prod(dims[dim + 1 :]) for dim in order]
    numbers = [0]
    for dim, step in zip(order, steps, strict=True):
        numbers = [number + step * index for number in numbers for index in range(dims[dim])]
    return tuple(numbers)


def _count_kernel(program: Program, call: _Instruction, inside: _Computation, times: float) -> None:
    if 'custom_call_target="tpu_custom_call"' not in call.rest:
        return
    name = re.sub(r"[.\d]+$", "", call.name)
    program.kernels[name] += times  # type: ignore[assignment]
    products = next((count for part, count in _ATTENTION_PRODUCTS.items() if part in name), 0)
    operands = [shape for name in call.operands if name in inside for shape in inside[name].shapes]
    shapes = [dims for kind, dims in operands if kind in ("bf16", "f32") and len(dims) > 2]
    if products and len(shapes) > 1:
        queries, keys = shapes[0], shapes[1]
        # The keys' sequence, last or last but one, is the longer side: splash has at least 128 of them.
        num_keys = max(keys[-2:])
        # Splash leaves out what a causal mask hides, and under `context` every device has about half of it, too.
        causal = 2 if name.startswith("splash") or num_keys in queries[-2:] else 1
        program.kernel_flops += times * products * 2 * math.prod(queries) * num_keys / causal


def _num_bytes(instruction: _Instruction) -> int:
    return sum(_size(*shape) for shape in instruction.shapes)


def _size(kind: str, dims: Shape) -> int:
    digits = re.match(r"[a-z]+(\d+)", kind)
    bits = _BITS.get(kind) if kind in _BITS else int(digits[1]) if digits else 0
    return (bits or 0) * math.prod(dims) // 8


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
