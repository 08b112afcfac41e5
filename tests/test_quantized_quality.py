"""What quantization costs the demo model: perplexity on documents that its training held out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import llama_jax
from infer.engine import Engine
from infer.entry import DEMO
from infer.sampling import SamplingParams
from infer.sizes import CacheOptions
from llama_jax.mesh import use_mesh
from train.preparation.corpus import is_held_out, python_library, text_hash

LENGTH = 256


@functools.cache
def heldout() -> np.ndarray:
    """The first tokens of documents of the default corpus, int32 [N, LENGTH]."""
    tokenizer, rows = llama_jax.load_tokenizer(DEMO), []
    for document in python_library():
        if is_held_out(document.origin or text_hash(document.text), 0.05) and len(document.text) > 1200:
            tokens = [tokenizer.bos_id, *tokenizer.encode(document.text[:3000])]
            rows += [tokens[:LENGTH]] if len(tokens) >= LENGTH else []
        if len(rows) == 24:
            break
    return np.array(rows, np.int32)


@jax.jit
def mean_loss(model, tokens: Array) -> Array:
    logits = model(tokens)[:, :-1]
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)


def loss(quantize: str | None) -> float:
    with use_mesh("data=1"):
        model = llama_jax.load(DEMO, layout="layers", quantize=quantize)
        return float(np.mean([mean_loss(model, rows) for rows in np.split(heldout(), 3)]))


@functools.cache
def plain_loss() -> float:
    return loss(None)


@pytest.mark.parametrize(("name", "limit"), [("int8", 0.005), ("fp8", 0.01), ("int4", 0.04), ("nf4", 0.04)])
def test_perplexity_rises_by_less_than_its_limit(name, limit):
    assert np.exp(loss(name) - plain_loss()) - 1 < limit


def test_a_cache_in_int8_raises_perplexity_by_less_than_its_limit():
    """Chunks of 32 tokens: all but a prompt's first see the others through the cache alone."""
    cache = CacheOptions("int8", num_bytes=2**26, prefill_chunk=32)
    with use_mesh("data=1"):
        engine = Engine(llama_jax.load(DEMO, layout="layers"), max_seq_len=LENGTH + 1, max_batch_size=8, cache=cache)
        results = engine.generate(heldout().tolist(), SamplingParams(max_new_tokens=1, prompt_logprobs=0))
    rise = -np.mean([result.prompt_logprobs[1:] for result in results]) - plain_loss()
    assert 1e-5 < abs(rise)  # it was read: in floats all chunks together are off by 1e-7
    assert np.exp(rise) - 1 < 0.005
