"""Stopping a run on purpose: a signal that any process receives stops all after the same step.

The one invariant: all processes call `Interruption.agreed` once after every step, and it becomes true in the
same call of each. The protocol is that of preemption notices in the coordination service of jax: a signal is
told to all by the threads of llama_jax.peers, each thread holds its process's next call of `agreed`, gives how
many there were, and the largest of these numbers plus one is where all stop. It is our own because jax's
takes SIGTERM alone, in a handler that Python's replaces, and counts steps, which go back after a rollback. A
flag summed over the devices would make every step wait for one before it.
"""

import signal
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import NoReturn

from llama_jax.peers import Peers

# Exit status after SIGTERM, with the step saved: a restart goes on. 75 is EX_TEMPFAIL of sysexits.h.
EXIT_PREEMPTED = 75


class Interruption:
    """Takes Ctrl-C and SIGTERM while its block runs; the second one stops this process at once."""

    def __init__(self, peers: Peers):
        """peers: within its block."""
        self._peers = peers
        self._received: str | None = None
        self._calls, self._last_call = 0, None if peers.num_processes > 1 else 0
        self._holding, self._told = False, False
        self._changed = threading.Condition()

    def __enter__(self) -> "Interruption":
        numbers = (signal.SIGINT, signal.SIGTERM)
        # None: a handler that was not installed from Python, which cannot be put back
        self._previous = {number: signal.signal(number, self._receive) or signal.SIG_DFL for number in numbers}
        if self._last_call is None:
            self._peers.each_beat(self._agree)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._last_call is None and kind is None:
            with self._changed:  # those that ask from now on must not wait for this process
                self._tell_calls()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name
        print(f"{self._received}: stopping after this step; once more stops at once", file=sys.stderr, flush=True)

    def agreed(self) -> bool:
        """Whether to stop here; called once after every step by every process.

        Waits only between a signal and the agreement on it, about two seconds, and for no step of another.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._holding)
            self._calls += 1
            return self._received is not None and self._last_call is not None and self._calls >= self._last_call

    def leave(self) -> NoReturn:
        """End the run as asked: KeyboardInterrupt after Ctrl-C, SystemExit of EXIT_PREEMPTED after SIGTERM."""
        self._peers.part()
        if self._received == "SIGTERM":
            raise SystemExit(EXIT_PREEMPTED)
        raise KeyboardInterrupt

    def _agree(self, news: Mapping[str, str]) -> None:
        """A step of the protocol, in the thread of the peers."""
        if self._last_call is not None or not (self._received or "stop" in news):
            return
        if "stop" not in news:
            self._peers.write("news", "stop", self._received or "")
            return
        with self._changed:
            self._holding, self._received = True, news["stop"]
            self._tell_calls()
        calls = self._peers.read("calls")
        if len(calls) == self._peers.num_processes:
            with self._changed:
                self._last_call, self._holding = 1 + max(map(int, calls.values())), False
                self._changed.notify_all()

    def _tell_calls(self) -> None:
        if not self._told:
            self._peers.write("calls", self._peers.process, str(self._calls))
            self._told = True
