"""The stream of batches: the same from any state and for any share of the rows, and no thread left behind."""

import itertools
import json
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx

import llama_jax
from llama_jax.mesh import sharding_rules
from llama_jax.model import Llama
from tests.prepared import write_prepared
from tests.processes import free_address, outputs, start_python, until
from tests.tiny import TINY
from train.data.mixture import Mixture
from train.data.packing import Batch, PackedRows, stack
from train.data.shards import open_sources
from train.data.stream import Stream
from train.device import local_rows, put_batch
from train.evaluation import row_losses

SHARES = {"code": 0.5, "web/de": 0.3, "web/en": 0.2}
SEQ_LEN, NUM_ROWS = 16, 8


def shares(number):
    """A mixture that changes twice; the second leaves a source out."""
    return SHARES if number < 5 or number >= 9 else {"code": 0.25, "web/en": 0.75}


@pytest.fixture
def rows(tmp_path):
    generator = np.random.default_rng(0)
    documents = {
        name: {"train": [generator.integers(0, 128, generator.integers(3, 40)).tolist() for _ in range(12)]}
        for name in SHARES
    }
    sources = open_sources(write_prepared(tmp_path, documents, 128, shard_tokens=90), "train")
    return {name: PackedRows(data, SEQ_LEN, seed=3, source=name) for name, data in sources.items()}


def taken(count, *args, **kwargs):
    with Stream(*args, **kwargs) as stream:
        return list(itertools.islice(stream, count)), stream.state()


def assert_same(batches, others):
    assert len(batches) == len(others)
    for a, b in zip(batches, others, strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)


def no_thread_reads() -> bool:
    """Whether no thread is there that reads ahead; one that is at a batch finishes it first."""
    return not any(thread.name.startswith("grain") for thread in threading.enumerate())


def test_batches_are_the_rows_that_the_mixture_picks(rows):
    batches, state = taken(12, rows, shares, NUM_ROWS, state={})
    mixture = Mixture(SHARES)
    for number, batch in enumerate(batches):
        mixture.set_shares(shares(number))
        picks = mixture.take(NUM_ROWS)
        assert_same([batch], [stack([rows[name].row(row) for name, row in picks])])
        assert ("web/de" in dict(picks)) == (number < 5 or number >= 9)
    assert state == mixture.state()
    assert any(state[name][0] > 2 * len(rows[name]) for name in rows), "no source came to its third epoch"


@pytest.mark.parametrize("stop", [1, 4, 5, 7, 9, 20])
def test_a_stream_goes_on_from_its_state_across_mixtures_and_epochs(rows, stop):
    whole, end = taken(26, rows, shares, NUM_ROWS, state={})
    before, state = taken(stop, rows, shares, NUM_ROWS, state={})
    state = json.loads(json.dumps(state))  # as a checkpoint keeps it
    after, after_end = taken(26 - stop, rows, shares, NUM_ROWS, state=state, batch_number=stop)
    assert_same(before + after, whole)
    assert after_end == end


@pytest.mark.parametrize("shares_of", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 4], [1, 5], [2, 6], [3, 7]]])
def test_the_processes_rows_are_the_global_batch_also_after_a_resume_on_other_processes(rows, shares_of):
    whole, end = taken(14, rows, shares, NUM_ROWS, state={})
    _, state = taken(6, rows, shares, NUM_ROWS, state={})
    joined = [[[None] * NUM_ROWS for _ in whole[0]] for _ in range(8)]
    for mine in shares_of:
        parts, part_end = taken(8, rows, shares, NUM_ROWS, state=state, batch_number=6, mine=mine)
        assert part_end == end
        for number, array, (place, row) in itertools.product(range(8), range(5), enumerate(mine)):
            joined[number][array][row] = parts[number][array][place]
    assert_same(joined, whole[6:])


def test_the_state_is_that_of_the_last_batch_handed_out_whatever_was_read_ahead(rows):
    with Stream(rows, shares, NUM_ROWS, state={}) as stream:
        assert stream.state() == {}
        next(stream)
        time.sleep(0.05)  # for what is read ahead
        assert sum(row for row, _ in stream.state().values()) == NUM_ROWS


class CountedRows:
    """Rows that are read when somebody waits for them, by a clock that each moves on a second, or fail at one."""

    def __init__(self):
        self.fail_at, self.num_read, self.awaited = None, 0, threading.Event()

    def __len__(self):
        return 100

    def clock(self):
        self.awaited.set()
        return float(self.num_read)

    def row(self, index):
        assert self.awaited.wait(120)
        self.num_read += 1
        if index == self.fail_at:
            raise OSError(5, "Input/output error", "code/train-00000.tokens")
        array = np.full(4, index)
        return Batch(*(array,) * 5)


def only(number):
    return {"a": 1.0}


@pytest.fixture
def counted(monkeypatch):
    """The rows, by whose clock a stream counts the seconds that it waits."""
    rows = CountedRows()
    monkeypatch.setattr("train.data.stream.time", SimpleNamespace(perf_counter=rows.clock))
    return rows


def test_reading_goes_on_while_the_step_computes_and_waits_are_counted(counted):
    with Stream({"a": counted}, only, 2, state={}) as stream:
        next(stream)
        assert stream.take_wait() >= 2
        assert stream.take_wait() == 0
        until(lambda: counted.num_read >= 6)  # two batches more than were asked for


def test_an_error_in_a_reading_thread_arrives_as_itself_at_its_batch_and_ends_the_threads(counted):
    counted.fail_at = 7
    stream = Stream({"a": counted}, only, 2, state={})
    for _ in range(3):
        next(stream)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: 'code/train-00000.tokens'$"):
        next(stream)
    until(no_thread_reads)
    with pytest.raises(ValueError, match="closed"):
        next(stream)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None])
def test_no_thread_is_left_behind(rows, error):
    try:
        with Stream(rows, shares, NUM_ROWS, state={}) as stream:
            next(stream)
            if error:
                raise error
    except (KeyboardInterrupt, ValueError):
        pass
    until(no_thread_reads)
    assert no_thread_reads()


@pytest.mark.parametrize("mesh", ["data=1", "fsdp=8", "data=2,context=2,tensor=2", "context=8"])
def test_a_batch_lies_on_the_mesh_as_it_is(rows, mesh):
    (batch,), _ = taken(1, rows, shares, NUM_ROWS, state={})
    with llama_jax.use_mesh(mesh):
        rules = sharding_rules(TINY)
        assert local_rows(NUM_ROWS, SEQ_LEN, rules) == list(range(NUM_ROWS))
        for placed in (put_batch(batch, rules), put_batch(batch, rules, rows=range(NUM_ROWS), num_rows=NUM_ROWS)):
            assert_same([placed], [batch])


@pytest.mark.parametrize(
    ("mesh", "expected"), [("fsdp=8", [4, 5, 6, 7]), ("fsdp=4,context=2", [4, 5, 6, 7]), ("context=8", [*range(8)])]
)
def test_a_process_needs_the_rows_that_its_devices_hold_a_part_of_and_no_others(rows, monkeypatch, mesh, expected):
    """As far as one process can pretend to be the second of two, with devices 4 to 7."""
    (batch,), _ = taken(1, rows, shares, NUM_ROWS, state={})
    with llama_jax.use_mesh(mesh):
        rules = sharding_rules(TINY)
        split = jax.sharding.NamedSharding(jax.sharding.get_mesh(), rules("batch", "sequence"))
        index = split.devices_indices_map((NUM_ROWS, SEQ_LEN))
        theirs = {device: part for device, part in index.items() if device.id >= 4}
        monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, _, part: [*map(part, theirs.values())])
        monkeypatch.setattr(type(split), "addressable_devices_indices_map", lambda self, shape: theirs)
        mine = local_rows(NUM_ROWS, SEQ_LEN, rules)
        assert mine == expected
        placed = put_batch(Batch(*(array[mine] for array in batch)), rules, rows=mine, num_rows=NUM_ROWS)
    for parts, array in zip(placed, batch, strict=True):
        for part, index in zip(parts, theirs.values(), strict=True):
            np.testing.assert_array_equal(part, array[index])


PROCESS = """
import json, sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import llama_jax
from llama_jax.mesh import sharding_rules
from tests.tiny import TINY
from train.data.packing import Batch
from train.device import local_rows, put_batch
whole = np.arange(8 * 16, dtype=np.int32).reshape(8, 16)
with llama_jax.use_mesh(sys.argv[3]):
    rules = sharding_rules(TINY)
    mine = local_rows(8, 16, rules)
    batch = put_batch(Batch(*(whole[mine],) * 5), rules, rows=mine, num_rows=8)
    print(json.dumps([mine, jax.jit(lambda x: jax.sharding.reshard(x, jax.P()))(batch.tokens).tolist()]))
"""


@pytest.mark.parametrize(("mesh", "mine"), [("context=8", [8, 8]), ("fsdp=4,context=2", [4, 4])])
def test_two_processes_put_a_batch_on_a_mesh_whose_context_axis_may_cross_them(mesh, mine):
    address = free_address()
    results = outputs(*(start_python(PROCESS, address, process, mesh) for process in (0, 1)))
    assert [len(rows) for rows, _ in results] == mine
    for _, tokens in results:
        np.testing.assert_array_equal(tokens, np.arange(8 * 16).reshape(8, 16))


def test_a_change_of_one_document_in_a_mixture_leaves_the_losses_of_the_others_to_the_bit(rows):
    (batch,), _ = taken(1, rows, shares, NUM_ROWS, state={})
    second = batch.segment_ids == 2
    assert second.any(axis=1).sum() > 2
    changed = batch._replace(tokens=np.where(second, (batch.tokens + 1) % 128, batch.tokens))
    with llama_jax.use_mesh("data=1"):
        model = jax.jit(lambda: Llama(TINY, rngs=nnx.Rngs(0)))()
        before, after = (np.asarray(row_losses(model, put_batch(b, model.rules), "float32")) for b in (batch, changed))
    np.testing.assert_array_equal(after[~second], before[~second])
    assert (after[second] != before[second]).all()
