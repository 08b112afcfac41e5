"""The arrays of a dispatch on the host: which rows take part, their pages, and the chunks of their prompts.

The invariant: a batch is a bucket of shapes in which every place starts off (row beyond all, page -1, no tokens
left), so that the arrays of a bucket alone are enough to compile it. Each shard of the batch axes has as many places.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from infer.sampling import SamplingParams, row_settings
from infer.scheduler import MIN_CHUNK, Chunk, ChunkSizes, bucket
from infer.scheduler import Sequence as Row
from infer.sizes import (
    LONGEST_TEXT,
    MOST_NUMBERS,
    ROW_BASE_ELSEWHERE,
    TABLE_BASE_ELSEWHERE,
    TABLE_BASE_OF_FEW,
    table_width,
    table_widths,
)
from infer.steps import AFTER_ALL, NUM_STOPS, Batch, Prompts, RowState


def filled_up(tokens: Sequence[int], size: int) -> np.ndarray:
    """Tokens int32 [size], -1 after the last."""
    return np.array([*tokens, *[-1] * (size - len(tokens))], np.int32)


@dataclass(frozen=True)
class Batches:
    """Batches for num_shards x num_rows rows of at most pages_a_row pages of page_size tokens.

    A decode dispatch has at least least_rows rows a shard. row_base and table_base: how much coarser the next bucket of
    rows and pages is (infer/sizes.py); those of the few requests that need all of sampling are coarser. The table of a
    shard's dispatch has at most most_numbers numbers of pages, or those of one row. num_draft_tokens: those that are
    guessed in a step, 0 without speculation.
    """

    num_shards: int
    num_rows: int
    pages_a_row: int
    page_size: int
    chunks: ChunkSizes
    length_multiple: int
    vocab_size: int
    least_rows: int = 1
    row_base: int = ROW_BASE_ELSEWHERE
    table_base: int = TABLE_BASE_ELSEWHERE
    most_numbers: int = MOST_NUMBERS
    num_draft_tokens: int = 0

    def off(self, rows: int, width: int, *, full: bool) -> Batch:
        """Rows a shard that do nothing."""
        num = self.num_shards * rows
        words = -(-self.vocab_size // 32)
        allowed = np.full((num, words), 2**32 - 1, np.uint32) if full else None
        return Batch(np.full((num, width), -1, np.int32), np.full(num, self.num_rows, np.int32), allowed)

    def _off_decode(self, rows: int, width: int, *, full: bool) -> Batch:
        guesses = np.zeros(self.num_shards * rows, np.int32) if self.num_draft_tokens else None
        return self.off(rows, width, full=full)._replace(most_guesses=guesses)

    def off_prompts(self, rows: int, length: int, params: Sequence[SamplingParams] = (), *, told: bool) -> Prompts:
        """Chunks without tokens. params are those of the first rows."""
        num = self.num_shards * rows
        off = np.zeros(num, np.int32)
        stops = np.full((num, NUM_STOPS), -1, np.int32)
        settings = row_settings([*params, *[SamplingParams()] * (num - len(params))], stops=stops)
        positions = np.full((num, length), AFTER_ALL, np.int32)
        targets = np.full((num, length), -1, np.int32) if told else None
        start = RowState(off, off - 1, off.copy(), settings, off - 1)
        return Prompts(np.zeros_like(positions), positions, start, targets)

    def apart(self, sequences: Sequence[Row]) -> list[list[Row]]:
        """The sequences in as few decode dispatches as have room for their pages, those of few together."""
        groups = [list(sequences)]
        if not self._fits(*self._decode_shape(sequences)[:2]):
            groups = []
            for sequence in sorted(sequences, key=lambda s: len(s.pages)):
                if groups and self._fits(*self._decode_shape([*groups[-1], sequence])[:2]):
                    groups[-1].append(sequence)
                else:
                    groups.append([sequence])
        return groups

    def first_of(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks up to the last that one dispatch has room for."""
        count = len(chunks)
        while count > 1 and not self._fits(*self._prefill_shape(chunks[:count])[1:3]):
            count -= 1
        return list(chunks[:count])

    def _fits(self, rows: int, width: int) -> bool:
        return rows * width <= self.most_numbers or rows <= self.least_rows

    def _decode_shape(self, sequences: Sequence[Row]) -> tuple[int, int, bool]:
        """Rows a shard, pages of a row, and whether all of sampling is needed."""
        full = any(s.request.special for s in sequences)
        rows = self._decode_rows(max(Counter(s.shard for s in sequences).values()), full=full)
        return rows, self._width(max(len(s.pages) for s in sequences), full=full), full

    def _prefill_shape(self, chunks: Sequence[Chunk]) -> tuple[int, int, int, bool]:
        """Tokens of a chunk, rows a shard, pages of a row, and whether all of sampling is needed."""
        sequences = [chunk.sequence for chunk in chunks]
        fresh, full = chunks[0].start == 0, any(s.request.special for s in sequences)
        length = self.length(max(stop - start for _, start, stop in chunks), fresh=fresh)
        count = max(Counter(s.shard for s in sequences).values())
        rows = self.chunks.rows(count, length, self.num_rows)
        pages = max(len(s.pages) for s in sequences)
        return length, rows, self.fresh_width(length) if fresh else self._width(pages, full=full), full

    def decode(self, sequences: Sequence[Row]) -> tuple[list[int], Batch]:
        """The place of each sequence in the batch, and the batch."""
        rows, width, full = self._decode_shape(sequences)
        batch = self._off_decode(rows, width, full=full)
        places = self._places(sequences, rows)
        self._enter(batch, places, sequences)
        batch.rows[places] = [s.row for s in sequences]
        if batch.most_guesses is not None:
            # What may come in a constrained text is known for its next token alone.
            batch.most_guesses[places] = [self.num_draft_tokens * (s.request.constraint is None) for s in sequences]
        return places, batch

    def prefill(self, chunks: Sequence[Chunk]) -> tuple[list[int], Prompts, Batch]:
        """The place of each chunk in the batch, the chunks and the batch; rows are named where a chunk is the last."""
        sequences = [chunk.sequence for chunk in chunks]
        length, rows, width, full = self._prefill_shape(chunks)
        batch = self.off(rows, width, full=full)
        places = self._places(sequences, rows)
        self._enter(batch, places, sequences)
        params = [SamplingParams()] * (self.num_shards * rows)
        for place, sequence in zip(places, sequences, strict=True):
            params[place] = sequence.request.params
        told = any(s.told_from is not None and s.told_from <= stop for s, _, stop in chunks)
        prompts = self.off_prompts(rows, length, params, told=told)
        for place, chunk in zip(places, chunks, strict=True):
            self._enter_chunk(prompts, batch, place, chunk)
        return places, prompts, batch

    def length(self, tokens: int, *, fresh: bool) -> int:
        """To how many tokens a chunk is padded."""
        length = self.chunks.length(tokens, fresh=fresh)
        return -(-length // self.length_multiple) * self.length_multiple

    def fresh_width(self, length: int) -> int:
        """Pages of the table of chunks that begin their prompts."""
        return -(-length // self.page_size)

    def _decode_rows(self, count: int, *, full: bool) -> int:
        base = max(self.row_base, ROW_BASE_ELSEWHERE) if full else self.row_base
        return max(self.least_rows, bucket(count, self.num_rows, base=base))

    def _table_base(self, full: bool) -> int:
        return max(self.table_base, TABLE_BASE_OF_FEW) if full else self.table_base

    def _width(self, pages: int, *, full: bool) -> int:
        return table_width(pages, self.pages_a_row, self.page_size, self._table_base(full))

    def _widths(self, *, full: bool) -> list[int]:
        return table_widths(self.pages_a_row, self.page_size, self._table_base(full))

    def _places(self, sequences: Sequence[Row], rows: int) -> list[int]:
        before: Counter[int] = Counter()
        places = []
        for sequence in sequences:
            places.append(sequence.shard * rows + before[sequence.shard])
            before[sequence.shard] += 1
        return places

    def _enter(self, batch: Batch, places: Sequence[int], sequences: Sequence[Row]) -> None:
        """Write pages and what may come into the places of a batch."""
        width = batch.table.shape[1]
        for place, sequence in zip(places, sequences, strict=True):
            pages = sequence.pages[:width]
            batch.table[place, : len(pages)] = pages
            may = sequence.request.may() if batch.allowed is not None else None
            if may is not None and batch.allowed is not None:
                batch.allowed[place] = may

    def _enter_chunk(self, prompts: Prompts, batch: Batch, place: int, chunk: Chunk) -> None:
        sequence, start, stop = chunk
        request, start_state = sequence.request, prompts.start
        prompts.tokens[place, : stop - start] = sequence.tokens[start:stop]
        prompts.positions[place, : stop - start] = np.arange(start, stop)
        if prompts.targets is not None:
            after = sequence.tokens[start + 1 : stop + 1]
            prompts.targets[place, : len(after)] = after
        if stop == sequence.to_fill:
            batch.rows[place] = sequence.row
            start_state.positions[place] = stop - 1
            start_state.left[place] = sequence.limit - stop
        start_state.adapters[place] = request.adapter
        stops = sorted(request.stop_tokens)[:NUM_STOPS]
        start_state.settings.stops[place, : len(stops)] = stops
        least = request.params.min_new_tokens
        start_state.settings.stops_from[place] = len(request.result.prompt_tokens) + least if least else 0

    def text(self, tokens: Sequence[int], adapter: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A text that is embedded, once a shard: its tokens [B, T], how many there are [B] and its adapter [B]."""
        length = bucket(max(MIN_CHUNK, len(tokens)), self.pages_a_row * self.page_size, self.length_multiple)
        rows = np.zeros((self.num_shards, length), np.int32)
        rows[:, : len(tokens)] = tokens
        return rows, np.full(self.num_shards, len(tokens), np.int32), np.full(self.num_shards, adapter, np.int32)

    def every_text(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """A text of every bucket up to LONGEST_TEXT tokens."""
        longest = min(LONGEST_TEXT, self.pages_a_row * self.page_size)
        lengths = {bucket(tokens, longest) for tokens in range(MIN_CHUNK, longest + 1)}
        yield from (self.text([0] * length, -1) for length in sorted(lengths))

    def every_decode(self) -> Iterator[Batch]:
        """A batch of every bucket, off."""
        for full in (False, True):
            for rows in sorted({self._decode_rows(count, full=full) for count in range(1, self.num_rows + 1)}):
                widths = [width for width in self._widths(full=full) if self._fits(rows, width)]
                yield from (self._off_decode(rows, width, full=full) for width in widths)

    def largest(self) -> tuple[tuple[Prompts, Batch, bool], Batch]:
        """The chunks of the most tokens and pages, and the largest batch of decoding, of plain sampling."""
        prefill = (chunks for chunks in self.every_prefill() if chunks[1].allowed is None)
        decode = (batch for batch in self.every_decode() if batch.allowed is None)
        most = max(prefill, key=lambda chunks: (chunks[0].tokens.size, chunks[1].table.size))
        return most, max(decode, key=lambda batch: batch.table.size)

    def every_prefill(self) -> Iterator[tuple[Prompts, Batch, bool]]:
        """Chunks and a batch of every bucket, off, and whether the chunks begin their prompts."""
        kinds = (False, False), (True, False), (True, True)
        for fresh, (full, told) in itertools.product((True, False), kinds):
            # Prompts that need all of sampling are prefilled one at a time.
            for rows, tokens in self.chunks.shapes(1 if full else self.num_rows, fresh=fresh):
                length = self.length(tokens, fresh=fresh)
                prompts = self.off_prompts(rows, length, told=told)
                for width in [self.fresh_width(length)] if fresh else self._widths(full=full):
                    if self._fits(rows, width):
                        yield prompts, self.off(rows, width, full=full), fresh
