"""The host's side of one request: tokens become text, and stop tokens and strings end it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from infer.sampling import SamplingParams
from llama_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from infer.grammar import Constraint


@dataclass
class Result:
    """One continued prompt: what went in, what came out and why it ended ("stop", "length" or "abort").

    tokens and logprobs include the token that stopped the text; text does not. Without a tokenizer
    text is None, and so is prompt where tokens or messages were given. The likeliest tokens of a place
    are (token, log-probability) pairs, as many as were asked for, the likeliest first; what was not
    asked for is empty or None. Of the prompt's first token there is no log-probability. cached_tokens
    counts those of the prompt that were found in the cache.
    """

    prompt: str | None
    prompt_tokens: list[int]
    text: str | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None
    cached_tokens: int = 0


def pairs(tokens: Any, logprobs: Any, count: int) -> list[list[tuple[int, float]]]:
    """The likeliest tokens of each place, of arrays [T, N], as a result has them; [] if none are asked for."""
    if not count:
        return []
    return [
        list(zip(t[:count], p[:count], strict=True)) for t, p in zip(tokens.tolist(), logprobs.tolist(), strict=True)
    ]


class Request:
    """One prompt and its continuation as the tokens arrive.

    The text is what decoding the tokens after the prompt adds to decoding the prompt, so that a
    character or a space between the two is not lost. What could be the beginning of a stop string
    is held back until it is not, so that a stream never shows part of one.
    """

    def __init__(
        self,
        result: Result,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        room: int,
        *,
        allowed: np.ndarray | None = None,
        adapter: int = -1,
    ):
        """Up to room tokens may be added, all or the allowed, bits as in `infer.sampling.token_mask`.

        adapter: the number of the LoRA adapter that continues it, -1: none. constraint, where one is set before
        the request is added, says before each token what may come. Raises ValueError for stop strings without a
        tokenizer.
        """
        if params.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self.result = result
        self.params = params
        self.room = room
        self.adapter = adapter
        self.constraint: Constraint | None = None
        self._allowed = allowed
        own = frozenset() if tokenizer is None or params.ignore_eos else tokenizer.stop_ids
        self.stop_tokens = own | frozenset(params.stop_tokens)
        self._longest_stop = max(map(len, params.stop), default=0)
        self._shown = 0
        self._tokenizer = tokenizer
        if tokenizer is not None:
            result.text = ""
            self._stream = tokenizer.stream()
            for token in result.prompt_tokens:
                self._decode(token)

    @property
    def unfinished(self) -> bool:
        """Whether more tokens are wanted."""
        return self.result.finish_reason is None

    @property
    def special(self) -> bool:
        """Whether its tokens are chosen with more than the logits and settings of its row, or more is told of them."""
        asked = self.params.logprobs > 0 or self.params.prompt_logprobs is not None
        return asked or self.params.needs_history or self.constraint is not None or self._allowed is not None

    @property
    def told_from(self) -> int | None:
        """The first token of the prompt whose log-probability is asked for; None if none is."""
        return None if self.params.prompt_logprobs is None else self.params.prompt_logprobs_from

    @property
    def apart(self) -> bytes:
        """What keys and values of its tokens depend on beside them: its adapter."""
        return b"" if self.adapter < 0 else self.adapter.to_bytes(4)

    def may(self) -> np.ndarray | None:
        """The bits uint32 [ceil(V / 32)] of the tokens that may come next; None if all may."""
        if self.constraint is None:
            return self._allowed
        bits = self.constraint.mask()
        return bits if self._allowed is None else bits & self._allowed

    def push(self, tokens: np.ndarray, logprobs: np.ndarray, likeliest: Sequence[list[tuple[int, float]]] = ()) -> str:
        """Take new tokens, -1 after the last, until the text ends; returns the text that may be shown now."""
        for i, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            if token < 0 or not self.unfinished:
                break
            self.result.tokens.append(token)
            self.result.logprobs.append(logprob)
            self.result.top_logprobs += likeliest[i : i + 1]
            self._advance(token)
        return self._show()

    def told(self, start: int, stop: int, logprobs: Any, top_tokens: Any, top_logprobs: Any) -> None:
        """Take the log-probabilities [T] and [T, N] of the tokens of the prompt that follow those at start to stop."""
        result, count = self.result, self.params.prompt_logprobs
        if count is None or result.prompt_logprobs is None or result.prompt_top_logprobs is None:
            return
        first = max(start + 1, self.params.prompt_logprobs_from)
        stop = min(stop + 1, len(result.prompt_tokens))
        here = slice(first - start - 1, stop - start - 1)
        result.prompt_logprobs[first:stop] = logprobs[here].tolist()
        likeliest = pairs(top_tokens[here], top_logprobs[here], count)
        result.prompt_top_logprobs[first:stop] = likeliest or [[]] * (stop - first)

    def _advance(self, token: int) -> None:
        result = self.result
        if token in self.stop_tokens:
            result.finish_reason = "stop"
        else:
            if self._add(self._decode(token)):
                return
            if self.constraint is not None and (not self.constraint.accept(token) or self.constraint.finished):
                result.finish_reason = "stop"
            elif len(result.tokens) == self.room:
                result.finish_reason = "length"
        if not self.unfinished and self._tokenizer is not None:
            self._add(self._stream.flush())

    def _decode(self, token: int) -> str:
        """The text that a token adds; none if only the model, whose vocabulary may be padded, knows it."""
        if self._tokenizer is None or token >= self._tokenizer.vocab_size:
            return ""
        return self._stream.push(token)

    def _add(self, text: str) -> bool:
        """Append to the text; true if that completed a stop string, which is cut off."""
        if not text:
            return False
        before = self.result.text or ""
        after = before + text
        begin = max(0, len(before) - self._longest_stop)
        found = [at for stop in self.params.stop if (at := after.find(stop, begin)) >= 0]
        self.result.text = after[: min(found)] if found else after
        if found:
            self.result.finish_reason = "stop"
        return bool(found)

    def _show(self) -> str:
        """Text not shown yet, less a tail that a stop string may begin with."""
        text = self.result.text or ""
        end = len(text)
        if self.unfinished:
            tails = (k for stop in self.params.stop for k in range(len(stop) - 1, 0, -1) if text.endswith(stop[:k]))
            end -= max(tails, default=0)
        shown, self._shown = text[self._shown : end], end
        return shown
