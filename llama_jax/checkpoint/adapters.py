"""LoRA adapters in PEFT's format, put beside the weights of a model.

Format: adapter_config.json and adapter_model.safetensors (huggingface.co/docs/peft/developer_guides/checkpoint), with
lora_A [R, in] and lora_B [out, R] of each adapted matrix. The invariant: every tensor of an adapter is used, or the
error names it.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from llama_jax.checkpoint.names import StoredWeight, stored_weights
from llama_jax.checkpoint.safetensors import SafetensorsFile
from llama_jax.lora import AdaptedWeight
from llama_jax.model import Llama
from llama_jax.paths import as_path
from llama_jax.quantize import QuantizedArray, multiplies_itself
from llama_jax.tree import leaf_name

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"

_NAME = re.compile(r"(?:base_model\.model\.)?(model\.layers\.\d+\.\w+\.\w+)\.lora_([AB])(?:\.default)?\.weight")

# Settings that change what an adapter computes, and the only value of each that is followed.
_FOLLOWED = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, [], {}),
}


class Factors(NamedTuple):
    """A low-rank change of a matrix [out, in]: up [out, R] times down [R, in], float32, the scale in up."""

    down: np.ndarray
    up: np.ndarray


def read_adapter(directory: str | Path) -> dict[str, Factors]:
    """The change of each adapted weight by its canonical name, "model.layers.0.self_attn.q_proj.weight".

    Raises ValueError or FileNotFoundError for what is missing, not LoRA of a Llama's layers, or changes more than that.
    """
    directory = as_path(directory)
    config = _read_config(directory / _CONFIG)
    if not (directory / _TENSORS).is_file():
        raise FileNotFoundError(f"{directory / _TENSORS} is missing; save the adapter with safe_serialization=True")
    file = SafetensorsFile(directory / _TENSORS)
    sides: dict[str, dict[str, np.ndarray]] = {}
    for name in file.tensors:
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{file.path}: tensor {name} is not LoRA of a layer's matrix, which alone is supported")
        sides.setdefault(found[1], {})[found[2]] = np.asarray(file.read(name), np.float32)
    return {f"{module}.weight": _factors(file.path, module, found, config) for module, found in sides.items()}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = config["r"], config["lora_alpha"]
        if not isinstance(rank, int) or rank < 1 or isinstance(alpha, bool) or not math.isfinite(float(alpha)):
            raise ValueError(f"r={rank!r}, lora_alpha={alpha!r}")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing; expected the directory of a LoRA adapter of PEFT's") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a LoRA adapter: {error!r}") from None
    for key, values in _FOLLOWED.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported, only {values[0]!r}; merge it in PEFT")
    return config


def _factors(path: Path, module: str, sides: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Factors:
    for side in "AB":
        if side not in sides:
            raise ValueError(f"{path}: {module} has no lora_{side}")
    down, up = sides["A"], sides["B"]
    rank = _of_module(config.get("rank_pattern"), module, config["r"])
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != rank or up.shape[1] != rank:
        raise ValueError(f"{path}: {module} has lora_A {down.shape} and lora_B {up.shape}, expected rank {rank}")
    alpha = float(_of_module(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return Factors(down, up * np.float32(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)))


def _of_module(pattern: Any, module: str, default: Any) -> Any:
    """The value of the first key, a module's name or the end of it as a regular expression, that fits."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def load_adapters(model: Llama, adapters: Mapping[str, str | Path]) -> Llama:
    """The model, layout "layers", with adapters from these directories beside its weights, numbered in this order.

    Arrays are split like the weights, abstract beside abstract ones, and have the dtype of the embedding. Raises
    ValueError as `read_adapter` does, and for one that was made for a model of other shapes.
    """
    found = {name: read_adapter(directory) for name, directory in adapters.items()}
    leaves, tree = jax.tree.flatten_with_path(model, is_leaf=multiplies_itself)
    dtype, names, adapted = model.embedding.dtype, set[str](), []
    for path, leaf in leaves:
        weights, stacked = stored_weights(leaf_name(path), model.cfg.num_layers)
        if stacked:
            raise ValueError('adapters are for a model of layout="layers"')
        stored = weights[0]
        names.add(stored.name)
        if stored.num_leading and any(stored.name in changed for changed in found.values()):
            leaf = _adapted(leaf, stored, found, dtype)
        adapted.append(leaf)
    for name, changed in found.items():
        for weight in changed.keys() - names:
            raise ValueError(f"the adapter {name!r} changes {weight}, which this model does not have")
    return jax.tree.unflatten(tree, adapted)


def _adapted(
    base: Any, weight: StoredWeight, adapters: Mapping[str, Mapping[str, Factors]], dtype: DTypeLike
) -> AdaptedWeight:
    """A weight with its adapters, zeros where one does not change it or is of lower rank."""
    outputs, inputs = weight.sides(base.shape)
    num_in, num_out = math.prod(inputs), math.prod(outputs)
    changes = {i: found[weight.name] for i, found in enumerate(adapters.values()) if weight.name in found}
    rank = max(change.down.shape[0] for change in changes.values())
    down = np.zeros((num_in, len(adapters), rank), np.float32)
    up = np.zeros((len(adapters), rank, num_out), np.float32)
    for number, change in changes.items():
        made_for = change.up.shape[0], change.down.shape[1]
        if made_for != (num_out, num_in):
            name = list(adapters)[number]
            raise ValueError(f"the adapter {name!r} changes {weight.name} {made_for}; here it is {(num_out, num_in)}")
        down[:, number, : change.down.shape[0]] = change.down.T
        up[number, : change.up.shape[1]] = change.up.T
    like = base.values if isinstance(base, QuantizedArray) else base
    spec = (*like.sharding.spec, *(None,) * (len(base.shape) - len(like.sharding.spec)))
    of_outputs, of_inputs = weight.sides(spec)
    return AdaptedWeight(
        base,
        _placed(down.reshape(*inputs, *down.shape[1:]), dtype, like, (*of_inputs, None, None)),
        _placed(up.reshape(*up.shape[:2], *outputs), dtype, like, (None, None, *of_outputs)),
        names=tuple(adapters),
    )


def _placed(values: np.ndarray, dtype: DTypeLike, like: Any, spec: tuple) -> Any:
    """Values on the devices of an array, or, where that is abstract, what they would be there."""
    values = values.astype(dtype)
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*spec))
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
