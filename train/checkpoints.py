"""Saving a run and going on from where it stood, to the bit.

A step is a directory runs/x/checkpoints/<step> of the project's own form (model.json and params/,
so that every command can load it), with mu/ and nu/ (Adam's moments, likewise) and state.json. It
appears whole or not at all: model.json is its last file, and a directory without it is what a killed
process left in an object store. Arrays are stored by canonical name and shape, so a run can go on with
another mesh or another layout in memory.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from llama_jax.checkpoint.formats import MODEL_FILE, open_checkpoint, write_model_file
from llama_jax.checkpoint.layout import ModelSource, check_tensors, read_model
from llama_jax.checkpoint.orbax import OrbaxSource, save_arrays
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.paths import remove_directory, staged_directory, staged_file
from train.optimizer import Optimizer, TrainState

STATE_FILE = "state.json"
MOMENTS = ("mu", "nu")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: counts of optimizer steps and tokens over all stages, and the place in the stage.

    row is the next row of the phase's data.
    """

    step: int = 0
    tokens: int = 0
    stage: str = ""
    phase: int = 0
    phase_step: int = 0
    row: int = 0
    stage_done: bool = False


def saved_steps(run_dir: Path) -> list[int]:
    """The steps that a run directory holds whole, in order."""
    folder = run_dir / "checkpoints"
    found = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return sorted(int(p.name) for p in found if (p / MODEL_FILE).exists())


def read_progress(run_dir: Path, step: int) -> Progress:
    """Where the run stood when it saved this step. Raises ValueError if the file is damaged."""
    path = run_dir / "checkpoints" / str(step) / STATE_FILE
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def save_step(run_dir: Path, cfg: LlamaConfig, state: TrainState, progress: Progress) -> Path:
    """Write a checkpoint of this step; if it is there, where the run stands alone.

    Raises OSError, with earlier ones untouched, if that fails.
    """
    if jax.process_count() > 1:
        raise ValueError("training over several processes is not built yet; start one process")
    path = run_dir / "checkpoints" / str(progress.step)
    if progress.step in saved_steps(run_dir):
        write_progress(run_dir, progress)
        return path
    remove_directory(path)
    with staged_directory(path) as staged:
        save_arrays(staged / "params", _arrays(state.params))
        for name in MOMENTS:  # one after the other, because each is copied on its way
            save_arrays(staged / name, _arrays(optax.tree.get(state.opt_state, name)))
        (staged / STATE_FILE).write_text(_as_json(progress))
        write_model_file(staged, cfg, {})
    return path


def write_progress(run_dir: Path, progress: Progress) -> None:
    """Say anew where the run stood at a step that it has saved."""
    with staged_file(run_dir / "checkpoints" / str(progress.step) / STATE_FILE) as staged:
        staged.write_text(_as_json(progress))


def _as_json(progress: Progress) -> str:
    return json.dumps(dataclasses.asdict(progress), indent=1) + "\n"


def _arrays(model: Llama) -> dict[str, jax.Array]:
    source = ModelSource(model)
    return {name: source.array(name) for name in source.tensors}


def remove_leftovers(run_dir: Path) -> None:
    """Remove what processes that were killed while they saved have left on a local disk."""
    for path in (run_dir / "checkpoints").glob(".[0-9]*.partial-*"):
        remove_directory(path)


def remove_old_steps(run_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` steps and the last of every stage."""
    steps = saved_steps(run_dir)
    for step in steps[: max(0, len(steps) - keep)]:
        if not read_progress(run_dir, step).stage_done:
            path = run_dir / "checkpoints" / str(step)
            (path / MODEL_FILE).unlink()  # what is half removed is no checkpoint
            remove_directory(path)


def initial_state(cfg: LlamaConfig, optimizer: Optimizer, seed: int) -> TrainState:
    """Fresh weights on the ambient mesh."""

    def init() -> TrainState:
        params = Llama(cfg, rngs=nnx.Rngs(seed))
        return TrainState(params, optimizer.init(params))

    return jax.jit(init)()


def state_from(checkpoint: str | Path, cfg: LlamaConfig, optimizer: Optimizer) -> TrainState:
    """The weights of any checkpoint with fresh optimizer state.

    Raises ValueError if its shapes are not those of cfg; RoPE scaling and context may differ.
    """
    params = _read_params(checkpoint, cfg)
    return TrainState(params, jax.jit(optimizer.init)(params))


def _read_params(checkpoint: str | Path, cfg: LlamaConfig) -> Llama:
    opened = open_checkpoint(checkpoint)
    check_tensors(cfg, opened.source, lambda name: opened.directory)
    return read_model(cfg, opened.source, dtype=jnp.dtype("float32"))


def resumed_state(run_dir: Path, step: int, cfg: LlamaConfig, optimizer: Optimizer) -> TrainState:
    """Weights and optimizer state exactly as they were saved; the optimizer counts the stage's own steps."""
    directory = run_dir / "checkpoints" / str(step)
    params = _read_params(directory, cfg)
    opt_state = jax.eval_shape(optimizer.init, params)  # a real one would stand beside what is read
    moments = {}
    for name in MOMENTS:
        dtype = jax.tree.leaves(optax.tree.get(opt_state, name))[0].dtype
        moments[name] = read_model(cfg, _moment(directory, name), dtype=dtype)
    opt_state = optax.tree.set(opt_state, count=read_progress(run_dir, step).phase_step, **moments)

    def filled(x) -> jax.Array:
        """Every count in an array of its own, or it could not be donated; those of skipped steps begin at 0."""
        return x if isinstance(x, jax.Array) else jnp.array(x if isinstance(x, int) else 0, jnp.int32)

    return TrainState(params, jax.tree.map(filled, opt_state))


def _moment(directory: Path, name: str) -> OrbaxSource:
    """One of the moments of a saved step; earlier checkpoints hold both in optimizer/."""
    own = directory / name
    return OrbaxSource(own) if own.is_dir() else OrbaxSource(directory / "optimizer", f"{name}.")
