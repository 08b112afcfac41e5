"""Hugging Face's config.json, read and written without surprises.

Every attribute is either understood, known to be metadata, or refused by name: a setting that
could change the numbers is never dropped. Missing attributes take the defaults of transformers'
LlamaConfig, which are Llama 1's (rope_theta 10,000, norm epsilon 1e-6).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig, RopeConfig

_SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

# JSON types of the attributes that are read. An integer is a number, true is neither.
_TYPES: dict[str, type] = {
    **dict.fromkeys((*_SHAPE_KEYS, "num_key_value_heads", "head_dim", "max_position_embeddings", _ROPE_KEYS[3]), int),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", *_ROPE_KEYS[:3]), float),
    "tie_word_embeddings": bool,
}

# Attributes that must have this value where they occur; any other changes the numbers.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "pretraining_tp": 1,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
}

# What belongs to a model beside its architecture; the defaults are transformers'.
_TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}

_METADATA = frozenset(
    """_name_or_path architectures auto_map bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups
    num_beams num_return_sequences output_attentions output_hidden_states output_scores prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16
    use_cache _attn_implementation_autoset _commit_hash""".split()
)

_QUANTIZATION = "quantization_config"

_KNOWN = {*_TYPES, *_REQUIRED, *_TOKEN_IDS, *_METADATA, "rope_scaling", "rope_parameters", _QUANTIZATION} - {
    *_ROPE_KEYS
}


def read_config(directory: Path, *, allow_unknown: bool = False) -> tuple[LlamaConfig, dict[str, Any]]:
    """The architecture in directory/config.json, and the token ids beside it.

    Raises ValueError for another architecture, a value that is not supported or of the wrong type,
    a missing attribute, and, unless allow_unknown, an attribute that is not known.
    """
    path = directory / "config.json"
    stored = _read_object(path)
    try:
        cfg = _parse_config({key: value for key, value in stored.items() if value is not None}, allow_unknown)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return cfg, {key: stored.get(key, default) for key, default in _TOKEN_IDS.items()}


def read_quantization(directory: Path) -> Any:
    """What directory/config.json says of how the weights are quantized; None if they are not."""
    return _read_object(directory / "config.json").get(_QUANTIZATION)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError(f"a JSON object was expected, not {type(stored).__name__}")
    except (ValueError, RecursionError) as error:  # also what is not UTF-8 or not JSON
        raise ValueError(f"{path}: {error}") from None
    return stored


def _parse_config(config: dict[str, Any], allow_unknown: bool) -> LlamaConfig:
    """The architecture that attributes describe, without those that are null."""
    model_type, architectures = config.get("model_type"), config.get("architectures", ["LlamaForCausalLM"])
    if model_type != "llama" or architectures != ["LlamaForCausalLM"]:
        raise ValueError(
            f"only a LlamaForCausalLM of model_type 'llama' is supported, this is {architectures} of {model_type!r}"
        )
    _check_attributes(config, _KNOWN, allow_unknown)
    if missing := [key for key in _SHAPE_KEYS if key not in config]:
        raise ValueError(f"{', '.join(missing)} must be given")
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        embed_dim=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        head_dim=config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
        rope=_read_rope(config, allow_unknown),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_embeddings=config.get("tie_word_embeddings", False),
        max_seq_len=config.get("max_position_embeddings", 2048),
    )


def _check_attributes(attributes: Mapping[str, Any], known: set[str], allow_unknown: bool) -> None:
    """Raise ValueError for a value of the wrong type or not supported, and for what is not known."""
    for key, value in attributes.items():
        if key not in known:
            if not allow_unknown:
                raise ValueError(
                    f"unknown attribute {key}={value!r:.80}; if it cannot change the numbers, allow unknown config"
                )
        elif key in _REQUIRED and value != _REQUIRED[key]:
            raise ValueError(f"{key}={value!r:.80} is not supported, only {_REQUIRED[key]!r}")
        elif key in _TYPES:
            _check_type(key, value)


def _check_type(key: str, value: Any) -> None:
    kind = _TYPES[key]
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{key}={value!r:.80}, expected true or false")
    elif isinstance(value, bool) or not isinstance(value, (int, kind)) or not value > 0:
        raise ValueError(f"{key}={value!r:.80}, expected a positive {'integer' if kind is int else 'number'}")


def _read_rope(config: Mapping[str, Any], allow_unknown: bool) -> RopeConfig:
    """RoPE from rope_scaling (transformers 4) or rope_parameters (5)."""
    described = [config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)]
    ropes = [_parse_rope(rope, config.get("rope_theta", 10_000.0), allow_unknown) for rope in described or [{}]]
    if ropes[0] != ropes[-1]:
        raise ValueError("rope_scaling and rope_parameters do not say the same; remove one of them")
    return ropes[0]


def _parse_rope(rope: Any, theta: float, allow_unknown: bool) -> RopeConfig:
    """One description of RoPE; theta is for those that have none of their own."""
    if not isinstance(rope, dict):
        raise ValueError(f"RoPE must be described by a JSON object, not {rope!r:.80}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(f"RoPE scaling of type {kind!r} is not supported, only 'llama3' and 'default'")
    scaling = _ROPE_KEYS if kind == "llama3" else ()
    rope = {key: value for key, value in rope.items() if value is not None}
    _check_attributes(rope, {"rope_type", "type", "rope_theta", "partial_rotary_factor", *scaling}, allow_unknown)
    if missing := [key for key in scaling if key not in rope]:
        raise ValueError(f"RoPE scaling lacks {', '.join(missing)}")
    theta = float(rope.get("rope_theta", theta))
    if not scaling:
        return RopeConfig(theta, factor=1.0)
    factor, low_freq, high_freq = (float(rope[key]) for key in _ROPE_KEYS[:3])
    return RopeConfig(theta, factor, low_freq, high_freq, rope[_ROPE_KEYS[3]])


def write_config(
    directory: Path,
    cfg: LlamaConfig,
    *,
    dtype: str,
    token_ids: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json in the form that transformers 4 and 5 and other readers of Llama take.

    dtype is the weights' ("bfloat16"). A token id that is not given is written as null, because
    transformers takes Llama 1's for one that is absent.
    """
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.embed_dim,
        "intermediate_size": cfg.mlp_dim,
        "max_position_embeddings": cfg.max_seq_len,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "rms_norm_eps": cfg.norm_eps,
        "rope_scaling": None,
        "rope_theta": cfg.rope.theta,
        "tie_word_embeddings": cfg.tie_embeddings,
        "torch_dtype": dtype,
        "vocab_size": cfg.vocab_size,
    }
    if cfg.rope.factor != 1.0:
        config["rope_scaling"] = {
            "factor": cfg.rope.factor,
            "high_freq_factor": cfg.rope.high_freq_factor,
            "low_freq_factor": cfg.rope.low_freq_factor,
            "original_max_position_embeddings": cfg.rope.original_max_seq_len,
            "rope_type": "llama3",
        }
    if quantization is not None:
        config[_QUANTIZATION] = quantization
    text = json.dumps(config | dict.fromkeys(_TOKEN_IDS) | dict(token_ids), indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
