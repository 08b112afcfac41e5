"""Llama 3.1 in JAX: exact, small and fast, on one CPU or a TPU pod.

A name is imported when it is first used, so that commands answer --help without waiting for jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.checkpoint import load, save
    from llama_jax.config import PRESETS, LlamaConfig, RopeConfig
    from llama_jax.mesh import make_mesh, use_mesh
    from llama_jax.model import Llama
    from llama_jax.tokenizer import load_tokenizer

__version__ = "0.1.0"

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

_MODULES = {
    "PRESETS": "config",
    "Llama": "model",
    "LlamaConfig": "config",
    "RopeConfig": "config",
    "load": "checkpoint",
    "load_tokenizer": "tokenizer",
    "make_mesh": "mesh",
    "save": "checkpoint",
    "use_mesh": "mesh",
}


def __getattr__(name: str) -> Any:
    """A name of __all__, from the module that defines it (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'llama_jax' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"llama_jax.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
