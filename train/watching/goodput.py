"""Goodput: the share of wall time that a run spent on steps that count, over all its starts.

events.jsonl has one JSON object a line, with "time" (of day, seconds), "event" and "step": start, stop, rollback,
skipped; and with "seconds", what has just ended: steps (from "first" to "step", of which "data_wait" seconds were
waiting), compile, eval, save, restore, or any other name. A step counts unless it was skipped, or a later start or
rollback went on from before it. The one invariant: events are only ever added, so what a run has lost stays told.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any

from train.watching.metrics import JsonLines, clock, read_lines, read_metrics

EVENTS_FILE = "events.jsonl"

# What time went to, in the order in which it is told; other names come behind.
LABELS = {
    "steps": "steps that count",
    "data": "waiting for data",
    "compile": "compiling",
    "eval": "evaluating",
    "save": "saving",
    "restore": "restoring",
    "lost": "steps that were lost",
    "other": "starting and the rest",
    "down": "no process alive",
}


class EventLog:
    """Appends to run_dir/events.jsonl from one start of a run to its stop, which leaving the context writes.

    To be made before the MetricsLog, which drops what tells how long a process that was killed has lived.
    """

    def __init__(self, run_dir: Path, step: int, *, writes: bool = True, **facts: Any):
        """Tells of a start that goes on from this step, with facts that are told beside it.

        Of several processes the first one writes; the others pass writes=False.
        """
        self._lines = JsonLines(run_dir / EVENTS_FILE) if writes else None
        seen = [line for line in read_metrics(run_dir) if "time" in line] if writes else []
        if seen:
            facts |= {"seen": seen[-1]["time"], "seen_step": seen[-1]["step"]}
        self._first = self._step = step
        self._waited, self._mark = 0.0, time.time()
        self._append("start", step=step, **facts)

    def stepped(self, step: int, *, waited: float = 0.0) -> None:
        """This step was trained, and its data were waited for so many seconds."""
        self._step, self._waited = step, self._waited + waited

    @contextlib.contextmanager
    def spent(self, event: str) -> Iterator[None]:
        """The block is no training but compile, eval, save, restore, ...; blocks do not nest.

        Steps that the devices have not done yet count to the block, so wait for them before it.
        """
        self._end_steps()
        began = time.time()
        try:
            yield
        finally:
            self._append(event, step=self._step, seconds=round(time.time() - began, 3))
            self._mark = time.time()

    def record(self, event: str, step: int, **facts: Any) -> None:
        """What takes no time: a "rollback" to this step, or where the run goes on "skipped" steps with their count."""
        self._end_steps()
        self._append(event, step=step, **facts)
        self._first = self._step = step

    def goodput(self) -> "Goodput":
        """That of the run until now."""
        self._end_steps()
        return goodput(self._lines.objects() if self._lines else [])

    def flush(self) -> None:
        """Write what an object store does not have yet."""
        if self._lines is not None:
            self._lines.flush()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        reason = "done" if kind is None else " ".join(f"{kind.__name__}: {error}".split()).rstrip(": ")
        self.record("stop", self._step, reason=reason)
        self.flush()

    def _end_steps(self) -> None:
        now = time.time()
        if self._step > self._first:
            waited = round(self._waited, 3)
            self._append(
                "steps", step=self._step, first=self._first, seconds=round(now - self._mark, 3), data_wait=waited
            )
        self._first, self._waited, self._mark = self._step, 0.0, now

    def _append(self, event: str, **facts: Any) -> None:
        if self._lines is not None:
            self._lines.append({"time": round(time.time(), 3), "event": event, **facts})


def read_events(run_dir: Path) -> list[dict]:
    """The lines of events.jsonl."""
    return read_lines(run_dir / EVENTS_FILE)


@dataclass(frozen=True)
class Goodput:
    """Seconds by what they went to (see LABELS), and the number of starts and of steps that were lost."""

    seconds: Mapping[str, float]
    starts: int
    lost_steps: int

    @property
    def alive(self) -> float:
        """Seconds in which a process of the run was alive."""
        return sum(self.seconds.values()) - self.seconds["down"]

    @property
    def of_alive(self) -> float:
        """Share of that time that went to steps that count."""
        return self.seconds["steps"] / max(self.alive, 1e-9)

    @property
    def of_all(self) -> float:
        """Share of all time since the first start that went to steps that count."""
        return self.seconds["steps"] / max(sum(self.seconds.values()), 1e-9)

    def __str__(self) -> str:
        rest = {k: s / max(self.alive, 1e-9) for k, s in self.seconds.items() if k not in ("steps", "down")}
        parts = [f"{LABELS.get(kind, kind)} {share:.1%}" for kind, share in rest.items() if share >= 0.0005]
        return (
            f"goodput {self.of_alive:.1%} of {clock(self.alive)} alive, {self.of_all:.1%} of all time since the "
            f"first of {self.starts} starts; {', '.join(parts) or 'nothing else'}"
        )


def goodput(events: Sequence[Mapping[str, Any]], until: float = 0.0) -> Goodput:
    """What the time of a run went to. until: when its last process was last seen to train, a time of day.

    Of a process that was killed, what it did after its last event is lost; of the last process that may still
    be saved, and counts.
    """
    seconds = defaultdict(float, dict.fromkeys(LABELS, 0.0))
    steps = _Steps()
    sessions = _sessions(events)
    for session, following in zip_longest(sessions, sessions[1:]):
        after = following[0] if following else None
        began, last = session[0]["time"], session[-1]["time"]
        for event in session:
            kind = event["event"]
            if kind in ("start", "rollback"):
                steps.cut(event["step"])
            elif kind == "skipped":
                steps.skip(event["count"])
            elif kind == "steps":
                seconds["data"] += event["data_wait"]
                steps.add(event["first"], event["step"], event["seconds"] - event["data_wait"])
            elif "seconds" in event:
                seconds[kind] += event["seconds"]
        alive_until = last
        if session[-1]["event"] != "stop":
            alive_until = max(last, after.get("seen", 0.0) if after else until)
            seconds["lost" if after else "steps"] += alive_until - last
            steps.lost += max(0, after.get("seen_step", 0) - session[-1]["step"]) if after else 0
        told = sum(event.get("seconds", 0.0) for event in session)
        seconds["other"] += max(0.0, last - began - told)
        seconds["down"] += max(0.0, after["time"] - alive_until) if after else 0.0
    seconds["steps"] += steps.seconds
    seconds["lost"] += steps.lost_seconds
    return Goodput(dict(seconds), len(sessions), steps.lost)


def _sessions(events: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The events of each start."""
    sessions: list[list[Mapping[str, Any]]] = []
    for event in events:
        if event["event"] == "start" or not sessions:
            sessions.append([])
        sessions[-1].append(event)
    return sessions


class _Steps:
    """Stretches of steps with the seconds that they took, and what of them was lost."""

    def __init__(self):
        self._stretches: list[tuple[int, int, float]] = []
        self.lost, self.lost_seconds = 0, 0.0

    @property
    def seconds(self) -> float:
        return sum(seconds for _, _, seconds in self._stretches)

    def add(self, first: int, last: int, seconds: float) -> None:
        self._stretches.append((first, last, seconds))

    def cut(self, step: int) -> None:
        """The run goes on from this step: those behind it are lost."""
        kept = []
        for first, last, seconds in self._stretches:
            end = max(first, min(last, step))
            share = (end - first) / (last - first)
            self._lose(last - end, seconds * (1 - share))
            if end > first:
                kept.append((first, end, seconds * share))
        self._stretches = kept

    def skip(self, count: int) -> None:
        """The newest steps, so many of them, changed nothing."""
        if self._stretches:
            first, last, seconds = self._stretches[-1]
            skipped = seconds * min(1.0, count / (last - first))
            self._lose(count, skipped)
            self._stretches[-1] = first, last, seconds - skipped

    def _lose(self, steps: int, seconds: float) -> None:
        self.lost, self.lost_seconds = self.lost + steps, self.lost_seconds + seconds
