"""A run whose data, checkpoints and export lie in a bucket alone: killed, it ends as one on this disk, to the bit."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import llama_jax
from llama_jax import paths
from llama_jax.convert import main as convert
from tests.processes import ROOT
from tests.reference import hf_logits, relative_error
from tests.test_remote import CONFIG
from train.checkpoints import saved_steps
from train.prepare import main as prepare
from train.pretrain import main as pretrain
from train.watching.metrics import read_metrics

STEPS = 24
SETTINGS = ("stage.1.phases=[{seq_len=16, tokens=3072}]", "run.save_every=4", "run.eval_every=100", "run.trackers=[]")
WORDS = "the cat sat on a mat and then it ran to find some milk in house of its friend".split()
EXPORTED = ("config.json", "model.safetensors", "tokenizer.json")


def prepare_command(folder: str) -> list[str]:
    return [f"{folder}/text.jsonl", "--out", f"{folder}/data", "--vocab-size", "540", "--holdout", "20%"]


def train_command(folder: str) -> list[str]:
    options = [option for setting in SETTINGS for option in ("--set", setting)]
    command = ["--config", "tiny.toml", "--stage", "1", "--run-dir", f"{folder}/run"]
    return [*command, "--set", f"data.directory={folder}/data", *options]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of this disk with the same run, which nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=100 + 20 * i)) for i in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "tiny.toml").write_text(CONFIG)
    with contextlib.chdir(folder):
        prepare(prepare_command("."))
        pretrain(train_command("."))
        convert(["run", "hf", "--to", "hf"])
    return folder


def killed(command: list[str], seconds: float) -> None:
    """Start a run in a process of its own and end it with SIGKILL so many seconds after its step was compiled."""
    own = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    start = [sys.executable, "-m", "train.pretrain", *command]
    with subprocess.Popen(start, env=os.environ | own, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        written = []
        for line in process.stderr:
            written.append(line)
            if "compiled" in line:
                break
        else:
            pytest.fail("".join(written))
        time.sleep(seconds)
        process.kill()


def finished_after_kills(store: str, whole: Path, num_kills: int) -> None:
    """Prepare and train in a bucket, through kills, to the end; metrics are those of the run on this disk."""
    paths.as_path(f"{store}/text.jsonl").write_bytes((whole / "text.jsonl").read_bytes())
    Path("tiny.toml").write_text(CONFIG)
    prepare(prepare_command(store))
    draw, run, step = random.Random(f"{store[:2]}{num_kills}"), paths.as_path(f"{store}/run"), 0
    for _ in range(num_kills):
        if step < STEPS:
            killed(train_command(store), draw.uniform(0.1, 1.2))  # saves take most of this time
            step = max(saved_steps(run), default=0)
    pretrain(train_command(store))
    lines, expected = (read_metrics(path) for path in (run, whole / "run"))
    assert [(line["step"], line.get("loss")) for line in lines] == [(x["step"], x.get("loss")) for x in expected]


def assert_same_export(store: str, whole: Path) -> None:
    convert([f"{store}/run", f"{store}/hf", "--to", "hf"])
    for name in EXPORTED:
        assert (paths.as_path(f"{store}/hf") / name).read_bytes() == (whole / "hf" / name).read_bytes(), name


def test_a_run_in_a_bucket_that_was_killed_exports_to_the_bit_what_one_never_killed_does(store, whole, tmp_path):
    finished_after_kills(store, whole, 1)
    assert_same_export(store, whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "tiny.toml"]  # nothing else lies on this disk
    theirs = transformers.LlamaForCausalLM.from_pretrained(whole / "hf", dtype=torch.float32)  # it reads disks alone
    with llama_jax.use_mesh("fsdp=2"):
        ours = llama_jax.load(f"{store}/hf")
        assert llama_jax.load_tokenizer(f"{store}/hf").vocab_size == ours.cfg.vocab_size
        tokens = np.random.default_rng(0).integers(0, ours.cfg.vocab_size, (2, 16), np.int32)
        assert relative_error(ours(tokens), hf_logits(theirs, tokens)) < 1e-5


@pytest.mark.slow
def test_a_run_in_a_bucket_that_was_killed_ten_times_exports_to_the_bit_what_one_never_killed_does(store, whole):
    finished_after_kills(store, whole, 10)
    assert_same_export(store, whole)
