"""A stage of pretraining planned for a slice that need not be here: does it fit, how long, what does it cost.

Every phase of the stage is compiled by itself, with the function that the run jits and abstract
values in place of the state and the batch; nothing is allocated and no data are read. The invariant:
what is compiled here for cpu:8 is what a run on eight CPU devices executes.
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, get_mesh

from llama_jax.devices import model_name, use_compilation_cache
from llama_jax.entry import say
from llama_jax.memory import bytes_a_device
from llama_jax.mesh import ShardingRules, use_mesh
from llama_jax.plan import Plan, gib, plan, rows, table
from llama_jax.slices import CHIPS, GIB, Slice, open_slice, parse_slice, smallest_slice
from train.checkpoints import initial_state
from train.config import PhaseConfig, TrainConfig
from train.data import Batch
from train.loop import jit_step
from train.optimizer import Optimizer, TrainState, make_optimizer

# Bytes a second that a host is taken to write to its store.
STORE_BANDWIDTH = 1e9

_CHIPS_PER_HOST = 4

_SECONDS_PER_DAY = 86_400


def print_plan(config: TrainConfig, stage: str, slice_name: str, *, as_json: bool) -> None:
    """Plan a stage and print a table, or one JSON object, a phase. Raises ValueError for what cannot be planned."""
    target = parse_slice(slice_name)
    if stage not in config.stage:
        raise ValueError(f"config {config.name} has no stage {stage!r}; it has {', '.join(config.stage)}")
    for found, report in plan_stage(config, stage, target):
        if as_json:
            print(json.dumps(report), flush=True)
        else:
            print(table(_lines(found, report)), end="\n\n", flush=True)


def plan_stage(config: TrainConfig, stage: str, target: Slice) -> Iterator[tuple[Plan, dict[str, Any]]]:
    """The program of each phase with the report on it; phases that run the same program are compiled once."""
    if target.num_slices > 1:
        raise ValueError(f"{target}: a mesh over several slices is not built yet; plan one of them")
    use_compilation_cache()
    devices = open_slice(target)
    settings, model = config.stage[stage], config.stage_model(stage)
    optimizer = make_optimizer(config.optimizer, settings)
    with use_mesh(config.stage_mesh(stage), devices):
        state = abstract_state(config, stage, optimizer)
        parts = {"weights": bytes_a_device(state.params), "optimizer": bytes_a_device(state.opt_state)}
        compiled: dict[tuple[int, int], Plan] = {}
        for phase in settings.phases:
            num_rows = settings.phase_rows(phase)
            shape = num_rows, phase.seq_len
            if shape not in compiled:
                say(f"compiling {model_name(model)}, {num_rows} rows of {phase.seq_len}, for {target}")
                lowered, batch_bytes = lower_phase(config, stage, phase, optimizer=optimizer, state=state)
                flops = num_rows * phase.seq_len * model.train_flops_per_token(phase.seq_len)
                compiled[shape] = plan(lowered, target, parts=parts | {"batch": batch_bytes}, model_flops=flops)
            found = compiled[shape]
            yield (
                found,
                {
                    **_report(config, stage, phase, found, state),
                    "advice": None if found.fits else advice(config, found, target),
                },
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


def _report(config: TrainConfig, stage: str, phase: PhaseConfig, found: Plan, state: TrainState) -> dict[str, Any]:
    """The plan with what follows from it for a phase of the stage."""
    settings, chip = config.stage[stage], CHIPS[found.slice.partition(":")[0]]
    steps = settings.phase_steps()[settings.phases.index(phase)]
    batch_tokens = settings.phase_rows(phase) * phase.seq_len
    seconds = found.estimated_step_seconds
    hours = seconds and seconds * steps * found.chips / 3600
    checkpoint = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)
    num_hosts = max(1, found.chips // _CHIPS_PER_HOST)
    largest = max(map(bytes_a_device, jax.tree.leaves(state.params)))
    return dataclasses.asdict(found) | {
        "stage": stage,
        "seq_len": phase.seq_len,
        "batch_tokens": batch_tokens,
        "remat": config.run.remat,
        "tokens_per_second": seconds and batch_tokens / seconds,
        "tokens_per_dollar": seconds and batch_tokens / seconds * 3600 / (found.chips * chip.price),
        "stage_tokens": steps * batch_tokens,
        "stage_days": seconds and seconds * steps / _SECONDS_PER_DAY,
        "device_hours": hours,
        "cost": hours and hours * chip.price,
        "checkpoint_bytes": checkpoint,
        "checkpoint_seconds": checkpoint / num_hosts / STORE_BANDWIDTH,
        "host_ram_to_load_bytes": max(GIB, largest * min(_CHIPS_PER_HOST, found.chips)),
        "disk_bytes": (config.run.keep_checkpoints + 1) * checkpoint,
    }


def _lines(found: Plan, report: dict[str, Any]) -> list[tuple[str, str, str]]:
    shape = f"stage {report['stage']}: {report['batch_tokens']:,} tokens a step in rows of {report['seq_len']:,}"
    lines = [(f"{found.slice}, {found.mesh}", "", f"{shape}, remat {report['remat']}"), *rows(found)]
    if report["advice"]:
        lines.append(("what to change", "untried", report["advice"]))
    if report["stage_days"]:
        speed, dollar = report["tokens_per_second"], report["tokens_per_dollar"]
        lines += [
            ("speed", "estimated", f"{speed:,.0f} tokens/s, {dollar:,.0f} a dollar"),
            ("the phase", "estimated", f"{report['stage_tokens']:.3g} tokens in {report['stage_days']:,.1f} days"),
            ("cost", "list price", f"{report['device_hours']:,.0f} chip-hours, ${report['cost']:,.0f}"),
        ]
    stored = f"{gib(report['checkpoint_bytes'])}, written in {report['checkpoint_seconds']:.0f} s at 1 GB/s a host"
    lines += [
        ("a checkpoint", "assumed", stored),
        ("to load it", "computed", f"{gib(report['host_ram_to_load_bytes'])} of host memory"),
        ("on disk", "computed", gib(report["disk_bytes"])),
        ("compiled in", "measured", f"{found.compile_seconds:.0f} s"),
    ]
    return lines


def advice(config: TrainConfig, found: Plan, target: Slice) -> str:
    """What to change where a stage does not fit."""
    state = found.parts["weights"] + found.parts["optimizer"]
    if state > found.hbm_capacity_bytes:
        enough = smallest_slice(target.kind, state * found.chips)
        larger = f"; the smallest slice that holds them is {enough}" if enough else ""
        return f"weights and optimizer alone are {gib(state)} a chip: split them over more chips along fsdp{larger}"
    ways = [] if config.run.remat == "full" else ["run.remat=full"]
    ways += [f"run.loss_chunks={4 * config.run.loss_chunks}", "fewer tokens at a time (run.micro_batch_tokens)"]
    ways += ["another mesh, with context or tensor", "more chips"]
    return f"temporaries are {gib(found.hbm_temporaries_bytes)} a chip; try {', '.join(ways)}"
