"""What Prometheus reads at /metrics: queue, cache, tokens, and the times that a user feels."""

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from infer.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKENS = tuple(2**power for power in range(0, 18, 2))


class EngineCollector:
    """The engine's own counts, read when they are asked for."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self):
        """One family for each count."""
        stats = self._engine.stats()
        gauges = {
            "waiting": ("requests that wait for a place in the batch", stats.waiting),
            "running": ("requests in the batch", stats.running),
            "cache_pages": ("pages of the KV cache", stats.pages_total),
            "cache_pages_free": ("pages that hold nothing that a request needs", stats.pages_free),
        }
        counters = {
            "prompt_tokens": ("tokens of prompts", stats.prompt_tokens),
            "prefix_hit_tokens": ("tokens of prompts that were found in the cache", stats.prefix_hit_tokens),
            "generated_tokens": ("tokens that were generated", stats.generated_tokens),
            "preemptions": ("requests that gave their pages to older ones", stats.preemptions),
            "draft_tokens": ("tokens that were guessed ahead", stats.draft_tokens),
            "accepted_tokens": ("tokens that were guessed ahead rightly", stats.accepted_tokens),
            "compilations": ("programs that were compiled", stats.compilations),
        }
        for name, (what, value) in gauges.items():
            yield GaugeMetricFamily(f"llama_jax_{name}", what.capitalize(), value)
        for name, (what, value) in counters.items():
            yield CounterMetricFamily(f"llama_jax_{name}", what.capitalize(), value)


class ServerMetrics:
    """Counts and times of requests."""

    def __init__(self, engine: Engine):
        """A registry of its own, with the engine's counts in it."""
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))  # type: ignore[arg-type]
        self._requests = Counter(
            "llama_jax_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.in_flight = Gauge("llama_jax_requests_in_flight", "Requests not answered yet", registry=self.registry)
        self._seconds = self._histogram("request_seconds", "From a request to the end of its answer", _SECONDS)
        self._first = self._histogram("time_to_first_token_seconds", "From a request to its first token", _SECONDS)
        self._between = self._histogram("inter_token_seconds", "Between two tokens of a request", _SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._answer = self._histogram("request_generated_tokens", "Tokens of a continuation", _TOKENS)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"llama_jax_{name}", what, buckets=buckets, registry=self.registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """A request got its answer, all of it."""
        self._requests.labels(path, status).inc()
        self._seconds.observe(seconds)

    def continued(self, prompt_tokens: int, tokens: int) -> None:
        """A prompt was continued to its end."""
        self._prompt.observe(prompt_tokens)
        self._answer.observe(tokens)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)

    def clock(self) -> "TokenClock":
        """A watch for the tokens of one request, which starts now."""
        return TokenClock(self._first, self._between)


class TokenClock:
    """When the tokens of one request come."""

    def __init__(self, first: Histogram, between: Histogram):
        """Starts the watch."""
        self._first, self._between = first, between
        self._last, self._num_tokens = time.perf_counter(), 0

    def tick(self, num_tokens: int) -> None:
        """There are so many tokens now; those of one dispatch share the time since the last."""
        new = num_tokens - self._num_tokens
        if new <= 0:
            return
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        if not self._num_tokens:
            self._first.observe(elapsed)
            new, elapsed = new - 1, 0.0
        for _ in range(new):
            self._between.observe(elapsed / new)
        self._num_tokens = num_tokens
