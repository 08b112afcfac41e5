"""What is left out: near duplicates by MinHash, text of evaluation sets by n-grams of words."""

import gzip
import json
import random

import pytest

from train.preparation.corpus import Document
from train.preparation.dedup import Filters, Sieve, evaluation_ngrams, mark


def reasons(texts, filters):
    sieve = Sieve(filters)
    return [sieve.reason(mark(Document(text, "text"), filters)) for text in texts]


def words(count, seed=0):
    draw = random.Random(seed)
    return [f"w{draw.randrange(10**6)}" for _ in range(count)]


def test_the_first_of_equal_texts_stays():
    assert reasons(["a", " ", "b", "a", ""], Filters()) == ["", "blank", "", "duplicate", "blank"]


def test_near_duplicates_are_left_out_and_distant_texts_are_not():
    pytest.importorskip("datasketch", reason="datasketch is not installed")
    text = words(500)
    changed = [*text[:-3], *words(3, seed=1)]  # 493 of 499 5-grams are shared: a similarity of 0.98
    half = [*text[:250], *words(250, seed=2)]
    texts = [" ".join(text), " ".join(changed), " ".join(half), "short", "short one", "short  one"]
    assert reasons(texts, Filters(0.8)) == ["", "near_duplicate", "", "", "", "near_duplicate"]
    assert reasons(texts, Filters()) == [""] * 6
    assert reasons(texts[:3], Filters(0.2)) == ["", "near_duplicate", "near_duplicate"]


def test_signatures_are_the_same_in_every_process():
    pytest.importorskip("datasketch", reason="datasketch is not installed")
    signature = mark(Document("the quick brown fox jumps over the lazy dog", "text"), Filters(0.8)).signature
    assert (signature.dtype, signature.shape) == ("uint32", (128,))
    assert signature[:3].tolist() == [525945524, 412836237, 741861544]


@pytest.mark.parametrize("threshold", [0.0, 1.0, 2.0])
def test_a_threshold_that_cannot_be_is_refused_at_once(threshold):
    with pytest.raises(ValueError, match="is not between 0 and 1"):
        Filters(threshold)


def test_a_threshold_that_needs_longer_signatures_is_refused_at_once():
    pytest.importorskip("datasketch", reason="datasketch is not installed")
    with pytest.raises(ValueError, match="too small"):
        Filters(0.999)


QUESTION = words(20, seed=3)


@pytest.fixture
def ngrams(tmp_path):
    (tmp_path / "eval.jsonl").write_text(
        json.dumps({"question": " ".join(QUESTION), "choices": [" ".join(words(9, seed=4)), "yes", 5]}) + "\n\n"
    )
    return evaluation_ngrams([str(tmp_path / "eval.jsonl")])


def test_evaluation_texts_become_13_grams_or_whole_texts_of_8_words(ngrams):
    assert len(ngrams) == 8 + 1
    assert {" ".join(QUESTION[i : i + 13]) for i in range(8)} | {" ".join(words(9, seed=4))} == ngrams


def test_a_document_that_shares_an_ngram_is_left_out_in_any_case_and_punctuation(ngrams):
    shared = " ".join(QUESTION[3:16])
    texts = [
        f"before {shared.upper()} after",
        f"before {', '.join(QUESTION[3:16])}! After",
        f"before {' '.join(QUESTION[3:15])} after",  # 12 words
        f"{' '.join(words(9, seed=4))}.",
        " ".join(words(8, seed=4)),
        shared,
    ]
    expected = ["contaminated", "contaminated", "", "contaminated", "", "contaminated"]
    assert reasons(texts, Filters(ngrams=ngrams)) == expected
    assert reasons(texts, Filters()) == [""] * 6


def test_lines_of_plain_and_compressed_files_are_texts(tmp_path, ngrams):
    (tmp_path / "eval.txt").write_text(" ".join(QUESTION) + "\nshort\n")
    (tmp_path / "eval.json.gz").write_bytes(gzip.compress(json.dumps([" ".join(words(9, seed=4))]).encode()))
    assert evaluation_ngrams([str(tmp_path / "eval.txt"), str(tmp_path / "eval.json.gz")]) == ngrams


@pytest.mark.parametrize(
    ("content", "message"),
    [(b'{"a": 1', r"eval\.jsonl, line 1: "), (b'{"a": "b"}', r"eval\.jsonl: no text of at least 8 words to look for")],
)
def test_an_evaluation_file_that_says_nothing_is_named(tmp_path, content, message):
    (tmp_path / "eval.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluation_ngrams([str(tmp_path / "eval.jsonl")])


def test_a_training_set_shares_nothing_with_its_own_test_set_but_its_copies(shared_data):
    ngrams = evaluation_ngrams([str(shared_data / "eval/gsm8k_test.jsonl")])
    lines = (shared_data / "eval/gsm8k_test.jsonl").read_text().splitlines()[:50]
    texts = [json.loads(line)["question"] for line in lines]
    assert reasons(texts, Filters(ngrams=ngrams)) == ["contaminated"] * 50
    train = (shared_data / "eval/gsm8k_train.jsonl").read_text().splitlines()[:500]
    texts = [json.loads(line)["question"] for line in train]
    assert reasons(texts, Filters(ngrams=ngrams)).count("contaminated") < 5
