"""Speculation changes when tokens come and nothing else: texts, log-probabilities and distributions stay the same."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import infer.sizes
import llama_jax
from infer.engine import Engine
from infer.sampling import History, SamplingParams, empty_history, forget, row_settings, sample, token_mask
from infer.speculation import MAX_NGRAM, DraftModel, Ngrams, continuations
from infer.steps import RowState, _choose_all
from llama_jax.mesh import sharding_rules, use_mesh
from tests.schedules import (
    CFG,
    PAGE,
    PROMPTS,
    STEM,
    all_pages_are_free,
    assert_as_alone,
    engine,
    make_model,
    run_schedule,
)
from tests.test_sampling import LOGITS, OPTIONS, chi_square, reference


@pytest.fixture(scope="module", autouse=True)
def small_pages():
    """Eight tokens a page, and tables of two sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer.sizes, "PAGE_SIZE_ELSEWHERE", PAGE)
        patch.setattr(infer.sizes, "MIN_TABLE", 32)
        yield


# What is guessed from a text.


def continued(text: list[int], num: int) -> list[int] | None:
    """The same, one comparison at a time."""
    for length in range(min(MAX_NGRAM, len(text) - 1), 0, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[-length:]:
                return [text[end + i % (len(text) - end)] for i in range(num)]
    return None


def test_guesses_are_what_followed_the_latest_place_that_ended_alike_for_longest():
    random = np.random.default_rng(0)
    texts = random.integers(0, 5, (200, 24)).astype(np.int32)
    last = random.integers(0, 24, 200).astype(np.int32)
    guesses, counts = jax.jit(continuations, static_argnums=2)(texts, last, 5)
    for text, end, guess, count in zip(texts.tolist(), last, guesses.tolist(), counts, strict=True):
        expected = continued(text[: end + 1], 5)
        assert count == (0 if expected is None else 5)
        assert expected is None or guess == expected
    assert 0 < np.sum(np.asarray(counts) == 0) < 100


def test_a_text_of_period_two_is_guessed_to_go_on():
    guesses, counts = continuations(np.array([[1, 7, 8, 7, 8, 0, 0]], np.int32), np.array([4]), 5)
    assert (guesses.tolist(), counts.tolist()) == ([[7, 8, 7, 8, 7]], [5])


# Distributions.

NUM = 20_000
COLUMNS = np.stack([LOGITS, LOGITS[::-1], np.roll(LOGITS, 2)])  # of the token, of that after a right guess, of the last
PROMPT = [1, 2]


def checked(params: SamplingParams, guesses: np.ndarray) -> np.ndarray:
    """Tokens [NUM, 3] of rows of all seeds whose guesses [NUM, 2] were checked, -1 after the first wrong one."""
    with use_mesh("data=1"):
        rules = sharding_rules(CFG)
        model = SimpleNamespace(rules=rules, cfg=SimpleNamespace(vocab_size=6), unembed=lambda hidden: hidden)
        settings = jax.tree.map(lambda x: np.repeat(x, NUM, axis=0), row_settings([params]))
        settings = settings._replace(seed=np.arange(NUM, dtype=np.uint32))
        ones = np.ones(NUM, np.int32)
        state = RowState(ones, ones, 9 * ones, settings, -ones)
        history = forget(empty_history(1, 6), 0, np.array(PROMPT))
        history = History(*(np.repeat(x, NUM, axis=0) for x in history)) if params.needs_history else None
        mask = token_mask(params, 6)
        allowed = None if mask is None else np.tile(mask, (NUM, 1))
        tokens = np.concatenate([ones[:, None], guesses], axis=1).astype(np.int32)
        logits = jax.numpy.tile(COLUMNS, (NUM, 1, 1))
        run = jax.jit(lambda *args: _choose_all(model, *args)[2].tokens)
        return np.asarray(run(logits, tokens, state, history, allowed))


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=OPTIONS)
def test_tokens_follow_the_models_distribution_whatever_was_guessed(settings, monkeypatch):
    monkeypatch.setattr("infer.steps.MAX_LOGPROBS", 3)  # of six tokens
    params = SamplingParams(**{"temperature": 1.0, **settings})
    guess = next(token for token in (1, 0, 4) if reference(settings | {"temperature": 1.0}, PROMPT)[token] > 0.05)
    tokens = checked(params, np.full((NUM, 2), guess))
    before: list[int] = []
    for column, logits in enumerate(COLUMNS):
        monkeypatch.setattr("tests.test_sampling.LOGITS", logits)
        there = tokens[:, column] >= 0
        assert np.all(there == np.all(tokens[:, :column] == guess, axis=1))
        expected = reference(dataclasses.asdict(params), PROMPT, before)
        assert chi_square(tokens[there, column], expected) < 20.5  # the 0.999 quantile of 5 degrees of freedom
        before.append(guess)


def test_guesses_with_the_noise_of_the_model_are_right_more_often_and_bias_nothing():
    params = SamplingParams(temperature=1.0)
    settings = jax.tree.map(lambda x: np.repeat(x, NUM, axis=0), row_settings([params]))
    settings = settings._replace(seed=np.arange(NUM, dtype=np.uint32))
    other = LOGITS + np.array([0.5, -0.5, 0.2, 0.3, -0.4, 0.1], np.float32)
    draft, target = softmax(other), softmax(LOGITS)
    guesses = np.asarray(sample(np.tile(other, (NUM, 1)), settings, np.full(NUM, 2)).tokens)
    tokens = checked(params, np.stack([guesses, guesses], axis=1))
    assert chi_square(tokens[:, 0], target) < 20.5
    right = tokens[:, 0] == guesses
    assert chi_square(tokens[right, 1], softmax(COLUMNS[1])) < 20.5
    assert np.mean(right) > np.sum(draft * target) + 0.2  # independent noise; at best it is 1 - the distance of the two


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def test_the_engine_draws_from_the_models_own_distribution():
    num, under_test, settings = 800, engine(64, 16, guesses="draft"), {"temperature": 9.0, "top_k": 6}
    all_params = [SamplingParams(max_new_tokens=3, seed=seed, **settings) for seed in range(num)]
    results = under_test.generate([STEM[:7]] * num, all_params)
    second = np.array([result.tokens[1] for result in results])
    with llama_jax.use_mesh("data=1"):
        after = np.array([[*STEM[:7], token] for token in range(40)])
        logits = np.asarray(make_model()(after))
    probs = [filtered(logits[0, 6]), *(filtered(row[7]) for row in logits)]
    expected = sum(probs[0][token] * probs[1 + token] for token in range(40))
    likely = expected * num >= 5
    rest = np.where(likely, np.arange(40), 40)[second]
    counts = np.bincount(rest, minlength=41)[[*np.flatnonzero(likely), 40]]
    wanted = np.array([*expected[likely], expected[~likely].sum()]) * num
    statistic = np.sum((counts - wanted)[wanted > 0] ** 2 / wanted[wanted > 0])
    freedom = len(counts) - 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations
    measured = under_test.throughput
    assert 0.1 < measured.accepted_tokens / measured.draft_tokens < 1


def filtered(logits: np.ndarray) -> np.ndarray:
    """The probabilities of the 6 likeliest tokens at temperature 9."""
    return softmax(np.where(logits >= np.sort(logits)[-6], logits / 9.0, -np.inf))


# Texts.

KINDS = [
    SamplingParams(max_new_tokens=18),
    SamplingParams(max_new_tokens=20, temperature=1.0, seed=5),
    SamplingParams(max_new_tokens=15, temperature=4.0, top_k=9, top_p=0.9, min_p=0.02, seed=2),
    SamplingParams(max_new_tokens=16, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=-0.5),
    SamplingParams(max_new_tokens=12, logprobs=3, temperature=2.0, seed=9),
    SamplingParams(max_new_tokens=12, allowed_tokens=(3, 4, 5, 6), banned_tokens=(4,), logit_bias={5: 2.0}),
    SamplingParams(max_new_tokens=14, stop_tokens=tuple(range(0, 40, 2)), min_new_tokens=6),
    SamplingParams(max_new_tokens=9, prompt_logprobs=1),
]


@pytest.mark.parametrize("guesses", ["ngram", "draft"])
def test_every_setting_gives_the_tokens_and_log_probabilities_of_no_speculation(guesses):
    prompts = [STEM[:9], [5, 6] * 8, STEM[:17], [7] * 12, STEM[:8], [1, 2, 3] * 5, STEM[:16], STEM[:30]]
    expected = engine(64, 16).generate(prompts, KINDS)
    under_test = engine(64, 16, guesses=guesses)
    for ours, other in zip(under_test.generate(prompts, KINDS), expected, strict=True):
        assert (ours.tokens, ours.finish_reason) == (other.tokens, other.finish_reason)
        # Weights off by 1e-7 move them by 9e-5, and those of unlikely tokens in proportion.
        np.testing.assert_allclose(ours.logprobs, other.logprobs, rtol=5e-5, atol=2e-4)
        assert [[t for t, _ in place] for place in ours.top_logprobs] == [
            [t for t, _ in place] for place in other.top_logprobs
        ]
    assert under_test.stats().accepted_tokens > 10 and all_pages_are_free(under_test)


class Countdown:
    """A constraint whose only text is 5 4 3 2 1."""

    def __init__(self):
        self.next = 5

    def mask(self) -> np.ndarray:
        return np.array([1 << self.next, 0], np.uint32)

    def accept(self, token: int) -> bool:
        fits, self.next = token == self.next, self.next - 1
        return fits

    @property
    def finished(self) -> bool:
        return self.next == 0


@pytest.mark.parametrize("guesses", ["ngram", "draft"])
def test_a_constrained_text_is_not_guessed_and_others_beside_it_are(guesses):
    under_test = engine(64, 16, guesses=guesses)
    constrained, plain = under_test.requests([STEM[:9], [7] * 12], SamplingParams(max_new_tokens=12))
    constrained.constraint = Countdown()
    before = under_test.stats().draft_tokens
    for request in (plain, constrained):
        under_test.add(request)
    while under_test.has_work and constrained.unfinished:
        under_test.step()
    assert under_test.stats().draft_tokens > before
    while under_test.has_work:
        under_test.step()
    assert (constrained.result.tokens, constrained.result.finish_reason) == ([5, 4, 3, 2, 1], "stop")
    assert_as_alone([plain])


def test_a_draft_that_is_the_model_is_always_right_after_found_prefixes_preemption_and_chunks_too():
    page = 2 * PAGE * CFG.cache_bytes_per_token(bytes_per_value=4)
    under_test = Engine(
        make_model(),
        max_batch_size=4,
        steps_per_dispatch=3,
        cache=infer.sizes.CacheOptions(num_bytes=10 * page, prefill_chunk=16),
        speculation=DraftModel(make_model(), 3),
    )
    for _ in range(2):
        requests = [(0, prompt, SamplingParams(max_new_tokens=40), None) for prompt in PROMPTS]
        assert_as_alone(run_schedule(under_test, requests))
    stats = under_test.stats()
    assert stats.preemptions > 0 and stats.prefix_hit_tokens > 0
    assert stats.accepted_tokens == stats.draft_tokens > 150


def test_pages_of_a_text_with_wrong_guesses_are_found_with_right_tokens_alone():
    under_test, settings = engine(64, 16, guesses="draft"), SamplingParams(max_new_tokens=24)
    (first,) = run_schedule(under_test, [(0, [9, 9, 1], settings, None)])
    more = [*first.result.prompt_tokens, *first.result.tokens, 4]
    (second,) = run_schedule(under_test, [(0, more, settings, None)])
    whole = engine(64, 64, steps=8, max_batch_size=1, share_prefixes=False).generate(more, settings)[0]
    assert second.result.cached_tokens == 24 and second.result.tokens == whole.tokens
    np.testing.assert_allclose(second.result.logprobs, whole.logprobs, atol=2e-4)


def test_with_a_narrow_cache_too_speculation_changes_no_token():
    plain, under_test = (engine(64, 16, guesses=guesses, dtype="int8") for guesses in (None, "ngram"))
    prompts, settings = [[7] * 12, [1, 2, 3] * 5], SamplingParams(max_new_tokens=10)
    expected = [result.tokens for result in plain.generate(prompts, settings)]
    assert [result.tokens for result in under_test.generate(prompts, settings)] == expected


@pytest.mark.parametrize(("guesses", "spec"), [("draft", "context=2,tensor=4"), ("ngram", "data=2,tensor=4")])
def test_speculation_gives_the_same_tokens_on_every_mesh(guesses, spec):
    settings = [SamplingParams(max_new_tokens=12, temperature=float(i % 2), seed=i) for i in range(len(PROMPTS))]
    arrivals = [(i % 2, prompt, settings[i], None) for i, prompt in enumerate(PROMPTS)]
    under_test = engine(16, 16, spec, guesses, max_batch_size=2)
    assert_as_alone(run_schedule(under_test, arrivals))
    assert all_pages_are_free(under_test) and under_test.stats().accepted_tokens > 0


def test_after_warmup_nothing_compiles():
    under_test = engine(6, 16, guesses="draft", max_batch_size=1, max_seq_len=32)
    under_test.warmup()
    before = under_test.stats().compilations
    penalized = SamplingParams(max_new_tokens=5, repetition_penalty=1.3, logprobs=2, banned_tokens=(1,))
    plain = SamplingParams(max_new_tokens=20)
    run_schedule(under_test, [(i % 3, prompt, (plain, penalized)[i % 2], None) for i, prompt in enumerate(PROMPTS[:7])])
    assert under_test.stats().compilations == before


# What is counted and refused.


def test_what_was_guessed_and_accepted_is_counted():
    under_test = engine(64, 16, guesses="ngram")
    before = under_test.stats()
    (result,) = under_test.generate([3, 3, 3, 3], SamplingParams(max_new_tokens=16, allowed_tokens=(3,)))
    assert result.tokens == [3] * 16
    measured = under_test.throughput
    assert measured.draft_tokens == measured.accepted_tokens == 10  # of 15 tokens in steps of three
    assert "100% of 10 draft tokens accepted, compiled" in str(measured)
    assert under_test.stats().draft_tokens == before.draft_tokens + 10
    assert "draft" not in str(engine(64, 16).throughput)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 41}, "the draft has a vocabulary of 41 tokens and the model of 40"),
        ({"max_seq_len": 32}, "the draft has a context of 32 tokens and 64 are served; use max_seq_len=32"),
    ],
)
def test_a_draft_that_does_not_belong_to_the_model_is_refused(change, said):
    draft = SimpleNamespace(cfg=dataclasses.replace(CFG, **change))
    with pytest.raises(ValueError, match=said):
        Engine(make_model(), speculation=DraftModel(draft))


@pytest.mark.parametrize("num_tokens", [0, 33])
@pytest.mark.parametrize("make", [Ngrams, lambda num: DraftModel(None, num)], ids=["ngram", "draft"])
def test_a_number_of_guesses_out_of_range_is_refused(make, num_tokens):
    with pytest.raises(ValueError, match=f"num_draft_tokens={num_tokens}: expected 1 to 32"):
        make(num_tokens)


def test_a_draft_takes_its_share_of_the_cache():
    page = PAGE * CFG.cache_bytes_per_token(bytes_per_value=4)
    cache = infer.sizes.CacheOptions(num_bytes=2 * page)
    with_draft = Engine(make_model(), cache=cache, speculation=DraftModel(make_model()))
    assert (Engine(make_model(), cache=cache).max_seq_len, with_draft.max_seq_len) == (2 * PAGE, PAGE)
