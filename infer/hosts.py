"""One engine over several processes: the first decides what is run, the others run the same.

The first process has the prompts, schedules and reads the tokens; before it calls a program it sends the call, with
the few host arrays that it takes, to every other over TCP, and no device and no answer is waited for
(docs/decisions/0009-calls-over-tcp.md). The invariant: all processes call the same programs with the same arrays in the
same order, and one that is gone ends all others, each with a line that names it (llama_jax/peers.py).
"""

import contextlib
import hmac
import io
import json
import os
import pickle
import queue
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from llama_jax.peers import Peers

# How long the others may take to come to the first, once all have opened their devices.
_MEETING_SECONDS = 120.0

# How long the first waits for the others to have done what was called.
_PARTING_SECONDS = 10.0

# What a message may fail with when the process that sends it has gone.
_GONE = (EOFError, OSError, pickle.UnpicklingError)


# The name of what is called, and its arguments.
Call = tuple[str, tuple, dict[str, Any]]


class Hosts:
    """The processes of a run, while its block runs: `leads` in the first, whose calls the others repeat.

    In a run of one process nothing is sent.
    """

    def __init__(self):
        """Nothing is opened yet."""
        self._peers = Peers()
        self.leads, self.num_processes = self._peers.process == 0, self._peers.num_processes
        self._sockets: dict[int, socket.socket] = {}  # the connection to each other process, or to the first
        self._answers: dict[int, queue.SimpleQueue[Any]] = {}
        self._calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._parting = False

    def __enter__(self) -> "Hosts":
        self._peers.__enter__()
        if self.num_processes > 1:
            try:
                self._meet() if self.leads else self._join()
            except BaseException as error:
                self._peers.__exit__(type(error), error, None)
                raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """The first process lets the others go; after an exception they are ended."""
        if error is None:
            self._parting = True
            if self.leads:
                self.tell("part")
            for connection in self._sockets.values():
                with contextlib.suppress(OSError):  # the other has closed it
                    connection.shutdown(socket.SHUT_WR)
            for thread, connection in zip(self._threads, self._sockets.values(), strict=True):
                thread.join(_PARTING_SECONDS)
                connection.close()
        self._peers.__exit__(kind, error, trace)

    # Meeting.

    def _meet(self) -> None:
        """Wait for every other process; what does not know the key of this run is sent away."""
        host, key = self._peers.coordinator, secrets.token_hex(32)
        nearby = host in ("localhost", "127.0.0.1", "::1")
        with _listening(host if nearby else "") as server:
            self._peers.write("hosts", "meeting", json.dumps({"port": server.getsockname()[1], "key": key}))
            deadline = time.monotonic() + _MEETING_SECONDS
            while len(self._sockets) < self.num_processes - 1:
                server.settimeout(max(0.0, deadline - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except (TimeoutError, BlockingIOError):
                    came = len(self._sockets) + 1
                    raise OSError(
                        f"{came} of {self.num_processes} processes came to port {server.getsockname()[1]} of {host} in "
                        f"{_MEETING_SECONDS:.0f} s; see that the others can reach it"
                    ) from None
                self._greet(connection, key)

    def _greet(self, connection: socket.socket, key: str) -> None:
        connection.settimeout(10.0)
        file = connection.makefile("rb")
        try:
            said, _, process = file.readline(200).strip().partition(b" ")
        except OSError:
            said, process = b"", b""
        if hmac.compare_digest(said, key.encode()):
            self._take(int(process), connection, file)
        else:
            file.close()
            connection.close()

    def _join(self) -> None:
        deadline = time.monotonic() + _MEETING_SECONDS
        while not (told := self._peers.read("hosts")):
            if time.monotonic() > deadline:
                raise OSError(f"process 0 did not open its engine's port in {_MEETING_SECONDS:.0f} s")
            time.sleep(0.02)
        meeting = json.loads(told["meeting"])
        connection = socket.create_connection((self._peers.coordinator, meeting["port"]), timeout=_MEETING_SECONDS)
        connection.sendall(f"{meeting['key']} {self._peers.process}\n".encode())
        self._take(0, connection, connection.makefile("rb"))

    def _take(self, process: int, connection: socket.socket, file: io.BufferedReader) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets[process], self._answers[process] = connection, queue.SimpleQueue()
        hear = self._hear_answers if self.leads else self._hear_calls
        thread = threading.Thread(target=hear, args=(process, file), name=f"process {process}", daemon=True)
        self._threads.append(thread)
        thread.start()

    # In the first process.

    def tell(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Have every other process make a call; it is not waited for. Nothing in a process that is not the first."""
        if self.leads and self._sockets:
            message = pickle.dumps((name, args, kwargs), protocol=pickle.HIGHEST_PROTOCOL)
            for process in self._sockets:
                self._send(process, message)

    def answers(self) -> list[Any]:
        """What the call told last gave in each of the others."""
        return [answers.get() for answers in self._answers.values()] if self.leads else []

    def _hear_answers(self, process: int, file: io.BufferedReader) -> None:
        try:
            with file:
                while True:
                    kind, value = pickle.load(file)
                    if kind == "answer":
                        self._answers[process].put(value)
                    else:  # a signal to any process is one to all
                        os.kill(os.getpid(), value)
        except _GONE:
            if not self._parting:
                self._peers.lost(process)

    # In the others.

    def calls(self) -> Iterator[Call]:
        """Names and arguments of what the first process calls, until it parts. SIGTERM is passed on to it.

        Ctrl-C is left to it: a terminal sends that to all.
        """

        def pass_on(number: int, frame: FrameType | None) -> None:
            self._calls.put(("signal", (number,), {}))

        before = {signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on)}
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            while (call := self._calls.get())[0] != "part":
                if call[0] == "signal":
                    self._send(0, pickle.dumps(("signal", call[1][0])))
                else:
                    yield call
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def answer(self, value: Any) -> None:
        """Give the first process what its call gave here."""
        self._send(0, pickle.dumps(("answer", value)))

    def _hear_calls(self, process: int, file: io.BufferedReader) -> None:
        """In a thread, so that the end of the first is known while a device waits for it."""
        try:
            with file:
                while (call := pickle.load(file))[0] != "part":
                    self._calls.put(call)
                self._calls.put(call)
        except _GONE:
            if not self._parting:
                self._peers.lost(process)

    def _send(self, process: int, message: bytes) -> None:
        try:
            self._sockets[process].sendall(message)
        except OSError:
            self._peers.lost(process)


def _listening(host: str) -> socket.socket:
    """A free port: of this host alone, or of every network that it is in where none is named."""
    if host:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
