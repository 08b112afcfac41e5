"""The engine against transformers' generate, against itself on other meshes, and on texts that it must cut rightly."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from flax import nnx
from tokenizers import decoders, pre_tokenizers

import llama_jax
from infer.engine import Engine
from infer.request import Request, Result
from infer.sampling import SamplingParams
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from tests.reference import hf_model, save_hf
from tests.tiny import TINY, VARIANTS

HELLO = "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 "  # Thai, Hindi
HELLO += "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # three people joined into one family


def generate_alone(engine: Engine, prompts, params) -> list[list[int]]:
    return [engine.generate(prompt, p)[0].tokens for prompt, p in zip(prompts, params, strict=True)]


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
    assert compilations([3] * 20) == 2
    assert compilations([4] * 17) == compilations([5] * 24) == 0
    assert engine.num_compiled == before + 2


def test_decoding_takes_a_flat_tuple_of_weights_and_donates_the_caches(engine, monkeypatch):
    calls = []
    call = engine._call
    monkeypatch.setattr(engine, "_call", lambda *args, **static: calls.append(args) or call(*args, **static))
    engine.generate([1, 2, 3], SamplingParams(max_new_tokens=20))
    decodes = [args for function, *args in calls if function is engine._decode]
    assert len(decodes) == 3  # 19 tokens after the first, 8 in a dispatch, none for nothing
    for weights, state, caches, _ in decodes:
        assert type(weights) is tuple and all(isinstance(leaf, jax.Array) for leaf in weights)
        assert not any(leaf.is_deleted() for leaf in weights)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state, caches)))


def test_the_caches_come_out_where_they_went_in(engine):
    engine.generate([1, 2, 3], SamplingParams(max_new_tokens=20))
    decode = next(compiled for key, compiled in engine._compiled.items() if key[0] is engine._decode)
    cache_bytes = 32 * ODD.cache_bytes_per_token(bytes_per_value=4)
    memory = decode.memory_analysis()
    assert memory.alias_size_in_bytes > cache_bytes
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1000


def test_buckets_stay_within_the_context_and_the_batch(odd_engine):
    engine = odd_engine("data=1", max_seq_len=1000, max_batch_size=3)

    def allocated(*lengths, new):
        requests = engine.requests([[1] * length for length in lengths], SamplingParams(max_new_tokens=new))
        tokens, state, num_slots = engine._padded(requests)
        return *tokens.shape, num_slots

    assert allocated(700, new=8) == (1, 1000, 1000)
    assert allocated(5, 9, new=8) == (2, 16, 32)
    assert allocated(5, 9, 300, new=100) == (3, 512, 512)


def test_buckets_are_multiples_of_what_the_mesh_divides(odd_engine):
    engine = odd_engine("context=2,tensor=4", max_seq_len=999)
    (request,) = engine.requests([1] * 700)
    tokens, _, num_slots = engine._padded([request])
    assert (tokens.shape, num_slots) == ((1, 1000), 1000)
    assert engine.rules.cache_multiple == 4


def test_an_abandoned_stream_leaves_no_trace(engine, alone):
    for _ in engine.run(engine.requests(PROMPTS, PARAMS)):
        break
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
    engine.generate([1, 2], SamplingParams(max_new_tokens=20))
    assert engine.throughput.first_token_seconds == pytest.approx(engine.throughput.prefill_seconds, abs=0.05)


def test_a_batch_that_does_not_fit_is_refused_and_a_smaller_one_then_runs(odd_engine, monkeypatch):
    engine = odd_engine("data=1")
    small = engine.generate([1] * 10)[0].tokens
    monkeypatch.setattr("llama_jax.memory.bytes_left", lambda devices: 1_000_000)
    with pytest.raises(ValueError, match=r"this batch needs .* \(temporaries .*, results .*\), but 0.001 GB are left"):
        engine.generate([[1] * 900] * 8)
    assert engine.generate([1] * 10)[0].tokens == small


# What it makes of the tokens. The model below says token i + 1 after token i, and each token is one byte of a text.


SIZE = 128


@pytest.fixture(scope="module")
def successor() -> Llama:
    cfg = LlamaConfig(SIZE, num_layers=1, embed_dim=SIZE, mlp_dim=16, num_heads=1, num_kv_heads=1, head_dim=2)
    cfg = dataclasses.replace(cfg, max_seq_len=2 * SIZE)
    with llama_jax.use_mesh("data=1"):
        model = jax.jit(lambda: jax.tree.map(jnp.zeros_like, Llama(cfg, rngs=nnx.Rngs(0), layout="layers")))()
        model.embedding, model.final_norm.scale = nnx.Param(jnp.eye(SIZE)), nnx.Param(jnp.ones(SIZE))
        model.head = nnx.Param(jnp.roll(jnp.eye(SIZE), 1, axis=0))
    return model


@pytest.fixture(scope="module")
def speaker(successor):
    """speaker(text, ...): an engine that after any prompt of text says this text, a byte a token."""
    engine = Engine(successor, max_batch_size=1)
    prompt = [0] * (SIZE // 2 + 1)  # so that every test below falls into one bucket

    def say(text: str, stop_ids=(), **fields) -> Engine:
        token_bytes = [bytes([byte]) for byte in b"\n" + text.encode()]
        engine.tokenizer = Tokenizer(lambda text: prompt, token_bytes, {}, None, None, 0, frozenset(stop_ids), **fields)
        return engine

    return say


def test_a_stream_never_gives_half_a_character(speaker):
    engine = speaker(HELLO)
    num_bytes = len(HELLO.encode())
    pieces = list(engine.stream("x", SamplingParams(max_new_tokens=num_bytes)))
    assert "".join(pieces) == HELLO
    assert len(pieces) >= num_bytes // 8 and not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_byte_level_vocabulary_streams_whole_characters(chunk, tmp_path):
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode(HELLO)
    request = Request(Result("a", tokenizer.encode("a")), SamplingParams(), tokenizer, len(ids))
    chunks = [np.array(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    pieces = [request.push(part, np.zeros(len(part))) for part in chunks]
    assert "".join(pieces) == request.result.text == HELLO
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_cut_off_at_the_end_becomes_a_replacement_character(speaker):
    (result,) = speaker("ab\U0001f600").generate("x", SamplingParams(max_new_tokens=4))
    assert (result.text, result.finish_reason) == ("ab\ufffd", "length")


def test_text_continues_a_character_that_the_prompt_began(speaker):
    (result,) = speaker("\u0e2a!").generate([0] * (SIZE // 2) + [1, 2], SamplingParams(max_new_tokens=2))
    assert result.text == "\u0e2a!"


def test_a_continuation_keeps_its_first_space_where_the_vocabulary_drops_that_of_a_text(speaker):
    (result,) = speaker(" day", drops_first_space=True).generate("x", SamplingParams(max_new_tokens=4))
    assert result.text == " day"


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        (("END",), "one, two: ENemy ", 19),
        (("two",), "one, ", 8),
        (("xyz", "y E", ": ", "two:"), "one, ", 9),  # "two:" ends first
        (("e",), "on", 3),
        (("after",), "one, two: ENemy END aft", 23),
    ],
)
def test_a_stop_string_ends_the_text_wherever_tokens_and_dispatches_split_it(speaker, stop, text, num_tokens):
    engine = speaker("one, two: ENemy END after")
    params = SamplingParams(max_new_tokens=23, stop=stop)
    requests = engine.requests("x", params)
    pieces = [piece for _, piece in engine.run(requests)]
    result = requests[0].result
    assert "".join(pieces) == result.text == text
    assert result.tokens == list(range(1, num_tokens + 1)) and len(result.logprobs) == num_tokens
    assert result.finish_reason == ("length" if stop == ("after",) else "stop")


def test_half_a_character_before_a_stop_token_is_not_lost_and_after_a_stop_string_is(speaker):
    engine = speaker("a\U0001f600b")
    assert engine.generate("x", SamplingParams(max_new_tokens=9, stop_tokens=(4,)))[0].text == "a\ufffd"
    assert engine.generate("x", SamplingParams(max_new_tokens=9, stop=("a",)))[0].text == ""


def test_stop_tokens_end_the_tokens_but_are_not_part_of_the_text(speaker):
    engine = speaker("abcdefghijklmnopqrstuvwxyz", stop_ids=[12])
    results = engine.generate(
        ["x"] * 4,
        [
            SamplingParams(max_new_tokens=20),
            SamplingParams(max_new_tokens=20, stop_tokens=(5, 3)),
            SamplingParams(max_new_tokens=20, ignore_eos=True),
            SamplingParams(max_new_tokens=12),
        ],
    )
    assert [result.text for result in results] == ["abcdefghijk", "ab", "abcdefghijklmnopqrst", "abcdefghijk"]
    assert [len(result.tokens) for result in results] == [12, 3, 20, 12]
    assert [result.finish_reason for result in results] == ["stop", "stop", "length", "stop"]


def test_tokens_that_only_the_model_knows_add_no_text(speaker):
    (result,) = speaker("abc").generate("x", SamplingParams(max_new_tokens=6))
    assert (result.text, result.tokens) == ("abc", [1, 2, 3, 4, 5, 6])


def test_a_prompt_that_fills_the_context_but_one_gets_one_token_and_compiles_no_decoding(successor):
    engine = Engine(successor, max_seq_len=SIZE)
    (result,) = engine.generate([1] * (SIZE - 1), SamplingParams(max_new_tokens=9))
    assert (result.tokens, result.finish_reason, engine.num_compiled) == ([2], "length", 1)
    with pytest.raises(ValueError, match=f"{SIZE} tokens, which leaves no room in a context of {SIZE}"):
        engine.generate([1] * SIZE)


def test_no_prompts_give_no_results(successor):
    assert Engine(successor).generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("", None, "the prompt is empty"),
        ([[]], None, "the prompt is empty"),
        ([1, SIZE], None, f"prompt token {SIZE} is outside the vocabulary of {SIZE}"),
        ([-1], None, "prompt token -1 is outside"),
        ("text", None, "needs a tokenizer"),
        ([{"role": "user", "content": "hi"}], None, "needs a tokenizer"),
        ([1], SamplingParams(stop=("x",)), "stop strings need a tokenizer"),
        ([[1], [2]], [SamplingParams()] * 3, "2 prompts but 3 sampling parameters"),
    ],
)
def test_what_cannot_be_continued_is_an_error_that_says_why(successor, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        Engine(successor).generate(prompts, params)


def test_a_stream_refuses_its_prompt_at_once(successor):
    engine = Engine(successor)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.stream([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 2 * SIZE + 1}, "max_seq_len=257 must be between 1 and the model's 256"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
        ({"steps_per_dispatch": 0}, "steps_per_dispatch=0"),
    ],
)
def test_an_engine_refuses_sizes_out_of_range(successor, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(successor, **options)


def test_a_tokenizer_larger_than_the_model_is_refused(successor):
    tokenizer = Tokenizer(lambda text: [0], [b"a"] * (SIZE + 1), {}, None, None, 0, frozenset())
    with pytest.raises(ValueError, match="the tokenizer has 129 tokens but the model 128"):
        Engine(successor, tokenizer)
