"""One face for the progress of long work: a bar on a terminal, a few lines in a log.

The one invariant: it writes to stderr alone, and nothing for work that ends within about a second.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from tqdm import tqdm

_QUIET_SECONDS = 1.0
_LINE_SECONDS = 5.0  # at least between two lines
_LINE_FRACTION = 0.1  # of the work, likewise
_LINE = "{desc}: {percentage:.0f}% of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"
_LAST_LINE = "{desc}: {n_fmt}{unit} in {elapsed}, {rate_noinv_fmt}"


class Bar(Protocol):
    """What has been done so far."""

    def update(self, n: int, /) -> object:
        """Count n more units. For one thread at a time."""
        ...


class _Lines:
    """Progress as lines of text, few enough for a log."""

    def __init__(self, total: int, desc: str, unit: str):
        self._total, self._desc, self._unit = total, desc, unit
        self._done = self._told = 0
        self._start = self._told_at = time.monotonic()

    def update(self, n: int, /) -> None:
        self._done += n
        waited = time.monotonic() - self._told_at >= _LINE_SECONDS
        if waited and self._told + _LINE_FRACTION * self._total <= self._done < self._total:
            self._tell(_LINE)
            self._told, self._told_at = self._done, time.monotonic()

    def close(self) -> None:
        if time.monotonic() - self._start >= _QUIET_SECONDS:
            self._tell(_LAST_LINE)

    def _tell(self, line: str) -> None:
        text = tqdm.format_meter(
            self._done,
            self._total,
            time.monotonic() - self._start,
            prefix=self._desc,
            unit=self._unit,
            unit_scale=_scaled(self._total, self._unit),
            bar_format=line,
        )
        print(text, file=sys.stderr, flush=True)


def _scaled(total: int, unit: str) -> bool:
    """Whether to write 12.3k: not for counts that are short as they are."""
    return unit == "B" or total >= 1000


@contextlib.contextmanager
def progress(total: int, *, desc: str, unit: str = "B", shown: bool = True) -> Iterator[Bar]:
    """Shows how much of total units is done: `with progress(total, desc="loading") as bar: bar.update(n)`.

    A bar where stderr is a terminal. Elsewhere a line after each tenth of the work, at least five
    seconds apart, and one at the end, which a failure leaves out. Several processes pass
    shown=jax.process_index() == 0.
    """
    if not shown or sys.stderr.isatty():
        with tqdm(
            total=total,
            desc=desc,
            unit=unit,
            unit_scale=_scaled(total, unit),
            disable=not shown,
            delay=_QUIET_SECONDS,
            dynamic_ncols=True,
            file=sys.stderr,
        ) as bar:
            yield bar
    else:
        lines = _Lines(total, desc, unit)
        yield lines
        lines.close()
