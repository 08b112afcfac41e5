"""The engine as lm-eval asks for a model: log-probabilities of continuations, of whole texts, and texts up to a stop.

Source: lm-eval's `TemplateLM` and its own `hf` model (lm_eval/models/huggingface.py), whose numbers these are. The
invariant: a context is tokenized, cut and begun with BOS as there, so that scores compare with published ones.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from infer.engine import Engine
from infer.request import Request
from infer.sampling import SamplingParams
from llama_jax.chat import encode_chat, encode_written
from llama_jax.progress import progress
from llama_jax.tokenizer import Tokenizer

# Requests that wait in the engine for each row, so that those that begin alike are seen together.
_AHEAD = 4

_MAX_NEW_TOKENS = 256  # lm-eval's own

# What a task may say of sampling, beside how long and until when.
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

# Tokens of a context that lm-eval's windows leave free: one that is computed but not counted, and one that follows.
_SPARE = 2


class EngineModel(TemplateLM):
    """A model that lm-eval scores. Requests run in the engine's batch, and those that begin alike share their pages."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        *,
        stop_tokens: Sequence[int] = (),
        adapter: str | None = None,
    ):
        """stop_tokens end a text beside the tokenizer's own. adapter: of the engine's, the one that is scored.

        Raises ValueError for a tokenizer without BOS and EOS.
        """
        super().__init__()
        end = tokenizer.eos_id if tokenizer.eos_id is not None else next(iter(tokenizer.stop_ids), None)
        if end is None and tokenizer.bos_id is None:
            raise ValueError("the tokenizer has no token with which a text begins or ends, which scoring needs")
        self._engine, self._tokenizer, self._name = engine, tokenizer, name
        self._end: int = tokenizer.bos_id if end is None else end  # type: ignore[assignment]
        self._stop_tokens, self._adapter = tuple(stop_tokens), adapter

    # What lm-eval asks of any model.

    @property
    def eot_token_id(self) -> int:
        """With which a text ends."""
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """After which a text without a context begins."""
        return self._end if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens of a window of text."""
        return self._engine.max_seq_len - _SPARE

    @property
    def tokenizer_name(self) -> str:
        """For the record."""
        return self._name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, special tokens where the text writes them; BOS before all but if it is there or not wanted."""
        tokens, bos = encode_written(self._tokenizer, string), self._tokenizer.bos_id
        if add_special_tokens is False or bos is None or tokens[:1] == [bos]:
            return tokens
        return [bos, *tokens]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """For the record."""
        return (self._tokenizer.chat_template or "Meta's format") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a dialog, special tokens written out; without the prompt its last message is left open."""
        tokens = encode_chat(self._tokenizer, chat_history, add_generation_prompt=add_generation_prompt)
        text = self._tokenizer.decode(tokens)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    # Requests.

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Sums of the log-probabilities of whole texts, in windows of the context, each token once."""
        windows, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            cut = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            windows += [(("", ""), *make_disjoint_window(window)) for window in cut]
            owners += [owner] * (len(windows) - len(owners))
        sums = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += total
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation after its context: the sum of log-probabilities, and whether each token is likeliest."""

        def asked(context: list[int], continuation: list[int]) -> Request:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens: expected 1 to {self.max_length}, which the served "
                    f"context of {self._engine.max_seq_len} leaves"
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            start = len(tokens) - len(continuation)
            params = SamplingParams(max_new_tokens=1, prompt_logprobs=1, prompt_logprobs_from=start)
            return self._engine.requests([tokens], params, adapter=self._adapter)[0]

        def score(request: Request) -> tuple[float, bool]:
            result, start = request.result, request.params.prompt_logprobs_from
            assert result.prompt_logprobs is not None and result.prompt_top_logprobs is not None
            places = zip(result.prompt_tokens[start:], result.prompt_top_logprobs[start:], strict=True)
            greedy = all(token == likeliest[0][0] for token, likeliest in places)
            return sum(result.prompt_logprobs[start:]), greedy  # type: ignore[arg-type]

        scores = {i: score(request) for i, request in self._run((asked(*pair) for _, *pair in requests), len(requests))}
        return [scores[i] for i in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context up to a stop string, which is cut off. Raises ValueError for unknown settings."""

        def asked(number: int, context: str, options: dict[str, Any]) -> Request:
            options = dict(normalize_gen_kwargs(options, _MAX_NEW_TOKENS))
            room, stop = options.pop("max_gen_toks"), tuple(filter(None, options.pop("until")))
            options.pop("do_sample")  # lm-eval has made it a temperature
            if unknown := set(options) - set(_SETTINGS):
                raise ValueError(
                    f"a task asks for {', '.join(sorted(unknown))} in generation_kwargs, which are not supported here"
                )
            if room >= self.max_length:
                raise ValueError(
                    f"a task asks for {room} new tokens, which leave nothing of the served context of "
                    f"{self._engine.max_seq_len}; raise --max-seq-len"
                )
            settings = {"max_new_tokens": room, "stop": stop, "stop_tokens": self._stop_tokens}
            params = SamplingParams(seed=number, **settings, **options)  # a context that comes again is sampled anew
            tokens = self.tok_encode(context)[-(self.max_length - room) :]
            return self._engine.requests([tokens], params, adapter=self._adapter)[0]

        coming = (asked(i, *request.args) for i, request in enumerate(requests))
        texts = {i: request.result.text or "" for i, request in self._run(coming, len(requests))}
        return [texts[i] for i in range(len(requests))]

    def _run(self, requests: Iterable[Request], total: int) -> Iterator[tuple[int, Request]]:
        """Each request with its number when it has ended; no more are made than the engine needs to see."""
        engine, coming, live = self._engine, enumerate(requests), dict[Request, int]()
        try:
            with progress(total, desc="answering", unit=" requests") as bar:
                while True:
                    room = _AHEAD * engine.max_batch_size - len(live)
                    for number, request in itertools.islice(coming, room):
                        engine.add(request)
                        live[request] = number
                    if not live:
                        return
                    for request, _ in engine.step(prefill_first=True):
                        if not request.unfinished:
                            bar.update(1)
                            yield live.pop(request), request
        finally:
            for request in live:
                engine.abort(request)
