"""An engine without a model, for what HTTP adds to one: it says what a script tells it to."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from types import SimpleNamespace

import numpy as np

from infer.request import Request, Result
from llama_jax.chat import encode_chat

TOKENS_A_STEP = 3


class ScriptedEngine:
    """Answers a prompt with reply(text of the prompt), some tokens a step, as the real engine would be stepped."""

    def __init__(
        self, tokenizer, reply: Callable[[str], str], *, max_seq_len=512, max_batch_size=4, seconds_a_step=0.0
    ):
        self.tokenizer, self.reply = tokenizer, reply
        self.max_seq_len, self.max_batch_size, self.seconds_a_step = max_seq_len, max_batch_size, seconds_a_step
        self.cfg = SimpleNamespace(vocab_size=tokenizer.vocab_size, embed_dim=8)
        self.queue: deque[Request] = deque()
        self.running: dict[Request, Iterator[int]] = {}
        self.aborted: list[Request] = []
        self.fails: Exception | None = None
        self.thread: int | None = None
        self.adapter_names: tuple[str, ...] = ()
        self.spare_seconds = 0.0

    def requests(self, prompts, params, *, adapter=None):
        number = -1 if adapter is None else self.adapter_names.index(adapter)
        return [self._request(prompt, p, number) for prompt, p in zip(prompts, params, strict=True)]

    def _request(self, prompt, params, adapter):
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt, bos=True)
        else:
            tokens = encode_chat(self.tokenizer, prompt) if isinstance(prompt[0], dict) else list(prompt)
        if len(tokens) >= self.max_seq_len:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, which leaves no room in a context of {self.max_seq_len}"
            )
        if outside := [token for token in tokens if not 0 <= token < self.cfg.vocab_size]:
            raise ValueError(f"prompt token {outside[0]} is outside the vocabulary of {self.cfg.vocab_size}")
        result = Result(prompt if isinstance(prompt, str) else None, tokens)
        room = min(params.max_new_tokens, self.max_seq_len - len(tokens))
        return Request(result, params, self.tokenizer, room, adapter=adapter)

    @property
    def has_work(self):
        self._only_one_thread()
        return bool(self.queue or self.running)

    def add(self, request):
        self._only_one_thread()
        self.queue.append(request)

    def abort(self, request):
        self._only_one_thread()
        self.aborted.append(request)
        self.running.pop(request, None)
        if request in self.queue:
            self.queue.remove(request)
        request.result.finish_reason = "abort"

    def step(self):
        self._only_one_thread()
        time.sleep(self.seconds_a_step)
        if self.fails is not None:
            raise self.fails
        while self.queue and len(self.running) < self.max_batch_size:
            request = self.queue.popleft()
            reply = self.reply(self.tokenizer.decode(request.result.prompt_tokens))
            by = "" if request.adapter < 0 else f"{self.adapter_names[request.adapter]}: "
            said = self.tokenizer.encode(by + reply)
            script = [*self._special(said), min(self.tokenizer.stop_ids)]
            self.running[request] = cycle(script)  # again and again for who ignores its end
        return [self._advance(request) for request in list(self.running)]

    def _special(self, tokens):
        """<|python_tag|> as the model writes it, one token."""
        spelled = self.tokenizer.encode("<|python_tag|>")
        if tokens[: len(spelled)] == spelled:
            return [self.tokenizer.special_tokens["<|python_tag|>"], *tokens[len(spelled) :]]
        return tokens

    def _advance(self, request):
        new = list(islice(self.running[request], TOKENS_A_STEP))
        likeliest = [[(token, -0.5), (5, -1.0)][: request.params.logprobs] for token in new]
        text = request.push(np.array(new), np.full(len(new), -0.5), likeliest)
        if not request.unfinished:
            del self.running[request]
        return request, text

    def embed(self, tokens, pooling, *, adapter=None):
        vector = np.zeros(8, np.float32)
        vector[len(tokens) % 8] = 1.0 if pooling == "mean" and adapter is None else -1.0
        return vector

    def stats(self):
        counts = {"waiting": len(self.queue), "running": len(self.running), "pages_total": 7, "pages_free": 5}
        counts |= {"prompt_tokens": 1, "prefix_hit_tokens": 0, "generated_tokens": 3, "preemptions": 0}
        return SimpleNamespace(**counts, compilations=2, draft_tokens=10, accepted_tokens=7)

    def _only_one_thread(self):
        here = threading.get_ident()
        assert self.thread in (None, here), "the engine is used by two threads"
        self.thread = here
