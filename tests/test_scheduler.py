"""The scheduler over a device that is made of lists: what a step reads in its pages is what the sequence is made of."""

import itertools
import random
from collections import Counter

import hypothesis
import pytest
from hypothesis import strategies

from infer.pages import PagePool
from infer.scheduler import Chunk, ChunkSizes, Scheduler, Sequence, bucket

SIZE = 4  # tokens of a page


def next_token(tokens: list[int]) -> int:
    """What the model below says after these tokens: it depends on all of them."""
    return (sum((i + 1) * token for i, token in enumerate(tokens)) + len(tokens)) % 7


class Device:
    """Pages of tokens, written and read as the tables say; results are handed out a round late."""

    def __init__(self, num_shards=1, num_pages=8, num_rows=4, *, chunk=16, steps=3, most=1, limits=(None,), **options):
        pools = [PagePool(num_pages, SIZE) for _ in range(num_shards)]
        self.scheduler = Scheduler(
            pools,
            num_rows,
            chunks=ChunkSizes(chunk, chunk, 4, 4, 64, 1 / 4),
            steps=steps,
            tokens_a_step=most,
            **options,
        )
        self.steps, self.num_pages, self.most, self.draw = steps, num_pages, most, random.Random(7)
        self.limits = limits  # of chunks
        self.memory = [[[None] * SIZE for _ in range(num_pages)] for _ in pools]
        self.rows = {}  # (shard, row) -> tokens, the last of which is not in a page yet
        self.in_flight = []
        self.done = []
        self.computed = 0

    def write(self, sequence, position, token):
        self.memory[sequence.shard][sequence.pages[position // SIZE]][position % SIZE] = token

    def read(self, sequence, length):
        pages = self.memory[sequence.shard]
        return [pages[sequence.pages[p // SIZE]][p % SIZE] for p in range(length)]

    def prefill(self, chunk: Chunk):
        sequence, start, stop = chunk
        for position in range(start, stop):
            self.write(sequence, position, sequence.tokens[position])
        assert self.read(sequence, stop) == sequence.tokens[:stop]
        self.computed += stop - start
        if stop < sequence.to_fill:
            return (sequence, [], 0)
        token = next_token(sequence.tokens)
        self.rows[sequence.shard, sequence.row] = [*sequence.tokens, token]
        return (sequence, [token], 1)

    def decode(self, sequence):
        tokens, new = self.rows[sequence.shard, sequence.row], []
        for _ in range(self.steps):
            right = self.draw.randint(1, self.most)  # of its guesses, and the token after them
            for _ in range(right):
                if len(tokens) == sequence.limit or tokens[-1] == sequence.request:  # its stop token
                    break
                self.write(sequence, len(tokens) - 1, tokens[-1])
                tokens.append(next_token(self.read(sequence, len(tokens))))
                new.append(tokens[-1])
            for position in range(len(tokens) - 1, len(tokens) - 1 + self.most - right):
                if position < SIZE * len(sequence.pages):
                    self.write(sequence, position, "wrong")
        return (sequence, new, self.steps)

    def round(self):
        scheduler = self.scheduler
        decoding = scheduler.plan_decode()
        chunks = scheduler.plan_prefill(self.draw.choice(self.limits))
        now = [self.prefill(chunk) for chunk in chunks]
        scheduler.prefilled(chunks)
        now += [self.decode(sequence) for sequence in decoding]
        scheduler.decoded(decoding, self.steps)
        late, self.in_flight = self.in_flight, now
        for sequence, tokens, expected in late:
            if sequence in self.done:
                continue
            scheduler.received(sequence, tokens, expected)
            if len(sequence.tokens) == sequence.limit or (tokens and tokens[-1] == sequence.request):
                self.end(sequence)
        return chunks, decoding

    def end(self, sequence):
        self.scheduler.remove(sequence)
        self.done.append(sequence)

    @property
    def busy(self):
        return bool(self.scheduler.waiting or self.scheduler.running)

    def run(self, *sequences):
        for sequence in sequences:
            self.scheduler.add(sequence)
        while self.busy:
            self.round()


def alone(prompt, limit, stop=None):
    tokens = list(prompt)
    while len(tokens) < limit:
        tokens.append(next_token(tokens))
        if tokens[-1] == stop:
            break
    return tokens


@pytest.mark.parametrize(("num_shards", "most"), [(1, 1), (2, 1), (1, 4), (2, 4)])
@pytest.mark.parametrize("share", [True, False])
def test_ten_thousand_random_requests_with_aborts_say_the_right_tokens_and_leave_every_page_free(
    num_shards, most, share
):
    """Also where a step brings up to most tokens, and leaves wrong guesses after them in the pages."""
    draw = random.Random(num_shards)
    device = Device(num_shards, num_pages=9, chunk=64, most=most, limits=(None, 20), share_prefixes=share)
    scheduler, sent, expected = device.scheduler, 0, {}
    while sent < 2500 or device.busy:
        if sent < 2500 and draw.random() < 0.5:
            sent += 1
            prompt = [draw.randrange(2) for _ in range(draw.randint(1, 12))]
            stop = draw.choice([None, None, 3])
            sequence = Sequence(prompt, min(36, len(prompt) + draw.randint(1, 30)), request=stop)
            expected[sequence] = alone(prompt, sequence.limit, stop)
            scheduler.add(sequence)
        live = [*scheduler.running, *scheduler.waiting]
        if live and draw.random() < 0.1:
            gone = draw.choice(live)
            device.end(gone)
            expected[gone] = expected[gone][: len(gone.tokens)]
        device.round()
        held = {(s.shard, page) for s in scheduler.running for page in s.pages}
        assert sum(pool.available for pool in scheduler.pools) == 9 * num_shards - len(held)
    assert len(device.done) == sent and scheduler.preemptions > 100
    assert all(sequence.tokens == expected[sequence] for sequence in device.done)
    assert all(pool.available == 9 for pool in scheduler.pools)


def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode():
    device = Device(num_pages=30)
    short, long = Sequence([1], 60), Sequence([2] * 40, 50)
    device.scheduler.add(short)
    device.round()
    device.scheduler.add(long)
    rounds = [device.round() for _ in range(3)]
    assert [chunk[1:] for chunks, _ in rounds for chunk in chunks] == [(0, 16), (16, 32), (32, 40)]
    assert all(decoding == [short] for _, decoding in rounds)


def test_chunks_that_begin_a_prompt_are_padded_by_less_and_others_more_coarsely():
    sizes = ChunkSizes(longest=512, together=128, row_base=2, later_base=4, finest=32, part=1 / 8)
    lengths = {
        fresh: sorted({sizes.length(tokens, fresh=fresh) for tokens in range(1, 513)}) for fresh in (True, False)
    }
    assert lengths == {True: [16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512], False: [16, 64, 256, 512]}
    assert all(
        tokens <= sizes.length(tokens, fresh=True) < max(tokens + 32, 1.25 * tokens) for tokens in range(33, 513)
    )
    within = {
        fresh: [sizes.shape_within(n, fresh=fresh) for n in (1, 63, 64, 255, 256, 999)] for fresh in (True, False)
    }
    assert within == {True: [16, 32, 64, 224, 256, 512], False: [16, 16, 64, 64, 256, 512]}
    assert sorted(sizes.shapes(16, fresh=True))[:5] == [(1, 16), (1, 32), (1, 64), (1, 96), (1, 128)]
    for tokens, count in itertools.product((1, 40, 100, 300), range(1, 9)):
        length = sizes.length(tokens, fresh=True)
        rows = sizes.rows(count, length, 16)
        assert (rows, length) in set(sizes.shapes(16, fresh=True)) and rows * length <= max(128, length)


def test_chunks_that_are_no_longer_share_a_dispatch_within_its_tokens():
    device = Device(num_pages=30, chunk=64)
    for length in (30, 20, 40, 5):
        device.scheduler.add(Sequence([length] * length, length + 2))
    chunks, _ = device.round()
    assert [chunk.stop for chunk in chunks] == [30, 20]
    chunks, _ = device.round()
    assert [chunk.stop for chunk in chunks] == [40]


def test_a_prompt_that_is_known_computes_what_comes_after_its_last_full_page():
    device = Device(num_pages=30)
    device.run(Sequence([*range(14)], 20))
    before = device.computed
    again = Sequence([*range(14)], 20)
    device.run(again)
    assert (device.computed - before, again.found) == (2, 12)


def test_the_last_token_of_a_prompt_is_computed_even_if_all_its_pages_are_known():
    device = Device(num_pages=30)
    device.run(Sequence([*range(8)], 14))
    again = Sequence([*range(8)], 14)
    device.run(again)
    assert again.found == 4


def test_an_answer_is_known_when_the_dialog_goes_on():
    device = Device(num_pages=30)
    first = Sequence([*range(10)], 23)
    device.run(first)
    second = Sequence([*first.tokens, 1, 2], 30)
    device.run(second)
    assert second.found == 20  # 22 of its tokens were cached


def test_prompts_that_begin_alike_and_come_together_compute_their_beginning_once():
    device = Device(num_pages=30, chunk=64)
    sequences = [Sequence([*range(40), i], 45) for i in range(4)]
    device.run(*sequences)
    assert device.computed == 41 + 3
    assert [sequence.found for sequence in sequences] == [0, 40, 40, 40]


def test_the_youngest_gives_up_its_pages_and_the_oldest_never_stops():
    device = Device(num_pages=8)
    old, young = Sequence([1] * 9, 30), Sequence([2] * 9, 30)
    device.run(old, young)
    assert device.done == [old, young]
    assert device.scheduler.preemptions > 0
    assert [old.tokens, young.tokens] == [alone([1] * 9, 30), alone([2] * 9, 30)]


def test_a_sequence_goes_where_its_beginning_is_known_and_else_where_most_rows_are_free():
    device = Device(num_shards=2, num_pages=30)
    device.run(Sequence([*range(9)], 12))
    shards = []
    for prompt in ([9] * 9, [8] * 9, [*range(9)]):
        device.scheduler.add(Sequence(prompt, 20))
        device.round()
        shards.append(device.scheduler.running[-1].shard)
    assert shards == [0, 1, 0]


def arrive(device, *sequences):
    """One a round, beside those that run; the shard of each."""
    for sequence in sequences:
        device.scheduler.add(sequence)
        device.round()
        device.round()  # and its pages are known to others
    return [sequence.shard for sequence in sequences]


def test_requests_of_several_beginnings_each_go_where_theirs_is_known():
    device = Device(num_shards=2, num_pages=90, num_rows=8)
    stems = [[stem] * 32 for stem in range(4)]
    sequences = [Sequence([*stems[i % 4], i], 60) for i in range(16)]
    shards = arrive(device, *sequences)
    assert [shards[i] for i in range(4, 16)] == shards[:4] * 3
    assert [sequence.found for sequence in sequences] == [0] * 4 + [32] * 12


def test_a_beginning_that_all_share_comes_to_every_shard_before_one_is_clearly_more_loaded():
    device = Device(num_shards=4, num_pages=400, num_rows=8)
    sequences = [Sequence([7] * 32 + [i], 200) for i in range(24)]
    shards = arrive(device, *sequences)
    assert shards[:6] == [0] * 6 and set(shards) == {0, 1, 2, 3}
    assert min(map(shards.count, range(4))) >= 3
    assert [sequence.found for sequence in sequences].count(0) == 4  # once a shard


def test_prompts_that_come_together_go_where_their_beginning_is_just_computed():
    device = Device(num_shards=2, num_pages=90)
    sequences = [Sequence([i % 2] * 60 + [i], 80) for i in range(4)]
    device.run(*sequences)
    assert [sequence.shard for sequence in sequences] == [0, 1, 0, 1]
    assert [sequence.found for sequence in sequences] == [0, 0, 60, 60]


def test_who_waits_long_for_a_beginning_that_is_just_computed_lets_others_pass():
    device = Device(num_pages=160)
    long, same, other = Sequence([5] * 200, 210), Sequence([5] * 201, 210), Sequence([3], 9)
    for sequence in (long, same, other):
        device.scheduler.add(sequence)
    device.round()
    assert device.scheduler.running == [long, other] and list(device.scheduler.waiting) == [same]
    while device.busy:
        device.round()
    assert same.found == 200


arrivals = strategies.lists(
    strategies.tuples(
        strategies.integers(0, 3),  # rounds before it comes
        strategies.integers(0, 2),  # which of three beginnings
        strategies.integers(0, 40),  # how much of it
        strategies.integers(1, 20),  # new tokens
    ),
    min_size=1,
    max_size=40,
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(arrivals=arrivals, num_shards=strategies.integers(2, 4))
def test_no_shard_starves_whatever_comes(arrivals, num_shards):
    """While one has a row free, nobody waits but for a beginning just computed, nor goes where much more is to do."""
    device = Device(num_shards, num_pages=100, num_rows=4)
    scheduler, slack, chunk = device.scheduler, 2, 16
    for pause, stem, length, room in arrivals:
        for _ in range(pause):
            device.round()
        prompt = [stem] * length + [9, room]
        scheduler.add(Sequence(prompt, len(prompt) + room))
        before = list(scheduler.running)
        rows = Counter(s.shard for s in before)
        to_do = Counter()
        for s in before:
            to_do[s.shard] += max(0, s.to_fill - s.cached)
        scheduler.plan_prefill()
        for s in scheduler.running[len(before) :]:
            for other in range(num_shards):
                if rows[other] < 4:
                    assert rows[s.shard] <= rows[other] + slack + (s.cached + to_do[other]) / chunk
            rows[s.shard] += 1
            to_do[s.shard] += s.to_fill - s.cached
        if min(rows[shard] for shard in range(num_shards)) < 4:
            filling = [s.tokens for s in scheduler.running if not s.filled]
            assert all(any(w.tokens[:SIZE] == tokens[:SIZE] for tokens in filling) for w in scheduler.waiting)
    while device.busy:
        device.round()
    assert all(pool.available == 100 for pool in scheduler.pools)


def test_a_pool_that_just_holds_all_runs_all_at_once():
    device = Device(num_pages=8, num_rows=4, chunk=64)
    for token in range(4):
        device.scheduler.add(Sequence([token] * (SIZE + 1), 2 * SIZE + 1))
    device.round()
    assert (len(device.scheduler.running), device.scheduler.pools[0].available) == (4, 0)


def test_requests_are_admitted_in_the_order_in_which_they_came():
    device = Device(num_pages=8, num_rows=2)
    sequences = [Sequence([i], 9) for i in range(5)]
    for sequence in sequences:
        device.scheduler.add(sequence)
    device.round()
    assert device.scheduler.running == sequences[:2]
    while device.busy:
        device.round()
    assert device.done == sequences


@pytest.mark.parametrize(
    ("number", "limit", "multiple", "size"), [(1, None, 1, 1), (5, None, 1, 8), (9, 12, 1, 12), (700, 999, 4, 1000)]
)
def test_a_bucket_is_a_power_of_two_within_its_limit_and_what_the_mesh_divides(number, limit, multiple, size):
    assert bucket(number, limit, multiple) == size
