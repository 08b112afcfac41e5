"""Batches: files in OpenAI's format answered, data made of templates, and runs that go on after a kill."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

from infer import batch
from infer.results import ResultFile
from tests.processes import ROOT


def write(path, lines):
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def job(custom_id, prompt="def f", **fields):
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0} | fields
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def run(*args):
    batch.main([*args, "--mesh", "data=1", "--max-seq-len", "64", "--max-batch-size", "4"])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_line_is_answered_once_as_the_server_would(capsys):
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    jobs = [job("a"), {"custom_id": "b", "url": "/v1/chat/completions", "body": chat}, job("c", max_tokens=-1)]
    jobs += [{"custom_id": "d", "url": "/v1/responses", "body": {"input": "Hi", "max_output_tokens": 4}}]
    jobs += [{"custom_id": "e", "url": "/v1/embeddings", "body": {"input": ["Hi", "you"]}}]
    write("in.jsonl", jobs)
    run("in.jsonl", "out.jsonl")
    answers = {line["custom_id"]: line["response"] for line in read("out.jsonl")}
    assert {name: answer["status_code"] for name, answer in answers.items()} == {
        **{"a": 200, "b": 200, "c": 400},
        **{"d": 200, "e": 200},
    }
    assert answers["a"]["body"]["usage"]["completion_tokens"] == 4
    assert answers["b"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert answers["d"]["body"]["usage"]["output_tokens"] == 4 and len(answers["e"]["body"]["data"]) == 2
    assert "max_tokens" in answers["c"]["body"]["error"]["message"]
    assert "1 of them are answered by an error" in capsys.readouterr().err


def test_a_run_that_goes_on_does_what_is_missing_and_drops_half_a_line(capsys):
    write("in.jsonl", [job("a"), job("b")])
    run("in.jsonl", "whole.jsonl")
    done = {line["custom_id"]: line for line in read("whole.jsonl")}
    Path("out.jsonl").write_text(json.dumps(done["b"]) + '\n{"custom_id": "a", "resp')
    run("in.jsonl", "out.jsonl")
    again = read("out.jsonl")
    assert again[0] == done["b"] and [line["custom_id"] for line in again] == ["b", "a"]
    text = [line["response"]["body"]["choices"][0]["text"] for line in (again[1], done["a"])]
    assert text[0] == text[1]
    assert "1 of 2 to do" in capsys.readouterr().err
    before = Path("out.jsonl").read_bytes()
    run("in.jsonl", "out.jsonl")
    assert Path("out.jsonl").read_bytes() == before


def test_a_batch_that_is_killed_again_and_again_repeats_and_loses_no_line():
    names = [f"job-{i}" for i in range(40)]
    write("in.jsonl", [job(name, prompt=f"def f{i}", max_tokens=16) for i, name in enumerate(names)])
    command = [sys.executable, "-m", "infer.batch", "in.jsonl", "out.jsonl", "--max-batch-size", "2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    kills = 0
    for goal in itertools.count(10, 12):  # each process is killed some lines later than the one before
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not Path("out.jsonl").exists() or len(read_whole("out.jsonl")) < goal):
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 2
    assert sorted(line["custom_id"] for line in read("out.jsonl")) == sorted(names)


def read_whole(path):
    return Path(path).read_bytes().split(b"\n")[:-1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "line 1 is not a JSON object"),
        ('{"custom_id": 1, "body": {}}', "line 1: expected"),
        ('{"custom_id": "a", "url": "/v1/files", "body": {}}', "expected POST /v1/completions or"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}', "a batch does not stream"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {}}\n' * 2, "line 2: custom_id 'a' was there before"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_runs(line, said):
    Path("in.jsonl").write_text(line)
    with pytest.raises(ValueError, match=said):
        run("in.jsonl", "out.jsonl")
    assert not Path("out.jsonl").exists()


def test_an_output_that_is_something_else_is_refused_and_kept():
    Path("out.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="has lines that are no results; name another output"):
        ResultFile(Path("out.jsonl"))
    assert Path("out.jsonl").read_text() == '{"other": 1}\n'


def test_results_go_to_a_disk():
    with pytest.raises(ValueError, match="which an object store cannot; name a file"):
        run("in.jsonl", "gs://bucket/out.jsonl")
