"""Tiny architectures for tests, one for each way in which Llamas differ."""

import dataclasses

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
