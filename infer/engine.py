"""Prompts in, text out: the face of continuous batching, which every command of inference uses.

Requests join and leave a running batch at any step (`infer/rounds.py`), on a cache of pages that they share. The
invariant: a request's tokens are those that it would get alone, whatever else runs, and however its prompt is cut into
chunks, found in the cache, or computed again after it gave up its pages.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from infer.hosts import Hosts
from infer.request import Request, Result
from infer.rounds import Lowered, Rounds
from infer.sampling import SamplingParams, best_first, token_mask
from infer.sizes import CacheOptions
from infer.speculation import DraftModel, Ngrams, check_draft
from infer.throughput import EngineStats, Throughput
from llama_jax.chat import encode_chat
from llama_jax.lora import adapter_names
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[dict]


class Engine:
    """Continues prompts with a model, on the mesh that the model lies on. For one thread at a time."""

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None = None,
        *,
        max_seq_len: int | None = None,
        max_batch_size: int = 64,
        steps_per_dispatch: int = 8,
        cache: CacheOptions | None = None,
        hosts: Hosts | None = None,
        speculation: DraftModel | Ngrams | None = None,
    ):
        """Serve a model; one that is loaded with layout="decoding" is fastest.

        max_seq_len bounds prompt plus new tokens, by default and at most the model's, and by what the cache
        holds. speculation: what guesses tokens ahead. hosts: in the first of several processes, which alone has an
        engine. Raises ValueError for a number out of range and if the tokenizer has more tokens than the model.
        """
        cfg, limit = model.cfg, model.cfg.max_seq_len
        if max_seq_len is not None and not 1 <= max_seq_len <= limit:
            raise ValueError(f"max_seq_len={max_seq_len} must be between 1 and the model's {limit}")
        if max_batch_size < 1 or steps_per_dispatch < 1:
            raise ValueError(f"{max_batch_size=} and {steps_per_dispatch=} must be at least 1")
        if jax.process_count() > 1 and (hosts is None or not hosts.leads):
            raise ValueError(
                "of several processes the first has the engine and its hosts; call infer.entry.follow here"
            )
        if tokenizer is not None and tokenizer.vocab_size > cfg.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model {cfg.vocab_size}; "
                "they do not belong together"
            )
        if isinstance(speculation, DraftModel):
            check_draft(speculation.model.cfg, cfg, max_seq_len or limit)
        self.cfg, self.rules, self.tokenizer, self.max_batch_size = cfg, model.rules, tokenizer, max_batch_size
        self.adapter_names = adapter_names(model)
        self._rounds = Rounds(
            model,
            max_seq_len=max_seq_len or limit,
            max_batch_size=max_batch_size,
            steps=steps_per_dispatch,
            cache=cache or CacheOptions(),
            hosts=hosts,
            speculation=speculation,
        )
        self._unread: list[tuple[Request, str]] = []

    @property
    def max_seq_len(self) -> int:
        """Tokens of prompt and answer that are served."""
        return self._rounds.max_seq_len

    @property
    def throughput(self) -> Throughput:
        """What the last `run` measured."""
        return self._rounds.throughput

    # From prompts to results.

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Result]:
        """Continue each prompt: text, token ids or a list of chat messages. Order is kept.

        adapter names that of the model's adapters that continues them, if one does. Of a prompt whose n or best_of is
        more than 1 there are n results, the best first. Raises ValueError for an empty prompt, for one that leaves no
        room in the context, and for an adapter that is not there.
        """
        batch, all_params = _as_batch(prompts, params)
        pairs = zip(batch, all_params, strict=True)
        number = self._adapter(adapter)
        candidates = [[self._request(prompt, p, number) for p in one.candidates()] for prompt, one in pairs]
        for _ in self.run([request for requests in candidates for request in requests]):
            pass
        results = []
        for requests, one in zip(candidates, all_params, strict=True):
            order = best_first([request.result.logprobs for request in requests]) if len(requests) > 1 else [0]
            results += [requests[i].result for i in order[: one.n]]
        return results

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None
    ) -> Iterator[str]:
        """The continuation of one prompt, piece by piece, never half a character."""
        # Here and not in a generator, so that errors come at once.
        requests = self.requests([prompt], params, adapter=adapter)
        return (text for _, text in self.run(requests) if text)

    def requests(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        adapter: str | None = None,
    ) -> list[Request]:
        """Checked and tokenized prompts for `run` or `add`; their results fill as they run. For any thread."""
        batch, all_params = _as_batch(prompts, params)
        number = self._adapter(adapter)
        return [self._request(prompt, p, number) for prompt, p in zip(batch, all_params, strict=True)]

    def _adapter(self, name: str | None) -> int:
        """The number of an adapter, -1 for none."""
        if name is None:
            return -1
        if name not in self.adapter_names:
            raise ValueError(f"no adapter {name!r}; there is {', '.join(self.adapter_names) or 'none'}")
        return self.adapter_names.index(name)

    def _request(self, prompt: Prompt, params: SamplingParams, adapter: int = -1) -> Request:
        tokens = self._tokenize(prompt) if len(prompt) else []
        if not tokens:
            raise ValueError("the prompt is empty; give at least one character or token")
        if len(tokens) >= self.max_seq_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, which leaves no room in a context of {self.max_seq_len}"
            )
        outside = [token for token in tokens if not 0 <= token < self.cfg.vocab_size]
        if outside:
            raise ValueError(f"prompt token {outside[0]} is outside the vocabulary of {self.cfg.vocab_size}")
        room = min(params.max_new_tokens, self.max_seq_len - len(tokens))
        result = Result(prompt if isinstance(prompt, str) else None, tokens)
        if params.prompt_logprobs is not None:
            result.prompt_logprobs, result.prompt_top_logprobs = [None for _ in tokens], [[] for _ in tokens]
        allowed = token_mask(params, self.cfg.vocab_size)
        return Request(result, params, self.tokenizer, room, allowed=allowed, adapter=adapter)

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str) and not isinstance(prompt[0], dict):
            return [int(token) for token in prompt]  # type: ignore[arg-type]
        if self.tokenizer is None:
            raise ValueError("a prompt of text needs a tokenizer; give token ids or a checkpoint with a tokenizer")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)
        return encode_chat(self.tokenizer, prompt)  # type: ignore[arg-type]

    def run(self, requests: Sequence[Request]) -> Iterator[tuple[int, str]]:
        """Continue requests, yielding (index of the request, new text) as it comes; those left at the end are dropped.

        The cache is made as large as they need, where it was smaller, and rows are filled before any decodes.
        """
        rounds, indices = self._rounds, {request: i for i, request in enumerate(requests)}
        rounds.throughput = Throughput()
        rounds.make_room(requests)
        try:
            for request in requests:
                rounds.add(request)
            left = deque(requests)
            while True:
                news = self._unread  # of another run, which goes on beside this one
                self._unread = [item for item in news if item[0] not in indices]
                yield from ((indices[request], text) for request, text in news if request in indices)
                while left and not rounds.is_live(left[0]):
                    left.popleft()
                if not left:
                    return
                self._unread += rounds.step(prefill_first=True)
        finally:
            for request in requests:
                rounds.drop(request)

    # Step by step.

    def add(self, request: Request) -> None:
        """Let a request wait for its turn in `step`. Raises ValueError if it is longer than the served context."""
        self._rounds.open()
        self._rounds.add(request)

    def abort(self, request: Request) -> None:
        """End a request; its pages are free at once."""
        if self._rounds.is_live(request):
            self._rounds.drop(request)
            request.result.finish_reason = "abort"

    @property
    def has_work(self) -> bool:
        """Whether a request is not done."""
        return self._rounds.has_work

    def step(self, *, prefill_first: bool = False) -> list[tuple[Request, str]]:
        """One round: at most one prefill and one decode dispatch, and what the oldest on its way has brought.

        That is every request that advanced, with the text that may be shown now. prefill_first: all rows are filled
        before any decodes, as is best where nobody looks on.
        """
        return self._rounds.step(prefill_first=prefill_first)

    @property
    def spare_seconds(self) -> float:
        """How long `step` can wait for requests that may come, and the devices do not wait for it."""
        return self._rounds.spare_seconds

    def stats(self) -> EngineStats:
        """Where the engine stands."""
        return self._rounds.stats()

    def warmup(self) -> None:
        """Open the cache and compile every program that `add` and `step` may need, so that none compiles later."""
        self._rounds.warmup()

    def embed(self, tokens: Sequence[int], pooling: str = "mean", *, adapter: str | None = None) -> np.ndarray:
        """The final hidden states float32 [D] of a text, the "mean" or the "last", at length 1.

        Raises ValueError for a text without a token or longer than the served context.
        """
        if not 1 <= len(tokens) <= self.max_seq_len:
            raise ValueError(f"a text of {len(tokens):,} tokens: expected 1 to the served {self.max_seq_len:,}")
        mean, last = self._rounds.embed(tokens, self._adapter(adapter))
        vector = {"mean": mean, "last": last}[pooling]
        return vector / np.linalg.norm(vector)

    def lower(self, requests: Sequence[Request]) -> Lowered:
        """The last prefill and decode of requests as `run` compiles them, and what they hold; nothing is run."""
        return self._rounds.lower(requests)

    def lower_largest(self, left: int) -> Lowered:
        """The largest prefill and decode as `warmup` compiles them on devices with so many bytes beside weights."""
        return self._rounds.lower_largest(left)

    @property
    def num_compiled(self) -> int:
        """How many programs have been compiled: two for each new bucket of shapes."""
        return len(self._compiled)

    @property
    def _compiled(self) -> dict[Any, Any]:
        return self._rounds.programs.compiled


def _as_batch(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> tuple[Sequence[Prompt], Sequence[SamplingParams]]:
    """A list of prompts, and as many params."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, dict, np.integer)))
    batch: Sequence[Prompt] = [prompts] if single else prompts  # type: ignore[assignment]
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(batch)
    if len(params) != len(batch):
        raise ValueError(f"{len(batch)} prompts but {len(params)} sampling parameters")
    return batch, params
