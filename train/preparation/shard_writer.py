"""Writes the documents of one source and split as shards, in the format that train.data.shards reads.

The one invariant: the shards are the documents in the order given, each whole, whatever pieces they came in.
"""

import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class ShardWriter:
    """The shards STEM-00000.tokens, STEM-00000.offsets, STEM-00001.tokens, ... and what metadata.json says of them."""

    def __init__(self, stem: Path, shard_tokens: int, files: ExitStack):
        """A shard holds at most shard_tokens tokens, but for a longer document; files closes what is open."""
        self._stem, self._shard_tokens, self._files = stem, shard_tokens, files
        self._shards: list[dict[str, int]] = []
        self._tokens: BinaryIO | None = None
        self._lengths: list[np.ndarray] = []  # of the open shard
        self._size = self._crc32 = self._characters = 0
        self._bins = np.zeros((2, 64), np.int64)  # documents and their tokens, by the logarithm of the length

    def write(self, tokens: np.ndarray, lengths: np.ndarray, characters: int) -> None:
        """Append documents of these lengths, int64, their tokens end to end and their characters in sum."""
        self._characters += characters
        bins = np.floor(np.log2(lengths)).astype(np.int64)
        self._bins[0] += np.bincount(bins, minlength=64)
        self._bins[1] += np.bincount(bins, lengths, minlength=64).astype(np.int64)
        while len(lengths):
            ends = np.cumsum(lengths)
            fits = int(np.searchsorted(ends, self._shard_tokens - self._size, side="right"))
            if not fits and self._size:
                self._close_shard()
                continue
            fits = max(fits, 1)
            self._append(tokens[: ends[fits - 1]], lengths[:fits])
            tokens, lengths = tokens[ends[fits - 1] :], lengths[fits:]

    def close(self) -> dict[str, Any]:
        """End the last shard; returns the counts of all, as metadata.json holds them."""
        if self._size:
            self._close_shard()
        documents, tokens = self._bins.sum(axis=1).tolist()
        text_tokens = tokens - 2 * documents  # without the begin and the end
        return {
            "documents": documents,
            "tokens": tokens,
            "characters": self._characters,
            "characters_per_token": round(self._characters / text_tokens, 4) if documents else None,
            "lengths": [
                {"at_least": 2**i, "documents": int(self._bins[0, i]), "tokens": int(self._bins[1, i])}
                for i in np.flatnonzero(self._bins[0]).tolist()
            ],
            "shards": self._shards,
        }

    def _append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        if self._tokens is None:
            self._tokens = self._files.enter_context(self._path(".tokens").open("wb"))
        content = tokens.astype(tokens.dtype.newbyteorder("<")).tobytes()
        self._tokens.write(content)
        self._crc32 = zlib.crc32(content, self._crc32)
        self._size += len(tokens)
        self._lengths.append(lengths)

    def _close_shard(self) -> None:
        assert self._tokens is not None
        self._tokens.close()
        offsets = np.cumsum(np.concatenate([[0], *self._lengths])).astype("<i8").tobytes()
        self._path(".offsets").write_bytes(offsets)
        counts = {"documents": sum(map(len, self._lengths)), "tokens": self._size}
        self._shards.append(counts | {"crc32": self._crc32, "offsets_crc32": zlib.crc32(offsets)})
        self._tokens, self._lengths, self._size, self._crc32 = None, [], 0, 0

    def _path(self, suffix: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}-{len(self._shards):05}{suffix}")
