"""Every program compiled before the first request, and those of prompts and decoding run.

A program's first run sets up its products: on a CPU a tenth of a second and more, whatever it computes, in which
everybody would wait. The invariant: what runs here is the engine's own programs, and afterwards no row is in use and
no page holds anything.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from infer.batches import Batches, filled_up
from infer.programs import Programs
from infer.steps import Batch
from llama_jax.progress import progress

# Seconds that the runs may take: the longest prompts of a large model would take a CPU many minutes.
_SECONDS = 120.0


def warm_up(programs: Programs, batches: Batches, pages: Sequence[int] | None) -> None:
    """Compile every bucket, with all of sampling and without, and run each once but for those of embeddings.

    pages: a blank one of each shard. None where requests are under way: then nothing is run. The rare and the large
    are run last, and not at all once two minutes have passed.
    """
    decode, prefill, texts = list(batches.every_decode()), list(batches.every_prefill()), list(batches.every_text())
    with progress(len(decode) + len(prefill) + len(texts), desc="compiling", unit=" programs") as bar:
        programs.warm(decode, prefill, texts, bar.update)
    nowhere = np.full(batches.num_shards, batches.num_rows, np.int32)
    nothing = filled_up([], batches.pages_a_row * batches.page_size)
    programs.remember(nowhere, nothing, nothing)
    if pages is None:
        return
    runs = [(batch, len(batch.rows), partial(_decode, programs, batches, batch, pages)) for batch in decode]
    runs += [
        (batch, prompts.tokens.size, partial(programs.prefill, prompts, batch, fresh=fresh))
        for prompts, batch, fresh in prefill
    ]
    runs.sort(key=lambda run: (run[0].allowed is not None, run[1]))
    began = time.perf_counter()
    with progress(len(runs), desc="running", unit=" programs") as bar:
        for *_, run in runs:
            if time.perf_counter() - began > _SECONDS:
                break
            jax.block_until_ready(run())
            bar.update(1)


def _decode(programs: Programs, batches: Batches, batch: Batch, pages: Sequence[int]) -> Any:
    """Let a batch decode the first row of each shard for a step: where all are off, it ends before its first."""
    prompts, chunks, fresh = next(batches.every_prefill())
    for some in (chunks, batch):
        first = slice(None, None, len(some.rows) // batches.num_shards)
        some.rows[first], some.table[first, 0] = 0, pages
    prompts.start.left[:: len(chunks.rows) // batches.num_shards] = 2
    jax.block_until_ready(programs.prefill(prompts, chunks, fresh=fresh))
    return programs.decode(batch, 1)
