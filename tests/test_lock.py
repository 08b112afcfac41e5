"""A run directory is for one training at a time; tests/test_train_processes.py shows it of real ones."""

import errno
import fcntl
import os
import socket

import pytest

from llama_jax.entry import run_entry
from tests.test_train import CONFIG
from train.checkpoints import Checkpoints, Progress
from train.lock import RunLock
from train.pretrain import main


def test_a_second_training_is_refused_in_one_line_that_names_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(CONFIG)
    with RunLock(tmp_path / "run"), pytest.raises(SystemExit) as ended:
        run_entry(lambda: main(["--config", "tiny.toml", "--stage", "1", "--run-dir", "run"]))
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    said = f"error: {holder} trains in {tmp_path}/run; wait for its end, or give another --run-dir\n"
    assert (ended.value.code, capsys.readouterr().err) == (1, said)
    with RunLock(tmp_path / "run"):
        assert (tmp_path / "run" / "run.lock").read_text() == f"{holder}\n"


def test_nothing_is_saved_where_the_run_directory_was_before_it_was_moved(tmp_path):
    with RunLock(tmp_path / "run") as lock:
        lock.check()
        checkpoints = Checkpoints(tmp_path / "run", None, keep=1, lock=lock)
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(OSError, match="run was moved or replaced while a run trained in it"):
            checkpoints.save(None, Progress(step=1))
        with RunLock(tmp_path / "run"), pytest.raises(OSError, match="run was moved or replaced"):
            checkpoints.save(None, Progress(step=1))
        with pytest.raises(OSError, match=f"process {os.getpid()} .* trains in .*moved"):
            RunLock(tmp_path / "moved").__enter__()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunLock(tmp_path):
        pass
    said = f"{tmp_path} cannot be locked (Operation not supported); see to it that nothing else trains in it\n"
    assert capsys.readouterr().err == said
