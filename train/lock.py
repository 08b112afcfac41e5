"""One training at a time in a run directory.

The one invariant: while a run trains, its first process holds a lock (flock) on a file of the run directory, and the
system takes it back when that process ends, `kill -9` included. An object store has no locks: nothing notices two
trainings in one directory of gs:// or s3://.
"""

import errno
import fcntl
import os
import socket
from pathlib import Path
from typing import IO, Any

import jax

from llama_jax.checkpoint.together import together
from llama_jax.entry import say
from llama_jax.paths import is_remote, make_directory

LOCK_FILE = "run.lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class RunLock:
    """A run directory for this run alone, while the block runs; every process of the run enters it."""

    def __init__(self, run_dir: Path):
        """Locks nothing yet."""
        self._run_dir, self._file = run_dir, None

    def __enter__(self) -> "RunLock":
        """Raises OSError in every process if another run holds the lock."""
        together("lock", self._lock)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._file is not None:
            self._file.close()

    def check(self) -> None:
        """Raises OSError if another directory, or none, has come to be where the locked one was."""
        if self._file is not None and not _is_at(self._file, self._run_dir / LOCK_FILE):
            raise OSError(f"{self._run_dir} was moved or replaced while a run trained in it; put it back")

    def _lock(self) -> None:
        if jax.process_index() == 0 and not is_remote(self._run_dir):
            self._file = _locked(self._run_dir)


def _locked(run_dir: Path) -> IO[str]:
    """The open file by which this process holds a run directory, which is made if it is not there."""
    path = run_dir / LOCK_FILE
    while True:
        make_directory(run_dir)
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise OSError(f"{holder} trains in {run_dir}; wait for its end, or give another --run-dir") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(f"{run_dir} cannot be locked ({error.strerror}); see to it that nothing else trains in it")
        if _is_at(file, path):  # else it was moved away between the two
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is what a path names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
