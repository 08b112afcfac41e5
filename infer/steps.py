"""What a dispatch computes: chunks of prompts or steps of decoding, on pages and rows that stay on the devices.

A dispatch names the rows that take part and the pages of each; weights come as a flat tuple and are rebuilt into the
model inside. The invariant: a row depends on its own tokens, pages and settings alone; what pads a batch is
off, writes nowhere and yields -1. Rows and pages are numbered within their shard of the batch axes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec, reshard

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
from llama_jax.cache import ContiguousCache, PagedCache
from llama_jax.kernels.paged import Pages, gather_pages
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
    it has ended).
    """

    tokens: Values
    positions: Values
    left: Values
    settings: RowSettings


class Batch(NamedTuple):
    """Rows of one dispatch: table int32 [B, N], their pages in order (-1: none); rows int32 [B], beyond all: off.

    allowed: the bits uint32 [B, ceil(V / 32)] of the tokens that may come, None where all rows may have all.
    """

    table: Values
    rows: Values
    allowed: Values | None = None


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
    """What stays on the devices: the pools of every layer, the rows, and their history where one needs it."""

    pages: tuple[Pages, ...]
    state: RowState
    history: History | None


def prefill(tree, weights, held: Held, prompts: Prompts, batch: Batch, *, fresh: bool):
    """Run chunks [B, T] on top of the pages of their rows and choose first tokens.

    Returns what is held, Choice [B, 1] (-1 in rows whose chunk is not the last) and the targets' log-probabilities.
    """
    model: Llama = jax.tree.unflatten(tree, weights)
    rules = model.rules
    prompts, batch = split_rows(rules, (prompts, batch))
    caches = tuple(PagedCache(pages, batch.table, empty=fresh) for pages in held.pages)
    hidden, caches = _extend(model, prompts.tokens, prompts.positions, caches)
    # A masked sum and not a look-up: it leaves a sequence split over `context` where it is.
    is_last = (prompts.positions == prompts.start.positions[:, None])[..., None]
    last = jnp.sum(jnp.where(is_last, hidden, 0), axis=1, keepdims=True)
    state, history, choice = _choose(model, last, prompts.start, _take(rules, held.history, batch.rows), batch.allowed)
    after = _put(rules, (held.state, held.history), batch.rows, (state, history))
    told = None if prompts.targets is None else _readable(_tell(model, hidden, prompts.targets))
    choice = jax.tree.map(lambda x: x[:, None], choice)
    return Held(tuple(cache.pages for cache in caches), *after), _readable(choice), told


def decode(tree, num_steps: int, weights, held: Held, batch: Batch, steps: Array):
    """Decode up to steps, at most num_steps, tokens of rows that have not ended; returns what is held and Choice."""
    model: Llama = jax.tree.unflatten(tree, weights)
    rules = model.rules
    batch = split_rows(rules, batch)
    state, history = _take(rules, (held.state, held.history), batch.rows)
    paged = tuple(PagedCache(pages, batch.table) for pages in held.pages)
    once = num_steps > 1 and _gathers_once(model, held.pages[0])
    caches: Any = tuple(_gathered(cache) for cache in paged) if once else paged
    first = _choices(rules, len(batch.rows), num_steps, MAX_LOGPROBS if history is not None else 0)

    def step(carry):
        i, state, history, caches, choices = carry
        positions = jnp.where(state.left > 0, state.positions, -1)
        hidden, caches = _extend(model, state.tokens[:, None], positions[:, None], caches)
        state, history, choice = _choose(model, hidden, state, history, batch.allowed)
        here = jnp.arange(num_steps) == i
        choices = jax.tree.map(
            lambda old, new: jnp.where(here.reshape(-1, *(1,) * (new.ndim - 1)), new[:, None], old), choices, choice
        )
        return i + 1, state, history, caches, choices

    def unfinished(carry):
        i, state, *_ = carry
        return (i < steps) & jnp.any(state.left > 0)

    carry = (jnp.int32(0), state, history, caches, first)
    _, after, history, caches, choices = jax.lax.while_loop(unfinished, step, carry)
    if once:
        stored = partial(_stored, began=state.positions, ended=after.positions, num_steps=num_steps)
        caches = tuple(stored(pages, cache) for pages, cache in zip(paged, caches, strict=True))
    # The settings of a row stay as they are.
    before, now = ((*row[:3], history) for row, history in ((held.state, held.history), (after, history)))
    tokens, positions, left, history = _put(rules, before, batch.rows, now)
    state = RowState(tokens, positions, left, held.state.settings)
    return Held(tuple(cache.pages for cache in caches), state, history), _readable(choices)


def _extend(model: Llama, tokens: Array, positions: Array, caches: Any) -> tuple[Array, Any]:
    """`model.extend`, which gives caches of the kind that it is given."""
    return model.extend(tokens, positions, caches)


def _choose(model: Llama, hidden: Array, state: RowState, history: History | None, allowed: Array | None):
    """Sample from hidden [B, 1, D]; rows that had ended give -1 and stay where they are. Every shard for itself."""
    logits = reshard(model.unembed(hidden), model.rules("batch", None, None))[:, 0, : model.cfg.vocab_size]

    def choose(logits, state: RowState, history: History | None, allowed: Array | None):
        positions, going = state.positions + 1, state.left > 0
        num_logprobs = 0 if history is None else MAX_LOGPROBS
        choice = sample(logits, state.settings, positions, history=history, allowed=allowed, num_logprobs=num_logprobs)
        stopped = jnp.any(choice.tokens[:, None] == state.settings.stops, axis=-1)
        after = state._replace(
            tokens=jnp.where(going, choice.tokens, state.tokens),
            positions=jnp.where(going, positions, state.positions),
            left=jnp.where(going & ~stopped, state.left - 1, 0),
        )
        tokens = jnp.where(going, choice.tokens, -1)
        history = None if history is None else record(history, tokens)
        return after, history, dataclasses.replace(choice, tokens=tokens)

    return _of_rows(model.rules, choose, logits, state, history, allowed)


def _tell(model: Llama, hidden: Array, targets: Array) -> Told:
    """Log-probabilities of targets [B, T] after hidden [B, T, D], and of the likeliest, some columns at a time."""
    rules, (batch, length) = model.rules, targets.shape
    block = _TOLD_AT_ONCE if length % _TOLD_AT_ONCE == 0 else length

    def columns(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    def tell(part: tuple[Array, Array]) -> Told:
        logits = reshard(model.unembed(part[0]), rules("batch", None, None))[..., : model.cfg.vocab_size]
        return Told(*_of_rows(rules, partial(token_logprobs, num_top=MAX_LOGPROBS), logits, part[1]))

    told = jax.lax.map(tell, (columns(reshard(hidden, rules("batch", None, None))), columns(targets)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, length, *x.shape[3:]), told)


def _gathers_once(model: Llama, pages: Pages) -> bool:
    """Whether a dispatch reads its pages into rows once, and not in every step.

    On CPUs a gather costs as much as the attention itself. Values in a narrow type are read where they are, or
    what a step sees would depend on when its dispatch began.
    """
    on_cpu = jax.sharding.get_abstract_mesh().abstract_device.platform == "cpu"
    return on_cpu and model.rules.cache_multiple == 1 and pages.k_scale is None


def _gathered(cache: PagedCache) -> ContiguousCache:
    """The pages of every row, in order, as a cache of its own."""
    rows, heads, *_ = jax.typeof(cache.pages.k).sharding.spec
    split = PartitionSpec(rows, heads)
    run = jax.shard_map(
        partial(gather_pages, dtype=cache.pages.k.dtype), in_specs=(split, PartitionSpec(rows)), out_specs=split
    )
    return ContiguousCache(*run(cache.pages, cache.table))


def _stored(paged: PagedCache, cache: ContiguousCache, began: Array, ended: Array, *, num_steps: int) -> PagedCache:
    """The pages with what rows hold at positions began to ended int32 [B], at most num_steps each.

    Whole pages are written: one that tokens are added to is its row's alone.
    """
    rows, heads, *_ = jax.typeof(cache.k).sharding.spec

    def store(pages: Pages, table: Array, cache: ContiguousCache, began: Array, ended: Array) -> Pages:
        num_pages, _, size, _ = pages.k.shape
        index = began[:, None] // size + jnp.arange((num_steps + size - 2) // size + 1)
        page = jnp.take_along_axis(table, index, axis=1, mode="fill", fill_value=-1)
        page = jnp.where((index * size < ended[:, None]) & (page >= 0), page, num_pages)  # else dropped

        def put(pool: Array, values: Array) -> Array:
            values = values.reshape(*values.shape[:2], -1, size, values.shape[-1])
            new = jnp.take_along_axis(values, index[:, None, :, None, None], axis=2, mode="clip")
            return pool.at[page].set(new.swapaxes(1, 2), mode="drop")

        return Pages(put(pages.k, cache.k), put(pages.v, cache.v))

    of_heads, of_rows = PartitionSpec(rows, heads), PartitionSpec(rows)
    run = jax.shard_map(store, in_specs=(of_heads, of_rows, of_heads, of_rows, of_rows), out_specs=of_heads)
    return PagedCache(run(paged.pages, paged.table, cache, began, ended), paged.table)


def _choices(rules: ShardingRules, num_rows: int, num_steps: int, num_top: int) -> Choice:
    """No tokens yet, [B, steps]."""
    shape = (num_rows, num_steps)
    none = jnp.full(shape, -1, jnp.int32), jnp.zeros(shape)
    return split_rows(rules, Choice(*none, jnp.zeros((*shape, num_top), jnp.int32), jnp.zeros((*shape, num_top))))


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


def _of_rows(rules: ShardingRules, function: Callable, *trees: Any) -> Any:
    """Function of arrays [B, ...], each shard for itself."""
    return jax.shard_map(function, in_specs=rules("batch"), out_specs=rules("batch"), check_vma=False)(*trees)


def _take(rules: ShardingRules, tree: Any, rows: Array) -> Any:
    """Rows [B, ...] of arrays [R, ...]; zeros for those beyond all."""

    def take(tree: Any, rows: Array) -> Any:
        return jax.tree.map(lambda x: x.at[rows].get(mode="fill", fill_value=0), tree)

    return _of_rows(rules, take, tree, rows)


def _put(rules: ShardingRules, tree: Any, rows: Array, new: Any) -> Any:
    """Arrays [R, ...] with rows [B, ...] replaced; those beyond all are dropped."""

    def put(tree: Any, rows: Array, new: Any) -> Any:
        return jax.tree.map(lambda old, x: old.at[rows].set(x, mode="drop"), tree, new)

    return _of_rows(rules, put, tree, rows, new)


def split_rows(rules: ShardingRules, tree: Any) -> Any:
    """Arrays [B, ...], split over the batch axes."""
    return jax.tree.map(lambda x: reshard(x, PartitionSpec(*rules("batch"), *(None,) * (x.ndim - 1))), tree)


def _readable(tree: Any) -> Any:
    """Whole on every device, so that every process can read them."""
    return jax.tree.map(lambda x: reshard(x, PartitionSpec()), tree)


def embed(tree, weights, tokens: Array, lengths: Array) -> tuple[Array, Array]:
    """Mean and last of the normed outputs [B, D] of texts int32 [B, T] of so many tokens."""
    model: Llama = jax.tree.unflatten(tree, weights)
    tokens, lengths = split_rows(model.rules, (tokens, lengths))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden = reshard(model.hidden(tokens, positions), model.rules("batch", None, None)).astype(jnp.float32)
    place = jnp.arange(tokens.shape[1])[None, :, None]
    lengths = lengths[:, None, None]
    mean = jnp.sum(jnp.where(place < lengths, hidden, 0), axis=1) / lengths[:, 0]
    return _readable((mean, jnp.sum(jnp.where(place == lengths - 1, hidden, 0), axis=1)))
