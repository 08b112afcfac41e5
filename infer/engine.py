"""Prompts in, text out: jitted prefill and decode over plain arrays, sampling on the device.

Weights enter jit as a flat tuple and are rebuilt into the model inside, because flattening a
module costs milliseconds a call; caches are donated; several tokens are decoded in one dispatch,
and the next dispatch is on its way before the last one's tokens are read. Lengths are rounded up
to buckets, so that after one run of a bucket nothing compiles again.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec, reshard

from infer.request import Request, Result
from infer.sampling import RowSettings, SamplingParams, row_settings, sample
from llama_jax.cache import init_cache
from llama_jax.chat import encode_chat
from llama_jax.memory import check_program
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict]

_MIN_BUCKET = 16

_WAYS = "fewer or shorter prompts at a time, a shorter max_seq_len or more devices"


@dataclass
class Throughput:
    """What a run measured: tokens and seconds of prefill and of decode, and seconds of compiling before them.

    first_token_seconds is the time from the start of the run to its first token, and first_compile_seconds
    how much of that was compiling.
    """

    compile_seconds: float = 0.0
    first_compile_seconds: float = 0.0
    first_token_seconds: float = 0.0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def clock(self) -> float:
        """Seconds that do not pass while a program compiles."""
        return time.perf_counter() - self.compile_seconds

    def __str__(self) -> str:
        return (
            f"prefill {self.prefill_tokens_per_second:.1f} tokens/s, "
            f"decode {self.decode_tokens_per_second:.1f} tokens/s, compiled in {self.compile_seconds:.1f} s"
        )

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens a second, padding not counted."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first a second, all rows together."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class DecodeState(NamedTuple):
    """Where each row of a batch stands and how it goes on.

    tokens and positions int32 [B] are those of its last token, left int32 [B] is how many may still
    come (0: it has ended), stops int32 [B, N] end it, filled up with -1.
    """

    tokens: Array | np.ndarray
    positions: Array | np.ndarray
    left: Array | np.ndarray
    stops: Array | np.ndarray
    settings: RowSettings


class Engine:
    """Continues prompts with a model, on the mesh that the model lies on."""

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
        ValueError for a number out of range and if the tokenizer has more tokens than the model.
        """
        limit = model.cfg.max_seq_len
        if max_seq_len is not None and not 1 <= max_seq_len <= limit:
            raise ValueError(f"max_seq_len={max_seq_len} must be between 1 and the model's {limit}")
        if max_batch_size < 1 or steps_per_dispatch < 1:
            raise ValueError(f"{max_batch_size=} and {steps_per_dispatch=} must be at least 1")
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
        self._mesh = leaves[0].sharding.mesh
        self._prefill = jax.jit(partial(_prefill, tree), static_argnames="num_slots")
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
        requests = self.requests([prompt], params)  # here and not in a generator, so that errors come at once
        return (text for _, text in self.run(requests) if text)

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
        tokens = self._tokenize(prompt) if len(prompt) else []
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
        result = Result(prompt if isinstance(prompt, str) else None, tokens)
        return Request(result, params, self.tokenizer, room)

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str) and not isinstance(prompt[0], dict):
            return [int(token) for token in prompt]  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise ValueError("a prompt of text needs a tokenizer; give token ids or a checkpoint with a tokenizer")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)
        return encode_chat(self.tokenizer, prompt)  # type: ignore[arg-type]

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        """Continue requests, yielding (index of the request, new text) as it comes."""
        self.throughput = Throughput()
        for start in range(0, len(requests), self.max_batch_size):
            for index, text in self._run_batch(requests[start : start + self.max_batch_size]):
                yield start + index, text

    def _run_batch(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        measured = self.throughput
        began, first_read = measured.clock(), None
        tokens, state, num_slots = self._padded(requests)
        chunk = self._call(self._prefill, self._weights, tokens, state, num_slots=num_slots)
        while any(request.unfinished for request in requests):
            state, caches, *new = chunk
            chunk = self._dispatch(requests, state, caches, in_flight=new[0].shape[1])
            new = [np.asarray(x) for x in new]
            if first_read is None:
                first_read = measured.clock()
                if not measured.first_token_seconds:
                    measured.first_token_seconds = time.perf_counter() - measured.began
                    measured.first_compile_seconds = measured.compile_seconds
            for i, request in enumerate(requests):
                if request.unfinished:
                    yield i, request.push(new[0][i], new[1][i])
        assert first_read is not None
        measured.prefill_tokens += sum(len(request.result.prompt_tokens) for request in requests)
        measured.prefill_seconds += first_read - began
        measured.decode_tokens += sum(len(request.result.tokens) - 1 for request in requests)
        measured.decode_seconds += measured.clock() - first_read

    def _dispatch(self, requests: Sequence[Request], state: DecodeState, caches, *, in_flight: int) -> tuple:
        """Start decoding what follows the tokens in flight; () if they fill all the room there is."""
        if all(not r.unfinished or len(r.result.tokens) + in_flight >= r.room for r in requests):
            return ()
        # A stop string is seen on the host alone: the row then ends here.
        alive = np.zeros(len(state.tokens), bool)
        alive[: len(requests)] = [request.unfinished for request in requests]
        return self._call(self._decode, self._weights, state, caches, alive)

    def _call(self, function, *args, **static):
        """Run a jitted function, compiling it first, with the time taken apart, if its bucket is new.

        Raises ValueError if the devices have not the memory that the program needs.
        """
        shapes = tuple(x.shape for x in jax.tree.leaves(args[1:]))
        key = (function, shapes, *static.values())
        if key not in self._compiled:
            jax.block_until_ready(args)  # or what still runs would be taken for compiling
            began = time.perf_counter()
            with jax.set_mesh(self._mesh):
                compiled = function.lower(*args, **static).compile()
            self.throughput.compile_seconds += time.perf_counter() - began
            check_program("this batch", compiled, self._mesh.devices.flat, ways=_WAYS)
            self._compiled[key] = compiled
        return self._compiled[key](*args)

    def lower(self, requests: Sequence[Request]) -> tuple[jax.stages.Lowered, jax.stages.Lowered, tuple]:
        """Prefill and decode of a batch as `run` compiles them, and the abstract caches between; nothing is run."""
        tokens, state, num_slots = self._padded(requests)
        prefill = self._prefill.lower(self._weights, tokens, state, num_slots=num_slots)
        state, caches, *_ = jax.eval_shape(partial(self._prefill, num_slots=num_slots), self._weights, tokens, state)
        return prefill, self._decode.lower(self._weights, state, caches, np.ones(len(tokens), bool)), caches

    @property
    def num_compiled(self) -> int:
        """How many programs have been compiled: two for each new bucket of shapes."""
        return len(self._compiled)

    def _padded(self, requests: Sequence[Request]) -> tuple[np.ndarray, DecodeState, int]:
        """Prompts int32 [B, T], the state before their first new token, and the cache slots a row, in buckets."""
        lengths = [len(request.result.prompt_tokens) for request in requests]
        total = max(length + request.room for length, request in zip(lengths, requests, strict=True))
        num_rows = _bucket(len(requests), self.max_batch_size, self.rules.batch_multiple)
        length = _bucket(max(_MIN_BUCKET, *lengths), self.max_seq_len, self.rules.sequence_multiple)
        num_slots = _bucket(max(_MIN_BUCKET, total), self.max_seq_len, self.rules.cache_multiple)

        tokens = np.zeros((num_rows, length), np.int32)
        last, left = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
        num_stops = max(4, *(len(request.stop_tokens) for request in requests))
        stops = np.full((num_rows, _bucket(num_stops)), -1, np.int32)
        for i, request in enumerate(requests):
            tokens[i, : lengths[i]] = request.result.prompt_tokens
            last[i], left[i] = lengths[i] - 1, request.room
            stops[i, : len(request.stop_tokens)] = sorted(request.stop_tokens)
        params = [request.params for request in requests] + [SamplingParams()] * (num_rows - len(requests))
        return tokens, DecodeState(np.zeros_like(last), last, left, stops, row_settings(params)), num_slots


def _bucket(number: int, limit: int | None = None, multiple: int = 1) -> int:
    """The next power of two, at most limit, rounded up to what the mesh divides."""
    size = 1 << (number - 1).bit_length()
    return -(-min(size, limit or size) // multiple) * multiple


def _prefill(tree, weights, tokens, state: DecodeState, *, num_slots: int):
    """Run prompts int32 [B, T] into fresh caches and choose their first tokens.

    Returns state, caches, tokens int32 [B, 1] (-1 in padding rows) and log-probabilities float32 [B, 1].
    """
    model: Llama = jax.tree.unflatten(tree, weights)
    rules = model.rules
    state = jax.tree.map(lambda x: reshard(x, rules("batch")), state)
    caches = init_cache(model.cfg, rules, len(tokens), num_slots, dtype=model.embedding[...].dtype)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, caches = model.extend(tokens, positions, caches)
    # A masked sum and not a look-up: it leaves a sequence split over `context` where it is.
    is_last = (positions == state.positions[:, None])[..., None]
    last = jnp.sum(jnp.where(is_last, hidden, 0), axis=1, keepdims=True)
    state, token, logprob = _choose(model, last, state)
    return state, caches, *_readable(token[:, None], logprob[:, None])


def _decode(tree, num_steps, weights, state: DecodeState, caches, alive):
    """Decode up to num_steps tokens of every row that is alive and has not ended.

    Returns state, caches, tokens int32 [B, num_steps] (-1 where a row had ended) and their
    log-probabilities float32 [B, num_steps].
    """
    model: Llama = jax.tree.unflatten(tree, weights)
    rows, columns = model.rules("batch"), model.rules("batch", None)
    state = state._replace(left=jnp.where(reshard(alive, rows), state.left, 0))
    shape = (len(alive), num_steps)
    tokens = jnp.full(shape, -1, jnp.int32, out_sharding=columns)
    logprobs = jnp.zeros(shape, jnp.float32, out_sharding=columns)

    def step(carry):
        i, state, caches, tokens, logprobs = carry
        hidden, caches = model.extend(state.tokens[:, None], state.positions[:, None], caches)
        state, token, logprob = _choose(model, hidden, state)
        here = jnp.arange(num_steps) == i
        tokens = jnp.where(here, token[:, None], tokens)
        return i + 1, state, caches, tokens, jnp.where(here, logprob[:, None], logprobs)

    def unfinished(carry):
        i, state, *_ = carry
        return (i < num_steps) & jnp.any(state.left > 0)

    _, state, caches, *new = jax.lax.while_loop(unfinished, step, (0, state, caches, tokens, logprobs))
    return state, caches, *_readable(*new)


def _choose(model: Llama, hidden: Array, state: DecodeState) -> tuple[DecodeState, Array, Array]:
    """Sample from hidden [B, 1, D]; rows that had ended give -1 and stay where they are."""
    logits = reshard(model.unembed(hidden), model.rules("batch", None, None))[:, 0, : model.cfg.vocab_size]
    positions = state.positions + 1
    token, logprob = sample(logits, state.settings, positions)
    stopped = jnp.any(token[:, None] == state.stops, axis=-1)
    going = state.left > 0
    after = state._replace(
        tokens=jnp.where(going, token, state.tokens),
        positions=jnp.where(going, positions, state.positions),
        left=jnp.where(going & ~stopped, state.left - 1, 0),
    )
    return after, jnp.where(going, token, -1), logprob


def _readable(*arrays: Array) -> list[Array]:
    """Whole on every device, so that every process can read them."""
    return [reshard(x, PartitionSpec()) for x in arrays]
