"""Synthetic data: templates filled, samples at temperatures, and what is kept of them."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

from infer import batch
from infer.synthesis import fill
from tests.test_batch import read, run, write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write("data.jsonl", [{"name": "read", "kind": "file"}, {"name": "write", "kind": "file"}])
    Path("template.txt").write_text("def {name}_{kind}(")
    yield
    sys.modules.pop("rules", None)


def make(*options):
    run("data.jsonl", "out.jsonl", "--template", "template.txt", "--continue-text", "--max-new-tokens", "6", *options)
    return read("out.jsonl") if Path("out.jsonl").exists() else []


def dropped():
    return read("out.jsonl.dropped.jsonl")


def test_every_object_is_sampled_at_every_temperature():
    records = make("--samples", "2", "--temperature", "0", "--temperature", "0.5", "--seed", "10")
    assert sorted(r["custom_id"] for r in records) == sorted(
        f"{line}-{temperature}-{sample}" for line in (1, 2) for temperature in ("0", "0.5") for sample in (0, 1)
    )
    record = next(r for r in records if r["custom_id"] == "2-0.5-1")
    assert (record["prompt"], record["fields"]) == ("def write_file(", {"name": "write", "kind": "file"})
    assert record["num_tokens"] == 6 and record["mean_logprob"] < 0 and record["seed"] == 10 + 2 * 2 + 1


def test_a_dialog_has_the_system_message():
    run("data.jsonl", "out.jsonl", "--template", "template.txt", "--system", "Be brief.", "--max-new-tokens", "2")
    assert len(read("out.jsonl")) == 2


def test_texts_that_are_alike_are_kept_once_also_when_the_run_goes_on():
    kept = make("--samples", "3", "--temperature", "0", "--dedup")
    assert len({r["text"].lower() for r in kept}) == len(kept)
    assert {line["dropped"] for line in dropped()} == {"duplicate"} and len(kept) + len(dropped()) == 6
    before = Path("out.jsonl").read_bytes()
    Path("out.jsonl.dropped.jsonl").unlink()
    make("--samples", "3", "--temperature", "0", "--dedup")
    assert Path("out.jsonl").read_bytes() == before


def test_a_function_of_python_keeps_what_it_likes():
    Path("rules.py").write_text("def reads(record):\n    return record['fields']['name'] == 'read'\n")
    assert [r["fields"]["name"] for r in make("--filter", "rules:reads")] == ["read"]
    assert [line["dropped"] for line in dropped()] == ["filter"]


def test_texts_that_the_model_finds_unlikely_are_dropped():
    assert make("--min-mean-logprob", "-0.0001") == []
    assert {line["dropped"] for line in dropped()} == {"unlikely"}


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{missing}", "line 1 has no field 'missing'"),
        ("{name.x}", "expected the name of a field"),
        ("{name!r}", "expected the name of a field"),
        ("{", "the template cannot be read"),
    ],
)
def test_a_template_that_cannot_be_filled_is_one_line(template, said):
    with pytest.raises(ValueError, match=said):
        fill(template, {"name": "a"}, "data.jsonl, line 1")


def test_braces_and_values_that_are_no_text_are_written_as_json():
    assert fill('{{"n": {n}, "s": "{s}"}}', {"n": [1, None], "s": "\u00e9"}, "") == '{"n": [1, null], "s": "\u00e9"}'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "2"], "--samples is for --template"),
        (["--template", "template.txt", "--samples", "0"], "expected at least 1"),
        (["--template", "template.txt", "--continue-text", "--system", "x"], "--system is for messages"),
        (["--template", "template.txt", "--filter", "nothing:here"], "expected MODULE:FUNCTION"),
        (["--template", "template.txt", "--filter", "json:__doc__"], "is a str, not a function"),
    ],
)
def test_options_that_do_not_fit_are_one_line(options, said):
    with pytest.raises(ValueError, match=said):
        batch.main(["data.jsonl", "out.jsonl", *options])
    assert json.loads(Path("data.jsonl").read_text().splitlines()[0])["name"] == "read"
