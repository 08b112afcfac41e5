"""Progress: a bar on a terminal, few lines in a log, nothing for what is quick."""

import io
import sys

import pytest

from llama_jax import progress as module
from llama_jax.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves its only element, in seconds."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def work(clock, *, steps: int, seconds: float, total: int = 1000, **options) -> None:
    """Equal steps of so many seconds each."""
    with progress(total, desc="loading", **options) as bar:
        for _ in range(steps):
            clock[0] += seconds
            bar.update(total // steps)


def test_a_log_gets_a_line_a_tenth_and_one_at_the_end(clock, capsys):
    work(clock, steps=100, seconds=1, total=4_000_000_000)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loading: 10% of 4.00GB, 40.0MB/s, 01:30 left"
    assert lines[-1] == "loading: 4.00GB in 01:40, 40.0MB/s"
    assert len(lines) == 10


def test_lines_of_quick_steps_are_five_seconds_apart(clock, capsys):
    work(clock, steps=10, seconds=1.25)
    assert [line.split(" of ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "loading: 40%",
        "loading: 80%",
        "loading: 1.00kB in 00:12, 80.0B/s",
    ]


def test_work_of_less_than_a_second_leaves_nothing(clock, capsys):
    work(clock, steps=9, seconds=0.1)
    assert capsys.readouterr().err == ""


def test_what_fails_does_not_say_that_it_ended(clock, capsys):
    with pytest.raises(OSError, match="disk"), progress(10, desc="loading") as bar:
        clock[0] += 60
        bar.update(5)
        raise OSError("disk")
    assert capsys.readouterr().err.splitlines() == ["loading: 50% of 10.0B, 0.08B/s, 01:00 left"]


def test_work_without_size_is_done(clock, capsys):
    work(clock, steps=1, seconds=2, total=0)
    assert capsys.readouterr().err == "loading: 0.00B in 00:02, ?B/s\n"


def test_a_terminal_gets_one_bar_unless_the_work_was_quick(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress(1000, desc="loading") as bar:
        bar.update(1000)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.0)
    with progress(1000, desc="loading") as bar:
        bar.update(1000)
    assert "loading: 100%" in terminal.getvalue() and "1.00k/1.00k" in terminal.getvalue()


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_process_that_is_not_shown_says_nothing(monkeypatch, clock, kind):
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", stderr := kind())
    work(clock, steps=2, seconds=60, shown=False)
    assert stderr.getvalue() == ""
