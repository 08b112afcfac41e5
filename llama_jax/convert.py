"""Convert a checkpoint between formats: `python -m llama_jax.convert SRC DST --to hf|meta|orbax|gguf`.

Streams canonical tensors from reader to writer, one in memory at a time, without a model: values
are never touched, so HF -> any -> HF is equal to the bit unless --dtype asks for a cast or --quantize
for few bits. Text that these are chosen by runs through one layer at a time.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from llama_jax.entry import parse_settings, run_entry
from llama_jax.paths import staged_directory, vacant_directory
from llama_jax.progress import Bar, progress
from llama_jax.schemes import METHODS, check_method, find_scheme
from llama_jax.tokenizer import gguf_tokenizer_files, load_tokenizer

if TYPE_CHECKING:
    from llama_jax.checkpoint.formats import Checkpoint, Format
    from llama_jax.checkpoint.quantized.compressing import Compression, Report
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


class Recipe(NamedTuple):
    """How weights become few bits: a scheme and a method of llama_jax.schemes, and files of text to calibrate on.

    For GGUF the scheme is q8_0 or q4_0, to nearest.
    """

    scheme: str
    method: str = "rtn"
    calibration: Sequence[str] = ()

    def check(self, to: "Format") -> None:
        """Raises ValueError if that cannot be written as format `to`, or lacks text."""
        if to == "gguf":
            if self.method != "rtn" or self.calibration:
                raise ValueError("--method and --calibration are for --to hf; gguf is rounded to nearest")
            return
        if to != "hf":
            raise ValueError(f"--quantize {self.scheme} is written with --to hf or gguf, not {to}")
        check_method(self.method, self.scheme)
        if self.method != "rtn" and not self.calibration:
            raise ValueError(f"--method {self.method} needs text: give it with --calibration FILE")


def convert(
    src: str,
    dst: str,
    *,
    to: "Format",
    dtype: str | None = None,
    num_shards: int = 1,
    recipe: Recipe | None = None,
    **opening,
) -> "Report | None":
    """Write the checkpoint src as format `to` into the directory dst, with what lies beside the weights.

    dst appears whole or not at all; in an object store the file that makes it a checkpoint comes last.
    recipe: of the weights of products, for "hf" or "gguf". opening: overrides and allow_unknown_config of
    open_checkpoint. Returns what few bits cost, None without or for GGUF. Raises ValueError if src is not sound or the
    format cannot carry its config.
    """
    # These import jax, which --help need not wait for.
    from llama_jax.checkpoint.companions import complete_hf_directory, write_notice
    from llama_jax.checkpoint.formats import CanonicalSource, open_checkpoint, write_checkpoint
    from llama_jax.checkpoint.safetensors import num_bytes

    if num_shards != 1 and to != "meta":
        raise ValueError(f"--num-shards {num_shards} is for --to meta only; the others are cut by size")
    if recipe is not None:
        recipe.check(to)
    vacant_directory(dst)
    checkpoint = open_checkpoint(src, **opening)
    cast_to = DTYPES[dtype] if dtype else checkpoint.dtype if checkpoint.packed else None
    source = CanonicalSource(checkpoint.source, checkpoint.cfg, cast_to)
    token_ids = checkpoint.metadata or _token_ids(checkpoint.companions)
    total = sum(map(num_bytes, source.tensors.values()))
    device = _device() if recipe is not None and recipe.calibration else contextlib.nullcontext()
    with device, staged_directory(dst) as staged, progress(total, desc="convert") as bar:
        copy_companions(checkpoint.companions, staged)
        if checkpoint.format == "meta":
            write_notice(staged, checkpoint.cfg)
        if to == "hf":
            complete_hf_directory(staged, checkpoint.cfg, {} if checkpoint.format == "hf" else token_ids)
        counted = _CountedSource(source, bar)
        how: dict[str, Any] = {"to": to, "metadata": token_ids, "num_shards": num_shards}
        if recipe is not None and to == "gguf":
            how["gguf_type"] = recipe.scheme.upper()
        elif recipe is not None:
            how["compression"] = _compression(checkpoint, counted, recipe)
        write_checkpoint(staged, checkpoint.cfg, counted, **how)
    return how["compression"].report if "compression" in how else None


def _compression(checkpoint: "Checkpoint", source: "Source", recipe: Recipe) -> "Compression":
    """Source in few bits. Raises ValueError for a scheme that cannot be written, and for too little text."""
    from llama_jax.calibration.layers import Calibration
    from llama_jax.calibration.text import read_rows
    from llama_jax.checkpoint.quantized.compressing import Compression

    cfg, scheme, rounding = checkpoint.cfg, find_scheme(recipe.scheme), None
    if recipe.calibration:
        rows = read_rows(recipe.calibration, load_tokenizer(checkpoint.companions), cfg)
        rounding = Calibration(cfg, scheme, recipe.method, rows).weights
    return Compression(source, scheme, cfg.num_layers, rounding)


@contextlib.contextmanager
def _device() -> Iterator[None]:
    """One device, on which text runs through the layers."""
    from llama_jax.devices import open_devices, use_compilation_cache
    from llama_jax.mesh import use_mesh

    use_compilation_cache()
    with use_mesh("data=1", open_devices()):
        yield


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
    parser.add_argument("--to", choices=("hf", "meta", "orbax", "gguf"), help="default with --quantize: hf")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="cast the weights; default: keep them to the bit")
    parser.add_argument("--num-shards", type=int, default=1, metavar="N", help="consolidated.NN.pth files of --to meta")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. rope.factor=32")
    parser.add_argument("--allow-unknown-config", action="store_true", help="ignore unknown config attributes")
    group = parser.add_argument_group("few bits")
    group.add_argument(
        "--quantize",
        metavar="Q",
        help="--to hf: int8, int8-a8, int4, int4-g128, fp8, ... in compressed-tensors, nf4 as bitsandbytes has it; "
        "--to gguf: q8_0 or q4_0",
    )
    group.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to choose values by and, every fifth row of it, to measure what they cost",
    )
    group.add_argument(
        "--method", choices=tuple(METHODS), default="rtn", help="how values are chosen; default: rtn, to nearest"
    )
    args = parser.parse_args(argv)
    if args.to is None and args.quantize is None:
        parser.error("give --to, or --quantize")
    if args.quantize is None and (args.calibration or args.method != "rtn"):
        parser.error("--calibration and --method are for --quantize")
    report = convert(
        args.src,
        args.dst,
        to=args.to or "hf",
        dtype=args.dtype,
        num_shards=args.num_shards,
        recipe=args.quantize and Recipe(args.quantize, args.method, args.calibration),
        overrides=parse_settings(args.set),
        allow_unknown_config=args.allow_unknown_config,
    )
    print(*(report.lines() if report else ()), f"wrote {args.dst}", sep="\n")


if __name__ == "__main__":
    run_entry(main)
