"""The HTTP of the server, in front of an engine whose answers are known."""

import asyncio
import contextlib
import json
import math
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

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
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


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


def chat(client, *messages, **fields):
    body = {"messages": [{"role": "user", "content": text} for text in messages], **fields}
    return client.post("/v1/chat/completions", json=body)


def events(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_has_the_text_usage_and_reason(client):
    answer = client.post("/v1/completions", json={"prompt": "One", "max_tokens": 50}).json()
    assert answer["object"] == "text_completion" and answer["model"] == "demo"
    assert answer["choices"] == [{"index": 0, "text": " and so on", "logprobs": None, "finish_reason": "stop"}]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_several_prompts_n_times_each_come_in_order(client):
    answer = client.post("/v1/completions", json={"prompt": ["One", "Two"], "n": 2, "echo": True}).json()
    assert [choice["text"] for choice in answer["choices"]] == ["One and so on"] * 2 + ["Two and so on"] * 2
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


def test_a_limit_of_tokens_ends_with_length(client):
    (choice,) = client.post("/v1/completions", json={"prompt": "One", "max_tokens": 1}).json()["choices"]
    assert choice["finish_reason"] == "length"


def test_a_stop_string_ends_the_text(client):
    (choice,) = client.post("/v1/completions", json={"prompt": "One", "stop": [" so"]}).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" and", "stop")


def test_pieces_of_a_stream_join_to_the_whole(client):
    body = {"prompt": "One", "max_tokens": 50, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(client.post("/v1/completions", json=body))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == " and so on"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == [] and last["usage"]["completion_tokens"] > 0


def test_logprobs_of_completions_have_tokens_offsets_and_tops(client):
    (choice,) = client.post("/v1/completions", json={"prompt": "One", "logprobs": 2}).json()["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]).startswith(choice["text"])
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    assert set(logprobs["token_logprobs"]) == {-0.5}
    assert logprobs["top_logprobs"][0][logprobs["tokens"][0]] == -0.5


def test_chat_answers_as_the_assistant(client):
    answer = chat(client, "Hello").json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": " and so on", "refusal": None}
    assert (answer["object"], choice["finish_reason"]) == ("chat.completion", "stop")


def test_the_model_sees_the_dialog_in_the_chat_format(tokenizer):
    seen = []
    with client_of(make_server(tokenizer, lambda prompt: seen.append(prompt) or "yes")) as client:
        body = {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]}
        client.post("/v1/chat/completions", json=body)
    assert "<|start_header_id|>system<|end_header_id|>" in seen[0] and "Be brief." in seen[0]
    assert seen[0].rstrip().endswith("<|start_header_id|>assistant<|end_header_id|>")


def test_chat_logprobs_have_bytes_and_tops(client):
    (choice,) = chat(client, "Hello", logprobs=True, top_logprobs=1).json()["choices"]
    first = choice["logprobs"]["content"][0]
    assert bytes(first["bytes"]).decode() == first["token"] and first["logprob"] == -0.5
    assert [top["token"] for top in first["top_logprobs"]] == [first["token"]]


@pytest.mark.parametrize(
    "said",
    [
        '{"name": "weather", "parameters": {"city": "Paris"}}',
        '<|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}',
        '<|python_tag|>weather.call(city="Paris")',
        '<function=weather>{"city": "Paris"}</function>',
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_on_offer_is_told_as_one(tokenizer, said, stream):
    with client_of(make_server(tokenizer, lambda _: said)) as client:
        response = chat(client, "Weather?", tools=[WEATHER], stream=stream)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response)]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == ""
        (call,) = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
        reason = choices[-1]["finish_reason"]
    else:
        (choice,) = response.json()["choices"]
        (call,), reason = choice["message"]["tool_calls"], choice["finish_reason"]
        assert choice["message"]["content"] is None
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Paris"})
    assert reason == "tool_calls"


@pytest.mark.parametrize("said", ['{"name": "other", "parameters": {}}', "{just a brace", "It is sunny."])
def test_what_is_no_call_stays_text(tokenizer, said):
    with client_of(make_server(tokenizer, lambda _: said)) as client:
        whole = chat(client, "Weather?", tools=[WEATHER]).json()["choices"][0]
        chunks = events(chat(client, "Weather?", tools=[WEATHER], stream=True))
    assert (whole["message"]["content"], whole["finish_reason"]) == (said, "stop")
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == said


def test_results_of_tools_are_accepted_back(tokenizer):
    seen = []
    call = {"id": "call-1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "12 degrees"},
    ]
    with client_of(make_server(tokenizer, lambda prompt: seen.append(prompt) or "Cold.")) as client:
        body = {"messages": messages, "tools": [WEATHER]}
        answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "Cold."
    assert "12 degrees" in seen[0]


def test_responses_are_whole_and_streamed(client):
    answer = client.post("/v1/responses", json={"input": "Hello", "instructions": "Be brief."}).json()
    assert answer["status"] == "completed" and answer["output"][0]["content"][0]["text"] == " and so on"
    streamed = client.post("/v1/responses", json={"input": "Hello", "stream": True}).text
    told = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: ")]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert "".join(e["delta"] for e in told if e["type"] == "response.output_text.delta") == " and so on"
    assert (told[0]["type"], told[-1]["type"]) == ("response.created", "response.completed")


def test_embeddings_are_floats_or_base64(client):
    answer = client.post("/v1/embeddings", json={"input": ["one", "two words"]}).json()
    assert [len(item["embedding"]) for item in answer["data"]] == [8, 8]
    coded = client.post("/v1/embeddings", json={"input": "one", "encoding_format": "base64"}).json()
    assert len(coded["data"][0]["embedding"]) == 44


def test_text_to_tokens_and_back(client):
    answer = client.post("/tokenize", json={"prompt": "def f"}).json()
    assert answer["count"] == len(answer["tokens"]) and answer["max_model_len"] == 512
    assert client.post("/detokenize", json={"tokens": answer["tokens"][1:]}).json() == {"prompt": "def f"}


def test_models_are_listed_and_an_unknown_one_is_not_found(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo"]
    assert client.get("/v1/models/demo").json()["id"] == "demo"
    answer = chat(client, "Hello", model="gpt-4")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


def test_metrics_count_requests_and_tokens(client):
    chat(client, "Hello")
    page = client.get("/metrics").text
    assert 'llama_jax_requests_total{path="/v1/chat/completions",status="200"} 1.0' in page
    assert "llama_jax_time_to_first_token_seconds_count 1.0" in page
    assert "llama_jax_cache_pages_free 5.0" in page


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


def test_too_many_requests_are_429_and_told_when_to_return(tokenizer):
    server = make_server(tokenizer, lambda _: "word " * 50, max_waiting=0, max_batch_size=1, seconds_a_step=0.02)
    with client_of(server) as client:
        first = in_a_thread(lambda: client.post("/v1/completions", json={"prompt": "x", "max_tokens": 60}))
        until(lambda: server.worker.active == 1)
        refused = client.post("/v1/completions", json={"prompt": "x"})
        first.join()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


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
        gate.set()
        until(lambda: client.get("/ready").status_code == 200)


def test_the_log_has_ids_and_no_prompts(client, caplog):
    with caplog.at_level("INFO", logger="infer.serve"):
        answer = client.post("/v1/completions", json={"prompt": "a secret"})
    assert answer.headers["x-request-id"] in caplog.text and "/v1/completions 200" in caplog.text
    assert "secret" not in caplog.text


def test_the_page_is_there_and_needs_nothing_else(client):
    page = client.get("/").text
    assert "<title>llama_jax</title>" in page
    assert "http://" not in page and "https://" not in page


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


def test_the_openai_client_works_unchanged(tokenizer):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    call = '{"name": "weather", "parameters": {"city": "Paris"}}'
    server = make_server(tokenizer, lambda prompt: call if "Weather" in prompt else " and so on")
    with listening(server) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any")
        hello = [{"role": "user", "content": "Hello"}]
        assert client.models.list().data[0].id == "demo"
        assert client.completions.create(model="demo", prompt="One").choices[0].text == " and so on"
        answer = client.chat.completions.create(model="demo", messages=hello, logprobs=True, n=2, seed=1)
        assert [choice.message.content for choice in answer.choices] == [" and so on"] * 2
        assert math.isclose(answer.choices[0].logprobs.content[0].logprob, -0.5)
        stream = client.chat.completions.create(model="demo", messages=hello, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == " and so on"
        asked = [{"role": "user", "content": "Weather?"}]
        answer = client.chat.completions.create(model="demo", messages=asked, tools=[WEATHER])
        assert answer.choices[0].message.tool_calls[0].function.name == "weather"
        assert client.responses.create(model="demo", input="Hello").output_text == " and so on"
        with client.responses.stream(model="demo", input="Hello") as told:
            assert told.get_final_response().output_text == " and so on"
        assert len(client.embeddings.create(model="demo", input="one").data[0].embedding) == 8
        with pytest.raises(openai.BadRequestError, match="too long|no room"):
            client.completions.create(model="demo", prompt=[5] * 600)
        client.close()
