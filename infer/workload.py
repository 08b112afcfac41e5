"""What a plan of generation is asked for: which model, beside what, how many prompts of which length.

The invariant: what the options of an entry mean here is what they mean in its run, and no weight is read but those of
adapters, whose shapes their files alone tell.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from infer.entry import check_num_draft_tokens, is_streamed, named_adapters, open_model, steps_per_dispatch
from infer.speculation import NUM_DRAFT_TOKENS, DraftModel, Ngrams, check_draft
from llama_jax.checkpoint import Checkpoint, open_checkpoint
from llama_jax.checkpoint.adapters import load_adapters
from llama_jax.config import PRESETS, LlamaConfig, set_field
from llama_jax.entry import parse_settings
from llama_jax.memory import abstract_model, weight_bytes
from llama_jax.model import Llama
from llama_jax.schemes import Scheme, find_scheme
from llama_jax.slices import Slice, use_slice

# Context that is planned for where none is asked for and the model has more.
CONTEXT = 8192


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked of the engine: batch prompts at a time, each of prompt_tokens that go on to the end of the context.

    engine: arguments of the Engine, whose context is this one if they do not say. is_served: its pool takes all
    memory that it may, whatever the prompts. draft: the smaller model that guesses num_draft_tokens at a time, and its
    dtype; without one the text itself does, if they are not 0. adapters: directories by name.
    """

    cfg: LlamaConfig
    dtype: DTypeLike
    batch: int
    prompt_tokens: int
    context: int
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_served: bool = False
    quantize: str | None = None
    draft: tuple[LlamaConfig, DTypeLike] | None = None
    num_draft_tokens: int = 0
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def scheme(self) -> Scheme | None:
        """How the weights are quantized."""
        return None if self.quantize is None else find_scheme(self.quantize)

    def models(self) -> tuple[Llama, DraftModel | Ngrams | None]:
        """The model with its adapters and what guesses, abstract, on the ambient mesh.

        Raises ValueError for an adapter that does not belong to the model.
        """
        model = abstract_model(self.cfg, self.dtype, self.scheme, "layers")
        if self.adapters:
            model = load_adapters(model, self.adapters)
        if self.draft is None:
            return model, Ngrams(self.num_draft_tokens) if self.num_draft_tokens else None
        return model, DraftModel(abstract_model(*self.draft, None, "layers"), self.num_draft_tokens)

    def stored_bytes(self, target: Slice) -> int:
        """Bytes of all weights, those of a draft among them."""
        drafted = 0 if self.draft is None else jnp.dtype(self.draft[1]).itemsize * self.draft[0].num_params()
        if self.scheme is None:
            return drafted + jnp.dtype(self.dtype).itemsize * self.cfg.num_params()
        with use_slice(target, "data=-1"):  # all of them on each
            return drafted + weight_bytes(self.cfg, self.dtype, self.scheme)


def workload(args: argparse.Namespace, target: Slice, served: Mapping[str, Any] | None) -> Workload:
    """What the options of an entry ask for; --checkpoint and --draft may name presets.

    served: arguments of the engine of a server. Raises ValueError for options that exclude each other.
    """
    cfg, dtype = _model(args, target)
    limit = args.max_seq_len or cfg.max_seq_len
    check_num_draft_tokens(args)
    guesses = args.num_draft_tokens or NUM_DRAFT_TOKENS
    draft = _draft(args, cfg, target)
    beside = {
        "quantize": args.quantize,
        "draft": draft,
        "num_draft_tokens": guesses if draft or args.speculate else 0,
        "adapters": named_adapters(args),
    }
    if served is not None:
        return Workload(cfg, dtype, served["max_batch_size"], limit - 1, limit, served, is_served=True, **beside)
    context = args.max_seq_len or min(limit, CONTEXT)
    room = min(args.max_new_tokens, context - 1)
    num_prompts = max(1, len(args.prompts))
    steps = steps_per_dispatch(cfg, streamed=is_streamed(args, num_prompts))
    engine = {"max_seq_len": limit, "steps_per_dispatch": steps}
    return Workload(cfg, dtype, num_prompts, context - room, context, engine, **beside)


def _model(args: argparse.Namespace, target: Slice) -> tuple[LlamaConfig, DTypeLike]:
    """The architecture and the dtype that the run would choose."""
    if args.checkpoint in PRESETS:
        cfg, stored = PRESETS[args.checkpoint], "bfloat16"
        for key, value in parse_settings(args.set).items():
            cfg = set_field(cfg, key, value)
    else:
        checkpoint = open_model(args)
        cfg, stored = checkpoint.cfg, _stored_dtype(checkpoint)
    if args.max_seq_len is not None and not 2 <= args.max_seq_len <= cfg.max_seq_len:
        raise ValueError(f"max_seq_len={args.max_seq_len} must be between 2 and the model's {cfg.max_seq_len}")
    return cfg, _dtype(args, target, stored)


def _draft(args: argparse.Namespace, cfg: LlamaConfig, target: Slice) -> tuple[LlamaConfig, DTypeLike] | None:
    """Those of --draft. Raises ValueError for one that cannot guess for the model."""
    if args.draft is None:
        return None
    if args.draft in PRESETS:
        draft, stored = PRESETS[args.draft], "bfloat16"
    else:
        checkpoint = open_checkpoint(args.draft, allow_unknown_config=args.allow_unknown_config)
        draft, stored = checkpoint.cfg, _stored_dtype(checkpoint)
    check_draft(draft, cfg, args.max_seq_len or cfg.max_seq_len)
    return draft, _dtype(args, target, stored)


def _stored_dtype(checkpoint: Checkpoint) -> DTypeLike:
    return checkpoint.source.tensors["model.embed_tokens.weight"].dtype


def _dtype(args: argparse.Namespace, target: Slice, stored: DTypeLike) -> DTypeLike:
    return args.dtype or ("float32" if target.kind == "cpu" else stored)
