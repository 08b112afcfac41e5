"""Prompts in, text out: jitted prefill and decode over plain arrays, sampling on the device.

Weights enter jit as a flat tuple and are rebuilt into the model inside, because flattening a
module costs milliseconds a call; caches are donated; several tokens are decoded in one dispatch,
and the next dispatch is on its way before the last one's tokens are read. Lengths are rounded up
to buckets, so that after one run of a bucket nothing compiles again.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import reshard

from infer.request import Request, Result
from infer.sampling import RowSettings, SamplingParams, row_settings, sample
from llama_jax.cache import init_cache
from llama_jax.chat import encode_chat
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict]

_MIN_BUCKET = 16


@dataclass
class Throughput:
    """What a run measured: tokens and seconds of prefill and of decode, and seconds of compiling before them."""

    compile_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens a second, padding not counted."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first a second, all rows together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class DecodeState(NamedTuple):
    """Where each row of a batch stands: the last token and its position int32 [B], tokens left int32 [B]."""

    tokens: Array
    positions: Array
    left: Array


class Engine:
    """Continues prompts with a model, on the ambient mesh."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        max_seq_len: int | None = None,
        max_batch_size: int = 64,
        steps_per_dispatch: int = 8,
    ):
        """Serve a model; layout "layers" decodes fastest.

        max_seq_len bounds prompt plus new tokens, by default and at most the model's. Raises
        ValueError if the tokenizer has more tokens than the model.
        """
        limit = model.cfg.max_seq_len
        if max_seq_len is not None and not 1 <= max_seq_len <= limit:
            raise ValueError(f"max_seq_len={max_seq_len} must be between 1 and the model's {limit}")
        if tokenizer is not None and tokenizer.vocab_size > model.cfg.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model {model.cfg.vocab_size}; "
                "they do not belong together"
            )
        self.cfg, self.rules, self.tokenizer = model.cfg, model.rules, tokenizer
        self.max_seq_len = max_seq_len or limit
        self.max_batch_size = max_batch_size
        self.throughput = Throughput()
        leaves, tree = jax.tree.flatten(model)
        self._weights = tuple(leaves)
        dtype = model.embedding[...].dtype
        self._prefill = jax.jit(partial(_prefill, tree, dtype), static_argnames="num_slots")
        self._decode = jax.jit(partial(_decode, tree, steps_per_dispatch), donate_argnames=("state", "caches"))
        self._compiled: dict = {}

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Result]:
        """Continue each prompt: text, token ids or a list of chat messages. Order is kept.

        Raises ValueError for an empty prompt and for one that leaves no room in the context.
        """
        requests = self.requests(prompts, params)
        for _ in self.run(requests):
            pass
        return [request.result for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The continuation of one prompt, piece by piece, never half a character."""
        for _, text in self.run(self.requests(prompt, params)):
            if text:
                yield text

    def requests(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Request]:
        """Checked and tokenized prompts for `run`; their results fill as it runs."""
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, dict, np.integer)))
        batch: Sequence[Prompt] = [prompts] if single else prompts  # type: ignore[assignment]
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(batch)
        if len(params) != len(batch):
            raise ValueError(f"{len(batch)} prompts but {len(params)} sampling parameters")
        return [self._request(prompt, p) for prompt, p in zip(batch, params, strict=True)]

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        text, tokens = self._tokenize(prompt)
        if not tokens:
            raise ValueError("the prompt is empty; give at least one character or token")
        if len(tokens) >= self.max_seq_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, which leaves no room in a context of {self.max_seq_len}"
            )
        outside = [token for token in tokens if not 0 <= token < self.cfg.vocab_size]
        if outside:
            raise ValueError(f"prompt token {outside[0]} is outside the vocabulary of {self.cfg.vocab_size}")
        room = min(params.max_new_tokens, self.max_seq_len - len(tokens))
        return Request(Result(text, tokens), params, self.tokenizer, room)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if not isinstance(prompt, str) and (len(prompt) == 0 or not isinstance(prompt[0], dict)):
            return None, [int(token) for token in prompt]  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise ValueError("a prompt of text needs a tokenizer; give token ids or a checkpoint with a tokenizer")
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None) if prompt else []
        return None, encode_chat(self.tokenizer, list(prompt))  # type: ignore[arg-type]

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        """Continue requests, yielding (index of the request, new text) as it comes."""
        self.throughput = Throughput()
        for start in range(0, len(requests), self.max_batch_size):
            for index, text in self._run_batch(requests[start : start + self.max_batch_size]):
                yield start + index, text

    def _run_batch(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        measured = self.throughput
        began, compiled_before = time.perf_counter(), measured.compile_seconds
        batch = self._padded(requests)
        num_slots = self._num_slots(requests)
        state, caches, *first = self._call(self._prefill, self._weights, *batch, num_slots=num_slots)
        pending = self._dispatch(requests, state, caches, *batch[3:])
        yield from _take(requests, *(np.asarray(x)[:, None] for x in first))
        measured.prefill_tokens += sum(len(request.result.prompt_tokens) for request in requests)
        measured.prefill_seconds += time.perf_counter() - began - (measured.compile_seconds - compiled_before)

        began, before = time.perf_counter(), sum(len(request.result.tokens) for request in requests)
        while any(request.unfinished for request in requests):
            state, caches, *tokens = pending
            pending = self._dispatch(requests, state, caches, *batch[3:])
            yield from _take(requests, *(np.asarray(x) for x in tokens))
        measured.decode_tokens += sum(len(request.result.tokens) for request in requests) - before
        measured.decode_seconds += time.perf_counter() - began

    def _dispatch(self, requests: Sequence[Request], state, caches, settings, stops):
        """Start decoding the next tokens; rows that the host has ended stay where they are."""
        alive = np.zeros(len(stops), bool)
        alive[: len(requests)] = [request.unfinished for request in requests]
        return self._call(self._decode, self._weights, state, caches, settings, stops, alive)

    def _call(self, function, *args, **static):
        """Run a jitted function, compiling it first, with the time taken apart, if its bucket is new."""
        shapes = tuple(x.shape for x in jax.tree.leaves(args[1:]))
        key = (function, shapes, *static.values())
        if key not in self._compiled:
            began = time.perf_counter()
            self._compiled[key] = function.lower(*args, **static).compile()
            self.throughput.compile_seconds += time.perf_counter() - began
        return self._compiled[key](*args)

    @property
    def num_compiled(self) -> int:
        """How many programs have been compiled: two for each new bucket of shapes."""
        return len(self._compiled)

    def _num_slots(self, requests: Sequence[Request]) -> int:
        needed = max(len(request.result.prompt_tokens) + request.room for request in requests)
        return _bucket(needed, self.rules.cache_multiple)

    def _padded(self, requests: Sequence[Request]):
        """Prompts [B, T], lengths [B], tokens wanted [B], settings and stop tokens [B, N], padded to buckets."""
        num_rows = _bucket(len(requests), self.rules.batch_multiple, smallest=1)
        length = _bucket(max(len(r.result.prompt_tokens) for r in requests), self.rules.sequence_multiple)
        width = _bucket(max(len(r.stop_tokens) for r in requests), 1, smallest=4)
        tokens, stops = np.zeros((num_rows, length), np.int32), np.full((num_rows, width), -1, np.int32)
        lengths, wanted = np.ones(num_rows, np.int32), np.zeros(num_rows, np.int32)
        for i, request in enumerate(requests):
            prompt = request.result.prompt_tokens
            tokens[i, : len(prompt)], lengths[i], wanted[i] = prompt, len(prompt), request.room
            stops[i, : len(request.stop_tokens)] = sorted(request.stop_tokens)
        padding = [SamplingParams()] * (num_rows - len(requests))
        settings = row_settings([request.params for request in requests] + padding)
        return tokens, lengths, wanted, settings, stops


def _take(requests: Sequence[Request], tokens: np.ndarray, logprobs: np.ndarray) -> Iterator[tuple[int, str]]:
    """Hand each request its new tokens [B, N] (-1 where its row had ended)."""
    for i, request in enumerate(requests):
        if request.unfinished:
            yield i, request.push(tokens[i], logprobs[i])


def _bucket(number: int, multiple: int, smallest: int = _MIN_BUCKET) -> int:
    """The next power of two, rounded up to what the mesh divides."""
    size = max(smallest, 1 << (number - 1).bit_length())
    return -(-size // multiple) * multiple


def _prefill(tree, dtype, weights, tokens, lengths, wanted, settings, stops, *, num_slots: int):
    """Run prompts int32 [B, T] of lengths [B] into fresh caches; returns state, caches, tokens, log-probabilities."""
    model: Llama = jax.tree.unflatten(tree, weights)
    caches = init_cache(model.cfg, model.rules, tokens.shape[0], num_slots, dtype=dtype)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, caches = model.extend(tokens, positions, caches)
    rows = model.rules("batch")
    hidden = reshard(hidden, model.rules("batch", None, None))
    last = jax.vmap(lambda row, length: jax.lax.dynamic_index_in_dim(row, length - 1, keepdims=True))(
        hidden, reshard(lengths, rows)
    )
    state = DecodeState(*(reshard(x, rows) for x in (jnp.zeros_like(lengths), lengths - 1, wanted)))
    state, token, logprob = _choose(model, last, state, settings, stops)
    return state, caches, token, logprob


def _decode(tree, num_steps, weights, state: DecodeState, caches, settings, stops, alive):
    """Decode up to num_steps tokens of every row that goes on.

    Returns state, caches, tokens int32 [B, num_steps] (-1 where a row had ended) and their
    log-probabilities float32 [B, num_steps].
    """
    model: Llama = jax.tree.unflatten(tree, weights)
    rows = model.rules("batch")
    state = state._replace(left=jnp.where(reshard(alive, rows), state.left, 0))
    batch = state.tokens.shape[0]
    columns = model.rules("batch", None)
    tokens = reshard(jnp.full((batch, num_steps), -1, jnp.int32), columns)
    logprobs = reshard(jnp.zeros((batch, num_steps), jnp.float32), columns)

    def step(carry):
        i, state, caches, tokens, logprobs = carry
        hidden, caches = model.extend(state.tokens[:, None], state.positions[:, None], caches)
        state, token, logprob = _choose(model, hidden, state, settings, stops)
        here = jnp.arange(num_steps) == i
        tokens = jnp.where(here, token[:, None], tokens)
        return i + 1, state, caches, tokens, jnp.where(here, logprob[:, None], logprobs)

    def unfinished(carry):
        i, state, *_ = carry
        return (i < num_steps) & jnp.any(state.left > 0)

    _, *results = jax.lax.while_loop(unfinished, step, (0, state, caches, tokens, logprobs))
    return results


def _choose(model: Llama, hidden: Array, state: DecodeState, settings: RowSettings, stops: Array):
    """Sample from hidden [B, 1, D]; rows that had ended give -1 and stay where they are."""
    rows = model.rules("batch")
    logits = reshard(model.unembed(hidden), model.rules("batch", None, None))[:, 0, : model.cfg.vocab_size]
    settings = jax.tree.map(lambda x: reshard(x, rows), settings)
    positions = state.positions + 1
    token, logprob = sample(logits, settings, positions)
    going = state.left > 0
    stopped = jnp.any(token[:, None] == reshard(stops, model.rules("batch", None)), axis=-1)
    left = jnp.where(stopped, 0, jnp.maximum(state.left - 1, 0))
    state = DecodeState(
        jnp.where(going, token, state.tokens), jnp.where(going, positions, state.positions), jnp.where(going, left, 0)
    )
    return state, jnp.where(going, token, -1), logprob
