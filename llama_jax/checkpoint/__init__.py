"""Llama checkpoints in and out: load a model onto the mesh from any format, save it in any."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama_jax.checkpoint.formats import FORMATS, Checkpoint, Format, open_checkpoint, write_checkpoint
from llama_jax.checkpoint.layout import ModelSource, ReadLayout, kept_weights, read_model
from llama_jax.checkpoint.quantized.keeping import KeptSource
from llama_jax.entry import say
from llama_jax.memory import bytes_a_device, check_fit, weight_bytes
from llama_jax.mesh import inference_mesh_spec, make_mesh
from llama_jax.model import Llama
from llama_jax.paths import as_path, staged_directory
from llama_jax.schemes import find_scheme


def load(
    path: str | Path,
    *,
    dtype: DTypeLike | None = None,
    layout: ReadLayout = "stacked",
    quantize: str | None = None,
    overrides: dict[str, Any] | None = None,
    allow_unknown_config: bool = False,
) -> Llama:
    """A model from a directory, run directory or hub id, split over the ambient mesh.

    Each process reads only the slices that its devices hold. dtype defaults to the checkpoint's on
    TPU and GPU and to float32 on CPU. quantize ("int8", "int4", "fp8", "nf4" or another of llama_jax.schemes)
    rounds the weights of its products as they come. Without dtype and quantize, weights that are stored in few
    bits stay so where the model can hold them. layout: "stacked" and "layers" are those of `Llama`, and "decoding" is
    "layers" for an engine, whose weights are no plain arrays on CPUs (`llama_jax.outputs_first`). Outside any mesh the
    largest legal `tensor` among a process's devices, the rest `data`, becomes the global mesh. Raises ValueError or
    FileNotFoundError with what is wrong, before a weight is read also if the devices cannot hold them.
    """
    checkpoint = open_checkpoint(path, overrides=overrides, allow_unknown_config=allow_unknown_config)
    keep = dtype is None and quantize is None
    return load_opened(checkpoint, dtype=dtype, layout=layout, quantize=quantize, keep=keep)


def load_opened(
    checkpoint: Checkpoint,
    *,
    dtype: DTypeLike | None = None,
    layout: ReadLayout = "stacked",
    quantize: str | None = None,
    keep: bool = False,
) -> Llama:
    """`load` of a checkpoint that is already open; keep: weights that are stored in few bits stay so."""
    if layout not in get_args(ReadLayout):
        raise ValueError(f"layout={layout!r}; expected one of {', '.join(get_args(ReadLayout))}")
    scheme = None if quantize is None else find_scheme(quantize)
    if jax.sharding.get_abstract_mesh().empty:
        jax.set_mesh(make_mesh(inference_mesh_spec(checkpoint.cfg, jax.device_count(), jax.local_device_count())))
    dtype, devices = weights_dtype(checkpoint, dtype), jax.sharding.get_mesh().devices.flat
    ways = "a smaller model, a mesh of more devices, dtype='bfloat16' or quantize='int8'"
    source = checkpoint.source
    if keep and checkpoint.packed and scheme is None:
        source = KeptSource(source, checkpoint.packed)
        arrays = kept_weights(checkpoint.cfg, source, dtype=dtype, layout=layout)
        needed = bytes_a_device(arrays)
        say(f"weights are kept as they are stored: {_listed(arrays)}")
    else:
        needed = weight_bytes(checkpoint.cfg, dtype, scheme)
    check_fit("the model", {"weights": needed}, devices, ways=ways)
    return read_model(checkpoint.cfg, source, dtype=dtype, layout=layout, scheme=scheme)


def _listed(arrays: Sequence[jax.ShapeDtypeStruct]) -> str:
    """How many values there are of each dtype."""
    counts: dict[str, int] = {}
    for array in arrays:
        counts[array.dtype.name] = counts.get(array.dtype.name, 0) + math.prod(array.shape)
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def weights_dtype(checkpoint: Checkpoint, dtype: DTypeLike | None = None) -> np.dtype:
    """The dtype that is asked for, else the checkpoint's, and float32 where the ambient mesh is of CPUs.

    Raises ValueError for a type that is not of floats.
    """
    if dtype is None:
        on_cpu = jax.sharding.get_mesh().devices.flat[0].platform == "cpu"
        dtype = jnp.float32 if on_cpu else checkpoint.dtype
    return _float_dtype(dtype)


def _float_dtype(dtype: DTypeLike | None) -> np.dtype:
    with contextlib.suppress(TypeError):  # numpy's for what is no dtype at all
        if jnp.issubdtype(np.dtype(dtype), jnp.floating):
            return np.dtype(dtype)
    raise ValueError(f"dtype={dtype!r} is no type of floats; expected 'float32', 'bfloat16' or 'float16'")


def save(model: Llama, path: str | Path, format: Format = "hf") -> None:
    """Write the weights in their dtype and the config; the directory appears whole or not at all.

    Every process calls this; several write "orbax" alone. Raises ValueError for an unknown format,
    FileExistsError if the directory is not empty, OSError if a process fails to write.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; expected one of {', '.join(FORMATS)}")
    if jax.process_count() > 1:
        if format != "orbax":
            raise ValueError(f"{format} is not written by several processes; save as orbax and convert that in one")
        from llama_jax.checkpoint.snapshot import save_together  # imports Orbax, half a second

        return save_together(model, as_path(path))
    with staged_directory(path) as staged:
        write_checkpoint(staged, model.cfg, ModelSource(model), to=format)


__all__ = ["FORMATS", "Checkpoint", "Format", "load", "load_opened", "open_checkpoint", "save", "weights_dtype"]
