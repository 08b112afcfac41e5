"""A run beside transformers: it starts with transformers' loss on its own packed rows, and exports its own perplexity.

A gate's baseline is transformers' loss of the weights that it was given.

On the other side a 4-D mask and positions of their own keep packed documents apart.
"""

import dataclasses
import json
import math
import random

import pytest
import torch
import transformers

import llama_jax
from llama_jax.config import LlamaConfig, RopeConfig
from llama_jax.convert import convert
from llama_jax.mesh import sharding_rules
from llama_jax.tokenizer import load_tokenizer
from tests.reference import hf_model, save_hf
from tests.test_hub import contents
from tests.test_hub import hub as hub
from tests.test_torch_curve import torch_loss
from tests.test_train import CONFIG, run
from train.checkpoints import Progress
from train.config import read_config
from train.data.inputs import Inputs
from train.data.packing import Batch
from train.data.shards import open_sources
from train.prepare import prepare
from train.watching.metrics import read_metrics

LENGTH = 64
SCALED = RopeConfig(factor=8.0, original_max_seq_len=2 * LENGTH)  # two of a head's four frequencies are divided by 8
PLAIN = dataclasses.replace(SCALED, factor=1.0)
STAGE = {
    "stage.1.phases": [{"seq_len": LENGTH, "tokens": 8 * LENGTH}],
    "stage.1.batch_tokens": 4 * LENGTH,
    "stage.1.rope_factor": 0.0,
    "run.log_every": 1,
    "run.trackers": [],
    "model.rope.original_max_seq_len": LENGTH,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a config and prepared documents, most of them shorter than a row."""
    folder = tmp_path_factory.mktemp("home")
    words = "the cat sat on a mat and then it ran to find some milk in house of its friend".split()
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=draw.choice([5, 10, 20, 80]))) for _ in range(160)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "tiny.toml").write_text(CONFIG)
    prepare([folder / "text.jsonl"], folder / "data", vocab_size=540, holdout=0.3)
    return folder


@pytest.fixture
def workdir(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def options(settings: dict) -> list[str]:
    """As the command line takes them; JSON is TOML but for its tables."""
    texts = {key: json.dumps(value).replace(": ", "=") for key, value in settings.items()}
    return [word for key, text in texts.items() for word in ("--set", f"{key}={text}")]


def first_batch(settings: dict) -> Batch:
    """The rows that a run with these settings reads first."""
    config = read_config("tiny.toml", settings)
    inputs = Inputs(config, "1", load_tokenizer("data"))
    with llama_jax.use_mesh("data=1"):
        stream, _ = inputs.stream(config.stage["1"].phases[0], Progress(), sharding_rules(config.model))
        with stream:
            return next(stream)


def model_of(rope: RopeConfig, *, tied: bool) -> tuple[LlamaConfig, transformers.LlamaForCausalLM]:
    model = read_config("tiny.toml").model
    cfg = dataclasses.replace(model, rope=rope, tie_embeddings=tied, max_seq_len=2 * LENGTH)
    return cfg, hf_model(cfg)


def heldout_loss(model: transformers.LlamaForCausalLM) -> float:
    """Of the first tokens of held-out documents, as a run evaluates."""
    heldout = open_sources("data", "heldout")["text"]
    documents = [heldout.document(i) for i in range(heldout.num_documents)]
    rows = [document[: LENGTH + 1].tolist() for document in documents if len(document) > LENGTH]
    tokens = torch.tensor(rows[: read_config("tiny.toml").run.eval_rows])
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize(
    ("given", "rope_factor", "trained"),
    [(PLAIN, 1.0, PLAIN), (SCALED, 0.0, SCALED), (PLAIN, 8.0, SCALED)],
    ids=["plain", "scaled", "scaled-by-the-stage"],
)
def test_the_first_loss_and_gradient_of_given_weights_are_transformers(workdir, tmp_path, given, rope_factor, trained):
    tied = trained is PLAIN
    settings = STAGE | {"stage.1.rope_factor": rope_factor, "model.tie_embeddings": tied}
    _, start = model_of(given, tied=tied)
    run("1", "--init", str(save_hf(start, tmp_path / "hf")), "--run-dir", str(tmp_path / "run"), *options(settings))
    first = next(line for line in read_metrics(tmp_path / "run") if "loss" in line)

    batch = first_batch(STAGE)
    assert batch.segment_ids.max(axis=1).mean() >= 3  # documents in a row
    _, theirs = model_of(trained, tied=tied)
    loss = torch_loss(theirs, batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(loss.item(), rel=2e-6)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    _, other = model_of(PLAIN if trained is SCALED else SCALED, tied=tied)
    assert abs(torch_loss(other, batch).item() - loss.item()) > 1e-3  # so the scaling was that of the right side


def test_an_exported_run_has_its_held_out_perplexity_in_transformers(workdir, tmp_path):
    run("1", "--run-dir", str(tmp_path / "run"), *options(STAGE | {"stage.1.rope_factor": 8.0}))
    convert(tmp_path / "run", tmp_path / "hf", to="hf")
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.rope_parameters["factor"] == 8.0
    ours = [line["heldout_loss"] for line in read_metrics(tmp_path / "run") if "heldout_loss" in line]
    assert math.exp(ours[-1]) == pytest.approx(math.exp(heldout_loss(theirs)), rel=1e-5)


@pytest.mark.parametrize("place", ["directory", "hub"])
def test_a_gate_judges_by_the_weights_that_were_given(workdir, tmp_path, request, place):
    _, start = model_of(SCALED, tied=True)  # while stage 1 of the config says that there is no scaling
    given = save_hf(start, tmp_path / "hf")
    if place == "hub":
        request.getfixturevalue("hub").files = contents(given)
        given = "org/name"
    longer = {"stage.2.phases": [{"seq_len": 2 * LENGTH, "tokens": 2 * LENGTH}], "stage.2.batch_tokens": 2 * LENGTH}
    settings = {key: value for key, value in STAGE.items() if not key.startswith("stage")} | longer
    run(
        "2", "--init", str(given), "--run-dir", str(tmp_path / "run"), *options(settings | {"stage.2.rope_factor": 4.0})
    )
    reading = json.loads((tmp_path / "run/readings/stage-2-phase-0.json").read_text())
    assert reading["short_loss"] == pytest.approx(heldout_loss(start), rel=2e-6)
    _, plain = model_of(PLAIN, tied=True)
    assert abs(heldout_loss(plain) - heldout_loss(start)) > 1e-3
