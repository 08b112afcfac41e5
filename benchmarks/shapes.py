"""The shapes that are measured, their random weights and tokens, and what each row must cost.

Weights are written once as a Hugging Face directory, so that every library reads the very same ones.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.hf import write_config
from llama_jax.checkpoint.names import canonical_shapes
from llama_jax.checkpoint.safetensors import write_sharded
from llama_jax.checkpoint.source import TensorSpec
from llama_jax.config import PRESETS, LlamaConfig, RopeConfig
from llama_jax.paths import staged_directory
from train.config import OptimizerConfig, PhaseConfig, StageConfig, read_config

SHAPES: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(512, 2, 64, 160, 8, 2, 16, max_seq_len=8192),
    "demo": read_config("demo").stage_model("2"),
    "12m": LlamaConfig(
        8192, 6, 384, 1024, 6, 2, 64, rope=RopeConfig(factor=1.0), tie_embeddings=True, max_seq_len=8192
    ),
    "100m": LlamaConfig(
        32_000, 12, 768, 2048, 12, 4, 64, rope=RopeConfig(factor=1.0), tie_embeddings=True, max_seq_len=8192
    ),
    "1b": PRESETS["llama3.2-1b"],
    "8b": PRESETS["llama3.1-8b"],
}

OPTIMIZER = OptimizerConfig()
LEARNING_RATE = 1e-4


def constant_rate_stage(length: int) -> StageConfig:
    """A stage that trains at LEARNING_RATE throughout, as the peer's plain AdamW does."""
    phase = PhaseConfig(seq_len=length, tokens=1000 * length)
    return StageConfig((phase,), length, learning_rate=LEARNING_RATE, final_learning_rate=LEARNING_RATE)


def written_weights(shape: str, directory: Path, num_tokens: int | None = None) -> Path:
    """A directory with random float32 weights of a shape, written if it is not there yet.

    Matrices have the spread of one over the square root of their width, so that the logits are as
    far apart as a trained model's and both libraries choose the same tokens.

    num_tokens: of those beyond the logits are 0, so that greedy text has none of them; by default none are beyond.
    """
    path = directory / shape
    if path.exists():
        return path
    cfg = SHAPES[shape]
    rng = np.random.default_rng(0)

    def tensor(dims: tuple[int, ...]) -> np.ndarray:
        if len(dims) == 1:
            return rng.uniform(0.5, 1.5, dims).astype(np.float32)
        values = rng.standard_normal(dims, np.float32) / math.sqrt(dims[1])
        if dims[0] == cfg.vocab_size:
            values[num_tokens:] = 0
        return values

    shapes = canonical_shapes(cfg)
    specs = {name: TensorSpec(dims, np.dtype("float32")) for name, dims in shapes.items()}
    with staged_directory(path) as staged:
        write_config(staged, cfg, dtype="float32", token_ids={})
        write_sharded(staged, specs, ((name, tensor(dims)) for name, dims in shapes.items()))
    return path


def random_tokens(vocab_size: int, rows: int, length: int) -> np.ndarray:
    """int32 [rows, length], the same in every process."""
    return np.random.default_rng([rows, length]).integers(0, vocab_size, (rows, length), np.int32)


def product_params(cfg: LlamaConfig) -> int:
    """Weights that enter a matrix product: all but the embedding that is only looked up, and the norms."""
    return round(cfg.train_flops_per_token(0) / 6)


def prefill_flops(cfg: LlamaConfig, rows: int, length: int) -> float:
    """Forward FLOPs of prompts [rows, length]; the head runs on the last token of each row alone."""
    head = 2 * cfg.vocab_size * cfg.embed_dim
    return rows * (length * (cfg.train_flops_per_token(length) / 3 - head) + head)


def train_flops(cfg: LlamaConfig, rows: int, length: int) -> float:
    """Forward and backward FLOPs of one step, nothing recomputed."""
    return rows * length * cfg.train_flops_per_token(length)


def decode_bytes(cfg: LlamaConfig, rows: int, context: float, bytes_per_value: int) -> float:
    """Bytes that one decode step must read: every weight of a product once, and the keys and values so far."""
    weights = product_params(cfg) * bytes_per_value
    return weights + rows * context * cfg.cache_bytes_per_token(bytes_per_value)


def describe(cfg: LlamaConfig) -> str:
    """The shape in one line."""
    names = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    values = dataclasses.asdict(cfg)
    tied = ", tied" if cfg.tie_embeddings else ""
    return f"{cfg.num_params() / 1e6:.0f}M parameters: " + ", ".join(f"{name} {values[name]}" for name in names) + tied
