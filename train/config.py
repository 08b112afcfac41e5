"""A training run as frozen dataclasses, read from TOML.

The invariant: every key of a file is known and read by some code; an unknown one is an error that
names those that exist. `--set stage.2.learning_rate=1e-3` replaces a value before it is checked.
"""

import collections.abc
import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from llama_jax.chips import CHIPS
from llama_jax.config import PRESETS, LlamaConfig, set_field
from llama_jax.schemes import Scheme, find_scheme

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens are and how they were made.

    directory: what train.prepare wrote. If absent, a run without --init prepares it with a tokenizer of
    vocab_size trained on the text, holding out a share of documents: from sources or, at the vocabulary
    of the demo, from text that comes with Python.

    mixture: share of the rows by source, for the stages that have none of their own; without any, sources
    are read in proportion to their tokens, which "*" stands for. The source "recall" is synthetic (see
    train/data/recall.py).
    """

    directory: str
    sources: tuple[str, ...] = ()
    holdout: float = 0.05
    mixture: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        """Raises ValueError for shares that do not add up."""
        check_mixture(self.mixture)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101) or Muon (see train/muon.py), and what guards them.

    moment_dtype: how the moments are stored; they are computed in float32. z_loss: weight of the
    squared log-normalizer in the objective (arXiv 2204.02311, section 5), which keeps logits small.

    A step whose loss or gradient norm is not finite or above max_loss or max_grad_norm changes no
    weight. on_spike says what follows: "skip" goes on, "rollback" returns to the newest checkpoint
    and goes on behind the data read so far; more than max_skipped such steps in a row are an error.
    """

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: str = "float32"
    z_loss: float = 0.0
    max_loss: float = math.inf
    max_grad_norm: float = math.inf
    on_spike: str = "skip"
    max_skipped: int = 3

    def __post_init__(self):
        """Raises ValueError for a name that does not exist."""
        _check_choice("name", self.name, "adamw", "muon")
        _check_choice("moment_dtype", self.moment_dtype, "float32", "bfloat16")
        _check_choice("on_spike", self.on_spike, "skip", "rollback")


@dataclass(frozen=True)
class PhaseConfig:
    """Part of a stage at one context length and batch size.

    seq_len: tokens a row. tokens: how many are trained on. batch_tokens: tokens a batch; the stage
    fills in its own for 0. min_document_tokens: shorter documents are left out, because a token can only learn to
    look as far back as its document reaches.
    """

    seq_len: int
    tokens: int
    batch_tokens: int = 0
    min_document_tokens: int = 0

    def __post_init__(self):
        """Raises ValueError if there is nothing to train."""
        if self.seq_len < 2 or self.tokens < self.seq_len:
            raise ValueError(f"a phase of {self.tokens} tokens at seq_len={self.seq_len} holds no row of 2 or more")


@dataclass(frozen=True)
class LengthWeight:
    """Documents of at_least so many tokens come weight times an epoch; 2.5 is twice or three times."""

    at_least: int
    weight: float


@dataclass(frozen=True)
class MixtureChange:
    """Another mixture from the step that begins with this many of the stage's tokens behind it."""

    after_tokens: int
    mixture: Mapping[str, float]

    def __post_init__(self):
        """Raises ValueError for shares that do not add up."""
        check_mixture(self.mixture)


@dataclass(frozen=True)
class GateConfig:
    """When a longer context counts as learned (Llama 3 report, section 3.4.2); checked at the end of each phase.

    The held-out loss at the short context is at most short_tolerance nats above what it was before the stage,
    a share `needles` of num_keys keys at num_depths depths is found at the new length and at half of it, and the
    loss at the positions that are new has fallen since the phase began. A phase that fails trains on for
    retry_tokens and is asked again; after max_retries the run stops with a report.
    """

    short_tolerance: float = 0.01
    needles: float = 1.0
    num_keys: int = 4
    num_depths: int = 5
    retry_tokens: int = 0
    max_retries: int = 5

    def __post_init__(self):
        """Raises ValueError for a share above 1 or a count that cannot be."""
        if not 0 <= self.needles <= 1:
            raise ValueError(f"needles={self.needles} is not a share from 0 to 1")
        if self.num_keys < 1 or self.num_depths < 1 or self.retry_tokens < 0 or self.max_retries < 0:
            raise ValueError("num_keys and num_depths count from 1, retry_tokens and max_retries from 0")


@dataclass(frozen=True)
class StageConfig:
    """One stage: phases one after the other under one learning-rate schedule.

    mixture: share of the rows by source, {} for data.mixture; mixture_changes: others from a count of
    tokens on. length_weights: by source, how often its longer documents come. gate: what a longer context must
    show before the run goes on. average: keep the mean of the stage's checkpoints (Polyak averaging),
    which is `RUN_DIR@average`.

    The rate rises linearly for warmup_steps to learning_rate and falls, along a "cosine" or in a
    "linear" line, to final_learning_rate at step decay_steps, 0 for the stage's last. rope_factor is
    the Llama 3.1 RoPE scaling that the stage trains with, 0 for that of what it starts from; mesh its mesh,
    "" for run.mesh; save_every its steps between checkpoints, 0 for run.save_every.
    """

    phases: tuple[PhaseConfig, ...]
    batch_tokens: int
    learning_rate: float
    final_learning_rate: float
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    rope_factor: float = 0.0
    mesh: str = ""
    save_every: int = 0
    mixture: Mapping[str, float] = field(default_factory=dict)
    mixture_changes: tuple[MixtureChange, ...] = ()
    length_weights: Mapping[str, tuple[LengthWeight, ...]] = field(default_factory=dict)
    gate: GateConfig | None = None
    average: bool = False

    def __post_init__(self):
        """Raises ValueError for no phase, a batch that does not hold whole rows, or rates that cannot be."""
        _check_choice("schedule", self.schedule, "cosine", "linear")
        check_mixture(self.mixture)
        if not self.phases:
            raise ValueError("phases is empty; a stage trains in at least one")
        phases = [dataclasses.replace(p, batch_tokens=p.batch_tokens or self.batch_tokens) for p in self.phases]
        object.__setattr__(self, "phases", tuple(phases))
        for phase in phases:
            if phase.batch_tokens < 1 or phase.batch_tokens % phase.seq_len:
                raise ValueError(f"batch_tokens={phase.batch_tokens} is not a multiple of seq_len={phase.seq_len}")
        if not 0 <= self.final_learning_rate <= self.learning_rate or self.learning_rate == 0:
            raise ValueError(
                f"learning_rate={self.learning_rate} must be positive and final_learning_rate="
                f"{self.final_learning_rate} between 0 and it"
            )
        for key in ("warmup_steps", "decay_steps", "save_every"):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 0")

    def phase_rows(self, phase: PhaseConfig) -> int:
        """Rows of a batch in this phase."""
        return phase.batch_tokens // phase.seq_len

    def phase_steps(self) -> list[int]:
        """Optimizer steps of every phase."""
        return [max(1, phase.tokens // phase.batch_tokens) for phase in self.phases]

    def tokens_after(self, step: int) -> int:
        """Tokens that the stage still trains on after this many of its steps."""
        left = 0
        for phase, steps in zip(self.phases, self.phase_steps(), strict=True):
            left += max(0, steps - step) * phase.batch_tokens
            step = max(0, step - steps)
        return left


@dataclass(frozen=True)
class RunConfig:
    """What a run does beside the mathematics.

    quantize: the scheme by which every product rounds its weights while their float32 form is trained ("" for none),
    of those that inference has. loss_chunks: into how many parts of the vocabulary the loss takes its logits.
    micro_batch_tokens: the most tokens that a device takes at a time, 0 for its share of the whole batch; gradients
    of the parts are added up in float32. compiler_options: XLA's for the step, by platform (tpu, gpu, cpu)
    or by chip (v5p), whose go before its platform's.
    """

    seed: int = 0
    mesh: str = "fsdp=-1"
    compute_dtype: str = "bfloat16"
    quantize: str = ""
    remat: str = "full"
    loss_chunks: int = 1
    micro_batch_tokens: int = 0
    compiler_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    log_every: int = 10
    eval_every: int = 200
    eval_rows: int = 32
    save_every: int = 500
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ("tensorboard",)
    watchdog_seconds: float = 600.0

    def __post_init__(self):
        """Raises ValueError for a dtype that is not computed in, a scheme or a count that cannot be."""
        _check_choice("compute_dtype", self.compute_dtype, "bfloat16", "float32")
        if self.scheme and self.scheme.inner_mlp_only:
            raise ValueError(
                f"quantize={self.quantize!r} treats layers unlike, which training scans alike; use int8-a8"
            )
        for key in ("loss_chunks", "log_every", "eval_every", "eval_rows", "save_every", "keep_checkpoints"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}={getattr(self, key)} must be at least 1")
        if self.micro_batch_tokens < 0:
            raise ValueError(f"micro_batch_tokens={self.micro_batch_tokens} must be at least 0, which sets no bound")
        for where in self.compiler_options:
            _check_choice("compiler_options", where, "tpu", "gpu", *CHIPS)

    @property
    def scheme(self) -> Scheme | None:
        """How weights are rounded in training. Raises ValueError for an unknown one."""
        return find_scheme(self.quantize) if self.quantize else None


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
        """The architecture that a stage trains: its RoPE scaling, and the longest context up to it."""
        cfg, factor = self.model, self.stage[stage].rope_factor
        if factor:
            cfg = set_field(cfg, "rope.factor", factor)
        stages = [*takewhile(stage.__ne__, self.stage), stage]
        longest = max(phase.seq_len for name in stages for phase in self.stage[name].phases)
        return dataclasses.replace(cfg, max_seq_len=longest)

    def stage_mesh(self, stage: str) -> str:
        """The mesh that a stage trains on, as text."""
        return self.stage[stage].mesh or self.run.mesh


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
    model = values.get("model")
    if not isinstance(model, dict) or "preset" not in model:
        return values
    model = dict(model)
    preset, rope = model.pop("preset"), model.get("rope", {})
    if not isinstance(rope, dict):
        raise ValueError("model.rope must be a table")
    if preset not in tuple(PRESETS):
        raise ValueError(f"unknown model.preset {preset!r}; there are {', '.join(PRESETS)}")
    base = dataclasses.asdict(PRESETS[preset])
    return values | {"model": base | model | {"rope": base["rope"] | rope}}


def _build(kind: Any, value: Any, where: str) -> Any:
    """A dataclass, tuple, mapping or plain value of the annotated type from what TOML holds."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    is_record = isinstance(kind, type) and dataclasses.is_dataclass(kind)
    if (is_record or origin is collections.abc.Mapping) and not isinstance(value, dict):
        raise ValueError(f"{where} must be a table")
    if origin is types.UnionType:  # X | None: what is there is an X
        return _build(args[0], value, where)
    if is_record:
        hints = typing.get_type_hints(kind)
        unknown = sorted(value.keys() - hints.keys())
        if unknown:
            known = ", ".join(hints)
            raise ValueError(f"unknown key {_join(where, unknown[0])}; {where or 'the file'} has {known}")
        required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
        missing = sorted(required - value.keys())
        if missing:
            raise ValueError(f"{_join(where, missing[0])} is missing")
        fields = {key: _build(hints[key], item, _join(where, key)) for key, item in value.items()}
        try:
            return kind(**fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}" if where else str(error)) from None
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


def check_mixture(mixture: Mapping[str, float]) -> None:
    """Raise ValueError if shares are negative or do not sum to 1; none at all are allowed."""
    if mixture and (min(mixture.values()) < 0 or not math.isclose(sum(mixture.values()), 1.0, abs_tol=1e-6)):
        given = ", ".join(f"{name}={share:g}" for name, share in mixture.items())
        raise ValueError(f"the mixture {given} sums to {sum(mixture.values()):g}; expected shares from 0 that sum to 1")


def _check_choice(key: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r} is not one of {', '.join(choices)}")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
