"""Text to tokens on disk: reads, encodes in parallel, drops what repeats, holds documents out, writes shards.

    python -m train.prepare [SOURCE ...] [--tokenizer T] [--out DIR] [--holdout 0.5%] [--dedup minhash]

The format stands in data/shards.py; the tokenizer's own files lie beside the sources. Work is divided into parts
(preparation/sources.py), which workers encode into OUT.parts (preparation/parts.py); when all are there they are
read in order and sorted into shards. The one invariant: the same files and options give the same bytes, whatever the
number of workers and interruptions, and a directory that exists is whole.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from llama_jax.entry import run_entry, say
from llama_jax.paths import as_path, make_directory, remove_directory, staged_directory, vacant_directory
from llama_jax.progress import progress
from llama_jax.tokenizer import load_tokenizer
from train.data.shards import FORMAT_VERSION, SHARD_TOKENS, SPLITS, read_metadata
from train.preparation.corpus import is_held_out
from train.preparation.dedup import REASONS, Filters, Sieve, evaluation_ngrams, mark
from train.preparation.parts import Encoder, encode_parts
from train.preparation.shard_writer import ShardWriter
from train.preparation.sources import Part, find_parts, read_part
from train.preparation.tokenizer_training import train_tokenizer

DEFAULT_OUT = "data/prepared"
DEFAULT_VOCAB_SIZE = 4096
DEFAULT_HOLDOUT = 0.05
DEFAULT_THRESHOLD = 0.8

# Where a tokenizer lies in its directory, in the order of load_tokenizer, and what that reads beside it.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def prepare(
    sources: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    vocab_size: int | None = None,
    holdout: float = DEFAULT_HOLDOUT,
    text_field: str = "text",
    filters: Filters = Filters(),  # noqa: B008, it is frozen
    workers: int | None = None,
) -> dict:
    """Writes the directory `out`, unless it already holds the same, and returns its metadata.

    sources: PATH or NAME=PATH (see train.preparation.sources); none means the default corpus.
    tokenizer: a file or directory to encode with; None trains one on the training documents.
    vocab_size: ids of the tokenizer to train, special tokens included; None means 4096.
    holdout: the fraction of documents, by the hash of their text, for the heldout split.
    text_field: where records of JSON lines, Parquet and the hub hold their text.
    workers: processes that encode; None means one a core.

    Raises ValueError for inputs that make no data, FileExistsError if `out` holds anything else,
    OSError for a file that cannot be read or written. Finished parts then stay in OUT.parts for the next try.
    """
    if tokenizer is not None and vocab_size is not None:
        raise ValueError("a given tokenizer has its own vocabulary; leave out vocab_size or the tokenizer")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout={holdout} is not a fraction from 0 to below 1")
    given, vocab_size = {}, DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    if tokenizer is not None:
        given, vocab_size = _tokenizer_files(as_path(tokenizer)), load_tokenizer(tokenizer).vocab_size
    parts = find_parts(sources, text_field)
    inputs: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "files": _json_hash([dataclasses.asdict(part) for part in parts]),
        "holdout": holdout,
        "tokenizer": _files_hash(given) if given else "trained",
        "vocab_size": vocab_size,
        "near_duplicates": filters.near_duplicates,
        "decontaminated": filters.ngrams_hash(),
    }
    if (as_path(out) / "metadata.json").is_file():
        return _existing(out, inputs)
    out = vacant_directory(out)
    work = out.with_name(f"{out.name}.parts")
    encoder = _encoder(work, given, inputs, parts, filters)
    with _naming_what_stays(work):
        encode_parts(encoder, parts, workers or os.cpu_count() or 1)
        metadata = _write(out, encoder, inputs, parts)
    remove_directory(work)
    return metadata


@contextmanager
def _naming_what_stays(work: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:  # a full disk does not say where
            error.filename = str(work)
        say(f"what is finished stays in {work}; the same command goes on from there")
        raise


def _tokenizer_files(path: Path) -> dict[str, bytes]:
    """The contents of a tokenizer and of what belongs to it, by the names that they get in a directory."""
    vocabulary = next((file for file in [path, *(path / name for name in VOCABULARY_FILES)] if file.is_file()), None)
    if vocabulary is None:
        raise ValueError(f"no tokenizer at {path}: expected a file, or a directory with {VOCABULARY_FILES[:2]}")
    beside = [file for name in _SIDE_FILES if (file := vocabulary.parent / name).is_file()]
    name = "tokenizer.json" if vocabulary.suffix == ".json" else "tokenizer.model"
    return {name: vocabulary.read_bytes()} | {file.name: file.read_bytes() for file in beside}


def _files_hash(files: dict[str, bytes]) -> str:
    contents = (f"{name} {hashlib.sha256(content).hexdigest()}\n" for name, content in files.items())
    return hashlib.sha256("".join(contents).encode()).hexdigest()


def _json_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _existing(out: str | os.PathLike, inputs: dict) -> dict:
    """The metadata of a preparation that was made from these inputs, else FileExistsError."""
    metadata = read_metadata(os.fspath(out))
    if other := [
        f"{key} {metadata.get(key)}, not {value}" for key, value in inputs.items() if metadata.get(key) != value
    ]:
        raise FileExistsError(
            f"{out} was prepared from other files or options ({'; '.join(other)}); remove it or choose another --out"
        )
    say(f"{out} already holds this preparation; nothing to do")
    return metadata


def _encoder(work: Path, given: dict[str, bytes], inputs: dict, parts: Sequence[Part], filters: Filters) -> Encoder:
    """Encodes into `work`, where its tokenizer lies, given or trained now or before."""
    digest = _files_hash(given) if given else _json_hash(inputs)
    directory = work / f"tokenizer-{digest[:16]}"
    if not any((directory / name).is_file() for name in VOCABULARY_FILES):
        files = given or train_tokenizer(_training_texts(parts, filters, inputs["holdout"]), inputs["vocab_size"])
        remove_directory(directory)
        with staged_directory(directory) as staged:
            for name, content in reversed(files.items()):  # the vocabulary last: it says that the rest is there
                (staged / name).write_bytes(content)
    return Encoder(str(work), str(directory), digest, filters)


def _training_texts(parts: Sequence[Part], filters: Filters, holdout: float) -> Iterator[str]:
    """The texts that will be trained on, read one after the other."""
    sieve, num_kept, num_training = Sieve(filters), 0, 0
    with progress(len(parts), desc="training the tokenizer", unit=" parts") as bar:
        for part in parts:
            for document in read_part(part):
                fields = mark(document, filters)
                if not sieve.reason(fields):
                    num_kept += 1
                    if not is_held_out(fields.origin, holdout):
                        num_training += 1
                        yield document.text
            bar.update(1)
    _check_training_documents(parts, holdout, num_kept, num_training)


def _check_training_documents(parts: Sequence[Part], holdout: float, num_kept: int, num_training: int) -> None:
    """Raise ValueError if nothing is left to train on."""
    if not num_kept:
        first = next((extent.path for part in parts for extent in part.extents), "the sources")
        raise ValueError(f"no text to train on in {first} and what else was given; give at least one document")
    if not num_training:
        raise ValueError(f"holdout={holdout} leaves none of {num_kept} documents to train on; lower it")


def _write(out: Path, encoder: Encoder, inputs: dict[str, Any], parts: Sequence[Part]) -> dict:
    """Write what was encoded as the directory `out`; returns its metadata."""
    with staged_directory(out) as staged:
        for file in as_path(encoder.tokenizer).iterdir():
            (staged / file.name).write_bytes(file.read_bytes())
        metadata: dict[str, Any] = inputs | {"python_version": platform.python_version(), "dtype": encoder.dtype}
        metadata |= _write_sources(staged, encoder, parts, inputs["holdout"])
        num_training, num_heldout = (
            sum(source[split]["documents"] for source in metadata["sources"].values()) for split in SPLITS
        )
        _check_training_documents(parts, inputs["holdout"], num_training + num_heldout, num_training)
        (staged / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return metadata


def _write_sources(staged: Path, encoder: Encoder, parts: Sequence[Part], holdout: float) -> dict[str, Any]:
    """Write the shards of all sources; returns what metadata.json says of them."""
    sieve, corpus_hash = Sieve(encoder.filters), hashlib.sha256()
    writers: dict[str, dict[str, ShardWriter]] = {}
    dropped: dict[str, Counter] = {}
    with ExitStack() as files, progress(len(parts), desc="writing", unit=" parts") as bar:
        for part in parts:
            for piece in encoder.pieces(part):
                splits = []
                for source, fields in zip(piece.sources.tolist(), piece.marks(), strict=True):
                    reason = sieve.reason(fields)
                    dropped.setdefault(source, Counter())[reason] += 1
                    splits.append(reason or SPLITS[is_held_out(fields.origin, holdout)])
                    if not reason:
                        corpus_hash.update(fields.hash.encode())
                for source in dict.fromkeys(piece.sources.tolist()):
                    make_directory(staged / source)
                    to = writers.setdefault(
                        source, {split: ShardWriter(staged / source / split, SHARD_TOKENS, files) for split in SPLITS}
                    )
                    for split in SPLITS:
                        chosen = (piece.sources == source) & (np.array(splits) == split)
                        tokens = piece.tokens[np.repeat(chosen, piece.lengths)]
                        to[split].write(tokens, piece.lengths[chosen], int(piece.characters[chosen].sum()))
            bar.update(1)
        sources = {name: {split: writer.close() for split, writer in to.items()} for name, to in writers.items()}
    left_out = {name: {reason: counts[reason] for reason in REASONS} for name, counts in dropped.items()}
    return {
        "corpus_hash": corpus_hash.hexdigest(),
        "dropped_documents": {reason: sum(counts[reason] for counts in left_out.values()) for reason in REASONS},
        "dropped_by_source": left_out,
        "sources": sources,
    }


def _report(out: str, metadata: dict) -> str:
    """What was prepared, for people."""
    dropped = ", ".join(
        f"{count} {reason.replace('_', ' ')}" for reason, count in metadata["dropped_documents"].items()
    )
    sources = metadata["sources"]
    width = max(10, *(len(name) + 2 for name in sources))
    lines = [
        f"prepared    {out}, vocabulary of {metadata['vocab_size']} in {metadata['dtype']}",
        f"corpus      {metadata['corpus_hash']}",
        f"python      {metadata['python_version']}",
        f"left out    {dropped}",
        "",
        f"{'source':<{width}}{'split':<10}{'documents':>11}{'tokens':>17}{'chars/token':>13}{'in 8K+ docs':>13}"
        f"{'left out':>10}",
    ]
    for name, splits in sources.items():
        left_out = f"{sum(metadata['dropped_by_source'][name].values()):,}"
        for split, counts in splits.items():
            rate = f"{counts['characters_per_token']:.3f}" if counts["documents"] else "-"
            long = sum(entry["tokens"] for entry in counts["lengths"] if entry["at_least"] >= 8192)
            share = f"{long / counts['tokens']:.1%}" if counts["tokens"] else "-"
            line = f"{name:<{width}}{split:<10}{counts['documents']:>11,}{counts['tokens']:>17,}{rate:>13}{share:>13}"
            lines.append(line + (f"{left_out:>10}" if split == SPLITS[0] else ""))
    return "\n".join([*lines, "", *_histograms(sources, width)])


def _histograms(sources: dict, width: int) -> list[str]:
    """A line for each source: how many documents have at least so many tokens, up to the next column."""
    lengths = {name: Counter() for name in sources}
    for name, splits in sources.items():
        for entry in [entry for counts in splits.values() for entry in counts["lengths"]]:
            lengths[name][min(max(entry["at_least"], 128), 131_072)] += entry["documents"]
    bins = sorted(set().union(*lengths.values()))
    titles = ["<256" if low == 128 else f"{low // 1024}K+" if low >= 1024 else f"{low}+" for low in bins]
    lines = ["documents by tokens", f"{'source':<{width}}" + "".join(f"{title:>8}" for title in titles)]
    for name, counts in lengths.items():
        shown = (f"{counts[low]:,}" if counts[low] < 10_000 else tqdm.format_sizeof(counts[low]) for low in bins)
        lines.append(f"{name:<{width}}" + "".join(f"{count:>8}" for count in shown))
    return lines


def _fraction(text: str) -> float:
    """0.005 from "0.005" or "0.5%"."""
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m train.prepare",
        description="Text to token shards for train.pretrain.",
        epilog="SOURCE is PATH or NAME=PATH (NAME, e.g. multilingual/de, is what a mixture calls it; default text). "
        "PATH is a file, a folder, a quoted glob, gs://, s3://, or hf://datasets/NAME[:SPLIT][@CONFIG], e.g. "
        "web=hf://datasets/allenai/c4:train@en. Kinds: .jsonl, .json (lines), .parquet, any other text; .gz and .zst "
        "of these. A killed run goes on when the same command is given again.",
    )
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="text to prepare; default: what Python ships")
    add("--tokenizer", metavar="T", help="a tokenizer file or directory; default: train one on the training documents")
    add("--vocab-size", type=int, metavar="N", help=f"ids of the trained tokenizer (default {DEFAULT_VOCAB_SIZE})")
    add("--out", default=DEFAULT_OUT, metavar="DIR", help="the directory to write (default %(default)s)")
    add("--holdout", type=_fraction, default=DEFAULT_HOLDOUT, metavar="F", help="documents held out (default 5%%)")
    add("--text-field", default="text", metavar="NAME", help="field or column of the text (default %(default)s)")
    add("--dedup", choices=["minhash"], help="leave out near duplicates too; exact ones always are")
    add("--dedup-threshold", type=float, metavar="J", help=f"similarity of those (default {DEFAULT_THRESHOLD})")
    add("--decontaminate", action="append", default=[], metavar="FILE", help="leave out text of this evaluation set")
    add("--workers", type=int, metavar="N", help="processes (default: one a core)")
    add("--json", action="store_true", help="print metadata.json instead of the table")
    options = parser.parse_args(argv)
    if options.dedup_threshold is not None and not options.dedup:
        parser.error("--dedup-threshold belongs to --dedup minhash; give both")
    threshold = (options.dedup_threshold or DEFAULT_THRESHOLD) if options.dedup else None
    metadata = prepare(
        options.sources,
        options.out,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        holdout=options.holdout,
        text_field=options.text_field,
        filters=Filters(threshold, evaluation_ngrams(options.decontaminate)),
        workers=options.workers,
    )
    print(json.dumps(metadata, indent=1) if options.json else _report(options.out, metadata))


if __name__ == "__main__":
    run_entry(main)
