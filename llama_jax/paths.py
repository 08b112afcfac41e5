"""Files and directories that appear whole or not at all.

Work goes to a temporary sibling on the same filesystem, which is renamed to its final name once its
bytes are on the disk. The one invariant: a failure of any kind removes the sibling and leaves what
was there as it was.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


def local_path(path: str | os.PathLike) -> Path:
    """The absolute path. Raises ValueError for gs://, s3:// and the like."""
    # pathlib turns "gs://bucket" into "gs:/bucket".
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):
        raise ValueError(f"{path}: remote paths are not supported yet; use a local directory")
    return Path(path).absolute()


def vacant_directory(path: str | os.PathLike) -> Path:
    """The absolute path of a directory that is absent or empty.

    Raises FileExistsError if something is there, ValueError for a remote path.
    """
    path = local_path(path).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty directory; remove it or choose another destination")
    return path


@contextlib.contextmanager
def staged_directory(dst: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty directory that becomes dst when the block ends well, and is removed when it does not.

    Parents of dst are created. Raises FileExistsError before any work if dst is not vacant,
    ValueError for a remote path.
    """
    dst = vacant_directory(dst)
    staged = _partial(dst)
    staged.mkdir(parents=True)
    try:
        yield staged
        for entry in staged.rglob("*"):
            _fsync(entry)
        _fsync(staged)
        os.rename(staged, dst)
    except OSError as error:
        if error.errno and error.filename is None:  # a full disk, which does not say where
            error.filename = str(dst)
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    _fsync(dst.parent)


@contextlib.contextmanager
def staged_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the name of a file to write, which replaces path when the block ends well and is removed when it does not.

    Raises ValueError for a remote path.
    """
    path = local_path(path).resolve()
    staged = _partial(path)
    try:
        yield staged
        _fsync(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    _fsync(path.parent)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


def _fsync(path: Path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
