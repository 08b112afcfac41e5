"""What a dispatch computes: chunks of prompts or steps of decoding, on pages and rows that stay on the devices.

A dispatch names the rows that take part and the pages of each; weights come as a flat tuple and are rebuilt into the
model inside. The invariant: a row depends on its own tokens, pages and settings alone; what pads a batch is
off, writes nowhere and yields -1. Rows and pages are numbered within their shard of the batch axes.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec, reshard

from infer.rows import closed, of_rows, opened, put_rows, readable, row_logits, split_rows, take_rows
from infer.sampling import (
    MAX_LOGPROBS,
    Choice,
    History,
    RowSettings,
    forget,
    record,
    sample,
    token_logprobs,
)
from llama_jax.cache import PagedCache
from llama_jax.kernels.paged import Pages
from llama_jax.lora import for_rows
from llama_jax.mesh import ShardingRules
from llama_jax.model import Llama

# An array on the devices, and before on the host.
Values = Any

# Stop tokens of a row that the device knows; the host stops a row at any others, up to a dispatch later.
NUM_STOPS = 8

# Where the padding of a chunk stands: beyond every table and after every query.
AFTER_ALL = 2**30

# Columns of a chunk whose logits are there at once where the log-probabilities of a prompt are asked for.
_TOLD_AT_ONCE = 64


class RowState(NamedTuple):
    """Where each row stands and how it goes on.

    tokens and positions int32 [R] are those of its last token, left int32 [R] is how many may still come (0:
    it has ended), adapters int32 [R] the number of its LoRA adapter (-1: none).
    """

    tokens: Values
    positions: Values
    left: Values
    settings: RowSettings
    adapters: Values


class Batch(NamedTuple):
    """Rows of one dispatch: table int32 [B, N], their pages in order (-1: none); rows int32 [B], beyond all: off.

    allowed: the bits uint32 [B, ceil(V / 32)] of the tokens that may come, None where all rows may have all.
    most_guesses: how many tokens of a row may be guessed in a step int32 [B], None where none ever are.
    """

    table: Values
    rows: Values
    allowed: Values | None = None
    most_guesses: Values | None = None


class Prompts(NamedTuple):
    """Chunks of prompts: tokens and positions int32 [B, T], and the state that rows start from when theirs is the last.

    start.positions is -1 where it is not. targets int32 [B, T] are the tokens that follow, where their
    log-probabilities are asked for; else None.
    """

    tokens: Values
    positions: Values
    start: RowState
    targets: Values | None = None


class Told(NamedTuple):
    """Log-probabilities float32 [B, T] of tokens of prompts, and the likeliest in their places [B, T, N]."""

    logprobs: Values
    top_tokens: Values
    top_logprobs: Values


class Held(NamedTuple):
    """What stays on the devices: the pools of every layer, the rows, and their history where one needs it.

    ahead: what the tokens ahead are guessed from, in pages too, if they are (infer/speculation.py).
    """

    pages: tuple[Pages, ...]
    state: RowState
    history: History | None
    ahead: Any = None


def tokens_a_step(guesser: Any) -> int:
    """How many tokens a step of decoding may bring: one, and all that are guessed."""
    return 1 if guesser is None else 1 + guesser.num_tokens


def prefill(tree, weights, held: Held, prompts: Prompts, batch: Batch, *, fresh: bool):
    """Run chunks [B, T] on top of the pages of their rows and choose first tokens.

    Returns what is held, Choice [B, 1] (-1 in rows whose chunk is not the last) and the targets' log-probabilities.
    """
    model, guesser = jax.tree.unflatten(tree, weights)
    rules = model.rules
    prompts, batch = split_rows(rules, (prompts, batch))
    model = for_rows(model, prompts.start.adapters)
    caches = tuple(PagedCache(pages, batch.table, empty=fresh) for pages in held.pages)
    hidden, caches = _extend(model, prompts.tokens, prompts.positions, caches)
    # A masked sum and not a look-up: it leaves a sequence split over `context` where it is.
    is_last = (prompts.positions == prompts.start.positions[:, None])[..., None]
    last = jnp.sum(jnp.where(is_last, hidden, 0), axis=1, keepdims=True)
    history = take_rows(rules, held.history, batch.rows)
    state, history, choice = _choose_all(
        model, last, prompts.start.tokens[:, None], prompts.start, history, batch.allowed
    )
    state, history = put_rows(rules, (held.state, held.history), batch.rows, (state, history))
    told = None if prompts.targets is None else readable(_tell(model, hidden, prompts.targets))
    ahead = guesser and guesser.store(held.ahead, prompts, batch, fresh=fresh)
    return Held(tuple(cache.pages for cache in caches), state, history, ahead), readable(choice), told


def decode(tree, num_steps: int, weights, held: Held, batch: Batch, steps: Array):
    """Decode up to steps, at most num_steps, steps of rows that have not ended.

    A step brings a token, and as many more as are guessed rightly. Returns what is held, Choice [B, num_steps times
    the tokens that a step may bring], -1 where there is none, and how many guesses were made int32 [B], None without.
    """
    model, guesser = jax.tree.unflatten(tree, weights)
    rules, width = model.rules, tokens_a_step(guesser)
    batch = split_rows(rules, batch)
    state, history = take_rows(rules, (held.state, held.history), batch.rows)
    model = for_rows(model, state.adapters)
    caches = opened(model, held.pages, batch.table, often=num_steps * width > 1)
    ahead = guesser and guesser.opened(held.ahead, batch.table)
    choices = _no_choices(rules, len(batch.rows), num_steps * width, history)
    guessed: Any = guesser and jnp.zeros_like(state.left)

    def step(carry):
        i, state, history, caches, ahead, guessed, choices = carry
        tokens = state.tokens[:, None]
        if guesser:
            assert batch.most_guesses is not None
            ahead, guesses, counts = guesser.guess(ahead, state, batch, history)
            counts = jnp.minimum(counts, jnp.minimum(batch.most_guesses, state.left - 1))
            guessed = guessed + jnp.maximum(counts, 0)
            # Those that do not count are no token.
            guesses = jnp.where(jnp.arange(width - 1) < counts[:, None], guesses, -1)
            tokens = jnp.concatenate([tokens, guesses], axis=1)
        positions = jnp.where(state.left[:, None] > 0, state.positions[:, None] + jnp.arange(width), -1)
        hidden, caches = _extend(model, jnp.maximum(tokens, 0), positions, caches)
        state, history, choice = _choose_all(model, hidden, tokens, state, history, batch.allowed)
        return i + 1, state, history, caches, ahead, guessed, _entered(choices, choice, i * width)

    def unfinished(carry):
        i, state, *_ = carry
        return (i < steps) & jnp.any(state.left > 0)

    carry = (jnp.int32(0), state, history, caches, ahead, guessed, choices)
    _, after, history, caches, ahead, guessed, choices = jax.lax.while_loop(unfinished, step, carry)
    written = {"began": state.positions, "ended": after.positions, "most": num_steps * width}
    pages = closed(held.pages, batch.table, caches, **written)
    ahead = guesser and guesser.closed(held.ahead, batch.table, ahead, **written)
    # The settings of a row and its adapter stay as they are.
    before, now = ((*row[:3], history) for row, history in ((held.state, held.history), (after, history)))
    tokens, positions, left, history = put_rows(rules, before, batch.rows, now)
    state = held.state._replace(tokens=tokens, positions=positions, left=left)
    return Held(pages, state, history, ahead), *readable((choices, guessed))


def _extend(model: Llama, tokens: Array, positions: Array, caches: Any) -> tuple[Array, Any]:
    """`model.extend`, which gives caches of the kind that it is given."""
    return model.extend(tokens, positions, caches)


def _choose_all(model: Llama, hidden: Array, tokens: Array, state: RowState, history: History | None, allowed: Any):
    """Choose what follows each of tokens int32 [B, T], from hidden [B, T, D], as long as it is the next of them."""
    logits, width = row_logits(model, hidden), tokens.shape[1]
    choose = partial(_choose, model.rules, allowed=allowed)
    if width == 1:
        state, history, choice = choose(logits[:, 0], state, history, state.left > 0)
        return state, history, jax.tree.map(lambda x: x[:, None], choice)

    def column(carry):
        i, going, state, history, choices = carry
        here = jax.lax.dynamic_index_in_dim(logits, i, axis=1, keepdims=False)
        state, history, choice = choose(here, state, history, going)
        after = jax.lax.dynamic_index_in_dim(tokens, jnp.minimum(i + 1, width - 1), axis=1, keepdims=False)
        going &= (state.left > 0) & (choice.tokens == after)
        return i + 1, going, state, history, _entered(choices, jax.tree.map(lambda x: x[:, None], choice), i)

    def wanted(carry):
        i, going, *_ = carry
        return (i < width) & jnp.any(going)

    choices = _no_choices(model.rules, len(tokens), width, history)
    carry = (jnp.int32(0), state.left > 0, state, history, choices)
    return jax.lax.while_loop(wanted, column, carry)[2:]


def _choose(
    rules: ShardingRules,
    logits: Array,
    state: RowState,
    history: History | None,
    going: Array,
    *,
    allowed: Array | None,
):
    """Sample from logits [B, V] of rows that are going; others give -1 and stay. Every shard for itself."""

    def choose(logits, state: RowState, history: History | None, going: Array, allowed: Array | None):
        positions = state.positions + 1
        num_logprobs = 0 if history is None else MAX_LOGPROBS
        choice = sample(logits, state.settings, positions, history=history, allowed=allowed, num_logprobs=num_logprobs)
        stopped = jnp.any(choice.tokens[:, None] == state.settings.stops, axis=-1)
        after = state._replace(
            tokens=jnp.where(going, choice.tokens, state.tokens),
            positions=jnp.where(going, positions, state.positions),
            left=jnp.where(going, jnp.where(stopped, 0, state.left - 1), state.left),
        )
        tokens = jnp.where(going, choice.tokens, -1)
        history = None if history is None else record(history, tokens)
        return after, history, dataclasses.replace(choice, tokens=tokens)

    return of_rows(rules, choose, logits, state, history, going, allowed)


def _tell(model: Llama, hidden: Array, targets: Array) -> Told:
    """Log-probabilities of targets [B, T] after hidden [B, T, D], and of the likeliest, some columns at a time."""
    rules, (batch, length) = model.rules, targets.shape
    block = _TOLD_AT_ONCE if length % _TOLD_AT_ONCE == 0 else length

    def columns(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    def tell(part: tuple[Array, Array]) -> Told:
        logits = row_logits(model, part[0])
        return Told(*of_rows(rules, partial(token_logprobs, num_top=MAX_LOGPROBS), logits, part[1]))

    told = jax.lax.map(tell, (columns(reshard(hidden, rules("batch", None, None))), columns(targets)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length, *x.shape[3:]), told)


def _no_choices(rules: ShardingRules, num_rows: int, num_tokens: int, history: History | None) -> Choice:
    """No tokens yet, [B, T]; with history room for the likeliest, too."""
    shape, num_top = (num_rows, num_tokens), 0 if history is None else MAX_LOGPROBS
    none = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape)
    return split_rows(rules, Choice(*none, jnp.zeros((*shape, num_top), jnp.int32), jnp.zeros((*shape, num_top))))


def _entered(choices: Choice, new: Choice, start: Array) -> Choice:
    """Choices [B, ...] with the new ones [B, T] in their columns from start on."""
    return jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, start, axis=1), choices, new)


def remember(rules: ShardingRules, history: History, row: Array, prompt: Array, generated: Array) -> History:
    """The history with the row of one shard set anew."""
    split, whole = rules("batch"), PartitionSpec()
    run = jax.shard_map(
        lambda history, row, *tokens: forget(history, row[0], *tokens),
        in_specs=(split, split, whole, whole),
        out_specs=split,
        check_vma=False,
    )
    return run(history, reshard(row, split), prompt, generated)


def embed(tree, weights, tokens: Array, lengths: Array, adapters: Array) -> tuple[Array, Array]:
    """Mean and last of the normed outputs [B, D] of texts int32 [B, T] of so many tokens, with their adapters."""
    model, _ = jax.tree.unflatten(tree, weights)
    tokens, lengths, adapters = split_rows(model.rules, (tokens, lengths, adapters))
    model = for_rows(model, adapters)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = reshard(model.hidden(tokens, positions), model.rules("batch", None, None)).astype(jnp.float32)
    place = jnp.arange(tokens.shape[1])[None, :, None]
    lengths = lengths[:, None, None]
    mean = jnp.sum(jnp.where(place < lengths, hidden, 0), axis=1) / lengths[:, 0]
    return readable((mean, jnp.sum(jnp.where(place == lengths - 1, hidden, 0), axis=1)))
