"""Which checkpoint is at a path, and writing one: Hugging Face, Meta, GGUF or this project's own.

The project's own form is a directory with model.json (the architecture) and params/, an Orbax
checkpoint of canonical names and shapes. A run directory of train.pretrain holds one per saved
step in checkpoints/, in some of them another, the average of those up to it, and the tokenizer.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from llama_jax.checkpoint import gguf, hf, meta
from llama_jax.checkpoint.hub import Check, download
from llama_jax.checkpoint.layout import check_tensors
from llama_jax.checkpoint.names import canonical_shapes
from llama_jax.checkpoint.quantized import QuantizedSource, open_quantized
from llama_jax.checkpoint.quantized.compressing import Compression
from llama_jax.checkpoint.quantized.meta_fp8 import open_scaled
from llama_jax.checkpoint.quantized.packed import PackedWeight
from llama_jax.checkpoint.safetensors import SafetensorsDirectory, write_sharded
from llama_jax.checkpoint.source import Source, TensorSpec
from llama_jax.config import LlamaConfig, RopeConfig, set_field
from llama_jax.paths import as_path

Format = Literal["hf", "meta", "orbax", "gguf"]

FORMATS: tuple[Format, ...] = ("hf", "meta", "orbax", "gguf")

MODEL_FILE = "model.json"

GGUF = ".gguf"

_DESCRIPTIONS = (MODEL_FILE, "config.json", "params.json")

AVERAGE = "average"  # of the checkpoints of a stage, within the last of them

_STEPS = "checkpoints"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its architecture, exactly the tensors of it, and where it came from.

    directory holds the weights, companions the tokenizer; metadata are token ids for config.json,
    empty where the format does not say them. packed: the weights that are stored quantized, which source
    gives as float32; dtype is that of the others.
    """

    directory: Path
    companions: Path
    format: Format
    cfg: LlamaConfig
    source: Source
    metadata: Mapping[str, Any]
    packed: Mapping[str, PackedWeight]
    dtype: np.dtype


def open_checkpoint(
    path: str | Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    allow_unknown_config: bool = False,
    check: Check | None = None,
) -> Checkpoint:
    """Open a directory, run directory (`runs/x`, `runs/x@12000`, `runs/x@average`) or hub id (`org/name@revision`).

    overrides replaces config fields ({"rope.factor": 32}). check is asked about a model of the hub,
    and may raise, before its weights are fetched. Raises ValueError or FileNotFoundError that says
    what is wrong with what was found.
    """
    directory = find_checkpoint(str(path), check)
    metadata: Mapping[str, Any] = {}
    if directory.suffix == GGUF:
        form, (cfg, metadata) = "gguf", gguf.read_gguf(directory)
    elif (directory / MODEL_FILE).exists():
        form, (cfg, metadata) = "orbax", _read_model_file(directory / MODEL_FILE)
    elif (directory / "config.json").exists():
        form, (cfg, metadata) = "hf", hf.read_config(directory, allow_unknown=allow_unknown_config)
    elif (directory / "params.json").exists():
        form, cfg = "meta", meta.read_params(directory, allow_unknown=allow_unknown_config)
    else:
        raise ValueError(_nothing_here(directory))
    for key, value in (overrides or {}).items():
        cfg = _override(cfg, key, value)
    source, file_of = _open_source(form, directory, cfg)
    check_tensors(cfg, source, file_of)
    companions = _run_of(directory) if form == "orbax" else directory
    packed = source.packed if isinstance(source, QuantizedSource) else {}
    embedding = "model.embed_tokens.weight"
    dtype = np.dtype(ml_dtypes.bfloat16) if embedding in packed else source.tensors[embedding].dtype
    return Checkpoint(directory, companions, form, cfg, CanonicalSource(source, cfg), metadata, packed, dtype)


def _override(cfg: LlamaConfig, key: str, value: Any) -> LlamaConfig:
    """The config with a field replaced by a value of the same type."""
    fields = dataclasses.asdict(cfg)
    fields |= {f"rope.{name}": field for name, field in fields["rope"].items()}
    current = fields.get(key, value)  # for a key that does not exist set_field names those that do
    if isinstance(value, bool) != isinstance(current, bool) or not isinstance(value, (int, type(current))):
        raise ValueError(f"{key}={value!r}: expected a value like {current!r}")
    return set_field(cfg, key, value)


def _open_source(form: Format, directory: Path, cfg: LlamaConfig) -> tuple[Source, Callable[[str], Path]]:
    """The stored tensors, and what an error about one of them names."""
    if form == "orbax":
        from llama_jax.checkpoint import orbax  # half a second to import

        return orbax.OrbaxSource(directory / "params"), lambda name: directory
    if form == "gguf":
        return gguf.open_gguf(directory, cfg), lambda name: directory
    if form == "meta":
        return open_scaled(directory, cfg, meta.MetaSource(directory, cfg)), lambda name: directory
    _refuse_pickled(directory)
    source = SafetensorsDirectory(directory)
    if (described := hf.read_quantization(directory)) is None:
        return source, source.file_of
    try:
        return open_quantized(described, source), source.file_of
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def find_checkpoint(path: str, check: Check | None = None) -> Path:
    """The directory or GGUF file that a checkpoint argument names; a hub id is downloaded if check lets it."""
    directory = as_path(path)
    if directory.is_dir():
        if any((directory / name).exists() for name in _DESCRIPTIONS):
            return directory
        files = sorted(directory.glob(f"*{GGUF}"))
        if len(files) > 1:
            raise ValueError(f"{path} holds {len(files)} {GGUF} files; name one of them, such as {files[0]}")
        return files[0] if files else _find_step(directory) if (directory / _STEPS).is_dir() else directory
    if directory.suffix == GGUF and directory.exists():
        return directory
    if directory.exists():
        raise ValueError(f"{path} is a file; a checkpoint is given as its directory, or as a {GGUF} file")
    base, _, step = path.rpartition("@")
    if base and as_path(base).is_dir():
        return _find_step(as_path(base), step)
    if _HUB_ID.fullmatch(path):
        return download(path, check)
    raise FileNotFoundError(f"no checkpoint at {path}")


def _find_step(run: Path, asked: str | None = None) -> Path:
    """The directory of a saved step, by default of the newest; one without model.json was never finished.

    "average" is that of the newest step that has one.
    """
    folder = run / _STEPS
    found = [p.name for p in run.glob(f"{_STEPS}/*") if p.name.isdecimal() and (p / MODEL_FILE).exists()]
    steps = sorted(found, key=int, reverse=True)
    if not steps:
        raise FileNotFoundError(f"{run} holds no saved checkpoints")
    if asked == AVERAGE:
        averages = [path for step in steps if ((path := folder / step / AVERAGE) / MODEL_FILE).exists()]
        if not averages:
            raise FileNotFoundError(f"{run} has no average, which a stage with average = true keeps; {_steps(steps)}")
        return averages[0]
    if asked is not None and asked not in steps:
        raise FileNotFoundError(f"{run} has no checkpoint {asked!r}; {_steps(steps)}")
    return folder / (asked or steps[0])


def _steps(newest_first: list[str]) -> str:
    return f"it has {', '.join(reversed(newest_first))}"


def _run_of(directory: Path) -> Path:
    """The run directory that a saved step or an average belongs to, with the tokenizer; else the directory itself."""
    step = directory.parent if directory.name == AVERAGE else directory
    return step.parents[1] if step.name.isdecimal() and step.parent.name == _STEPS else directory


def _nothing_here(directory: Path) -> str:
    entries = sorted(p.name for p in directory.iterdir())
    if not entries:
        return f"{directory} is empty; expected a Hugging Face, Meta, GGUF or Orbax checkpoint"
    shown = ", ".join(entries[:5]) + (", ..." if len(entries) > 5 else "")
    return f"{directory} is not a checkpoint: it has none of {', '.join(_DESCRIPTIONS)}, *{GGUF}, but {shown}"


def _refuse_pickled(directory: Path) -> None:
    pickled = sorted(directory.glob("*.bin"))
    if pickled and not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"{pickled[0]} is a pickle, which is not opened; save the model as safetensors (transformers can)"
        )


def _read_model_file(path: Path) -> tuple[LlamaConfig, Mapping[str, Any]]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        config = stored["config"]
        return LlamaConfig(**config | {"rope": RopeConfig(**config["rope"])}), dict(stored["metadata"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a model description: {error!r}") from None


def write_model_file(directory: Path, cfg: LlamaConfig, metadata: Mapping[str, Any]) -> None:
    """Write model.json of the project's own form."""
    text = json.dumps({"config": dataclasses.asdict(cfg), "metadata": dict(metadata)}, indent=2)
    (directory / MODEL_FILE).write_text(text + "\n", encoding="utf-8")


def write_checkpoint(
    directory: Path,
    cfg: LlamaConfig,
    source: Source,
    *,
    to: Format,
    metadata: Mapping[str, Any] | None = None,
    num_shards: int = 1,
    compression: Compression | None = None,
    gguf_type: str | None = None,
) -> None:
    """Write the tensors of a config as a checkpoint into a directory, a tensor at a time, its description last.

    source holds exactly the canonical tensors. num_shards is the number of consolidated.NN.pth
    files of the Meta form. compression: of the source, for "hf". gguf_type: that of the matrices, by default
    their own; model.gguf also takes the tokenizer that is in the directory.
    """
    if to == "hf":
        dtype = source.tensors["model.embed_tokens.weight"].dtype.name
        specs, tensors, described = source.tensors, _read_all(source), None
        if compression is not None:
            specs, tensors, described = compression.specs, compression.tensors(), compression.described()
        write_sharded(directory, specs, tensors)
        hf.write_config(directory, cfg, dtype=dtype, token_ids=metadata or {}, quantization=described)
    elif to == "meta":
        meta.write_meta(directory, cfg, source, num_shards=num_shards)
    elif to == "gguf":
        gguf.write_gguf_model(directory, cfg, source, type_name=gguf_type)
    else:
        from llama_jax.checkpoint import orbax

        orbax.write_orbax(directory / "params", source.tensors, _read_all(source))
        write_model_file(directory, cfg, metadata or {})


def _read_all(source: Source) -> Iterator[tuple[str, np.ndarray]]:
    for name in source.tensors:
        yield name, source.read(name)


class CanonicalSource:
    """Exactly the tensors of a config from a source that may hold more (a tied head, say), cast if asked."""

    def __init__(self, source: Source, cfg: LlamaConfig, dtype: np.dtype | None = None):
        """Nothing is read until a tensor is asked for."""
        self._source = source
        specs = {name: source.tensors[name] for name in canonical_shapes(cfg)}
        self.tensors = {name: TensorSpec(spec.shape, dtype or spec.dtype) for name, spec in specs.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor or its slice."""
        return self._source.read(name, index).astype(self.tensors[name].dtype, copy=False)
