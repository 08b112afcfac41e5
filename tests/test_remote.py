"""Checkpoints, runs and data in gs:// and s3://, against emulators of both on this machine."""

import base64
import contextlib
import dataclasses
import functools
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import llama_jax
from infer.generate import main as generate
from llama_jax import paths
from llama_jax.checkpoint import formats, ranges
from llama_jax.checkpoint.safetensors import SafetensorsDirectory, write_sharded
from llama_jax.convert import convert
from llama_jax.model import Llama
from tests.tiny import TINY
from train import checkpoints
from train.checkpoints import saved_steps
from train.data.shards import open_sources
from train.prepare import prepare
from train.pretrain import main as pretrain
from train.watching.metrics import read_metrics

SMALL = dataclasses.replace(TINY, head_dim=TINY.embed_dim // TINY.num_heads)  # Meta's form has no other head_dim
CONFIG = """
[model]
vocab_size = 540
num_layers = 2
embed_dim = 32
mlp_dim = 64
num_heads = 4
num_kv_heads = 2
head_dim = 8
max_seq_len = 64
rope = { factor = 1.0, original_max_seq_len = 16 }
[data]
directory = "data"
[run]
compute_dtype = "float32"
mesh = "data=1"
log_every = 1
eval_every = 4
save_every = 2
eval_rows = 2
[stage.1]
phases = [{ seq_len = 16, tokens = 768 }]
batch_tokens = 128
learning_rate = 1e-2
final_learning_rate = 1e-3
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model of random weights on this disk, in Hugging Face's form, with a tokenizer in Meta's."""
    path = tmp_path_factory.mktemp("model") / "start"
    with llama_jax.use_mesh("data=1"):
        llama_jax.save(jax.jit(lambda: Llama(SMALL, rngs=nnx.Rngs(0)))(), path)
    ranks = (f"{base64.b64encode(bytes([byte])).decode()} {byte}\n" for byte in range(256))
    (path / "tokenizer.model").write_text("".join(ranks))
    return path


def listing(folder: str) -> list[str]:
    """Every object below a folder."""
    return sorted(name.split("/", 2)[2] for name in paths._filesystem(folder[:2]).find(folder))


def test_a_model_goes_through_every_form_in_a_bucket_and_comes_back_to_the_bit(store, start):
    convert(start, "hf", to="hf")
    convert(start, f"{store}/hf", to="hf")
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "original/tokenizer.model"):
        assert (paths.as_path(f"{store}/hf") / file).read_bytes() == (Path("hf") / file).read_bytes()
    assert len(listing(f"{store}/hf")) == sum(path.is_file() for path in Path("hf").rglob("*"))
    convert(f"{store}/hf", f"{store}/orbax", to="orbax")
    convert(f"{store}/orbax", f"{store}/meta", to="meta", num_shards=2)
    convert(f"{store}/meta", "end", to="hf", overrides={"max_seq_len": SMALL.max_seq_len})
    assert Path("end/model.safetensors").read_bytes() == (start / "model.safetensors").read_bytes()


@pytest.mark.parametrize("format", ["hf", "orbax", "meta"])
def test_a_mesh_reads_each_byte_of_a_bucket_about_once(store, start, format, monkeypatch):
    num_bytes = []

    @functools.lru_cache(ranges._MAX_KEPT)
    def counted(read, start, stop):
        num_bytes.append(stop - start)
        return start_read(read, start, stop)

    start_read = ranges._start_read.__wrapped__
    monkeypatch.setattr(ranges, "_start_read", counted)
    with llama_jax.use_mesh("fsdp=2,tensor=4"):
        model = llama_jax.load(start)
        llama_jax.save(model, f"{store}/model", format=format)
        loaded = llama_jax.load(f"{store}/model", overrides={"max_seq_len": SMALL.max_seq_len})
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    if format != "orbax":  # tensorstore reads that by itself
        assert len(num_bytes) > 20
        assert sum(num_bytes) < 1.3 * 4 * SMALL.num_params()


def test_what_was_read_is_kept_no_longer_than_its_file(tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    file = ranges.RemoteFile(tmp_path / "file")
    assert file.read([(2, 5), (2, 5)]) == [b"234", b"234"]
    assert ranges._start_read.cache_info().currsize == 1
    del file
    assert ranges._start_read.cache_info().currsize == 0


def test_shards_and_their_index_are_read_back(store, start):
    source = SafetensorsDirectory(start)
    tensors = {name: source.read(name) for name in source.tensors}
    write_sharded(f"{store}/model", source.tensors, iter(tensors.items()), max_shard_bytes=100_000)
    assert len(listing(f"{store}/model")) > 3
    stored = SafetensorsDirectory(f"{store}/model")
    for name, values in tensors.items():
        np.testing.assert_array_equal(stored.read(name), values)
        np.testing.assert_array_equal(stored.read(name, (slice(1, 5),)), values[1:5])
        np.testing.assert_array_equal(stored.read(name, (slice(3, 3),)), values[3:3])


@pytest.mark.parametrize("to", ["hf", "orbax", "meta"])
def test_a_failed_conversion_leaves_nothing_in_the_bucket(store, start, to, monkeypatch):
    def fail(self, name, index=None):
        if name == "model.layers.1.mlp.up_proj.weight":
            raise OSError(5, "Input/output error")
        return read(self, name, index)

    read = formats.CanonicalSource.read
    monkeypatch.setattr(formats.CanonicalSource, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        convert(start, f"{store}/model", to=to)
    assert listing(store) == []


def test_a_directory_in_use_is_refused(store):
    paths.as_path(f"{store}/model/LICENSE").write_text("theirs")
    with pytest.raises(FileExistsError, match="model exists and is not an empty directory"):
        with paths.staged_directory(f"{store}/model"):
            pytest.fail("work began")
    assert listing(store)[0].endswith("model/LICENSE")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder on this disk with a text, its tokens, a config, and a run that nothing interrupted."""
    path = tmp_path_factory.mktemp("home")
    vocabulary = "the cat sat on a mat and then it ran to find some milk in house of its friend".split()
    generator = random.Random(0)
    documents = [" ".join(generator.choices(vocabulary, k=300 + 20 * i)) for i in range(30)]
    (path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    (path / "tiny.toml").write_text(CONFIG)
    with contextlib.chdir(path):
        prepare(["text.jsonl"], "data", vocab_size=540, holdout=0.2)
        train("whole")
        convert("whole", "whole-hf", to="hf")
    return path


def train(run_dir):
    pretrain(["--config", "tiny.toml", "--stage", "1", "--run-dir", run_dir])


def test_data_prepared_in_a_bucket_are_those_prepared_on_disk(store, home):
    paths.as_path(f"{store}/text.jsonl").write_bytes((home / "text.jsonl").read_bytes())
    prepare([f"{store}/text.jsonl"], f"{store}/data", vocab_size=540, holdout=0.2)
    for split in ("train", "heldout"):
        local, remote = (open_sources(path, split)["text"] for path in (home / "data", f"{store}/data"))
        assert [local.document(i).tolist() for i in range(local.num_documents)] == [
            remote.document(i).tolist() for i in range(remote.num_documents)
        ]
    paths.as_path(f"{store}/data/text/train-00000.tokens").unlink()
    open_sources(f"{store}/data", "train")  # the copy in the cache


def test_a_run_in_a_bucket_goes_on_to_the_same_bits_after_a_kill(store, home, monkeypatch, capsys):
    def killed(*args):
        if listing(f"{store}/run/checkpoints/4"):
            raise SystemExit
        write_model_file(*args)

    monkeypatch.chdir(home)
    write_model_file = checkpoints.write_model_file
    with monkeypatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(checkpoints, "write_model_file", killed)
        patch.setattr(paths, "remove_directory", lambda path: None)  # the dead do not clean up
        train(f"{store}/run")
    assert saved_steps(paths.as_path(f"{store}/run")) == [2]
    assert listing(f"{store}/run/checkpoints/4")
    train(f"{store}/run")
    convert(f"{store}/run", f"{store}/run-hf", to="hf")
    trained = (paths.as_path(path) / "model.safetensors" for path in ("whole-hf", f"{store}/run-hf"))
    assert len({path.read_bytes() for path in trained}) == 1
    runs = [read_metrics(paths.as_path(path)) for path in ("whole", f"{store}/run")]
    assert len({json.dumps([(line["step"], line.get("loss")) for line in lines]) for lines in runs}) == 1
    assert paths.as_path(f"{store}/run/loss.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    generate(["the cat", "--checkpoint", f"{store}/run@6", "--json", "--max-new-tokens", "4"])
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 4


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_bucket_that_does_not_exist_is_one_line(endpoints, scheme):
    with pytest.raises(FileNotFoundError, match=f"^{scheme}://nowhere/x: there is no bucket nowhere; [^\n]*$"):
        llama_jax.load(f"{scheme}://nowhere/x")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_checkpoint_that_is_not_in_the_bucket_is_named(endpoints, scheme):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint at {scheme}://bucket/nothing"):
        llama_jax.load(f"{scheme}://bucket/nothing")
