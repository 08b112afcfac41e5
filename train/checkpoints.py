"""Saving a run and going on from where it stood, to the bit.

A step is a directory runs/x/checkpoints/<step> of the project's own form (model.json and params/,
so that every command can load it), with optimizer/ (Adam's mu and nu under canonical names) and
state.json. It appears whole or not at all: model.json is its last file, and a directory without it is
what a killed process left in an object store. Arrays are stored by canonical name and shape, so a run
can go on with another mesh or another layout in memory.
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
from llama_jax.paths import remove_directory, staged_directory
from train.optimizer import Optimizer, TrainState


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
    path = run_dir / "checkpoints" / str(step) / "state.json"
    try:
        return Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def save_step(run_dir: Path, cfg: LlamaConfig, state: TrainState, progress: Progress) -> Path:
    """Write a checkpoint of this step. Raises OSError, with earlier ones untouched, if that fails."""
    if jax.process_count() > 1:
        raise ValueError("training over several processes is not built yet; start one process")
    moments = {name: optax.tree.get(state.opt_state, name) for name in ("mu", "nu")}
    path = run_dir / "checkpoints" / str(progress.step)
    if progress.step not in saved_steps(run_dir):
        remove_directory(path)
    with staged_directory(path) as staged:
        save_arrays(staged / "params", _arrays(state.params))
        save_arrays(staged / "optimizer", _arrays(moments["mu"], "mu.") | _arrays(moments["nu"], "nu."))
        (staged / "state.json").write_text(json.dumps(dataclasses.asdict(progress), indent=1) + "\n")
        write_model_file(staged, cfg, {})
    return path


def _arrays(model: Llama, prefix: str = "") -> dict[str, jax.Array]:
    source = ModelSource(model)
    return {prefix + name: source.array(name) for name in source.tensors}


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
    opened = open_checkpoint(checkpoint)
    check_tensors(cfg, opened.source, lambda name: opened.directory)
    params = read_model(cfg, opened.source, dtype=jnp.dtype("float32"))
    return TrainState(params, jax.jit(optimizer.init)(params))


def resumed_state(run_dir: Path, step: int, cfg: LlamaConfig, optimizer: Optimizer) -> TrainState:
    """Weights and optimizer state exactly as they were saved; the optimizer counts the stage's own steps."""
    directory = run_dir / "checkpoints" / str(step)
    state = state_from(directory, cfg, optimizer)
    moments = {}
    for name in ("mu", "nu"):
        fresh = jax.tree.leaves(optax.tree.get(state.opt_state, name))
        moments[name] = read_model(cfg, OrbaxSource(directory / "optimizer", f"{name}."), dtype=fresh[0].dtype)
    count = jnp.asarray(read_progress(run_dir, step).phase_step, jnp.int32)
    opt_state = optax.tree.set(state.opt_state, count=count, **moments)
    # Adam and the schedule count for themselves: one array for both could not be donated.
    return state._replace(opt_state=jax.tree.map(lambda x: jnp.array(x) if x is count else x, opt_state))
