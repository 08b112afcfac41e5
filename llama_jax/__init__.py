"""Llama 3.1 in JAX: exact, small and fast, on one CPU or a TPU pod."""

from llama_jax.checkpoint import load, save
from llama_jax.config import PRESETS, LlamaConfig, RopeConfig
from llama_jax.mesh import make_mesh, use_mesh
from llama_jax.model import Llama
from llama_jax.tokenizer import load_tokenizer

__all__ = [
    "PRESETS",
    "Llama",
    "LlamaConfig",
    "RopeConfig",
    "load",
    "load_tokenizer",
    "make_mesh",
    "save",
    "use_mesh",
]
