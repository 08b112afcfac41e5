"""The engine against transformers' generate, and against itself on other meshes, in other batches, with less room."""

import dataclasses
import itertools
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import llama_jax
from infer.engine import Engine
from infer.sampling import SamplingParams
from infer.sizes import CacheOptions
from llama_jax.model import Llama
from tests.reference import hf_model, save_hf
from tests.schedules import CFG as SMALL
from tests.tiny import TINY, VARIANTS


def generate_alone(engine: Engine, prompts, params) -> list[list[int]]:
    return [engine.generate(prompt, p)[0].tokens for prompt, p in zip(prompts, params, strict=True)]


@pytest.mark.parametrize("length", [3000, pytest.param(131_000, marks=pytest.mark.slow)])
def test_a_long_prompt_in_chunks_goes_on_as_one_forward_pass_does(length):
    """Up to the context of Llama 3.1."""
    cfg = dataclasses.replace(SMALL, max_seq_len=131_072)
    with llama_jax.use_mesh("data=1"):
        model = jax.jit(lambda: Llama(cfg, rngs=nnx.Rngs(3), layout="layers"))()
    model = jax.tree.map(lambda weight: 8 * weight, model)  # far from ties
    prompt = np.random.default_rng(0).integers(0, cfg.vocab_size, length).tolist()
    (result,) = Engine(model, max_batch_size=1).generate(prompt, SamplingParams(max_new_tokens=4))

    @jax.jit
    def forward(model, tokens):
        hidden = model.hidden(tokens, jnp.arange(tokens.shape[1])[None])
        return jax.nn.log_softmax(model.unembed(hidden[:, length - 1 :]))[0]

    with llama_jax.use_mesh("data=1"):
        logprobs = forward(model, jnp.array([prompt + result.tokens[:-1]]))
    assert jnp.argmax(logprobs, axis=-1).tolist() == result.tokens
    np.testing.assert_allclose(logprobs[jnp.arange(4), jnp.array(result.tokens)], result.logprobs, atol=1e-3)


# The model's numbers.


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """A transformers model, and the directory that it saved."""
    theirs = hf_model(VARIANTS[request.param])
    theirs.generation_config.eos_token_id = None
    return theirs, save_hf(theirs, tmp_path_factory.mktemp("hf"))


def test_greedy_tokens_and_log_probabilities_equal_transformers_over_64_steps(pair):
    theirs, path = pair
    prompt = np.random.default_rng(0).integers(0, TINY.vocab_size, 11).tolist()
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, pad_token_id=0)[0]
        logits = theirs(expected[None]).logits[0, len(prompt) - 1 : -1]
    expected = expected[len(prompt) :]
    with llama_jax.use_mesh("data=1"):
        model = llama_jax.load(path, layout="layers")
    (result,) = Engine(model, steps_per_dispatch=7).generate(prompt, SamplingParams(max_new_tokens=64))
    assert result.tokens == expected.tolist()
    assert (result.prompt, result.text, result.finish_reason) == (None, None, "length")
    logprobs = torch.log_softmax(logits, -1)[torch.arange(64), expected]
    np.testing.assert_allclose(result.logprobs, logprobs, atol=1e-4)  # logits of size 10 through 75 positions


ODD = dataclasses.replace(TINY, vocab_size=131, num_layers=2)
PROMPTS = [[5, 3], list(range(40, 55)), [7, 8, 9, 10, 11, 12], [1]]
PARAMS = [
    SamplingParams(max_new_tokens=15),
    SamplingParams(max_new_tokens=3, temperature=1.0, seed=5),
    SamplingParams(max_new_tokens=20, temperature=0.8, top_p=0.9, seed=1),
    SamplingParams(max_new_tokens=16, temperature=1.5, top_k=9, min_p=0.1),
]


@pytest.fixture(scope="module")
def odd_path(tmp_path_factory):
    return save_hf(hf_model(ODD), tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def odd_engine(odd_path):
    """odd_engine(mesh, ...): an engine over the same weights on any mesh."""

    def load(spec: str, **options) -> Engine:
        with llama_jax.use_mesh(spec):
            return Engine(llama_jax.load(odd_path, layout="layers"), **options)

    return load


@pytest.fixture(scope="module")
def engine(odd_engine) -> Engine:
    return odd_engine("data=1", max_batch_size=3)


@pytest.fixture(scope="module")
def alone(engine) -> list[list[int]]:
    return generate_alone(engine, PROMPTS, PARAMS)


def test_prompts_in_batches_give_what_each_gives_alone(engine, alone):
    results = engine.generate(PROMPTS, PARAMS)  # a batch of three and one of one; rows end at different steps
    assert [result.tokens for result in results] == alone
    assert [len(result.tokens) for result in results] == [15, 3, 20, 16]


@pytest.mark.parametrize("spec", ["data=8", "fsdp=2,tensor=4", "context=2,tensor=4", "tensor=8"])
def test_tokens_are_the_same_on_every_mesh(spec, odd_engine, alone):
    assert [result.tokens for result in odd_engine(spec).generate(PROMPTS, PARAMS)] == alone


def test_log_probabilities_of_prefill_and_decode_equal_the_full_forward(engine, odd_path):
    (result,) = engine.generate(PROMPTS[1], SamplingParams(max_new_tokens=17))
    tokens = np.array([result.prompt_tokens + result.tokens])
    with llama_jax.use_mesh("data=1"):
        logits = jax.jit(lambda model: model(tokens))(llama_jax.load(odd_path))
    logprobs = np.asarray(jax.nn.log_softmax(np.asarray(logits)[0, 14:-1]))
    np.testing.assert_allclose(result.logprobs, logprobs[np.arange(17), result.tokens], atol=2e-5)


# How it runs.


def test_nothing_compiles_after_the_first_run_of_a_bucket(engine, caplog):
    def compilations(prompt):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            engine.generate(prompt, SamplingParams(max_new_tokens=200, temperature=1.0))
        return sum("Finished XLA compilation" in record.message for record in caplog.records)

    before = engine.num_compiled
    assert compilations([3] * 20) == 3  # with the larger pool
    assert compilations([4] * 17) == compilations([5] * 24) == 0
    assert engine.num_compiled == before + 2


def test_decoding_takes_a_flat_tuple_of_weights_and_donates_what_is_held(engine, monkeypatch):
    calls = []
    programs = engine._rounds.programs
    run = programs._run
    monkeypatch.setattr(programs, "_run", lambda call: calls.append(call) or run(call))
    engine.generate([1, 2, 3], SamplingParams(max_new_tokens=20))
    decodes = [args for function, args, _ in calls if function is programs._decode]
    assert len(decodes) == 3  # 19 tokens after the first, 8 in a dispatch, none for nothing
    for weights, held, *_ in decodes:
        assert type(weights) is tuple and all(isinstance(leaf, jax.Array) for leaf in weights)
        assert not any(leaf.is_deleted() for leaf in weights)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(held))


def test_the_pages_come_out_where_they_went_in(engine):
    engine.generate([1, 2, 3], SamplingParams(max_new_tokens=20))
    programs = engine._rounds.programs
    decode = next(compiled for key, compiled in programs.compiled.items() if key[0] is programs._decode)
    memory = decode.memory_analysis()
    assert memory.alias_size_in_bytes > 64 * ODD.cache_bytes_per_token(bytes_per_value=4)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000


def test_the_pool_is_as_large_as_the_requests_need_within_the_context_and_the_batch(odd_engine):
    engine = odd_engine("data=1", max_seq_len=1000, max_batch_size=3)

    def pages(*lengths, new):
        requests = engine.requests([[1] * length for length in lengths], SamplingParams(max_new_tokens=new))
        return engine._rounds._pages_for(requests)

    assert pages(700, new=8) == 16
    assert pages(5, 9, new=8) == 2
    assert pages(5, 9, 300, new=100) == 3 * 8
    assert pages(5, 9, 3, 2, 7, new=1000) == 3 * 16


def test_a_longer_request_beside_others_makes_the_pool_larger_and_changes_no_token(odd_engine, alone):
    engine = odd_engine("data=1", max_batch_size=3)
    (short,), (long,) = engine.requests(PROMPTS[0], PARAMS[0]), engine.requests([7] * 100, PARAMS[0])
    first = engine.run([short])
    next(first)
    for _ in itertools.zip_longest(engine.run([long]), first):
        pass
    assert short.result.tokens == alone[0]
    assert [long.result.tokens] == generate_alone(engine, [[7] * 100], PARAMS[:1])


def test_a_batch_is_a_multiple_of_what_the_mesh_divides(odd_engine):
    batches = odd_engine("context=2,tensor=4", max_seq_len=999)._rounds._batches
    assert (batches.page_size, batches.length(9, fresh=True), batches.chunks.longest) == (64, 16, 512)
    batches = odd_engine("data=8", max_batch_size=20)._rounds._batches
    assert (batches.num_shards, batches.num_rows) == (8, 3)


def test_runs_beside_each_other_give_each_its_own_text(engine, alone):
    requests = [engine.requests([prompt], p) for prompt, p in zip(PROMPTS, PARAMS, strict=True)]
    runs = [engine.run(one) for one in requests]
    while any(request.unfinished for (request,) in requests):
        for run in runs:
            next(run, None)
    assert [request.result.tokens for (request,) in requests] == alone


def test_an_abandoned_run_leaves_no_trace(engine, alone):
    for _ in engine.run(engine.requests(PROMPTS, PARAMS)):
        break
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.pages_free) == (0, 0, stats.pages_total)
    assert generate_alone(engine, PROMPTS[:2], PARAMS[:2]) == alone[:2]


def test_throughput_counts_tokens_and_keeps_compiling_apart(odd_engine):
    engine = odd_engine("data=1", max_batch_size=1)
    engine.generate([[1, 2], [3, 4, 5]], SamplingParams(max_new_tokens=20))
    measured = engine.throughput
    assert (measured.prefill_tokens, measured.decode_tokens) == (5, 38)
    assert min(measured.compile_seconds, measured.prefill_seconds, measured.decode_seconds) > 0
    engine.generate([[1, 2], [3, 4, 5]], SamplingParams(max_new_tokens=20))
    assert engine.throughput.compile_seconds == 0


def test_the_first_token_comes_after_compiling_and_prefill_of_the_first_batch(odd_engine):
    engine = odd_engine("data=1", max_batch_size=1)
    engine.generate([[1, 2], [3] * 40], SamplingParams(max_new_tokens=20))
    measured = engine.throughput
    assert 0 < measured.first_token_seconds < measured.compile_seconds + measured.prefill_seconds
    began = time.perf_counter()
    engine.generate([1, 2], SamplingParams(max_new_tokens=20))
    measured, seconds = engine.throughput, time.perf_counter() - began
    assert 0 < measured.prefill_seconds <= measured.first_token_seconds < seconds - measured.decode_seconds


def test_where_memory_is_short_a_shorter_context_is_served_and_the_youngest_waits(odd_engine, capsys):
    engine = odd_engine("data=1")
    prompts, params = [[i] * 130 for i in range(2)], SamplingParams(max_new_tokens=70)
    expected = [engine.generate(prompt, params)[0].tokens for prompt in prompts]
    page = 64 * ODD.cache_bytes_per_token(bytes_per_value=4)
    small = odd_engine("data=1", cache=CacheOptions(num_bytes=7 * page))
    assert small.max_seq_len == 7 * 64
    assert "room for 448 tokens, which is the context that is served" in capsys.readouterr().err
    assert [result.tokens for result in small.generate(prompts, params)] == expected
    assert small.stats().preemptions > 0
    with pytest.raises(ValueError, match="leaves no room in a context of 448"):
        small.generate([1] * 448)
    with pytest.raises(ValueError, match="the cache needs 32,768 bytes on each device for 64 tokens, and has 9"):
        odd_engine("data=1", cache=CacheOptions(num_bytes=9))


def test_a_program_that_does_not_fit_is_refused_and_a_smaller_one_then_runs(odd_engine, monkeypatch):
    engine = odd_engine("data=1")
    small = engine.generate([1] * 10)[0].tokens
    engine._rounds.make_room(engine.requests([[1] * 400] * 2))
    monkeypatch.setattr("llama_jax.memory.bytes_left", lambda devices: 10_000)
    with pytest.raises(ValueError, match=r"this batch needs .* \(temporaries .*, results .*\), but 1e-05 GB are left"):
        engine.generate([[1] * 400] * 2)
    monkeypatch.undo()
    assert engine.generate([1] * 10)[0].tokens == small
