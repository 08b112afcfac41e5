"""Files of an object store, which cannot be mapped into memory, read in ranges.

The one invariant: of an array no byte is read outside the rows that are asked for, and none twice by
devices that ask for columns of the same rows soon after one another. Nothing is kept once a file is done with.
"""

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.paths import kvstore_spec

_RANGE_BYTES = 8 * 2**20  # of one request: long enough to be fast, short enough for several at a time
_MAX_KEPT = 32  # ranges of all files that are kept for whoever asks next

_lock = threading.Lock()


class RemoteFile:
    """A file whose ranges any number of threads read, and that does not change while it is in use."""

    def __init__(self, path: Path):
        """Reads nothing yet."""
        import tensorstore  # a local file does not need it

        self.path = path
        store = tensorstore.KvStore.open(kvstore_spec(path)).result()
        self._read = functools.partial(store.read, "")  # what was read is kept under this, so as not to keep the file
        weakref.finalize(self, _start_read.cache_clear)

    def read(self, bounds: Iterable[tuple[int, int]]) -> list[bytes]:
        """The bytes from each start to its stop, all asked for at once. Raises OSError if they cannot be read."""
        with _lock:  # else two threads that want the same would read it twice
            started = [(_start_read(self._read, start, stop), start, stop) for start, stop in bounds]
        return [self._finish(*read) for read in started]

    def _finish(self, future: Any, start: int, stop: int) -> bytes:
        try:
            result = future.result()
        except ValueError as error:  # whatever the kind, in tensorstore
            raise OSError(f"{self.path} cannot be read: {str(error).partition(' [')[0]}") from None
        if result.state != "value" or len(result.value) != stop - start:
            raise OSError(f"{self.path} has no bytes {start} to {stop}; copy it again")
        return result.value


@functools.lru_cache(maxsize=_MAX_KEPT)
def _start_read(read: Callable[..., Any], start: int, stop: int) -> Any:
    return read(byte_range=slice(start, stop))


class RemoteArray:
    """A row-major array of one dimension or more, at an offset in bytes of a remote file."""

    def __init__(self, file: RemoteFile, offset: int, shape: tuple[int, ...], dtype: np.dtype):
        """Reads nothing yet."""
        self._file, self._offset, self._shape, self._dtype = file, offset, shape, dtype

    def __getitem__(self, index: tuple) -> np.ndarray:
        """What numpy would give: slices, and integers [n] in place of the first one. Raises OSError if it cannot."""
        size, *inner = self._shape
        rows = index[0] if index else slice(None)
        picked = np.arange(size)[rows]
        if not picked.size:
            return np.empty(self._shape, self._dtype)[index]
        start, stop = int(picked.min()), int(picked.max()) + 1
        row_bytes = math.prod(inner) * self._dtype.itemsize
        step = max(1, _RANGE_BYTES // max(1, row_bytes))
        bounds = [(row, min(row + step, stop)) for row in range(start, stop, step)]
        offsets = [(self._offset + first * row_bytes, self._offset + last * row_bytes) for first, last in bounds]
        parts = [
            np.frombuffer(content, self._dtype).reshape(-1, *inner)[:, *index[1:]]
            for content in self._file.read(offsets)
        ]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return whole if isinstance(rows, slice) else whole[picked - start]
