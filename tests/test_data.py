"""Rows of packed documents: what is in them, and that the same row is always the same."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.prepared import write_prepared
from train.config import LengthWeight
from train.data import packing as data
from train.data.packing import PackedRows, heldout_by_source, heldout_rows, pack, share_past_half, stack
from train.data.shards import open_sources


def open_documents(directory, documents, *, split="train", vocab_size=1000, **options):
    """These documents as the only source of a prepared directory."""
    write_prepared(directory, {"text": {split: documents}}, vocab_size, **options)
    return open_sources(directory, split)["text"]


def numbered_documents(lengths):
    """Documents whose tokens are all different, so that each can be found again."""
    starts = np.cumsum([0, *lengths])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]


DOCUMENTS = numbered_documents(np.random.default_rng(0).integers(2, 40, size=37).tolist())
NUM_TOKENS = sum(map(len, DOCUMENTS))


@pytest.fixture
def dataset(tmp_path):
    return open_documents(tmp_path / "data", DOCUMENTS)


@pytest.fixture
def rows(dataset):
    return PackedRows(dataset, 16, seed=3)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_three_documents_are_packed_as_written_out_here(tmp_path):
    documents = {1: [1, 11, 12, 9], 2: [2, 21, 9], 3: [3, 31, 32, 33, 34, 9]}
    dataset = open_documents(tmp_path / "data", list(documents.values()))
    # Thirteen tokens: two rows of five inputs, the last target of the first row opens the second.
    rows = PackedRows(dataset, 5, next(seed for seed in range(99) if opens_with(dataset, seed, [2, 3, 1])))
    assert len(rows) == 2
    first, second = sorted((rows.row(0), rows.row(1)), key=lambda row: row.tokens[0] != 2)
    assert first.tokens.tolist() == [2, 21, 9, 3, 31]
    assert first.targets.tolist() == [21, 9, 3, 31, 32]
    assert first.positions.tolist() == [0, 1, 2, 0, 1]
    assert first.segment_ids.tolist() == [1, 1, 1, 2, 2]
    assert first.loss_mask.tolist() == [1, 1, 0, 1, 1]
    assert second.tokens.tolist() == [32, 33, 34, 9, 1]
    assert second.targets.tolist() == [33, 34, 9, 1, 11]
    assert second.positions.tolist() == [0, 1, 2, 3, 0]
    assert second.segment_ids.tolist() == [1, 1, 1, 1, 2]
    assert second.loss_mask.tolist() == [1, 1, 1, 0, 1]
    assert [array.dtype.name for array in first] == ["int32"] * 4 + ["float32"]


def opens_with(dataset, seed, order):
    """Whether the seed's first epoch has the documents that start with these tokens in this order."""
    row = PackedRows(dataset, 12, seed).row(0)
    return row.tokens[row.positions == 0].tolist() == order


def test_a_target_that_opens_the_next_document_at_the_end_of_a_row_is_masked(tmp_path):
    dataset = open_documents(tmp_path / "data", [[1, 7, 9], [1, 7, 9]])
    row = PackedRows(dataset, 3, seed=0).row(0)
    assert row.targets.tolist() == [7, 9, 1] and row.loss_mask.tolist() == [1, 1, 0]
    assert row.segment_ids.tolist() == [1, 1, 1]


def test_every_token_is_an_input_once_an_epoch_but_for_less_than_a_row(rows):
    for epoch in range(3):
        inputs = np.concatenate([rows.row(epoch * len(rows) + i).tokens for i in range(len(rows))])
        assert len(np.unique(inputs)) == len(inputs)
        assert 1 <= NUM_TOKENS - len(inputs) <= rows.seq_len


def test_every_prediction_within_a_document_is_trained_once_an_epoch(rows):
    epoch = [rows.row(i) for i in range(len(rows))]
    pairs = []
    for row in epoch:
        kept = row.loss_mask > 0
        pairs += zip(row.tokens[kept].tolist(), row.targets[kept].tolist(), strict=True)
    inside = set(range(NUM_TOKENS)) - {document[-1] for document in DOCUMENTS}
    assert all(target == token + 1 for token, target in pairs)
    assert len(set(pairs)) == len(pairs) and {token for token, _ in pairs} <= inside
    assert len(inside) - len(pairs) <= rows.seq_len


def test_positions_restart_exactly_where_segments_do(rows):
    starts = {document[0] for document in DOCUMENTS}
    for index in range(len(rows)):
        row = rows.row(index)
        opens = np.concatenate([[True], np.diff(row.segment_ids) == 1])
        np.testing.assert_array_equal(row.positions == 0, opens)
        assert row.segment_ids[0] == 1 and set(np.diff(row.segment_ids)) <= {0, 1}
        assert all((token in starts) == opened for token, opened in zip(row.tokens[1:], opens[1:], strict=True))


def test_epochs_and_seeds_have_different_orders(dataset, rows):
    assert not np.array_equal(rows.row(0).tokens, rows.row(len(rows)).tokens)
    other = PackedRows(dataset, 16, seed=4)
    assert not np.array_equal(rows.row(0).tokens, other.row(0).tokens)


def test_a_later_stage_has_an_order_of_its_own(dataset, rows):
    first, second = (PackedRows(dataset, 16, seed=3, stage=stage) for stage in (0, 1))
    assert_same(first.row(0), rows.row(0))
    assert not np.array_equal(first.row(0).tokens, second.row(0).tokens)
    assert not np.array_equal(first.row(len(first)).tokens, second.row(0).tokens)


def test_the_shuffle_is_the_documented_one_and_stays_so(rows):
    draws = np.random.Philox(np.random.SeedSequence(3, spawn_key=(1,))).random_raw(37)
    first = rows.dataset.document(int(np.argmin(draws)))
    opening = [row for i in range(len(rows)) if (row := rows.row(len(rows) + i)).tokens[0] == first[0]]
    assert len(opening) == 1 and opening[0].positions[0] == 0
    assert int(np.argmin(draws)) == 28


def test_rows_of_one_document_are_spread_over_the_epoch(tmp_path):
    long, short = [[1, *range(100, 700)], *([1, 7, 9] for _ in range(200))], 16
    rows = PackedRows(open_documents(tmp_path / "data", long), short, seed=0)
    from_long = [i for i in range(len(rows)) if rows.row(i).tokens.max() >= 100]
    assert max(from_long) - min(from_long) > 0.8 * len(rows)


def test_a_row_depends_on_neither_the_rows_before_nor_the_process(dataset, rows):
    indices = [5, 3 * len(rows) + 1, 0, len(rows) - 1, len(rows)]
    expected = {i: rows.row(i) for i in range(3 * len(rows) + 2)}
    for index in indices:
        assert_same(rows.row(index), expected[index])
        assert_same(PackedRows(dataset, 16, seed=3).row(index), expected[index])


def test_short_documents_are_left_out_on_request(tmp_path):
    dataset = open_documents(tmp_path / "data", numbered_documents([5, 20, 19, 30]))
    rows = PackedRows(dataset, 7, seed=0, min_document_tokens=20)
    assert len(rows) == (50 - 1) // 7
    seen = {token for i in range(len(rows)) for token in rows.row(i).tokens.tolist()}
    assert seen <= {*range(5, 25), *range(44, 74)} and len(seen) == 49


def test_ids_beyond_uint16_survive(tmp_path):
    dataset = open_documents(tmp_path / "data", [[128_000, 70_000, 128_001]], vocab_size=128_256, dtype="uint32")
    assert PackedRows(dataset, 2, seed=0).row(0).targets.tolist() == [70_000, 128_001]


def test_heldout_rows_are_the_openings_of_long_documents_in_stored_order(tmp_path):
    documents = numbered_documents([9, 3, 8, 20, 9])
    dataset = open_documents(tmp_path / "data", documents, split="heldout")
    batch = heldout_rows(dataset, 8, count=2)
    assert batch.tokens.tolist() == [documents[0][:8], documents[3][:8]]
    assert batch.targets.tolist() == [documents[0][1:9], documents[3][1:9]]
    assert batch.positions.tolist() == [list(range(8))] * 2
    assert (batch.segment_ids == 1).all() and (batch.loss_mask == 1).all()
    assert heldout_rows(dataset, 8, count=9).tokens.shape == (3, 8)
    assert heldout_rows(dataset, 8, count=9, min_document_tokens=10).tokens.tolist() == [documents[3][:8]]


def test_heldout_rows_name_the_longest_document_when_none_is_long_enough(tmp_path):
    dataset = open_documents(tmp_path / "data", [[1] * 20], split="heldout")
    with pytest.raises(ValueError, match="no document has the 21 tokens .* longest has 20"):
        heldout_rows(dataset, 20, count=1)


def test_heldout_rows_by_source_leave_out_sources_of_short_documents(tmp_path):
    long, short = numbered_documents([20, 9, 30]), numbered_documents([5, 8])
    write_prepared(tmp_path, {"a": {"heldout": long}, "b": {"heldout": short}}, 1000)
    sources = open_sources(tmp_path, "heldout")
    batches = heldout_by_source(sources, 8, count=2)
    assert list(batches) == ["a"] and batches["a"].tokens.tolist() == [long[0][:8], long[1][:8]]
    assert {name: len(b.tokens) for name, b in heldout_by_source(sources, 4, count=9).items()} == {"a": 3, "b": 2}
    with pytest.raises(ValueError, match="no document of any source has the 31 tokens .* longest has 30"):
        heldout_by_source(sources, 30, count=1)


@pytest.mark.parametrize(("lengths", "share"), [([9], 4 / 8), ([5, 4], 1 / 8), ([4, 5], 0.0)])
def test_the_share_past_half_counts_tokens_that_can_see_half_the_window(lengths, share):
    row = pack([np.arange(length) for length in lengths])  # 8 inputs, and a target
    assert share_past_half(row) == share
    assert share_past_half(stack([row, row])) == share


def test_a_row_is_the_same_over_one_shard_and_over_many(tmp_path, rows):
    many = PackedRows(open_documents(tmp_path / "many", DOCUMENTS, shard_tokens=100), 16, seed=3)
    assert len(many.dataset.shards) > 5 and len(many) == len(rows)
    for index in range(2 * len(rows)):
        assert_same(many.row(index), rows.row(index))


def test_sources_of_other_names_have_other_orders(dataset, rows):
    named = [PackedRows(dataset, 16, seed=3, source=name) for name in ("a", "b")]
    tokens = {other.row(0).tokens.tobytes() for other in (*named, rows)}
    assert len(tokens) == 3


@pytest.fixture
def grouped(tmp_path, monkeypatch):
    """Rows over groups of at most two shards of a few documents each."""
    dataset = open_documents(tmp_path / "grouped", DOCUMENTS, shard_tokens=100)
    monkeypatch.setattr(data, "GROUP_DOCUMENTS", 2 * max(shard.num_documents for shard in dataset.shards))
    rows = PackedRows(dataset, 16, seed=3)
    assert rows._group_shards == 2 and len(dataset.shards) % 2 == 1
    return rows


def test_groups_of_shards_hold_every_token_once_an_epoch_but_for_a_row_each(grouped):
    num_groups = (len(grouped.dataset.shards) + 1) // 2
    assert len(grouped) == -(-NUM_TOKENS // 16) - num_groups
    for epoch in range(3):
        inputs = np.concatenate([grouped.row(epoch * len(grouped) + i).tokens for i in range(len(grouped))])
        assert len(np.unique(inputs)) == len(inputs) == 16 * len(grouped)


def test_each_epoch_groups_the_shards_anew_and_two_groups_are_kept(grouped):
    groups = []
    for index in range(3 * len(grouped)):
        grouped.row(index)
        assert len(grouped._groups) <= 2
        key = (grouped._groups[-1].epoch, tuple(map(id, grouped._groups[-1].shards)))
        groups += [key] if key not in groups else []
    opened = [[shards for epoch, shards in groups if epoch == e] for e in range(3)]
    assert opened[0] != opened[1] != opened[2]
    assert all(len({shard for group in epoch for shard in group}) == sum(map(len, epoch)) for epoch in opened)
    kept = {shard for group in grouped._groups for shard in group.shards}
    assert {shard for shard in grouped.dataset.shards if shard._tokens is not None} <= kept


def test_rows_over_groups_depend_on_neither_the_rows_before_nor_the_thread(grouped):
    last = 3 * len(grouped)
    expected = [grouped.row(index) for index in range(last)]
    fresh = PackedRows(grouped.dataset, 16, seed=3)
    order = np.random.default_rng(0).permutation(last)
    with ThreadPoolExecutor(4) as pool:
        for index, row in zip(order, pool.map(fresh.row, order), strict=True):
            assert_same(row, expected[index])


def times_read(rows, epoch):
    """How often each token is an input in an epoch."""
    inputs = [rows.row(epoch * len(rows) + i).tokens for i in range(len(rows))]
    return np.bincount(np.concatenate(inputs), minlength=NUM_TOKENS)


def test_a_whole_length_weight_is_how_often_a_document_comes(dataset):
    weights = [LengthWeight(10, 2.0), LengthWeight(30, 3.0), LengthWeight(35, 0.0)]
    rows = PackedRows(dataset, 4, seed=3, length_weights=weights)
    expected = [(1, 2, 3, 0)[np.searchsorted([10, 30, 35], len(d), side="right")] for d in DOCUMENTS]
    assert len(rows) == (sum(e * len(d) for e, d in zip(expected, DOCUMENTS, strict=True)) - 1) // 4
    read = times_read(rows, 0)
    wrong = sum(abs(read[token] - e) for e, d in zip(expected, DOCUMENTS, strict=True) for token in d)
    assert 1 <= wrong <= 4  # what is left after the last row


def test_a_broken_length_weight_holds_on_the_mean_of_epochs_of_equally_many_rows(dataset):
    rows = PackedRows(dataset, 4, seed=3, length_weights=[LengthWeight(0, 1.5)])
    assert len(rows) == (int(1.5 * NUM_TOKENS) - 1) // 4
    epochs = np.stack([times_read(rows, epoch) for epoch in range(40)])
    assert set(np.unique(epochs[:, 1:-1])) <= {0, 1, 2}
    by_document = np.array([epochs[:, document].mean() for document in DOCUMENTS])
    assert by_document.mean() == pytest.approx(1.5, abs=0.02)
    assert 1.2 < by_document.min() and by_document.max() < 1.8  # 0.5 / sqrt(40) = 0.08 is one deviation
    assert not np.array_equal(epochs[0], epochs[1])


def test_rows_that_nothing_fills_are_refused(dataset):
    with pytest.raises(ValueError, match="do not fill a row of seq_len=100000"):
        PackedRows(dataset, 100_000, seed=0)
    with pytest.raises(ValueError, match="no document of source a reaches .*5000, the longest has 38"):
        PackedRows(dataset, 16, seed=0, source="a", min_document_tokens=5000)
    with pytest.raises(ValueError, match="^0 tokens in documents of at least 0 do not fill"):
        PackedRows(dataset, 16, seed=0, length_weights=[LengthWeight(0, 0.0)])
    with pytest.raises(ValueError, match="length_weights count from 0"):
        PackedRows(dataset, 16, seed=0, length_weights=[LengthWeight(0, -1.0)])
