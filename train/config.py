"""A training run as frozen dataclasses, read from TOML.

The invariant: every key of a file is known and read by some code; an unknown one is an error that
names those that exist. `--set stage.2.learning_rate=1e-3` replaces a value before it is checked.
"""

import collections.abc
import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_jax.config import PRESETS, LlamaConfig, set_field

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens are and how they were made.

    directory: what train.prepare wrote; if absent it is prepared from sources (none: text that
    comes with Python) with a tokenizer of vocab_size trained on it, holding out a share of documents.
    """

    directory: str
    sources: tuple[str, ...] = ()
    holdout: float = 0.05


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101) and clipping by the global gradient norm."""

    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0


@dataclass(frozen=True)
class PhaseConfig:
    """Part of a stage at one context length.

    seq_len: tokens a row. tokens: how many are trained on. min_document_tokens: shorter documents
    are left out, because a token can only learn to look as far back as its document reaches.
    """

    seq_len: int
    tokens: int
    min_document_tokens: int = 0

    def __post_init__(self):
        """Raises ValueError if there is nothing to train."""
        if self.seq_len < 2 or self.tokens < self.seq_len:
            raise ValueError(f"a phase of {self.tokens} tokens at seq_len={self.seq_len} holds no row of 2 or more")


@dataclass(frozen=True)
class StageConfig:
    """One stage: phases one after the other under one learning-rate schedule.

    The rate rises linearly for warmup_steps to learning_rate and falls along a cosine to
    final_learning_rate at the stage's last step. rope_factor is the Llama 3.1 RoPE scaling that
    the stage trains with.
    """

    phases: tuple[PhaseConfig, ...]
    batch_tokens: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int = 0
    rope_factor: float = 1.0

    def __post_init__(self):
        """Raises ValueError if a batch does not hold whole rows."""
        for phase in self.phases:
            if self.batch_tokens % phase.seq_len:
                raise ValueError(f"batch_tokens={self.batch_tokens} is not a multiple of seq_len={phase.seq_len}")

    def phase_steps(self) -> list[int]:
        """Optimizer steps of every phase."""
        return [max(1, phase.tokens // self.batch_tokens) for phase in self.phases]


@dataclass(frozen=True)
class RunConfig:
    """What a run does beside the mathematics."""

    seed: int = 0
    mesh: str = "fsdp=-1"
    compute_dtype: str = "bfloat16"
    remat: str = "full"
    loss_chunks: int = 1
    log_every: int = 10
    eval_every: int = 200
    eval_rows: int = 32
    save_every: int = 500
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. The stages are named as `--stage` takes them."""

    name: str
    model: LlamaConfig
    data: DataConfig
    stage: Mapping[str, StageConfig]
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def stage_model(self, stage: str) -> LlamaConfig:
        """The architecture that a stage trains: its RoPE scaling and longest context."""
        settings = self.stage[stage]
        cfg = set_field(self.model, "rope.factor", settings.rope_factor)
        return dataclasses.replace(cfg, max_seq_len=max(phase.seq_len for phase in settings.phases))


def find_config(name: str) -> Path:
    """The file of a config given by path, or by the name of a shipped one from anywhere. Raises FileNotFoundError."""
    for path in (Path(name), CONFIGS / f"{name.removesuffix('.toml')}.toml"):
        if path.is_file():
            return path
    shipped = ", ".join(sorted(path.stem for path in CONFIGS.glob("*.toml")))
    raise FileNotFoundError(f"no config {name}; give a TOML file or one of {shipped}")


def read_config(name: str, settings: Mapping[str, Any] | None = None) -> TrainConfig:
    """The run described by a TOML file (see find_config), with settings such as {"run.seed": 1} replaced.

    Raises ValueError for a value of the wrong type or range and for a key that does not exist.
    """
    path = find_config(name)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    for key, value in (settings or {}).items():
        _replace(values, key, value)
    try:
        return _build(TrainConfig, {"name": path.name.removesuffix(".toml")} | _with_preset(values), "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _replace(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {key}: {parent} is a value, not a table")
    values[last] = value


def _with_preset(values: dict[str, Any]) -> dict[str, Any]:
    """`model.preset` stands for the values of a published model, which the other keys replace."""
    model = dict(values.get("model", {}))
    preset = model.pop("preset", None)
    if preset is None:
        return values
    if preset not in PRESETS:
        raise ValueError(f"unknown model.preset {preset!r}; there are {', '.join(PRESETS)}")
    base = dataclasses.asdict(PRESETS[preset])
    return values | {"model": base | model | {"rope": base["rope"] | model.get("rope", {})}}


def _build(kind: Any, value: Any, where: str) -> Any:
    """A dataclass, tuple, mapping or plain value of the annotated type from what TOML holds."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a table")
        hints = typing.get_type_hints(kind)
        unknown = sorted(value.keys() - hints.keys())
        if unknown:
            known = ", ".join(hints)
            raise ValueError(f"unknown key {_join(where, unknown[0])}; {where or 'the file'} has {known}")
        required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
        missing = sorted(required - value.keys())
        if missing:
            raise ValueError(f"{_join(where, missing[0])} is missing")
        return kind(**{key: _build(hints[key], item, _join(where, key)) for key, item in value.items()})
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list")
        return tuple(_build(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is collections.abc.Mapping:
        return {key: _build(args[1], item, _join(where, key)) for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{where}={value!r} must be of type {kind.__name__}")
    return value


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
