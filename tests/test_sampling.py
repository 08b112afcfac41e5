"""Sampling against the distribution that it should draw from, written in numpy, and against itself in other batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, reshard

import llama_jax
from infer.sampling import (
    MAX_LOGIT_BIAS,
    History,
    SamplingParams,
    best_first,
    empty_history,
    filter_logits,
    forget,
    process,
    record,
    row_settings,
    sample,
    token_logprobs,
    token_mask,
)

draw = jax.jit(sample, static_argnames="num_logprobs")


def random_logits(rows: int, size: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 3, (rows, size)).astype(np.float32)


def bits(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def test_kept_logits_are_not_changed():
    logits = random_logits(2)
    rows = row_settings([SamplingParams(top_k=50), SamplingParams(top_p=0.5)])
    filtered = np.asarray(filter_logits(jnp.asarray(logits), rows))
    np.testing.assert_array_equal(filtered[filtered > -np.inf], logits[filtered > -np.inf])


def chi_square(tokens: np.ndarray, probs: np.ndarray) -> float:
    """The statistic of drawn tokens; a token of probability 0 makes it infinite."""
    counts, expected = np.bincount(tokens, minlength=len(probs)), probs * len(tokens)
    assert np.all(counts[expected == 0] == 0)
    return float(np.sum((counts - expected)[expected > 0] ** 2 / expected[expected > 0]))


LOGITS = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04], np.float32))


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def reference(settings: dict, prompt=(), generated=()) -> np.ndarray:
    """What LOGITS should be drawn by, in float64 and with a sort: probabilities [V]."""
    p = SamplingParams(**settings)
    x, counts = LOGITS.astype(np.float64), np.bincount(np.array(generated, int), minlength=len(LOGITS))
    for token, bias in p.logit_bias.items():
        x[token] += bias
    seen = (counts > 0) | np.isin(np.arange(len(x)), prompt)
    x = np.where(seen, np.where(x < 0, x * p.repetition_penalty, x / p.repetition_penalty), x)
    x -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
    x[[t for t in range(len(x)) if t in p.banned_tokens or (p.allowed_tokens and t not in p.allowed_tokens)]] = -np.inf
    x /= p.temperature
    order = np.argsort(-x, kind="stable")
    x[order[p.top_k or len(x) :]] = -np.inf
    before = np.cumsum(softmax(x)[order]) - softmax(x)[order]
    x[order[(before >= p.top_p) & (p.top_p < 1)]] = -np.inf
    x[softmax(x) < p.min_p * softmax(x).max()] = -np.inf
    return softmax(x)


OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.75},
    "min-p": {"min_p": 0.2},
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.3},
    "frequency": {"frequency_penalty": 0.6},
    "reward": {"presence_penalty": -0.7, "frequency_penalty": -0.2, "repetition_penalty": 0.8},
    "bias": {"logit_bias": {5: 2.0, 0: -1.0}},
    "allowed": {"allowed_tokens": (1, 3, 4)},
    "banned": {"banned_tokens": (0, 3)},
    "all": {
        **{"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "banned_tokens": (3,), "logit_bias": {4: 1.5}},
        **{"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    },
}


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_tokens_follow_the_distribution(settings, over):
    num, prompt, generated = 20_000, [1, 2], [0, 2, 0, 0, 4]
    params = SamplingParams(**{"temperature": 1.0, "seed": 7, **settings})
    rows = jax.tree.map(lambda x: np.repeat(x, num, axis=0), row_settings([params]))
    varied = np.arange(num)
    positions = varied if over == "positions" else np.zeros(num, np.int32)
    if over == "seeds":
        rows = rows._replace(seed=varied.astype(np.uint32))
    mask = token_mask(params, len(LOGITS))
    allowed = None if mask is None else np.tile(mask, (num, 1))
    history = forget(empty_history(1, len(LOGITS)), 0, np.array(prompt), np.array(generated))
    history = jax.tree.map(lambda x: np.repeat(x, num, axis=0), history) if params.needs_history else None
    tokens = draw(np.tile(LOGITS, (num, 1)), rows, positions, history=history, allowed=allowed).tokens
    expected = reference(dataclasses.asdict(params), prompt, generated)
    assert chi_square(np.asarray(tokens), expected) < 20.5  # the 0.999 quantile of 5 degrees of freedom


def test_a_token_without_probability_never_comes():
    num = 4096
    logits = np.where(np.arange(3000) % 700 == 699, 0.0, -np.inf).astype(np.float32)  # 4 tokens in 4 blocks
    rows = row_settings([SamplingParams(temperature=1.0)] * num)._replace(seed=np.arange(num, dtype=np.uint32))
    tokens = np.asarray(draw(np.tile(logits, (num, 1)), rows, np.zeros(num, np.int32)).tokens)
    counts = np.bincount(tokens, minlength=3000)
    assert set(np.flatnonzero(counts)) == {699, 1399, 2099, 2799}
    assert chi_square(tokens, softmax(logits)) < 16.3  # 3 degrees of freedom


BATCH = [
    SamplingParams(temperature=1.0, seed=3),
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.9, seed=3),
    SamplingParams(temperature=1.3, top_k=20, seed=2**32 - 1),
    SamplingParams(temperature=2.0, min_p=0.01, seed=3),
    SamplingParams(temperature=1.0, seed=4, logit_bias={7: 3.0}, frequency_penalty=0.5),
    SamplingParams(repetition_penalty=1.5, min_new_tokens=9),
    SamplingParams(temperature=1.0, top_p=0.5, allowed_tokens=tuple(range(0, 1000, 3)), presence_penalty=1.0),
]


def batch() -> tuple:
    """Logits, settings, positions, history and allowed tokens of BATCH."""
    logits, random = random_logits(len(BATCH)), np.random.default_rng(1)
    best = np.argsort(-logits)[:, :2].astype(np.int32)
    rows = row_settings(BATCH, stops=best, prompt_lengths=[2] * len(BATCH))
    counts, in_prompt = random.integers(0, 2, logits.shape).astype(np.int32), random.random(logits.shape) < 0.3
    everything = np.full(-(-logits.shape[1] // 32), 2**32 - 1, np.uint32)
    masks = [token_mask(row, logits.shape[1]) for row in BATCH]
    allowed = np.stack([everything if mask is None else mask for mask in masks])
    return logits, rows, np.array([5, 9, 5, 2, 0, 5, 10, 3], np.int32), History(counts, in_prompt), allowed


def drawn(logits, rows, positions, history, allowed, **options):
    return draw(logits, rows, positions, history=history, allowed=allowed, **options)


@pytest.mark.parametrize("order", [[3], [7], [0, 6], [7, 6, 5, 4, 3, 2, 1, 0], [2, 2, 5, 1]], ids=str)
def test_a_row_draws_the_same_token_alone_and_in_any_batch(order):
    together = np.asarray(drawn(*batch()).tokens)
    chosen = drawn(*jax.tree.map(lambda x: x[np.array(order)], batch())).tokens
    assert np.asarray(chosen).tolist() == together[order].tolist()


def test_a_batch_split_over_devices_draws_the_same_tokens():
    expected = drawn(*batch(), num_logprobs=3)
    with llama_jax.use_mesh("data=8"):
        split = jax.tree.map(lambda x: reshard(x, PartitionSpec("data")), batch())
        ours = drawn(*split, num_logprobs=3)
        history = jax.jit(record)(split[3], ours.tokens)
    np.testing.assert_array_equal(ours.tokens, expected.tokens)
    np.testing.assert_array_equal(ours.top_tokens, expected.top_tokens)
    np.testing.assert_array_equal(history.counts, record(batch()[3], expected.tokens).counts)


def test_seed_and_position_vary_the_token():
    logits = jnp.zeros((64, 1000))
    same = row_settings([SamplingParams(temperature=1.0, seed=1)] * 64)
    seeds = same._replace(seed=np.arange(64, dtype=np.uint32))
    fixed, places = np.zeros(64, np.int32), np.arange(64, dtype=np.int32)
    assert len(set(np.asarray(draw(logits, same, fixed).tokens).tolist())) == 1
    assert len(set(np.asarray(draw(logits, seeds, fixed).tokens).tolist())) > 50
    assert len(set(np.asarray(draw(logits, same, places).tokens).tolist())) > 50


def test_temperature_zero_takes_the_likeliest_token_whatever_the_filters_and_neighbours():
    logits = random_logits(3)
    params = [SamplingParams(top_k=5, top_p=0.5, min_p=0.3), SamplingParams(), SamplingParams(temperature=1.0)]
    tokens = draw(jnp.asarray(logits), row_settings(params), np.zeros(3, np.int32)).tokens
    assert np.asarray(tokens)[:2].tolist() == logits.argmax(axis=1)[:2].tolist()


def test_log_probabilities_are_the_models_own_before_temperature_and_filters():
    logits = random_logits(3)
    params = [SamplingParams(), SamplingParams(temperature=0.5, seed=1), SamplingParams(temperature=1.5, top_k=9)]
    choice = draw(jnp.asarray(logits), row_settings(params), np.zeros(3, np.int32), num_logprobs=4)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    # float32 near 10 is spaced by 1e-6
    np.testing.assert_allclose(choice.logprobs, expected[np.arange(3), np.asarray(choice.tokens)], atol=3e-6)
    np.testing.assert_array_equal(choice.top_tokens, np.argsort(-logits, axis=1)[:, :4])
    np.testing.assert_allclose(choice.top_logprobs, -np.sort(-expected, axis=1)[:, :4], atol=3e-6)


def test_log_probabilities_of_a_whole_text_are_those_of_each_position():
    logits, tokens = random_logits(6).reshape(2, 3, 1000), np.array([[1, 2, 3], [999, 0, 5]], np.int32)
    told = token_logprobs(logits, tokens, 2)
    each = [token_logprobs(logits[i, t], tokens[i, t], 2) for i in range(2) for t in range(3)]
    for whole, parts in zip(told, zip(*each, strict=True), strict=True):
        np.testing.assert_allclose(whole.reshape(6, -1), np.array(parts).reshape(6, -1), atol=1e-6)


def test_stop_tokens_are_banned_until_the_least_number_of_tokens_is_there():
    params = [SamplingParams(min_new_tokens=3), SamplingParams(min_new_tokens=2), SamplingParams()]
    stops = np.array([[4, 2, -1]] * 3, np.int32)
    rows = row_settings(params, stops=stops, prompt_lengths=[10, 20, 30])
    for new, banned in enumerate([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 0]]):
        positions = np.array([10, 20, 30], np.int32) + new
        processed = np.asarray(process(jnp.zeros((3, 6)), rows, positions))
        expected = np.zeros((3, 6))
        expected[:, [2, 4]] = np.where(np.array(banned)[:, None], -np.inf, 0)
        np.testing.assert_array_equal(processed, expected)


# What a row holds.


def test_history_counts_what_is_recorded_and_forgets_a_row_alone():
    history = empty_history(3, 5)
    history = forget(history, 0, np.array([1, 1, 4, -1]))
    history = forget(history, 2, np.array([-1, -1]), np.array([2, 2, 0, -1]))
    history = jax.jit(record)(history, np.array([3, -1, 2], np.int32))
    assert history.counts.tolist() == [[0, 0, 0, 1, 0], [0] * 5, [1, 0, 3, 0, 0]]
    assert np.asarray(history.in_prompt).astype(int).tolist() == [[0, 1, 0, 0, 1], [0] * 5, [0] * 5]
    history = jax.jit(forget)(history, 2, np.array([0]))
    assert history.counts.tolist() == [[0, 0, 0, 1, 0], [0] * 5, [0] * 5]
    assert np.asarray(history.in_prompt).astype(int).tolist() == [[0, 1, 0, 0, 1], [0] * 5, [1, 0, 0, 0, 0]]


def test_a_donated_history_is_updated_where_it_lies():
    program = jax.jit(record, donate_argnums=0).lower(empty_history(4, 5000), np.zeros(4, np.int32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1000


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, None),
        ({"banned_tokens": (0, 33, 500)}, [t for t in range(70) if t not in (0, 33)]),
        ({"allowed_tokens": (1, 32, 69, 70)}, [1, 32, 69]),
        ({"allowed_tokens": (1, 2, 3), "banned_tokens": (2,)}, [1, 3]),
    ],
    ids=str,
)
def test_the_mask_has_a_bit_for_each_token_that_may_come(settings, expected):
    mask = token_mask(SamplingParams(**settings), 70)
    assert (mask if mask is None else bits(mask)) == expected


def test_a_mask_without_a_token_is_refused():
    with pytest.raises(ValueError, match="leave no token"):
        token_mask(SamplingParams(allowed_tokens=(3,), banned_tokens=(3,)), 70)


# Several texts of one prompt.


def test_candidates_are_what_the_following_seeds_give_alone():
    params = SamplingParams(temperature=1.0, seed=2**32 - 2, n=2, best_of=3)
    assert [p.seed for p in params.candidates()] == [2**32 - 2, 2**32 - 1, 0]
    assert {dataclasses.replace(p, seed=0) for p in params.candidates()} == {SamplingParams(temperature=1.0)}
    assert SamplingParams(seed=5).candidates() == [SamplingParams(seed=5)]


def test_the_best_text_has_the_highest_mean_log_probability():
    assert best_first([[-3.0], [-1.0, -2.0, -1.5], [-1.0, -1.0]]) == [2, 1, 0]


# Settings.


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", ("a", "")),
        ("stop", "abc"),
        ("stop_tokens", (-1,)),
        ("min_new_tokens", 129),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: float("-inf")}),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)),
        ("allowed_tokens", (2**31,)),
        ("banned_tokens", (-5,)),
        ("n", 0),
        ("best_of", 0),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(setting, value):
    with pytest.raises(ValueError, match=f"^{setting}=.*: expected "):
        SamplingParams(**{setting: value})
