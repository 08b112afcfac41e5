"""Clients that idle, crawl, do not read or go at any moment: the server stays as it was, with all places free."""

import json
import random
import socket
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

from infer.api import connection, limits
from infer.serve import allow_connections
from tests.scripted_server import listening, make_server, until
from tests.scripted_server import tokenizer as tokenizer


def request(path="/v1/completions", **fields):
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def is_healthy(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as answer:
        return answer.status == 200


def is_closed(client):
    """Whether the server has closed a connection from which nothing is left to read."""
    client.settimeout(20)
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_connections_that_never_ask_are_closed(tokenizer, monkeypatch):
    monkeypatch.setattr(connection, "_SECONDS", 1.0)
    with listening(make_server(tokenizer)) as port, ExitStack() as stack:
        silent, slow = (stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(2))
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost:")
        assert is_closed(silent) and is_closed(slow)


def test_a_body_that_crawls_is_408(tokenizer, monkeypatch):
    monkeypatch.setattr(limits, "_BODY_SECONDS", 0.2)
    with listening(make_server(tokenizer)) as port, socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(request(prompt="x")[:-3])
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_thousand_idle_connections_keep_nobody_out(tokenizer):
    allow_connections()
    with listening(make_server(tokenizer)) as port, ExitStack() as stack:
        for _ in range(1000):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        assert is_healthy(port)


def test_a_client_that_does_not_read_is_cut_off_and_frees_its_place(tokenizer, monkeypatch):
    monkeypatch.setattr(connection, "_SECONDS", 0.5)
    server = make_server(tokenizer, lambda _: "word " * 1000, max_seq_len=4096)
    with listening(server, send_buffer=4096) as port, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(request(prompt="x", max_tokens=2000, logprobs=1, stream=True))
        until(lambda: server.worker.active == 1)
        until(lambda: server.worker.active == 0)
        assert not server.engine.running
        until(lambda: server.num_admitted == 0)
        assert is_healthy(port)


@pytest.mark.parametrize("num_clients", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_clients_that_go_at_any_moment_leave_nothing_behind(tokenizer, num_clients):
    chance = random.Random(0)
    server = make_server(tokenizer, lambda _: "word " * 30, max_seq_len=4096, seconds_a_step=0.002, max_waiting=1000)
    hello = [{"role": "user", "content": "Hello"}]
    with listening(server) as port:
        is_healthy(port)
        before = open_files()
        for _ in range(num_clients):
            whole = chance.choice(
                [
                    request(prompt="x", max_tokens=40, n=2, stream=True),
                    request(prompt="x", max_tokens=40),
                    request("/v1/chat/completions", messages=hello, stream=True),
                    request("/v1/responses", input="x", stream=True),
                    request("/v1/embeddings", input=["x"] * 5),
                ]
            )
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(whole[: chance.choice([len(whole), len(whole), chance.randrange(len(whole))])])
                time.sleep(chance.choice([0, 0.002, 0.02, 0.05]))
                if chance.random() < 0.5:  # a reset instead of a goodbye
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        until(lambda: server.worker.active == 0 and not server.engine.running and not server.engine.queue)
        until(lambda: server.metrics.in_flight._value.get() == 0)
        until(lambda: open_files() <= before)
        assert server.num_admitted == 0 and is_healthy(port)
