"""Pretraining in stages: `python -m train.pretrain --stage 1`, then `--stage 2`.

Without --config the demo: text that is on every machine with Python, prepared on the first run.
All stages live in one run directory; a stage that was stopped goes on where it stood. Every process of a run
of several starts the same command. Statuses: 75 after SIGTERM, 76 of a run that hung, 77 of one that lost a
process; a restart goes on from the newest checkpoint.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import llama_jax
from llama_jax.devices import describe_run, model_name, open_devices, use_compilation_cache
from llama_jax.entry import parse_settings, run_entry, say
from llama_jax.paths import as_path, make_directory
from train.config import TrainConfig, read_config

# What weights come with, and what is made from them must come with, too.
_LICENCES = ("LICENSE*", "USE_POLICY*", "NOTICE*")

# Tokenizers that agree on this and in size are taken for the same.
_SAMPLE = "The llamas' 12345 hats, don't\n\n  fa\u00e7ade \u4e16\u754c \U0001f999 "

if TYPE_CHECKING:
    from train.checkpoints import Progress
    from train.loop import Stage
    from train.optimizer import TrainState


def pretrain(config: TrainConfig, stage: str, run_dir: Path, init: str | None = None, *, profile: bool = False) -> None:
    """Train one stage to its end, from init, the newest whole checkpoint of the run, or fresh weights.

    profile: leave a trace of a few steps in RUN_DIR/profile.

    Every process of the run calls it. Raises ValueError if the config has no such stage, if the stage before it
    is not done, if the run already has this stage and did not begin it from init, or if the run is another; OSError
    if another process trains in run_dir.
    """
    # These import jax, which --help need not wait for.
    from llama_jax.checkpoint.formats import open_checkpoint
    from llama_jax.checkpoint.together import together
    from llama_jax.peers import Peers
    from train.lock import RunLock
    from train.loop import Stage
    from train.optimizer import make_optimizer

    if stage not in config.stage:
        raise ValueError(f"config {config.name} has no stage {stage!r}; it has {', '.join(config.stage)}")
    use_compilation_cache()
    open_devices()
    with Peers() as peers, RunLock(run_dir) as lock:
        start = starting_point(config, stage, run_dir, init)
        saved = run_dir / "checkpoints" / str(start.step) if start.step else None
        if start.stage_done:
            say(f"stage {stage} is done: {saved}")
            return
        source = saved if start.phase_step else init or saved
        config = with_rope_of(config, stage, source)
        with llama_jax.use_mesh(config.stage_mesh(stage)) as mesh:
            model, dtype = config.stage_model(stage), config.run.compute_dtype
            dtype += f" of {config.run.quantize} weights" if config.run.quantize else ""
            described = describe_run(model, mesh, dtype, str(source or f"seed {config.run.seed}"))
            say(f"{described}: {config.name} stage {stage}")
            _check_memory(config, stage)
            record = json.loads(together("prepare", lambda: _prepare(config, stage, run_dir, init))[0])
            optimizer = make_optimizer(config.optimizer, config.stage[stage])
            rope = open_checkpoint(source).cfg.rope if source else config.model.rope
            job = Stage(config, stage, run_dir, optimizer, rope_before=rope)
            start = dataclasses.replace(start, run_id=record["run_id"])
            state = _state(job, start, run_dir, source)
            job.train(state, start, record=record, peers=peers, lock=lock, profile=profile)


def with_rope_of(config: TrainConfig, stage: str, source: str | Path | None) -> TrainConfig:
    """The config with the RoPE of the checkpoint that a stage starts from, unless the stage has a factor of its own."""
    from llama_jax.checkpoint.formats import open_checkpoint

    if source is None or config.stage[stage].rope_factor:
        return config
    model = dataclasses.replace(config.model, rope=open_checkpoint(source).cfg.rope)
    return dataclasses.replace(config, model=model)


def _check_memory(config: TrainConfig, stage: str) -> None:
    """Raise ValueError if the devices of the ambient mesh cannot hold the stage's training."""
    from jax.sharding import get_mesh

    from llama_jax.memory import check_fit, training_bytes
    from llama_jax.mesh import sharding_rules
    from train.loop import WAYS
    from train.optimizer import num_micro_batches

    model, settings, run = config.stage_model(stage), config.stage[stage], config.run
    for phase in settings.phases:
        num_rows = settings.phase_rows(phase)
        num_rows //= num_micro_batches(num_rows, phase.seq_len, run.micro_batch_tokens, sharding_rules(model))
        needs = training_bytes(
            model,
            run.compute_dtype,
            num_rows=num_rows,
            seq_len=phase.seq_len,
            loss_chunks=run.loss_chunks,
            moment_dtype=config.optimizer.moment_dtype,
            offloaded=run.remat.startswith("offload"),
        )
        what = f"training {model_name(model)} at seq_len {phase.seq_len}"
        check_fit(what, needs, get_mesh().devices.flat, ways=WAYS)


def _state(job: "Stage", start: "Progress", run_dir: Path, source: str | Path | None) -> "TrainState":
    """What the stage starts or goes on with."""
    from train.checkpoints import initial_state, resumed_state, state_from

    if start.phase_step > 0:
        state = resumed_state(run_dir, start.step, job.model, job.optimizer)
        say(f"resuming at step {start.phase_step} of stage {job.name}")
        return state
    if source:
        return state_from(source, job.model, job.optimizer)
    return initial_state(job.model, job.optimizer, job.config.run.seed)


def starting_point(config: TrainConfig, stage: str, run_dir: Path, init: str | None) -> "Progress":
    """Where a stage starts or goes on."""
    from train.checkpoints import Progress, newest_whole
    from train.record import read_record

    newest = newest_whole(run_dir) or Progress()
    stages = list(config.stage)
    if newest.stage == stage:
        began = read_record(run_dir)["stage"].get(stage, {}).get("init")
        if init and init != began:  # the same again is a launcher's restart
            raise ValueError(
                f"{run_dir} already holds stage {stage}, begun from {began or 'what the run held'}; "
                f"give another --run-dir to start from {init}"
            )
        return newest
    if newest.stage in stages and stages.index(newest.stage) > stages.index(stage):
        raise ValueError(f"{run_dir} is already in stage {newest.stage}; give another --run-dir for stage {stage}")
    before = stages[stages.index(stage) - 1] if stages.index(stage) else None
    if before and not init and not (newest.stage == before and newest.stage_done):
        raise ValueError(
            f"stage {stage} starts from the end of stage {before}, which {run_dir} does not hold; "
            f"run --stage {before} first, or give --init CHECKPOINT"
        )
    return Progress(step=newest.step, tokens=newest.tokens, stage=stage)


def _prepare(config: TrainConfig, stage: str, run_dir: Path, init: str | None) -> str:
    """The first process prepares data and run directory; the run's record as JSON.

    Raises ValueError for another run or data of another tokenizer, FileNotFoundError for data that are not there.
    """
    import jax

    from train.checkpoints import remove_leftovers
    from train.record import check_record, write_record

    if jax.process_index() > 0:
        return ""
    record = check_record(run_dir, config, stage, _prepare_data(config, run_dir, init), init=init)
    write_record(run_dir, record)
    remove_leftovers(run_dir)
    return json.dumps(record)


def _prepare_data(config: TrainConfig, run_dir: Path, init: str | None) -> str:
    """Prepare the data if they are not there, and put the tokenizer and the licences of init into the run.

    Returns the hash of the corpus. Raises FileNotFoundError for data that a run cannot prepare itself,
    ValueError for those of another tokenizer than init's.
    """
    from llama_jax.checkpoint.formats import open_checkpoint
    from llama_jax.convert import copy_companions
    from train.data.shards import SPLITS, read_metadata
    from train.prepare import DEFAULT_VOCAB_SIZE, prepare

    data, directory, vocab_size = config.data, as_path(config.data.directory), config.model.vocab_size
    beside = open_checkpoint(init).companions if init else None
    if not (directory / "metadata.json").exists():
        if beside or not (data.sources or vocab_size == DEFAULT_VOCAB_SIZE):
            raise FileNotFoundError(
                f"{data.directory} is not there; prepare it: python -m train.prepare TEXT... "
                f"--tokenizer {beside or 'T'} --out {data.directory}"
            )
        prepare(data.sources, directory, vocab_size=vocab_size, holdout=data.holdout)
    metadata = read_metadata(directory)
    if beside:
        _check_tokenizer(directory, beside)
    splits = {name: sum(source[name]["tokens"] for source in metadata["sources"].values()) for name in SPLITS}
    corpus, python = metadata["corpus_hash"], metadata["python_version"]
    say(f"data {data.directory}: {splits} tokens, corpus {corpus[:16]}, Python {python}")
    make_directory(run_dir)
    copy_companions(directory, run_dir)
    for file in [file for pattern in _LICENCES for file in beside.glob(pattern)] if beside else []:
        (run_dir / file.name).write_bytes(file.read_bytes())
    return corpus


def _check_tokenizer(data: Path, weights: Path) -> None:
    """Raise ValueError if the tokenizer that lies beside the weights, if any, is another than that of the data."""
    from llama_jax.tokenizer import load_tokenizer
    from train.prepare import VOCABULARY_FILES

    if not any((weights / name).is_file() for name in VOCABULARY_FILES):
        return
    ours, theirs = (load_tokenizer(path) for path in (data, weights))
    if (ours.vocab_size, ours.encode(_SAMPLE)) != (theirs.vocab_size, theirs.encode(_SAMPLE)):
        raise ValueError(
            f"{data} was prepared with another tokenizer than that of {weights}; prepare it again with "
            f"--tokenizer {weights}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m train.pretrain", description="Pretrain a Llama, stage by stage.")
    parser.add_argument("--config", default="demo", metavar="F", help="TOML file or the name of a shipped one")
    parser.add_argument("--stage", required=True, help="1, 2, ... as the config names them")
    parser.add_argument("--init", metavar="C", help="checkpoint to start the stage from, with fresh optimizer state")
    parser.add_argument("--run-dir", metavar="D", help="default: runs/<config>")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. run.seed=1")
    parser.add_argument("--profile", action="store_true", help="leave a trace of a few steps in RUN_DIR/profile")
    parser.add_argument("--plan", metavar="SLICE", help="compile for a slice, e.g. v4:4x4x8, report and stop")
    parser.add_argument("--plan-seconds", type=float, metavar="N", help="with --plan: look so long for the best mesh")
    parser.add_argument("--hlo", metavar="F", help="with --plan: write the compiled program's text")
    parser.add_argument("--check", action="store_true", help="try out hosts, devices, disk and data, report and stop")
    parser.add_argument("--json", action="store_true", help="with --plan or --check: as JSON")
    args = parser.parse_args(argv)
    if args.json and not (args.plan or args.check):
        parser.error("--json is what --plan and --check print; give one of them")
    if args.profile and (args.plan or args.check):
        parser.error("--profile belongs to training; leave out --plan and --check")
    if (args.hlo or args.plan_seconds) and not args.plan:
        parser.error("--hlo and --plan-seconds belong to --plan; give it, too")
    config = read_config(args.config, parse_settings(args.set))
    if args.plan:
        from train.plan import print_plan

        return print_plan(
            config,
            args.stage,
            args.plan,
            as_json=args.json,
            search_seconds=args.plan_seconds or 0.0,
            hlo=Path(args.hlo) if args.hlo else None,
        )
    run_dir = as_path(args.run_dir) if args.run_dir else Path(f"runs/{config.name}")
    if args.check:
        from train.preflight.check import check

        if not check(config, args.stage, run_dir, as_json=args.json):
            sys.exit(1)
        return
    pretrain(config, args.stage, run_dir, args.init, profile=args.profile)


if __name__ == "__main__":
    run_entry(main)
