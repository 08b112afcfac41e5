"""Engines of a tiny model on few small pages, and schedules of requests that arrive, leave and crowd each other."""

import functools

import jax
import numpy as np
from flax import nnx
from hypothesis import strategies

import llama_jax
from infer.engine import Engine
from infer.sampling import SamplingParams
from infer.sizes import CacheOptions
from infer.speculation import DraftModel, Ngrams
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama

PAGE = 8
CFG = LlamaConfig(
    vocab_size=40, num_layers=2, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=64
)
# Prompts that begin alike, end inside pages and at their ends, and are longer than a chunk.
STEM = [int(token) for token in np.random.default_rng(7).integers(0, 40, 40)]
PROMPTS = [[1], STEM[:7], STEM[:8], STEM[:9], STEM[:16], STEM[:17] + [3], STEM[:17] + [4], STEM[:40], [5] * 30, [9, 2]]


@functools.cache
def make_model(spec: str = "data=1", *, noise: float = 0.0) -> Llama:
    """A model far from ties; with noise one that guesses what it says, but not always."""
    with llama_jax.use_mesh(spec):
        model = jax.jit(lambda: Llama(CFG, rngs=nnx.Rngs(3), layout="layers"))()
        other = jax.jit(lambda: Llama(CFG, rngs=nnx.Rngs(4), layout="layers"))()
        return jax.tree.map(lambda w, v: 8 * (w + noise * v), model, other)


def guesser(name: str | None, spec: str = "data=1"):
    """What guesses: None, "ngram" or "draft"."""
    if name is None:
        return None
    return Ngrams(2) if name == "ngram" else DraftModel(make_model(spec, noise=0.05), 3)


def engine(pages: int, chunk: int = 16, spec: str = "data=1", guesses: str | None = None, **options) -> Engine:
    """A pool of so many pages a shard; one engine each, so that its programs compile once."""
    return _engine(pages, chunk, spec, guesses, **options)


@functools.cache
def _engine(pages: int, chunk: int, spec: str, guesses: str | None, **options) -> Engine:
    page_bytes = PAGE * CFG.cache_bytes_per_token(bytes_per_value=4)
    page_bytes = page_bytes + 4 * PAGE if guesses == "ngram" else page_bytes * (2 if guesses else 1)
    share_prefixes = options.pop("share_prefixes", True)
    return Engine(
        make_model(spec),
        max_batch_size=options.pop("max_batch_size", 4),
        steps_per_dispatch=options.pop("steps", 3),
        cache=CacheOptions(options.pop("dtype", None), pages * page_bytes, share_prefixes, chunk),
        speculation=guesser(guesses, spec),
        **options,
    )


@functools.cache
def alone(prompt: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
    """What a request gets from an engine that has room, no chunks, no guesses and nothing else to do."""
    return tuple(engine(64, 64, steps=8, max_batch_size=1, share_prefixes=False).generate(prompt, params)[0].tokens)


def all_pages_are_free(engine: Engine) -> bool:
    """Whether nothing is left behind."""
    stats = engine.stats()
    return (stats.waiting, stats.running, stats.pages_free) == (0, 0, stats.pages_total)


params = strategies.builds(
    SamplingParams,
    max_new_tokens=strategies.integers(1, 20),
    temperature=strategies.sampled_from([0.0, 0.0, 0.0, 1.0]),
    seed=strategies.integers(0, 3),
    stop_tokens=strategies.sampled_from([(), (), (11, 23)]),
)
arrival = strategies.tuples(
    strategies.integers(0, 4),  # steps before it comes
    strategies.sampled_from(PROMPTS),
    params,
    strategies.sampled_from([None] * 5 + [1, 3]),  # steps after which it is aborted
)


def run_schedule(engine: Engine, arrivals) -> list:
    """The requests, after all steps; aborted ones are marked so."""
    requests, leaving, waiting = [], [], list(arrivals)
    pause = waiting[0][0]
    while waiting or engine.has_work:
        while waiting and pause == 0:
            _, prompt, settings, stay = waiting.pop(0)
            (request,) = engine.requests(prompt, settings)
            engine.add(request)
            requests.append(request)
            leaving.append(stay)
            pause = waiting[0][0] if waiting else 0
        pause -= pause > 0
        for request in {request: None for request, _ in engine.step()}:
            assert len(request.result.tokens) == len(request.result.logprobs)
        for i, request in enumerate(requests):
            if leaving[i] is not None:
                leaving[i] -= 1
                if leaving[i] < 0 and request.unfinished:
                    engine.abort(request)
    return requests


def assert_as_alone(requests) -> None:
    """Each request has the tokens that it gets alone, an aborted one the first of them."""
    for request in requests:
        result, expected = request.result, list(alone(tuple(request.result.prompt_tokens), request.params))
        assert result.tokens == (expected[: len(result.tokens)] if result.finish_reason == "abort" else expected)
