"""The text that weights are rounded by and measured on, as rows of tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.tokenizer import Tokenizer

ROW_TOKENS, MAX_ROWS, HELD_OUT = 512, 160, 5  # every fifth row is held out

_MAX_CHARACTERS = 16 * ROW_TOKENS * MAX_ROWS  # so that of a large file the beginning is enough


class Rows(NamedTuple):
    """Tokens int32 [N, T] to calibrate on, and others that are held out."""

    calibration: np.ndarray
    held_out: np.ndarray


def read_rows(files: Sequence[str | Path], tokenizer: Tokenizer, cfg: LlamaConfig) -> Rows:
    """The beginning of the files' text, joined, cut into rows that start with the token for that, if there is one.

    Raises ValueError for a text of fewer than HELD_OUT rows, and for tokens that the model does not have.
    """
    text = "\n\n".join(Path(file).read_text(encoding="utf-8") for file in files)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens, size = tokenizer.encode(text[:_MAX_CHARACTERS]), min(ROW_TOKENS, cfg.max_seq_len) - len(start)
    count = min(len(tokens) // size, MAX_ROWS)
    if count < HELD_OUT:
        raise ValueError(f"the calibration text has {len(tokens)} tokens; give at least {HELD_OUT * size}")
    rows = np.array([[*start, *tokens[i * size : (i + 1) * size]] for i in range(count)], np.int32)
    if rows.max() >= cfg.vocab_size:
        raise ValueError(f"the tokenizer gives token {rows.max()}, but the model has {cfg.vocab_size}; use its own")
    held_out = np.arange(count) % HELD_OUT == HELD_OUT - 1
    return Rows(rows[~held_out], rows[held_out])
