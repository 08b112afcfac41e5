"""What TensorBoard, and fakes of Weights & Biases and MLflow, are told of a run, and that none of them stops it."""

import importlib.machinery
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from train.watching import trackers
from train.watching.metrics import MetricsLog
from train.watching.trackers import open_trackers

RECORD = {"run_id": "1f2e3d4c", "name": "tiny", "model": {"num_layers": 2}, "seed": 0, "stage": {}}


def opened(run_dir, *names, step=0):
    return MetricsLog(
        run_dir, step, trackers=open_trackers(names, run_dir, resumed_step=step, record=RECORD, patience=20.0)
    )


@pytest.fixture
def library(monkeypatch):
    """Puts an empty module of a name where imports find it."""

    def installed(name):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return installed


@pytest.fixture
def wandb(library):
    """Weights & Biases that keeps how runs are opened and what they are told."""
    module, told = library("wandb"), []

    def init(**options):
        told.append(options)
        log, finish = told.append, lambda: told.append("finish")
        return SimpleNamespace(log=log, finish=finish, define_metric=lambda *args, **how: told.append((*args, how)))

    module.init, module.told = init, told
    return module


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_the_steps_of_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboardX")
    log = opened(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        log.write(step=step, stage="1", loss=0.5 * step, tokens=8 * step, time=123.0)
    log.write(step=3, stage="1", **{"heldout_loss/de": 4.0})
    log.close()
    log = opened(tmp_path, "tensorboard", step=1)
    log.write(step=2, stage="1", loss=4.0)
    log.rewind(1)
    log.write(step=2, stage="1", loss=8.0)
    log.close()
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 0.5), (2, 8.0)]
    assert scalars(tmp_path / "tensorboard", "tokens") == [(1, 8.0)]


def test_tensorboard_of_a_remote_run_is_made_here_and_sent_by_flush(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(trackers, "is_remote", lambda path: True)
    (tmp_path / "tensorboard").mkdir()
    (tracker,) = open_trackers(["tensorboard"], tmp_path, resumed_step=0, record=RECORD, patience=20.0)
    tracker.log(1, {"loss": 0.5})
    tracker.flush()
    tracker.log(2, {"loss": 0.25})
    tracker.close()
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 0.5), (2, 0.25)]


def test_weights_and_biases_goes_on_under_the_id_of_the_run(tmp_path, wandb):
    log = opened(tmp_path, "wandb", step=4)
    log.write(step=5, stage="1", loss=0.5, time=99.0)
    log.rewind(4)
    log.close()
    options, metric, *told = wandb.told
    assert (options["id"], options["resume"], options["dir"]) == ("1f2e3d4c", "allow", str(tmp_path))
    assert metric == ("*", {"step_metric": "step"})
    assert told == [{"step": 5, "loss": 0.5}, "finish"]


def test_mlflow_goes_on_under_the_id_that_lies_in_the_run_directory(tmp_path, library):
    mlflow, told = library("mlflow"), []

    def start_run(**options):
        told.append(options)
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    mlflow.start_run, mlflow.log_params, mlflow.end_run = start_run, told.append, lambda: told.append("end")
    mlflow.log_metrics = lambda values, step: told.append((step, values))
    for step in (1, 2):
        log = opened(tmp_path, "mlflow", step=step - 1)
        log.write(step=step, stage="1", loss=0.5)
        log.close()
    parameters = {"run_id": "1f2e3d4c", "name": "tiny", "num_layers": 2}
    first = [{"run_name": tmp_path.name}, parameters, (1, {"loss": 0.5}), "end"]
    assert told == [*first, {"run_id": "abc"}, (2, {"loss": 0.5}), "end"]


def test_a_tracker_that_fails_is_reported_once_and_the_lines_go_on(tmp_path, wandb, capsys):
    def fail(values):
        raise RuntimeError("no\nroute to host")

    wandb.init = lambda **options: SimpleNamespace(log=fail, finish=None, define_metric=lambda *args, **how: None)
    log = opened(tmp_path, "wandb")
    for step in (1, 2, 3):
        log.write(step=step, stage="1", loss=0.5)
    log.close()
    assert capsys.readouterr().err == "tracker wandb failed and is left alone from here on: no route to host\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_tracker_that_cannot_be_opened_is_reported_and_stops_nothing(tmp_path, library, capsys):
    library("wandb")  # without init
    log = opened(tmp_path, "wandb")
    log.write(step=1, stage="1", loss=0.5)
    log.close()
    assert "tracker wandb failed" in capsys.readouterr().err


def test_a_tracker_that_hangs_holds_neither_the_steps_nor_the_end(tmp_path, wandb, monkeypatch, capsys):
    released = threading.Event()
    init = wandb.init
    wandb.init = lambda **options: released.wait(60) and init(**options)
    monkeypatch.setattr(trackers, "_MOST_WAITING", 2)
    hanging = open_trackers(["wandb"], tmp_path, resumed_step=0, record=RECORD, patience=0.1)
    log = MetricsLog(tmp_path, 0, trackers=hanging)
    for step in range(1, 6):
        log.write(step=step, stage="1", loss=0.5)
    log.close()
    released.set()
    assert capsys.readouterr().err == "tracker wandb does not answer; its last lines are only in metrics.jsonl\n"


def test_an_unknown_tracker_is_one_line_that_names_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match=r"^there is no tracker 'comet' for .*; there are tensorboard, wandb, mlflow$"):
        opened(tmp_path, "comet")


def test_a_library_that_is_not_installed_is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^tracker wandb needs wandb, .* pip install 'llama_jax\[wandb\]', or leave"):
        opened(tmp_path, "wandb")


def test_without_trackers_none_of_their_libraries_is_imported(tmp_path, wandb):
    opened(tmp_path).write(step=1, stage="1", loss=0.5)
    assert wandb.told == []
