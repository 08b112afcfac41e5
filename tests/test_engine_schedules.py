"""Whatever arrives when, and however little room there is: each request gets the tokens that it gets alone."""

import contextlib
import random

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

import infer.sizes
import llama_jax
from infer.engine import Engine
from infer.sampling import SamplingParams
from infer.sizes import CacheOptions
from tests.schedules import (
    CFG,
    PAGE,
    PROMPTS,
    STEM,
    all_pages_are_free,
    alone,
    arrival,
    assert_as_alone,
    engine,
    make_model,
    run_schedule,
)


@pytest.fixture(scope="module", autouse=True)
def small_pages():
    """Eight tokens a page, and tables of two sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer.sizes, "PAGE_SIZE_ELSEWHERE", PAGE)
        patch.setattr(infer.sizes, "MIN_TABLE", 32)
        yield


# Room for one long request and a bit, for two, for all; chunks shorter than a page, and as long as two.
# With guesses of both kinds, too.
ENGINES = [
    (8, 16, None),
    (12, 16, None),
    (12, 5, None),
    (64, 16, None),
    (10, 16, "ngram"),
    (10, 16, "draft"),
]


@pytest.mark.parametrize(("pages", "chunk", "guesses"), ENGINES)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(arrivals=strategies.lists(arrival, min_size=1, max_size=9))
def test_every_schedule_gives_each_request_the_tokens_that_it_gets_alone(pages, chunk, guesses, arrivals):
    under_test = engine(pages, chunk, guesses=guesses)
    assert_as_alone(run_schedule(under_test, arrivals))
    assert all_pages_are_free(under_test)


@pytest.mark.parametrize("num_requests", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("guesses", [None, "draft"])
def test_random_requests_with_cancellations_leave_every_page_free(guesses, num_requests):
    draw, under_test = random.Random(num_requests), engine(10 if guesses else 8, 16, guesses=guesses)
    live, sent = [], 0
    while sent < num_requests or under_test.has_work:
        while sent < num_requests and len(live) < 9:
            prompt = [draw.randrange(3) for _ in range(draw.randint(1, 30))]
            settings = SamplingParams(max_new_tokens=draw.randint(1, 30), temperature=draw.choice([0.0, 1.0]))
            live += under_test.requests([prompt], settings)
            under_test.add(live[-1])
            sent += 1
        under_test.step()
        if live and draw.random() < 0.3:
            under_test.abort(draw.choice(live))
        live = [request for request in live if request.unfinished]
    assert all_pages_are_free(under_test)


@pytest.mark.parametrize(("pages", "chunk", "guesses"), ENGINES)
def test_schedules_were_hard_enough(pages, chunk, guesses):
    """Of the engines above, run before this one."""
    stats = engine(pages, chunk, guesses=guesses).stats()
    if stats.prompt_tokens < 1000:
        pytest.skip("its schedules ran in another process, or not at all")
    if pages == 8:
        assert stats.preemptions > 5
    if pages == 64:
        assert stats.prefix_hit_tokens > 100
    if guesses:
        assert 100 < stats.accepted_tokens < stats.draft_tokens
    assert stats.compilations < 40


@pytest.mark.parametrize("spec", ["data=2,tensor=4", "context=2,tensor=4", "data=2,context=4", "fsdp=8"])
def test_a_schedule_gives_the_same_tokens_greedy_and_by_seed_on_every_mesh(spec):
    settings = [SamplingParams(max_new_tokens=12, temperature=i % 2, seed=i) for i in range(len(PROMPTS))]
    arrivals = [(i % 2, prompt, settings[i], None) for i, prompt in enumerate(PROMPTS)]
    under_test = engine(12, 16, spec, max_batch_size=2)
    for request in run_schedule(under_test, arrivals):
        assert request.result.tokens == list(alone(tuple(request.result.prompt_tokens), request.params))
    assert all_pages_are_free(under_test)


def test_a_prompt_from_the_cache_has_the_log_probabilities_of_one_that_is_computed():
    under_test, settings = engine(64, 16), SamplingParams(max_new_tokens=6)
    whole = engine(64, 64, steps=8, max_batch_size=1, share_prefixes=False).generate(STEM[:36] + [1], settings)[0]
    under_test.generate(STEM[:40], SamplingParams(max_new_tokens=1))
    (found,) = under_test.generate(STEM[:36] + [1], settings)
    assert (whole.cached_tokens, found.cached_tokens) == (0, 32)
    np.testing.assert_allclose(found.logprobs, whole.logprobs, atol=2e-5)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_with_a_narrow_cache_too_a_batch_gives_what_each_request_gets_alone(dtype):
    under_test, settings = engine(64, 16, dtype=dtype), SamplingParams(max_new_tokens=8)
    together = under_test.generate(PROMPTS, settings)
    for result in together:
        assert under_test.generate(result.prompt_tokens, settings)[0].tokens == result.tokens
    exact = [alone(tuple(prompt), settings) for prompt in PROMPTS]
    alike = [np.cumprod(np.equal(result.tokens, tokens)).sum() for result, tokens in zip(together, exact, strict=True)]
    assert sum(alike) > 0.5 * 8 * len(PROMPTS)  # a text that rounding has changed once goes its own way


@contextlib.contextmanager
def compilations():
    """What jax compiles, or fetches compiled, while the block runs."""
    seen = []

    def listener(event: str, seconds: float, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_after_warmup_nothing_compiles():
    under_test = engine(6, 16, max_batch_size=1, max_seq_len=32)
    with compilations() as seen:
        under_test.warmup()
    before = under_test.stats().compilations
    assert len(seen) >= before > 0
    penalized = SamplingParams(max_new_tokens=5, repetition_penalty=1.3, logprobs=2, banned_tokens=(1,))
    plain, told = SamplingParams(max_new_tokens=20), SamplingParams(max_new_tokens=2, prompt_logprobs=1)
    settings = (plain, penalized, told)
    with compilations() as seen:
        run_schedule(under_test, [(i % 2, PROMPTS[i % 7], settings[i % 3], None) for i in range(21)])
        for length in (1, 17, 32):
            under_test.embed([3] * length)
    assert (under_test.stats().compilations, seen) == (before, [])


def test_warmup_runs_every_program_and_leaves_nothing_behind(monkeypatch):
    monkeypatch.setattr("infer.warm._SECONDS", float("inf"))
    under_test = engine(6, 16, max_batch_size=1, max_seq_len=32)
    programs, settings, run = under_test._rounds.programs, SamplingParams(max_new_tokens=12), []
    under_test.warmup()
    for request in run_schedule(under_test, [(0, prompt, settings, None) for prompt in PROMPTS[:4]]):
        assert request.result.tokens == list(alone(tuple(request.result.prompt_tokens), settings))
    assert all_pages_are_free(under_test)

    class Recorded(dict):
        def __getitem__(self, key):
            run.append(key)
            return super().__getitem__(key)

    programs.compiled = Recorded(programs.compiled)
    under_test.warmup()
    assert {*run} == {key for key in programs.compiled if key[0] is not programs._embed}
    assert all_pages_are_free(under_test)
    assert not np.asarray(programs._held.state.left).any()
    run.clear()
    monkeypatch.setattr("infer.warm._SECONDS", -1.0)  # which have passed
    under_test.warmup()
    assert {key[0] for key in run} == {programs._remember}


def test_warmup_beside_requests_runs_nothing_and_they_go_on():
    under_test, settings = engine(6, 16, max_batch_size=1, max_seq_len=32), SamplingParams(max_new_tokens=12)
    (request,) = under_test.requests([PROMPTS[0]], [settings])
    under_test.add(request)
    for _ in range(3):
        under_test.step()
    assert under_test.has_work and request.result.tokens
    under_test.warmup()
    while under_test.has_work:
        under_test.step()
    assert request.result.tokens == list(alone(tuple(PROMPTS[0]), settings))
    assert all_pages_are_free(under_test)


def test_where_memory_is_short_no_dispatch_gathers_more_pages_than_there_is_room_for(monkeypatch):
    page_bytes = PAGE * CFG.cache_bytes_per_token(bytes_per_value=4)
    monkeypatch.setattr("infer.programs.bytes_for_pages", lambda *_, **__: 12 * page_bytes)
    under_test = Engine(make_model(), max_batch_size=4, steps_per_dispatch=3, cache=CacheOptions(prefill_chunk=16))
    under_test.warmup()
    before, programs, sizes = under_test.num_compiled, under_test._rounds.programs, []
    for name in ("prefill", "decode"):
        run = getattr(programs, name)

        def recorded(*args, run=run, **options):
            sizes.append(next(arg.table.size for arg in args if hasattr(arg, "table")))
            return run(*args, **options)

        monkeypatch.setattr(programs, name, recorded)
    settings = SamplingParams(max_new_tokens=12)
    for request in run_schedule(under_test, [(0, prompt, settings, None) for prompt in PROMPTS]):
        assert request.result.tokens == list(alone(tuple(request.result.prompt_tokens), settings))
    assert 8 <= max(sizes) <= 12 and under_test.num_compiled == before
    assert all_pages_are_free(under_test)


# What only some requests ask for, beside those that do not.


def beside(settings: SamplingParams, prompt=STEM[:9]):
    """The result of a request that runs beside plain ones, which get what they get alone."""
    under_test = engine(64, 16)
    plain = SamplingParams(max_new_tokens=10)
    requests = run_schedule(
        under_test, [(0, PROMPTS[5], plain, None), (0, prompt, settings, None), (2, [1], plain, None)]
    )
    for request in (requests[0], requests[2]):
        assert request.result.tokens == list(alone(tuple(request.result.prompt_tokens), plain))
    return requests[1].result


def logits_after(tokens: list[int]) -> np.ndarray:
    with llama_jax.use_mesh("data=1"):
        return np.asarray(make_model("data=1")(np.array([tokens])))[0]


def test_a_repetition_penalty_knows_the_prompt_and_what_came_after_it():
    result = beside(SamplingParams(max_new_tokens=8, repetition_penalty=1.9))
    tokens = result.prompt_tokens + result.tokens
    for end in range(len(result.prompt_tokens), len(tokens)):
        logits = logits_after(tokens[:end])[-1].copy()
        seen = np.unique(tokens[:end])
        logits[seen] = np.where(logits[seen] < 0, logits[seen] * 1.9, logits[seen] / 1.9)
        assert tokens[end] == logits.argmax()


def test_banned_and_allowed_tokens_are_kept_to():
    result = beside(SamplingParams(max_new_tokens=8, allowed_tokens=(3, 4, 5, 6), banned_tokens=(4,)))
    assert set(result.tokens) <= {3, 5, 6} and len(result.tokens) == 8


def test_the_likeliest_tokens_are_told_as_many_as_were_asked_for():
    result = beside(SamplingParams(max_new_tokens=5, logprobs=3))
    assert [len(place) for place in result.top_logprobs] == [3] * 5
    for token, logprob, place in zip(result.tokens, result.logprobs, result.top_logprobs, strict=True):
        assert place[0] == (token, pytest.approx(logprob, abs=1e-5))
        assert place[0][1] > place[1][1] > place[2][1]


def test_the_log_probabilities_of_a_prompt_are_those_of_the_whole_model():
    result = beside(SamplingParams(max_new_tokens=2, prompt_logprobs=1), STEM[:40])
    expected = np.asarray(jax.nn.log_softmax(logits_after(STEM[:40])))
    assert result.prompt_logprobs[0] is None and result.prompt_top_logprobs[0] == []
    np.testing.assert_allclose(result.prompt_logprobs[1:], expected[np.arange(39), STEM[1:40]], atol=1e-4)
    assert [place[0][0] for place in result.prompt_top_logprobs[1:]] == expected[:-1].argmax(-1).tolist()
    assert result.cached_tokens == 0


@pytest.mark.parametrize(("start", "cached"), [(30, 24), (33, 32), (32, 24), (1, 0), (40, 32), (41, 32)])
def test_log_probabilities_from_a_token_on_leave_what_is_before_it_to_the_cache(start, cached):
    under_test, prompt = engine(64, 16), STEM[:40]
    under_test.generate([prompt], SamplingParams(max_new_tokens=2))
    settings = SamplingParams(max_new_tokens=2, prompt_logprobs=1, prompt_logprobs_from=start)
    (result,) = under_test.generate([prompt], settings)
    expected = np.asarray(jax.nn.log_softmax(logits_after(prompt)))
    assert result.prompt_logprobs[:start] == [None] * min(start, 40) and not any(result.prompt_top_logprobs[:start])
    told = [(logprob, place[0][0]) for logprob, place in zip(*told_of(result, start), strict=True)]
    after = range(start - 1, 39)
    np.testing.assert_allclose([logprob for logprob, _ in told], [expected[i, prompt[i + 1]] for i in after], atol=1e-4)
    assert [token for _, token in told] == [expected[i].argmax() for i in after]
    assert result.cached_tokens == cached and result.tokens == list(alone(tuple(prompt), settings))


def told_of(result, start):
    return result.prompt_logprobs[start:], result.prompt_top_logprobs[start:]


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


def test_a_constraint_is_asked_before_each_token_and_ends_the_text():
    under_test = engine(64, 16)
    constrained, plain = under_test.requests([STEM[:9], STEM[:20]], SamplingParams(max_new_tokens=9))
    constrained.constraint = Countdown()
    for request in (plain, constrained):
        under_test.add(request)
    while under_test.has_work:
        under_test.step()
    assert (constrained.result.tokens, constrained.result.finish_reason) == ([5, 4, 3, 2, 1], "stop")
    assert plain.result.tokens == list(alone(tuple(STEM[:20]), plain.params))


def test_a_prompt_that_comes_is_computed_next_and_its_first_token_waits_for_nothing_else(monkeypatch):
    under_test, sent = engine(64, 16), []
    running, coming = under_test.requests([STEM[:9], STEM[31:] + STEM[10:31]], SamplingParams(max_new_tokens=20))
    under_test.add(running)
    while len(running.result.tokens) < 4:
        under_test.step()
    programs = under_test._rounds.programs
    for name in ("prefill", "decode"):
        call = getattr(programs, name)
        monkeypatch.setattr(programs, name, lambda *a, name=name, call=call, **k: sent.append(name) or call(*a, **k))
    under_test.add(coming)
    steps = [(len(under_test.step()), len(coming.result.tokens), list(sent)) for _ in range(4)]
    # A chunk of 16 tokens, then the rest of the prompt with which it decodes at once; nothing is sent ahead of need.
    first, rest = ["prefill", "decode"], 2 * ["prefill", "decode"]
    assert steps == [(1, 0, first), (0, 0, first), (1, 0, rest), (1, 1, rest)]
    while under_test.has_work:
        under_test.step()
    for request in (running, coming):
        assert request.result.tokens == list(alone(tuple(request.result.prompt_tokens), request.params))


def test_a_slow_prompt_is_computed_in_short_chunks_only_while_others_decode(monkeypatch):
    under_test, chunks = engine(64, 64), []
    scheduler = under_test._rounds._scheduler
    plan, prompt = scheduler.plan_prefill, [token % 40 for token in range(43)]
    monkeypatch.setattr(under_test._rounds.throughput, "tokens_of_a_chunk", lambda: 20)
    monkeypatch.setattr(scheduler, "plan_prefill", lambda most: chunks.append(plan(most)) or chunks[-1])
    first, second = under_test.requests([prompt, prompt[::-1]], SamplingParams(max_new_tokens=20))
    under_test.add(first)
    while len(first.result.tokens) < 4:
        under_test.step()
    under_test.add(second)
    while under_test.has_work:
        under_test.step()
    assert [chunk[1:] for planned in chunks for chunk in planned] == [(0, 43), (0, 16), (16, 32), (32, 43)]
    for request in (first, second):
        assert request.result.tokens == list(alone(tuple(request.result.prompt_tokens), request.params))


def test_of_several_candidates_the_best_are_given_best_first():
    settings = SamplingParams(max_new_tokens=5, temperature=1.0, n=2, best_of=4)
    results = engine(64, 16).generate(STEM[:9], settings)
    means = [np.mean(result.logprobs) for result in results]
    assert len(results) == 2 and means[0] >= means[1]
    assert list(results[0].tokens) in [list(alone(tuple(STEM[:9]), one)) for one in settings.candidates()]


def test_an_embedding_is_the_mean_or_the_last_of_the_hidden_states_at_length_one():
    model = make_model("data=1")
    with llama_jax.use_mesh("data=1"):
        hidden = np.asarray(model.hidden(np.array([STEM[:9]]), np.arange(9)[None]))[0]
    for pooling, vector in (("mean", hidden.mean(0)), ("last", hidden[-1])):
        np.testing.assert_allclose(engine(64, 16).embed(STEM[:9], pooling), vector / np.linalg.norm(vector), atol=1e-5)
