"""Saving a run and going on from where it stood, to the bit.

A step is a directory runs/x/checkpoints/<step> of the project's own form (model.json and params/,
so that every command can load it), with mu/ and nu/ (Adam's moments, likewise), state.json and, where
checkpoints are averaged, their mean as average/, a checkpoint of its own. It appears whole or not at
all: model.json is its last file, and a directory without it is what a killed process left in an object
store. Arrays are stored by canonical name and shape, so a run can go on with another mesh, another
number of processes or another layout in memory.
"""

import dataclasses
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from llama_jax.checkpoint.formats import AVERAGE, MODEL_FILE, open_checkpoint, write_model_file
from llama_jax.checkpoint.layout import check_tensors, read_model
from llama_jax.checkpoint.orbax import OrbaxSource, finish_tree
from llama_jax.checkpoint.snapshot import Part, Snapshot
from llama_jax.checkpoint.source import Source
from llama_jax.checkpoint.together import together, write_together
from llama_jax.config import LlamaConfig
from llama_jax.entry import say
from llama_jax.model import Llama
from llama_jax.paths import remove_directory, staged_file
from train.lock import RunLock
from train.optimizer import Optimizer, TrainState

STATE_FILE = "state.json"
MOMENTS = ("mu", "nu")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: counts of optimizer steps and tokens over all stages, and the place in the stage.

    rows: by source, the next row and the credit of the mixture.
    extra_steps: those that failed gates have added to the stage. retries: of the phase's gate. averaged: checkpoints
    in the stage's average.
    """

    run_id: str = ""
    step: int = 0
    tokens: int = 0
    stage: str = ""
    phase: int = 0
    phase_step: int = 0
    stage_tokens: int = 0
    rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    extra_steps: int = 0
    retries: int = 0
    averaged: int = 0
    stage_done: bool = False


class Checkpoints:
    """The checkpoints of a run that is training, written while it goes on.

    Every process of the run makes the same calls; each writes what its devices hold.
    """

    def __init__(self, run_dir: Path, cfg: LlamaConfig, *, keep: int, lock: RunLock | None = None):
        """keep: how many of the newest stay, beside the last of every stage. lock: looked at before each is written."""
        self.run_dir, self.cfg, self.keep, self._lock = run_dir, cfg, keep, lock
        self._newest = json.loads(together("newest", lambda: json.dumps(saved_steps(run_dir)[-1:]))[0])
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[int, Future[None]] | None = None

    def save(self, state: TrainState, progress: Progress, *, average: bool = False) -> Progress:
        """Begin to write a checkpoint of this step; if it is the newest, write where the run stands alone.

        Returns when the state is on the host, so that the next step may take its memory. average: keep the
        mean of the stage's checkpoints, too; what is returned counts them. Raises OSError if the
        last one could not be written, or the run directory is no longer where it was.
        """
        self.wait()
        if self._lock is not None:
            self._lock.check()
        if [progress.step] == self._newest:
            write_progress(self.run_dir, progress)
            return progress
        if average:
            progress = dataclasses.replace(progress, averaged=progress.averaged + 1)
        trees = {"params": state.params} | {name: optax.tree.get(state.opt_state, name) for name in MOMENTS}
        snapshots = {name: Snapshot(tree) for name, tree in trees.items()}
        self._writing = progress.step, self._pool.submit(self._write, snapshots, progress, average)
        return progress

    def wait(self) -> None:
        """Wait until what was begun is whole. Raises OSError, with earlier ones untouched, if that failed."""
        if self._writing is None:
            return
        (step, writing), self._writing = self._writing, None
        try:
            writing.result()
        except (OSError, ValueError) as error:
            path = self.run_dir / "checkpoints" / str(step)
            raise OSError(f"{path} could not be written: {error}; make room or mend it, then start again") from error
        self._newest = [step]

    def _write(self, snapshots: dict[str, Snapshot], progress: Progress, average: bool) -> None:
        path = self.run_dir / "checkpoints" / str(progress.step)
        trees = dict(snapshots)
        if average:
            trees[f"{AVERAGE}/params"] = snapshots["params"]

        def fill(staged: Path) -> None:
            for name, snapshot in snapshots.items():
                snapshot.write(staged / name)
            if average:
                parts = _averaged(snapshots["params"].parts(), self._last_average(progress), progress.averaged)
                snapshots["params"].write(staged / AVERAGE / "params", parts)

        def finish(staged: Path) -> None:
            for name, snapshot in trees.items():
                finish_tree(staged / name, snapshot.specs, jax.process_count())
            if average:
                write_model_file(staged / AVERAGE, self.cfg, {})
            (staged / STATE_FILE).write_text(_as_json(progress))
            write_model_file(staged, self.cfg, {})

        is_first = jax.process_index() == 0
        together(f"clear {path}", lambda: _remove_step(path) if is_first else None)  # what was never finished
        write_together(path, fill, finish)
        together(f"retire {path}", lambda: remove_old_steps(self.run_dir, self.keep) if is_first else None)

    def _last_average(self, progress: Progress) -> Source | None:
        if progress.averaged == 1:
            return None
        return open_checkpoint(self.run_dir / "checkpoints" / str(*self._newest) / AVERAGE).source


def _averaged(parts: Iterable[Part], last: Source | None, count: int) -> Iterator[Part]:
    """Parts of the mean of `count` checkpoints, from those of the newest and the mean of the others."""
    for name, box, part in parts:
        if last is not None:
            mean = last.read(name, box)
            part = mean + (part - mean) / np.float32(count)
        yield name, box, part


def newest_whole(run_dir: Path) -> Progress | None:
    """Where the run stood at its newest checkpoint that reads whole; None if it has none.

    All is read, by each process its share. A damaged one is named, passed over, and is no checkpoint from
    then on. Raises ValueError if all are damaged.
    """
    folder = run_dir / "checkpoints"
    found = json.loads(together("steps", lambda: json.dumps(_step_directories(run_dir)))[0])
    damaged = []
    for step in reversed(found):
        path = folder / str(step)
        reasons = together("check", lambda path=path: _damage(path))
        reason = next(filter(None, reasons), None)
        if reason is None:
            if jax.process_index() == 0:
                for other, _ in damaged:
                    (other / MODEL_FILE).unlink(missing_ok=True)
            for other, reason in damaged:
                say(f"passed over {other}: {reason}; going on from step {step}")
            return read_progress(run_dir, step)
        damaged.append((path, reason))
    whole = [(path, reason) for path, reason in damaged if (path / MODEL_FILE).exists()]
    if whole:
        raise ValueError(
            f"no checkpoint of {run_dir} reads whole; {whole[0][0]}: {whole[0][1]}; bring back a copy, or give "
            "another --run-dir"
        )
    return None


def _step_directories(run_dir: Path) -> list[int]:
    folder = run_dir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint, "" for nothing, as far as this process's share of its bytes can tell."""
    if not (path / MODEL_FILE).exists():
        return "it was never finished"
    try:
        read_progress(path.parents[1], int(path.name))
        cfg = open_checkpoint(path).cfg
        trees = [path / name for name in ("params", *MOMENTS)]
        if (path / AVERAGE / MODEL_FILE).exists():
            trees.append(open_checkpoint(path / AVERAGE).directory / "params")
        for directory in trees:
            source = OrbaxSource(directory)
            check_tensors(cfg, source, lambda name, directory=directory: directory)
            source.check()
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def saved_steps(run_dir: Path) -> list[int]:
    """The steps that a run directory holds whole, in order."""
    folder = run_dir / "checkpoints"
    return [step for step in _step_directories(run_dir) if (folder / str(step) / MODEL_FILE).exists()]


def read_progress(run_dir: Path, step: int) -> Progress:
    """Where the run stood when it saved this step. Raises ValueError if the file is damaged."""
    path = run_dir / "checkpoints" / str(step) / STATE_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        checksum, values = stored.pop("crc32"), stored
        if checksum != _checksum(values):
            raise ValueError("its checksum is not that of its content")
        if values.keys() != dataclasses.asdict(Progress()).keys():
            raise ValueError(f"it says {', '.join(values)}")
        return Progress(**values | {"rows": {name: (row, credit) for name, (row, credit) in values["rows"].items()}})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_progress(run_dir: Path, progress: Progress) -> None:
    """Say anew where the run stood at a step that it has saved; the first process does."""
    if jax.process_index() == 0:
        with staged_file(run_dir / "checkpoints" / str(progress.step) / STATE_FILE) as staged:
            staged.write_text(_as_json(progress))


def _as_json(progress: Progress) -> str:
    values = dataclasses.asdict(progress)
    return json.dumps(values | {"crc32": _checksum(values)}, indent=1) + "\n"


def _checksum(values: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def remove_leftovers(run_dir: Path) -> None:
    """Remove what processes that were killed while they saved have left on a local disk."""
    for path in (run_dir / "checkpoints").glob(".[0-9]*.partial-*"):
        remove_directory(path)


def remove_old_steps(run_dir: Path, keep: int) -> None:
    """Remove all but the newest `keep` steps and the last of every stage."""
    kept = saved_steps(run_dir)[-keep:]
    for step in _step_directories(run_dir):
        path = run_dir / "checkpoints" / str(step)
        if step < min(kept, default=0) and not _ends_stage(path):
            _remove_step(path)


def _remove_step(path: Path) -> None:
    (path / MODEL_FILE).unlink(missing_ok=True)  # what is half removed is no checkpoint
    remove_directory(path)


def _ends_stage(path: Path) -> bool:
    """Whether a stage ended at a checkpoint, as far as can be known."""
    try:
        return (path / MODEL_FILE).exists() and read_progress(path.parents[1], int(path.name)).stage_done
    except (ValueError, OSError):
        return True


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
        moments[name] = read_model(cfg, OrbaxSource(directory / name), dtype=dtype)
    opt_state = optax.tree.set(opt_state, count=read_progress(run_dir, step).phase_step, **moments)

    def filled(x) -> jax.Array:
        """Every count in an array of its own, or it could not be donated; those of skipped steps begin at 0."""
        return x if isinstance(x, jax.Array) else jnp.array(x if isinstance(x, int) else 0, jnp.int32)

    return TrainState(params, jax.tree.map(filled, opt_state))
