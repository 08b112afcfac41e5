"""Generation planned for a slice that need not be here: what fits, and how fast a token can come at best.

The engine's own prefill and decode are compiled, with abstract weights and caches: for prompts that fill
the context up to the new tokens, or those of a server all of whose rows and pages are in use. A decode
step reads every weight and the whole cache once, so its least time is those bytes over the memory's
bandwidth. The invariant: what is compiled here for cpu:8 is what the engine runs on eight CPU devices.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from infer.engine import Engine
from infer.entry import is_streamed, open_model, steps_per_dispatch
from infer.sampling import SamplingParams
from llama_jax.config import PRESETS, LlamaConfig, set_field
from llama_jax.devices import model_name, use_compilation_cache
from llama_jax.entry import parse_settings, say
from llama_jax.memory import abstract_model, bytes_a_device, weight_bytes
from llama_jax.mesh import inference_mesh_spec, legal_tensor_sizes, parse_mesh
from llama_jax.model import Llama
from llama_jax.plan import Plan, Terms, capacity, check_directory, gib, plan, rows, sources, table, try_each
from llama_jax.program import Buffer
from llama_jax.schemes import Scheme, find_scheme
from llama_jax.slices import Slice, all_slices, open_slice, parse_slice, smallest_slice, use_slice

# Context that is planned for where none is asked for and the model has more.
CONTEXT = 8192

_NUM_BEST = 5

# Keys of a training report that have no meaning here.
_OF_TRAINING = ("remat", "stage_tokens", "stage_days", "device_hours", "cost", "checkpoint_bytes", "checkpoint_seconds")

# Where this report's own numbers are from.
_EXACT = ("weights_bytes", "cache_bytes", "cache_tokens", "decode_read_bytes", "host_ram_to_load_bytes", "disk_bytes")
_ASSUMED = ("decode_read_seconds", "tokens_per_second", "tokens_per_dollar", "largest_batch", "largest_context")

# Contexts are advised in whole multiples of it.
_CONTEXT_STEP = 256


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked of the engine: batch prompts at a time, each of prompt_tokens that go on to the end of the context.

    engine: arguments of the Engine, whose context is this one if they do not say. is_served: its pool takes all
    memory that it may, whatever the prompts.
    """

    cfg: LlamaConfig
    dtype: DTypeLike
    batch: int
    prompt_tokens: int
    context: int
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_served: bool = False
    quantize: str | None = None

    @property
    def scheme(self) -> Scheme | None:
        """How the weights are quantized."""
        return None if self.quantize is None else find_scheme(self.quantize)


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """Both programs of generation on a slice; bytes are those of one chip. advice: what to change if they do not fit.

    context: of a server what its pool of cache_tokens leaves of the context that was asked for.
    largest_batch: prompts at a time at this context. largest_context: tokens a prompt at this batch,
    at most the model's. For both all that is not weights is taken to grow in proportion.
    decode_read_seconds: to read weights and cache once at the memory's full bandwidth; None on CPUs.
    best: meshes that were tried, the best first.
    """

    slice: str
    chips: int
    mesh: str
    fits: bool
    dtype: str
    quantize: str | None
    batch: int
    context: int
    hbm_capacity_bytes: int
    hbm_peak_bytes: int
    weights_bytes: int
    cache_bytes: int
    cache_tokens: int
    decode_read_bytes: int
    decode_read_seconds: float | None
    tokens_per_second: float | None
    tokens_per_dollar: float | None
    largest_batch: int
    largest_context: int
    host_ram_to_load_bytes: int
    disk_bytes: int
    compile_seconds: float
    prefill: Plan
    decode: Plan
    advice: str | None = None
    best: tuple[str, ...] = ()


def print_plan(args: argparse.Namespace, *, served: Mapping[str, Any] | None = None) -> None:
    """Plan what the options of an entry ask for; --checkpoint may name a preset, whose weights are not needed.

    served: arguments of the engine of a server; without them prompts are continued as infer.generate does.
    Raises ValueError for what cannot be planned.
    """
    if args.draft or args.speculate:
        raise ValueError("--plan plans decoding without --draft and --speculate; leave them out")
    if args.adapter:
        raise ValueError("--plan does not count adapters, whose memory is a thousandth; leave --adapter out")
    target = parse_slice(args.plan)
    work = dataclasses.replace(_workload(args, target, served), quantize=args.quantize)
    cfg = work.cfg
    check_weights(work, target)
    hlo = Path(args.hlo) if args.hlo else None
    check_directory(hlo)
    use_compilation_cache()
    if args.mesh:
        found = plan_generation(work, target, args.mesh, hlo=hlo)
    else:
        tried = search(work, target, seconds=args.plan_seconds)
        found = dataclasses.replace(tried[0][1], best=tuple(summary(found) for _, found in tried[:_NUM_BEST]))
        if hlo is not None:
            plan_generation(work, target, found.mesh, hlo=hlo)
    if not found.fits:
        found = dataclasses.replace(found, advice=advice(work, target, found))
    print(json.dumps(report(found)) if args.json else table(_lines(cfg, found)))


def report(found: GenerationPlan) -> dict[str, Any]:
    """The plan as one object with the keys of a training report, too.

    Memory there is that of the program that needs more, work and time those of a decode step; what
    generation does not have is None.
    """
    first, after = dataclasses.asdict(found.prefill), dataclasses.asdict(found.decode)
    larger = first if found.prefill.hbm_peak_bytes > found.decode.hbm_peak_bytes else after
    memory = ("hbm_arguments_bytes", "hbm_temporaries_bytes", "host_bytes", "parts", "largest")
    of_larger = {key: larger[key] for key in memory}
    origin = sources(found.decode) | dict.fromkeys(_EXACT, "exact") | dict.fromkeys(_ASSUMED, "assumed")
    return dict.fromkeys(_OF_TRAINING) | after | of_larger | dataclasses.asdict(found) | {"sources": origin}


def _workload(args: argparse.Namespace, target: Slice, served: Mapping[str, Any] | None) -> Workload:
    cfg, dtype = _model(args, target)
    limit = args.max_seq_len or cfg.max_seq_len
    if served is not None:
        return Workload(cfg, dtype, served["max_batch_size"], limit - 1, limit, served, is_served=True)
    context = args.max_seq_len or min(limit, CONTEXT)
    room = min(args.max_new_tokens, context - 1)
    num_prompts = max(1, len(args.prompts))
    steps = steps_per_dispatch(cfg, streamed=is_streamed(args, num_prompts))
    engine = {"max_seq_len": limit, "steps_per_dispatch": steps}
    return Workload(cfg, dtype, num_prompts, context - room, context, engine)


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


def check_weights(work: Workload, target: Slice) -> None:
    """Raise ValueError that names the smallest slice that can if this one cannot hold the weights."""
    weights, most = _stored_bytes(work, target), target.chip.hbm_bytes
    if most and weights > most * target.num_chips:
        enough = smallest_slice(target.kind, weights)
        way = f"the smallest slice that holds them is {enough}" if enough else f"no slice of {target.kind} holds them"
        has = f"{target} has {target.num_chips} x {gib(most)}"
        raise ValueError(f"{model_name(work.cfg)}: weights are {gib(weights)}, and {has}; {way}")


def _stored_bytes(work: Workload, target: Slice) -> int:
    if work.scheme is None:
        return jnp.dtype(work.dtype).itemsize * work.cfg.num_params()
    with use_slice(target, "data=-1"):  # all of them on each
        return weight_bytes(work.cfg, work.dtype, work.scheme)


def search(work: Workload, target: Slice, *, seconds: float) -> list[tuple[str, GenerationPlan]]:
    """Plans of the mesh that a run would take and of others, within about so many seconds, the best first.

    Raises ValueError if none has room for weights and cache, and as `open_slice` does.
    """
    open_slice(target)  # its errors are no reason to try another mesh
    weights, most = _stored_bytes(work, target), target.chip.hbm_bytes or math.inf
    own = parse_mesh(inference_mesh_spec(work.cfg, target.num_chips, target.chips_per_host), target.num_chips)
    slices = 1 if target.is_gpu else target.num_slices

    def meshes(_: list) -> Iterator[str]:
        others = reversed(legal_tensor_sizes(work.cfg, target.num_chips // slices))
        for tensor in dict.fromkeys((own["tensor"], *others)):
            if target.num_chips % (tensor * slices) == 0 and weights / tensor <= most:
                yield f"data={target.num_chips // tensor},tensor={tensor}"

    tried = try_each(
        meshes, lambda mesh: plan_generation(work, target, mesh), seconds=seconds, rank=rank, summary=summary
    )
    if not tried:
        larger = (other for other in all_slices(target.kind) if other.num_chips > target.num_chips)
        way = f"the next larger slice is {next(larger, None) or 'not there'}"
        raise ValueError(f"{model_name(work.cfg)}: no mesh of {target} has room for weights and cache; {way}")
    return tried


def rank(found: GenerationPlan) -> tuple[bool, float, int]:
    """The better plan has the lower one: it fits, its decode step is fast, it needs little memory."""
    seconds = found.decode.estimated_step_seconds or found.decode_read_seconds or math.inf
    return not found.fits, seconds, found.hbm_peak_bytes


def summary(found: GenerationPlan) -> str:
    """A plan in a few words."""
    speed = found.decode.estimated_step_seconds
    step = "" if speed is None else f"{1e3 * speed:.3g} ms a token, "
    verdict = "" if found.fits else "does NOT fit, "
    return f"{found.mesh}: {verdict}{step}{gib(found.hbm_peak_bytes)} of {gib(found.hbm_capacity_bytes)}"


def plan_generation(work: Workload, target: Slice, mesh: str, *, hlo: Path | None = None) -> GenerationPlan:
    """Compile prefill and decode; hlo is where the text of decode goes, and beside it, as .2, that of prefill."""
    with use_slice(target, mesh):
        model = abstract_model(work.cfg, work.dtype, work.scheme, "layers")
        engine = Engine(model, **{"max_seq_len": work.context, **work.engine})
        say(f"compiling {model_name(work.cfg)}, {work.batch} x {work.context} tokens, {mesh}, for {target}")
        parts = {"weights": bytes_a_device(model)}
        if work.is_served:
            prefill, decode, caches = engine.lower_largest(capacity(target) - parts["weights"])
            work = dataclasses.replace(work, context=engine.max_seq_len)
        else:
            params = SamplingParams(max_new_tokens=work.context - work.prompt_tokens)
            prefill, decode, caches = engine.lower(engine.requests([[0] * work.prompt_tokens] * work.batch, params))
        terms = model_terms(model, caches)
        first = plan(prefill, target, parts=parts, terms=terms, hlo=hlo and hlo.with_name(f"{hlo.name}.2"))
        after = plan(decode, target, parts=parts | {"cache": bytes_a_device(caches)}, terms=terms, hlo=hlo)
        return _generation_plan(work, model, target, first, after, caches=caches)


def model_terms(model: Llama, caches: Any) -> Terms:
    """What the arrays of both programs are in terms of the model, known by how many values a device holds of them."""
    names: dict[int, str] = {math.prod(caches[0].k.sharding.shard_shape(caches[0].k.shape)): "a layer's keys or values"}
    for path, leaf in jax.tree.leaves_with_path(model):
        name = jax.tree_util.keystr(path, simple=True, separator=".").replace(".value", "", 1)
        parts = ["layers" if part.isdecimal() else part for part in name.split(".")]
        names.setdefault(math.prod(leaf.sharding.shard_shape(leaf.shape)), f"a weight {'.'.join(dict.fromkeys(parts))}")

    def terms(buffer: Buffer) -> str | None:
        name = "logits" if model.embedding.shape[0] in buffer.dims[-1:] else names.get(math.prod(buffer.dims))
        return name and f"{name} ({buffer.kind})"

    return terms


def _generation_plan(
    work: Workload, model: Llama, target: Slice, prefill: Plan, decode: Plan, *, caches: Any
) -> GenerationPlan:
    weights, cache = decode.parts["weights"], decode.parts["cache"]
    # Rows of slots, or pages of them.
    num_tokens = caches[0].k.shape[0] * caches[0].k.shape[2]
    multiple = model.rules.batch_multiple
    num_rows = -(-(1 << (work.batch - 1).bit_length()) // multiple) * multiple
    looked_up = 0 if model.head is None else bytes_a_device(model.embedding)
    read, peak = weights - looked_up + cache, max(prefill.hbm_peak_bytes, decode.hbm_peak_bytes)
    growth = max(0, decode.hbm_capacity_bytes - weights) / (peak - weights)
    seconds = read / target.chip.hbm_bandwidth if target.chip.hbm_bandwidth else None
    speed, price = seconds and work.batch / seconds, target.price * decode.chips
    largest_part = max(map(bytes_a_device, jax.tree.leaves(model)))
    return GenerationPlan(
        slice=str(target),
        chips=decode.chips,
        mesh=decode.mesh,
        fits=prefill.fits and decode.fits,
        dtype=str(caches[0].k.dtype),
        quantize=work.quantize,
        batch=work.batch,
        context=work.context,
        hbm_capacity_bytes=decode.hbm_capacity_bytes,
        hbm_peak_bytes=peak,
        weights_bytes=weights,
        cache_bytes=cache,
        cache_tokens=num_tokens,
        decode_read_bytes=read,
        decode_read_seconds=seconds,
        tokens_per_second=speed,
        tokens_per_dollar=speed * 3600 / price if speed and price else None,
        largest_batch=int(growth * num_tokens / work.context) // multiple * multiple,
        largest_context=min(model.cfg.max_seq_len, int(growth * num_tokens / num_rows)),
        host_ram_to_load_bytes=largest_part * min(decode.chips, target.chips_per_host),
        disk_bytes=_stored_bytes(work, target),
        compile_seconds=prefill.compile_seconds + decode.compile_seconds,
        prefill=prefill,
        decode=decode,
    )


def advice(work: Workload, target: Slice, found: GenerationPlan, *, seconds: float = 1800.0) -> str:
    """What to change where generation does not fit: the first of some changes that does, having been compiled."""
    context = found.largest_context // _CONTEXT_STEP * _CONTEXT_STEP
    ways = []
    if context > _CONTEXT_STEP and not work.is_served:  # a server's cache takes what there is
        new_tokens = min(work.context - work.prompt_tokens, context - 1)
        engine = {**work.engine, "max_seq_len": context}
        shorter = dataclasses.replace(work, context=context, prompt_tokens=context - new_tokens, engine=engine)
        ways.append((f"--max-seq-len {context}", shorter, target))
    larger = [other for other in all_slices(target.kind) if other.num_chips > target.num_chips]
    ways += [(f"--plan {other}", work, other) for other in larger[:3]]

    def untried(tried: list) -> Iterator[Any]:
        for way in ways:
            if any(other.fits for _, other in tried):
                return
            yield way

    def attempt(way: tuple[str, Workload, Slice]) -> GenerationPlan:
        _, changed, other = way
        return plan_generation(changed, other, inference_mesh_spec(work.cfg, other.num_chips, other.chips_per_host))

    tried = try_each(untried, attempt, seconds=seconds, rank=rank, summary=summary)
    if not tried:
        return "more chips along tensor"
    (text, *_), best = tried[0]
    verdict = "fits" if best.fits else f"is the nearest of {len(tried)} tried"
    return f"{text} {verdict}: {gib(best.hbm_peak_bytes)} of {gib(best.hbm_capacity_bytes)}"


def _lines(cfg: LlamaConfig, found: GenerationPlan) -> list[tuple[str, str, str]]:
    where = f"{found.slice}, {found.mesh}"
    kind = f"{found.dtype}, weights in {found.quantize}" if found.quantize else found.dtype
    lines = [(where, "", f"{model_name(cfg)} in {kind}, {found.batch} x {found.context:,} tokens")]
    for name, program in (("prefill", found.prefill), ("decode", found.decode)):
        lines += [(name, "measured", f"compiled in {program.compile_seconds:.0f} s")]
        lines += [(f"  {label}", source, value) for label, source, value in rows(program)]
    if found.advice:
        lines.append(("what to change", "compiled", found.advice))
    if found.decode_read_seconds is not None:
        best = f"{1e3 * found.decode_read_seconds:.3g} ms, {found.tokens_per_second:,.0f} tokens/s"
        lines.append(("a token at best", "assumed", f"reads {gib(found.decode_read_bytes)} in {best}"))
    lines += [
        ("cache", "exact", f"{found.cache_tokens:,} tokens in {gib(found.cache_bytes)} a chip"),
        ("largest batch", "estimated", f"{found.largest_batch:,} x {found.context:,} tokens"),
        ("largest context", "estimated", f"{found.batch:,} x {found.largest_context:,} tokens"),
        ("to load it", "computed", f"{gib(found.host_ram_to_load_bytes)} of host memory"),
        ("on disk", "computed", gib(found.disk_bytes)),
    ]
    if found.best:
        lines.append(("the best tried", "", "as a prompt's next token comes"))
    return lines + [("", "compiled", one) for one in found.best]
