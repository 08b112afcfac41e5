"""What the first process sends the others: in order, to those that know the key, and a broken connection is told."""

import contextlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from infer import hosts
from infer.hosts import Hosts
from tests.processes import until


class Peers:
    """Three processes that are threads of this one."""

    store: dict[str, dict[str, str]] = {}
    lost_ones: list[tuple[int, int]] = []
    coordinator, num_processes = "localhost", 3

    def __init__(self, process: int):
        self.process = process

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, folder, name, text):
        self.store.setdefault(folder, {})[str(name)] = text

    def read(self, folder):
        return dict(self.store.get(folder, {}))

    def lost(self, process):
        self.lost_ones.append((self.process, process))


@pytest.fixture
def processes(monkeypatch):
    """The first, and the two that follow it, not yet connected."""
    monkeypatch.setattr(Peers, "store", {})
    monkeypatch.setattr(Peers, "lost_ones", [])
    made = []
    for process in range(3):
        monkeypatch.setattr(hosts, "Peers", lambda process=process: Peers(process))
        made.append(Hosts())
    return made


@contextlib.contextmanager
def connected(processes):
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(Hosts.__enter__, processes))
    yield processes
    part(processes)


def part(processes):
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda process: process.__exit__(None, None, None), processes))


def calls_of(process):
    """Without the signal handlers, which belong to the main thread."""
    while (call := process._calls.get())[0] != "part":
        yield call


def test_calls_come_in_order_with_their_arrays_and_answers_go_back(processes):
    with connected(processes) as (first, *others):
        for i in range(3):
            first.tell("decode", np.full(70_000, i), steps=i)
        first.tell("room")
        for number, process in enumerate(others):
            calls = calls_of(process)
            for i, (name, (array,), options) in zip(range(3), calls, strict=False):
                assert (name, array[0], len(array), options) == ("decode", i, 70_000, {"steps": i})
            assert next(calls) == ("room", (), {})
            process.answer(10 + number)
        assert sorted(first.answers()) == [10, 11] and others[0].answers() == []
    assert [list(calls_of(process)) for process in others] == [[], []]
    assert Peers.lost_ones == []


def test_who_does_not_know_the_key_is_sent_away_unread(processes):
    first = threading.Thread(target=processes[0].__enter__)
    first.start()
    until(lambda: Peers.store)
    port = json.loads(Peers.store["hosts"]["meeting"])["port"]
    for said in (b"let me in\n", b"\xff\n", b"", b"0" * 64 + b" 1\n"):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(said)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(Hosts.__enter__, processes[1:]))
    first.join()
    processes[0].tell("room")
    assert [next(calls_of(process))[0] for process in processes[1:]] == ["room", "room"]
    part(processes)


def test_a_connection_that_breaks_is_known_to_both_ends(processes):
    with connected(processes) as (first, *_):
        broken = first._sockets[1]
        broken.shutdown(socket.SHUT_RDWR)
        until(lambda: len(Peers.lost_ones) >= 2)
    assert {(0, 1), (1, 0)} <= set(Peers.lost_ones) and not any(2 in pair for pair in Peers.lost_ones)


def test_one_process_alone_sends_nothing(monkeypatch):
    with Hosts() as alone:
        alone.tell("decode", object())  # could not be pickled
        assert alone.leads and alone.answers() == []
