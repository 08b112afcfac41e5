"""Prepared tokens as rows to train on: documents shuffled, laid end to end and cut.

The format (written by train.prepare): `metadata.json`, and for each split `SPLIT.tokens`, the ids of
all documents as one flat little-endian array, and `SPLIT.offsets`, int64, where each document starts
and the last one ends. No token predicts or attends across documents (The Llama 3 Herd of Models,
arXiv 2407.21783, section 3.2): segment_ids, positions and loss_mask say where they meet.

The one invariant: row i is a function of (data, seed, stage, seq_len, min_document_tokens, i) alone. So
one integer is the whole state of a stage's data, on any number of processes.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.paths import as_path, cache_directory, fetch_file, is_remote, make_directory, staged_file

FORMAT_VERSION = 1
SPLITS = ("train", "heldout")


class Batch(NamedTuple):
    """Rows to train or evaluate on, each array [B, T], or [T] for a single row; NumPy's or, on the devices, JAX's.

    tokens: int32, the inputs. targets: int32, the token after each.
    positions: int32, from 0 at the first token that the row holds of each document.
    segment_ids: int32, from 1, one a document.
    loss_mask: float32, 0 where the target belongs to the next document, else 1.
    """

    tokens: Any
    targets: Any
    positions: Any
    segment_ids: Any
    loss_mask: Any


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


class TokenDataset:
    """One split of a prepared directory, memory-mapped; of a remote one, a copy in the user's cache.

    tokens: uint16 or uint32 [num_tokens]. offsets: int64 [num_documents + 1]; document d is
    tokens[offsets[d]:offsets[d + 1]], with its <|begin_of_text|> and <|end_of_text|>.
    """

    def __init__(self, directory: str | Path, split: str, *, vocab_size: int | None = None):
        """Opens the split, and checks that it is whole and, if given, of this vocabulary.

        Raises ValueError saying what does not fit; FileNotFoundError if nothing was prepared there.
        """
        if split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown; expected one of {', '.join(SPLITS)}")
        self.metadata = read_metadata(directory)
        self.vocab_size: int = self.metadata["vocab_size"]
        if vocab_size not in (None, self.vocab_size):
            raise ValueError(
                f"{directory} was prepared with a vocabulary of {self.vocab_size}, expected {vocab_size}; "
                "prepare it with the model's tokenizer"
            )
        counts = self.metadata["splits"][split]
        if not counts["documents"]:
            raise ValueError(f"the {split} split of {directory} is empty; prepare it with more documents")
        stem = _on_disk(as_path(directory), split)
        self.tokens = _memory_map(stem.with_suffix(".tokens"), np.dtype(self.metadata["dtype"]), counts["tokens"])
        self.offsets = _memory_map(stem.with_suffix(".offsets"), np.dtype("int64"), counts["documents"] + 1)
        self.lengths = np.diff(self.offsets)
        if self.offsets[0] != 0 or self.offsets[-1] != counts["tokens"] or self.lengths.min() < 1:
            raise ValueError(
                f"{stem}.offsets is damaged: not rising from 0 to {counts['tokens']}; "
                f"remove {directory} and prepare it again"
            )

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def _on_disk(directory: Path, split: str) -> Path:
    """The split's files without their suffixes, those of an object store copied once: rows are too small to fetch."""
    if not is_remote(directory):
        return directory / split
    content = hashlib.sha256((directory / "metadata.json").read_bytes()).hexdigest()[:16]
    cached = cache_directory() / "data" / content / split
    make_directory(cached.parent)
    for suffix in (".tokens", ".offsets"):
        source, copy = (directory / split).with_suffix(suffix), cached.with_suffix(suffix)
        if not copy.exists():
            with staged_file(copy) as staged:
                fetch_file(source, staged)
    return cached


def _memory_map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    size = path.stat().st_size if path.is_file() else 0
    if size != count * dtype.itemsize:
        raise ValueError(
            f"{path} is damaged: {size} bytes, expected {count * dtype.itemsize}; "
            f"remove {path.parent} and prepare it again"
        )
    return np.memmap(path, dtype.newbyteorder("<"), mode="r")


class PackedRows:
    """Rows of seq_len tokens over a dataset, epoch after epoch without end.

    Each epoch lays the documents end to end in a new order and cuts them every seq_len tokens; a row
    also holds, as its last target, the first token after the cut: each token is an input once and,
    unless it starts a document, a target once. What is left after the last whole row, at most
    seq_len tokens, is dropped; the next epoch's order leaves out other tokens. A document that a cut
    divides goes on in another row at position 0 and does not see its beginning. The rows then come
    in a shuffled order, because neighbours are parts of one document, and a batch of them would be
    one long sample.

    Both orders sort by the raw 64-bit draws of Philox, keyed by SeedSequence((seed, stage), spawn_key=(epoch,)):
    streams that NumPy promises never to change (NEP 19). Each stage of a run counts its rows from 0, so that
    without an order of its own it would begin with what the one before has begun with.
    """

    def __init__(self, dataset: TokenDataset, seq_len: int, seed: int, *, stage: int = 0, min_document_tokens: int = 0):
        """Rows from the documents that have at least min_document_tokens tokens; stage counts from 0.

        Raises ValueError if they do not fill one row.
        """
        if seq_len < 1 or seed < 0:
            raise ValueError(f"seq_len={seq_len} must be at least 1 and seed={seed} at least 0")
        self.dataset, self.seq_len, self._key = dataset, seq_len, (seed, stage)
        self._documents = np.flatnonzero(dataset.lengths >= min_document_tokens)
        num_tokens = int(dataset.lengths[self._documents].sum())
        self._num_rows = (num_tokens - 1) // seq_len
        if self._num_rows < 1:
            raise ValueError(
                f"{num_tokens} tokens in documents of at least {min_document_tokens} do not fill a row of "
                f"seq_len={seq_len} and a target; prepare more text, or lower seq_len or min_document_tokens"
            )
        self._epoch = self._shuffle(0)

    def __len__(self) -> int:
        """Rows in one epoch."""
        return self._num_rows

    def row(self, index: int) -> Batch:
        """Row `index` >= 0 of all epochs, its arrays [T]; it belongs to epoch index // len(self)."""
        if index < 0:
            raise IndexError(f"row {index} does not exist; rows count from 0")
        epoch, row = divmod(index, self._num_rows)
        if epoch != self._epoch[0]:
            self._epoch = self._shuffle(epoch)
        _, order, ends, rows = self._epoch
        row = rows[row]
        begin, end = row * self.seq_len, (row + 1) * self.seq_len + 1
        first, last = np.searchsorted(ends, begin, side="right"), np.searchsorted(ends, end, side="left")
        pieces = []
        for document, document_end in zip(order[first : last + 1], ends[first : last + 1], strict=True):
            # From a place in the epoch to the same token's place in the file.
            shift = self.dataset.offsets[document + 1] - document_end
            start = max(begin, document_end - self.dataset.lengths[document])
            pieces.append(self.dataset.tokens[start + shift : min(end, document_end) + shift])
        return _pack(pieces)

    def _shuffle(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
        """The epoch, its documents in order, where each ends when they are laid end to end, and its rows in order."""
        stream = np.random.Philox(np.random.SeedSequence(self._key, spawn_key=(epoch,)))
        order = self._documents[np.argsort(stream.random_raw(len(self._documents)), kind="stable")]
        rows = np.argsort(stream.random_raw(self._num_rows), kind="stable")
        return epoch, order, np.cumsum(self.dataset.lengths[order]), rows


class Batches:
    """An endless iterator over batches of rows, or over one process's share of each.

    Process p of n takes the p-th of n equal slices of every batch, so the shares in process order
    are the global batch, whatever n is.
    """

    def __init__(
        self,
        rows: PackedRows,
        batch_size: int,
        *,
        start_row: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """batch_size counts the rows of the global batch; start_row is the `state()` to go on from.

        Raises ValueError if the processes do not divide the batch.
        """
        if batch_size < 1 or batch_size % process_count:
            raise ValueError(f"batch_size={batch_size} is not a positive multiple of process_count={process_count}")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index={process_index} is not below process_count={process_count}")
        self._rows, self._batch_size, self._next_row = rows, batch_size, start_row
        self._share = batch_size // process_count
        self._skip = process_index * self._share

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        """The next batch, its arrays [batch_size / process_count, T]."""
        first = self._next_row + self._skip
        self._next_row += self._batch_size
        return _stack([self._rows.row(index) for index in range(first, first + self._share)])

    def state(self) -> int:
        """The first row of the next batch: `start_row` of an iterator that goes on from here."""
        return self._next_row


def heldout_rows(dataset: TokenDataset, seq_len: int, *, count: int, min_document_tokens: int = 0) -> Batch:
    """A fixed evaluation set: the first seq_len + 1 tokens of each of up to `count` documents, one a row.

    Documents are taken in stored order if they have at least seq_len + 1 and min_document_tokens
    tokens; a min_document_tokens above seq_len keeps the documents the same over several lengths.
    Raises ValueError if no document is long enough.
    """
    need = max(seq_len + 1, min_document_tokens)
    chosen = np.flatnonzero(dataset.lengths >= need)[:count]
    if not len(chosen):
        raise ValueError(
            f"no document has the {need} tokens that were asked for, the longest has {dataset.lengths.max()}; "
            "lower seq_len or min_document_tokens, or hold out more text"
        )
    return _stack([_pack([dataset.document(index)[: seq_len + 1]]) for index in chosen])


def _pack(pieces: list[np.ndarray]) -> Batch:
    """One row from the tokens of consecutive documents, the last of them a target only."""
    tokens = np.concatenate(pieces).astype(np.int32)
    lengths = [len(piece) for piece in pieces]
    segment_ids = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    loss_mask = (segment_ids[:-1] == segment_ids[1:]).astype(np.float32)
    return Batch(tokens[:-1], tokens[1:], positions[:-1], segment_ids[:-1], loss_mask)


def _stack(rows: list[Batch]) -> Batch:
    return Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))
