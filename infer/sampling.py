"""Choosing the next token on the device, with its own settings for every row of a batch.

The order is that of transformers' generate: bias, penalties, banned and allowed tokens, temperature,
then top-k, top-p and min-p, each on what the previous left. Thresholds are found by bisection over the
bit patterns of the probabilities, which are ordered like the floats: 31 counting passes instead of a
sort of 128,256 values. What no row of the batch asks for is not computed. The invariant: a row's token
depends on its own logits, settings, seed, position and history alone, not on the batch.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt.

    temperature 0 is greedy; top_k 0 and top_p 1 and min_p 0 keep every token. The same seed gives
    the same text for the same prompt, whatever else is in the batch. stop are strings that end the
    text and are not part of it; stop_tokens end it beside the tokenizer's own, none of them before
    min_new_tokens. ignore_eos goes on past the tokenizer's stop tokens.

    repetition_penalty (arXiv 1909.05858) divides the positive and multiplies the negative logits of
    tokens in the prompt or the text; presence_penalty is taken off those of tokens in the text, and
    frequency_penalty as often as they occur there. logit_bias is added to the logits of its tokens.
    banned_tokens never come, and if there are any allowed_tokens, no others do.

    n texts are wanted, the best of best_of (n if None). logprobs: how many of the likeliest tokens
    are told beside each chosen one; prompt_logprobs the same for the prompt's tokens, None for nothing, but for those
    before token prompt_logprobs_from, which may then be found in the cache.
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
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_tokens: tuple[int, ...] = ()
    banned_tokens: tuple[int, ...] = ()
    n: int = 1
    best_of: int | None = None
    logprobs: int = 0
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0

    def __post_init__(self):
        """Raises ValueError naming the setting that is out of range."""
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_k": (0 <= self.top_k < 2**31, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            "min_p": (0 <= self.min_p <= 1, "between 0 (off) and 1"),
            "seed": (0 <= self.seed < 2**32, "between 0 and 2**32 - 1"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of strings that are not empty"),
            "stop_tokens": (_are_tokens(self.stop_tokens), "token ids"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0, 1 for none"),
            "presence_penalty": (-2 <= self.presence_penalty <= 2, "between -2 and 2, 0 for none"),
            "frequency_penalty": (-2 <= self.frequency_penalty <= 2, "between -2 and 2, 0 for none"),
            "logit_bias": (
                len(self.logit_bias) <= MAX_LOGIT_BIAS
                and _are_tokens(self.logit_bias)
                and all(map(math.isfinite, self.logit_bias.values())),
                f"finite numbers for at most {MAX_LOGIT_BIAS} token ids",
            ),
            "allowed_tokens": (_are_tokens(self.allowed_tokens), "token ids"),
            "banned_tokens": (_are_tokens(self.banned_tokens), "token ids"),
            "n": (self.n >= 1, "at least 1"),
            "best_of": (self.best_of is None or self.best_of >= self.n, "at least n"),
            "logprobs": (0 <= self.logprobs <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
            "prompt_logprobs": (0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS, f"None or 0 to {MAX_LOGPROBS}"),
            "prompt_logprobs_from": (self.prompt_logprobs_from >= 0, "0 or more"),
        }
        for name, (legal, expected) in limits.items():
            if not legal:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")

    @property
    def needs_history(self) -> bool:
        """Whether the tokens so far matter, beyond what the model makes of them."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def candidates(self) -> list["SamplingParams"]:
        """One for each of the best_of texts: the i-th is what seed + i gives alone."""
        single = {"n": 1, "best_of": None}
        return [
            dataclasses.replace(self, seed=(self.seed + i) % 2**32, **single) for i in range(self.best_of or self.n)
        ]


def _are_tokens(tokens) -> bool:
    return all(0 <= token < 2**31 for token in tokens)


def best_first(logprobs: Sequence[Sequence[float]]) -> list[int]:
    """The indices of texts, given the log-probabilities of their tokens, from the highest mean to the lowest."""
    return sorted(range(len(logprobs)), key=lambda i: -sum(logprobs[i]) / max(1, len(logprobs[i])))


class RowSettings(NamedTuple):
    """The settings of a batch: arrays [B], float32 but where said, and [B, N] filled up with token -1.

    stops are banned before position stops_from.
    """

    temperature: Array | np.ndarray
    top_k: Array | np.ndarray  # int32
    top_p: Array | np.ndarray
    min_p: Array | np.ndarray
    seed: Array | np.ndarray  # uint32
    repetition_penalty: Array | np.ndarray
    presence_penalty: Array | np.ndarray
    frequency_penalty: Array | np.ndarray
    bias_tokens: Array | np.ndarray  # int32 [B, MAX_LOGIT_BIAS]
    bias_values: Array | np.ndarray  # float32 [B, MAX_LOGIT_BIAS]
    stops: Array | np.ndarray  # int32 [B, N]
    stops_from: Array | np.ndarray  # int32


def row_settings(
    params: Sequence[SamplingParams],
    *,
    stops: np.ndarray | None = None,
    prompt_lengths: Sequence[int] | np.ndarray | None = None,
) -> RowSettings:
    """The settings of every row, for the device.

    min_new_tokens needs stops int32 [B, N], filled up with -1, and the prompt_lengths in tokens.
    """
    dtypes = {"top_k": np.int32, "seed": np.uint32}
    fields = RowSettings._fields[: RowSettings._fields.index("bias_tokens")]
    columns = {name: np.array([getattr(row, name) for row in params], dtypes.get(name, np.float32)) for name in fields}
    columns["bias_tokens"] = np.full((len(params), MAX_LOGIT_BIAS), -1, np.int32)
    columns["bias_values"] = np.zeros((len(params), MAX_LOGIT_BIAS), np.float32)
    for i, row in enumerate(params):
        columns["bias_tokens"][i, : len(row.logit_bias)] = list(row.logit_bias)
        columns["bias_values"][i, : len(row.logit_bias)] = list(row.logit_bias.values())
    least = np.array([row.min_new_tokens for row in params], np.int32)
    lengths = np.zeros_like(least) if prompt_lengths is None else np.asarray(prompt_lengths, np.int32)
    columns["stops"] = np.full((len(params), 1), -1, np.int32) if stops is None else stops
    columns["stops_from"] = np.where(least > 0, lengths + least, 0)
    return RowSettings(**columns)


def token_mask(params: SamplingParams, vocab_size: int) -> np.ndarray | None:
    """The bits uint32 [ceil(V / 32)] of the tokens that may come; None if all may.

    Token t is bit t % 32 of word t // 32. Raises ValueError if no token is left.
    """
    if not params.allowed_tokens and not params.banned_tokens:
        return None
    may = np.zeros(-(-vocab_size // 32) * 32, bool)
    may[[t for t in params.allowed_tokens if t < vocab_size] if params.allowed_tokens else slice(vocab_size)] = True
    may[[t for t in params.banned_tokens if t < vocab_size]] = False
    if not may.any():
        raise ValueError("allowed_tokens and banned_tokens leave no token; allow one that is not banned")
    return np.packbits(may, bitorder="little").view("<u4")


class History(NamedTuple):
    """What each row holds so far: counts int32 [B, V] of generated tokens, in_prompt bool [B, V]."""

    counts: Array
    in_prompt: Array


def empty_history(num_rows: int, vocab_size: int) -> History:
    """Rows that hold nothing."""
    shape = (num_rows, vocab_size)
    return History(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


def record(history: History, tokens: Array | np.ndarray) -> History:
    """The history after one more token int32 [B] of each row, -1 for rows that have none."""
    counts = jax.vmap(lambda row, token: row.at[_or_outside(token, row)].add(1, mode="drop"))(history.counts, tokens)
    return history._replace(counts=counts)


def forget(
    history: History, row: Array | int, prompt: Array | np.ndarray, generated: Array | np.ndarray | None = None
) -> History:
    """The history with one row set anew: prompt int32 [L] and the generated tokens int32 [M], filled up with -1."""
    here = (jnp.arange(len(history.counts)) == row)[:, None]
    in_prompt = jnp.zeros_like(history.in_prompt[0])
    in_prompt = in_prompt.at[_or_outside(prompt, in_prompt)].set(True, mode="drop")
    counts = jnp.zeros_like(history.counts[0])
    if generated is not None:
        counts = counts.at[_or_outside(generated, counts)].add(1, mode="drop")
    return History(jnp.where(here, counts, history.counts), jnp.where(here, in_prompt, history.in_prompt))


def _or_outside(tokens: Array | np.ndarray, row: Array) -> Array:
    """Tokens with -1, which would count from the end, moved past it, where a scatter drops them."""
    return jnp.where(jnp.asarray(tokens) < 0, len(row), tokens)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """What was chosen: tokens int32 and logprobs float32 [B], and of the n likeliest the same [B, n].

    The log-probabilities are the model's own, before bias, penalties, temperature and filters.
    """

    tokens: Array
    logprobs: Array
    top_tokens: Array
    top_logprobs: Array


def sample(
    logits: Array,
    settings: RowSettings,
    positions: Array | np.ndarray,
    *,
    history: History | None = None,
    allowed: Array | np.ndarray | None = None,
    num_logprobs: int = 0,
) -> Choice:
    """The next token of every row, from logits float32 [B, V].

    positions int32 [B] are those of the tokens to be chosen and vary the noise along a text. history is
    needed where a row has penalties. allowed uint32 [B, ceil(V / 32)] are the bits of the tokens that
    may come, as in `token_mask`; a row must have at least one. num_logprobs is static.
    """
    processed = process(logits, settings, positions, history=history, allowed=allowed)
    greedy = _argmax(processed)

    def draw() -> Array:
        scaled = processed / jnp.maximum(settings.temperature, 1e-6)[:, None]
        unfiltered = (settings.top_k == 0) & (settings.top_p >= 1) & (settings.min_p <= 0)
        kept = jax.lax.cond(jnp.all(unfiltered), lambda: scaled, lambda: filter_logits(scaled, settings))
        return jnp.where(settings.temperature > 0, _draw(jax.nn.softmax(kept), settings.seed, positions), greedy)

    tokens = jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda: greedy)
    return Choice(tokens, *token_logprobs(logits, tokens, num_logprobs))


def token_logprobs(logits: Array, tokens: Array, num_top: int = 0) -> tuple[Array, Array, Array]:
    """Log-probabilities float32 [...] of tokens int32 [...] under logits float32 [..., V], and the likeliest.

    Those are tokens int32 and log-probabilities float32 [..., num_top], likeliest first.
    """
    total = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum and not a look-up, which would gather a vocabulary that is split over devices.
    chosen = jnp.sum(jnp.where(jnp.arange(logits.shape[-1]) == tokens[..., None], logits, 0.0), axis=-1)
    top, top_tokens = jax.lax.top_k(logits, num_top)
    return chosen - total, top_tokens, top - total[..., None]


def process(
    logits: Array,
    settings: RowSettings,
    positions: Array | np.ndarray,
    *,
    history: History | None = None,
    allowed: Array | np.ndarray | None = None,
) -> Array:
    """Logits float32 [B, V] with bias, penalties and bans, as `sample` applies them before the temperature."""
    held = (positions < settings.stops_from)[:, None]

    def add_bias() -> Array:
        tokens = jnp.concatenate([settings.bias_tokens, settings.stops], axis=1)
        values = jnp.concatenate([settings.bias_values, jnp.where(held & (settings.stops >= 0), -jnp.inf, 0.0)], axis=1)
        return jax.vmap(lambda row, at, by: row.at[_or_outside(at, row)].add(by, mode="drop"))(logits, tokens, values)

    biased = jnp.any(held) | jnp.any(settings.bias_tokens >= 0)
    logits = jax.lax.cond(biased, add_bias, lambda: logits)
    if history is not None:
        seen = history.in_prompt | (history.counts > 0)
        repetition = settings.repetition_penalty[:, None]
        logits = jnp.where(seen, jnp.where(logits < 0, logits * repetition, logits / repetition), logits)
        logits -= settings.frequency_penalty[:, None] * history.counts
        logits -= settings.presence_penalty[:, None] * (history.counts > 0)
    if allowed is not None:
        bits = (allowed[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
        logits = jnp.where(bits.reshape(len(bits), -1)[:, : logits.shape[-1]] > 0, logits, -jnp.inf)
    return logits


def _argmax(logits: Array) -> Array:
    """The first of the largest int32 [B]. XLA's own is four times slower on CPUs, where it does not vectorize."""
    largest = logits == logits.max(axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape[-1] - 1), axis=-1)


def _draw(probs: Array, seed: Array | np.ndarray, positions: Array | np.ndarray) -> Array:
    """A token int32 [B] of each row of probs float32 [B, V], by the noise of its seed and position.

    Two races choose a block of tokens and one of them: noise for each token of a large vocabulary costs 80 times as
    much on CPUs as two random numbers. In a race (Gumbel's trick) two distributions that are close choose the same
    most often, as speculation wants it (arXiv 2408.07978), where one random number on their sums would not.
    """
    size = 1 << (max(1, probs.shape[-1] - 1).bit_length() + 1) // 2
    blocks = jnp.pad(probs, ((0, 0), (0, -probs.shape[-1] % size))).reshape(len(probs), -1, size)
    num_blocks = blocks.shape[1]
    keys = jax.vmap(lambda seed, position: jax.random.fold_in(jax.random.key(seed), position))(seed, positions)
    times = jax.vmap(lambda key: jax.random.exponential(key, (num_blocks + size,)))(keys)
    block = _first(blocks.sum(axis=-1), times[:, :num_blocks])
    chosen = jnp.sum(jnp.where((jnp.arange(num_blocks) == block[:, None])[..., None], blocks, 0.0), axis=1)
    return block * size + _first(chosen, times[:, num_blocks:])


def _first(weights: Array, times: Array) -> Array:
    """The index int32 [B] whose time [B, N], divided by its weight, is the least; none without a weight."""
    return _argmax(weights / jnp.maximum(times, 1e-30))


def filter_logits(logits: Array, settings: RowSettings) -> Array:
    """Logits float32 [B, V] with what top-k, top-p and min-p drop set to -inf; ties are kept together."""
    top_k, top_p, min_p = (x[:, None] for x in (settings.top_k, settings.top_p, settings.min_p))

    def likeliest() -> Array:
        most = jnp.where(top_k == 0, logits.shape[-1], top_k)
        return probs >= _threshold(probs, lambda above: jnp.sum(above, -1, keepdims=True) >= most)

    def nucleus() -> Array:
        least = _threshold(probs, lambda above: jnp.sum(jnp.where(above, probs, 0.0), -1, keepdims=True) >= top_p)
        # Rounding can leave the sum of all just under 1, so top_p = 1 is said to keep everything.
        return (probs >= least) | (top_p >= 1)

    probs = jax.nn.softmax(logits, axis=-1)
    everything = jnp.ones_like(probs, dtype=bool)
    kept = jax.lax.cond(jnp.any(top_k > 0), likeliest, lambda: everything)
    probs = _renormalized(probs, kept)
    kept &= jax.lax.cond(jnp.any(top_p < 1), nucleus, lambda: everything)
    probs = _renormalized(probs, kept)
    kept &= probs >= min_p * probs.max(axis=-1, keepdims=True)
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
