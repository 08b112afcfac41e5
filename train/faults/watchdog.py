"""A run that hangs ends: stacks of all threads, who is behind, a status that says "restart me".

A device waits for ever for a collective that another process never joins, and nothing raises. The one
invariant: after the first step, and outside of `Watchdog.paused`, a step finishes within
max(minimum_seconds, factor times the median step), or the process ends with EXIT_HUNG.
"""

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from llama_jax.paths import is_remote
from llama_jax.peers import Peers

# Exit status of a run that no longer steps; a restart goes on from the newest checkpoint.
EXIT_HUNG = 76

# Compiling, evaluating, saving and restoring may take this long.
PAUSE_SECONDS = 3600.0


class Watchdog:
    """Watches, in a thread, that steps go on while its block runs; paused until the first."""

    def __init__(self, minimum_seconds: float, peers: Peers, *, factor: float = 10.0, run_dir: Path | None = None):
        """run_dir: where the stacks are written, too, if it is on a disk."""
        self._minimum, self._factor, self._peers, self._run_dir = minimum_seconds, factor, peers, run_dir
        self._sent: deque[Any] = deque()
        self._num_finished = 0
        self._durations: deque[float] = deque(maxlen=101)
        self._pauses = [PAUSE_SECONDS]  # limits of the pauses that the run is in, the innermost last
        self._since = time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def step_done(self, result: Any = None) -> None:
        """A step has been sent to the devices; it is finished when this array of it is there, or at once without."""
        self._sent.append(result)
        if self._pauses[0]:
            self._pauses[0], self._since = 0.0, time.monotonic()

    @contextlib.contextmanager
    def paused(self, seconds: float = PAUSE_SECONDS) -> Iterator[None]:
        """While the block runs no step need finish; it may take so many seconds itself."""
        self._pauses.append(seconds)
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._pauses.pop()
            self._since = time.monotonic()

    def limit(self) -> float:
        """Seconds that may pass from here without a finished step."""
        median = statistics.median(self._durations) if self._durations else 0.0
        return max(self._minimum, self._factor * median, self._pauses[-1])

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._minimum / 10)):
            now, finished = time.monotonic(), 0
            while self._sent and (self._sent[0] is None or self._sent[0].is_ready()):
                self._sent.popleft()
                finished += 1
            if finished:
                if self._num_finished and not self._pauses[-1]:
                    self._durations.append((now - self._since) / finished)
                self._num_finished, self._since = self._num_finished + finished, now
                self._peers.tell(step=self._num_finished)
            if now - self._since > self.limit():
                self._give_up(now - self._since)

    def _give_up(self, seconds: float) -> NoReturn:
        what = "compiling, evaluating or saving has taken" if self._pauses[-1] else "no step has finished for"
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        where = "above"
        if self._run_dir is not None and not is_remote(self._run_dir):
            path = self._run_dir / f"hung-{self._peers.process}.txt"
            with path.open("w") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
            where = str(path)
        reason = f"{what} {seconds:.0f} s; {self._peers.behind()}; the stacks of all threads are in {where}"
        self._peers.end(reason, EXIT_HUNG)
