"""What every inference command shares: the options for model and sampling, and what they open.

The invariant: jax is imported when a model is opened and not before, so that --help and mistakes
in the options are answered at once.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infer.sampling import SamplingParams
    from llama_jax.checkpoint import Checkpoint
    from llama_jax.model import Llama

# The model that ships with the project: a Hugging Face directory.
DEMO = Path(__file__).parents[1] / "llama_jax" / "demo"

DTYPES = ("float32", "bfloat16", "float16")


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
    group.add_argument("--max-seq-len", type=int, metavar="N", help="tokens of context; default: the model's")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a config field, e.g. rope.factor=32"
    )
    group.add_argument("--allow-unknown-config", action="store_true", help="ignore unknown config attributes")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Declare how tokens are chosen."""
    group = parser.add_argument_group("sampling", "defaults: the checkpoint's generation_config.json, else greedy")
    group.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; 1 where only a filter is given")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest tokens that sum to P")
    group.add_argument("--min-p", type=float, metavar="P", help="keep tokens of at least P times the likeliest's")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same text; default: %(default)s")
    group.add_argument("--stop", action="append", default=[], metavar="S", help="end before this text; repeatable")


def open_model(args: argparse.Namespace) -> "Checkpoint":
    """The checkpoint that the options name, its weights not read yet."""
    from llama_jax.checkpoint import open_checkpoint
    from llama_jax.entry import parse_settings

    if args.checkpoint is None and not DEMO.is_dir():
        raise FileNotFoundError(f"the demo model is missing from {DEMO}; name a model with --checkpoint")
    return open_checkpoint(
        DEMO if args.checkpoint is None else args.checkpoint,
        overrides=parse_settings(args.set),
        allow_unknown_config=args.allow_unknown_config,
    )


def load_model(args: argparse.Namespace, checkpoint: "Checkpoint") -> "Llama":
    """The model, split over the mesh that the options ask for."""
    import jax

    from llama_jax.checkpoint import load_opened
    from llama_jax.mesh import inference_mesh_spec, use_mesh

    use_compilation_cache()
    with use_mesh(args.mesh or inference_mesh_spec(checkpoint.cfg, jax.device_count())):
        return load_opened(checkpoint, dtype=args.dtype, layout="layers")


def use_compilation_cache() -> None:
    """Keep compiled programs for the next run in the user's cache, if no other place is set."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "llama_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


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


def summary(args: argparse.Namespace, model: "Llama", params: "SamplingParams") -> str:
    """Devices, mesh, dtype, model and sampling in one line."""
    from llama_jax.mesh import AXES, tensor_axes

    table = model.embedding[...]
    mesh = table.sharding.mesh
    sizes = {axis: mesh.shape[axis] for axis in AXES[:3]}
    sizes["tensor"] = math.prod(mesh.shape[axis] for axis in tensor_axes(mesh))
    split = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "tensor=1"
    count = model.cfg.num_params()
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    off = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    settings = [f"{name}={getattr(params, name)}" for name, value in off.items() if getattr(params, name) != value]
    return ", ".join(
        [
            f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
            split,
            str(table.dtype),
            f"{args.checkpoint or 'demo'}: {size} parameters",
            " ".join(settings) if params.temperature > 0 else "greedy",
        ]
    )
