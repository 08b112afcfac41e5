"""Pretraining in stages: `python -m train.pretrain --stage 1`, then `--stage 2`.

Without --config the demo: text that is on every machine with Python, prepared on the first run.
Both stages live in one run directory; a stage that was stopped goes on where it stood.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import llama_jax
from llama_jax.convert import copy_companions
from llama_jax.entry import parse_settings, run_entry
from train.checkpoints import Progress, initial_state, read_progress, resumed_state, saved_steps, state_from
from train.config import TrainConfig, read_config
from train.data import read_metadata
from train.loop import Stage
from train.metrics import say
from train.optimizer import make_optimizer
from train.prepare import prepare


def pretrain(config: TrainConfig, stage: str, run_dir: Path, init: str | None = None) -> None:
    """Train one stage to its end, from init, the newest checkpoint of the run, or fresh weights.

    Raises ValueError if the config has no such stage, if the stage before it is not done, or if
    init is given for a run that already has this stage.
    """
    if stage not in config.stage:
        raise ValueError(f"config {config.name} has no stage {stage!r}; it has {', '.join(config.stage)}")
    start = starting_point(config, stage, run_dir, init)
    if start.stage_done:
        say(f"stage {stage} is done: {run_dir}/checkpoints/{start.step}")
        return
    _prepare_data(config, run_dir)
    with llama_jax.use_mesh(config.run.mesh) as mesh:
        optimizer = make_optimizer(config.optimizer, config.stage[stage])
        job = Stage(config, stage, run_dir, optimizer)
        say(
            f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {config.run.mesh}, {config.run.compute_dtype}, "
            f"{config.name} stage {stage}: {job.model.num_params() / 1e6:.1f}M parameters"
        )
        if start.phase_step > 0:
            state = resumed_state(run_dir, start.step, job.model, optimizer)
            say(f"resuming at step {start.phase_step} of stage {stage}")
        elif init or start.step:
            state = state_from(init or run_dir / "checkpoints" / str(start.step), job.model, optimizer)
        else:
            state = initial_state(job.model, optimizer, config.run.seed)
        job.train(state, start)


def starting_point(config: TrainConfig, stage: str, run_dir: Path, init: str | None) -> Progress:
    """Where a stage starts or goes on."""
    steps = saved_steps(run_dir)
    newest = read_progress(run_dir, steps[-1]) if steps else Progress()
    stages = list(config.stage)
    if newest.stage == stage:
        if init:
            raise ValueError(f"{run_dir} already holds stage {stage}; give another --run-dir to start from {init}")
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


def _prepare_data(config: TrainConfig, run_dir: Path) -> None:
    """Prepare the data if they are not there, and put the tokenizer into the run."""
    directory = Path(config.data.directory)
    if not (directory / "metadata.json").exists():
        prepare(config.data.sources, directory, vocab_size=config.model.vocab_size, holdout=config.data.holdout)
    metadata = read_metadata(directory)
    splits = {name: split["tokens"] for name, split in metadata["splits"].items()}
    say(
        f"data {directory}: {splits} tokens, corpus {metadata['corpus_hash'][:16]}, Python {metadata['python_version']}"
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    copy_companions(directory, run_dir)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m train.pretrain", description="Pretrain a Llama, stage by stage.")
    parser.add_argument("--config", default="demo", metavar="F", help="TOML file or the name of a shipped one")
    parser.add_argument("--stage", required=True, help="1, 2, ... as the config names them")
    parser.add_argument("--init", metavar="C", help="checkpoint to start the stage from, with fresh optimizer state")
    parser.add_argument("--run-dir", metavar="D", help="default: runs/<config>")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. run.seed=1")
    args = parser.parse_args(argv)
    config = read_config(args.config, parse_settings(args.set))
    pretrain(config, args.stage, Path(args.run_dir or f"runs/{config.name}"), args.init)


if __name__ == "__main__":
    run_entry(main)
