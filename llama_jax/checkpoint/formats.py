"""Which checkpoint is at a path, and writing one: Hugging Face, Meta or this project's own.

The project's own form is a directory with model.json (the architecture) and params/, an Orbax
checkpoint of canonical names and shapes. A run directory of train.pretrain holds one per saved
step in checkpoints/.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_jax.checkpoint import hf, meta
from llama_jax.checkpoint.layout import check_tensors
from llama_jax.checkpoint.names import canonical_shapes
from llama_jax.checkpoint.safetensors import SafetensorsDirectory, write_sharded
from llama_jax.checkpoint.source import Source, TensorSpec
from llama_jax.config import LlamaConfig, RopeConfig, set_field
from llama_jax.paths import local_path

Format = Literal["hf", "meta", "orbax"]

FORMATS: tuple[Format, ...] = ("hf", "meta", "orbax")

MODEL_FILE = "model.json"

# Attributes of config.json that are not architecture but belong to the model.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Files of a checkpoint that are not weights, fetched and carried along.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "LICENSE*",
    "USE_POLICY*",
)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its architecture, its tensors (checked against it), and where it came from.

    directory holds the weights, companions the tokenizer; metadata are token ids for config.json.
    """

    directory: Path
    companions: Path
    format: Format
    cfg: LlamaConfig
    source: Source
    metadata: dict[str, Any] = field(default_factory=dict)


def open_checkpoint(
    path: str | Path, *, overrides: Mapping[str, Any] | None = None, allow_unknown_config: bool = False
) -> Checkpoint:
    """Open a directory, run directory (`runs/x`, `runs/x@12000`) or hub id (`org/name@revision`).

    overrides replaces config fields ({"rope.factor": 32}). Raises ValueError or FileNotFoundError
    that says what is wrong with what was found.
    """
    directory = find_checkpoint(str(path))
    companions = directory.parents[1] if directory.parent.name == "checkpoints" else directory
    metadata: dict[str, Any] = {}
    if (directory / MODEL_FILE).exists():
        form, (cfg, metadata) = "orbax", _read_model_file(directory / MODEL_FILE)
    elif (directory / "config.json").exists():
        form, cfg = "hf", hf.read_config(directory, allow_unknown=allow_unknown_config)
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        metadata = {key: config[key] for key in _TOKEN_IDS if key in config}
    elif (directory / "params.json").exists():
        form, cfg = "meta", meta.read_params(directory, allow_unknown=allow_unknown_config)
    else:
        raise ValueError(_nothing_here(directory))
    for key, value in (overrides or {}).items():
        cfg = set_field(cfg, key, value)
    source = _open_source(form, directory, cfg)
    check_tensors(cfg, source, str(directory))
    return Checkpoint(directory, companions, form, cfg, source, metadata)


def _open_source(form: Format, directory: Path, cfg: LlamaConfig) -> Source:
    if form == "orbax":
        from llama_jax.checkpoint import orbax  # half a second to import

        return orbax.OrbaxSource(directory / "params")
    if form == "meta":
        return meta.MetaSource(directory, cfg)
    return SafetensorsDirectory(directory)


def find_checkpoint(path: str) -> Path:
    """The local directory of weights that a checkpoint argument names; a hub id is downloaded."""
    if local_path(path).is_dir():
        return _newest_step(local_path(path))
    base, _, step = path.rpartition("@")
    if base and (local_path(base) / "checkpoints").is_dir():
        directory = local_path(base) / "checkpoints" / step
        if not step.isdigit() or not directory.is_dir():
            raise FileNotFoundError(f"{base} has no checkpoint {step!r}; it has {', '.join(_steps(local_path(base)))}")
        return directory
    if local_path(path).exists():
        raise ValueError(f"{path} is a file; a checkpoint is given as its directory")
    if _HUB_ID.fullmatch(path) and not path.startswith("."):
        return _download(path)
    raise FileNotFoundError(f"no checkpoint at {path}")


def _steps(run: Path) -> list[str]:
    return sorted((p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()), key=int)


def _newest_step(directory: Path) -> Path:
    if not (directory / "checkpoints").is_dir():
        return directory
    steps = _steps(directory)
    if not steps:
        raise FileNotFoundError(f"the run {directory} has not saved a checkpoint yet")
    return directory / "checkpoints" / steps[-1]


def _download(hub_id: str) -> Path:
    """The local snapshot of a hub repository: weights, configs and tokenizer, not Meta's original/."""
    import huggingface_hub

    name, _, revision = hub_id.partition("@")
    patterns = ["*.safetensors", "config.json", "model.safetensors.index.json", *COMPANION_FILES]
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=patterns, ignore_patterns="*/*"
        )
    except Exception as error:  # the hub's client raises its own, httpx's and OSError's kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{hub_id} is neither a local directory nor could it be downloaded: {reason}") from None
    return Path(folder)


def _nothing_here(directory: Path) -> str:
    entries = sorted(p.name for p in directory.iterdir())
    if not entries:
        return f"{directory} is empty; expected a Hugging Face, Meta or Orbax checkpoint"
    pickled = [name for name in entries if name.endswith(".bin")]
    if pickled:
        return f"{directory} holds pickled weights ({pickled[0]}); convert them to safetensors with transformers"
    shown = ", ".join(entries[:5]) + (", ..." if len(entries) > 5 else "")
    return f"{directory} is not a checkpoint: no config.json, params.json or {MODEL_FILE} (it has {shown})"


def _read_model_file(path: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        config = stored["config"]
        return LlamaConfig(**config | {"rope": RopeConfig(**config["rope"])}), stored["metadata"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
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
) -> None:
    """Write canonical tensors as a checkpoint into an empty directory, a tensor at a time.

    num_shards is the number of consolidated.NN.pth files of the Meta form.
    """
    metadata = metadata or {}
    # By the config, not by the file: a tied head that a file stores all the same is left behind.
    specs = {name: source.tensors[name] for name in canonical_shapes(cfg)}
    if to == "hf":
        dtype = np.dtype(specs["model.embed_tokens.weight"].dtype).name
        hf.write_config(directory, cfg, dtype, dict(metadata))
        write_sharded(directory, specs, read_all(source, specs))
    elif to == "meta":
        meta.write_meta(directory, cfg, source, num_shards=num_shards)
    else:
        from llama_jax.checkpoint import orbax

        write_model_file(directory, cfg, metadata)
        orbax.write_orbax(directory / "params", specs, read_all(source, specs))


def read_all(source: Source, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors, one after the other."""
    for name in names:
        yield name, source.read(name)


class CastSource:
    """A source whose tensors come in another dtype."""

    def __init__(self, source: Source, dtype: np.dtype):
        """Nothing is read until a tensor is asked for."""
        self._source, self._dtype = source, dtype
        self.tensors = {name: TensorSpec(spec.shape, dtype) for name, spec in source.tensors.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor or its slice, cast."""
        return self._source.read(name, index).astype(self._dtype, copy=False)
