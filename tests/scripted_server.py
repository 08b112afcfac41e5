"""The server in front of an engine whose answers are known, and ways to ask it."""

import asyncio
import contextlib
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient

from infer.api.app import make_app
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
def listening(server):
    """The server on a real socket; gives its port."""
    http = uvicorn.Server(uvicorn.Config(make_app(server), port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = in_a_thread(lambda: asyncio.run(http.serve()))
    until(lambda: http.started)
    try:
        yield http.servers[0].sockets[0].getsockname()[1]
    finally:
        http.should_exit = True
        thread.join()
