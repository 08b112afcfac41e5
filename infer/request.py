"""The host's side of one request: tokens become text, and stop tokens and strings end it."""

from dataclasses import dataclass, field

import numpy as np

from infer.sampling import SamplingParams
from llama_jax.tokenizer import Tokenizer


@dataclass
class Result:
    """One continued prompt: what went in, what came out and why it ended ("stop" or "length").

    tokens and logprobs include the token that stopped the text; text does not. Without a tokenizer
    text is None, and so is prompt where tokens or messages were given.
    """

    prompt: str | None
    prompt_tokens: list[int]
    text: str | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class Request:
    """One prompt and its continuation as the tokens arrive.

    Text that could be the beginning of a stop string is held back until it is not, so that a
    stream never shows part of one.
    """

    def __init__(self, result: Result, params: SamplingParams, tokenizer: Tokenizer | None, room: int):
        """Up to room tokens may be added, at most max_new_tokens."""
        if params.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self.result = result
        self.params = params
        self.room = room
        own = frozenset() if tokenizer is None or params.ignore_eos else tokenizer.stop_ids
        self.stop_tokens = own | frozenset(params.stop_tokens)
        self._stream = None if tokenizer is None else tokenizer.stream()
        self._shown = 0
        if tokenizer is not None:
            result.text = ""

    @property
    def unfinished(self) -> bool:
        """Whether more tokens are wanted."""
        return self.result.finish_reason is None

    def push(self, tokens: np.ndarray, logprobs: np.ndarray) -> str:
        """Take new tokens until the text ends; returns the text that may be shown now."""
        for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            if token < 0:
                break
            self._push(token, logprob)
            if not self.unfinished:
                break
        return self._show()

    def _push(self, token: int, logprob: float) -> None:
        result = self.result
        result.tokens.append(token)
        result.logprobs.append(logprob)
        if token in self.stop_tokens:
            result.finish_reason = "stop"
        elif self._stream is not None:
            self._add(self._stream.push(token))
        if self.unfinished and len(result.tokens) >= self.room:
            result.finish_reason = "length"
        if not self.unfinished and self._stream is not None and not self._stopped_by_string():
            self._add(self._stream.flush())

    def _add(self, text: str) -> None:
        assert self.result.text is not None
        searched = max(0, len(self.result.text) - self._longest_stop())
        self.result.text += text
        found = [at for stop in self.params.stop if (at := self.result.text.find(stop, searched)) >= 0]
        if found:
            self.result.text = self.result.text[: min(found)]
            self.result.finish_reason = "stop"

    def _stopped_by_string(self) -> bool:
        return self.result.finish_reason == "stop" and self.result.tokens[-1] not in self.stop_tokens

    def _longest_stop(self) -> int:
        return max((len(stop) for stop in self.params.stop), default=0)

    def _show(self) -> str:
        """Text not shown yet, less a tail that a stop string may begin with."""
        text = self.result.text
        if text is None:
            return ""
        end = len(text)
        if self.unfinished:
            tails = (k for stop in self.params.stop for k in range(len(stop) - 1, 0, -1) if text.endswith(stop[:k]))
            end -= max(tails, default=0)
        shown, self._shown = text[self._shown : end], max(self._shown, end)
        return shown
