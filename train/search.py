"""Which mesh and remat policy a stage should have on a slice, found by compiling the likeliest first.

What cannot be (heads, widths or rows that do not divide, weights that do not fit) is left out by
arithmetic. The rest is put in order by a rough count of bytes over links and of FLOPs, which decides
nothing but what is compiled early. The invariant: what is reported was compiled.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from llama_jax.attempts import try_each
from llama_jax.config import LlamaConfig
from llama_jax.entry import say
from llama_jax.mesh import legal_tensor_sizes, parse_mesh
from llama_jax.plan import Plan, gib, rank, summary
from llama_jax.remat import REMAT_POLICIES
from llama_jax.slices import Slice, all_slices, smallest_slice
from train.config import PhaseConfig, TrainConfig

# A mesh as `parse_mesh` gives it.
Sizes = dict[str, int]

# A mesh is worth its other remat policies if its step takes at most so much of the fastest's time.
_NEAR = 1.1

_LARGER_SLICES = 3


@dataclass(frozen=True)
class Choice:
    """What the search chooses."""

    mesh: str
    remat: str

    def __str__(self) -> str:
        return f"{self.mesh} with remat {self.remat}"

    def applied(self, config: TrainConfig, stage: str) -> TrainConfig:
        """The config with this choice for a stage."""
        settings = dataclasses.replace(config.stage[stage], mesh=self.mesh)
        run = dataclasses.replace(config.run, remat=self.remat)
        return dataclasses.replace(config, run=run, stage={**config.stage, stage: settings})


def search(
    config: TrainConfig, stage: str, target: Slice, attempt: Callable[[TrainConfig], Plan], *, seconds: float
) -> list[tuple[Choice, Plan]]:
    """Plans of the config's own mesh and of others within about so many seconds, the best first.

    attempt plans a config. Raises ValueError if no mesh of the slice can train the stage.
    """
    meshes = [spec(sizes) for sizes in ranked_meshes(config, stage, target)]
    if not meshes:
        raise ValueError(f"no mesh of {target} divides the model and the batches of stage {stage}; change batch_tokens")
    say(f"{len(meshes)} meshes of {target} can be; trying the likeliest for about {seconds:.0f} s, Ctrl-C ends it")

    def candidates(tried: list[tuple[Choice, Plan]]) -> Iterator[Choice]:
        own = _own_choice(config, stage, target)
        if own is not None:
            yield own
        first, *others = REMAT_POLICIES
        for mesh in meshes:
            if Choice(mesh, first) != own:
                yield Choice(mesh, first)
            if tried and _promising(mesh, tried):
                yield from (choice for remat in others if (choice := Choice(mesh, remat)) != own)

    def planned(choice: Choice) -> Plan:
        return attempt(choice.applied(config, stage))

    return try_each(candidates, planned, seconds=seconds, rank=rank, summary=summary)


def _promising(mesh: str, tried: list[tuple[Choice, Plan]]) -> bool:
    """Whether the last plan, of this mesh, fits and is about as fast as the best."""
    choice, last = tried[-1]
    fastest = min((_seconds(found) for _, found in tried if found.fits), default=0.0)
    return choice.mesh == mesh and last.fits and _seconds(last) <= _NEAR * fastest


def _seconds(found: Plan) -> float:
    return found.estimated_step_seconds or 0.0


def spec(sizes: Sizes) -> str:
    """A mesh as text."""
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "fsdp=1"


def _own_choice(config: TrainConfig, stage: str, target: Slice) -> Choice | None:
    """What the config says, if the slice has the devices for its mesh."""
    try:
        return Choice(spec(parse_mesh(config.stage_mesh(stage), target.num_chips)), config.run.remat)
    except ValueError as error:
        say(f"the config's own mesh cannot be: {error}")
        return None


def ranked_meshes(config: TrainConfig, stage: str, target: Slice) -> list[Sizes]:
    """Every mesh that can train the stage on the slice and whose weights and moments fit, the likeliest first."""
    model, capacity = config.stage_model(stage), target.chip.hbm_bytes or math.inf
    meshes = [
        sizes
        for sizes in legal_meshes(config, stage, target)
        if state_bytes(config, model) / _num_shards(sizes) <= capacity
    ]
    return sorted(meshes, key=lambda sizes: rough_count(config, stage, target, sizes))


def state_bytes(config: TrainConfig, model: LlamaConfig) -> int:
    """Bytes of weights and moments together."""
    return model.num_params() * (8 if config.optimizer.moment_dtype == "bfloat16" else 12)


def legal_meshes(config: TrainConfig, stage: str, target: Slice) -> Iterator[Sizes]:
    """Every mesh of all the slice's devices that divides the model and each phase's batch."""
    model, phases = config.stage_model(stage), config.stage[stage].phases
    shapes = [(config.stage[stage].phase_rows(phase), phase.seq_len) for phase in phases]
    num_chips, slices = target.num_chips, 1 if target.is_gpu else target.num_slices
    for tensor in legal_tensor_sizes(model, num_chips):
        for context in _divisors(num_chips // tensor) if num_chips % tensor == 0 else ():
            for data in _divisors(num_chips // (tensor * context)):
                fsdp = num_chips // (tensor * context * data)
                divided = all(
                    rows % (data * fsdp) == 0 and (context == 1 or seq_len % (2 * context) == 0)
                    for rows, seq_len in shapes
                )
                if divided and data % slices == 0 and model.embed_dim % (fsdp * context) == 0:
                    yield {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _num_shards(sizes: Sizes) -> int:
    """Over how many devices the weights are split."""
    return sizes["fsdp"] * sizes["context"] * sizes["tensor"]


def rough_count(config: TrainConfig, stage: str, target: Slice, sizes: Sizes) -> tuple[bool, float]:
    """Whether the stage's last phase looks too large for a mesh under full remat, and about how long a step takes.

    Counted are: weights gathered twice and their gradients scattered once a micro-batch, the residual
    stream gathered and scattered around attention and MLP, keys and values over `context`, gradients
    over `data`; all in bfloat16, along two links.
    """
    model, phase, chip = config.stage_model(stage), config.stage[stage].phases[-1], target.chip
    data, fsdp, context, tensor = sizes.values()
    tokens = phase.batch_tokens / (data * fsdp * context)
    most = max(config.run.micro_batch_tokens or tokens, phase.seq_len / context)
    weights, stream = 2 * model.num_params() / tensor, 2 * model.embed_dim * tokens * model.num_layers
    keys = 4 * model.num_kv_heads * model.head_dim * tokens * context * model.num_layers / tensor
    saved = stream * min(1, most / tokens)
    held = state_bytes(config, model) / _num_shards(sizes) + weights * 2 / (fsdp * context) + saved / tensor
    link = 2 * chip.link_bandwidth or 1.0
    # GPUs reach beyond their node by the network alone; along `data` several slices of TPUs do.
    wide = chip.network_bandwidth if target.is_gpu and target.num_slices > 1 else link
    outer = chip.network_bandwidth if target.num_slices > 1 else link
    seconds = 3 * weights * math.ceil(tokens / most) / wide if fsdp * context > 1 else 0.0
    seconds += 12 * stream / link if tensor > 1 else 0.0
    seconds += 3 * keys / wide if context > 1 else 0.0
    seconds += 2 * weights / (fsdp * context) / outer if data > 1 else 0.0
    return bool(chip.hbm_bytes) and held > chip.hbm_bytes, seconds


def never_fits(config: TrainConfig, stage: str, target: Slice) -> str | None:
    """Why no mesh of the slice can hold the stage's weights and moments, and the smallest slice that would."""
    model, capacity = config.stage_model(stage), target.chip.hbm_bytes
    needed = state_bytes(config, model)
    if not capacity or needed <= capacity * target.num_chips:
        return None
    enough = smallest_slice(target.kind, needed)
    way = f"the smallest slice that holds them is {enough}" if enough else f"no single slice of {target.kind} does"
    return (
        f"weights and optimizer are {gib(needed)}, and {target} has {target.num_chips} x {gib(capacity)}; {way} "
        "(optimizer.moment_dtype=bfloat16 would take a third less)"
    )


def ways_out(
    config: TrainConfig, stage: str, phase: PhaseConfig, target: Slice
) -> Iterator[tuple[str, TrainConfig, Slice]]:
    """Changes that may make a phase fit, what changes least first: settings as text, the config, the slice."""
    run, sets = config.run, {}
    a_row = min(run.micro_batch_tokens or phase.seq_len, phase.seq_len)
    changes = [("remat", "full"), ("loss_chunks", 4 * run.loss_chunks), ("micro_batch_tokens", a_row)]
    for key, value in [*changes, ("remat", "offload")]:
        if getattr(run, key) != value:
            sets[key] = value
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, **{key: value}))
            yield _settings(sets), config, target
    larger = [found for found in all_slices(target.kind) if found.num_chips > target.num_chips]
    doubled = [found for found in larger if found.num_chips % target.num_chips == 0][:_LARGER_SLICES]
    for other in [target, *doubled]:
        for mesh in map(spec, ranked_meshes(config, stage, other)[:1]):
            where = f" on {other}" if other != target else ""
            text = _settings(sets | {"mesh": mesh}) + where
            yield text, Choice(mesh, config.run.remat).applied(config, stage), other


def _settings(sets: Mapping[str, object]) -> str:
    return " ".join(f"--set run.{key}={value}" for key, value in sets.items())
