"""Who runs next: requests join and leave a running batch, a round at a time, as pages of the cache allow.

In a round each row that is decoding gets pages for the steps of one dispatch, and one dispatch of chunks of
prompts is planned beside it (Sarathi, arXiv 2403.02310), so that a long prompt stalls nobody. When pages run out the
youngest sequence gives up its own and is computed again later. Pure Python, nothing here touches a device.

The invariant: what is planned stands in pages that the sequence holds, and the oldest sequence always gets on.
A sequence lives in one shard of the batch: rows and pages are numbered within it, and it goes where most of its
beginning is known unless that shard is clearly more loaded than another.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as List
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from infer.pages import PagePool, extend_names

# Tokens of the shortest chunk of a prompt, with what pads it.
MIN_CHUNK = 16

# A shard is clearly more loaded than another by this part of its rows.
SLACK = 2

# Dispatches of prompts for which a beginning that is just computed is waited for before others.
PATIENCE = 8


def bucket(number: int, limit: int | None = None, multiple: int = 1, *, base: int = 2) -> int:
    """The next power of base, at most limit, rounded up to what the mesh divides."""
    size = 1
    while size < number:
        size *= base
    return -(-min(size, limit or size) // multiple) * multiple


@dataclass(frozen=True)
class ChunkSizes:
    """To which shapes chunks of prompts are padded.

    longest: tokens of a chunk. together: tokens of a shard's dispatch that has several. row_base: how much coarser the
    next bucket of rows is, later_base that of tokens in chunks that do not begin a prompt. Those that do are padded to
    the next power of two or, where that comes first, to a multiple of finest tokens and of that part of the power.
    """

    longest: int
    together: int
    row_base: int
    later_base: int
    finest: int
    part: float

    def length(self, tokens: int, *, fresh: bool) -> int:
        """To how many tokens a chunk is padded; coarser where a table makes for more programs."""
        length = bucket(max(MIN_CHUNK, tokens), base=2 if fresh else self.later_base)
        if fresh:
            step = max(self.finest, int(self.part * length))
            length = min(length, -(-tokens // step) * step)
        return min(length, self.longest)

    def shape_within(self, tokens: int, *, fresh: bool) -> int:
        """The longest chunk without padding that has at most so many tokens; the shortest if none has."""
        shortest, most = min(MIN_CHUNK, self.longest), min(tokens, self.longest)
        return next((n for n in range(most, shortest, -1) if self.length(n, fresh=fresh) == n), shortest)

    def most_rows(self, length: int) -> int:
        """Rows a shard of a dispatch of chunks of this length."""
        return max(1, self.together // length)

    def rows(self, count: int, length: int, num_rows: int) -> int:
        """Rows a shard of a dispatch of so many chunks, padded."""
        return min(bucket(count, base=self.row_base), self.most_rows(length), num_rows)

    def shapes(self, num_rows: int, *, fresh: bool) -> Iterator[tuple[int, int]]:
        """Rows and lengths of all dispatches."""
        for length in sorted({self.length(tokens, fresh=fresh) for tokens in range(1, self.longest + 1)}):
            counts = range(1, min(self.most_rows(length), num_rows) + 1)
            yield from ((n, length) for n in sorted({self.rows(count, length, num_rows) for count in counts}))


@dataclass(eq=False)
class Sequence:
    """Tokens that grow: a prompt and what is known of its continuation, up to limit in all.

    to_fill: its tokens when it was given a row; cached: how many tokens stand in its pages once all that is
    dispatched has run; found: how many of them were there already when it first had a row; in_flight: steps that are
    dispatched, each of which brings a token or more; told_from: the first of its tokens whose log-probability is told,
    for which the one before it must be computed; None if none is; special: its prompt is prefilled alone; apart: it
    shares pages only with those that have the same here.
    """

    tokens: list[int]
    limit: int
    request: Any = None
    told_from: int | None = None
    special: bool = False
    apart: bytes = b""
    shard: int = 0
    row: int = -1
    pages: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    to_fill: int = 0
    cached: int = 0
    found: int = -1
    in_flight: int = 0

    @property
    def filled(self) -> bool:
        """Whether its last chunk is dispatched, so that it decodes."""
        return self.cached >= self.to_fill > 0


class Chunk(NamedTuple):
    """Tokens start to stop of a sequence that are prefilled together."""

    sequence: Sequence
    start: int
    stop: int


def _num_alike(names: List[bytes], others: List[bytes]) -> int:
    """How many pages two sequences have alike, from the first on."""
    pairs = zip(names, others, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


class Scheduler:
    """Sequences that wait and sequences that have a row, the oldest first."""

    def __init__(
        self,
        pools: List[PagePool],
        num_rows: int,
        *,
        chunks: ChunkSizes,
        steps: int,
        tokens_a_step: int = 1,
        share_prefixes: bool = True,
    ):
        """A pool and num_rows rows for each shard; every pool holds the longest sequence.

        steps: the most of a decoding row in a dispatch, each of which brings tokens_a_step tokens at most.
        """
        self.pools = pools
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._num_rows, self._chunks, self._steps = num_rows, chunks, steps
        self._tokens_a_step = tokens_a_step
        self._share_prefixes = share_prefixes
        self._free_rows = [list(range(num_rows))[::-1] for _ in pools]

    def add(self, sequence: Sequence) -> None:
        """Let it wait for its turn."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has ended, wherever it is; its pages are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def restart(self, pools: List[PagePool]) -> None:
        """Go on with other pools, which are empty; nothing may be in flight."""
        for sequence in reversed(self.running):
            self._release(sequence)
            self.waiting.appendleft(sequence)
        self.running, self.pools = [], pools

    def plan_decode(self) -> list[Sequence]:
        """The sequences that decode now, the oldest first, with pages for all steps of a dispatch."""
        planned = []
        for sequence in list(self.running):
            unfinished = len(sequence.tokens) + sequence.in_flight < sequence.limit
            if sequence.filled and unfinished and self._reserve(sequence):
                planned.append(sequence)
        return planned

    def _reserve(self, sequence: Sequence) -> bool:
        """Give it the pages that it is going to write; false if it had to give up its own."""
        pool = self.pools[sequence.shard]
        missing = self._num_pages(sequence) - len(sequence.pages)
        while sequence.row >= 0 and pool.available < missing:
            self._preempt(next(s for s in reversed(self.running) if s.shard == sequence.shard))
        if sequence.row >= 0:
            sequence.pages += pool.take(max(0, missing))
        return sequence.row >= 0

    def _num_pages(self, sequence: Sequence) -> int:
        """How many pages it needs for the steps of one dispatch; its last token of all is never cached."""
        new = (sequence.in_flight + self._steps) * self._tokens_a_step
        return self.pools[sequence.shard].num_for(min(len(sequence.tokens) + new, sequence.limit) - 1)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        pool = self.pools[sequence.shard]
        self._name_pages(sequence)
        pool.give_back(sequence.pages)
        self._free_rows[sequence.shard].append(sequence.row)
        sequence.pages, sequence.row, sequence.to_fill, sequence.cached = [], -1, 0, 0

    def _name_pages(self, sequence: Sequence) -> None:
        """Let others share its pages that are full."""
        if self._share_prefixes:
            size = self.pools[sequence.shard].size
            extend_names(sequence.names, sequence.tokens[: sequence.cached], size, apart=sequence.apart)
            full = sequence.cached // size
            self.pools[sequence.shard].name(sequence.pages[:full], sequence.names[:full])

    def plan_prefill(self, most: int | None = None) -> list[Chunk]:
        """The chunks that are prefilled now: that of the oldest, and others no longer, begun or not as it is.

        most: tokens of a chunk, as far as there are shapes for them.
        """
        self._admit_waiting()
        filling = [s for s in self.running if not s.filled]
        if not filling:
            return []
        first = filling[0]
        fresh = first.cached == 0
        length = self._chunks.length(first.to_fill - first.cached, fresh=fresh)
        if most is not None and most < length:
            length = self._chunks.shape_within(most, fresh=fresh)
        special = first.special
        # Those of few requests are coarse: one at a time keeps their programs few, too.
        rows_left = dict.fromkeys(range(len(self.pools)), 1 if special else self._chunks.most_rows(length))
        chunks = []
        for sequence in filling:
            rest = sequence.to_fill - sequence.cached
            alike = rest <= length and (sequence.cached == 0) == fresh and sequence.special == special
            if (alike or sequence is first) and rows_left[sequence.shard]:
                rows_left[sequence.shard] -= 1
                chunks.append(Chunk(sequence, sequence.cached, sequence.cached + min(rest, length)))
        return chunks

    def _admit_waiting(self) -> None:
        """Give rows to those that wait, in order; who waits long for a beginning just computed lets others pass."""
        for sequence in list(itertools.islice(self.waiting, len(self.pools) * self._num_rows)):
            # Of one that was preempted the last tokens may still have to come.
            if sequence.in_flight or not any(self._free_rows):
                return
            names = self._shareable_names(sequence)
            coming = [self._num_coming(names, shard) for shard in range(len(self.pools))]
            shards = self._by_cost(sequence, names, coming)
            first = self.pools[shards[0]]
            if (missing := coming[shards[0]] - first.num_found(names)) > 0:
                # Beyond a few dispatches; else those that pass would take the rows beside it.
                if missing * first.size > PATIENCE * self._chunks.longest:
                    continue
                return
            if not any(self._admit(sequence, names, shard) for shard in shards):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)

    def _num_coming(self, names: List[bytes], shard: int) -> int:
        """How many pages of a beginning are just computed, or were, by those that run in a shard."""
        filling = (s.names for s in self.running if s.shard == shard and not s.filled)
        return max((_num_alike(names, others) for others in filling), default=0)

    def _by_cost(self, sequence: Sequence, names: List[bytes], coming: List[int]) -> list[int]:
        """The shards that have a row free: where most of its beginning is known or coming, then where it costs least.

        Those that are clearly more loaded come last. Costs are counted in dispatches of prompts: those that the
        shard and the sequence still need, and one a row, which is about what decoding it to its end takes.
        """
        known = [max(pool.num_found(names), soon) for pool, soon in zip(self.pools, coming, strict=True)]
        costs = [float(self._num_rows - len(rows)) for rows in self._free_rows]
        for other in self.running:
            costs[other.shard] += max(0, other.to_fill - other.cached) / self._chunks.longest
        for shard, pool in enumerate(self.pools):
            costs[shard] += (len(sequence.tokens) - known[shard] * pool.size) / self._chunks.longest
        shards = [shard for shard, rows in enumerate(self._free_rows) if rows]
        enough = min(costs[shard] for shard in shards) + max(1, self._num_rows // SLACK)
        return sorted(shards, key=lambda shard: (costs[shard] > enough, -known[shard], costs[shard]))

    def _admit(self, sequence: Sequence, names: List[bytes], shard: int) -> bool:
        """Give it a row and pages for all its tokens in a shard.

        Beside them a page must be left for every sequence there that is going to need one, or it might soon be turned
        out again.
        """
        pool = self.pools[shard]
        growing = [s for s in self.running if s.shard == shard and len(s.pages) < pool.num_for(s.limit - 1)]
        sequence.shard, pages = shard, pool.share(names)
        missing = self._num_pages(sequence) - len(pages)
        if pool.available < missing + len(growing):
            pool.give_back(pages)
            return False
        sequence.cached = len(pages) * pool.size
        sequence.found = sequence.cached if sequence.found < 0 else sequence.found
        sequence.pages = pages + pool.take(missing)
        sequence.row = self._free_rows[shard].pop()
        sequence.to_fill = len(sequence.tokens)
        return True

    def _shareable_names(self, sequence: Sequence) -> list[bytes]:
        """Names of the full pages that it may find; what comes after a token is known when that token is computed."""
        if not self._share_prefixes:
            return []
        size, unknown = self.pools[0].size, len(sequence.tokens)
        if sequence.told_from is not None:
            unknown = min(unknown, max(1, sequence.told_from))
        extend_names(sequence.names, sequence.tokens, size, apart=sequence.apart)
        return sequence.names[: (unknown - 1) // size]

    def prefilled(self, chunks: List[Chunk]) -> None:
        """These chunks are dispatched; a last one brings a token."""
        for sequence, _, stop in chunks:
            sequence.cached = stop
            sequence.in_flight += sequence.filled
            self._name_pages(sequence)

    def decoded(self, sequences: List[Sequence], steps: int) -> None:
        """A dispatch of so many decoding steps is on its way."""
        for sequence in sequences:
            sequence.in_flight += steps

    def received(self, sequence: Sequence, tokens: List[int], expected: int) -> None:
        """New tokens of a sequence are known, those of so many steps that were in flight."""
        sequence.in_flight -= expected
        sequence.tokens += tokens
        if tokens and sequence.filled:
            sequence.cached = len(sequence.tokens) - 1
