"""Generation planned for a slice that need not be here: what fits, and how fast a token can come at best.

The engine's own prefill and decode are compiled, with abstract weights and caches: for prompts that fill
the context up to the new tokens, or those of a server all of whose rows and pages are in use. A decode
step reads every weight and the whole cache once, and a draft's for every guess, so its least time is those
bytes over the memory's bandwidth. The invariant: what is compiled here for cpu:8 is what the engine runs on
eight CPU devices.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from infer.engine import Engine
from infer.sampling import SamplingParams
from infer.speculation import DraftModel
from infer.steps import Held, tokens_a_step
from infer.workload import Workload, workload
from llama_jax.attempts import advise, try_each
from llama_jax.devices import model_name, use_compilation_cache
from llama_jax.entry import say
from llama_jax.memory import bytes_a_device
from llama_jax.mesh import inference_mesh_spec, legal_tensor_sizes, parse_mesh
from llama_jax.model import Llama
from llama_jax.plan import Plan, Terms, capacity, check_directory, gib, plan, rows, sources, table
from llama_jax.program import Buffer
from llama_jax.slices import Slice, all_slices, open_slice, parse_slice, smallest_slice, use_slice
from llama_jax.tree import leaf_name

_NUM_BEST = 5

# Keys of a training report that have no meaning here.
_OF_TRAINING = ("remat", "stage_tokens", "stage_days", "device_hours", "cost", "checkpoint_bytes", "checkpoint_seconds")

# Where this report's own numbers are from.
_EXACT = ("weights_bytes", "cache_bytes", "cache_tokens", "decode_read_bytes", "host_ram_to_load_bytes", "disk_bytes")
_ASSUMED = ("decode_read_seconds", "tokens_per_second", "tokens_per_dollar", "largest_batch", "largest_context")

# Contexts are advised in whole multiples of it.
_CONTEXT_STEP = 256


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
    target = parse_slice(args.plan)
    work = workload(args, target, served)
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
    print(json.dumps(report(found)) if args.json else table(_lines(work, found)))


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


def check_weights(work: Workload, target: Slice) -> None:
    """Raise ValueError that names the smallest slice that can if this one cannot hold the weights."""
    weights, most = work.stored_bytes(target), target.chip.hbm_bytes
    if most and weights > most * target.num_chips:
        enough = smallest_slice(target.kind, weights)
        way = f"the smallest slice that holds them is {enough}" if enough else f"no slice of {target.kind} holds them"
        has = f"{target} has {target.num_chips} x {gib(most)}"
        raise ValueError(f"{model_name(work.cfg)}: weights are {gib(weights)}, and {has}; {way}")


def search(work: Workload, target: Slice, *, seconds: float) -> list[tuple[str, GenerationPlan]]:
    """Plans of the mesh that a run would take and of others, within about so many seconds, the best first.

    Raises ValueError if none has room for weights and cache, and as `open_slice` does.
    """
    open_slice(target)  # its errors are no reason to try another mesh
    weights, most = work.stored_bytes(target), target.chip.hbm_bytes or math.inf
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
        model, guesser = work.models()
        engine = Engine(model, **{"max_seq_len": work.context, **work.engine, "speculation": guesser})
        parts = {"weights": bytes_a_device(model)}
        if isinstance(guesser, DraftModel):
            parts["draft"] = bytes_a_device(guesser.model)
        say(f"compiling {model_name(work.cfg)}, {work.batch} x {work.context} tokens, {mesh}, for {target}")
        if work.is_served:
            prefill, decode, held = engine.lower_largest(capacity(target) - sum(parts.values()))
            work = dataclasses.replace(work, context=engine.max_seq_len)
        else:
            params = SamplingParams(max_new_tokens=work.context - work.prompt_tokens)
            prefill, decode, held = engine.lower(engine.requests([[0] * work.prompt_tokens] * work.batch, params))
        terms = model_terms(model, held.pages)
        cache = bytes_a_device(held.pages) + bytes_a_device(held.ahead)
        first = plan(prefill, target, parts=parts, terms=terms, hlo=hlo and hlo.with_name(f"{hlo.name}.2"))
        after = plan(decode, target, parts=parts | {"cache": cache}, terms=terms, hlo=hlo)
        read = _bytes_to_read(model, guesser, held)
        return _generation_plan(work, model, target, (first, after), pages=held.pages, read=read)


def _bytes_to_read(model: Llama, guesser: Any, held: Held) -> int:
    """What a device reads in a step: weights and cache once, those of a draft for each guess and once more."""

    def weights(model: Llama) -> int:
        looked_up = 0 if model.head is None else bytes_a_device(model.embedding)
        return bytes_a_device(model) - looked_up

    size = weights(model) + bytes_a_device(held.pages)
    if isinstance(guesser, DraftModel):
        size += tokens_a_step(guesser) * (weights(guesser.model) + bytes_a_device(held.ahead))
    return size


def model_terms(model: Llama, caches: Any) -> Terms:
    """What the arrays of both programs are in terms of the model, known by how many values a device holds of them."""
    names: dict[int, str] = {math.prod(caches[0].k.sharding.shard_shape(caches[0].k.shape)): "a layer's keys or values"}
    for path, leaf in jax.tree.leaves_with_path(model):
        parts = ["layers" if part.isdecimal() else part for part in leaf_name(path).split(".")]
        names.setdefault(math.prod(leaf.sharding.shard_shape(leaf.shape)), f"a weight {'.'.join(dict.fromkeys(parts))}")

    def terms(buffer: Buffer) -> str | None:
        name = "logits" if model.embedding.shape[0] in buffer.dims[-1:] else names.get(math.prod(buffer.dims))
        return name and f"{name} ({buffer.kind})"

    return terms


def _generation_plan(
    work: Workload, model: Llama, target: Slice, programs: tuple[Plan, Plan], *, pages: Any, read: int
) -> GenerationPlan:
    prefill, decode = programs
    weights, cache = decode.parts["weights"], decode.parts["cache"]
    # Rows of slots, or pages of them.
    num_tokens = pages[0].k.shape[0] * pages[0].k.shape[2]
    multiple = model.rules.batch_multiple
    num_rows = -(-(1 << (work.batch - 1).bit_length()) // multiple) * multiple
    fixed, peak = weights + decode.parts.get("draft", 0), max(prefill.hbm_peak_bytes, decode.hbm_peak_bytes)
    growth = max(0, decode.hbm_capacity_bytes - fixed) / (peak - fixed)
    seconds = read / target.chip.hbm_bandwidth if target.chip.hbm_bandwidth else None
    speed, price = seconds and work.batch * (1 + work.num_draft_tokens) / seconds, target.price * decode.chips
    largest_part = max(map(bytes_a_device, jax.tree.leaves(model)))
    return GenerationPlan(
        slice=str(target),
        chips=decode.chips,
        mesh=decode.mesh,
        fits=prefill.fits and decode.fits,
        dtype=str(pages[0].k.dtype),
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
        disk_bytes=work.stored_bytes(target),
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

    def attempt(way: tuple[str, Workload, Slice]) -> GenerationPlan:
        _, changed, other = way
        return plan_generation(changed, other, inference_mesh_spec(work.cfg, other.num_chips, other.chips_per_host))

    otherwise = "more chips along tensor"
    return advise(ways, attempt, otherwise=otherwise, seconds=seconds, rank=rank, summary=summary)


def _lines(work: Workload, found: GenerationPlan) -> list[tuple[str, str, str]]:
    where = f"{found.slice}, {found.mesh}"
    kind = f"{found.dtype}, weights in {found.quantize}" if found.quantize else found.dtype
    lines = [(where, "", f"{model_name(work.cfg)} in {kind}, {found.batch} x {found.context:,} tokens")]
    for name, program in (("prefill", found.prefill), ("decode", found.decode)):
        lines += [(name, "measured", f"compiled in {program.compile_seconds:.0f} s")]
        lines += [(f"  {label}", source, value) for label, source, value in rows(program)]
    if found.advice:
        lines.append(("what to change", "compiled", found.advice))
    if found.decode_read_seconds is not None:
        name, rate = "a token at best", f"{found.tokens_per_second:,.0f} tokens/s"
        if work.num_draft_tokens:
            name, rate = "a step at best", f"{rate} if every guess is right"
        least = f"{1e3 * found.decode_read_seconds:.3g} ms"
        lines.append((name, "assumed", f"reads {gib(found.decode_read_bytes)} in {least}, {rate}"))
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
