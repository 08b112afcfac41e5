"""Generation planned for a slice that need not be here: what fits, and how fast a token can come at best.

The engine's own prefill and decode are compiled, with abstract weights and caches, for prompts that
fill the context up to the new tokens. A decode step reads every weight and the whole cache once, so
its least time is those bytes over the memory's bandwidth. The invariant: what is compiled here for
cpu:8 is what the engine runs on eight CPU devices.
"""

import argparse
import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from infer.engine import Engine
from infer.entry import open_model
from infer.sampling import SamplingParams
from llama_jax.config import PRESETS, LlamaConfig, set_field
from llama_jax.devices import model_name, use_compilation_cache
from llama_jax.entry import parse_settings, say
from llama_jax.memory import bytes_a_device, weight_bytes
from llama_jax.mesh import inference_mesh_spec, use_mesh
from llama_jax.model import Llama
from llama_jax.plan import Plan, gib, plan, rows, table
from llama_jax.slices import Slice, open_slice, parse_slice, smallest_slice

# Context that is planned for where none is asked for and the model has more.
CONTEXT = 8192


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """Both programs of generation on a slice; bytes are those of one chip. advice: what to change if they do not fit.

    largest_batch: prompts at a time at this context. largest_context: tokens a prompt at this batch,
    at most the model's. For both all that is not weights is taken to grow in proportion.
    decode_read_seconds: to read weights and cache once at the memory's full bandwidth; None on CPUs.
    """

    fits: bool
    dtype: str
    batch: int
    context: int
    weights_bytes: int
    cache_bytes: int
    decode_read_bytes: int
    decode_read_seconds: float | None
    tokens_per_second: float | None
    largest_batch: int
    largest_context: int
    advice: str | None
    prefill: Plan
    decode: Plan


def print_plan(args: argparse.Namespace) -> None:
    """Plan what the options of infer.generate ask for; --checkpoint may name a preset, whose weights are not needed.

    Raises ValueError for what cannot be planned.
    """
    target = parse_slice(args.plan)
    cfg, dtype = _model(args, target)
    context = args.max_seq_len or min(cfg.max_seq_len, CONTEXT)
    new_tokens = min(args.max_new_tokens, context - 1)
    batch = max(1, len(args.prompts))
    found = plan_generation(
        cfg, target, mesh=args.mesh, dtype=dtype, batch=batch, prompt_tokens=context - new_tokens, context=context
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        print(table(_lines(cfg, found)))


def _model(args: argparse.Namespace, target: Slice) -> tuple[LlamaConfig, DTypeLike]:
    """The architecture and the dtype that the run would choose."""
    if args.checkpoint in PRESETS:
        cfg, stored = PRESETS[args.checkpoint], "bfloat16"
        for key, value in parse_settings(args.set).items():
            cfg = set_field(cfg, key, value)
    else:
        checkpoint = open_model(args)
        cfg, stored = checkpoint.cfg, checkpoint.source.tensors["model.embed_tokens.weight"].dtype
    if args.max_seq_len is not None and not 2 <= args.max_seq_len <= cfg.max_seq_len:
        raise ValueError(f"max_seq_len={args.max_seq_len} must be between 2 and the model's {cfg.max_seq_len}")
    return cfg, args.dtype or ("float32" if target.kind == "cpu" else stored)


def plan_generation(
    cfg: LlamaConfig,
    target: Slice,
    *,
    mesh: str | None,
    dtype: DTypeLike,
    batch: int,
    prompt_tokens: int,
    context: int,
) -> GenerationPlan:
    """Compile prefill and decode of a batch of prompts that go on to the end of the context."""
    if target.num_slices > 1:
        raise ValueError(f"{target}: a mesh over several slices is not built yet; plan one of them")
    use_compilation_cache()
    devices = open_slice(target)
    num_local = sum(device.process_index == devices[0].process_index for device in devices)
    with use_mesh(mesh or inference_mesh_spec(cfg, len(devices), num_local), devices):
        model = abstract_model(cfg, dtype)
        engine = Engine(model, max_seq_len=context, max_batch_size=max(batch, 64), steps_per_dispatch=1)
        say(f"compiling {model_name(cfg)}, {batch} x {context} tokens, for {target}")
        prefill, decode, caches = _programs(engine, batch, prompt_tokens, context)
        weights, cache = weight_bytes(cfg, dtype), bytes_a_device(caches)
        parts = {"weights": weights}
        found = plan(prefill, target, parts=parts), plan(decode, target, parts=parts | {"cache": cache})
        return _generation_plan(model, target, *found, caches=caches, batch=batch, context=context)


def abstract_model(cfg: LlamaConfig, dtype: DTypeLike) -> Llama:
    """Shapes and shardings of the weights as the engine is given them, on the ambient mesh."""
    model = jax.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0), layout="layers"))
    return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, jnp.dtype(dtype), sharding=w.sharding), model)


def _programs(engine: Engine, batch: int, prompt_tokens: int, context: int) -> tuple[Any, Any, Any]:
    """The engine's prefill and decode, lowered, and the caches between them."""
    params = SamplingParams(max_new_tokens=context - prompt_tokens)
    tokens, state, num_slots = engine._padded(engine.requests([[0] * prompt_tokens] * batch, params))
    weights = engine._weights
    prefill = engine._prefill.lower(weights, tokens, state, num_slots=num_slots)
    run = functools.partial(engine._prefill, num_slots=num_slots)
    state, caches, *_ = jax.eval_shape(run, weights, tokens, state)
    return prefill, engine._decode.lower(weights, state, caches, np.ones(len(tokens), bool)), caches


def _generation_plan(
    model: Llama, target: Slice, prefill: Plan, decode: Plan, *, caches: Any, batch: int, context: int
) -> GenerationPlan:
    weights, cache = decode.parts["weights"], decode.parts["cache"]
    num_rows, _, num_slots, _ = caches[0].k.shape
    looked_up = 0 if model.head is None else bytes_a_device(model.embedding)
    read = weights - looked_up + cache
    growing = max(prefill.hbm_peak_bytes, decode.hbm_peak_bytes) - weights
    growth = max(0, decode.hbm_capacity_bytes - weights) / growing
    bandwidth, multiple = target.chip.hbm_bandwidth, model.rules.batch_multiple
    seconds = read / bandwidth if bandwidth else None
    fits, shorter = prefill.fits and decode.fits, min(model.cfg.max_seq_len, int(growth * num_slots))
    enough = smallest_slice(target.kind, (weights + cache) * decode.chips)
    ways = [f"--max-seq-len {shorter}"] if shorter > 1 else []
    ways += [f"{enough} or larger"] if enough and enough.num_chips > decode.chips else ["more chips along tensor"]
    return GenerationPlan(
        fits=fits,
        dtype=str(caches[0].k.dtype),
        batch=batch,
        context=context,
        weights_bytes=weights,
        cache_bytes=cache,
        decode_read_bytes=read,
        decode_read_seconds=seconds,
        tokens_per_second=batch / seconds if seconds else None,
        largest_batch=int(growth * num_rows) // multiple * multiple,
        largest_context=shorter,
        advice=None if fits else " or ".join(ways),
        prefill=prefill,
        decode=decode,
    )


def _lines(cfg: LlamaConfig, found: GenerationPlan) -> list[tuple[str, str, str]]:
    where = f"{found.decode.slice}, {found.decode.mesh}"
    lines = [(where, "", f"{model_name(cfg)} in {found.dtype}, {found.batch} x {found.context:,} tokens")]
    for name, program in (("prefill", found.prefill), ("decode", found.decode)):
        lines += [(name, "measured", f"compiled in {program.compile_seconds:.0f} s")]
        lines += [(f"  {label}", source, value) for label, source, value in rows(program)]
    if found.advice:
        lines.append(("what to change", "estimated", found.advice))
    if found.decode_read_seconds is not None:
        best = f"{1e3 * found.decode_read_seconds:.3g} ms, {found.tokens_per_second:,.0f} tokens/s"
        lines.append(("a token at best", "assumed", f"reads {gib(found.decode_read_bytes)} in {best}"))
    lines += [
        ("largest batch", "estimated", f"{found.largest_batch:,} x {found.context:,} tokens"),
        ("largest context", "estimated", f"{found.batch:,} x {found.largest_context:,} tokens"),
    ]
    return lines
