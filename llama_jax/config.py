"""What a Llama is, as numbers: the architecture, the published presets, and what they cost.

Source: The Llama 3 Herd of Models (arXiv 2407.21783) table 3 and the params.json files that Meta
publishes. The one invariant: 8B, 70B, 405B, 3.2 and 3.3 differ by the values here and nowhere else.
"""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding with the Llama 3.1 frequency scaling.

    theta: base of the geometric series of wavelengths.
    factor: by how much the slow frequencies are divided; 1.0 means unscaled (Llama 3.0).
    low_freq_factor, high_freq_factor: wavelengths above original_max_seq_len / low_freq_factor are
        divided by `factor`, those below original_max_seq_len / high_freq_factor are kept, the rest
        are interpolated.
    original_max_seq_len: the context in tokens that was trained before the extension.
    """

    theta: float = 500_000.0
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self):
        """Raises ValueError if the values cannot describe a scaling."""
        if self.theta <= 0 or self.factor < 1:
            raise ValueError(
                f"rope.theta={self.theta} and rope.factor={self.factor}: theta must be positive and factor at least 1"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope.low_freq_factor={self.low_freq_factor} must be positive and below "
                f"rope.high_freq_factor={self.high_freq_factor}"
            )
        if self.original_max_seq_len < 1:
            raise ValueError(f"rope.original_max_seq_len={self.original_max_seq_len} must be at least 1")


@dataclass(frozen=True)
class LlamaConfig:
    """The architecture of one Llama: all that shapes and numerics depend on.

    max_seq_len is the longest context in tokens that the weights are meant for; it bounds what the
    engine serves and enters no computation.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig = RopeConfig()
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_seq_len: int = 131_072

    def __post_init__(self):
        """Raises ValueError if the numbers do not make a model."""
        for name in (
            "vocab_size",
            "num_layers",
            "embed_dim",
            "mlp_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_seq_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}; "
                "every KV head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs, so it must be even")

    @property
    def num_groups(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def num_params(self) -> int:
        """Number of parameters, a tied head counted once."""
        attention = 2 * self.embed_dim * (self.num_heads + self.num_kv_heads) * self.head_dim
        mlp = 3 * self.embed_dim * self.mlp_dim
        layer = attention + mlp + 2 * self.embed_dim
        tables = 1 if self.tie_embeddings else 2
        return self.num_layers * layer + tables * self.vocab_size * self.embed_dim + self.embed_dim

    def cache_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes of keys and values that one token adds to the cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    def train_flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs to train one token in a sequence of seq_len tokens, forward and backward.

        Six per weight that enters a product (the embedding look-up does not, the head does), and
        causal attention at half of seq_len: twelve per head dimension, key and layer, halved.
        PaLM appendix B (arXiv 2204.02311), with causality counted.
        """
        tables = 0 if self.tie_embeddings else self.vocab_size * self.embed_dim
        norms = (2 * self.num_layers + 1) * self.embed_dim
        products = self.num_params() - tables - norms
        return 6.0 * products + 6.0 * self.num_layers * self.num_heads * self.head_dim * seq_len


def llama3_mlp_dim(embed_dim: int, multiplier: float, multiple_of: int) -> int:
    """Width of the feed-forward layer as Meta's params.json implies it (llama3/model.py, FeedForward)."""
    width = int(multiplier * int(8 * embed_dim / 3))
    return -(-width // multiple_of) * multiple_of


_ROPE_3_2 = RopeConfig(factor=32.0)

_LLAMA_70B = LlamaConfig(128_256, 80, 8192, 28_672, 64, 8, 128)

PRESETS: dict[str, LlamaConfig] = {
    "llama3.1-8b": LlamaConfig(128_256, 32, 4096, 14_336, 32, 8, 128),
    "llama3.1-70b": _LLAMA_70B,
    "llama3.1-405b": LlamaConfig(128_256, 126, 16_384, 53_248, 128, 8, 128),
    "llama3.2-1b": LlamaConfig(128_256, 16, 2048, 8192, 32, 8, 64, rope=_ROPE_3_2, tie_embeddings=True),
    "llama3.2-3b": LlamaConfig(128_256, 28, 3072, 8192, 24, 8, 128, rope=_ROPE_3_2, tie_embeddings=True),
    "llama3.3-70b": _LLAMA_70B,
}


def set_field(cfg: LlamaConfig, key: str, value) -> LlamaConfig:
    """The config with one field replaced, `rope.` for the nested ones.

    Raises ValueError for a key that does not exist, naming those that do.
    """
    head, _, rest = key.partition(".")
    names = [field.name for field in dataclasses.fields(cfg)]
    if rest and head == "rope":
        inner = [field.name for field in dataclasses.fields(cfg.rope)]
        if rest not in inner:
            raise ValueError(f"unknown model key {key!r}; under rope there are {', '.join(inner)}")
        return dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, **{rest: value}))
    if rest or head not in names or head == "rope":
        raise ValueError(f"unknown model key {key!r}; known are {', '.join(names)} (rope.* one by one)")
    return dataclasses.replace(cfg, **{head: value})
