"""The synthetic recall source and the needles: what a row holds, and what counts as found."""

import dataclasses
import re
from collections import Counter, defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llama_jax
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer
from tests.prepared import write_prepared
from tests.tiny import TINY
from train.data import recall
from train.data.packing import Batch
from train.data.recall import RecallRows, answer_hits, found_needles, needle_rows
from train.data.shards import open_sources
from train.device import put_batch

BEGIN, END = 256, 257
LENGTH = 1024
SMALL = dataclasses.replace(TINY, vocab_size=258, num_layers=2)
STATEMENT = re.compile(r"\n (\w+ \w+) ((?: ?\w+)+)\.\n")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte is a token."""
    pieces = [bytes([i]) for i in range(256)] + [b"", b""]
    special = {"<|begin_of_text|>": BEGIN, "<|end_of_text|>": END}
    return Tokenizer(lambda text: list(text.encode()), pieces, special, BEGIN, END, 0, frozenset({END}))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Documents of a letter each, in two shards."""
    documents = [[BEGIN, *[ord(letter)] * 300, END] for letter in "abcdefgh"]
    directory = write_prepared(
        tmp_path_factory.mktemp("data"), {"text": {"heldout": documents}}, 258, shard_tokens=1300
    )
    return open_sources(directory, "heldout")["text"]


@pytest.fixture(scope="module")
def rows(text, tokenizer):
    return RecallRows(LENGTH, 0, text=text, tokenizer=tokenizer)


def decoded(row: Batch) -> str:
    """A row with its last target, as text."""
    return bytes([*row.tokens[1:].tolist(), int(row.targets[-1])]).decode()


def test_a_row_is_one_document_whose_every_token_is_learned(rows):
    row = rows.row(0)
    assert row.tokens[0] == BEGIN
    assert row.tokens[1:].tolist() == row.targets[:-1].tolist()
    assert row.positions.tolist() == list(range(LENGTH))
    assert set(row.segment_ids) == {1}
    assert set(row.loss_mask) == {1.0}
    assert max(row.tokens[1:]) < BEGIN, "special tokens of the text stay out"


def test_a_row_depends_on_seed_stage_length_and_index_alone(rows, text, tokenizer):
    def first(seq_len=LENGTH, seed=0, stage=0, index=0):
        return decoded(RecallRows(seq_len, seed, stage=stage, text=text, tokenizer=tokenizer).row(index))[:200]

    rows.row(7)
    different = {first(), first(seq_len=2 * LENGTH), first(seed=1), first(stage=1), first(index=1)}
    assert len(different) == 5
    assert first(index=3) == decoded(rows.row(3))[:200]


def test_every_value_is_said_twice_or_more_and_stays_the_same(rows):
    for index in range(20):
        values = defaultdict(Counter)
        for key, value in STATEMENT.findall(decoded(rows.row(index))):
            values[key][value] += 1
        assert all(len(said) == 1 for said in values.values())
        # The last statement may be cut off at the end of the row.
        assert sum(min(said.values()) < 2 for said in values.values()) <= 1


def test_distances_go_from_near_to_almost_the_whole_window(rows):
    distances = []
    for index in range(40):
        last = {}
        for found in STATEMENT.finditer(decoded(rows.row(index))):
            distances.append((found.start() - last[found[1]]) / LENGTH if found[1] in last else None)
            last[found[1]] = found.start()
    known = [distance for distance in distances if distance is not None]
    assert min(known) < 0.1
    assert max(known) > 0.8


def test_rows_have_as_many_statements_as_fit_in_their_share(rows):
    taken = [sum(len(found[0]) for found in STATEMENT.finditer(decoded(rows.row(i)))) for i in range(60)]
    share = np.mean(recall.SHARES)
    assert 0.8 * share < np.mean(taken) / LENGTH < 1.2 * share


def test_a_row_too_short_for_two_statements_is_refused(text, tokenizer):
    with pytest.raises(ValueError, match="seq_len=64 is too short for two statements"):
        RecallRows(64, 0, text=text, tokenizer=tokenizer)


def test_a_needle_is_stated_at_its_depth_and_asked_at_the_end(text, tokenizer):
    needles = needle_rows(text, tokenizer, seq_len=LENGTH, num_keys=3, num_depths=5)
    assert needles.batch.tokens.shape == (15, LENGTH)
    assert needles.depths.tolist() == np.repeat([0, 0.25, 0.5, 0.75, 1], 3).tolist()
    for i, depth in enumerate(needles.depths):
        row = Batch(*(array[i] for array in needles.batch))
        value = bytes(row.targets[-needles.answers[i] :].tolist()).decode()
        body, question = decoded(row).removesuffix(value).rsplit("\n", 1)
        stated = {found[1]: found for found in STATEMENT.finditer(body)}
        assert len(stated) == 3
        key = question.removeprefix(" ")
        assert f" {stated[key][2].strip()}" == value
        left = len(STATEMENT.sub("", body[: stated[key].start()])) / len(STATEMENT.sub("", body))
        assert left == pytest.approx(depth, abs=0.01)


def test_needles_that_do_not_fit_are_refused(text, tokenizer):
    with pytest.raises(ValueError, match="4 keys and a question do not fit in seq_len=128"):
        needle_rows(text, tokenizer, seq_len=128, num_keys=4, num_depths=2)


def tiny_model() -> Llama:
    return jax.jit(lambda: Llama(SMALL, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize("mesh", ["data=1", "fsdp=2,context=2,tensor=2", "context=4,tensor=2"])
def test_a_token_is_hit_where_it_is_the_most_likely_of_all_logits(mesh):
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 32)).astype(np.int32)
    where = np.tile(np.arange(32, dtype=np.int32), (2, 1)), np.ones((2, 32), np.int32)
    with llama_jax.use_mesh(mesh):
        params = tiny_model()
        likely = np.asarray(jnp.argmax(jax.sharding.reshard(params(tokens), jax.P()), axis=-1), np.int32)
        targets = np.where(np.arange(32) % 3 == 0, (likely + 1) % SMALL.vocab_size, likely)
        batch = put_batch(Batch(tokens, targets, *where, np.ones((2, 32), np.float32)), params.rules)
        hits = np.asarray(answer_hits(params, batch, jnp.float32, 5))
    assert hits.tolist() == [(np.arange(27, 32) % 3 != 0).tolist()] * 2


def test_a_needle_counts_as_found_if_every_token_of_its_answer_is_hit(text, tokenizer, monkeypatch):
    needles = needle_rows(text, tokenizer, seq_len=LENGTH, num_keys=2, num_depths=2)
    longest = needles.answers.max()
    hits = np.arange(longest) >= longest - needles.answers[:, None]  # nothing but the answers
    hits[1, -1] = hits[2, -needles.answers[2]] = False
    batches = iter(np.split(hits, 2))
    monkeypatch.setattr(recall, "answer_hits", lambda *_: next(batches))
    with llama_jax.use_mesh("data=1"):
        cells = found_needles(
            tiny_model(),
            text,
            tokenizer=tokenizer,
            seq_len=LENGTH,
            num_keys=2,
            num_depths=2,
            compute_dtype=jnp.float32,
        )
    assert cells == [
        {"length": LENGTH, "depth": 0.0, "found": 1, "asked": 2},
        {"length": LENGTH, "depth": 1.0, "found": 1, "asked": 2},
    ]
