"""Speculative decoding: tokens are guessed, and the model checks all guesses of a row in one forward pass.

Source: arXiv 2211.17192. Guesses come from a smaller model (`DraftModel`) or from the row's own text (`Ngrams`, arXiv
2304.04487). The invariant: at each place the model's own token is chosen as without guesses, by the noise of its seed
and position, and a guess is accepted if it is that token; so a row's text, sampled or not, is that of no speculation.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from infer.rows import closed, of_rows, opened, row_logits
from infer.sampling import History, sample
from infer.steps import Batch, Prompts, RowState
from llama_jax.cache import PagedCache, init_pages
from llama_jax.config import LlamaConfig
from llama_jax.kernels.paged import Pages
from llama_jax.mesh import ShardingRules
from llama_jax.model import Llama

NUM_DRAFT_TOKENS = 4  # by default
MAX_DRAFT_TOKENS = 32

# So many of a text's last tokens are looked for in it, and at least one.
MAX_NGRAM = 4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ngrams:
    """Guesses what followed where a row's text had the tokens before that it ends in now.

    It holds the tokens int32 [P, S] of every page.
    """

    num_tokens: int = field(default=NUM_DRAFT_TOKENS, metadata={"static": True})

    def __post_init__(self):
        """Raises ValueError for a number of tokens out of range."""
        check_num_tokens(self.num_tokens)

    def allocate(self, rules: ShardingRules, num_pages: int, page_size: int, dtype: Any) -> Array:
        """Room for the tokens of pages, whatever the dtype of their keys."""
        return jnp.zeros((num_pages, page_size), jnp.int32, out_sharding=rules("batch", None))

    def store(self, held: Array, prompts: Prompts, batch: Batch, *, fresh: bool) -> Array:
        """Chunks of prompts."""
        return _each_shard(held, _write_tokens)(held, prompts.tokens, prompts.positions, batch.table)

    def opened(self, held: Array, table: Array) -> Array:
        """What `guess` reads: the pages, where they are."""
        return held

    def guess(self, held: Array, state: RowState, batch: Batch, history: History | None) -> tuple[Array, Array, Array]:
        """What is held with the tokens that are guessed, these int32 [B, N], and how many they are int32 [B]."""
        run = _each_shard(held, partial(_follow, num=self.num_tokens))
        return run(held, state.tokens, _places(state), batch.table)

    def closed(self, held: Array, table: Array, opened: Array, **written: Any) -> Array:
        """What is held of what `guess` has left."""
        return opened


def _each_shard(held: Array, function: Any) -> Any:
    """Function of arrays [P, ...] or [B, ...], each shard of the batch axes for itself."""
    rows = PartitionSpec(jax.typeof(held).sharding.spec[0])
    return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)


def _places(state: RowState) -> Array:
    """Positions int32 [B] of the rows that go on, -1 of those that have ended."""
    return jnp.where(state.left > 0, state.positions, -1)


def _write_tokens(pool: Array, tokens: Array, positions: Array, table: Array) -> Array:
    """A pool [P, S] with tokens [B, T] at their positions; dropped are those without a page."""
    num_pages, size = pool.shape
    page = jnp.take_along_axis(table, positions // size, axis=1, mode="fill", fill_value=-1)
    page = jnp.where((positions >= 0) & (page >= 0), page, num_pages)
    return pool.at[page, positions % size].set(tokens, mode="drop")


def _follow(pool: Array, tokens: Array, positions: Array, table: Array, *, num: int) -> tuple[Array, Array, Array]:
    """Enter the last tokens [B] of rows, at positions [B], then guess; the guesses are entered after them."""
    pool = _write_tokens(pool, tokens[:, None], positions[:, None], table)
    guesses, counts = continuations(pool[jnp.maximum(table, 0)].reshape(len(table), -1), positions, num)
    ahead = positions[:, None] + 1 + jnp.arange(num)
    return _write_tokens(pool, guesses, jnp.where(positions[:, None] >= 0, ahead, -1), table), guesses, counts


def continuations(texts: Array, last: Array, num: int) -> tuple[Array, Array]:
    """Guesses int32 [B, num] of what follows texts int32 [B, W] that end at last int32 [B], and how many they are.

    They are what followed the place where the same tokens end for longest, of several such places the latest, or none.
    What goes beyond the end repeats: a text of period two is guessed to go on so.
    """
    width, last = texts.shape[1], last[:, None]
    index = jnp.arange(width)
    alike, length = index < last, jnp.zeros_like(texts)
    for back in range(MAX_NGRAM):
        ending = jnp.take_along_axis(texts, last - back, axis=1, mode="clip")
        alike &= (jnp.roll(texts, back, axis=1) == ending) & (index >= back)
        length += alike
    found = jnp.argmax(length * width + index, axis=1, keepdims=True)
    found_length = jnp.take_along_axis(length, found, axis=1)
    source = found + 1 + jnp.arange(num) % jnp.maximum(last - found, 1)
    return jnp.take_along_axis(texts, source, axis=1, mode="clip"), jnp.where(found_length[:, 0] > 0, num, 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DraftModel:
    """Guesses what a smaller model of the same vocabulary chooses by the same settings and noise.

    It holds pages of its own under the numbers of the model's, so that a prompt that is found is found for both.
    """

    model: Llama
    num_tokens: int = field(default=NUM_DRAFT_TOKENS, metadata={"static": True})

    def __post_init__(self):
        """Raises ValueError for a number of tokens out of range."""
        check_num_tokens(self.num_tokens)

    def allocate(self, rules: ShardingRules, num_pages: int, page_size: int, dtype: Any) -> tuple[Pages, ...]:
        """Empty pages, split as this model wants them."""
        return init_pages(self.model.cfg, self.model.rules, num_pages, page_size, dtype=dtype)

    def store(self, held: tuple[Pages, ...], prompts: Prompts, batch: Batch, *, fresh: bool) -> tuple[Pages, ...]:
        """Chunks of prompts."""
        caches = tuple(PagedCache(pages, batch.table, empty=fresh) for pages in held)
        _, caches = self.model.extend(prompts.tokens, prompts.positions, caches)
        return tuple(cache.pages for cache in caches)  # type: ignore[attr-defined]

    def opened(self, held: tuple[Pages, ...], table: Array) -> Any:
        """What `guess` reads: caches of the rows."""
        return opened(self.model, held, table, often=True)

    def guess(self, caches: Any, state: RowState, batch: Batch, history: History | None) -> tuple[Any, Array, Array]:
        """The caches with the tokens that are guessed, these int32 [B, N], and how many they are int32 [B]."""
        rules = self.model.rules

        def choose(logits: Array, positions: Array, state: RowState, history: History | None, allowed: Array | None):
            return sample(logits, state.settings, positions + 1, history=history, allowed=allowed).tokens

        def step(carry: tuple[Array, Any], i: Array) -> tuple[tuple[Array, Any], Array]:
            tokens, caches = carry
            positions = jnp.where(state.left > 0, state.positions + i, -1)
            hidden, caches = self.model.extend(tokens[:, None], positions[:, None], caches)
            logits = row_logits(self.model, hidden)[:, 0]
            tokens = of_rows(rules, choose, logits, positions, state, history, batch.allowed)
            return (tokens, caches), tokens

        # One step more than there are guesses: if all are accepted, the keys of the last one are needed, too.
        (_, caches), guesses = jax.lax.scan(step, (state.tokens, caches), jnp.arange(self.num_tokens + 1))
        return caches, jnp.moveaxis(guesses[:-1], 0, 1), jnp.full_like(state.left, self.num_tokens)

    def closed(self, held: tuple[Pages, ...], table: Array, caches: Any, **written: Any) -> tuple[Pages, ...]:
        """What is held of what `guess` has left."""
        return closed(held, table, caches, **written)


def cache_multiple(rules: ShardingRules, guesser: DraftModel | Ngrams | None) -> int:
    """Of how many tokens a page is a multiple, so that the mesh divides those of a draft, too."""
    return math.lcm(rules.cache_multiple, guesser.model.rules.cache_multiple if isinstance(guesser, DraftModel) else 1)


def check_draft(draft: LlamaConfig, cfg: LlamaConfig, max_seq_len: int) -> None:
    """Raise ValueError if a model cannot guess for another one in a context of max_seq_len tokens."""
    if draft.vocab_size != cfg.vocab_size:
        raise ValueError(
            f"the draft has a vocabulary of {draft.vocab_size} tokens and the model of {cfg.vocab_size}; "
            "use a draft with the model's tokenizer"
        )
    if draft.max_seq_len < max_seq_len:
        raise ValueError(
            f"the draft has a context of {draft.max_seq_len} tokens and {max_seq_len} are served; "
            f"use max_seq_len={draft.max_seq_len} or another draft"
        )


def check_num_tokens(num_tokens: int) -> None:
    """Raise ValueError for a number of guesses that is out of range."""
    if not 1 <= num_tokens <= MAX_DRAFT_TOKENS:
        raise ValueError(f"num_draft_tokens={num_tokens}: expected 1 to {MAX_DRAFT_TOKENS}")
