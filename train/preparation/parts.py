"""Parts of a preparation: what workers make of the text, kept until all of it is there.

A worker reads a part (see sources.py), marks and encodes its documents, and writes them as pieces KEY-0.npz,
KEY-1.npz, ... and KEY.done with their number. KEY is a hash of all that the pieces follow from, so that a finished
part is used again whatever else has changed. The one invariant: KEY.done is there only if every piece is, whole.
"""

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.entry import say
from llama_jax.paths import as_path, open_file, staged_file
from llama_jax.progress import progress
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from train.preparation.dedup import Filters, Mark, mark
from train.preparation.sources import Part, read_part

_VERSION = 1  # of what a part's files hold
_PIECE_CHARACTERS = 2**24  # bounds what a worker holds


class Piece(NamedTuple):
    """Documents of a part: fields of their marks, arrays [num_documents], and their tokens end to end.

    lengths: int64, tokens of each document, 0 for those that are left out whatever other texts there are.
    signatures: uint32 [num_documents, 128 or 0]. tokens: uint16 or uint32 [sum of lengths].
    """

    sources: np.ndarray
    hashes: np.ndarray
    origins: np.ndarray
    dropped: np.ndarray
    characters: np.ndarray
    lengths: np.ndarray
    signatures: np.ndarray
    tokens: np.ndarray

    def marks(self) -> Iterator[Mark]:
        """The marks of the documents, in order."""
        return map(Mark, self.hashes.tolist(), self.origins.tolist(), self.dropped.tolist(), self.signatures)


@dataclass(frozen=True)
class Encoder:
    """Encodes parts into a directory.

    tokenizer: the directory that it lies in. tokenizer_hash: of its files.
    """

    directory: str
    tokenizer: str
    tokenizer_hash: str
    filters: Filters

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.tokenizer)

    @property
    def dtype(self) -> str:
        """Of the tokens."""
        return "uint16" if self._tokenizer.vocab_size <= 65_536 else "uint32"

    @functools.cached_property
    def _end(self) -> int:
        """The end of a document; an instruction-tuned tokenizer calls the end of a turn its eos."""
        end = self._tokenizer.special_tokens.get("<|end_of_text|>", self._tokenizer.eos_id)
        if end is None:
            raise ValueError("the tokenizer has no token for the end of a document, <|end_of_text|> or another eos")
        return end

    def is_done(self, part: Part) -> bool:
        """Whether the part has been encoded, by this process or one before it."""
        return self._done(part).is_file()

    def encode(self, part: Part) -> None:
        """Write the pieces of a part."""
        rows, characters, number = [], 0, 0
        for document in read_part(part):
            fields = mark(document, self.filters)
            ids = [] if fields.dropped else [*self._tokenizer.encode(document.text, bos=True), self._end]
            rows.append((document.source, fields, len(document.text), np.array(ids, self.dtype)))
            characters += len(document.text)
            if characters >= _PIECE_CHARACTERS:
                self._write(part, number, rows)
                rows, characters, number = [], 0, number + 1
        if rows:
            self._write(part, number, rows)
            number += 1
        with staged_file(self._done(part)) as staged:
            staged.write_text(f"{number}\n")

    def pieces(self, part: Part) -> Iterator[Piece]:
        """What encoding a part has made, in order."""
        for number in range(int(self._done(part).read_text())):
            with open_file(self._piece(part, number)) as file, np.load(file) as arrays:
                yield Piece(**arrays)

    def _write(self, part: Part, number: int, rows: list[tuple[str, Mark, int, np.ndarray]]) -> None:
        sources, marks, characters, tokens = zip(*rows, strict=True)
        hashes, origins, dropped, signatures = zip(*marks, strict=True)
        piece = Piece(
            *map(np.array, (sources, hashes, origins, dropped, characters)),
            lengths=np.array(list(map(len, tokens))),
            signatures=np.stack(signatures),
            tokens=np.concatenate(tokens),
        )
        with staged_file(self._piece(part, number)) as staged, staged.open("wb") as file:
            np.savez(file, **piece._asdict())

    @functools.cached_property
    def _inputs(self) -> list:
        has_signatures = self.filters.near_duplicates is not None
        return [_VERSION, self.tokenizer_hash, has_signatures, self.filters.ngrams_hash()]

    def _key(self, part: Part) -> str:
        return hashlib.sha256(json.dumps([self._inputs, dataclasses.asdict(part)]).encode()).hexdigest()[:32]

    def _done(self, part: Part) -> Path:
        return as_path(self.directory) / f"{self._key(part)}.done"

    def _piece(self, part: Part, number: int) -> Path:
        return as_path(self.directory) / f"{self._key(part)}-{number}.npz"


def encode_parts(encoder: Encoder, parts: Sequence[Part], workers: int) -> None:
    """Encode the parts that are not done, in so many processes.

    Raises ValueError and OSError for text that cannot be read; then, too, finished parts stay.
    """
    left = [part for part in parts if not encoder.is_done(part)]
    if len(left) < len(parts):
        say(f"{len(parts) - len(left)} of {len(parts)} parts are there, in {encoder.directory}; going on")
    with progress(len(left), desc="encoding", unit=" parts") as bar:
        if min(workers, len(left)) < 2:
            for part in left:
                encoder.encode(part)
                bar.update(1)
            return
        context = multiprocessing.get_context("spawn")  # a fork of jax's threads may hang
        pool = ProcessPoolExecutor(min(workers, len(left)), context, _start_worker, (encoder,))
        try:
            for future in as_completed([pool.submit(_encode, part) for part in left]):
                future.result()
                bar.update(1)
        except BrokenProcessPool:
            raise OSError(
                f"a worker was killed, perhaps for want of memory; the same command goes on, with fewer than "
                f"--workers {workers} if need be"
            ) from None
        except BaseException:
            for process in list(pool._processes.values()):  # pool.terminate_workers() from Python 3.14 on
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_worker: Encoder


def _start_worker(encoder: Encoder) -> None:
    """Prepares a process of the pool."""
    global _worker
    _worker = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the one that started it does, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode(part: Part) -> None:
    _worker.encode(part)
