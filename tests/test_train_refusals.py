"""What a run cannot train on or go on from: the command ends with one clear line before the first step."""

import json
import random
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llama_jax.entry import run_entry
from tests.test_train import CONFIG
from train.config import read_config
from train.prepare import prepare
from train.pretrain import main
from train.record import check_record, write_record

METADATA, TOKENS = Path("data/metadata.json"), Path("data/text/train-00000.tokens")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a config and its data."""
    folder = tmp_path_factory.mktemp("home")
    words = "the cat sat on a mat and then it ran to find some milk in house of its friend".split()
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=200)) for _ in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "tiny.toml").write_text(CONFIG)
    prepare([folder / "text.jsonl"], folder / "data", vocab_size=540, holdout=0.2)
    return folder


def a_source_without_tokens() -> None:
    metadata = json.loads(METADATA.read_text())
    no_documents = metadata["sources"]["text"]["train"] | {"documents": 0, "tokens": 0, "characters": 0, "shards": []}
    metadata["sources"]["empty"] = {"train": no_documents, "heldout": no_documents}
    METADATA.write_text(json.dumps(metadata))


def a_token_outside_the_vocabulary() -> None:
    """Wrong from the start, so that the checksum agrees."""
    tokens = np.fromfile(TOKENS, "<u2")
    tokens[7] = 540
    tokens.tofile(TOKENS)
    metadata = json.loads(METADATA.read_text())
    metadata["sources"]["text"]["train"]["shards"][0]["crc32"] = zlib.crc32(tokens.tobytes())
    METADATA.write_text(json.dumps(metadata))


def a_corrupt_shard() -> None:
    content = bytearray(TOKENS.read_bytes())
    content[20] ^= 1
    TOKENS.write_bytes(content)


def a_run_that_began() -> None:
    corpus = json.loads(METADATA.read_text())["corpus_hash"]
    write_record(Path("run"), check_record(Path("run"), read_config("tiny.toml"), "1", corpus))


def a_run_of_other_data() -> None:
    write_record(Path("run"), check_record(Path("run"), read_config("tiny.toml"), "1", "0" * 64))


def another_run() -> None:
    a_run_that_began()
    Path("tiny.toml").rename("other.toml")


def nothing() -> None:
    """What is wrong is in the settings."""


CASES = {
    "mixture-sum": (nothing, ["data.mixture={text=0.5}"], "the mixture text=0.5 sums to 0.5; expected shares from 0"),
    "mixture-name": (nothing, ["data.mixture={books=1.0}"], "names 'books', which is no source .*; there are text$"),
    "no-tokens": (a_source_without_tokens, ["data.mixture={text=0.5, empty=0.5}"], "names 'empty', which is no source"),
    "token": (
        a_token_outside_the_vocabulary,
        [],
        "train-00000.tokens holds token 540, but the vocabulary has 540; prep",
    ),
    "tokenizer": (
        nothing,
        ["model.vocab_size=600"],
        "data was prepared with a vocabulary of 540, expected 600; prepare",
    ),
    "context": (
        nothing,
        ["run.mesh=context=4,fsdp=2", "stage.1.phases=[{seq_len=12, tokens=960}]", "stage.1.batch_tokens=96"],
        "a sequence of 12 tokens cannot be split .* use a multiple of 8",
    ),
    "model": (
        a_run_that_began,
        ["model.mlp_dim=96"],
        "run was begun with model.mlp_dim=64, and now it is 96; set it back",
    ),
    "stage": (
        a_run_that_began,
        ["stage.1.learning_rate=1e-3"],
        "run was begun with stage.1.learning_rate=0.01, and now",
    ),
    "data": (a_run_of_other_data, [], "run was begun with stage.1.corpus='0+', and now it is '[0-9a-f]+'; set it back"),
    "run": (
        another_run,
        [],
        "run was begun with name='tiny', and now it is 'other'; set it back, or give another --run",
    ),
    "compiler-option": (
        nothing,
        ['run.compiler_options={tpu={xla_of_a_tpu="1"}, cpu={xla_nothing="1"}}'],
        "No such compile option: 'xla_nothing' .*compiler_options",
    ),
    "shard": (
        a_corrupt_shard,
        [],
        "train-00000.tokens is damaged: crc32 [0-9]+, expected [0-9]+; prepare the data again",
    ),
}


@pytest.mark.parametrize(("spoil", "settings", "line"), CASES.values(), ids=CASES)
def test_one_line_says_what_is_wrong_before_the_first_step(
    home, tmp_path, monkeypatch, capsys, spoil: Callable[[], None], settings, line
):
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    spoil()
    (config,) = Path().glob("*.toml")
    options = [word for setting in settings for word in ("--set", setting)]
    with pytest.raises(SystemExit) as ended:
        run_entry(lambda: main(["--config", str(config), "--stage", "1", "--run-dir", "run", *options]))
    *before, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert last.startswith("error: ")
    assert re.search(line, last), last
    assert not [text for text in before if "error" in text or "step 1/" in text]
    assert not Path("run/checkpoints").exists()
