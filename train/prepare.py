"""Text to tokens on disk: trains or takes a tokenizer, holds documents out, writes what train.data reads.

    python -m train.prepare [SOURCE ...] [--tokenizer T] [--vocab-size N] [--out DIR] [--holdout 0.05]

The format stands in train.data; the tokenizer's own files lie beside the shards. The one invariant:
the same texts, tokenizer, vocabulary and hold-out give the same bytes, and a directory that exists is
whole. The trained tokenizer is the Llama 3 kind (byte-level BPE, the same split into words, the same
256 special tokens at the end), smaller.
"""

import argparse
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llama_jax.entry import run_entry, say
from llama_jax.paths import as_path, staged_directory
from llama_jax.progress import progress
from llama_jax.tokenizer import META_SPECIAL_TOKENS, META_WORDS, Tokenizer, load_tokenizer
from train import corpus
from train.data import FORMAT_VERSION, SPLITS, read_metadata

DEFAULT_OUT = "data/prepared"
DEFAULT_VOCAB_SIZE = 4096
DEFAULT_HOLDOUT = 0.05

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Where a tokenizer lies in its directory, in the order of load_tokenizer, and what that reads beside it.
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    holdout: float = DEFAULT_HOLDOUT,
) -> dict:
    """Writes the directory `out`, unless it already holds the same, and returns its metadata.

    sources: text and .jsonl files; none means the default corpus.
    tokenizer: a file or directory to encode with; None trains one on the training documents.
    vocab_size: ids of the tokenizer to train, special tokens included; None means 4096.
    holdout: the fraction of documents, by the hash of their text, for the heldout split.

    Raises ValueError for inputs that make no data, FileExistsError if `out` holds anything else,
    OSError for a file that cannot be read.
    """
    if tokenizer is not None and vocab_size is not None:
        raise ValueError("a given tokenizer has its own vocabulary; leave out vocab_size or the tokenizer")
    given = {}
    if tokenizer is not None:
        given, vocab_size = _tokenizer_files(as_path(tokenizer)), load_tokenizer(tokenizer).vocab_size
    texts = corpus.read(sources)
    inputs = {
        "format_version": FORMAT_VERSION,
        "corpus_hash": corpus.corpus_hash(texts.documents),
        "holdout": holdout,
        "tokenizer": _files_hash(given) if given else "trained",
        "vocab_size": DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size,
    }
    if (as_path(out) / "metadata.json").is_file():
        return _existing(out, inputs)
    splits = {name: texts.split(name, holdout) for name in SPLITS}
    if not splits["train"]:
        raise ValueError(f"holdout={holdout} leaves none of {len(texts.documents)} documents to train on; lower it")
    with staged_directory(out) as staged:
        files = given or train_tokenizer((document.text for document in splits["train"]), inputs["vocab_size"])
        for name, content in files.items():
            (staged / name).write_bytes(content)
        encoder = load_tokenizer(staged)
        metadata = inputs | {
            "python_version": platform.python_version(),
            "dropped_documents": texts.dropped,
            "dtype": _token_dtype(encoder),
            "splits": {name: _write_split(staged / name, splits[name], encoder) for name in SPLITS},
        }
        (staged / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return metadata


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> dict[str, bytes]:
    """Trains byte-level BPE; returns the contents of `tokenizer.json` and `tokenizer_config.json`.

    Ids: 256 bytes, then the merges, then the 256 special tokens of Llama 3 up to vocab_size - 1.
    Raises ValueError if vocab_size is too small for these, or too large for the texts.
    """
    smallest = 256 + len(META_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is below {smallest}, 256 bytes and 256 special tokens")
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(META_WORDS), "isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(META_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in META_SPECIAL_TOKENS])
    if (reached := backend.get_vocab_size()) != vocab_size:
        raise ValueError(f"the text has pairs for vocab_size={reached} only, not {vocab_size}; lower it or add text")
    bos, eos = META_SPECIAL_TOKENS[:2]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131_072,
    }
    return {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": f"{json.dumps(config, indent=1)}\n".encode(),
    }


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


def _existing(out: str | Path, inputs: dict) -> dict:
    """The metadata of a preparation that was made from these inputs, else FileExistsError."""
    metadata = read_metadata(out)
    if other := [
        f"{key} {metadata.get(key)}, not {value}" for key, value in inputs.items() if metadata.get(key) != value
    ]:
        raise FileExistsError(f"{out} was prepared with {'; '.join(other)}; remove it or choose another --out")
    say(f"{out} already holds this preparation; nothing to do")
    return metadata


def _write_split(stem: Path, documents: list[corpus.Document], tokenizer: Tokenizer) -> dict:
    """Writes the tokens and offsets of one split and returns its counts."""
    # The end of a document; an instruction-tuned tokenizer calls the end of a turn its eos.
    end = tokenizer.special_tokens.get("<|end_of_text|>", tokenizer.eos_id)
    if end is None:
        raise ValueError("the tokenizer has no token for the end of a document, <|end_of_text|> or another eos")
    dtype = np.dtype(_token_dtype(tokenizer)).newbyteorder("<")
    lengths = np.zeros(len(documents), np.int64)
    sources: dict[str, Counter] = {}
    with (
        stem.with_suffix(".tokens").open("wb") as shard,
        progress(len(documents), desc=stem.name, unit=" documents") as bar,
    ):
        for i, document in enumerate(documents):
            ids = [*tokenizer.encode(document.text, bos=True), end]
            shard.write(np.array(ids, dtype).tobytes())
            lengths[i] = len(ids)
            sources.setdefault(document.source, Counter()).update(documents=1, tokens=len(ids))
            bar.update(1)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    stem.with_suffix(".offsets").write_bytes(offsets.tobytes())
    characters = sum(len(document.text) for document in documents)
    text_tokens = int(lengths.sum()) - 2 * len(documents)
    return {
        "documents": len(documents),
        "tokens": int(lengths.sum()),
        "characters": characters,
        "characters_per_token": round(characters / text_tokens, 4) if documents else None,
        "sources": {name: dict(counts) for name, counts in sources.items()},
        "lengths": _histogram(lengths),
    }


def _token_dtype(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 65_536 else "uint32"


def _histogram(lengths: np.ndarray) -> list[dict]:
    """Documents and their tokens in bins of a factor of two; at_least is the lower end in tokens."""
    bins = 1 << np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    return [
        {"at_least": int(low), "documents": int((bins == low).sum()), "tokens": int(lengths[bins == low].sum())}
        for low in np.unique(bins)
    ]


def _summary(out: str, metadata: dict) -> str:
    """What was prepared, for people."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in metadata["dropped_documents"].items())
    lines = [
        f"prepared    {out}, vocabulary of {metadata['vocab_size']} in {metadata['dtype']}",
        f"corpus      {metadata['corpus_hash']}",
        f"python      {metadata['python_version']}",
        f"left out    {dropped}",
        "",
        f"{'split':<10}{'documents':>11}{'tokens':>15}{'chars/token':>13}{'in documents of 8192+':>23}",
    ]
    for name, split in metadata["splits"].items():
        long = sum(entry["tokens"] for entry in split["lengths"] if entry["at_least"] >= 8192)
        share = f"{long / split['tokens']:.1%}" if split["tokens"] else "-"
        rate = f"{split['characters_per_token']:.3f}" if split["documents"] else "-"
        lines.append(f"{name:<10}{split['documents']:>11,}{split['tokens']:>15,}{rate:>13}{share:>23}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser("python -m train.prepare", description="Text to token shards for train.pretrain.")
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help="text or .jsonl (field text) files; default: what Python ships")
    add("--tokenizer", metavar="T", help="a tokenizer file or directory; default: train one on the training documents")
    add("--vocab-size", type=int, metavar="N", help=f"ids of the trained tokenizer (default {DEFAULT_VOCAB_SIZE})")
    add("--out", default=DEFAULT_OUT, metavar="DIR", help="the directory to write (default %(default)s)")
    add("--holdout", type=float, default=DEFAULT_HOLDOUT, help="fraction of documents held out (default %(default)s)")
    add("--json", action="store_true", help="print metadata.json instead of the table")
    options = parser.parse_args(argv)
    metadata = prepare(
        options.sources,
        options.out,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        holdout=options.holdout,
    )
    print(json.dumps(metadata, indent=1) if options.json else _summary(options.out, metadata))


if __name__ == "__main__":
    run_entry(main)
