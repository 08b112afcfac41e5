"""lm-eval through the API: the same scores as lm-eval's own run of the model by transformers."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "llama_jax[eval]"')

from tests.test_evaluate import CHOICE, DEMO, DOCS
from tests.test_serve import serving

WRITE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: generate_until
doc_to_text: text
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(folder, name, *options):
    """The samples that lm-eval logs: of each document what the model answered."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OPENAI_API_KEY": "any"}
    command = [sys.executable, "-m", "lm_eval", "--include_path", str(folder), "--output_path", str(folder / name)]
    done = subprocess.run([*command, "--log_samples", *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = {}
    for path in (folder / name).rglob("samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        samples[path.name.split("_")[1]] = [line["resps"] for line in sorted(lines, key=lambda line: line["doc_id"])]
    return samples


@pytest.mark.slow
def test_scores_through_the_api_are_those_of_transformers(tmp_path):
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, task in (("choice", CHOICE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(task.format(docs=docs))
    with serving(tmp_path / "log") as (_, address):
        served = f"model=demo,tokenizer={DEMO},num_concurrent=2,max_retries=1,max_length=256,add_bos_token=True"
        ours = evaluate(
            *(tmp_path, "ours", "--model", "local-completions", "--tasks", "choice,write"),
            *("--model_args", f"base_url={address}/v1/completions,tokenizer_backend=huggingface,{served}"),
        )
        chat = evaluate(
            *(tmp_path, "chat", "--model", "local-chat-completions", "--tasks", "write", "--apply_chat_template"),
            *("--model_args", f"base_url={address}/v1/chat/completions,{served}"),
        )
    theirs = evaluate(
        *(tmp_path, "theirs", "--model", "hf", "--device", "cpu", "--tasks", "choice,write"),
        *("--model_args", f"pretrained={DEMO},dtype=float32,max_length=256"),
    )
    assert ours["write"] == theirs["write"]
    for our, their in zip(ours["choice"], theirs["choice"], strict=True):
        for ((our_logprob, our_greedy),), ((their_logprob, their_greedy),) in zip(our, their, strict=True):
            assert float(our_logprob) == pytest.approx(float(their_logprob), abs=1e-3)
            assert our_greedy == their_greedy
    assert len(chat["write"]) == len(DOCS) and all(isinstance(answer[0][0], str) for answer in chat["write"])
