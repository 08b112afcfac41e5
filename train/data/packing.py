"""Prepared tokens as rows to train on: documents shuffled, laid end to end and cut.

No token predicts or attends across documents (The Llama 3 Herd of Models, arXiv 2407.21783, section 3.2):
segment_ids, positions and loss_mask say where they meet. train.data.shards reads the documents.

The one invariant: row i of a source is a function of (data, seed, stage, source, seq_len, how often which
documents come, i) alone. So one integer is the whole state of a source, on any number of processes.
"""

import threading
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from train.config import LengthWeight
from train.data.shards import Shard, TokenDataset

# The most documents that are shuffled together; their order and offsets take 0.8 GB.
GROUP_DOCUMENTS = 2**25


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


class Rows(Protocol):
    """An endless sequence of rows, the same whenever and wherever one is read; several threads may read at once."""

    def __len__(self) -> int:
        """Rows in an epoch."""
        ...

    def row(self, index: int) -> Batch:
        """Row `index` >= 0 of all epochs, its arrays [T]."""
        ...


class Group(NamedTuple):
    """Documents of some shards in an order of an epoch, laid end to end.

    epoch, first_row: where its rows come. first_documents: number of the first document of each shard.
    starts: where each document starts in its shard. order: documents by number. bounds: where each of them
    starts when they are laid end to end in this order, and the end of the last. rows: the order of the rows.
    """

    epoch: int
    first_row: int
    shards: list[Shard]
    first_documents: np.ndarray
    starts: np.ndarray
    order: np.ndarray
    bounds: np.ndarray
    rows: np.ndarray

    def piece(self, place: int, begin: int, end: int) -> np.ndarray:
        """The tokens of the document at this place of the order that are laid from begin to before end."""
        document, bound = self.order[place], self.bounds[place]
        shard = np.searchsorted(self.first_documents, document, side="right") - 1
        shift = self.starts[document] - bound
        start, stop = max(begin, bound) + shift, min(end, self.bounds[place + 1]) + shift
        return self.shards[shard].tokens[start:stop]


class PackedRows:
    """Rows of seq_len tokens over the documents of a source, epoch after epoch without end.

    Each epoch lays the documents end to end in a new order and cuts them every seq_len tokens; a row
    also holds, as its last target, the first token after the cut: each token is an input once and,
    unless it starts a document, a target once. What is left after the last whole row, at most
    seq_len tokens, is dropped; the next epoch's order leaves out other tokens. A document that a cut
    divides goes on in another row at position 0 and does not see its beginning. The rows then come
    in a shuffled order, because neighbours are parts of one document, and a batch of them would be
    one long sample.

    More than GROUP_DOCUMENTS documents do so in groups of whole shards, one group after the other, the shards
    in a new order each epoch; memory holds two groups.

    A document of weight w comes floor(w) times an epoch, and once more with probability w - floor(w). Which do
    is drawn by epoch, and the probability moved so far that the tokens, hence the rows, are as many in each.

    All orders sort by the raw 64-bit draws of Philox, keyed by SeedSequence((seed, stage, crc32 of the source's
    name), spawn_key=(epoch,)): streams that NumPy promises never to change (NEP 19). Each stage of a run
    counts its rows from 0, so that without an order of its own it would begin with what the one before has
    begun with.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        seq_len: int,
        seed: int,
        *,
        stage: int = 0,
        source: str = "",
        min_document_tokens: int = 0,
        length_weights: Sequence[LengthWeight] = (),
    ):
        """Rows from the documents that have at least min_document_tokens tokens; stage counts from 0.

        Of length_weights the last that a document reaches applies; without one its weight is 1, and 0
        leaves it out. Raises ValueError if no document is long enough or they do not fill the rows.
        """
        if seq_len < 1 or seed < 0:
            raise ValueError(f"seq_len={seq_len} must be at least 1 and seed={seed} at least 0")
        if any(entry.weight < 0 for entry in length_weights):
            raise ValueError("length_weights count from 0, which leaves a document out")
        self.dataset, self.seq_len = dataset, seq_len
        self._key = (seed, stage, zlib.crc32(source.encode()))
        self._min_tokens, self._length_weights = min_document_tokens, tuple(length_weights)
        self._shard_tokens = self._count_tokens(source)
        self._group_shards = max(1, GROUP_DOCUMENTS // max(shard.num_documents for shard in dataset.shards))
        # Each group drops at most a row's tokens, whatever shards are in it.
        num_groups = -(-len(dataset.shards) // self._group_shards)
        self._num_rows = -(-sum(self._shard_tokens) // seq_len) - num_groups
        if self._num_rows < 1:
            raise ValueError(
                f"{sum(self._shard_tokens)} tokens{source and f' of source {source}'} in documents of at least "
                f"{min_document_tokens} do not fill a row of seq_len={seq_len} and a target; prepare more text, "
                "or lower seq_len or min_document_tokens"
            )
        self._groups: list[Group] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Rows in one epoch."""
        return self._num_rows

    def row(self, index: int) -> Batch:
        """Row `index` >= 0 of all epochs, its arrays [T]; it belongs to epoch index // len(self)."""
        if index < 0:
            raise IndexError(f"row {index} does not exist; rows count from 0")
        group, number = self._find(*divmod(index, self._num_rows))
        begin, end = number * self.seq_len, (number + 1) * self.seq_len + 1
        first = np.searchsorted(group.bounds, begin, side="right") - 1
        last = np.searchsorted(group.bounds, end, side="left")
        return pack([group.piece(place, begin, end) for place in range(first, last)])

    def _find(self, epoch: int, place: int) -> tuple[Group, int]:
        """The group that holds a row, given by its place in the epoch, and which of its rows that is."""
        with self._lock:
            for group in self._groups:
                if group.epoch == epoch and 0 <= place - group.first_row < len(group.rows):
                    break
            else:
                group = self._open_group(epoch, place)
                self._keep(group)
        return group, int(group.rows[place - group.first_row])

    def _keep(self, group: Group) -> None:
        """Keep a group and the one before, which threads that are behind still read."""
        done, self._groups = self._groups[:-1], [*self._groups[-1:], group]
        kept = {shard for group in self._groups for shard in group.shards}
        for shard in {shard for group in done for shard in group.shards} - kept:
            shard.release()

    def _open_group(self, epoch: int, place: int) -> Group:
        num_shards, first_row = len(self.dataset.shards), 0
        order = np.arange(num_shards)
        if self._group_shards < num_shards:
            order = np.argsort(self._stream(epoch, 0).random_raw(num_shards), kind="stable")
        for start in range(0, num_shards, self._group_shards):
            members = sorted(order[start : start + self._group_shards].tolist())
            num_tokens = sum(self._shard_tokens[i] for i in members)
            num_rows = max(0, (num_tokens - 1) // self.seq_len)
            if place < first_row + num_rows:
                break
            first_row += num_rows
        stream = self._stream(epoch, start) if start else self._stream(epoch)
        shards = [self.dataset.shards[i] for i in members]
        offsets = [shard.offsets() for shard in shards]
        lengths = np.concatenate([np.diff(values) for values in offsets])
        documents = np.repeat(np.arange(len(lengths)), self._copies(lengths, num_tokens, stream))
        order = documents[np.argsort(stream.random_raw(len(documents)), kind="stable")]
        rows = np.argsort(stream.random_raw(num_rows), kind="stable")
        return Group(
            epoch=epoch,
            first_row=first_row,
            shards=shards,
            first_documents=np.cumsum([0, *(shard.num_documents for shard in shards[:-1])]),
            starts=np.concatenate([values[:-1] for values in offsets]),
            order=order,
            bounds=np.concatenate([[0], np.cumsum(lengths[order])]),
            rows=rows,
        )

    def _stream(self, *spawn_key: int) -> np.random.Philox:
        return np.random.Philox(np.random.SeedSequence(self._key, spawn_key=spawn_key))

    def _count_tokens(self, source: str) -> list[int]:
        """Tokens that an epoch takes from each shard. Raises ValueError if no document is long enough."""
        shards = self.dataset.shards
        if not self._min_tokens and not self._length_weights:
            return [shard.num_tokens for shard in shards]
        counts, longest = [], 0
        for shard in shards:
            lengths = shard.lengths()
            longest = max(longest, int(lengths.max()))
            counts.append(int(np.dot(self._weights(lengths), lengths)))
        if longest < self._min_tokens:
            raise ValueError(
                f"no document{source and f' of source {source}'} reaches min_document_tokens={self._min_tokens}, "
                f"the longest has {longest} tokens; lower it or prepare longer documents"
            )
        return counts

    def _weights(self, lengths: np.ndarray) -> np.ndarray:
        """How often documents of these lengths come in an epoch."""
        weights = np.ones(len(lengths))
        for entry in self._length_weights:
            weights[lengths >= entry.at_least] = entry.weight
        weights[lengths < self._min_tokens] = 0
        return weights

    def _copies(self, lengths: np.ndarray, num_tokens: int, stream: np.random.Philox) -> np.ndarray:
        """How often each document comes in one epoch, so that all are num_tokens or less than a document more."""
        weights = self._weights(lengths)
        copies = weights.astype(np.int64)
        chances = weights - copies
        drawn = np.flatnonzero(chances)
        if len(drawn):
            draws = stream.random_raw(len(drawn)) / 2**64
            drawn = drawn[np.argsort(draws - chances[drawn], kind="stable")]
            missing = num_tokens - np.dot(copies, lengths)
            copies[drawn[: np.searchsorted(np.cumsum(lengths[drawn]), missing) + (missing > 0)]] += 1
        return copies


def heldout_rows(dataset: TokenDataset, seq_len: int, *, count: int, min_document_tokens: int = 0) -> Batch:
    """A fixed evaluation set: the first seq_len + 1 tokens of each of up to `count` documents, one a row.

    Documents are taken in stored order if they have at least seq_len + 1 and min_document_tokens
    tokens; a min_document_tokens above seq_len keeps the documents the same over several lengths.
    Raises ValueError if no document is long enough.
    """
    need, longest, rows = max(seq_len + 1, min_document_tokens), 0, []
    for shard in dataset.shards:
        offsets = shard.offsets()
        lengths = np.diff(offsets)
        longest = max(longest, int(lengths.max()))
        starts = offsets[:-1][lengths >= need][: count - len(rows)]
        rows += [pack([shard.tokens[start : start + seq_len + 1]]) for start in starts]
        if len(rows) == count:
            break
    if not rows:
        raise ValueError(
            f"no document has the {need} tokens that were asked for, the longest has {longest}; "
            "lower seq_len or min_document_tokens, or hold out more text"
        )
    return stack(rows)


def heldout_by_source(
    sources: Mapping[str, TokenDataset], seq_len: int, *, count: int, min_document_tokens: int = 0
) -> dict[str, Batch]:
    """`heldout_rows` of each source, up to `count` of each; a source without a document long enough is left out.

    Raises ValueError if that leaves none.
    """
    need = max(seq_len + 1, min_document_tokens)
    longest = {name: max(int(shard.lengths().max()) for shard in data.shards) for name, data in sources.items()}
    if max(longest.values()) < need:
        raise ValueError(
            f"no document of any source has the {need} tokens that were asked for, the longest has "
            f"{max(longest.values())}; lower seq_len or min_document_tokens, or hold out more text"
        )
    return {
        name: heldout_rows(data, seq_len, count=count, min_document_tokens=min_document_tokens)
        for name, data in sources.items()
        if longest[name] >= need
    }


def share_past_half(batch: Batch) -> float:
    """Share of the tokens, [..., T], that have at least half of the window behind them, in their own document."""
    return float(np.mean(2 * batch.positions >= batch.positions.shape[-1]))


def pack(pieces: list[np.ndarray]) -> Batch:
    """One row from the tokens of consecutive documents, the last of them a target only."""
    tokens = np.concatenate(pieces).astype(np.int32)
    lengths = [len(piece) for piece in pieces]
    segment_ids = np.repeat(np.arange(1, len(pieces) + 1, dtype=np.int32), lengths)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    loss_mask = (segment_ids[:-1] == segment_ids[1:]).astype(np.float32)
    return Batch(tokens[:-1], tokens[1:], positions[:-1], segment_ids[:-1], loss_mask)


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows [T] as a batch [B, T]."""
    return Batch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))
