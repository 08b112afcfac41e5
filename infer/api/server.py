"""What every endpoint shares: the model's names and defaults, admission, and prompts continued by the worker."""

import asyncio
import contextlib
import dataclasses
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from infer.api.constraints import Build
from infer.api.errors import ApiError, overloaded
from infer.api.limits import Limits
from infer.api.metrics import ServerMetrics
from infer.api.schemas import Sampling
from infer.api.worker import Delta, Worker
from infer.engine import Engine
from infer.grammar import Grammars
from infer.request import Request
from infer.sampling import SamplingParams
from llama_jax.tokenizer import Tokenizer


@dataclasses.dataclass
class Server:
    """One model behind HTTP. defaults are the sampling settings of a request that gives none."""

    engine: Engine
    tokenizer: Tokenizer
    worker: Worker
    limits: Limits
    defaults: SamplingParams
    model_names: Sequence[str]
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def __post_init__(self):
        """Metrics of its own."""
        self.metrics = ServerMetrics(self.engine)
        self._lock, self._made = threading.Lock(), None
        self.num_admitted = 0

    def check_model(self, name: str | None) -> str:
        """The model to name in an answer. Raises ApiError 404 for one that is not served."""
        if name is None or name in self.model_names:
            return name or self.model_names[0]
        raise ApiError(
            f"the model {name!r} is not served here; there is {', '.join(self.model_names)}",
            status=404,
            param="model",
            code="model_not_found",
        )

    def adapter(self, name: str | None) -> str | None:
        """The adapter of the model of this name; None for the base's. Raises as `check_model`."""
        name = self.check_model(name)
        return name if name in self.engine.adapter_names else None

    @contextlib.contextmanager
    def admitted(self, http: HttpRequest, num_requests: int = 1) -> Iterator[None]:
        """A request in flight, counted. Raises ApiError: 401, 429 or 503."""
        key = self.limits.key_of(http.headers.get("authorization"))
        self.worker.check_open()
        with self.limits.one_more(key):
            room = self.worker.max_waiting + self.engine.max_batch_size
            if self.num_admitted and self.num_admitted + num_requests > room:  # one alone is bounded by its body
                raise overloaded(f"{self.num_admitted} continuations are running or waiting; try again later", 1)
            self.num_admitted += num_requests
            try:
                yield
            finally:
                self.num_admitted -= num_requests

    def num_choices(self, body: Sampling, best_of: int | None = None) -> tuple[int, int]:
        """How many continuations of a prompt are shown, and how many are made. Raises ApiError."""
        shown = body.n or 1
        made = best_of or shown
        if made < shown:
            raise ApiError(f"best_of={made} is fewer than n={shown}", param="best_of")
        if made > self.limits.max_choices:
            raise ApiError(f"{made} continuations of a prompt are asked for, {self.limits.max_choices} allowed")
        if made > shown and body.stream:
            raise ApiError("best_of shows the best when all have ended: it cannot be streamed", param="best_of")
        return shown, made

    def params(self, body: Sampling, max_new_tokens: int | None, **more: Any) -> SamplingParams:
        """The request's settings over the defaults; without a limit of tokens all that is allowed or has room.

        Raises ApiError 400.
        """
        most = self.limits.max_new_tokens or self.engine.max_seq_len
        if self.limits.max_new_tokens and (max_new_tokens or 0) > most:
            raise ApiError(f"an answer may have {most} tokens here, {max_new_tokens} are asked for", param="max_tokens")
        given = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": None if body.top_k is None else max(body.top_k, 0),
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "min_new_tokens": body.min_tokens,
            "ignore_eos": body.ignore_eos,
            "allowed_tokens": None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
            "banned_tokens": None if body.banned_token_ids is None else tuple(body.banned_token_ids),
        }
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        named = *bias, *(body.allowed_token_ids or ()), *(body.banned_token_ids or ())
        if outside := [token for token in named if token >= self.engine.cfg.vocab_size]:
            raise ApiError(f"token {outside[0]} is outside the vocabulary of {self.engine.cfg.vocab_size}")
        try:
            return dataclasses.replace(
                self.defaults,
                **{name: value for name, value in given.items() if value is not None},
                max_new_tokens=max_new_tokens or most,
                seed=secrets.randbits(32) if body.seed is None else body.seed % 2**32,
                stop=body.stops,
                stop_tokens=self.defaults.stop_tokens + tuple(body.stop_token_ids or ()),
                logit_bias=bias,
                **more,
            )
        except ValueError as error:
            raise ApiError(str(error)) from None

    async def requests(
        self,
        model: str | None,
        prompts: Sequence[Any],
        params: SamplingParams,
        choices: int = 1,
        build: Build | None = None,
    ) -> list[Request]:
        """Requests for the engine, choices of each prompt with seeds that follow, under the constraint of build.

        model is the name that the client asks for: that of an adapter brings it in. Raises ApiError 400, or 404 for
        a model that is not served.
        """
        adapter = self.adapter(model)
        all_params = [dataclasses.replace(params, seed=(params.seed + i) % 2**32) for i in range(choices)]

        def tokenize() -> list[Request]:
            constraint = build(self._grammars()) if build is not None else None
            requests = [
                r for prompt in prompts for r in self.engine.requests([prompt] * choices, all_params, adapter=adapter)
            ]
            for request in requests:
                request.constraint = constraint and constraint.copy()
            return requests

        try:  # in a thread, because a long text or schema takes a while
            return await asyncio.to_thread(tokenize)
        except ValueError as error:
            too_long = "no room in a context" in str(error)
            raise ApiError(str(error), code="context_length_exceeded" if too_long else None) from None

    def _grammars(self) -> Grammars:
        """Made with the first constraint, once."""
        with self._lock:
            if self._made is None:
                self._made = Grammars(self.tokenizer, self.engine.cfg.vocab_size)
            return self._made

    async def stream(self, requests: Sequence[Request]) -> AsyncGenerator[Delta, None]:
        """What comes for any of the requests, timed. Raises ApiError 504 when they take too long."""
        clocks = [self.metrics.clock() for _ in requests]
        deadline = time.monotonic() + self.limits.timeout_seconds if self.limits.timeout_seconds else None
        source = self.worker.stream(requests)
        try:
            while True:
                try:
                    async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                        delta = await anext(source)
                except StopAsyncIteration:
                    return
                clocks[delta.index].tick(delta.num_tokens)
                if delta.finished:
                    result = requests[delta.index].result
                    self.metrics.continued(len(result.prompt_tokens), len(result.tokens))
                yield delta
        except TimeoutError:
            raise ApiError(
                f"not done after {self.limits.timeout_seconds:g} seconds", status=504, code="timeout"
            ) from None
        finally:
            await source.aclose()

    async def finish(self, requests: Sequence[Request]) -> None:
        """Run the requests to their ends. Raises as `stream` does."""
        async with contextlib.aclosing(self.stream(requests)) as deltas:
            async for _ in deltas:
                pass


async def unless_gone(http: HttpRequest, run: Callable[[], Any]) -> Any:
    """What run gives; it is cancelled when the client goes away. Raises ApiError 499 then, which nobody reads."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.ensure_future(run()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError("the client has gone", status=499)
        return await work
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)
