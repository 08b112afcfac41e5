"""transformers' side of a comparison: greedy decoding as its generate does it, and a plain training step.

What transformers leaves open (attention, kind of cache, form of AdamW) is tried first, and the
fastest choice for each task is the one measured. generate itself does the same with more work a step.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterable

import torch
import transformers

from benchmarks.shapes import LEARNING_RATE, OPTIMIZER, random_tokens
from benchmarks.worker import answer_requests

ATTENTION = ("sdpa", "eager")
CACHES = ("dynamic", "static")
ADAMW = ("fused", "foreach")


def fastest(choices: Iterable[tuple], run: Callable[..., float]) -> tuple:
    """The choice for which run(*choice) gives the fewest seconds, each run twice."""
    return min(choices, key=lambda choice: min(run(*choice), run(*choice)))


class Inference:
    """Prefill and decode with logits of the last token alone."""

    def __init__(self, checkpoint: str, dtype: str):
        self._model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
        self._chosen: dict[tuple, tuple] = {}

    def prefill(self, rows: int, length: int) -> dict:
        """From tokens on the host to the first new token of every row on the host."""
        return self._run(rows, length, 0)

    def decode(self, rows: int, length: int, steps: int) -> dict:
        """The steps after the first token, greedily; the prompts are prefilled off the clock."""
        return self._run(rows, length, steps)

    def _run(self, rows: int, length: int, steps: int) -> dict:
        tokens = torch.from_numpy(random_tokens(self._model.config.vocab_size, rows, length)).long()
        key = rows, length, steps
        if key not in self._chosen:
            trial = min(steps, 8)
            choices = itertools.product(ATTENTION, CACHES if steps else CACHES[:1])
            self._chosen[key] = fastest(choices, lambda *choice: self._generate(tokens, trial, *choice)[0])
        seconds, answer = self._generate(tokens, steps, *self._chosen[key])
        return {"seconds": seconds, "answer": answer, "choice": " ".join(self._chosen[key])}

    @torch.inference_mode()
    def _generate(self, tokens: torch.Tensor, steps: int, attention: str, cache: str) -> tuple[float, list]:
        """Seconds of the steps after prefill, or of prefill if there are none, and all tokens."""
        model = self._model
        model.set_attn_implementation(attention)
        began = time.perf_counter()
        if cache == "static":
            past = transformers.StaticCache(config=model.config, max_cache_len=tokens.shape[1] + steps)
        else:
            past = transformers.DynamicCache(config=model.config)
        chosen = []
        for step in range(steps + 1):
            tokens = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
            chosen.append(tokens.flatten().tolist())
            if step == 0 and steps:
                began = time.perf_counter()
        return time.perf_counter() - began, [list(row) for row in zip(*chosen, strict=True)]


class Training:
    """One optimizer step a request, on the same batch."""

    def __init__(self, checkpoint: str, rows: int, length: int):
        self._model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
        tokens = torch.from_numpy(random_tokens(self._model.config.vocab_size, rows, length + 1)).long()
        self._inputs, self._targets = tokens[:, :-1], tokens[:, 1:].flatten()
        fresh = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._choice = fastest(itertools.product(ATTENTION, ADAMW), lambda *choice: self._start(*choice)._timed()[0])
        self._model.load_state_dict(fresh)
        self._start(*self._choice)

    def _start(self, attention: str, form: str) -> "Training":
        """A fresh optimizer: decay on all but the norms' scales."""
        self._model.set_attn_implementation(attention)
        parameters = list(self._model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
        ]
        betas = OPTIMIZER.b1, OPTIMIZER.b2
        self._optimizer = torch.optim.AdamW(groups, LEARNING_RATE, betas, OPTIMIZER.eps, **{form: True})
        return self

    def step(self) -> dict:
        seconds, loss = self._timed()
        return {"seconds": seconds, "answer": loss, "choice": " ".join(self._choice)}

    def _timed(self) -> tuple[float, float]:
        began = time.perf_counter()
        logits = self._model(self._inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), self._targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.clip_norm, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began, loss.item()


def product_limits(dtype: str, size: int, rows: int) -> dict:
    """Seconds of the fastest of five: a square product, and a matrix [rows, rows] times a vector."""

    def seconds(*shapes: tuple[int, ...]) -> float:
        operands = [torch.full(shape, 0.5, dtype=getattr(torch, dtype)) for shape in shapes]
        times = []
        for _ in range(6):
            began = time.perf_counter()
            torch.matmul(*operands)
            times.append(time.perf_counter() - began)
        return min(times[1:])

    return {"product_seconds": seconds((size, size), (size, size)), "vector_seconds": seconds((rows, rows), (rows,))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    inference = functools.cache(lambda: Inference(args.checkpoint, args.dtype))
    training = functools.cache(lambda rows, length: Training(args.checkpoint, rows, length))
    answer_requests(
        {
            "prefill": lambda **request: inference().prefill(**request),
            "decode": lambda **request: inference().decode(**request),
            "train": lambda **request: training(**request).step(),
            "limits": lambda **request: product_limits(args.dtype, **request),
        }
    )


if __name__ == "__main__":
    main()
