"""Batches of a mixture of sources, read ahead of the step.

Threads (grain's) build whole batches while the devices compute. The one invariant: batch n and the state after
it are functions of the state before the first and of the mixture alone; what was read ahead is in no state.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import grain

from train.data.mixture import Mixture
from train.data.packing import Batch, Rows, stack

State = dict[str, tuple[int, int]]

_NUM_THREADS = 4
_BATCHES_AHEAD = 8


class Stream:
    """An endless iterator over batches, or over a process's rows of each; as a context manager it ends its threads."""

    def __init__(
        self,
        rows: Mapping[str, Rows],
        shares: Callable[[int], Mapping[str, float]],
        num_rows: int,
        *,
        state: Mapping[str, tuple[int, int]],
        batch_number: int = 0,
        mine: Sequence[int] | None = None,
    ):
        """Batches of num_rows rows from a state on, {} for the beginning; the first has this number.

        shares(n) is the mixture of batch n, share of the rows by source. mine: which rows of the global
        batch this process wants, None for all.
        """
        self._state: State = {name: (row, credit) for name, (row, credit) in state.items()}
        plan = _Plan(rows, shares, num_rows, state=state, batch_number=batch_number, mine=mine)
        options = grain.ReadOptions(num_threads=_NUM_THREADS, prefetch_buffer_size=_BATCHES_AHEAD)
        self._batches = iter(grain.MapDataset.source(plan).to_iter_dataset(options))
        self._batches.start_prefetch()
        self._waited = 0.0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        """The next batch, its arrays [B, T]. Raises, and ends the threads, what reading it has raised."""
        began = time.perf_counter()
        try:
            batch, state = next(self._batches)
            if isinstance(batch, Exception):
                raise batch
        except BaseException:
            self.close()
            raise
        self._state = state
        self._waited += time.perf_counter() - began
        return batch

    def state(self) -> State:
        """(next row, credit) by source after the last batch that was handed out."""
        return dict(self._state)

    def take_wait(self) -> float:
        """Seconds that callers have waited for batches since it was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """Read no further; threads end with the batch they are at."""
        self._batches.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error) -> None:
        self.close()


class _Plan:
    """The batches as grain reads them: by number, in any order and from any thread, each once."""

    def __init__(self, rows, shares, num_rows: int, *, state, batch_number: int, mine: Sequence[int] | None):
        self._rows, self._shares, self._num_rows = rows, shares, num_rows
        self._mine = range(num_rows) if mine is None else mine
        self._first = self._next = batch_number
        self._mixture = Mixture(shares(batch_number), state)
        self._planned: dict[int, tuple[list[tuple[str, int]], State]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> tuple[Batch | Exception, State]:
        """A batch and the state after it. An error is returned, because grain rewrites the message of one raised."""
        try:
            picks, state = self._take(self._first + index)
            return stack([self._rows[name].row(row) for name, row in (picks[i] for i in self._mine)]), state
        except Exception as error:
            return error, {}

    def _take(self, number: int) -> tuple[list[tuple[str, int]], State]:
        """The rows of a batch and the state after it, planning those before it that are not planned yet."""
        with self._lock:
            while self._next <= number:
                self._mixture.set_shares(self._shares(self._next))
                self._planned[self._next] = self._mixture.take(self._num_rows), self._mixture.state()
                self._next += 1
            return self._planned.pop(number)
