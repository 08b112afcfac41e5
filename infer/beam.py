"""Beam search: the likeliest texts that keeping num_beams beginnings at a time finds, for work offline.

As transformers' generate does it with do_sample=False and early_stopping=False, ends and scores included.
Every step is the model's full forward, with no cache, so that this stays a page that can be read. The
invariant: a beam that has ended is kept by its score, the sum of its log-probabilities divided by the
number of its new tokens to the power of length_penalty, and no other beam is let go for it.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec, reshard

from infer.sampling import token_logprobs
from llama_jax.model import Llama


class Beam(NamedTuple):
    """A text: its new tokens, and the score by which it is ranked."""

    tokens: tuple[int, ...]
    score: float


def beam_search(
    model: Llama,
    prompt: Sequence[int],
    *,
    num_beams: int = 4,
    max_new_tokens: int = 128,
    stop_tokens: Collection[int] = (),
    length_penalty: float = 1.0,
) -> list[Beam]:
    """The num_beams best continuations of prompt token ids, best first; a stop token is part of its text.

    length_penalty above 0 favours long texts, below 0 short ones. Raises ValueError for an empty prompt, for
    numbers below 1 and where the model's context has no room.
    """
    if not prompt or num_beams < 1 or max_new_tokens < 1:
        raise ValueError(f"expected a prompt, got {len(prompt)} tokens, and {num_beams=}, {max_new_tokens=} at least 1")
    if len(prompt) + max_new_tokens > model.cfg.max_seq_len:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens=} do not fit the model's {model.cfg.max_seq_len}"
        )
    stops = frozenset(stop_tokens)
    # So many that num_beams of them go on, even if every beam's likeliest tokens are stop tokens.
    num_kept = min(max(2, 1 + len(stops)) * num_beams, model.cfg.vocab_size)
    running, ended = [Beam((), 0.0)], []
    for length in range(1, max_new_tokens + 1):
        grown = _grown(model, prompt, running, num_beams, num_kept)
        ends = [length == max_new_tokens or beam.tokens[-1] in stops for beam in grown]
        # What is not among the best num_beams is there to go on, not to end.
        done = [beam for beam, end in zip(grown[:num_beams], ends[:num_beams], strict=True) if end]
        done = [Beam(beam.tokens, beam.score / length**length_penalty) for beam in done]
        ended = sorted(ended + done, key=lambda beam: -beam.score)[:num_beams]
        running = [beam for beam, end in zip(grown, ends, strict=True) if not end][:num_beams]
        if not running or (len(ended) == num_beams and running[0].score / length**length_penalty <= ended[-1].score):
            break
    return ended


def _grown(model: Llama, prompt: Sequence[int], beams: list[Beam], num_rows: int, num_kept: int) -> list[Beam]:
    """The num_kept likeliest beams of one token more, their scores sums of log-probabilities, likeliest first."""
    length = len(prompt) + len(beams[0].tokens)
    width = min(1 << (length - 1).bit_length(), model.cfg.max_seq_len)
    tokens = np.zeros((num_rows, width), np.int32)
    tokens[: len(beams), :length] = [[*prompt, *beam.tokens] for beam in beams]
    with jax.set_mesh(jax.tree.leaves(model)[0].sharding.mesh):
        next_tokens, logprobs = map(np.asarray, _likeliest(model, tokens, length - 1, num_kept))
    sums = np.array([beam.score for beam in beams], np.float32)[:, None] + logprobs[: len(beams)]
    best = np.argsort(-sums, axis=None, kind="stable")[:num_kept]
    rows = best // num_kept
    return [
        Beam((*beams[row].tokens, int(token)), float(score))
        for row, token, score in zip(rows, next_tokens.flat[best], sums.flat[best], strict=True)
    ]


@jax.jit(static_argnames="num")
def _likeliest(model: Llama, tokens: Array, last: Array, num: int) -> tuple[Array, Array]:
    """The likeliest tokens int32 [B, num] after position last of tokens [B, T], and their log-probabilities."""
    logits = reshard(model(tokens), PartitionSpec(None, None, None))
    logits = jax.lax.dynamic_index_in_dim(logits, last, axis=1, keepdims=False)
    return token_logprobs(logits, tokens[:, 0], num)[1:]
