"""Sampling against transformers' logits warpers and against the distribution that it should draw from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from infer.sampling import SamplingParams, filter_logits, row_settings, sample

draw = jax.jit(sample)

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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, softmax(LOGITS)),
        ({"temperature": 0.5}, softmax(LOGITS / 0.5)),
        ({"temperature": 2.0}, softmax(LOGITS / 2.0)),
        ({"top_k": 2}, np.array([0.4, 0.25, 0, 0, 0, 0]) / 0.65),
        ({"top_p": 0.75}, np.array([0.4, 0.25, 0.15, 0, 0, 0]) / 0.8),
        ({"min_p": 0.2}, np.array([0.4, 0.25, 0.15, 0.1, 0, 0]) / 0.9),
    ],
    ids=["plain", "cold", "hot", "top-k", "top-p", "min-p"],
)
@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_tokens_follow_the_distribution(settings, expected, over):
    num = 20_000
    rows = row_settings([SamplingParams(**{"temperature": 1.0, "seed": 7, **settings})] * num)
    varied = np.arange(num)
    positions = varied if over == "positions" else np.zeros(num, np.int32)
    if over == "seeds":
        rows = rows._replace(seed=varied.astype(np.uint32))
    tokens, _ = draw(np.tile(LOGITS, (num, 1)), rows, positions)
    assert chi_square(np.asarray(tokens), expected) < 20.5  # the 0.999 quantile of 5 degrees of freedom


def test_a_row_draws_the_same_token_alone_and_in_any_batch():
    logits = random_logits(6)
    params = [
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9, seed=3),
        SamplingParams(temperature=1.3, top_k=20, seed=2**32 - 1),
        SamplingParams(temperature=2.0, min_p=0.01, seed=3),
        SamplingParams(temperature=1.0, seed=4),
    ]
    positions = np.array([5, 9, 5, 2, 0, 5], np.int32)
    together, _ = draw(jnp.asarray(logits), row_settings(params), positions)
    alone = [
        int(draw(jnp.asarray(logits[i : i + 1]), row_settings(params[i : i + 1]), positions[i : i + 1])[0][0])
        for i in range(len(params))
    ]
    assert np.asarray(together).tolist() == alone


def test_seed_and_position_vary_the_token():
    logits = jnp.zeros((64, 1000))
    same = row_settings([SamplingParams(temperature=1.0, seed=1)] * 64)
    seeds = same._replace(seed=np.arange(64, dtype=np.uint32))
    fixed, places = np.zeros(64, np.int32), np.arange(64, dtype=np.int32)
    assert len(set(np.asarray(draw(logits, same, fixed)[0]).tolist())) == 1
    assert len(set(np.asarray(draw(logits, seeds, fixed)[0]).tolist())) > 50
    assert len(set(np.asarray(draw(logits, same, places)[0]).tolist())) > 50


def test_temperature_zero_takes_the_likeliest_token_whatever_the_filters_and_neighbours():
    logits = random_logits(3)
    params = [SamplingParams(top_k=5, top_p=0.5, min_p=0.3), SamplingParams(), SamplingParams(temperature=1.0)]
    tokens, _ = draw(jnp.asarray(logits), row_settings(params), np.zeros(3, np.int32))
    assert np.asarray(tokens)[:2].tolist() == logits.argmax(axis=1)[:2].tolist()


def test_log_probabilities_are_the_models_own_before_temperature_and_filters():
    logits = random_logits(3)
    params = [SamplingParams(), SamplingParams(temperature=0.5, seed=1), SamplingParams(temperature=1.5, top_k=9)]
    tokens, logprobs = draw(jnp.asarray(logits), row_settings(params), np.zeros(3, np.int32))
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    # float32 near 10 is spaced by 1e-6
    np.testing.assert_allclose(logprobs, expected[np.arange(3), np.asarray(tokens)], atol=3e-6)


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
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(setting, value):
    with pytest.raises(ValueError, match=f"^{setting}=.*: expected "):
        SamplingParams(**{setting: value})
