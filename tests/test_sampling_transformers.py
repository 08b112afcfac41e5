"""Sampling against transformers: each of its logits processors on random logits, and its generate with all of them."""

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import llama_jax
from infer.engine import Engine
from infer.entry import DEMO
from infer.sampling import (
    SamplingParams,
    empty_history,
    filter_logits,
    forget,
    process,
    record,
    row_settings,
    sample,
    token_mask,
)
from llama_jax.tokenizer import load_tokenizer
from tests.reference import hf_model, save_hf
from tests.tiny import TINY

SETTINGS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 200, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.6, "top_p": 0.9},
]


def scaled_and_kept(logits: np.ndarray, settings: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, V] divided by their temperatures, and which of them ours keeps, all rows in one batch."""
    rows = row_settings([SamplingParams(**{"temperature": 1.0, **row}) for row in settings])
    scaled = logits / rows.temperature[:, None]
    return scaled, np.asarray(jax.jit(filter_logits)(scaled, rows)) > -np.inf


def kept_by_transformers(logits: np.ndarray, settings: dict) -> np.ndarray:
    """Which of logits [V] transformers keeps, its warpers in the order of its generate."""
    warpers = [TemperatureLogitsWarper(settings.get("temperature", 1.0))]
    warpers += [TopKLogitsWarper(settings["top_k"])] if "top_k" in settings else []
    warpers += [TopPLogitsWarper(settings["top_p"])] if "top_p" in settings else []
    warpers += [MinPLogitsWarper(settings["min_p"])] if "min_p" in settings else []
    scores = torch.tensor(logits)[None]
    for warper in warpers:
        scores = warper(None, scores)
    return scores[0].numpy() > -np.inf


def random_logits(rows: int, size: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (rows, size)).astype(np.float32)


def test_filters_keep_exactly_what_transformers_keeps():
    logits = random_logits(len(SETTINGS))
    _, ours = scaled_and_kept(logits, SETTINGS)
    theirs = np.stack([kept_by_transformers(*row) for row in zip(logits, SETTINGS, strict=True)])
    np.testing.assert_array_equal(ours, theirs)
    counts = ours.sum(axis=1)
    assert counts[[0, 2, 3, 4, 6, 9]].tolist() == [1000, 1, 40, 1000, 1, 1]
    assert 1 < counts[10] < counts[3] * 5  # each of the three filters took its share


@pytest.mark.parametrize("settings", [{"top_k": 40}, {"min_p": 0.05}, {"top_k": 300, "min_p": 0.2}], ids=str)
def test_tied_logits_are_kept_or_dropped_together_as_in_transformers(settings):
    logits = np.round(random_logits(1))
    _, ours = scaled_and_kept(logits, [settings])
    np.testing.assert_array_equal(ours[0], kept_by_transformers(logits[0], settings))
    assert len(set(logits[ours])) < ours.sum()


def test_top_p_keeps_the_tie_that_transformers_cuts_through():
    logits = np.round(random_logits(1))
    _, ours = scaled_and_kept(logits, [{"top_p": 0.7}])
    theirs = kept_by_transformers(logits[0], {"top_p": 0.7})
    more = logits[0][ours[0] & ~theirs]
    assert not np.any(theirs & ~ours[0])
    assert len(more) > 0 and set(more) == {logits[0][theirs].min()}


PROMPT, GENERATED, STOPS = [3, 8, 8, 990], [5, 8, 600, 5, 41], (11, 700)

# Our settings beside the processor of transformers that they stand for.
PROCESSORS = {
    "repetition penalty": (
        {"repetition_penalty": 1.3},
        lambda: transformers.RepetitionPenaltyLogitsProcessor(1.3),
    ),
    "repetition reward": ({"repetition_penalty": 0.7}, lambda: transformers.RepetitionPenaltyLogitsProcessor(0.7)),
    "bias": (
        {"logit_bias": {0: 4.5, 7: -3.25, 999: 100.0}},
        lambda: transformers.SequenceBiasLogitsProcessor({(0,): 4.5, (7,): -3.25, (999,): 100.0}),
    ),
    "suppressed tokens": (
        {"banned_tokens": (0, 31, 32, 999)},
        lambda: transformers.SuppressTokensLogitsProcessor([0, 31, 32, 999]),
    ),
    "bad words": (
        {"banned_tokens": (8, 600)},
        lambda: transformers.NoBadWordsLogitsProcessor([[8], [600]], eos_token_id=None),
    ),
    "allowed tokens": (
        {"allowed_tokens": tuple(range(0, 1000, 7))},
        lambda: transformers.PrefixConstrainedLogitsProcessor(lambda *_: list(range(0, 1000, 7)), 1),
    ),
    "min_new_tokens not yet": (
        {"min_new_tokens": 6},
        lambda: transformers.MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, torch.tensor(STOPS)),
    ),
    "min_new_tokens reached": (
        {"min_new_tokens": 5},
        lambda: transformers.MinNewTokensLengthLogitsProcessor(len(PROMPT), 5, torch.tensor(STOPS)),
    ),
}


def processed(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Logits [1, V] as ours leaves them after PROMPT and GENERATED."""
    rows = row_settings([params], stops=np.array([STOPS], np.int32), prompt_lengths=[len(PROMPT)])
    history = forget(empty_history(*logits.shape), 0, np.array(PROMPT))
    for token in GENERATED:
        history = record(history, np.array([token], np.int32))
    mask = token_mask(params, logits.shape[1])
    positions = np.array([len(PROMPT) + len(GENERATED)], np.int32)
    allowed = None if mask is None else mask[None]
    return np.asarray(jax.jit(process)(logits, rows, positions, history=history, allowed=allowed))


@pytest.mark.parametrize("rounded", [False, True], ids=["random", "with ties and zeros"])
@pytest.mark.parametrize(("settings", "processor"), PROCESSORS.values(), ids=PROCESSORS)
def test_logits_are_processed_as_transformers_does(settings, processor, rounded):
    logits = np.round(random_logits(1)) if rounded else random_logits(1)
    ours = processed(logits, SamplingParams(**settings))
    theirs = processor()(torch.tensor([PROMPT + GENERATED]), torch.tensor(logits)).numpy()
    # XLA divides by one penalty for all as a product with its reciprocal: one unit in the last place.
    np.testing.assert_allclose(ours, theirs, rtol=1.2e-7)
    assert np.any(theirs != logits) != (settings == {"min_new_tokens": 5})


def test_presence_and_frequency_penalties_are_the_formula_of_openai():
    logits = random_logits(1)
    ours = processed(logits, SamplingParams(presence_penalty=0.7, frequency_penalty=-0.4))
    expected = logits[0].copy()
    for token in set(GENERATED):  # mu - c * frequency - (c > 0) * presence, of the text and not the prompt
        expected[token] -= GENERATED.count(token) * -0.4 + 0.7
    np.testing.assert_allclose(ours[0], expected, rtol=1e-6)


# Generation.


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A transformers model, and ours of the same weights."""
    theirs = hf_model(TINY)
    theirs.generation_config.eos_token_id = None
    path = save_hf(theirs, tmp_path_factory.mktemp("hf"))
    with llama_jax.use_mesh("data=1"):
        return theirs, llama_jax.load(path)


def generated(model, prompts: np.ndarray, params: SamplingParams, stops: np.ndarray) -> list[list[int]]:
    """Greedy texts of prompts [B, T] by the full forward, with everything that params asks."""
    (num_rows, length), width = prompts.shape, prompts.shape[1] + params.max_new_tokens
    rows = row_settings([params] * num_rows, stops=np.tile(stops, (num_rows, 1)), prompt_lengths=[length] * num_rows)
    history = empty_history(num_rows, model.cfg.vocab_size)
    for row, prompt in enumerate(prompts):
        history = forget(history, row, prompt)
    mask = token_mask(params, model.cfg.vocab_size)
    allowed = None if mask is None else np.tile(mask, (num_rows, 1))
    forward = jax.jit(lambda tokens: model(tokens))
    tokens = np.zeros((num_rows, width), np.int32)
    tokens[:, :length] = prompts
    for at in range(length, width):
        logits = np.asarray(forward(tokens))[:, at - 1]
        choice = jax.jit(sample)(logits, rows, np.full(num_rows, at, np.int32), history=history, allowed=allowed)
        history = record(history, choice.tokens)
        tokens[:, at] = choice.tokens
    return tokens[:, length:].tolist()


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        (
            {"logit_bias": {5: 6.0, 9: -4.0}, "repetition_penalty": 1.2},
            {"sequence_bias": [[[5], 6.0], [[9], -4.0]], "repetition_penalty": 1.2},
        ),
        ({"banned_tokens": tuple(range(0, 128, 2))}, {"suppress_tokens": list(range(0, 128, 2))}),
        (
            {"repetition_penalty": 1.3, "banned_tokens": (1, 2), "min_new_tokens": 10, "logit_bias": {7: 3.0}},
            {
                **{"repetition_penalty": 1.3, "bad_words_ids": [[1], [2]], "min_new_tokens": 10},
                **{"sequence_bias": [[[7], 3.0]], "eos_token_id": list(range(40, 80))},
            },
        ),
    ],
    ids=["repetition", "bias and repetition", "suppressed", "everything"],
)
def test_texts_equal_transformers_generate(pair, settings, theirs):
    model, ours = pair
    prompts = np.random.default_rng(2).integers(0, TINY.vocab_size, (3, 9)).astype(np.int32)
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(prompts), attention_mask=torch.ones(prompts.shape), max_new_tokens=24, pad_token_id=0, **theirs
        )[:, 9:].tolist()
    stops = np.array(theirs.get("eos_token_id", [-1]), np.int32)
    with llama_jax.use_mesh("data=1"):
        texts = generated(ours, prompts, SamplingParams(max_new_tokens=24, **settings), stops)
    for text, other in zip(texts, expected, strict=True):
        end = next((i + 1 for i, token in enumerate(text) if token in stops), len(text))
        assert text[:end] == other[:end]
        assert end >= settings.get("min_new_tokens", len(text))


@pytest.mark.parametrize("stop", ["return", " path", ":\n", "elf.", "\n\n"], ids=repr)
def test_stop_strings_end_texts_where_transformers_does(demo, stop):
    theirs, tokenizer, engine = demo
    prompt = engine.tokenizer.encode("class Reader:\n    def __init__(self, path):\n", bos=True)
    with torch.no_grad():
        output = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=48, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
        )
    expected = output[0, len(prompt) :].tolist()
    (result,) = engine.generate(prompt, SamplingParams(max_new_tokens=48, stop=(stop,), ignore_eos=True))
    assert result.tokens == expected
    text = engine.tokenizer.decode(expected)
    assert result.text == (text[: text.find(stop)] if stop in text else text)
    assert (result.finish_reason == "stop") == (stop in text)


@pytest.fixture(scope="module")
def demo():
    """The demo in transformers, its tokenizer there, and our engine with it."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    with llama_jax.use_mesh("data=1"):
        model = llama_jax.load(DEMO, dtype="float32", layout="layers")
    return theirs, tokenizer, Engine(model, load_tokenizer(DEMO), max_batch_size=1)
