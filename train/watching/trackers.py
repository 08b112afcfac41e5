"""The numbers of a run for TensorBoard, Weights & Biases and MLflow, beside metrics.jsonl.

The one invariant: a tracker is spoken to by a thread of its own, so that neither its delays nor its failures
reach the training: one that fails is reported once and left alone. A run that goes on stays the same run there.
"""

import contextlib
import importlib.util
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llama_jax.entry import say
from llama_jax.paths import is_remote, make_directory, staged_file
from train.watching.metrics import Tracker

# Lines that may wait for a tracker that is slow, and seconds that the end of a run waits for it.
_MOST_WAITING = 10_000
_PATIENCE = 30.0


def open_trackers(
    names: Sequence[str], run_dir: Path, *, resumed_step: int, record: Mapping[str, Any], patience: float = _PATIENCE
) -> list[Tracker]:
    """A tracker for each of the names, going on behind this step. For the first process alone.

    record: what run.json holds, of which run_id, name and model are shown. Raises ValueError for a name that
    does not exist and for a library that is not installed.
    """
    for name in names:
        if name not in _TRACKERS:
            raise ValueError(f"there is no tracker {name!r} for run.trackers; there are {', '.join(_TRACKERS)}")
        module, extra = _LIBRARIES[name]
        if importlib.util.find_spec(module) is None:
            raise ValueError(
                f"tracker {name} needs {module}, which is not installed: python -m pip install {extra}, "
                f"or leave {name} out of run.trackers"
            )
    return [_Threaded(name, partial(_TRACKERS[name], run_dir, resumed_step, record), patience) for name in names]


class _Threaded:
    """A tracker behind a thread, which opens it, too."""

    def __init__(self, name: str, opening: Callable[[], Tracker], patience: float):
        self._name, self._opening, self._patience = name, opening, patience
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._call(lambda tracker: tracker.log(step, values))

    def rewind(self, step: int) -> None:
        self._call(lambda tracker: tracker.rewind(step))

    def flush(self) -> None:
        self._call(lambda tracker: tracker.flush())

    def close(self) -> None:
        with contextlib.suppress(queue.Full):
            self._calls.put(None, timeout=self._patience if self._thread.is_alive() else 0)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            say(f"tracker {self._name} does not answer; its last lines are only in metrics.jsonl")

    def _call(self, call: Callable[[Tracker], None]) -> None:
        with contextlib.suppress(queue.Full):  # nothing is waited for; all is in metrics.jsonl
            self._calls.put_nowait(call)

    def _work(self) -> None:
        try:
            tracker = self._opening()
            for call in iter(self._calls.get, None):
                call(tracker)
            tracker.close()
        except Exception as error:  # whatever a foreign library raises: the training goes on
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"tracker {self._name} failed and is left alone from here on: {reason}")


class _TensorBoard:
    """Event files in run_dir/tensorboard; for an object store they are made on this machine and sent by `flush`."""

    def __init__(self, run_dir: Path, resumed_step: int, record: Mapping[str, Any]):
        """TensorBoard leaves out what earlier files have behind the step that is resumed."""
        del record
        self._remote = run_dir / "tensorboard" if is_remote(run_dir) else None
        self._folder = Path(tempfile.mkdtemp()) if self._remote else run_dir / "tensorboard"
        self._open(resumed_step)

    def _open(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        make_directory(self._folder)
        suffix = f".{time.time_ns()}"  # files are read in the order of their names, which have whole seconds
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1, filename_suffix=suffix)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._open(step)

    def flush(self) -> None:
        self._writer.flush()
        if self._remote:
            for file in self._folder.iterdir():
                with staged_file(self._remote / file.name) as staged:
                    shutil.copyfile(file, staged)

    def close(self) -> None:
        self._writer.close()
        self.flush()
        if self._remote:
            shutil.rmtree(self._folder)


class _WeightsAndBiases:
    """A run of Weights & Biases whose id is the run's own; its x-axis is "step", which may go back."""

    def __init__(self, run_dir: Path, resumed_step: int, record: Mapping[str, Any]):
        import wandb  # type: ignore[import-not-found]

        del resumed_step
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "llama_jax"),
            id=record["run_id"],
            resume="allow",
            name=run_dir.name,
            config=dict(record),
            dir=None if is_remote(run_dir) else str(run_dir),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def rewind(self, step: int) -> None:
        """Steps are told anew: what comes later is drawn over it."""

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    """A run of MLflow whose id is kept in run_dir/mlflow-run-id."""

    def __init__(self, run_dir: Path, resumed_step: int, record: Mapping[str, Any]):
        import mlflow  # type: ignore[import-not-found]

        del resumed_step
        self._mlflow, path = mlflow, run_dir / "mlflow-run-id"
        if path.exists():
            mlflow.start_run(run_id=path.read_text().strip())
            return
        run = mlflow.start_run(run_name=run_dir.name)
        with staged_file(path) as staged:
            staged.write_text(run.info.run_id + "\n")
        mlflow.log_params({key: record[key] for key in ("run_id", "name")} | dict(record["model"]))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def rewind(self, step: int) -> None:
        """Steps are told anew beside the old ones."""

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases, "mlflow": _MLflow}

# The module that each needs, and what brings it.
_LIBRARIES = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "wandb": ("wandb", "'llama_jax[wandb]'"),
    "mlflow": ("mlflow", "'llama_jax[mlflow]'"),
}
