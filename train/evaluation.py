"""Held-out loss at a context length, by position and by source: what shows that a longer context is used.

The invariant: every process gives the same rows and gets the same numbers, whatever part of a batch its devices hold.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec, reshard
from jax.typing import DTypeLike

from llama_jax.mesh import ShardingRules
from llama_jax.model import Llama
from llama_jax.rounding import computed_in
from train.data.packing import Batch, heldout_by_source, heldout_rows
from train.data.shards import TokenDataset
from train.device import put_batch
from train.loss import token_losses

# Tokens that a device takes at a time, or more in as many chunks of the vocabulary: at 128,256 their logits are 1 GiB.
_TOKENS = 2048


@functools.partial(jax.jit, static_argnames=("compute_dtype", "num_chunks"))
def row_losses(params: Llama, batch: Batch, compute_dtype: DTypeLike, *, num_chunks: int = 1) -> Array:
    """Cross-entropy float32 [B, T] in nats of every token of a batch, a chunk of the vocabulary at a time.

    Every device gets all of it, so that each process can read it.
    """
    model = computed_in(params, compute_dtype)
    x = model.hidden(batch.tokens, batch.positions, batch.segment_ids)
    losses, _ = token_losses(model, x, batch.targets, num_chunks=num_chunks)
    return reshard(losses, PartitionSpec(None, None))


def losses_by_position(
    params: Llama, dataset: TokenDataset, seq_len: int, *, num_rows: int, compute_dtype: DTypeLike, min_tokens: int = 0
) -> np.ndarray:
    """Mean loss in nats at each position, float64 [seq_len], over the first tokens of held-out documents.

    Raises ValueError if no held-out document reaches seq_len (or min_tokens).
    """
    rows = heldout_rows(dataset, seq_len, count=num_rows, min_document_tokens=min_tokens)
    return _mean_losses(params, rows, compute_dtype)


def losses_by_source(
    params: Llama, sources: Mapping[str, TokenDataset], seq_len: int, *, num_rows: int, compute_dtype: DTypeLike
) -> dict[str, float]:
    """Mean loss in nats of each source's held-out documents, num_rows of each at the most.

    A source without a document of seq_len tokens is left out; ValueError if that leaves none.
    """
    rows = heldout_by_source(sources, seq_len, count=num_rows)
    return {name: float(_mean_losses(params, batch, compute_dtype).mean()) for name, batch in rows.items()}


def _mean_losses(params: Llama, rows: Batch, compute_dtype: DTypeLike) -> np.ndarray:
    """Mean loss over the rows at each position, float64 [T]."""
    seq_len = rows.tokens.shape[1]
    num_chunks = max(1, seq_len // _TOKENS)
    total = np.zeros(seq_len)
    for part, size in equal_batches(rows, params.rules):
        losses = row_losses(params, put_batch(part, params.rules), compute_dtype, num_chunks=num_chunks)
        total += np.asarray(losses, np.float64)[:size].sum(axis=0)
    return total / len(rows.tokens)


def equal_batches(rows: Batch, rules: ShardingRules) -> Iterator[tuple[Batch, int]]:
    """The rows in batches that the mesh divides, and how many rows of each do not only fill it up."""
    size = rules.batch_multiple * max(1, _TOKENS // rows.tokens.shape[1])
    for start in range(0, len(rows.tokens), size):
        part = Batch(*(a[start : start + size] for a in rows))
        yield Batch(*(np.resize(a, (size, *a.shape[1:])) for a in part)), len(part.tokens)


def position_ranges(short: int, long: int) -> list[tuple[int, int]]:
    """[0, short), [short, 2 short), [2 short, 4 short), ... up to long."""
    ends = [short]
    while ends[-1] < long:
        ends.append(min(2 * ends[-1], long))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def perplexity_rows(before: Sequence[float], after: Sequence[float], ranges: Sequence[tuple[int, int]]) -> list[dict]:
    """Perplexity before and after by range of positions, from two lists of losses by position."""
    return [
        {
            "context": len(before),
            "positions": [start, stop],
            "perplexity_before": math.exp(np.mean(before[start:stop])),
            "perplexity_after": math.exp(np.mean(after[start:stop])),
        }
        for start, stop in ranges
    ]


def format_report(rows: list[dict]) -> str:
    """The report as a table."""
    lines = [f"{'context':>8}  {'positions':>13}  {'perplexity before':>17}  {'after':>8}"]
    for row in rows:
        start, stop = row["positions"]
        lines.append(
            f"{row['context']:>8}  {f'{start}-{stop - 1}':>13}  "
            f"{row['perplexity_before']:>17.2f}  {row['perplexity_after']:>8.2f}"
        )
    return "\n".join(lines)
