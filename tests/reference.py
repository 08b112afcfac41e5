"""The reference that the tests compare with: transformers' Llama on CPU in float32, tiny and random."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
import transformers

from llama_jax.config import LlamaConfig, RopeConfig

TINY = LlamaConfig(
    vocab_size=128, num_layers=3, embed_dim=64, mlp_dim=160, num_heads=8, num_kv_heads=2, head_dim=16, max_seq_len=1024
)

# Grouping 4:1 and 3:1, tied and untied, RoPE factors 8 and 32 and none, a head_dim that is not D / heads.
VARIANTS = {
    "gqa4": TINY,
    "gqa3-tied-factor32": dataclasses.replace(
        TINY, embed_dim=96, num_heads=6, num_kv_heads=2, head_dim=32, rope=RopeConfig(factor=32.0), tie_embeddings=True
    ),
    "mha-unscaled": dataclasses.replace(TINY, num_kv_heads=8, rope=RopeConfig(theta=10_000.0, factor=1.0)),
}


def hf_model(cfg: LlamaConfig, seed: int = 0) -> transformers.LlamaForCausalLM:
    """A transformers model of this config whose random weights are large enough that errors show."""
    scaling = {
        "rope_type": "llama3",
        "factor": cfg.rope.factor,
        "low_freq_factor": cfg.rope.low_freq_factor,
        "high_freq_factor": cfg.rope.high_freq_factor,
        "original_max_position_embeddings": cfg.rope.original_max_seq_len,
    }
    rope = {"rope_type": "default"} if cfg.rope.factor == 1.0 else scaling
    config = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.embed_dim,
        intermediate_size=cfg.mlp_dim,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        rms_norm_eps=cfg.norm_eps,
        max_position_embeddings=cfg.max_seq_len,
        tie_word_embeddings=cfg.tie_embeddings,
        rope_parameters=rope | {"rope_theta": cfg.rope.theta},
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 2.0 / parameter.shape[1] ** 0.5)
    return model


def save_hf(model: transformers.LlamaForCausalLM, directory: Path, **options) -> Path:
    """Save with transformers' own writer."""
    model.save_pretrained(directory, **options)
    return directory


def hf_logits(model: transformers.LlamaForCausalLM, tokens: np.ndarray, **inputs) -> np.ndarray:
    """Logits float32 [B, T, V]."""
    with torch.no_grad():
        return model(torch.tensor(tokens), **inputs).logits.numpy()


def relative_error(ours, theirs) -> float:
    """Largest absolute difference as a share of the reference's range."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(np.abs(ours - theirs).max() / (theirs.max() - theirs.min()))
