"""Every program compiled before the first request, and those of prompts and decoding run.

A program's first run sets up its products: on a CPU a tenth of a second and more, whatever it computes, in which
everybody would wait. The invariant: what runs here is the engine's own programs, and afterwards no row is in use and
no page holds anything.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from infer.batches import Batches, filled_up
from infer.programs import Programs
from infer.steps import Batch
from llama_jax.progress import progress

# What runs longer than this is not run ahead, nor what is larger: on a CPU a large model would take minutes to start.
_SECONDS = 1.0


def warm_up(programs: Programs, batches: Batches, pages: Sequence[int] | None) -> None:
    """Compile every bucket, with all of sampling and without, and run each once but for those of embeddings.

    pages: a blank one of each shard. None where requests are under way: then nothing is run.
    """
    decode, prefill, texts = list(batches.every_decode()), list(batches.every_prefill()), list(batches.every_text())
    with progress(len(decode) + len(prefill) + len(texts), desc="compiling", unit=" programs") as bar:
        programs.warm(decode, prefill, texts, bar.update)
    nowhere = np.full(batches.num_shards, batches.num_rows, np.int32)
    nothing = filled_up([], batches.pages_a_row * batches.page_size)
    programs.remember(nowhere, nothing, nothing)
    if pages is None:
        return
    prefill.sort(key=lambda chunks: chunks[0].tokens.size)
    decode.sort(key=lambda batch: batch.table.size)
    _run(prefill, lambda chunks: programs.prefill(*chunks[:2], fresh=chunks[2]))
    _run(decode, lambda batch: programs.decode(batch, 1), before=lambda batch: _awake(programs, batches, batch, pages))


def _run(items: Iterable[Any], call: Callable[[Any], Any], before: Callable[[Any], Any] = lambda _: None) -> None:
    """Call with each item, the smaller first."""
    for item in items:
        jax.block_until_ready(before(item))
        began = time.perf_counter()
        jax.block_until_ready(call(item))
        if time.perf_counter() - began > _SECONDS:
            return


def _awake(programs: Programs, batches: Batches, batch: Batch, pages: Sequence[int]) -> Any:
    """Let a batch decode the first row of each shard for a step: where all are off, it ends before its first."""
    prompts, chunks, fresh = next(batches.every_prefill())
    for some in (chunks, batch):
        first = slice(None, None, len(some.rows) // batches.num_shards)
        some.rows[first], some.table[first, 0] = 0, pages
    prompts.start.left[:: len(chunks.rows) // batches.num_shards] = 2
    return programs.prefill(prompts, chunks, fresh=fresh)
