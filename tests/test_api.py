"""The HTTP of the server, in front of an engine whose answers are known."""

import json
import math

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

from tests.scripted_server import client as client
from tests.scripted_server import client_of, listening, make_server
from tests.scripted_server import tokenizer as tokenizer

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


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


def test_an_adapter_is_asked_for_by_its_name(tokenizer):
    server = make_server(tokenizer)
    server.engine.adapter_names, server.model_names = ("sql",), ["demo", "sql"]
    with client_of(server) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo", "sql"]
        for name, text in (("demo", " and so on"), ("sql", "sql:  and so on")):
            answer = client.post("/v1/completions", json={"prompt": "One", "model": name}).json()
            assert (answer["model"], answer["choices"][0]["text"]) == (name, text)
            said = chat(client, "One", model=name).json()["choices"][0]["message"]["content"]
            assert said.startswith("sql: ") == (name == "sql")
            vector = client.post("/v1/embeddings", json={"input": "One", "model": name}).json()["data"][0]["embedding"]
            assert sum(vector) == (1.0 if name == "demo" else -1.0)


def test_metrics_count_requests_and_tokens(client):
    chat(client, "Hello")
    page = client.get("/metrics").text
    assert 'llama_jax_requests_total{path="/v1/chat/completions",status="200"} 1.0' in page
    assert "llama_jax_time_to_first_token_seconds_count 1.0" in page
    assert "llama_jax_cache_pages_free 5.0" in page


def test_the_log_has_ids_and_no_prompts(client, caplog):
    with caplog.at_level("INFO", logger="infer.serve"):
        answer = client.post("/v1/completions", json={"prompt": "a secret"})
    assert answer.headers["x-request-id"] in caplog.text and "/v1/completions 200" in caplog.text
    assert "secret" not in caplog.text


def test_the_page_is_there_and_needs_nothing_else(client):
    page = client.get("/").text
    assert "<title>llama_jax</title>" in page
    assert "http://" not in page and "https://" not in page


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
        asked_and_called(client)
        assert len(client.embeddings.create(model="demo", input="one").data[0].embedding) == 8
        with pytest.raises(openai.BadRequestError, match="too long|no room"):
            client.completions.create(model="demo", prompt=[5] * 600)
        client.close()


def asked_and_called(client):
    """A function is called in /v1/responses, whole and streamed, and its result brought back with the dialog."""
    tools = [{"type": "function"} | WEATHER["function"]]
    dialog: list = [{"role": "user", "content": "Weather?"}]
    answer = client.responses.create(model="demo", input=dialog, tools=tools)
    with client.responses.stream(model="demo", input=dialog, tools=tools) as told:
        streamed = told.get_final_response()
    for (call,) in (answer.output, streamed.output):
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "weather", {"city": "Paris"})
    said = client.responses.create(model="demo", input="Hello").output
    result = {"type": "function_call_output", "call_id": answer.output[0].call_id, "output": "12 degrees"}
    again = client.responses.create(model="demo", input=[*dialog, *answer.output, result, *said], tools=tools)
    assert again.output[0].type == "function_call"


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def constrained(tokenizer, said, path="/v1/chat/completions", **fields):
    """The answer, and for each text whether the constraint of its request takes it."""
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    server = make_server(tokenizer, lambda _: "x")
    found = []

    def taken(text, constraint):
        return all(constraint.accept(token) for token in tokenizer.encode(text)) and bool(
            constraint.mask()[min(tokenizer.stop_ids) // 32] >> min(tokenizer.stop_ids) % 32 & 1
        )

    add = server.engine.add
    server.engine.add = lambda request: (found.append(request.constraint.copy()), add(request))  # type: ignore[assignment]
    with client_of(server) as client:
        body = {"messages": [{"role": "user", "content": "Hello"}]} if "chat" in path else {}
        answer = client.post(path, json=body | fields)
    assert answer.status_code == 200, answer.text
    return [taken(text, found[0].copy()) for text in said]


@pytest.mark.parametrize(
    ("fields", "fits", "does_not"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": [1]}', "[1]"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            '{"n": 3}',
            '{"n": "3"}',
        ),
        (
            {"tools": [WEATHER], "tool_choice": "required"},
            '{"name": "weather", "parameters": {"city": "Paris"}}',
            "It is sunny.",
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
            '{"name": "weather", "parameters": {}}',
            '{"name": "other", "parameters": {}}',
        ),
        ({"structured_outputs": {"choice": ["yes", "no (really)"]}}, "no (really)", "maybe"),
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "123", "12"),
        ({"structured_outputs": {"grammar": 'start: "a" | "b" start'}}, "bba", "ab"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, '{"n": 1}', "{}"),
    ],
)
def test_what_is_asked_of_an_answer_constrains_its_tokens(tokenizer, fields, fits, does_not):
    assert constrained(tokenizer, [fits, does_not], **fields) == [True, False]


def test_a_strict_tool_leaves_text_or_a_call_that_fits(tokenizer):
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    calls = ['{"name": "weather", "parameters": {"city": "x"}}', '{"name": "weather", "parameters": {"city": 1}}']
    assert constrained(tokenizer, ["It is sunny.", *calls], tools=[strict]) == [True, True, False]


def test_completions_and_responses_are_constrained_too(tokenizer):
    outputs = {"structured_outputs": {"regex": "a+"}, "prompt": "x"}
    assert constrained(tokenizer, ["aa", "b"], "/v1/completions", **outputs) == [True, False]
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    fields = {"input": "x", "text": text}
    assert constrained(tokenizer, ['{"n": 1}', "{}"], "/v1/responses", **fields) == [True, False]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}},
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        {"structured_outputs": {"regex": "(a{1000}){1000}"}},
        {"structured_outputs": {"regex": "(?=a)b"}},
        {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        {"structured_outputs": {"json": "{"}},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tool_choice": "required"},
    ],
)
def test_a_constraint_that_cannot_be_followed_is_400(client, fields):
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    answer = chat(client, "Hello", **fields)
    assert answer.status_code == 400 and "\n" not in answer.json()["error"]["message"]
