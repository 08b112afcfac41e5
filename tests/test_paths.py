"""Directories and files appear whole or not at all."""

import os
import sys
from pathlib import Path

import pytest

from llama_jax.paths import as_path, staged_directory, staged_file


def test_staged_directory_appears_under_its_name_with_all_that_was_written(tmp_path):
    dst = tmp_path / "runs" / "out"
    with staged_directory(dst) as staged:
        (staged / "sub").mkdir()
        (staged / "sub" / "a").write_text("1")
        assert not dst.exists() and staged.parent == dst.parent and staged.name.startswith(".out.partial-")
    assert (dst / "sub" / "a").read_text() == "1"
    assert os.listdir(dst.parent) == ["out"]


def test_staged_directory_takes_the_place_of_an_empty_one(tmp_path):
    with staged_directory(tmp_path / "out") as staged:
        with staged_directory(staged) as inner:
            (inner / "a").touch()
    assert os.listdir(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(28, "No space left on device")])
def test_a_failure_leaves_neither_the_directory_nor_its_partial_sibling(tmp_path, error):
    with pytest.raises(error if isinstance(error, type) else OSError):
        with staged_directory(tmp_path / "out") as staged:
            (staged / "a").write_text("half")
            raise error
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_at_fsync_leaves_nothing(tmp_path, monkeypatch):
    def fsync(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"), staged_directory(tmp_path / "out") as staged:
        (staged / "a").write_text("half")
    with pytest.raises(OSError, match="No space"), staged_file(tmp_path / "a") as staged:
        staged.write_text("half")
    assert os.listdir(tmp_path) == []


def test_a_directory_with_files_in_it_is_refused_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("old")
    with pytest.raises(FileExistsError, match="out exists and is not an empty directory"):
        with staged_directory(tmp_path / "out"):
            pytest.fail("work began")
    assert (tmp_path / "out" / "kept").read_text() == "old" and os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(FileExistsError, match="not an empty directory"), staged_directory(tmp_path / "out"):
        pytest.fail("work began")


def test_a_directory_filled_meanwhile_is_kept(tmp_path):
    with pytest.raises(OSError), staged_directory(tmp_path / "out") as staged:
        (staged / "a").write_text("new")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("theirs")
    assert (tmp_path / "out" / "a").read_text() == "theirs" and os.listdir(tmp_path) == ["out"]


def test_staged_file_replaces_the_old_one(tmp_path):
    (tmp_path / "a").write_text("old")
    with staged_file(tmp_path / "a") as staged:
        staged.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new" and os.listdir(tmp_path) == ["a"]


def test_a_failure_keeps_the_old_file_and_no_partial_one(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), staged_file(tmp_path / "a") as staged:
        staged.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a").read_text() == "old" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("path", ["az://bucket/x", Path("hf://bucket/x"), "file:///tmp/x", "s3://"])
def test_a_path_of_another_kind_is_refused(path):
    with pytest.raises(ValueError, match="expected a local path, gs://bucket/... or s3://bucket/..."):
        as_path(path)


def test_a_library_that_is_missing_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match="gs://b/x needs gcsfs, .*: python -m pip install gcsfs"):
        as_path("gs://b/x")


def test_a_local_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert as_path("a/b") == tmp_path / "a" / "b"
