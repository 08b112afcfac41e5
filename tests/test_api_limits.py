"""What the server refuses, and how it ends: bad input, too much of it, clients that go, engines that fail."""

import json
import threading

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

from infer.api.limits import Limits
from tests.scripted_server import client as client
from tests.scripted_server import client_of, in_a_thread, listening, make_server, until
from tests.scripted_server import tokenizer as tokenizer

MALFORMED = {
    "not JSON": b"{",
    "not UTF-8": b'{"prompt": "\xff"}',
    "half a surrogate pair": b'{"prompt": "\\ud800"}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "a huge number": b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    "an infinite number": b'{"prompt": "x", "temperature": 1e999}',
    "deep nesting": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number as text": b'{"prompt": "x", "temperature": "1"}',
    "a negative limit": b'{"prompt": "x", "max_tokens": -1}',
    "an unknown field": b'{"prompt": "x", "chat_template": "{{ 1 }}"}',
    "too many stop strings": json.dumps({"prompt": "x", "stop": ["a"] * 100_000}).encode(),
    "an empty prompt": b'{"prompt": []}',
    "a token outside the vocabulary": b'{"prompt": "x", "logit_bias": {"4096": 1}}',
    "more best_of than allowed": b'{"prompt": "x", "best_of": 100}',
    "tokens of none": b'{"prompt": "x", "max_tokens": 0}',
    "null": b"null",
    "nothing": b"",
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_request_is_400_with_one_line(client, body):
    answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text[:200]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in answer.json()["error"]["message"]


def test_a_body_that_another_site_could_send_is_refused(client):
    answer = client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400 and "application/json" in answer.json()["error"]["message"]


def test_a_prompt_that_is_too_long_is_told_by_its_code(client):
    answer = client.post("/v1/completions", json={"prompt": [5] * 512})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_body_that_is_too_large_is_413(tokenizer):
    with client_of(make_server(tokenizer, limits=Limits(max_body_bytes=1000))) as client:
        assert client.post("/v1/completions", json={"prompt": "x" * 2000}).status_code == 413
        assert client.post("/v1/completions", content=iter([b"x" * 600] * 3)).status_code == 413


def test_without_a_key_nothing_is_told(tokenizer):
    with client_of(make_server(tokenizer, limits=Limits(api_keys=["secret", "other"]))) as client:
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 401
        assert client.get("/v1/models").status_code == 401
        wrong = {"Authorization": "Bearer secre"}
        assert client.post("/v1/completions", json={"prompt": "x"}, headers=wrong).status_code == 401
        right = {"Authorization": "Bearer other"}
        assert client.post("/v1/completions", json={"prompt": "x"}, headers=right).status_code == 200
        assert client.get("/health").status_code == 200


def test_too_many_requests_are_429_and_told_when_to_return(tokenizer):
    server = make_server(tokenizer, lambda _: "word " * 50, max_waiting=0, max_batch_size=1, seconds_a_step=0.02)
    with client_of(server) as client:
        first = in_a_thread(lambda: client.post("/v1/completions", json={"prompt": "x", "max_tokens": 60}))
        until(lambda: server.worker.active == 1)
        refused = client.post("/v1/completions", json={"prompt": "x"})
        first.join()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_what_is_still_being_tokenized_counts_as_waiting(tokenizer):
    server = make_server(tokenizer, max_waiting=0, max_batch_size=2)
    gate, make = threading.Event(), server.engine.requests
    server.engine.requests = lambda *args, **more: gate.wait(10) and make(*args, **more)
    with client_of(server) as client:

        def ask():
            return client.post("/v1/completions", json={"prompt": "x"}).status_code

        begun = [in_a_thread(ask) for _ in range(2)]
        until(lambda: server.metrics.in_flight._value.get() == 2)
        assert ask() == 429
        gate.set()
        for thread in begun:
            thread.join()
        assert ask() == 200


def test_what_comes_in_spare_time_is_in_the_next_step(tokenizer):
    server = make_server(tokenizer, lambda _: "word " * 50)
    engine, together = server.engine, []
    step = engine.step

    def stepped():
        together.append(len(engine.queue) + len(engine.running))
        engine.spare_seconds = 30.0 if len(together) == 1 else 0.0  # with one request, for the other
        return step()

    add, engine.step = engine.add, stepped
    engine.add = lambda request: (add(request), setattr(engine, "spare_seconds", 0.0)) if together else add(request)
    with client_of(server) as client:
        first = in_a_thread(lambda: client.post("/v1/completions", json={"prompt": "x"}))
        until(lambda: together)
        assert client.post("/v1/completions", json={"prompt": "y"}).status_code == 200
        first.join()
    assert together[:2] == [1, 2]


def test_an_answer_has_at_most_the_tokens_that_are_allowed(tokenizer):
    server = make_server(tokenizer, lambda _: "word " * 50, limits=Limits(max_new_tokens=5))
    hello = {"messages": [{"role": "user", "content": "Hello"}]}
    with client_of(server) as client:
        assert client.post("/v1/chat/completions", json=hello).json()["usage"]["completion_tokens"] == 5
        refused = client.post("/v1/chat/completions", json=hello | {"max_tokens": 6})
        assert refused.status_code == 400 and "5 tokens" in refused.json()["error"]["message"]


def test_one_key_cannot_take_all(tokenizer):
    limits = Limits(api_keys=["a", "b"], max_per_key=1)
    server = make_server(tokenizer, lambda _: "word " * 50, limits=limits, seconds_a_step=0.02)
    with client_of(server) as client:

        def ask(key):
            headers = {"Authorization": f"Bearer {key}"}
            return client.post("/v1/completions", json={"prompt": "x"}, headers=headers).status_code

        first = in_a_thread(lambda: ask("a"))
        until(lambda: server.worker.active == 1)
        assert (ask("a"), ask("b")) == (429, 200)
        first.join()
        assert ask("a") == 200


def test_a_request_that_takes_too_long_is_504_and_aborted(tokenizer):
    server = make_server(
        tokenizer, lambda _: "word " * 200, limits=Limits(timeout_seconds=0.2), max_seq_len=4096, seconds_a_step=0.05
    )
    with client_of(server) as client:
        body = {"prompt": "x", "max_tokens": 1000}
        assert client.post("/v1/completions", json=body).status_code == 504
        until(lambda: server.engine.aborted)
        assert server.worker.active == 0


def test_an_engine_that_fails_answers_503_and_ends_the_worker(tokenizer):
    server = make_server(tokenizer)
    server.engine.fails = RuntimeError("out of memory")
    with client_of(server) as client:
        answer = client.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503 and "out of memory" in answer.json()["error"]["message"]
        assert client.get("/health").status_code == client.get("/ready").status_code == 503


def test_ready_waits_for_the_warm_up(tokenizer):
    gate = threading.Event()
    with client_of(make_server(tokenizer), warm_up=gate.wait) as client:
        assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 503)
        early = client.post("/v1/completions", json={"prompt": "x"})
        assert early.status_code == 503 and "retry-after" in early.headers
        gate.set()
        until(lambda: client.get("/ready").status_code == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(tokenizer, stream):
    import socket

    server = make_server(tokenizer, lambda _: "word " * 400, max_seq_len=4096, seconds_a_step=0.02)
    with listening(server) as port:
        body = json.dumps({"prompt": "x", "max_tokens": 1000, "stream": stream}).encode()
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            until(lambda: server.engine.running)
        until(lambda: server.engine.aborted)
        assert not server.engine.running and server.worker.active == 0
