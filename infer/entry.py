"""What every inference command shares: the options for model and sampling, and what they open.

The invariant: jax is imported when devices or a model are opened and not before, so that --help and
mistakes in the options are answered at once.
"""

import argparse
import bisect
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.devices import describe_run, model_name
from llama_jax.entry import parse_settings, say
from llama_jax.schemes import SCHEMES, find_scheme

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    from jax.sharding import Mesh

    from infer.engine import Throughput
    from infer.hosts import Hosts
    from infer.sampling import SamplingParams
    from infer.speculation import DraftModel, Ngrams
    from llama_jax.checkpoint import Checkpoint
    from llama_jax.checkpoint.hub import Check
    from llama_jax.config import LlamaConfig
    from llama_jax.model import Llama
    from llama_jax.tokenizer import Tokenizer

# The model that ships with the project: a Hugging Face directory.
DEMO = Path(__file__).parents[1] / "llama_jax" / "demo"

DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = (*DTYPES, "int8", "fp8")

# Above this number of parameters a step takes so long that a stream shows every token by itself.
_LARGE = 100_000_000

_SHORTEST = 256  # tokens of the shortest conversation, and of the steps in which longer ones are tried


class Startup:
    """A stopwatch for what a command does before its first token."""

    def __init__(self):
        """Starts it."""
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        """End a step: "import", "devices", "open", "load"."""
        now = time.perf_counter()
        self._seconds[step], self._last = now - self._last, now

    def line(self, throughput: "Throughput") -> str:
        """The seconds of all steps and in sum, with those of the first run up to its first token."""
        compiling = throughput.first_compile_seconds
        seconds = self._seconds | {"compile": compiling, "prefill": throughput.first_token_seconds - compiling}
        steps = ", ".join(f"{step} {size:.1f}" for step, size in seconds.items())
        return f"first token after {sum(seconds.values()):.1f} s: {steps}"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare which model is opened, and how."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint",
        metavar="C",
        help="Hugging Face, Meta, Orbax or run directory, or hub id; default: the demo model that ships with this",
    )
    group.add_argument("--mesh", metavar="M", help='e.g. "data=2,tensor=4"; default: the largest legal tensor')
    group.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's, and float32 on a CPU")
    group.add_argument("--quantize", choices=tuple(SCHEMES), metavar="Q", help=f"keep weights in {', '.join(SCHEMES)}")
    group.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of context; default: the model's")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a config field, e.g. rope.factor=32"
    )
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="a LoRA adapter in PEFT's format; served under its name beside the model, by default DIR's; repeatable",
    )
    group.add_argument("--allow-unknown-config", action="store_true", help="ignore unknown config attributes")


def add_plan_options(parser: argparse.ArgumentParser, *, with_json: bool = False) -> None:
    """Declare what is compiled in place of a run."""
    group = parser.add_argument_group("plan", "in place of a run, of a checkpoint or the name of a preset")
    group.add_argument("--plan", metavar="SLICE", help="compile for a slice, e.g. v5e:2x4, report and stop")
    group.add_argument(
        "--plan-seconds", type=float, default=600.0, metavar="S", help="to find a mesh where none is given: %(default)s"
    )
    group.add_argument("--hlo", metavar="F", help="write the compiled decode there, and prefill to F.2")
    if with_json:
        group.add_argument("--json", action="store_true", help="print one JSON object")


def is_streamed(args: argparse.Namespace, num_prompts: int) -> bool:
    """Whether the text of infer.generate is shown as it comes."""
    return num_prompts <= 1 and not args.json


def steps_per_dispatch(cfg: "LlamaConfig", *, streamed: bool) -> int:
    """Tokens that one dispatch of infer.generate decodes."""
    return 1 if streamed and cfg.num_params() > _LARGE else 8


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Declare how tokens are chosen."""
    group = parser.add_argument_group("sampling", "defaults: the checkpoint's generation_config.json, else greedy")
    group.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s; 2,048 in a conversation"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; 1 where only a filter is given")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens that sum to P")
    group.add_argument("--min-p", type=float, metavar="P", help="keep tokens of at least P times the likeliest's")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same text; default: %(default)s")
    group.add_argument("--stop", action="append", default=[], metavar="S", help="end before this text; repeatable")


def add_speculation_options(parser: argparse.ArgumentParser) -> None:
    """Declare what guesses tokens ahead."""
    group = parser.add_argument_group("speculation", "tokens are guessed and checked together; the text stays the same")
    guesser = group.add_mutually_exclusive_group()
    guesser.add_argument("--draft", metavar="C", help="a smaller checkpoint with the same tokenizer guesses")
    guesser.add_argument(
        "--speculate", choices=("ngram",), help="ngram: guess what followed the same tokens before in the text"
    )
    group.add_argument("--num-draft-tokens", type=int, metavar="N", help="guesses at a time; default: 4")


def open_draft(
    args: argparse.Namespace, checkpoint: "Checkpoint", tokenizer: "Tokenizer | None"
) -> "Checkpoint | None":
    """The checkpoint of --draft, its weights not read yet.

    Raises ValueError for options that exclude each other and for a draft that has another vocabulary.
    """
    from infer.speculation import check_draft
    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.tokenizer import load_tokenizer

    check_num_draft_tokens(args)
    if args.draft is None:
        return None
    draft = open_checkpoint(args.draft, allow_unknown_config=args.allow_unknown_config)
    check_draft(draft.cfg, checkpoint.cfg, args.max_seq_len or checkpoint.cfg.max_seq_len)
    if tokenizer is not None and load_tokenizer(draft.companions).token_bytes != tokenizer.token_bytes:
        raise ValueError(f"--draft {args.draft} has another tokenizer than the model; use one with the same")
    return draft


def check_num_draft_tokens(args: argparse.Namespace) -> None:
    """Raise ValueError for a --num-draft-tokens that is out of range or with nothing that guesses."""
    from infer.speculation import check_num_tokens

    if args.num_draft_tokens is not None:
        check_num_tokens(args.num_draft_tokens)
        if args.draft is None and args.speculate is None:
            raise ValueError("--num-draft-tokens needs something that guesses: --draft C or --speculate ngram")


def load_speculation(
    args: argparse.Namespace, model: "Llama", draft: "Checkpoint | None", hosts: "Hosts"
) -> "DraftModel | Ngrams | None":
    """What the options ask to guess, a draft with its weights, on the model's mesh, in all processes.

    Raises ValueError, before a weight is read, if the devices do not hold the draft beside the model.
    """
    import jax

    from infer.speculation import NUM_DRAFT_TOKENS, DraftModel, Ngrams
    from llama_jax.checkpoint import load_opened, weights_dtype

    hosts.tell("load_speculation")
    num_tokens = args.num_draft_tokens or NUM_DRAFT_TOKENS
    if draft is None:
        return Ngrams(num_tokens) if args.speculate else None
    mesh = model.embedding[...].sharding.mesh
    with jax.set_mesh(mesh):
        dtype = weights_dtype(draft, args.dtype)
        _check_memory(draft.cfg, mesh, dtype, None, num_tokens=1, what="the draft, beside the model,")
        return DraftModel(load_opened(draft, dtype=dtype, layout="decoding"), num_tokens)


def open_model(args: argparse.Namespace, check: "Check | None" = None) -> "Checkpoint":
    """The checkpoint that the options name, its weights not read yet.

    check is asked about a model of the hub, and may raise, before its weights are fetched.
    """
    from llama_jax.checkpoint import open_checkpoint

    if args.checkpoint is None and not DEMO.is_dir():
        raise FileNotFoundError(f"the demo model is missing from {DEMO}; name a model with --checkpoint")
    checkpoint = open_checkpoint(
        DEMO if args.checkpoint is None else args.checkpoint,
        overrides=parse_settings(args.set),
        allow_unknown_config=args.allow_unknown_config,
        check=check,
    )
    limit = checkpoint.cfg.max_seq_len
    if args.max_seq_len is not None and not 1 <= args.max_seq_len <= limit:
        raise ValueError(f"max_seq_len={args.max_seq_len} must be between 1 and the model's {limit}")
    return checkpoint


def named_adapters(args: argparse.Namespace) -> dict[str, str]:
    """The directories of the adapters by name. Raises ValueError for two of one name."""
    found: dict[str, str] = {}
    for text in args.adapter:
        name, _, directory = text.rpartition("=")
        name = name or Path(directory).name
        if name in found:
            raise ValueError(f"--adapter {text}: there is another {name!r}; name it, as in --adapter other={directory}")
        found[name] = directory
    return found


def check_weights(args: argparse.Namespace, cfg: "LlamaConfig", stored: int | None = None) -> None:
    """Raise ValueError if the devices do not hold the weights and one token, in the least dtype that a run may take.

    stored: bytes of all weights where they are stored in few bits, which they keep unless the options say otherwise.
    """
    import jax.numpy as jnp

    with _mesh_asked_for(args, cfg) as mesh:
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        dtype = jnp.dtype(args.dtype or ("float32" if on_cpu else "bfloat16"))
        kept = stored if args.dtype is None and args.quantize is None else None
        _check_memory(cfg, mesh, dtype, args.quantize, num_tokens=1, stored=kept)


def load_model(args: argparse.Namespace, checkpoint: "Checkpoint", hosts: "Hosts", num_tokens: int = 1) -> "Llama":
    """The model, split over the mesh that the options ask for, in all processes; stderr says first what runs where.

    Raises ValueError, before a weight is read, for devices that do not hold the model and a cache of
    num_tokens; what prompts add is checked by the engine.
    """
    from llama_jax.checkpoint import load_opened, weights_dtype
    from llama_jax.checkpoint.adapters import load_adapters

    adapters = named_adapters(args)
    hosts.tell("load")
    with _mesh_asked_for(args, checkpoint.cfg) as mesh:
        dtype = weights_dtype(checkpoint, args.dtype)
        kept = f"{dtype}, weights in {args.quantize}" if args.quantize else dtype
        keep = args.dtype is None and args.quantize is None
        say(describe_run(checkpoint.cfg, mesh, kept, args.checkpoint or "the demo"))
        limit = args.max_seq_len or checkpoint.cfg.max_seq_len
        if not (keep and checkpoint.packed):  # else load_opened knows what the weights need
            _check_memory(checkpoint.cfg, mesh, dtype, args.quantize, num_tokens=min(limit, num_tokens))
        model = load_opened(checkpoint, dtype=dtype, layout="decoding", quantize=args.quantize, keep=keep)
        return load_adapters(model, adapters) if adapters else model


def follow(args: argparse.Namespace, hosts: "Hosts") -> None:
    """In a process that is not the first: load the model and run what the first does, until it parts."""
    from infer.programs import Programs

    checkpoint = model = programs = speculation = None
    for name, values, options in hosts.calls():
        if name == "load":
            checkpoint = open_model(args)
            model = load_model(args, checkpoint, hosts)
        elif name == "load_speculation":
            assert model is not None and checkpoint is not None
            speculation = load_speculation(args, model, open_draft(args, checkpoint, None), hosts)
        elif name == "programs":
            assert model is not None
            programs = Programs(model, speculation, *values, **options)
        else:
            answer = getattr(programs, name)(*values, **options)
            if name == "room":
                hosts.answer(answer)


def _mesh_asked_for(args: argparse.Namespace, cfg: "LlamaConfig") -> "AbstractContextManager[Mesh]":
    import jax

    from llama_jax.mesh import inference_mesh_spec, use_mesh

    return use_mesh(args.mesh or inference_mesh_spec(cfg, jax.device_count(), jax.local_device_count()))


def _check_memory(
    cfg: "LlamaConfig",
    mesh: "Mesh",
    dtype: "np.dtype",
    quantize: str | None,
    *,
    num_tokens: int,
    what: str | None = None,
    stored: int | None = None,
) -> None:
    from llama_jax.memory import check_fit, check_host, generation_bytes, weight_bytes

    needs = {"weights": weight_bytes(cfg, dtype, find_scheme(quantize) if quantize else None)}
    if stored is not None:
        needs["weights"] = needs["weights"] * stored // (dtype.itemsize * cfg.num_params())
    needs |= generation_bytes(cfg, dtype, num_rows=1, prompt_tokens=1, num_tokens=num_tokens)
    ways = "a smaller model, more devices (along tensor in --mesh)"
    ways += ", --dtype bfloat16" if dtype.itemsize > 2 else ""
    ways += "" if quantize else ", --quantize int8"
    devices = list(mesh.devices.flat)
    check_fit(what or model_name(cfg), needs, devices, ways=f"{ways} or a shorter --max-seq-len")
    if devices[0].platform != "cpu":
        check_host(cfg, dtype)


def conversation_length(args: argparse.Namespace, model: "Llama") -> int:
    """How many tokens of conversation fit, at most --max-seq-len or the model's: those of its cache and its prefill.

    A tenth of the memory that the loaded model has left is kept free. Raises ValueError if not even
    256 tokens fit.
    """
    import jax

    from llama_jax.memory import bytes_left, check_fit, generation_bytes

    table = model.embedding[...]
    devices = list(table.sharding.addressable_devices)
    left, limit = bytes_left(devices), args.max_seq_len or model.cfg.max_seq_len

    def needs(length: int) -> dict[str, int]:
        with jax.set_mesh(table.sharding.mesh):
            return generation_bytes(model.cfg, table.dtype, num_rows=1, prompt_tokens=length, num_tokens=length)

    def total(length: int) -> int:
        return sum(needs(length).values())

    shortest = min(_SHORTEST, limit)
    check_fit("a conversation", needs(shortest), devices, ways="a smaller model or more devices")
    if left is None or total(limit) <= 0.9 * left:
        return limit
    lengths = range(shortest, limit, _SHORTEST)
    return lengths[max(1, bisect.bisect_right(lengths, 0.9 * left, key=total)) - 1]


def sampling_params(args: argparse.Namespace, checkpoint: "Checkpoint") -> "SamplingParams":
    """The options over what generation_config.json advises.

    A filter asked for without a temperature would change nothing in a greedy text: it samples at 1.
    """
    from infer.sampling import SamplingParams

    names = ("temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = _generation_config(checkpoint.companions)
    advised = {name: config[name] for name in names if config.get("do_sample") and config.get(name) is not None}
    sampled = {"temperature": 1.0} if config.get("do_sample") or given else {}
    ends = config.get("eos_token_id")
    return SamplingParams(
        **{**sampled, **advised, **given},
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        stop=tuple(args.stop),
        stop_tokens=tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,),
    )


def _generation_config(directory: Path) -> dict:
    file = directory / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object: {error}") from None


def describe_sampling(params: "SamplingParams") -> str:
    """How tokens are chosen: "greedy", or the settings that differ from none, as "temperature=0.6 top_p=0.9"."""
    if params.temperature == 0:
        return "greedy"
    off = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return " ".join(f"{name}={getattr(params, name)}" for name, value in off.items() if getattr(params, name) != value)
