"""Rows of packed documents: what is in them, and that the same row is always the same."""

import json

import numpy as np
import pytest

from train.data import Batches, PackedRows, TokenDataset, heldout_rows


def write_dataset(directory, documents, *, split="train", vocab_size=1000, dtype="uint16"):
    """The on-disk format, written by hand."""
    directory.mkdir(exist_ok=True)
    lengths = [len(document) for document in documents]
    (directory / f"{split}.tokens").write_bytes(np.array(sum(documents, []), dtype).tobytes())
    (directory / f"{split}.offsets").write_bytes(np.cumsum([0, *lengths]).astype("<i8").tobytes())
    counts = {"documents": len(documents), "tokens": sum(lengths)}
    empty = {"documents": 0, "tokens": 0}
    splits = {"train": empty, "heldout": empty} | {split: counts}
    (directory / "metadata.json").write_text(
        json.dumps({"format_version": 1, "vocab_size": vocab_size, "dtype": dtype, "splits": splits})
    )
    return directory


def numbered_documents(lengths):
    """Documents whose tokens are all different, so that each can be found again."""
    starts = np.cumsum([0, *lengths])
    return [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=False)]


@pytest.fixture
def directory(tmp_path):
    lengths = np.random.default_rng(0).integers(2, 40, size=37).tolist()
    return write_dataset(tmp_path / "data", numbered_documents(lengths))


@pytest.fixture
def rows(directory):
    return PackedRows(TokenDataset(directory, "train"), 16, seed=3)


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_three_documents_are_packed_as_written_out_here(tmp_path):
    documents = {1: [1, 11, 12, 9], 2: [2, 21, 9], 3: [3, 31, 32, 33, 34, 9]}
    dataset = TokenDataset(write_dataset(tmp_path / "data", list(documents.values())), "train")
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
    dataset = TokenDataset(write_dataset(tmp_path / "data", [[1, 7, 9], [1, 7, 9]]), "train")
    row = PackedRows(dataset, 3, seed=0).row(0)
    assert row.targets.tolist() == [7, 9, 1] and row.loss_mask.tolist() == [1, 1, 0]
    assert row.segment_ids.tolist() == [1, 1, 1]


def test_every_token_is_an_input_once_an_epoch_but_for_less_than_a_row(rows):
    for epoch in range(3):
        inputs = np.concatenate([rows.row(epoch * len(rows) + i).tokens for i in range(len(rows))])
        assert len(np.unique(inputs)) == len(inputs)
        assert 1 <= len(rows.dataset.tokens) - len(inputs) <= rows.seq_len


def test_every_prediction_within_a_document_is_trained_once_an_epoch(rows):
    epoch = [rows.row(i) for i in range(len(rows))]
    pairs = []
    for row in epoch:
        kept = row.loss_mask > 0
        pairs += zip(row.tokens[kept].tolist(), row.targets[kept].tolist(), strict=True)
    inside = set(range(len(rows.dataset.tokens))) - set((rows.dataset.offsets[1:] - 1).tolist())
    assert all(target == token + 1 for token, target in pairs)
    assert len(set(pairs)) == len(pairs) and {token for token, _ in pairs} <= inside
    assert len(inside) - len(pairs) <= rows.seq_len


def test_positions_restart_exactly_where_segments_do(rows):
    starts = set(rows.dataset.offsets.tolist())
    for index in range(len(rows)):
        row = rows.row(index)
        opens = np.concatenate([[True], np.diff(row.segment_ids) == 1])
        np.testing.assert_array_equal(row.positions == 0, opens)
        assert row.segment_ids[0] == 1 and set(np.diff(row.segment_ids)) <= {0, 1}
        assert all((token in starts) == opened for token, opened in zip(row.tokens[1:], opens[1:], strict=True))


def test_epochs_and_seeds_have_different_orders(directory, rows):
    assert not np.array_equal(rows.row(0).tokens, rows.row(len(rows)).tokens)
    other = PackedRows(TokenDataset(directory, "train"), 16, seed=4)
    assert not np.array_equal(rows.row(0).tokens, other.row(0).tokens)


def test_a_later_stage_has_an_order_of_its_own(directory, rows):
    first, second = (PackedRows(TokenDataset(directory, "train"), 16, seed=3, stage=stage) for stage in (0, 1))
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
    rows = PackedRows(TokenDataset(write_dataset(tmp_path / "data", long), "train"), short, seed=0)
    from_long = [i for i in range(len(rows)) if rows.row(i).tokens.max() >= 100]
    assert max(from_long) - min(from_long) > 0.8 * len(rows)


def test_a_row_depends_on_neither_the_rows_before_nor_the_process(directory, rows):
    indices = [5, 3 * len(rows) + 1, 0, len(rows) - 1, len(rows)]
    expected = {i: rows.row(i) for i in range(3 * len(rows) + 2)}
    for index in indices:
        assert_same(rows.row(index), expected[index])
        assert_same(PackedRows(TokenDataset(directory, "train"), 16, seed=3).row(index), expected[index])


def test_batches_go_on_from_their_state_across_epochs(rows):
    batches = Batches(rows, 8)
    for _ in range(4):
        next(batches)
    resumed = Batches(rows, 8, start_row=batches.state())
    assert batches.state() == 32
    for _ in range(2 * len(rows) // 8 + 2):
        assert_same(next(batches), next(resumed))
    assert batches.state() > 2 * len(rows)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_the_shares_of_all_processes_are_the_global_batch(rows, process_count):
    shares = [Batches(rows, 8, process_index=p, process_count=process_count) for p in range(process_count)]
    whole = Batches(rows, 8)
    for _ in range(len(rows) // 4):
        parts = [next(share) for share in shares]
        assert_same([np.concatenate(arrays) for arrays in zip(*parts, strict=True)], next(whole))
    assert {share.state() for share in shares} == {whole.state()}


def test_a_batch_is_its_rows_stacked(rows):
    batch = next(Batches(rows, 4, start_row=2))
    assert batch.tokens.shape == (4, 16)
    assert_same([array[3] for array in batch], rows.row(5))


def test_short_documents_are_left_out_on_request(tmp_path):
    dataset = TokenDataset(write_dataset(tmp_path / "data", numbered_documents([5, 20, 19, 30])), "train")
    rows = PackedRows(dataset, 7, seed=0, min_document_tokens=20)
    assert len(rows) == (50 - 1) // 7
    seen = {token for i in range(len(rows)) for token in rows.row(i).tokens.tolist()}
    assert seen <= {*range(5, 25), *range(44, 74)} and len(seen) == 49


def test_ids_beyond_uint16_survive(tmp_path):
    dataset = TokenDataset(
        write_dataset(tmp_path / "data", [[128_000, 70_000, 128_001]], vocab_size=128_256, dtype="uint32"), "train"
    )
    assert PackedRows(dataset, 2, seed=0).row(0).targets.tolist() == [70_000, 128_001]


def test_heldout_rows_are_the_openings_of_long_documents_in_stored_order(tmp_path):
    documents = numbered_documents([9, 3, 8, 20, 9])
    dataset = TokenDataset(write_dataset(tmp_path / "data", documents, split="heldout"), "heldout")
    batch = heldout_rows(dataset, 8, count=2)
    assert batch.tokens.tolist() == [documents[0][:8], documents[3][:8]]
    assert batch.targets.tolist() == [documents[0][1:9], documents[3][1:9]]
    assert batch.positions.tolist() == [list(range(8))] * 2
    assert (batch.segment_ids == 1).all() and (batch.loss_mask == 1).all()
    assert heldout_rows(dataset, 8, count=9).tokens.shape == (3, 8)
    assert heldout_rows(dataset, 8, count=9, min_document_tokens=10).tokens.tolist() == [documents[3][:8]]


def test_heldout_rows_name_the_longest_document_when_none_is_long_enough(tmp_path):
    dataset = TokenDataset(write_dataset(tmp_path / "data", [[1] * 20], split="heldout"), "heldout")
    with pytest.raises(ValueError, match="no document has the 21 tokens .* longest has 20"):
        heldout_rows(dataset, 20, count=1)


def test_a_missing_directory_says_how_to_prepare_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m train.prepare --out"):
        TokenDataset(tmp_path / "nothing", "train")


def test_another_vocabulary_is_refused(directory):
    assert TokenDataset(directory, "train", vocab_size=1000).vocab_size == 1000
    with pytest.raises(ValueError, match="vocabulary of 1000, expected 128256"):
        TokenDataset(directory, "train", vocab_size=128_256)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.json", b'{"format_version": 1', "metadata.json is damaged"),
        ("metadata.json", b"[]", "metadata.json is damaged"),
        ("metadata.json", b'{"format_version": 0}', "has format 0, expected 1"),
        ("train.tokens", b"\0\0\0", "train.tokens is damaged: 3 bytes, expected"),
        ("train.offsets", None, "train.offsets is damaged: 0 bytes, expected 304"),
        ("train.offsets", np.zeros(38, "<i8").tobytes(), "train.offsets is damaged: not rising"),
    ],
)
def test_damage_is_named(directory, name, content, message):
    (directory / name).unlink()
    if content is not None:
        (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        TokenDataset(directory, "train")


def test_an_empty_or_unknown_split_is_refused(directory):
    with pytest.raises(ValueError, match="heldout split .* is empty"):
        TokenDataset(directory, "heldout")
    with pytest.raises(ValueError, match="'test' is unknown; expected one of train, heldout"):
        TokenDataset(directory, "test")


def test_rows_that_nothing_fills_are_refused(directory):
    dataset = TokenDataset(directory, "train")
    with pytest.raises(ValueError, match="do not fill a row of seq_len=100000"):
        PackedRows(dataset, 100_000, seed=0)
    with pytest.raises(ValueError, match="0 tokens in documents of at least 5000"):
        PackedRows(dataset, 16, seed=0, min_document_tokens=5000)


def test_processes_that_do_not_divide_the_batch_are_refused(rows):
    with pytest.raises(ValueError, match="batch_size=8 is not a positive multiple of process_count=3"):
        Batches(rows, 8, process_count=3)
    with pytest.raises(ValueError, match="process_index=2 is not below process_count=2"):
        Batches(rows, 8, process_index=2, process_count=2)
