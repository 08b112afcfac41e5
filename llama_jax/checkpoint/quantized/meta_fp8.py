"""The FP8 shards of Llama 3.1 405B in Meta's form: float8 feed-forward weights, their scales in fp8_scales_N.pt.

Source: models/llama3/quantization/loader.py of meta-llama/llama-models. Each shard's part of a matrix has a scale for
each of its rows, under "LAYER_feed_forward.w1_N" in the file of shard N. Where shards split the columns (w2) a row so
has a scale for each shard. The scales are read as tensors alone; nothing in the file is run.
"""

from pathlib import Path

import numpy as np

from llama_jax.checkpoint.pth import PthFile
from llama_jax.checkpoint.quantized import QuantizedSource
from llama_jax.checkpoint.quantized.packed import FLOATS, GroupedWeight
from llama_jax.checkpoint.source import Source
from llama_jax.config import LlamaConfig
from llama_jax.schemes import Quantization

_BOUND = 1200.0  # of activations, fp8_activation_scale_ub in Meta's code
_FLOAT8 = "float8_e4m3fn"
_MATRICES = {"gate_proj": ("w1", 0), "up_proj": ("w3", 0), "down_proj": ("w2", 1)}  # theirs, and what shards split


def open_scaled(directory: Path, cfg: LlamaConfig, source: Source) -> Source:
    """The canonical tensors of a Meta directory, those of float8 with the scales beside them.

    Raises ValueError for float8 without scales and for scales that do not fit.
    """
    found = [name for name, spec in source.tensors.items() if spec.dtype.name == _FLOAT8]
    count = len(list(directory.glob("consolidated.*.pth")))
    files = [directory / f"fp8_scales_{n}.pt" for n in range(count)]
    if not found:
        return source
    if missing := next((file for file in files if not file.is_file()), None):
        raise ValueError(f"{missing} is missing, the scales of {found[0]}")
    scales = [PthFile(file) for file in files]
    return QuantizedSource(source, {name: _weight(source, name, scales) for name in found})


def _weight(source: Source, name: str, files: list[PthFile]) -> GroupedWeight:
    rows, columns = source.tensors[name].shape
    matrix = name.split(".")[-2]
    if matrix not in _MATRICES or len(source.tensors[name].shape) != 2:
        raise ValueError(f"{files[0].path}: {name} is {_FLOAT8}; only feed-forward weights were expected to be")
    theirs, dim = _MATRICES[matrix]
    size = (rows, columns)[dim] // len(files)
    height = size if dim == 0 else rows
    parts = []
    for n, file in enumerate(files):
        key = f"{name.split('.')[2]}_feed_forward.{theirs}_{n}"
        spec = file.tensors.get(key)
        if spec is None or spec.shape not in ((height,), (height, 1)) or spec.dtype.name not in FLOATS:
            raise ValueError(f"{file.path}: {key} is {spec}; {height} floats were expected")
        parts.append(file.read(key).astype(np.float32).reshape(-1, 1))
    scales = np.concatenate(parts, axis=dim)
    return GroupedWeight(
        (rows, columns),
        (name,),
        bits=8,
        group=columns if dim == 0 else size,
        values=lambda *index: source.read(name, index),
        scales=lambda *index: scales[index],
        rest=Quantization(inputs=_FLOAT8, bound=_BOUND),
    )
