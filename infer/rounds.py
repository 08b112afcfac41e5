"""Rounds of a running batch: what is planned is sent, and what the round before sent is read.

A round plans with `infer/scheduler.py`, sends at most one prefill and one decode dispatch (`infer/programs.py`), and
then reads the oldest that was sent before it, so that the devices never wait for the host. The invariant: whatever is
read belongs to a request that still wants it, and goes on exactly where its tokens ended.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from infer.batches import Batches, filled_up
from infer.hosts import Hosts
from infer.pages import PagePool
from infer.programs import Programs
from infer.request import Request, pairs
from infer.sampling import Choice
from infer.scheduler import Chunk, Scheduler, bucket
from infer.scheduler import Sequence as Row
from infer.sizes import CacheOptions, bases, chunk_sizes, page_size
from infer.speculation import cache_multiple
from infer.steps import Batch, Held, Prompts, Told, tokens_a_step
from infer.throughput import EngineStats, Throughput
from infer.warm import warm_up
from llama_jax.attention import gathers_pages
from llama_jax.entry import say
from llama_jax.mesh import platform
from llama_jax.model import Llama

# Prefill and decode, and what they hold, abstract.
Lowered = tuple[jax.stages.Lowered, jax.stages.Lowered, Held]


class Dispatch(NamedTuple):
    """What is on its way: the place of each sequence and how many steps it makes.

    chunks is empty for decode; guessed is what it made of guesses; sent is what the clock showed.
    """

    places: list[int]
    sequences: list[Row]
    expected: list[int]
    chunks: list[Chunk]
    choice: Choice
    told: Told | None
    guessed: jax.Array | None
    sent: float


class Rounds:
    """Requests of tokens on a pool of pages. For one thread."""

    def __init__(
        self,
        model: Llama,
        *,
        max_seq_len: int,
        max_batch_size: int,
        steps: int,
        cache: CacheOptions,
        hosts: Hosts | None,
        speculation: Any,
    ):
        """As the engine's; max_seq_len may turn out smaller."""
        cfg, rules = model.cfg, model.rules
        self.max_seq_len, self.throughput = max_seq_len, Throughput()
        weights = jax.tree.leaves(model.embedding)[0]
        on = platform(weights.sharding.mesh)
        size = page_size(max_seq_len, cache_multiple(rules, speculation), on)
        self._num_shards, self._tokens_a_step = rules.batch_multiple, tokens_a_step(speculation)
        self._batches = Batches(
            num_shards=self._num_shards,
            num_rows=-(-max_batch_size // self._num_shards),
            pages_a_row=-(-max_seq_len // size),
            page_size=size,
            chunks=chunk_sizes(-(-cache.prefill_chunk // rules.sequence_multiple) * rules.sequence_multiple, on),
            length_multiple=rules.sequence_multiple,
            vocab_size=cfg.vocab_size,
            # Of one row XLA:TPU computes every weight product on the vector unit: twice the time of two.
            least_rows=2 if on == "tpu" else 1,
            **bases(on),
            num_draft_tokens=self._tokens_a_step - 1,
        )
        num_rows = self._num_shards * self._batches.num_rows
        self.programs = Programs(model, speculation, num_rows=num_rows, num_steps=steps, hosts=hosts)
        self._dtype, self._cache, self._steps = cache.dtype or weights.dtype, cache, steps
        self._pages, self._is_open = 0, False  # pages of a shard
        self._scheduler = self._new_scheduler(0)
        self._live: dict[Request, Row] = {}
        self._uncounted: set[Request] = set()
        self._in_flight: deque[Dispatch] = deque()
        self._read_early: list[tuple[Request, str]] = []
        self._prompt_tokens = self._prefix_hit_tokens = self._generated_tokens = 0
        self._guesses = np.zeros(2, np.int64)  # made and accepted
        if isinstance(weights, jax.Array):
            self._most_pages()

    def _new_scheduler(self, pages: int) -> Scheduler:
        return Scheduler(
            self._new_pools(pages),
            self._batches.num_rows,
            chunks=self._batches.chunks,
            steps=self._steps,
            tokens_a_step=self._tokens_a_step,
            share_prefixes=self._cache.share_prefixes,
        )

    def _new_pools(self, pages: int) -> list[PagePool]:
        return [PagePool(pages, self._batches.page_size) for _ in range(self._num_shards)]

    # The pool.

    def open(self) -> None:
        """Make the pool as large as it may be, once."""
        if not self._is_open:
            self._resize(self._most_pages())
            self._is_open = True

    def make_room(self, requests: Sequence[Request]) -> None:
        """Where the pool is smaller than requests need, make it as large as they need and it may be."""
        wanted = self._pages_for(requests)
        if self._is_open or wanted <= self._pages:
            return
        pages = min(wanted, self._most_pages())
        # Memory comes and goes; for a little more nothing is compiled again.
        if self._pages < self._pages_for(requests[:1]) or pages >= min(wanted, 5 * self._pages // 4):
            self._resize(pages)

    def _resize(self, pages: int) -> None:
        """Begin again with an empty pool; what runs is computed again."""
        if pages > self._pages:
            self._read_early += self._receive(len(self._in_flight))
            self.programs.open(self._num_shards * pages, self._batches.page_size, self._dtype)
            self._scheduler.restart(self._new_pools(pages))
            self._pages = pages

    def _pages_for(self, requests: Sequence[Request]) -> int:
        """Pages a shard for so many rows as requests can be in, each as long as the longest."""
        batches = self._batches
        longest = max((len(r.result.prompt_tokens) + r.room for r in requests), default=1)
        rows = bucket(-(-min(len(requests), self.programs.num_rows) // self._num_shards), batches.num_rows)
        return rows * bucket(-(-longest // batches.page_size), batches.pages_a_row)

    def _most_pages(self, left: int | None = None) -> int:
        """Pages a shard that all rows could fill and that fit in the bytes that a device has left beside weights.

        left: by default what the devices say. If one row could not, a shorter context is served, which is said.
        Raises ValueError if not a page fits.
        """
        batches, mesh = self._batches, self.programs.mesh
        size = self.programs.page_bytes(batches.page_size, self._dtype)
        most = batches.num_rows * batches.pages_a_row
        room = self.programs.room(self._dtype, prefill_chunk=batches.chunks.longest, held=self._pages * size, left=left)
        if room is not None and gathers_pages(mesh):
            # What a dispatch gathers takes no more than a pool might, so that there is room for every bucket.
            self._batches = dataclasses.replace(batches, most_numbers=room // size)
        if self._cache.num_bytes is not None:
            room = self._cache.num_bytes
        room = most * size if room is None else room
        fit = max(self._pages, min(most, room // size))
        if fit < 1:
            raise ValueError(
                f"the cache needs {size:,} bytes on each device for {batches.page_size} tokens, and has "
                f"{room:,}; use a smaller model, more devices or a larger cache"
            )
        if fit * batches.page_size < self.max_seq_len:
            self.max_seq_len = fit * batches.page_size
            self._batches = dataclasses.replace(self._batches, pages_a_row=fit)
            say(f"the cache has room for {self.max_seq_len:,} tokens, which is the context that is served")
        return fit

    # Requests.

    @property
    def has_work(self) -> bool:
        """Whether a request is not done."""
        return bool(self._live)

    def is_live(self, request: Request) -> bool:
        """Whether it was added and is neither done nor dropped."""
        return request in self._live

    def add(self, request: Request) -> None:
        """Let it wait for its turn. Raises ValueError if it is longer than the served context."""
        row = self._row(request)
        if row.limit > self.max_seq_len:
            raise ValueError(
                f"{row.limit:,} tokens of prompt and answer exceed the served context of {self.max_seq_len:,}"
            )
        self._live[request] = row
        self._uncounted.add(request)
        self._scheduler.add(row)

    def _row(self, request: Request) -> Row:
        tokens = list(request.result.prompt_tokens)
        return Row(tokens, len(tokens) + request.room, request, request.told_from, request.special, request.apart)

    def drop(self, request: Request) -> None:
        """Let it go, done or not; its pages are free at once."""
        if (row := self._live.pop(request, None)) is not None:
            self._uncounted.discard(request)
            self._scheduler.remove(row)

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        scheduler = self._scheduler
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            pages_total=self._num_shards * self._pages,
            pages_free=sum(pool.available for pool in scheduler.pools),
            prompt_tokens=self._prompt_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=scheduler.preemptions,
            compilations=len(self.programs.compiled),
            draft_tokens=int(self._guesses[0]),
            accepted_tokens=int(self._guesses[1]),
        )

    # A round.

    def step(self, *, prefill_first: bool = False) -> list[tuple[Request, str]]:
        """Send what is next and read the oldest that was sent before.

        Returns every request that advanced, with text that may be shown.

        prefill_first: no row decodes while a prompt waits that could be prefilled, as is best where nobody looks on.
        """
        # What may come next in a constrained text is known when its last token is.
        if any(row.request.constraint is not None and row.in_flight for row in self._scheduler.running):
            self._read_early += self._receive(len(self._in_flight))
        late = len(self._in_flight)
        if late < 2:  # else what is sent would keep waiting what comes next, and the devices have enough to do
            self._send(prefill_first)
        news, self._read_early = self._read_early + self._receive(min(late, 1)), []
        return news

    def _send(self, prefill_first: bool) -> None:
        """Prompts first, which have waited; then what decodes goes on, and with it those whose prompts have ended."""
        scheduler = self._scheduler
        # Those that run have pages before others come, and do not wait for a whole chunk of a slow model.
        decoding = [] if prefill_first else scheduler.plan_decode()
        chunks = scheduler.plan_prefill(self.throughput.tokens_of_a_chunk() if decoding else None)
        if chunks:
            self._send_prefill(self._batches.first_of(chunks))
        if not (chunks and prefill_first):
            planned = scheduler.plan_decode()
            if ready := [row for row in planned if row.request.constraint is None or not row.in_flight]:
                most = self._steps if prefill_first else self.throughput.steps_of_a_dispatch(self._steps)
                for rows in self._batches.apart(ready):
                    self._send_decode(rows, most)

    @property
    def spare_seconds(self) -> float:
        """How long nothing need be sent: until most has run of the one decode dispatch that is on its way."""
        if len(self._in_flight) != 1 or (alone := self._in_flight[0]).chunks:
            return 0.0
        return self.throughput.spare_seconds(alone.sent, alone.expected[0])

    def _send_prefill(self, chunks: list[Chunk]) -> None:
        places, prompts, batch = self._batches.prefill(chunks)
        for row, _, stop in chunks:
            self._count(row)
            if stop == row.to_fill and row.request.params.needs_history:
                self._remember(row)
        sent, fresh = self.throughput.clock(), chunks[0].start == 0
        choice, told = self._timed(partial(self.programs.prefill, prompts, batch, fresh=fresh))
        self._scheduler.prefilled(chunks)
        rows = [chunk.sequence for chunk in chunks]
        self._in_flight.append(
            Dispatch(places, rows, [int(row.filled) for row in rows], chunks, choice, told, None, sent)
        )

    def _send_decode(self, rows: list[Row], most: int) -> None:
        places, batch = self._batches.decode(rows)
        steps = 1 if any(row.request.constraint is not None for row in rows) else most
        sent = self.throughput.clock()
        choice, guessed = self._timed(partial(self.programs.decode, batch, steps))
        self._scheduler.decoded(rows, steps)
        self._in_flight.append(Dispatch(places, rows, [steps] * len(rows), [], choice, None, guessed, sent))

    def _timed(self, call: Any) -> Any:
        before = self.programs.compile_seconds
        try:
            return call()
        finally:
            self.throughput.compile_seconds += self.programs.compile_seconds - before

    def _count(self, row: Row) -> None:
        """Count a request when it first has a row."""
        if row.request in self._uncounted:
            self._uncounted.remove(row.request)
            row.request.result.cached_tokens = row.found
            self._prompt_tokens += len(row.tokens)
            self._prefix_hit_tokens += row.found

    def _remember(self, row: Row) -> None:
        """Put what a row holds on the devices, for its penalties."""
        prompt, size = row.request.result.prompt_tokens, self._batches.pages_a_row * self._batches.page_size
        where = np.full(self._num_shards, self._batches.num_rows, np.int32)
        where[row.shard] = row.row
        generated = filled_up(row.tokens[len(prompt) :], size)
        self._timed(partial(self.programs.remember, where, filled_up(prompt, size), generated))

    def _receive(self, count: int) -> list[tuple[Request, str]]:
        """Read the oldest dispatches, waiting for them."""
        news = []
        for _ in range(count):
            sent = self._in_flight.popleft()
            choice, told, guessed = jax.tree.map(np.asarray, (sent.choice, sent.told, sent.guessed))
            before = self._generated_tokens
            for i, (place, row) in enumerate(zip(sent.places, sent.sequences, strict=True)):
                if self._live.get(row.request) is row:
                    if told is not None:
                        values = jax.tree.map(lambda x, place=place: x[place], told)
                        row.request.told(*sent.chunks[i][1:], *values)
                    taken = jax.tree.map(lambda x, place=place: x[place], choice)
                    if guessed is not None:
                        self._count_guesses(int(guessed[place]), taken.tokens)
                    news += self._take(row, sent.expected[i], taken)
            new = self._generated_tokens - before
            if sent.chunks:
                self.throughput.count_prefill(sent.sent, sum(stop - start for _, start, stop in sent.chunks), new)
            else:
                self.throughput.count_decode(sent.sent, sent.expected[0], new)
        return news

    def _take(self, row: Row, expected: int, choice: Choice) -> Iterator[tuple[Request, str]]:
        """Give a request the new tokens of its row; it is done when they or their text end it."""
        request, before = row.request, len(row.request.result.tokens)
        here = np.asarray(choice.tokens) >= 0
        choice = jax.tree.map(lambda x: x[here], choice)
        top = pairs(choice.top_tokens, choice.top_logprobs, request.params.logprobs)
        text = request.push(choice.tokens, choice.logprobs, top)  # type: ignore[arg-type]
        new = request.result.tokens[before:]
        self._generated_tokens += len(new)
        self._scheduler.received(row, new, expected)
        if not request.unfinished:
            self.drop(request)
        if new:
            yield request, text

    def _count_guesses(self, guessed: int, tokens: np.ndarray) -> None:
        """Each step that brought tokens brought one more than were guessed rightly."""
        brought = tokens.reshape(-1, self._tokens_a_step) >= 0
        accepted = int(brought.sum() - brought.any(axis=1).sum())
        self.throughput.count_guesses(guessed, accepted)
        self._guesses += np.array([guessed, accepted])

    # Programs.

    def warmup(self) -> None:
        """Compile every bucket, and run it once if no request is under way (infer/warm.py)."""
        self.open()
        pages = None if self.has_work else [pool.blank() for pool in self._scheduler.pools]
        warm_up(self.programs, self._batches, pages)

    def lower(self, requests: Sequence[Request]) -> Lowered:
        """The last prefill and decode of requests, were they alone, and what they hold, on the ambient mesh."""
        pages = self._pages_for(requests)
        scheduler = self._new_scheduler(pages)
        for request in requests:
            scheduler.add(self._row(request))
        chunks = last = scheduler.plan_prefill()
        while chunks:
            last = chunks
            scheduler.prefilled(chunks)
            chunks = scheduler.plan_prefill()
        for row in scheduler.running:
            row.pages += scheduler.pools[row.shard].take(scheduler.pools[row.shard].num_for(row.limit) - len(row.pages))
        _, prompts, batch = self._batches.prefill(last)
        _, decode = self._batches.decode(scheduler.running)
        return self._lower((prompts, batch, not last[0].start), decode, pages)

    def lower_largest(self, left: int) -> Lowered:
        """The largest prefill and decode that `warmup` compiles but for those of few requests, and what they hold.

        left: bytes that a device has beside weights, which decide how many pages there are.
        """
        pages = self._most_pages(left)
        return self._lower(*self._batches.largest(), pages)

    def _lower(self, prefill: tuple[Prompts, Batch, bool], decode: Batch, pages: int) -> Lowered:
        pool = {"num_pages": self._num_shards * pages, "page_size": self._batches.page_size, "dtype": self._dtype}
        return self.programs.lower(*prefill, decode, **pool)

    def embed(self, tokens: Sequence[int], adapter: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and last of the final hidden states of a text, float32 [D]."""
        mean, last = self._timed(partial(self.programs.embed, *self._batches.text(tokens, adapter)))
        return np.asarray(mean)[0], np.asarray(last)[0]
