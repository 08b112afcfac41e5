"""Prepared data of known tokens, written as train.prepare lays them out (see train/data/packing.py)."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from train.data.shards import FORMAT_VERSION, SHARD_TOKENS, SPLITS

Documents = Sequence[Sequence[int]]


def write_prepared(
    directory: Path,
    sources: Mapping[str, Mapping[str, Documents]],
    vocab_size: int,
    *,
    dtype: str = "uint16",
    shard_tokens: int = SHARD_TOKENS,
) -> Path:
    """Write documents of token ids by source and split, {"code": {"train": [[1, 7, 9]]}}, without a tokenizer."""
    entries = {}
    for name, splits in sources.items():
        (directory / name).mkdir(parents=True, exist_ok=True)
        entries[name] = {s: _write_split(directory / name / s, splits.get(s, []), dtype, shard_tokens) for s in SPLITS}
    metadata = {
        "format_version": FORMAT_VERSION,
        "corpus_hash": "0" * 64,
        "holdout": 0.0,
        "tokenizer": "trained",
        "vocab_size": vocab_size,
        "dtype": dtype,
        "python_version": "3.11.0",
        "dropped_documents": {},
        "sources": entries,
    }
    (directory / "metadata.json").write_text(json.dumps(metadata))
    return directory


def _write_split(stem: Path, documents: Documents, dtype: str, shard_tokens: int) -> dict:
    shards: list[list[Sequence[int]]] = []
    for document in documents:
        if not shards or sum(map(len, shards[-1])) + len(document) > shard_tokens:
            shards.append([])
        shards[-1].append(document)
    num_tokens = sum(map(len, documents))
    return {
        "documents": len(documents),
        "tokens": num_tokens,
        "characters": 4 * num_tokens,
        "characters_per_token": 4.0 if documents else None,
        "lengths": [],
        "shards": [_write_shard(f"{stem}-{i:05}", shard, dtype) for i, shard in enumerate(shards)],
    }


def _write_shard(stem: str, documents: Documents, dtype: str) -> dict:
    lengths = [len(document) for document in documents]
    tokens = np.concatenate(documents).astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    offsets = np.cumsum([0, *lengths]).astype("<i8").tobytes()
    Path(f"{stem}.tokens").write_bytes(tokens)
    Path(f"{stem}.offsets").write_bytes(offsets)
    crcs = {"crc32": zlib.crc32(tokens), "offsets_crc32": zlib.crc32(offsets)}
    return {"documents": len(documents), "tokens": sum(lengths)} | crcs
