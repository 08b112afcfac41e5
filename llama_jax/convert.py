"""Convert a checkpoint between formats: `python -m llama_jax.convert SRC DST --to hf|meta|orbax|gguf`.

Streams canonical tensors from reader to writer, one in memory at a time, without a model: values
are never touched, so HF -> any -> HF is equal to the bit unless --dtype asks for a cast.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from llama_jax.entry import parse_settings, run_entry
from llama_jax.paths import staged_directory, vacant_directory
from llama_jax.progress import Bar, progress
from llama_jax.tokenizer import gguf_tokenizer_files, load_tokenizer

if TYPE_CHECKING:
    from llama_jax.checkpoint.formats import Format
    from llama_jax.checkpoint.source import Source

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class _CountedSource:
    """A source that moves the progress by the bytes that are read."""

    def __init__(self, source: "Source", bar: Bar):
        self._source, self._bar = source, bar
        self.tensors = source.tensors

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor or its slice."""
        values = self._source.read(name, index)
        self._bar.update(values.nbytes)
        return values


def convert(
    src: str,
    dst: str,
    *,
    to: "Format",
    dtype: str | None = None,
    num_shards: int = 1,
    quantize: str | None = None,
    **opening,
) -> None:
    """Write the checkpoint src as format `to` into the directory dst, with what lies beside the weights.

    dst appears whole or not at all; in an object store the file that makes it a checkpoint comes last.
    quantize: how the weights of products are rounded, of "hf" a scheme of llama_jax.schemes, of "gguf" q8_0 or q4_0.
    opening: overrides and allow_unknown_config of open_checkpoint.
    Raises ValueError if src is not sound or the format cannot carry its config.
    """
    # These import jax, which --help need not wait for.
    from llama_jax.checkpoint.companions import complete_hf_directory, write_notice
    from llama_jax.checkpoint.formats import CanonicalSource, open_checkpoint, write_checkpoint
    from llama_jax.checkpoint.safetensors import num_bytes

    if num_shards != 1 and to != "meta":
        raise ValueError(f"--num-shards {num_shards} is for --to meta only; the others are cut by size")
    vacant_directory(dst)
    checkpoint = open_checkpoint(src, **opening)
    cast_to = DTYPES[dtype] if dtype else checkpoint.dtype if checkpoint.packed else None
    source = CanonicalSource(checkpoint.source, checkpoint.cfg, cast_to)
    token_ids = checkpoint.metadata or _token_ids(checkpoint.companions)
    total = sum(map(num_bytes, source.tensors.values()))
    with staged_directory(dst) as staged, progress(total, desc="convert") as bar:
        copy_companions(checkpoint.companions, staged)
        if checkpoint.format == "meta":
            write_notice(staged, checkpoint.cfg)
        if to == "hf":
            complete_hf_directory(staged, checkpoint.cfg, {} if checkpoint.format == "hf" else token_ids)
        counted = _CountedSource(source, bar)
        write_checkpoint(
            staged, checkpoint.cfg, counted, to=to, metadata=token_ids, num_shards=num_shards, quantize=quantize
        )


def _token_ids(directory: Path) -> dict[str, Any]:
    """What the tokenizer, if there is one, says of token ids that the weights' format does not say."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return {}
    tokenizer = load_tokenizer(directory)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_ids)}


def copy_companions(src: Path, dst: Path) -> None:
    """Copy tokenizer, chat template and licence files where they exist; the first two are made of a GGUF file's own."""
    from llama_jax.checkpoint.companions import COMPANION_FILES

    if src.is_file():
        for name, content in gguf_tokenizer_files(src).items():
            (dst / name).write_bytes(content)
        return
    for pattern in COMPANION_FILES:
        for file in src.glob(pattern):
            (dst / file.name).write_bytes(file.read_bytes())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m llama_jax.convert", description="Convert a checkpoint.")
    parser.add_argument("src", metavar="SRC", help="directory (local, gs:// or s3://), run directory or hub id")
    parser.add_argument("dst", metavar="DST", help="directory to write; must not exist or be empty")
    parser.add_argument("--to", required=True, choices=("hf", "meta", "orbax", "gguf"))
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="cast the weights; default: keep them to the bit")
    parser.add_argument(
        "--quantize",
        metavar="Q",
        help="--to hf: int8, int8-a8, int4, int4-g128, fp8, ... in compressed-tensors; --to gguf: q8_0 or q4_0",
    )
    parser.add_argument("--num-shards", type=int, default=1, metavar="N", help="consolidated.NN.pth files of --to meta")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. rope.factor=32")
    parser.add_argument("--allow-unknown-config", action="store_true", help="ignore unknown config attributes")
    args = parser.parse_args(argv)
    convert(
        args.src,
        args.dst,
        to=args.to,
        dtype=args.dtype,
        num_shards=args.num_shards,
        quantize=args.quantize,
        overrides=parse_settings(args.set),
        allow_unknown_config=args.allow_unknown_config,
    )
    print(f"wrote {args.dst}")


if __name__ == "__main__":
    run_entry(main)
