"""The paged cache gives what the contiguous one gives, on every mesh, and its decode step copies no pool."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llama_jax
from llama_jax.cache import ContiguousCache, PagedCache, init_cache, init_pages
from llama_jax.config import LlamaConfig
from llama_jax.kernels.paged import Pages, gather_pages, quantized, write_pages
from llama_jax.mesh import use_mesh
from llama_jax.model import Llama
from tests.tiny import TINY

PAGE = 8
# The pages of a row are not in order; the first two rows and the last two share none, for two data shards.
TABLE = np.array([[5, 0, 3, -1], [1, 7, -1, -1], [10, 14, 12, 8], [15, 9, 13, -1]], np.int32)
LENGTHS = np.array([21, 9, 32, 17])


def padded_chunk(start: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and positions int32 [B, T] from start on; padding stands after everything, a row that is off at -1."""
    places = np.broadcast_to(np.arange(start, start + size), (len(LENGTHS), size))
    tokens = np.random.default_rng(0).integers(0, TINY.vocab_size, (len(LENGTHS), 64))[:, start : start + size]
    positions = np.where(places < LENGTHS[:, None], places, 2**30)
    return tokens.astype(np.int32), np.where(start < LENGTHS[:, None], positions, -1).astype(np.int32)


def model_of(cfg: LlamaConfig) -> Llama:
    """Weights scaled up so that errors show."""
    model = jax.jit(lambda: Llama(cfg, rngs=nnx.Rngs(0), layout="layers"))()
    return jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, model)


@jax.jit
def extend(model, tokens, positions, caches):
    return model.extend(tokens, positions, caches)


def outputs(model: Llama, caches, chunks: list[int]) -> list[np.ndarray]:
    """What the model gives for the tokens of every row, in chunks of these sizes."""
    seen, start = [], 0
    for size in chunks:
        tokens, positions = padded_chunk(start, size)
        hidden, caches = extend(model, tokens, positions, caches)
        is_token = (positions >= 0) & (positions < 2**30)
        seen.append(np.where(is_token[..., None], hidden, 0))
        start += size
    return seen


def paged(model: Llama, dtype=jnp.float32, num_pages: int = 16) -> tuple[PagedCache, ...]:
    """Empty caches of all layers; each data shard counts its pages from 0."""
    layers = init_pages(model.cfg, model.rules, num_pages, PAGE, dtype=dtype)
    table = np.where(TABLE < 0, -1, TABLE % (num_pages // model.rules.batch_multiple))
    return tuple(PagedCache(pages, jnp.asarray(table)) for pages in layers)


@pytest.mark.parametrize("mesh", ["data=1", "data=2", "tensor=8", "context=2,tensor=2", "data=2,context=2,tensor=2"])
def test_the_paged_cache_gives_what_the_contiguous_gives(mesh):
    """Chunks on top of a cache, single tokens, rows that have ended; tensor=8 splits slots over query groups."""
    with use_mesh(mesh):
        model = model_of(TINY)
        expected = outputs(model, init_cache(TINY, model.rules, 4, 32, dtype=jnp.float32), [12, 8, 1, 1])
        got = outputs(model, paged(model), [12, 8, 1, 1])
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_chunks_give_what_the_whole_sequence_gives():
    with use_mesh("data=1"):
        model = model_of(TINY)
        whole = outputs(model, init_cache(TINY, model.rules, 4, 32, dtype=jnp.float32), [32])[0]
        chunked = np.concatenate(outputs(model, paged(model), [5, 16, 11]), axis=1)
    np.testing.assert_allclose(chunked, whole, rtol=2e-5, atol=2e-5)


def test_tokens_go_to_their_page_and_slot_and_others_nowhere():
    pages = Pages(*(jnp.zeros((4, 1, 2, 1)) for _ in range(2)))
    table = jnp.array([[2, 0], [3, -1]])
    positions = jnp.array([[1, 2, -1], [0, 3, 4]])  # of row 1, 3 has no page and 4 is beyond the table
    values = jnp.arange(1.0, 7).reshape(2, 3, 1, 1)
    after = write_pages(pages, values, 10 * values, positions, table)
    np.testing.assert_array_equal(after.k[:, 0, :, 0], [[2, 0], [0, 0], [0, 1], [4, 0]])
    np.testing.assert_array_equal(after.v, 10 * after.k)


def test_what_is_not_in_the_table_or_after_a_query_does_not_reach_it():
    """Huge garbage in other pages, in later slots and behind -1 changes no bit."""
    with use_mesh("data=1"):
        model = model_of(TINY)
        rng = np.random.default_rng(0)
        q = jnp.asarray(rng.normal(size=(4, 1, 2, 4, 16)), jnp.float32)
        pages = paged(model)[0].pages
        filled = Pages(*(jnp.asarray(rng.normal(size=pages.k.shape), jnp.float32) for _ in range(2)))
        dirty = jax.tree.map(lambda x: x + jnp.float32(1e30), filled)
        clean = [PagedCache(pool, jnp.asarray(TABLE)) for pool in (filled, dirty)]
        keep = np.zeros(pages.k.shape, bool)
        for row, length in zip(TABLE, LENGTHS, strict=True):
            for position in range(length):
                keep[row[position // PAGE], :, position % PAGE] = True
        mixed = PagedCache(jax.tree.map(lambda a, b: jnp.where(keep, a, b), filled, dirty), clean[0].table)
        positions = jnp.asarray(LENGTHS[:, None] - 1, jnp.int32)
        attended = jax.jit(lambda cache: cache.attend(q, positions))
        np.testing.assert_array_equal(attended(mixed), attended(clean[0]))
        assert not np.array_equal(attended(clean[1]), attended(clean[0]))


def test_pages_that_the_mesh_does_not_divide_are_refused():
    with use_mesh("data=2,tensor=4"):
        rules = jax.eval_shape(lambda: Llama(TINY, rngs=nnx.Rngs(0))).rules
        with pytest.raises(ValueError, match="15 pages of 8 tokens cannot be split: pages must be a multiple of 2"):
            init_pages(TINY, rules, 15, 8, dtype=jnp.float32)
        with pytest.raises(ValueError, match="tokens of 2"):
            init_pages(TINY, rules, 16, 9, dtype=jnp.float32)


def decode_program(num_pages: int, dtype) -> Any:
    """Four steps of decoding on donated pages."""

    def decode(model, pages, table, tokens):
        def step(i, carry):
            tokens, pages = carry
            caches = tuple(PagedCache(pool, table) for pool in pages)
            hidden, caches = model.extend(tokens, jnp.full_like(tokens, 9) + i, caches)
            tokens = jnp.argmax(model.unembed(hidden), axis=-1).astype(jnp.int32)
            return tokens, tuple(cache.pages for cache in caches)

        return jax.lax.fori_loop(0, 4, step, (tokens, pages))

    with use_mesh("data=1"):
        model = model_of(TINY)
        pages = init_pages(TINY, model.rules, num_pages, PAGE, dtype=dtype)
        tokens = jnp.zeros((4, 1), jnp.int32)
        return jax.jit(decode, donate_argnums=1).lower(model, pages, jnp.asarray(TABLE), tokens).compile()


@pytest.mark.parametrize(("dtype", "name", "pools"), [("float32", "f32", 2), ("int8", "s8", 4)])
def test_decoding_copies_no_pool_and_gathers_the_pages_of_the_table_alone(dtype, name, pools):
    program = decode_program(1000, jnp.dtype(dtype))
    text = program.as_text()
    assert text is not None and text.partition("\n")[0].count("may-alias") == TINY.num_layers * pools
    makers = set(re.findall(rf" = {name}\[(?:1000,2|2000),8,16\]\S* ([a-z-]+)\(", text))
    assert makers == {"parameter", "get-tuple-element", "bitcast", "scatter", "fusion"}, "and no copy"
    # B * K * N pages of heads, of which a pool of any size has as many.
    gathered = set(re.findall(rf" = {name}\[([\d,]+)\]\S* gather\(\S*\s*%?\S*bitcast", text))
    assert gathered == {"32,1,8,16"}
    smaller = decode_program(100, jnp.dtype(dtype)).memory_analysis()
    assert program.memory_analysis().temp_size_in_bytes == smaller.temp_size_in_bytes


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(jnp.int8, 0, 1 / 254), (jnp.float8_e4m3fn, 2**-4, 2**-10 / 448)])
def test_narrow_values_are_off_by_half_a_step_at_most(dtype, rtol, atol):
    """int8: half of largest / 127; e4m3: half of three mantissa bits, and below 2^-6 half of 2^-9."""
    x = jax.random.normal(jax.random.key(0), (64, 3, 128)) * jnp.logspace(-3, 3, 64)[:, None, None]
    x = x.at[5].set(0.0)
    values, scale = quantized(x, dtype)
    assert values.dtype == dtype and scale.dtype == jnp.float32 and scale.shape == x.shape[:-1]
    error = np.abs(np.asarray(values, np.float32) * np.asarray(scale)[..., None] - x)
    largest = np.abs(np.asarray(x)).max(axis=-1, keepdims=True)
    assert (error <= 1.0001 * np.maximum(rtol * np.abs(x), atol * largest)).all()


@pytest.mark.parametrize(("dtype", "far"), [(jnp.int8, 0.015), (jnp.float8_e4m3fn, 0.08)])
@pytest.mark.parametrize("mesh", ["data=1", "data=2,tensor=4"])
def test_a_narrow_cache_gives_nearly_what_a_float_one_gives(dtype, far, mesh):
    with use_mesh(mesh):
        model = model_of(TINY)
        exact = outputs(model, paged(model), [12, 8, 1, 1])
        narrow = outputs(model, paged(model, dtype), [12, 8, 1, 1])
    for ours, theirs in zip(narrow, exact, strict=True):
        error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
        assert 0 < error < far


def test_a_narrow_cache_changes_the_perplexity_of_the_demo_by_less_than_half_a_percent():
    root = Path(llama_jax.__file__).parent
    tokens = llama_jax.load_tokenizer(root / "demo").encode((root.parent / "LICENSE").read_text(), bos=True)[:1025]
    rows, targets = (np.array(tokens[i:][:1024], np.int32).reshape(4, 256) for i in (0, 1))
    table = jnp.arange(64).reshape(4, 16)
    perplexity = {}
    with use_mesh("data=1"):
        model = llama_jax.load(root / "demo", layout="layers")
        for dtype in ("float32", "int8", "float8_e4m3fn"):
            layers = init_pages(model.cfg, model.rules, 64, 16, dtype=jnp.dtype(dtype))
            caches, loss = tuple(PagedCache(pages, table) for pages in layers), 0.0
            for start in range(0, 256, 64):
                positions = np.broadcast_to(np.arange(start, start + 64, dtype=np.int32), (4, 64))
                hidden, caches = extend(model, rows[:, start : start + 64], positions, caches)
                logprobs = jax.nn.log_softmax(model.unembed(hidden))
                loss -= jnp.take_along_axis(logprobs, targets[:, start : start + 64, None], axis=2).sum()
            perplexity[dtype] = float(jnp.exp(loss / targets.size))
    assert 1 < perplexity["float32"] < model.cfg.vocab_size / 4
    assert abs(perplexity["int8"] / perplexity["float32"] - 1) < 0.005, perplexity
    assert abs(perplexity["float8_e4m3fn"] / perplexity["float32"] - 1) < 0.005, perplexity


def test_a_narrow_page_is_read_as_value_times_scale():
    pages = Pages(*(jnp.zeros((3, 2, 4, 8), jnp.int8),) * 2, *(jnp.zeros((3, 2, 4)),) * 2)
    k, v = jax.random.normal(jax.random.key(0), (2, 1, 6, 2, 8))
    table = jnp.array([[2, 0]])
    positions = jnp.arange(6)[None]
    read_k, read_v = gather_pages(write_pages(pages, k, v, positions, table), table, jnp.float32)
    for read, given in ((read_k, k), (read_v, v)):
        values, scale = quantized(given, jnp.int8)
        np.testing.assert_array_equal(read[:, :, :6], (values * scale[..., None]).swapaxes(1, 2))


def test_the_bytes_of_an_int8_cache_are_a_quarter_and_its_scales():
    with use_mesh("data=1"):
        rules = jax.eval_shape(lambda: Llama(TINY, rngs=nnx.Rngs(0))).rules

        def size(dtype):
            return sum(x.nbytes for x in jax.tree.leaves(init_pages(TINY, rules, 4, 8, dtype=dtype)))

        tokens = 4 * 8 * TINY.num_layers * TINY.num_kv_heads * 2
        assert size(jnp.float32) == tokens * 16 * 4
        assert size(jnp.int8) == size(jnp.float8_e4m3fn) == tokens * (16 + 4)


def test_a_contiguous_cache_drops_what_is_beyond_it():
    with use_mesh("data=1"):
        rules = jax.eval_shape(lambda: Llama(TINY, rngs=nnx.Rngs(0))).rules
        cache = init_cache(TINY, rules, 1, 4, dtype=jnp.float32)[0]
        ones = jnp.ones((1, 3, 2, 16))
        after: ContiguousCache = jax.jit(lambda c: c.update(ones, 2 * ones, jnp.array([[-1, 2, 4]])))(cache)
    np.testing.assert_array_equal(after.k[0, 0, :, 0], [0, 0, 1, 0])
    np.testing.assert_array_equal(after.v[0, 1, :, 3], [0, 0, 2, 0])
    assert not after.empty
