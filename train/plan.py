"""A stage of pretraining planned for a slice that need not be here: does it fit, how long, what does it cost.

Every phase of the stage is compiled by itself, with the function that the run jits and abstract
values in place of the state and the batch; nothing is allocated and no data are read. The invariant:
what is compiled here for cpu:8 is what a run on eight CPU devices executes.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

from llama_jax.attempts import advise
from llama_jax.chips import GIB
from llama_jax.config import LlamaConfig
from llama_jax.devices import model_name, use_compilation_cache
from llama_jax.entry import say
from llama_jax.memory import bytes_a_device
from llama_jax.mesh import ShardingRules, tensor_axes
from llama_jax.model import Llama, padded_vocab
from llama_jax.plan import Plan, Terms, check_directory, gib, plan, rank, rows, sources, summary, table
from llama_jax.program import Buffer
from llama_jax.slices import Slice, all_slices, parse_slice, use_slice
from llama_jax.tree import leaf_name
from train.checkpoints import initial_state
from train.config import PhaseConfig, TrainConfig
from train.data.packing import Batch
from train.loop import jit_step
from train.optimizer import Optimizer, TrainState, make_optimizer, num_micro_batches
from train.search import Choice, never_fits, search, ways_out

# Bytes a second that a host is taken to write to its store.
STORE_BANDWIDTH = 1e9

_SECONDS_PER_DAY = 86_400

_NUM_BEST = 5

Tried = list[tuple[Choice, Plan]]


def print_plan(
    config: TrainConfig,
    stage: str,
    slice_name: str,
    *,
    as_json: bool,
    search_seconds: float = 0.0,
    hlo: Path | None = None,
) -> None:
    """Plan a stage and print a table, or one JSON object, a phase.

    With search_seconds the mesh and the remat policy are the best that are found in about so long,
    among them the config's own. hlo: where the text of the compiled program is written, of a stage
    with several the further ones beside it with a number. Raises ValueError for what cannot be planned.
    """
    target = parse_slice(slice_name)
    if stage not in config.stage:
        raise ValueError(f"config {config.name} has no stage {stage!r}; it has {', '.join(config.stage)}")
    if reason := never_fits(config, stage, target):
        raise ValueError(f"{model_name(config.stage_model(stage))}: {reason}")
    check_directory(hlo)
    use_compilation_cache()
    tried: Tried = []
    if search_seconds:
        last = config.stage[stage].phases[-1]
        tried = search(
            config, stage, target, lambda other: plan_phase(other, stage, last, target), seconds=search_seconds
        )
        config = tried[0][0].applied(config, stage)
    for found, report in plan_stage(config, stage, target, tried=tried, hlo=hlo):
        if as_json:
            print(json.dumps(report), flush=True)
        else:
            print(table(_lines(found, report)), end="\n\n", flush=True)


def plan_stage(
    config: TrainConfig, stage: str, target: Slice, *, tried: Tried | None = None, hlo: Path | None = None
) -> Iterator[tuple[Plan, dict[str, Any]]]:
    """The program of each phase with the report on it; phases that run the same program are compiled once.

    tried: what a search has planned of the last phase, the config's own choice first.
    """
    settings = config.stage[stage]
    compiled: dict[tuple[int, int], Plan] = {}
    if tried and hlo is None:
        compiled[_shape(settings.phases[-1])] = tried[0][1]
    stored = _stored_bytes(config, stage, target)
    for phase in settings.phases:
        if _shape(phase) not in compiled:
            path = hlo and hlo.with_name(f"{hlo.name}.{len(compiled) + 1}") if compiled else hlo
            compiled[_shape(phase)] = plan_phase(config, stage, phase, target, hlo=path)
        found = compiled[_shape(phase)]
        report = _report(config, stage, phase, found, stored)
        if not found.fits:
            largest = found.largest or _largest_elsewhere(config, stage, phase, target)
            found = dataclasses.replace(found, largest=largest)
            report |= {"largest": largest, "advice": advice(config, stage, phase, target)}
        yield found, report | {"best": [_tried_as_json(*pair) for pair in (tried or [])[:_NUM_BEST]]}


def _shape(phase: PhaseConfig) -> tuple[int, int]:
    return phase.batch_tokens, phase.seq_len


def plan_phase(config: TrainConfig, stage: str, phase: PhaseConfig, target: Slice, *, hlo: Path | None = None) -> Plan:
    """Compile the step of one phase for a slice. Raises ValueError if the mesh does not fit the slice or the model."""
    settings, model = config.stage[stage], config.stage_model(stage)
    num_rows = settings.phase_rows(phase)
    optimizer = make_optimizer(config.optimizer, settings)
    with use_slice(target, config.stage_mesh(stage)):
        state = abstract_state(config, stage, optimizer)
        say(f"compiling {model_name(model)}, {num_rows} rows of {phase.seq_len}, for {target}")
        lowered, batch_bytes = lower_phase(config, stage, phase, optimizer=optimizer, state=state)
        parts = {"weights": bytes_a_device(state.params), "optimizer": bytes_a_device(state.opt_state)}
        return plan(
            lowered,
            target,
            parts=parts | {"batch": batch_bytes},
            model_flops=num_rows * phase.seq_len * model.train_flops_per_token(phase.seq_len),
            terms=model_terms(config, stage, phase, state.params),
            hlo=hlo,
        )


def lower_phase(
    config: TrainConfig, stage: str, phase: PhaseConfig, *, optimizer: Optimizer, state: TrainState
) -> tuple[jax.stages.Lowered, int]:
    """The step of a phase with an abstract state, and the bytes a device of its batch.

    Raises ValueError if the ambient mesh does not divide the batch.
    """
    rules = state.params.rules
    step = jit_step(config, stage, phase=phase, optimizer=optimizer, rules=rules)
    batch = abstract_batch(config.stage[stage].phase_rows(phase), phase.seq_len, rules)
    return step.lower(state, batch), bytes_a_device(batch)


def abstract_state(config: TrainConfig, stage: str, optimizer: Optimizer) -> TrainState:
    """Shapes and shardings of what a stage starts with, on the ambient mesh."""
    state = jax.eval_shape(lambda: initial_state(config.stage_model(stage), optimizer, config.run.seed))
    # Counters come without a sharding; in a run each device holds them.
    everywhere = NamedSharding(get_mesh(), PartitionSpec())
    return jax.tree.map(lambda x: x.update(sharding=x.sharding or everywhere), state)


def abstract_batch(num_rows: int, seq_len: int, rules: ShardingRules) -> Batch:
    """Shapes and shardings of a batch as train.device puts it."""
    sharding = NamedSharding(get_mesh(), rules("batch", "sequence"))
    ids = jax.ShapeDtypeStruct((num_rows, seq_len), jnp.int32, sharding=sharding)
    return Batch(ids, ids, ids, ids, jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=sharding))


def model_terms(config: TrainConfig, stage: str, phase: PhaseConfig, params: Llama) -> Terms:
    """What the arrays of a step are in terms of the model, known by how many values a device holds of them."""
    rules, sizes, cfg = params.rules, get_mesh().shape, params.cfg
    tensor = math.prod(sizes[axis] for axis in tensor_axes(get_mesh()))
    shards = math.prod(sizes[axis] for axis in rules.embed)
    num_rows = config.stage[stage].phase_rows(phase)
    num_parts = num_micro_batches(num_rows, phase.seq_len, config.run.micro_batch_tokens, rules)
    splits = rules.batch_multiple * math.prod(sizes[axis] for axis in rules.sequence)
    tokens = num_rows * phase.seq_len // (splits * num_parts)
    rows = -(-padded_vocab(cfg, rules) // tensor // config.run.loss_chunks)
    names = {rows * tokens: "logits of a chunk of the loss"}
    for count, name in _activations(cfg, tokens, tensor):
        names.setdefault(count, f"{name} of a layer")
        names.setdefault(cfg.num_layers * count, f"{name}, saved of every layer")
    for path, leaf in jax.tree.leaves_with_path(params):
        name = leaf_name(path)
        held = math.prod(leaf.sharding.shard_shape(leaf.shape))
        names.setdefault(held, name)
        names.setdefault(held * shards, f"{name}, gathered")
        if name.startswith("layers"):
            names.setdefault(held * shards // cfg.num_layers, f"{name} of a layer, gathered")

    def terms(buffer: Buffer) -> str | None:
        name = names.get(math.prod(buffer.dims))
        return name and f"{'gradient of ' if 'transpose(' in buffer.operation else ''}{name} ({buffer.kind})"

    return terms


def _activations(cfg: LlamaConfig, tokens: int, tensor: int) -> Iterator[tuple[int, str]]:
    """Counts of values that a device holds of each activation of a layer."""
    yield tokens * cfg.embed_dim, "residual stream"
    if tensor > 1:
        yield tokens * cfg.embed_dim // tensor, "residual stream, split over tensor"
    yield tokens * cfg.mlp_dim // tensor, "gate or up"
    yield tokens * cfg.num_heads * cfg.head_dim // tensor, "queries or attention's result"
    yield tokens * cfg.num_kv_heads * cfg.head_dim // tensor, "keys or values"


def _stored_bytes(config: TrainConfig, stage: str, target: Slice) -> tuple[int, int]:
    """Bytes of a checkpoint, and of the largest weight that a device holds."""
    with use_slice(target, config.stage_mesh(stage)):
        state = abstract_state(config, stage, make_optimizer(config.optimizer, config.stage[stage]))
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)
        return whole, max(map(bytes_a_device, jax.tree.leaves(state.params)))


def _report(
    config: TrainConfig, stage: str, phase: PhaseConfig, found: Plan, stored: tuple[int, int]
) -> dict[str, Any]:
    """The plan with what follows from it for a phase of the stage."""
    settings, target = config.stage[stage], parse_slice(found.slice)
    price, steps = target.price, settings.phase_steps()[settings.phases.index(phase)]
    seconds = found.estimated_step_seconds
    hours = seconds and seconds * steps * found.chips / 3600
    checkpoint, largest = stored
    num_hosts = max(1, found.chips // target.chips_per_host)
    return dataclasses.asdict(found) | {
        "stage": stage,
        "seq_len": phase.seq_len,
        "batch_tokens": phase.batch_tokens,
        "remat": config.run.remat,
        "quantize": config.run.quantize or None,
        "tokens_per_second": seconds and phase.batch_tokens / seconds,
        "tokens_per_dollar": phase.batch_tokens / seconds * 3600 / (found.chips * price) if seconds and price else None,
        "stage_tokens": steps * phase.batch_tokens,
        "stage_days": seconds and seconds * steps / _SECONDS_PER_DAY,
        "device_hours": hours,
        "cost": hours * price if hours and price else None,
        "checkpoint_bytes": checkpoint,
        "checkpoint_seconds": checkpoint / num_hosts / STORE_BANDWIDTH,
        "host_ram_to_load_bytes": max(GIB, largest * min(target.chips_per_host, found.chips)),
        "disk_bytes": (config.run.keep_checkpoints + 1) * checkpoint,
        "advice": None,
        "sources": sources(found) | {"cost": "by its price", "checkpoint_seconds": "assumed"},
    }


def _lines(found: Plan, report: dict[str, Any]) -> list[tuple[str, str, str]]:
    shape = f"stage {report['stage']}: {report['batch_tokens']:,} tokens a step in rows of {report['seq_len']:,}"
    shape += f", remat {report['remat']}" + (f", {report['quantize']} weights" if report["quantize"] else "")
    lines = [(f"{found.slice}, {found.mesh}", "", shape), *rows(found)]
    if report["advice"]:
        lines.append(("what to change", "compiled", report["advice"]))
    if report["stage_days"]:
        speed, hours = f"{report['tokens_per_second']:,.0f} tokens/s", f"{report['device_hours']:,.0f} chip-hours"
        if report["cost"]:
            speed += f", {report['tokens_per_dollar']:,.0f} a dollar"
            hours += f", ${report['cost']:,.0f}"
        lines += [
            ("speed", "estimated", speed),
            ("the phase", "estimated", f"{report['stage_tokens']:.3g} tokens in {report['stage_days']:,.1f} days"),
            ("cost", "by its price", hours),
        ]
    stored = f"{gib(report['checkpoint_bytes'])}, written in {report['checkpoint_seconds']:.0f} s at 1 GB/s a host"
    lines += [
        ("a checkpoint", "assumed", stored),
        ("to load it", "computed", f"{gib(report['host_ram_to_load_bytes'])} of host memory"),
        ("on disk", "computed", gib(report["disk_bytes"])),
        ("compiled in", "measured", f"{found.compile_seconds:.0f} s"),
    ]
    if report["best"]:
        lines.append(("the best tried", "", "of the last phase"))
    return lines + [(f"  remat {one['remat']}", "compiled", one["summary"]) for one in report["best"]]


def _tried_as_json(choice: Choice, found: Plan) -> dict[str, Any]:
    keys = ("mesh", "fits", "hbm_peak_bytes", "estimated_step_seconds", "estimated_mfu")
    return {"remat": choice.remat, "summary": summary(found)} | {key: getattr(found, key) for key in keys}


def _largest_elsewhere(config: TrainConfig, stage: str, phase: PhaseConfig, target: Slice) -> dict[str, int]:
    """The largest buffers of a program that its compiler refused, as that of a chip with more memory makes them."""
    same = (found for found in all_slices("v5p") if found.num_chips * target.num_slices == target.num_chips)
    roomier = next((dataclasses.replace(found, num_slices=target.num_slices) for found in same), None)
    if target.is_gpu or target.kind in ("cpu", "v5p") or roomier is None:
        return {}
    say(f"{target}'s compiler refuses the program; looking at its buffers on {roomier}")
    return dict(plan_phase(config, stage, phase, roomier).largest)


def advice(config: TrainConfig, stage: str, phase: PhaseConfig, target: Slice, *, seconds: float = 1800.0) -> str:
    """What to change where a phase does not fit: the first change of `ways_out` that does, having been compiled."""

    def attempt(way: tuple[str, TrainConfig, Slice]) -> Plan:
        return plan_phase(way[1], stage, phase, way[2])

    ways = ways_out(config, stage, phase, target)
    return advise(ways, attempt, otherwise="more chips", seconds=seconds, rank=rank, summary=summary)
