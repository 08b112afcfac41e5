"""What the processes of a run know of each other: who is alive, at which step, and why one has ended.

A thread of each process writes a record a second into the key-value store of jax.distributed's coordination
service, which runs in process 0, and reads the news there; no step waits for it and no device takes part. The
one invariant: a process that has died, hangs in the kernel or has failed ends all others within
SILENT_SECONDS and a few more, each with a line that names it.
"""

import atexit
import ctypes
import itertools
import json
import os
import re
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed  # there is no public way to the store

# Exit status of a process whose run cannot go on without another; a restart goes on from the newest checkpoint.
EXIT_PEER_LOST = 77

# A process that has written nothing for this long is lost. jax would abort the others after 100 seconds.
SILENT_SECONDS = 60.0

# The same once a collective has failed in some process: then one is gone for certain.
_DOUBT_SECONDS = 10.0

_BEAT_SECONDS = 1.0

# What is left of a run ends when process 0 does, because the store is in it; so it stays for the others to read.
_LINGER_SECONDS = 2.0

# How errors call themselves of what processes do together when one of them is gone: jax's, and those of other kinds.
_BROKEN = re.compile(r"nccl|connection|barrier|halted|unavailable|deadline|aborted|cancelled", re.IGNORECASE)
_BROKEN_ELSEWHERE = re.compile(r"Gloo|another process does not answer")

_counter = itertools.count()


class Peers:
    """The other processes, while its block runs; in a run of one process, nobody.

    All processes enter and leave the block; one that leaves it by an exception ends the others.
    """

    def __init__(self, *, silent_seconds: float = SILENT_SECONDS):
        """silent_seconds: how long a process may write nothing."""
        self._client: Any = distributed.global_state.client  # None in a run of one process
        self._address = distributed.global_state.coordinator_address or ""
        self.process, self.num_processes = jax.process_index(), jax.process_count()
        self._silent_seconds = silent_seconds
        self._told: dict[str, Any] = {"host": socket.gethostname()}
        self._listeners: list[Callable[[Mapping[str, str]], None]] = []
        self._heard: dict[int, tuple[int, float]] = {}  # the last beat of each, and when it was new
        self._hosts = {0: self._address.rpartition(":")[0], self.process: self._told["host"]}
        self._answered = time.monotonic()
        self._closed, self._parting, self._ending = threading.Event(), False, threading.Lock()
        self._ended: dict[str, Any] | None = None  # why another process has ended all

    def __enter__(self) -> "Peers":
        # A process may hold several runs, one after the other; all count them alike.
        self._run = f"llama_jax/{next(_counter)}"
        if self._client is not None:
            self._on_abort = _handle_abort(self._aborted)
            self._thread = threading.Thread(target=self._beat_until_closed, name="peers", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for nobody; after an exception that the others do not share, tell them."""
        if self._client is None:
            return
        if error is not None and not self._parting:
            self._fail(error)
        self._closed.set()
        self._thread.join()
        if error is None or self._parting:
            self._client.key_value_delete(f"{self._run}/beat/{self.process}")  # silent from here, and not lost
        _handle_abort(None)

    def part(self) -> None:
        """From here the processes end together, also if by an exception."""
        self._parting = True

    @property
    def coordinator(self) -> str:
        """The host of process 0 as the others reach it; "" in a run of one process."""
        return self._address.rpartition(":")[0].strip("[]")

    # The store.

    def tell(self, **values: Any) -> None:
        """Add to this process's record, which the others can read a second later; values of JSON."""
        self._told = self._told | values

    def records(self) -> dict[int, dict[str, Any]]:
        """The newest record of each process: "host" and what it has told. Asks process 0, in about a millisecond."""
        if self._client is None:
            return {0: self._told}
        return {int(process): json.loads(text) for process, text in self.read("beat").items()}

    def write(self, folder: str, name: object, text: str) -> None:
        """Put a text into the store, over what has that name."""
        self._client.key_value_set(f"{self._run}/{folder}/{name}", text, allow_overwrite=True)

    def read(self, folder: str) -> dict[str, str]:
        """Every text of a folder of the store by name."""
        return {key.rpartition("/")[2]: text for key, text in self._client.key_value_dir_get(f"{self._run}/{folder}/")}

    def each_beat(self, listener: Callable[[Mapping[str, str]], None]) -> None:
        """Have a function called in the thread about once a second, with what stands in the folder "news"."""
        self._listeners.append(listener)

    # Being alive.

    def _beat_until_closed(self) -> None:
        for beat in itertools.count():
            try:
                self._beat(beat)
            except RuntimeError as error:  # jax's kind
                self.end(f"the store in {self.name(0)} does not answer: {_one_line(error)}", EXIT_PEER_LOST, tell=False)
            if self._closed.wait(_BEAT_SECONDS):
                return

    def _beat(self, beat: int) -> None:
        self.write("beat", self.process, json.dumps({"beat": beat, **self._told}))
        news = self.read("news")
        self._answered = time.monotonic()
        if "ended" in news:
            ended = self._ended = json.loads(news["ended"])
            self._closed.wait(_LINGER_SECONDS)  # its error may be about to come up here, too, and says more
            self.end(ended["reason"], ended["status"], tell=False)
        for listener in self._listeners:
            listener(news)
        if self.process == 0:
            self._look_for_silent()

    def _look_for_silent(self) -> None:
        now, records = time.monotonic(), self.records()
        for process, record in records.items():
            self._hosts[process] = record["host"]
            if self._heard.get(process, (-1, 0.0))[0] != record["beat"]:
                self._heard[process] = record["beat"], now
        doubt = next((record["doubt"] for record in records.values() if "doubt" in record), "")
        limit = min(_DOUBT_SECONDS, self._silent_seconds) if doubt else self._silent_seconds
        for process in records:
            silent = now - self._heard[process][1]
            if silent > limit:
                seen = f" ({doubt})" if doubt else ""
                self.end(f"{self.name(process)} has not answered for {silent:.0f} s{seen}", EXIT_PEER_LOST)

    def name(self, process: int) -> str:
        """ "process 3 (host)", the host if it is known."""
        return f"process {process}" + (f" ({self._hosts[process]})" if process in self._hosts else "")

    def behind(self) -> str:
        """Which processes are silent or have finished fewer steps than others, in words; each has told its "step"."""
        if self._client is None:
            return "there is no other process"
        silent = time.monotonic() - self._answered
        if silent > 3 * _BEAT_SECONDS:
            return f"{self.name(0)} has not answered for {silent:.0f} s"
        first = self.records()
        time.sleep(3 * _BEAT_SECONDS)
        steps, found = {}, []
        for process, record in self.records().items():
            self._hosts[process] = record["host"]
            steps[process] = record.get("step", 0)
            if record["beat"] == first.get(process, record)["beat"]:
                found.append(f"{self.name(process)} does not answer")
            elif steps[process] < max(step.get("step", 0) for step in first.values()):
                found.append(f"{self.name(process)} has finished step {steps[process]}")
        return (
            ", ".join(found) + f"; the furthest has finished step {max(steps.values())}"
            if found
            else (f"all {len(steps)} processes answer and have finished step {max(steps.values())}")
        )

    # Ending.

    def lost(self, process: int) -> NoReturn:
        """End the run because a connection to a process has broken, with what it said last if it said why."""
        if process and self._ended is None:  # else the store is gone, too
            news = self.read("news")
            self._ended = json.loads(news["ended"]) if "ended" in news else None
        ended = self._ended or {"reason": f"{self.name(process)} has gone", "status": EXIT_PEER_LOST}
        self.end(ended["reason"], ended["status"], tell=self._ended is None and process > 0)

    def _fail(self, error: BaseException) -> None:
        """Tell the others, and let the process end by the error without jax's exit handler, which waits for all."""
        line = _one_line(error)
        for cause in _causes(error):
            what = _one_line(cause)
            if _BROKEN_ELSEWHERE.search(what) or isinstance(cause, RuntimeError) and _BROKEN.search(what):
                self.tell(doubt=what)
                time.sleep(self._silent_seconds + _DOUBT_SECONDS)  # a thread finds out who it was, and ends the process
                self.end(f"the processes lost each other: {what}", EXIT_PEER_LOST)
        status = {SystemExit: getattr(error, "code", 1), KeyboardInterrupt: 130}.get(type(error), 1)
        self._tell_end(f"{self.name(self.process)} ended: {line}", EXIT_PEER_LOST)
        atexit.register(self._exit, status)

    def end(self, reason: str, status: int, *, tell: bool = True) -> NoReturn:
        """End this process with a line on stderr and a status, and the others, too, with the same."""
        while not self._ending.acquire(blocking=False):
            time.sleep(_LINGER_SECONDS)  # another thread is at it
        print(f"error: {reason}", file=sys.stderr, flush=True)
        if tell and self._client is not None:
            self._tell_end(reason, status)
        self._exit(status)

    def _tell_end(self, reason: str, status: int) -> None:
        news = json.dumps({"reason": reason, "status": status})
        sender = threading.Thread(target=self.write, args=("news", "ended", news), daemon=True)
        sender.start()  # in a thread, because process 0 may not answer
        sender.join(_LINGER_SECONDS)

    def _exit(self, status: int) -> NoReturn:
        if self._client is not None and self.process == 0:
            time.sleep(_LINGER_SECONDS)
        sys.stdout.flush()
        os._exit(status)

    def _aborted(self) -> None:
        """Where jax aborts because process 0 is gone, say so, with a status of our own; else let it abort."""
        silent = time.monotonic() - self._answered
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            reason = str(error)
        else:
            if silent < 5 * _BEAT_SECONDS:
                return
            reason = f"no answer for {silent:.0f} s"
        self.end(f"process 0 at {self._address} is lost ({reason})", EXIT_PEER_LOST, tell=False)


def slow_processes(records: Mapping[int, Mapping[str, Any]], *, factor: float = 1.5) -> list[str]:
    """Who takes more than `factor` times the median for a step or for its data.

    records: `Peers.records()`, in which processes have told "step_seconds" and "data_seconds". What is less than
    a twentieth of the median step above the median is not named. "process 3 (host): step_seconds 1.9, median 1.1"
    """
    told = {process: record for process, record in records.items() if "step_seconds" in record}
    if len(told) < 2:
        return []
    medians = {
        key: statistics.median(record[key] for record in told.values()) for key in ("step_seconds", "data_seconds")
    }
    return [
        f"process {process} ({record['host']}): {key} {record[key]:.3g}, median {median:.3g}"
        for process, record in told.items()
        for key, median in medians.items()
        if record[key] > factor * median and record[key] - median > medians["step_seconds"] / 20
    ]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, those in it if it is a group, and what they come from."""
    yield error
    for cause in (*getattr(error, "exceptions", ()), error.__cause__):
        if cause is not None:
            yield from _causes(cause)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _handle_abort(handler: Callable[[], None] | None) -> Any:
    """Have a function called when C++ code aborts the process, before it ends; None for no more. Returns what to keep.

    jax knows no other way: it aborts when process 0 is gone, and a Python signal handler would never run.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    function = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: handler()) if handler else None
    libc.signal(signal.SIGABRT, ctypes.cast(function, ctypes.c_void_p) if function else None)
    return function
