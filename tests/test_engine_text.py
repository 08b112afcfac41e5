"""What the engine makes of tokens: text that is cut rightly, and errors that say what is wrong.

The model says token i + 1 after token i, and each token is one byte of a text.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tokenizers import decoders, pre_tokenizers

import llama_jax
from infer.engine import Engine
from infer.request import Request, Result
from infer.sampling import SamplingParams
from llama_jax.config import LlamaConfig
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer, load_tokenizer

HELLO = "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 "  # Thai, Hindi
HELLO += "\U0001f468\u200d\U0001f469\u200d\U0001f467"  # three people joined into one family

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
