"""Hugging Face's config.json, read and written without surprises.

Every attribute is either understood, known to be metadata, or refused by name: a setting that
could change the numbers is never dropped. Missing attributes take transformers' LlamaConfig
defaults, which are Llama 1's (rope_theta 10,000, norm epsilon 1e-6).
"""

import json
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig, RopeConfig

# Attributes that must have this value where they occur; any other changes the numbers.
_REQUIRED = {
    "model_type": "llama",
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
    "quantization_config": None,
}

_METADATA = frozenset(
    """_name_or_path architectures auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range label2id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache _commit_hash
    _attn_implementation_autoset""".split()
)

_DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False}

_SHAPE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(directory: Path, *, allow_unknown: bool = False) -> LlamaConfig:
    """The architecture in directory/config.json.

    Raises ValueError for another architecture, a value that is not supported, a missing attribute,
    and, unless allow_unknown, an attribute that is not known.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(config).__name__}")
    _check_attributes(config, path, allow_unknown)
    config = _DEFAULTS | config
    try:
        return LlamaConfig(
            vocab_size=config["vocab_size"],
            num_layers=config["num_hidden_layers"],
            embed_dim=config["hidden_size"],
            mlp_dim=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            rope=_read_rope(config, path, allow_unknown),
            norm_eps=config["rms_norm_eps"],
            tie_embeddings=config["tie_word_embeddings"],
            max_seq_len=config["max_position_embeddings"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _check_attributes(config: dict[str, Any], path: Path, allow_unknown: bool) -> None:
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if config.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        raise ValueError(
            f"{path} describes {', '.join(architectures)} (model_type {config.get('model_type')!r}); "
            "only LlamaForCausalLM of model_type 'llama' is supported"
        )
    missing = [key for key in _SHAPE_KEYS if key not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    for key, value in _REQUIRED.items():
        if key in config and config[key] != value:
            raise ValueError(f"{path}: {key}={config[key]!r} is not supported, only {value!r}")
    known = _METADATA | _REQUIRED.keys() | _DEFAULTS.keys() | set(_SHAPE_KEYS)
    known |= {"num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters"}
    unknown = sorted(config.keys() - known)
    if unknown and not allow_unknown:
        raise ValueError(
            f"{path}: unknown attribute{'s' * (len(unknown) > 1)} {', '.join(unknown)}; "
            "if they cannot change the numbers, pass --allow-unknown-config"
        )


def _read_rope(config: dict[str, Any], path: Path, allow_unknown: bool) -> RopeConfig:
    """RoPE from rope_parameters (transformers 5) or rope_theta and rope_scaling (4)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind == "default":
        scaling = {}
    elif kind == "llama3":
        missing = [key for key in _ROPE_KEYS if key not in rope]
        if missing:
            raise ValueError(f"RoPE scaling lacks {', '.join(missing)}")
        scaling = {key: rope.pop(key) for key in _ROPE_KEYS}
    else:
        raise ValueError(f"RoPE scaling of type {kind!r} is not supported, only 'llama3' and 'default'")
    if rope and not allow_unknown:
        raise ValueError(f"unknown RoPE attribute {', '.join(sorted(rope))}; pass --allow-unknown-config to ignore it")
    if not scaling:
        return RopeConfig(theta=theta, factor=1.0)
    return RopeConfig(
        theta, scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"], scaling[_ROPE_KEYS[3]]
    )


def write_config(directory: Path, cfg: LlamaConfig, dtype: str, metadata: dict[str, Any] | None = None) -> None:
    """Write config.json in the form that transformers 4 and 5 and other readers of Llama take.

    dtype is the weights' ("bfloat16"); metadata adds token ids and the like.
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
    text = json.dumps(config | (metadata or {}), indent=2, sort_keys=True)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")
