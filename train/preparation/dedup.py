"""What is left out of the data: blank texts, exact and near duplicates, and text of evaluation sets.

Near duplicates are found by MinHash over 5-grams of words and locality-sensitive hashing (Broder 1997; the
library datasketch), as for The Llama 3 Herd of Models (arXiv 2407.21783, section 3.1.1); text of evaluation sets by
shared 13-grams of words (GPT-3, arXiv 2005.14165, appendix C).

The one invariant: of documents that are alike the first stays, so the answer depends on the texts and their
order alone.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from train.preparation.corpus import Document, text_hash
from train.preparation.sources import kind, open_text, require

REASONS = ("blank", "contaminated", "duplicate", "near_duplicate")
NUM_PERMUTATIONS = 128
SHINGLE_WORDS = 5
NGRAM_WORDS = 13
SHORTEST_TEXT_WORDS = 8  # of an evaluation set; what is shorter is found anywhere
_SCHEME = "affine32"
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Filters:
    """What is left out beside blank texts and exact duplicates.

    near_duplicates: the Jaccard similarity of 5-grams from which two documents are taken for one, None to keep all.
    ngrams: of evaluation sets, as `evaluation_ngrams` gives them.
    """

    near_duplicates: float | None = None
    ngrams: frozenset[str] = frozenset()

    def __post_init__(self):
        """Raises ValueError for a similarity that is no fraction, or if datasketch is not there."""
        if self.near_duplicates is not None:
            if not 0 < self.near_duplicates < 1:
                raise ValueError(f"a threshold of {self.near_duplicates} is not between 0 and 1")
            Sieve(self)  # fails here rather than after hours of encoding

    def ngrams_hash(self) -> str | None:
        """sha256 of the n-grams, None without any."""
        return hashlib.sha256("\n".join(sorted(self.ngrams)).encode()).hexdigest() if self.ngrams else None


class Mark(NamedTuple):
    """What is remembered of a text.

    hash: its text_hash. origin: that of the text it was extracted from, or its own.
    dropped: why it is left out whatever other texts there are, "" if it is not.
    signature: uint32 [128], empty if near duplicates stay.
    """

    hash: str
    origin: str
    dropped: str
    signature: np.ndarray


def mark(document: Document, filters: Filters) -> Mark:
    """The mark of a document."""
    digest = text_hash(document.text)
    dropped = ""
    if not document.text.strip():
        dropped = "blank"
    elif _shares_ngram(document.text, filters.ngrams):
        dropped = "contaminated"
    signature = np.zeros(0, np.uint32) if filters.near_duplicates is None else _signature(document.text)
    return Mark(digest, document.origin or digest, dropped, signature)


class Sieve:
    """Tells which documents stay, asked in their order; it keeps about 100 bytes of each, with near_duplicates 3 KB."""

    def __init__(self, filters: Filters):
        self._seen: set[bytes] = set()
        self._near: Any = None
        if filters.near_duplicates is not None:
            self._near = require("datasketch", "finding near duplicates").MinHashLSH(
                filters.near_duplicates, num_perm=NUM_PERMUTATIONS
            )

    def reason(self, document: Mark) -> str:
        """Why a document is left out, one of REASONS, or "" if it stays."""
        if document.dropped:
            return document.dropped
        digest = bytes.fromhex(document.hash[:32])
        if digest in self._seen:
            return "duplicate"
        self._seen.add(digest)
        if self._near is not None:
            minhash = _datasketch().LeanMinHash(seed=1, hashvalues=document.signature, scheme=_SCHEME)
            if self._near.query(minhash):
                return "near_duplicate"
            self._near.insert(digest, minhash, check_duplication=False)
        return ""


def _datasketch() -> Any:
    return require("datasketch", "leaving out near duplicates")


def _signature(text: str) -> np.ndarray:
    """uint32 [128]: the MinHash of the text's 5-grams of words, or of the whole of a shorter text."""
    words = text.split()
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    shingles = {" ".join(words[i : i + SHINGLE_WORDS]).encode() for i in range(last)}
    minhash = _datasketch().MinHash(NUM_PERMUTATIONS, seed=1, scheme=_SCHEME)
    minhash.update_batch(list(shingles))
    return minhash.hashvalues


def evaluation_ngrams(paths: Iterable[str]) -> frozenset[str]:
    """Every 13 words in a row, in lower case, of the texts in these files; a text of 8 to 12 words as a whole.

    A text is a string anywhere in a line of a .jsonl file, or a line of any other. Raises ValueError for a file that
    cannot be understood or has no text of 8 words, OSError for one that cannot be read.
    """
    ngrams: set[str] = set()
    for path in paths:
        found = {ngram for text in _evaluation_texts(path) for ngram in _ngrams(text)}
        if not found:
            raise ValueError(f"{path}: no text of at least {SHORTEST_TEXT_WORDS} words to look for")
        ngrams |= found
    return frozenset(ngrams)


def _ngrams(text: str) -> Iterator[str]:
    words = _WORD.findall(text.lower())
    if len(words) >= SHORTEST_TEXT_WORDS:
        for i in range(max(1, len(words) - NGRAM_WORDS + 1)):
            yield " ".join(words[i : i + NGRAM_WORDS])


def _evaluation_texts(path: str) -> Iterator[str]:
    is_json = kind(path) in (".jsonl", ".json")
    with open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode()
                yield from _strings(json.loads(text)) if is_json and text.strip() else [text]
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def _strings(value: Any) -> Iterator[str]:
    """Every string in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


@functools.lru_cache(1)
def _starts(ngrams: frozenset[str]) -> tuple[frozenset[str], list[int]]:
    """The first 8 words of each n-gram, which are looked for first, and how many words the n-grams have."""
    words = [ngram.split() for ngram in ngrams]
    return frozenset(" ".join(ngram[:SHORTEST_TEXT_WORDS]) for ngram in words), sorted(set(map(len, words)))


def _shares_ngram(text: str, ngrams: frozenset[str]) -> bool:
    if not ngrams:
        return False
    words = _WORD.findall(text.lower())
    starts, lengths = _starts(ngrams)
    for i in range(len(words) - SHORTEST_TEXT_WORDS + 1):
        if " ".join(words[i : i + SHORTEST_TEXT_WORDS]) in starts:
            if any(" ".join(words[i : i + length]) in ngrams for length in lengths):
                return True
    return False
