"""The server as its users meet it: a process with the demo model, asked by OpenAI's own client."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("openai", reason="openai is not installed")

import jax
import openai
from flax import nnx

import llama_jax
from infer import serve
from llama_jax.checkpoint.formats import open_checkpoint
from llama_jax.convert import copy_companions
from llama_jax.model import Llama
from tests.processes import ROOT, until
from tests.scripted_server import DEMO

OPTIONS = ("--port", "0", "--max-seq-len", "256", "--max-batch-size", "4", "--mesh", "data=1")
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "old": {"type": "boolean"}},
    "required": ["age", "old"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "Hello"}]


@contextlib.contextmanager
def serving(log, *options):
    """A server in a process of its own that writes to log, and its address once it listens."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "infer.serve", *OPTIONS, *options]
    with log.open("w") as stderr, subprocess.Popen(command, env=environment, stderr=stderr) as process:
        try:
            until(lambda: process.poll() is not None or "Ctrl-C stops" in log.read_text(), seconds=300)
            yield process, re.search(r"at (http://127\.0\.0\.1:\d+)/", log.read_text())[1]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server") / "log") as (_, address):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


def metric(address, name):
    page = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return float(re.search(rf"^{name} (\S+)$", page, re.MULTILINE)[1])


def test_texts_are_continued_whole_and_in_pieces_alike(client):
    assert client.models.list().data[0].id == "demo"
    asked = {"model": "demo", "prompt": "def read_text(", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked)
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (12, "length")
    pieces = client.completions.create(**asked, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text != ""


def test_a_seed_gives_the_same_text_whatever_else_runs(client):
    asked = {"model": "demo", "messages": HELLO, "seed": 7, "max_tokens": 12}
    alone = client.chat.completions.create(**asked)
    both = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=3)
    first, second = (choice.message.content for choice in both.choices)
    assert first == alone.choices[0].message.content != second
    content = both.choices[0].logprobs.content
    assert len(content) == 12 and all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content)


def test_a_stop_string_ends_a_text(client):
    asked = {"model": "demo", "prompt": "import os\nimport", "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    stop = text[8:11]
    choice = client.completions.create(**asked, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_token_that_is_banned_does_not_come(client):
    asked = {"model": "demo", "prompt": "import os\nimport", "max_tokens": 1, "temperature": 0}
    text = client.completions.create(**asked).choices[0].text
    (token,) = client.post("/../tokenize", body={"prompt": text, "add_special_tokens": False}, cast_to=object)["tokens"]
    other = client.completions.create(**asked, extra_body={"banned_token_ids": [token]}).choices[0].text
    assert other not in ("", text)


def test_an_answer_fits_its_schema(client):
    fits = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, response_format=fits, max_tokens=120, temperature=0.5, seed=1
    )
    assert answer.choices[0].finish_reason == "stop"
    person = json.loads(answer.choices[0].message.content)
    assert 0 <= person["age"] <= 99 and person["old"] in (True, False) and len(person) == 2


def test_a_tool_that_must_be_called_is_called_with_arguments_that_fit(client):
    answer = client.chat.completions.create(
        model="demo", messages=HELLO, tools=[WEATHER], tool_choice="required", max_tokens=150, temperature=0.5, seed=3
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_embeddings_have_length_one_and_differ(client):
    one, other, again = (
        item.embedding for item in client.embeddings.create(model="demo", input=["a list", "a socket", "a list"]).data
    )
    assert sum(x * x for x in one) == pytest.approx(1, abs=1e-4)
    assert one == pytest.approx(again, abs=1e-5) and sum(map(lambda x, y: x * y, one, other)) < 0.999


def test_responses_are_streamed(client):
    events = list(client.responses.create(model="demo", input="Hello", max_output_tokens=16, stream=True))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type in ("response.completed", "response.incomplete")
    texts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(texts) == events[-1].response.output[0].content[0].text != ""


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_is_answered_as_the_documentation_shows(address):
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\$ (curl (?:.*\\\n)*.*)\n(\{.*\})$", page, re.MULTILINE)
    assert len(shown) == 3
    for command, expected in shown:
        command = command.replace("http://127.0.0.1:8000", address)
        said = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
        answer, expected = json.loads(said), json.loads(expected)
        own = {"id", "created", "max_model_len"}  # of each answer, and of each server
        assert answer.keys() == expected.keys()
        assert [answer[key] for key in answer if key not in own] == [expected[key] for key in answer if key not in own]


def test_the_log_probabilities_of_a_prompt_are_those_of_its_tokens_one_by_one(client):
    echoed = client.completions.create(model="demo", prompt="import os\n", max_tokens=0, echo=True, logprobs=1)
    logprobs = echoed.choices[0].logprobs
    assert echoed.choices[0].text == "import os\n" and logprobs.token_logprobs[0] is None
    *before, last = client.post("/../tokenize", body={"prompt": "import os\n"}, cast_to=object)["tokens"]
    next_token = client.completions.create(
        model="demo", prompt=before, max_tokens=1, logprobs=1, extra_body={"allowed_token_ids": [last]}
    )
    bare = client.completions.create(model="demo", prompt=before, max_tokens=1, logprobs=20, temperature=0)
    likely = bare.choices[0].logprobs.top_logprobs[0]
    assert next_token.choices[0].text == "\n"
    if "\n" in likely:
        assert logprobs.token_logprobs[-1] == pytest.approx(likely["\n"], abs=1e-3)


def test_a_client_that_goes_away_frees_its_pages(address):
    until(lambda: metric(address, "llama_jax_running") == 0)
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "x", "max_tokens": 200, "stream": True, "ignore_eos": True}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        connection.recv(1000)
    until(lambda: metric(address, "llama_jax_running") == 0)
    assert metric(address, "llama_jax_cache_pages") == metric(address, "llama_jax_cache_pages_free")


def test_a_killed_server_starts_again_on_its_port_and_sigterm_lets_what_runs_end(tmp_path):
    asked = {"model": "demo", "prompt": "def f", "max_tokens": 100, "stream": True}
    with serving(tmp_path / "log") as (process, address):
        body, kind = json.dumps(asked | {"ignore_eos": True}).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/v1/completions", body, kind)) as stream:
            assert stream.readline().startswith(b"data: ")
            process.kill()
    with serving(tmp_path / "log", "--port", address.rpartition(":")[2]) as (process, again):
        assert again == address
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
            stream = client.completions.create(**asked, extra_body={"ignore_eos": True})
            pieces = [next(stream)]
            process.send_signal(signal.SIGTERM)
            pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason == "length"
        assert process.wait(timeout=300) == 0


def test_sigterm_ends_a_warm_up(tmp_path):
    with serving(tmp_path / "log", "--warmup", "--grace", "1") as (process, address):
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{address}/ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 0


def test_after_the_warm_up_nothing_compiles(tmp_path):
    cfg = dataclasses.replace(open_checkpoint(DEMO).cfg, num_layers=1)  # a layer compiles faster than five
    with llama_jax.use_mesh("data=1"):
        llama_jax.save(jax.jit(lambda: Llama(cfg, rngs=nnx.Rngs(0)))(), tmp_path / "demo")
    copy_companions(DEMO, tmp_path / "demo")
    few = ("--max-seq-len", "32", "--max-batch-size", "2", "--prefill-chunk", "16", "--warmup")
    with serving(tmp_path / "log", "--checkpoint", str(tmp_path / "demo"), *few) as (_, address):

        def ready():
            try:
                return urllib.request.urlopen(f"{address}/ready").status == 200
            except urllib.error.HTTPError as error:
                assert error.code == 503
                return False

        assert urllib.request.urlopen(f"{address}/health").status == 200
        until(ready, seconds=300)
        compiled = metric(address, "llama_jax_compilations_total")
        with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
            for length, more in ((1, {}), (10, {"presence_penalty": 1.0}), (24, {"logprobs": 2}), (20, {"n": 2})):
                client.completions.create(model="demo", prompt=[5] * length, max_tokens=8, **more)
                client.embeddings.create(model="demo", input=[5] * length)
        assert metric(address, "llama_jax_compilations_total") == compiled > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "99999"], "--port 99999: expected 0 to 65535"),
        (["--checkpoint", "nowhere/at/all"], "nowhere/at/all"),
        (["--max-choices", "0"], "--max-choices and --max-new-tokens must be at least 1"),
        (["--timeout", "-1"], "--timeout -1.0: expected 0 or more"),
        (["--api-key-file", "absent"], "absent"),
    ],
)
def test_options_that_cannot_be_are_one_line(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        serve.main([*OPTIONS, *options])


def test_a_port_that_is_taken_is_one_line(address):
    port = address.rpartition(":")[2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "infer.serve", *OPTIONS[2:], "--port", port]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(
        rf"^error: --host 127.0.0.1 --port {port}: Address already in use; name another$", done.stderr, re.M
    )


def test_a_proxy_and_one_other_site_may_be_in_front():
    from starlette.testclient import TestClient

    from llama_jax.tokenizer import load_tokenizer
    from tests.scripted_server import make_server

    args = serve.parse_args(["--root-path", "/llama", "--cors-origin", "https://chat.example"])
    config = serve.http_config(args, make_server(load_tokenizer(DEMO)))
    with TestClient(config.app, root_path=config.root_path) as client:
        assert client.get("/llama/openapi.json").json()["servers"] == [{"url": "/llama"}]
        allowed = client.get("/llama/v1/models", headers={"Origin": "https://chat.example"})
        assert allowed.json()["data"][0]["id"] == "demo"
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        other = client.get("/llama/v1/models", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
    args = serve.parse_args([])
    with TestClient(serve.http_config(args, make_server(load_tokenizer(DEMO))).app) as client:
        assert "access-control-allow-origin" not in client.get("/", headers={"Origin": "https://chat.example"}).headers
