"""The reference that the tests compare with: transformers' Llama on CPU in float32, tiny and random."""

from pathlib import Path

import numpy as np
import torch
import transformers

from llama_jax.config import LlamaConfig


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
