"""Choosing the next token on the device, with its own settings for every row of a batch.

The order is transformers': temperature, then top-k, top-p and min-p, each on what the previous
left. Thresholds are found by bisection over the bit patterns of the probabilities, which are
ordered like the floats: 31 counting passes instead of a sort of 128,256 values. The invariant: a
row's token depends on its own logits, settings, seed and position alone, not on the batch.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    temperature 0 is greedy; top_k 0 and top_p 1 and min_p 0 keep every token. The same seed gives
    the same text for the same prompt, whatever else is in the batch. stop are strings that end the
    text and are not part of it; stop_tokens end it beside the tokenizer's own. ignore_eos goes on
    past the tokenizer's stop tokens.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        """Raises ValueError naming the setting that is out of range."""
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 (off) and 1"),
            "seed": (0 <= self.seed < 2**32, "between 0 and 2**32 - 1"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
            "stop_tokens": (all(0 <= token < 2**31 for token in self.stop_tokens), "token ids"),
        }
        for name, (legal, expected) in limits.items():
            if not legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")


class RowSettings(NamedTuple):
    """The settings of a batch as arrays [B]: float32 but top_k int32 and seed uint32."""

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray
    top_p: Array | np.ndarray
    min_p: Array | np.ndarray
    seed: Array | np.ndarray


def row_settings(params: Sequence[SamplingParams]) -> RowSettings:
    """The settings of every row, for the device."""
    dtypes = {"top_k": np.int32, "seed": np.uint32}
    rows = [dataclasses.asdict(p) for p in params]
    return RowSettings(
        *(np.array([row[name] for row in rows], dtypes.get(name, np.float32)) for name in RowSettings._fields)
    )


def sample(logits: Array, settings: RowSettings, positions: Array | np.ndarray) -> tuple[Array, Array]:
    """The next token int32 [B] and its log-probability float32 [B], from logits float32 [B, V].

    positions int32 [B] are those of the tokens to be chosen and vary the noise along a text. The
    log-probability is the model's own, before temperature and filters.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw() -> Array:
        scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
        unfiltered = (settings.top_k == 0) & (settings.top_p >= 1) & (settings.min_p <= 0)
        kept = jax.lax.cond(jnp.all(unfiltered), lambda: scaled, lambda: filter_logits(scaled, settings))
        noise = jax.vmap(lambda seed, position: _gumbel(seed, position, logits.shape[-1]))(settings.seed, positions)
        return jnp.where(settings.temperature > 0, jnp.argmax(kept + noise, axis=-1).astype(jnp.int32), greedy)

    # A greedy batch pays for no noise.
    tokens = jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda: greedy)
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == tokens[:, None], logits, 0.0), axis=-1)
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _gumbel(seed: Array, position: Array, num: int) -> Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (num,))


def filter_logits(logits: Array, settings: RowSettings) -> Array:
    """Logits float32 [B, V] with what top-k, top-p and min-p drop set to -inf; ties are kept together."""
    top_k = jnp.where(settings.top_k == 0, logits.shape[-1], settings.top_k)[:, None]
    probs = jax.nn.softmax(logits, axis=-1)
    kept = probs >= _threshold(probs, lambda above: jnp.sum(above, -1, keepdims=True) >= top_k)
    probs = _renormalized(probs, kept)
    top_p = settings.top_p[:, None]
    nucleus = _threshold(probs, lambda above: jnp.sum(jnp.where(above, probs, 0.0), -1, keepdims=True) >= top_p)
    # Rounding can leave the sum of all just under 1, so top_p = 1 is said to keep everything.
    kept &= (probs >= nucleus) | (top_p >= 1)
    probs = _renormalized(probs, kept)
    kept &= probs >= settings.min_p[:, None] * probs.max(axis=-1, keepdims=True)
    return jnp.where(kept, logits, -jnp.inf)


def _renormalized(probs: Array, kept: Array) -> Array:
    probs = jnp.where(kept, probs, 0.0)
    return probs / probs.sum(axis=-1, keepdims=True)


def _threshold(probs: Array, enough) -> Array:
    """The largest float32 t [B, 1] for which enough(probs >= t) holds; 0 if none does."""
    low = jnp.zeros_like(probs[:, :1], dtype=jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        holds = enough(probs >= jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    # 0x3F800001 is the float after 1.0: no probability reaches it.
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, low + 0x3F800001))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
