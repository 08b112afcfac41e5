"""The server in front of an engine whose answers are known, and ways to ask it."""

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from infer.api.app import make_app
from infer.api.connection import guarded
from infer.api.limits import Limits
from infer.api.server import Server
from infer.api.worker import Worker
from infer.sampling import SamplingParams
from llama_jax.tokenizer import load_tokenizer
from tests.scripted_engine import ScriptedEngine

DEMO = Path(__file__).parents[1] / "llama_jax" / "demo"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


def make_server(tokenizer, reply=lambda prompt: " and so on", *, max_waiting=16, limits=None, **engine):
    engine = ScriptedEngine(tokenizer, reply, **engine)
    worker = Worker(engine, max_waiting=max_waiting)  # type: ignore[arg-type]
    return Server(engine, tokenizer, worker, limits or Limits(), SamplingParams(temperature=1.0), ["demo"])  # type: ignore[arg-type]


@contextlib.contextmanager
def client_of(server, **options):
    with TestClient(make_app(server, **options), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(tokenizer):
    with client_of(make_server(tokenizer)) as client:
        yield client


def in_a_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def until(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


@contextlib.contextmanager
def listening(server, send_buffer=1 << 16):
    """The server on a real socket that holds so many bytes which a client has not read; gives its port."""
    protocol = guarded(AutoHTTPProtocol)
    config = uvicorn.Config(make_app(server), http=protocol, log_level="error", timeout_graceful_shutdown=5)
    http = uvicorn.Server(config)
    bound = socket.create_server(("127.0.0.1", 0), backlog=2048)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    thread = in_a_thread(lambda: asyncio.run(http.serve(sockets=[bound])))
    until(lambda: http.started)
    try:
        yield bound.getsockname()[1]
    finally:
        http.should_exit = True
        thread.join()
