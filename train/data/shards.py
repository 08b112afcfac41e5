"""Prepared tokens on disk: the format that train.prepare writes, read by source.

    DIR/metadata.json
    DIR/SOURCE/SPLIT-00000.tokens    the ids of whole documents as one flat little-endian array
    DIR/SOURCE/SPLIT-00000.offsets   int64, where each document starts, and the end of the last

The one invariant: nothing is trained on that was not checked, its size, its crc32 and its vocabulary, and
memory holds no more of the data than what is asked for.
"""

import hashlib
import json
import threading
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.paths import as_path, cache_directory, fetch_file, is_remote, make_directory, staged_file

FORMAT_VERSION = 2
SPLITS = ("train", "heldout")
SHARD_TOKENS = 2**28  # the most that a shard holds, but for a longer document

_CHECKED_AT_ONCE = 4 * 2**30  # bytes of tokens that are read before the first step; of more, each shard when it is used
_PIECE = 2**24  # values


def read_metadata(directory: str | Path) -> dict:
    """What `metadata.json` of a prepared directory holds.

    Raises FileNotFoundError if there is none, ValueError if it is damaged or of another format.
    """
    path = as_path(directory) / "metadata.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; prepare the data with python -m train.prepare --out {directory}"
        )
    try:
        metadata = json.loads(path.read_bytes())
        version = metadata["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove {directory} and prepare it again") from None
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}, expected {FORMAT_VERSION}; prepare the data again")
    return metadata


class Shard:
    """Some documents of one source and split: their tokens, memory-mapped, and where each starts.

    Files of an object store are copied to the user's cache when they are first read, because rows are too
    small to fetch. Contents are checked when they are first read. Several threads may read at once.
    """

    def __init__(self, stem: Path, counts: Mapping[str, Any], dtype: np.dtype, vocab_size: int, copy: Path | None):
        """stem.tokens and stem.offsets with what metadata.json says of them; copy is the stem of their copies.

        Raises ValueError for files of another size; those of an object store are not asked before they are read.
        """
        self.num_documents, self.num_tokens = int(counts["documents"]), int(counts["tokens"])
        self.num_bytes = self.num_tokens * dtype.itemsize
        self._stem, self._copy, self._vocab_size = stem, copy, vocab_size
        self._kinds = {".tokens": (dtype, self.num_tokens), ".offsets": (np.dtype("<i8"), self.num_documents + 1)}
        self._crcs = {".tokens": counts.get("crc32"), ".offsets": counts.get("offsets_crc32")}
        self._checked: set[str] = set()
        self._lock = threading.Lock()
        self._tokens: np.ndarray | None = None
        if copy is None:
            for suffix in self._kinds:
                self._check_size(stem.with_suffix(suffix), suffix)

    @property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [num_tokens]. Raises ValueError if they are damaged or not of the vocabulary."""
        with self._lock:
            if self._tokens is None:
                self._tokens = self._read(".tokens")
            return self._tokens

    def offsets(self) -> np.ndarray:
        """int64 [num_documents + 1]: document d is tokens[offsets[d]:offsets[d + 1]]. Raises ValueError if damaged."""
        with self._lock:
            return self._read(".offsets")

    def lengths(self) -> np.ndarray:
        """int64 [num_documents], in tokens."""
        return np.diff(self.offsets())

    def check(self) -> None:
        """Read all of it. Raises ValueError saying what is damaged."""
        self.offsets()
        _ = self.tokens

    def release(self) -> None:
        """Close the tokens, and remove what was copied; either comes back when it is asked for."""
        with self._lock:
            self._tokens = None
            if self._copy is not None:
                self._checked.clear()
                for suffix in self._kinds:
                    self._copy.with_suffix(suffix).unlink(missing_ok=True)

    def _read(self, suffix: str) -> np.ndarray:
        path = self._on_disk(suffix)
        self._check_size(path, suffix)
        dtype, _ = self._kinds[suffix]
        values = np.memmap(path, dtype, mode="r")
        if suffix not in self._checked:
            self._check_values(path, suffix, values)
            self._checked.add(suffix)
        return values

    def _on_disk(self, suffix: str) -> Path:
        path = self._stem.with_suffix(suffix)
        if self._copy is None:
            return path
        copy = self._copy.with_suffix(suffix)
        if not copy.exists():
            make_directory(copy.parent)
            with staged_file(copy) as staged:
                fetch_file(path, staged)
        return copy

    def _check_size(self, path: Path, suffix: str) -> None:
        dtype, count = self._kinds[suffix]
        size = path.stat().st_size if path.is_file() else 0
        if size != count * dtype.itemsize:
            raise self._damage(path, f"{size} bytes, expected {count * dtype.itemsize}")

    def _check_values(self, path: Path, suffix: str, values: np.ndarray) -> None:
        crc, largest = 0, 0
        for start in range(0, len(values), _PIECE):
            piece = values[start : start + _PIECE]
            crc, largest = zlib.crc32(piece.data, crc), max(largest, int(piece.max()))
        if self._crcs[suffix] not in (None, crc):
            raise self._damage(path, f"crc32 {crc}, expected {self._crcs[suffix]}")
        if suffix == ".tokens" and largest >= self._vocab_size:
            raise ValueError(
                f"{path} holds token {largest}, but the vocabulary has {self._vocab_size}; "
                "prepare the data again with the model's tokenizer"
            )
        if suffix == ".offsets" and (values[0] != 0 or values[-1] != self.num_tokens or np.diff(values).min() < 1):
            raise self._damage(path, f"not rising from 0 to {self.num_tokens}")

    def _damage(self, path: Path, what: str) -> ValueError:
        remedy = "prepare the data again" if self._copy is None else f"remove it to copy it from {self._stem} again"
        return ValueError(f"{path} is damaged: {what}; {remedy}")


class TokenDataset:
    """The documents of a source in one split, in stored order, each from <|begin_of_text|> to <|end_of_text|>."""

    def __init__(self, shards: Sequence[Shard]):
        """The documents of these shards."""
        self.shards = tuple(shards)
        self.num_documents = sum(shard.num_documents for shard in self.shards)
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [num_documents], in tokens; reads the offsets of every shard."""
        return np.concatenate([shard.lengths() for shard in self.shards])

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, uint16 or uint32."""
        for shard in self.shards:
            if index < shard.num_documents:
                start, stop = shard.offsets()[index : index + 2]
                return shard.tokens[start:stop]
            index -= shard.num_documents
        raise IndexError(f"document {index + self.num_documents} does not exist; there are {self.num_documents}")


def open_sources(directory: str | Path, split: str, *, vocab_size: int | None = None) -> dict[str, TokenDataset]:
    """The documents of a split by source, in the order of their names; sources without any are left out.

    Raises ValueError saying what is damaged, missing or prepared for another vocabulary than vocab_size;
    FileNotFoundError if nothing was prepared there.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
    directory, metadata = as_path(directory), read_metadata(directory)
    try:
        if vocab_size not in (None, metadata["vocab_size"]):
            raise ValueError(
                f"{directory} was prepared with a vocabulary of {metadata['vocab_size']}, expected {vocab_size}; "
                "prepare it with the model's tokenizer"
            )
        sources = {
            name: TokenDataset(_shards(directory, f"{name}/{split}", splits[split]["shards"], metadata))
            for name, splits in sorted(metadata["sources"].items())
            if splits[split]["documents"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory}/metadata.json is damaged ({error!r}); remove {directory} and prepare it again"
        ) from None
    if not sources:
        raise ValueError(f"the {split} split of {directory} is empty; prepare it with more documents")
    _check_at_once([shard for source in sources.values() for shard in source.shards])
    return sources


def _shards(directory: Path, prefix: str, entries: Sequence[Mapping[str, Any]], metadata: dict) -> list[Shard]:
    dtype, copies = np.dtype(metadata["dtype"]).newbyteorder("<"), None
    if is_remote(directory):
        content = hashlib.sha256((directory / "metadata.json").read_bytes()).hexdigest()[:16]
        copies = cache_directory() / "data" / content
    stems = [f"{prefix}-{number:05}" for number in range(len(entries))]
    return [
        Shard(directory / stem, entry, dtype, metadata["vocab_size"], copies and copies / stem)
        for stem, entry in zip(stems, entries, strict=True)
    ]


def _check_at_once(shards: Sequence[Shard]) -> None:
    """Check every shard, unless they are so many that reading them would keep the run waiting."""
    if sum(shard.num_bytes for shard in shards) <= _CHECKED_AT_ONCE:
        with ThreadPoolExecutor() as pool:
            list(pool.map(Shard.check, shards))


def all_documents(sources: Mapping[str, TokenDataset]) -> TokenDataset:
    """The documents of several sources as one."""
    return TokenDataset([shard for source in sources.values() for shard in source.shards])
