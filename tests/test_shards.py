"""Prepared data on disk: read by source over shards, and every damage named before it is trained on."""

import json
import zlib

import numpy as np
import pytest

from tests.prepared import write_prepared
from train.data import shards
from train.data.shards import open_sources

CODE = [[1, 7, 8, 9], [1, 9], [1, 5, 6, 5, 9]]
TEXT = [[1, 4, 9]]


@pytest.fixture
def directory(tmp_path):
    sources = {"multilingual/de": {"train": TEXT}, "code": {"train": CODE, "heldout": TEXT}}
    return write_prepared(tmp_path / "data", sources, 1000, shard_tokens=7)


def test_documents_are_read_by_source_over_their_shards(directory):
    sources = open_sources(directory, "train", vocab_size=1000)
    assert list(sources) == ["code", "multilingual/de"]
    code = sources["code"]
    assert [shard.num_documents for shard in code.shards] == [2, 1]
    assert [code.document(i).tolist() for i in range(3)] == CODE
    assert code.lengths.tolist() == [4, 2, 5] and (code.num_documents, code.num_tokens) == (3, 11)
    with pytest.raises(IndexError, match="document 3 does not exist; there are 3"):
        code.document(3)


def test_a_source_without_documents_in_a_split_is_left_out(directory):
    assert list(open_sources(directory, "heldout")) == ["code"]


def test_a_missing_directory_says_how_to_prepare_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m train.prepare --out"):
        open_sources(tmp_path / "nothing", "train")


def test_another_vocabulary_is_refused(directory):
    with pytest.raises(ValueError, match="vocabulary of 1000, expected 128256"):
        open_sources(directory, "train", vocab_size=128_256)


def test_an_empty_or_unknown_split_is_refused(directory, tmp_path):
    with pytest.raises(ValueError, match="'test' is unknown; expected one of train, heldout"):
        open_sources(directory, "test")
    with pytest.raises(ValueError, match="heldout split .* is empty"):
        open_sources(write_prepared(tmp_path / "other", {"a": {"train": TEXT}}, 10), "heldout")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.json", b'{"format_version": 2', "metadata.json is damaged"),
        ("metadata.json", b"[]", "metadata.json is damaged"),
        ("metadata.json", b'{"format_version": 2, "vocab_size": 9}', "metadata.json is damaged"),
        ("metadata.json", b'{"format_version": 1}', "has format 1, expected 2; prepare the data again"),
        ("code/train-00000.tokens", b"\0\0\0", "code/train-00000.tokens is damaged: 3 bytes, expected 12"),
        ("code/train-00001.tokens", bytes(10), "code/train-00001.tokens is damaged: crc32 .*; prepare the data again"),
        ("code/train-00000.offsets", None, "train-00000.offsets is damaged: 0 bytes, expected 24"),
        ("code/train-00000.offsets", bytes(24), "train-00000.offsets is damaged: crc32"),
    ],
)
def test_damage_is_named(directory, name, content, message):
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_sources(directory, "train")


def rewrite(directory, suffix, key, values):
    """Contents of the first shard of code that are wrong from the start, so that the crc32 agrees."""
    (directory / f"code/train-00000{suffix}").write_bytes(values.tobytes())
    metadata = json.loads((directory / "metadata.json").read_text())
    metadata["sources"]["code"]["train"]["shards"][0][key] = zlib.crc32(values.tobytes())
    (directory / "metadata.json").write_text(json.dumps(metadata))


def test_a_token_beyond_the_vocabulary_is_refused(directory):
    rewrite(directory, ".tokens", "crc32", np.array([1, 7, 1000, 9, 1, 9], "<u2"))
    with pytest.raises(ValueError, match="train-00000.tokens holds token 1000, but the vocabulary has 1000"):
        open_sources(directory, "train")


@pytest.mark.parametrize("offsets", [[0, 4, 4], [1, 4, 6], [0, 6, 4], [0, 7, 6]])
def test_offsets_that_do_not_rise_to_the_end_are_refused(directory, offsets):
    rewrite(directory, ".offsets", "offsets_crc32", np.array(offsets, "<i8"))
    with pytest.raises(ValueError, match="train-00000.offsets is damaged: not rising from 0 to 6"):
        open_sources(directory, "train")


def test_shards_too_many_to_read_at_once_are_checked_when_they_are_used(directory, monkeypatch):
    monkeypatch.setattr(shards, "_CHECKED_AT_ONCE", 2 * 14 - 1)
    (directory / "code/train-00001.tokens").write_bytes(bytes(10))
    code = open_sources(directory, "train")["code"]
    assert code.document(0).tolist() == CODE[0]
    with pytest.raises(ValueError, match="train-00001.tokens is damaged: crc32"):
        code.document(2)


def test_a_large_shard_is_checked_in_pieces(directory, monkeypatch):
    monkeypatch.setattr(shards, "_PIECE", 2)
    assert open_sources(directory, "train")["code"].document(0).tolist() == CODE[0]
    rewrite(directory, ".tokens", "crc32", np.array([1, 7, 1000, 9, 1, 9], "<u2"))
    with pytest.raises(ValueError, match="holds token 1000"):
        open_sources(directory, "train")


@pytest.fixture
def in_a_store(directory, tmp_path, monkeypatch):
    """The directory as if it lay in an object store: its files, copied; what was fetched is listed."""
    fetched = []

    def fetch(path, file):
        fetched.append(f"{path.parent.name}/{path.name}")
        file.write_bytes(path.read_bytes())

    monkeypatch.setattr(shards, "is_remote", lambda path: True)
    monkeypatch.setattr(shards, "fetch_file", fetch)
    monkeypatch.setattr(shards, "cache_directory", lambda: tmp_path / "cache")
    return fetched


def test_shards_of_an_object_store_are_copied_one_by_one_when_they_are_used(directory, in_a_store, monkeypatch):
    monkeypatch.setattr(shards, "_CHECKED_AT_ONCE", 0)
    code = open_sources(directory, "train")["code"]
    assert in_a_store == []
    assert code.document(2).tolist() == CODE[2]
    assert in_a_store == ["code/train-00001.offsets", "code/train-00001.tokens"]
    assert open_sources(directory, "train")["code"].document(2).tolist() == CODE[2]
    assert len(in_a_store) == 2


def test_a_released_copy_is_removed_and_fetched_again(directory, in_a_store, tmp_path):
    (shard, _) = open_sources(directory, "train")["code"].shards
    (copy,) = (tmp_path / "cache").rglob("code/train-00000.tokens")
    shard.release()
    assert not copy.exists()
    assert shard.tokens.tolist() == [1, 7, 8, 9, 1, 9] and copy.exists()


def test_a_damaged_copy_says_how_to_fetch_it_again(directory, in_a_store, tmp_path):
    open_sources(directory, "train")
    (copy,) = (tmp_path / "cache").rglob("code/train-00000.tokens")
    copy.write_bytes(bytes(12))
    with pytest.raises(ValueError, match="cache/.*train-00000.tokens is damaged: crc32 .*; remove it to copy it"):
        open_sources(directory, "train")
