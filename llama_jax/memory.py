"""Does it fit: the bytes that a run needs on each device and on the host, against those that are left.

What is needed follows from shapes and their split over the ambient mesh, so it is known before a
weight is read; a compiled program then says its own. The invariant: a sum counts what is certainly
held at once and, for inference, the allowance that `generation_bytes` states, so that what cannot run
is refused in one line and what might is tried.
"""

import math
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, get_abstract_mesh
from jax.typing import DTypeLike

from llama_jax.attention import LONGEST_IN_BLOCKS
from llama_jax.cache import init_cache
from llama_jax.config import LlamaConfig
from llama_jax.mesh import ShardingRules, sharding_rules
from llama_jax.model import Layout, Llama
from llama_jax.rounding import quantize_model
from llama_jax.schemes import Scheme

# A jax.Device; jax's own name for it is no type to a type checker.
Device = Any

# GiB of a device where the runtime does not say; of TPU v2, v3 and 7x a core is a device.
_HBM = {
    "TPU v2": 8,
    "TPU v3": 16,
    "TPU v4": 32,
    "TPU v5 lite": 16,
    "TPU v5e": 16,
    "TPU v5": 95,
    "TPU v5p": 95,
    "TPU v6 lite": 32,
    "TPU v6e": 32,
    "TPU7x": 96,
}


def weight_bytes(cfg: LlamaConfig, dtype: DTypeLike, scheme: Scheme | None = None) -> int:
    """Bytes a device of the weights on the ambient mesh, quantized by a scheme or all in a dtype."""
    return bytes_a_device(abstract_model(cfg, dtype, scheme, "layers" if scheme else "stacked"))


def abstract_model(
    cfg: LlamaConfig, dtype: DTypeLike, scheme: Scheme | None = None, layout: Layout = "stacked"
) -> Llama:
    """Shapes, dtypes and shardings of a model's weights on the ambient mesh."""

    def born() -> Llama:
        model = Llama(cfg, rngs=nnx.Rngs(0), layout=layout)
        return quantize_model(jax.tree.map(lambda w: w.astype(dtype), model), scheme, cfg.num_layers)

    return jax.eval_shape(born)


def generation_bytes(
    cfg: LlamaConfig, dtype: DTypeLike, *, num_rows: int, prompt_tokens: int, num_tokens: int
) -> dict[str, int]:
    """Bytes a device, beside the weights, to continue num_rows prompts of prompt_tokens to num_tokens.

    The allowance for temporaries: four float32 copies of a row's logits, which are whole on every
    device while a token is chosen, eight residual streams of the prompt, and the larger of three MLP
    widths and, where attention is not in tiles, the float32 scores of its blocks of queries.
    """
    rules, size = sharding_rules(cfg), np.dtype(dtype).itemsize
    num_rows = _rounded(num_rows, rules.batch_multiple)
    length = _rounded(prompt_tokens, rules.sequence_multiple)
    num_slots = _rounded(max(num_tokens, length), rules.cache_multiple)
    block = min(length, max(128, min(512, -(-length // 8))))
    heads = (num_rows, cfg.num_kv_heads, cfg.num_groups)

    def held(axes: tuple[str | None, ...], *shape: int) -> int:
        return _num_held(rules, shape, axes)

    logits = 4 * held(("batch", None), num_rows, cfg.vocab_size)
    scores = held(("batch", "kv_heads", "q_groups", None, None), *heads, block, length) * _num_blocks_held(length)
    stream = 8 * held(("batch", "sequence", None), num_rows, length, cfg.embed_dim)
    mlp = 3 * held(("batch", "sequence", "mlp"), num_rows, length, cfg.mlp_dim)
    cache = jax.eval_shape(lambda: init_cache(cfg, rules, num_rows, num_slots, dtype=dtype))
    temporaries = 4 * logits + size * stream + max(int(4 * scores), size * mlp)
    return {"cache": bytes_a_device(cache), "temporaries": temporaries}


def _num_blocks_held(length: int) -> float:
    """How many blocks of queries have their scores over the whole sequence in memory at once."""
    device = get_abstract_mesh().abstract_device
    if device is not None and device.platform == "tpu":
        return 0
    if device is None or device.platform != "cpu":
        return 1
    return 4.5 if length <= LONGEST_IN_BLOCKS else 0  # eight that see a growing part of it


def training_bytes(
    cfg: LlamaConfig,
    dtype: DTypeLike,
    *,
    num_rows: int,
    seq_len: int,
    loss_chunks: int,
    moment_dtype: DTypeLike,
    offloaded: bool = False,
) -> dict[str, int]:
    """The least bytes a device to train num_rows of seq_len tokens on the ambient mesh, computing in dtype.

    Weights and their gradients (in bfloat16 these and a copy of the weights) are float32, Adam's two
    moments in moment_dtype. Of the activations only each layer's input, which no remat policy recomputes
    (offloaded ones are on the host), and one chunk of float32 logits are counted.
    """
    rules = sharding_rules(cfg)
    weights = weight_bytes(cfg, np.float32)
    num_rows, length = _rounded(num_rows, rules.batch_multiple), _rounded(seq_len, rules.sequence_multiple)
    vocab = _rounded(cfg.vocab_size, rules.vocab_multiple)
    stream = "sequence" if length % rules.residual_multiple else "residual"
    inputs = cfg.num_layers * _num_held(rules, (num_rows, length, cfg.embed_dim), ("batch", stream, None))
    logits = _num_held(rules, (num_rows, length, vocab), ("batch", "sequence", "vocab")) // loss_chunks
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": 2 * weight_bytes(cfg, moment_dtype),
        "activations": (0 if offloaded else np.dtype(dtype).itemsize * inputs) + 4 * logits,
    }


def check_fit(what: str, needs: Mapping[str, int], devices: Iterable[Device], *, ways: str) -> None:
    """Raise ValueError with the numbers and the ways out if the bytes a device are more than are left.

    Only this process's devices are looked at; where nothing is known about them, nothing is refused.
    """
    local = [device for device in devices if device.process_index == jax.process_index()]
    left, total = bytes_left(local), sum(needs.values())
    if left is None or total <= left:
        return
    parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in needs.items())
    raise ValueError(
        f"{what} needs {_gigabytes(total)} GB on each of {len(local)} x {local[0].device_kind} ({parts}), "
        f"but {_gigabytes(left)} GB are left there; use {ways}"
    )


def check_program(what: str, compiled: Any, devices: Iterable[Device], *, ways: str) -> None:
    """`check_fit` of what a compiled program will hold beside its arguments, as its compiler says."""
    stats = compiled.memory_analysis()
    if stats is not None:
        results = stats.output_size_in_bytes - stats.alias_size_in_bytes
        check_fit(what, {"temporaries": stats.temp_size_in_bytes, "results": results}, devices, ways=ways)


def check_host(cfg: LlamaConfig, dtype: DTypeLike) -> None:
    """Raise ValueError if the host cannot hold the largest part of a weight on its way to a device."""
    part, left = max(_part_bytes(abstract_model(cfg, dtype, layout="layers"), dtype)), host_bytes_left()
    if left is not None and part > left:
        raise ValueError(
            f"reading a weight needs {_gigabytes(part)} GB of host memory, but {_gigabytes(left)} GB are left; "
            "close other programs or split the weights over more devices with --mesh"
        )


def bytes_a_device(tree: Any, dtype: DTypeLike | None = None) -> int:
    """Bytes that each device holds of abstract arrays with shardings, in their own dtype or in another."""
    return sum(_part_bytes(tree, dtype))


def bytes_left(devices: Iterable[Device]) -> int | None:
    """The bytes that each of these devices of this process can still take; None if nobody knows."""
    devices = list(devices)
    if devices[0].platform == "cpu":
        left = host_bytes_left()
        return None if left is None else left // len(devices)
    counts = [_bytes_left_on(device) for device in devices]
    return min((count for count in counts if count is not None), default=None)


def host_bytes_left(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that can be had without swapping, within the limits of its control groups.

    On macOS all that is built in. root is where /proc and /sys are looked for. None if nobody knows.
    """
    if sys.platform == "darwin":
        return int(subprocess.run(["sysctl", "-n", "hw.memsize"], capture_output=True, check=True).stdout)
    return min([*_available(root), *_cgroup_bytes_left(root)], default=None)


def _part_bytes(tree: Any, dtype: DTypeLike | None) -> Iterator[int]:
    for leaf in jax.tree.leaves(tree):
        yield math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(dtype or leaf.dtype) // 8


def _bits(dtype: DTypeLike) -> int:
    """Of a value in memory; numpy counts a byte for four bits."""
    return 4 if jnp.dtype(dtype) == jnp.int4 else 8 * np.dtype(dtype).itemsize


def _num_held(rules: ShardingRules, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> int:
    """How many values of an array with these logical axes a device holds."""
    return math.prod(NamedSharding(get_abstract_mesh(), rules(*axes)).shard_shape(shape))


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2g}"


def _bytes_left_on(device: Device) -> int | None:
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.device_kind not in _HBM:
        return None
    shards = (shard for array in jax.live_arrays() for shard in array.addressable_shards)
    return (_HBM[device.device_kind] << 30) - sum(shard.data.nbytes for shard in shards if shard.device == device)


def _available(root: Path) -> Iterator[int]:
    file = root / "proc/meminfo"
    for line in file.read_text().splitlines() if file.exists() else []:
        name, _, size = line.partition(":")
        if name == "MemAvailable":
            yield int(size.split()[0]) * 1024


def _cgroup_bytes_left(root: Path) -> Iterator[int]:
    """Of every control group that this process is in, version 1 or 2, the limit less what cannot be dropped.

    A container may see its own group at the top, under a path that names it only outside.
    """
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, prefix = "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
            usage, prefix = "memory.usage_in_bytes", "total_"
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (root / top / parent for parent in (group, *group.parents)):
            if (folder / limit).exists() and (folder / limit).read_text().strip() != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield int((folder / limit).read_text()) - int((folder / usage).read_text()) + cached
