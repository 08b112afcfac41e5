"""The engine as lm-eval's model against lm-eval's own model of transformers, and the command that scores tasks."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "llama_jax[eval]"')

import lm_eval
from lm_eval import tasks

import llama_jax
from infer.engine import Engine
from infer.evaluate import main
from infer.evaluation import EngineModel
from infer.sizes import PAGE_SIZE_ELSEWHERE, CacheOptions

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and transformers' own

DEMO = Path(__file__).parents[1] / "llama_jax" / "demo"
WINDOW = 62  # tokens
TEXT = "import os\nimport sys\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n" * 3
PAIRS = [
    ("import os\nimport ", "sys"),
    ("import os\nimport ", "zebra, cat"),
    ("import os\nimport", " re"),
    ("import os ", "\n"),  # the space belongs to what follows
    ("", "import os"),
    ("class Reader:\n    def __init__(", "self"),  # the likeliest
    ("def read(self", ", size=-1):\n        "),
    (TEXT, "def write("),  # longer than a window
]


@pytest.fixture(scope="module")
def theirs():
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(DEMO), device="cpu", dtype="float32", max_length=WINDOW, batch_size=1)


@pytest.fixture(scope="module")
def scorer():
    with llama_jax.use_mesh("data=1"):
        model = llama_jax.load(DEMO, dtype="float32", layout="decoding")
    tokenizer = llama_jax.load_tokenizer(DEMO)

    def make(max_seq_len, **options):
        cache = CacheOptions(**options)
        return EngineModel(
            Engine(model, tokenizer, max_seq_len=max_seq_len, max_batch_size=4, cache=cache), tokenizer, ""
        )

    return make


@pytest.fixture(scope="module")
def ours(scorer):
    return scorer(WINDOW + 2)


def asked(*all_args):
    return [SimpleNamespace(args=args) for args in all_args]


def test_log_probabilities_of_continuations_are_those_of_transformers(ours, theirs):
    found, expected = (model.loglikelihood(asked(*PAIRS)) for model in (ours, theirs))
    assert found == [(pytest.approx(total, abs=1e-3), greedy) for total, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}


def test_what_answers_have_before_them_is_computed_once(scorer):
    pairs = asked(*((TEXT, answer) for answer in ("def write(", "import re", "class A:\n")))
    sharing, alone = scorer(256), scorer(256, share_prefixes=False)
    expected = [(pytest.approx(total, abs=1e-3), greedy) for total, greedy in alone.loglikelihood(pairs)]
    assert sharing.loglikelihood(pairs) == expected
    hits = [model._engine.stats().prefix_hit_tokens for model in (sharing, alone)]
    assert hits == [2 * PAGE_SIZE_ELSEWHERE, 0]


def test_whole_texts_are_scored_in_the_same_windows(ours, theirs):
    texts = asked((TEXT,), ("import os\n",), (TEXT[:150],))
    expected = theirs.loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == [pytest.approx(total, abs=1e-3) for total in expected]


def test_texts_are_generated_up_to_a_stop_as_transformers_does(ours, theirs):
    options = {"until": ["\n\n", "return"], "max_gen_toks": 24, "do_sample": False}
    contexts = [("def read(path):\n    ", options), (TEXT, options), ("class A", {"until": "\n", "max_gen_toks": 9})]
    assert ours.generate_until(asked(*contexts)) == theirs.generate_until(asked(*contexts))


@pytest.mark.parametrize("prompted", [True, False])
def test_dialogs_are_those_of_transformers(ours, theirs, prompted):
    turns = [("system", "Say little."), ("user", "What is\n2 + 2?"), ("assistant", " It is")]
    dialog = [{"role": role, "content": content} for role, content in turns[: 2 if prompted else 3]]
    text = ours.apply_chat_template(dialog, add_generation_prompt=prompted)
    assert text == theirs.apply_chat_template(dialog, add_generation_prompt=prompted)
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    pair = asked((text, " 4"))
    assert ours.loglikelihood(pair)[0][0] == pytest.approx(theirs.loglikelihood(pair)[0][0], abs=1e-3)


def test_a_context_that_is_sampled_again_gives_another_text(ours):
    again = ("def ", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.95})
    texts = ours.generate_until(asked(*[again] * 4))
    assert len(set(texts)) > 1 and texts == ours.generate_until(asked(*[again] * 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": [], "num_beams": 4}, "num_beams in generation_kwargs, which are not supported here"),
        ({"until": [], "max_gen_toks": WINDOW}, "raise --max-seq-len"),
    ],
)
def test_what_a_task_may_not_ask_is_refused(ours, options, message):
    with pytest.raises(ValueError, match=message):
        ours.generate_until(asked(("def ", options)))
    assert not ours._engine.has_work


def test_a_continuation_longer_than_a_window_is_refused(ours):
    with pytest.raises(ValueError, match="expected 1 to 62"):
        ours.loglikelihood(asked(("import", TEXT)))


CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
DOCS = [
    {"text": "import os\nimport ", "choices": ["sys", "zebra", "re"], "label": 0},
    {"text": "def read(self", "choices": [", size", "!?", ")"], "label": 1},
    {"text": "for i in ", "choices": ["range(10)", "while"], "label": 0},
]


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # Without lm-eval's own ten thousand tasks, which it looks for for seconds.
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(tasks.TaskManager, include_defaults=False))
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(docs=docs))
    return ["--tasks", "choice", "--include-path", str(tmp_path), "--max-seq-len", "64", "--max-batch-size", "4"]


def test_the_command_prints_scores_and_writes_what_was_answered(task, theirs, tmp_path, capsys):
    main([*task, "--json", "--samples", str(tmp_path / "samples.jsonl")])
    found = json.loads(capsys.readouterr().out)
    manager = tasks.TaskManager(include_path=str(tmp_path))
    expected = lm_eval.simple_evaluate(theirs, tasks=["choice"], task_manager=manager)
    scores = expected["results"]["choice"]
    assert found["results"]["choice"]["acc,none"] == scores["acc,none"] and 0 < scores["acc,none"] < 1
    assert found["n-samples"]["choice"] == {"original": 3, "effective": 3}
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["task"], line["doc"]) for line in lines] == [("choice", doc) for doc in DOCS]
    for line, sample in zip(lines, expected["samples"]["choice"], strict=True):
        for (our, _), (their, _) in zip(line["filtered_resps"], sample["filtered_resps"], strict=True):
            assert float(our) == pytest.approx(float(their), abs=1e-3)
    main([*task, "--limit", "2", "--speculate", "ngram"])
    assert "|choice|" in capsys.readouterr().out


def test_data_that_cannot_be_had_is_told_before_a_weight_is_read(task, tmp_path, monkeypatch):
    (tmp_path / "docs.jsonl").unlink()
    monkeypatch.setattr("infer.evaluate.load_engine", None)
    with pytest.raises(FileNotFoundError, match="docs.jsonl"):
        main(task)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "no_such_task"], "lm-eval has no task 'no_such_task'"),
        (["--tasks", ","], "--tasks names no task"),
        (["--limit", "0"], "--limit above 0"),
        (["--include-path", "nowhere"], "nowhere is no directory"),
        (["--samples", "nowhere/samples.jsonl"], "its directory is not there"),
        (["--adapter", "a=x", "--adapter", "b=y"], "one --adapter"),
    ],
)
def test_bad_options_are_refused_before_a_weight_is_read(task, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        main([*task, *options])
