"""What every checkpoint format looks like to the loader: named tensors that can be read in slices.

Canonical names are Hugging Face's ("model.layers.0.self_attn.q_proj.weight"), canonical shapes are
Hugging Face's ([out, in]). A format that differs (Meta's) translates inside its own source.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np


class TensorSpec(NamedTuple):
    """Shape and dtype (bfloat16 and float8 are ml_dtypes) of one stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


class Source(Protocol):
    """Stored tensors: what is there, and any slice of it, reading no more than the slice."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every tensor by name."""
        ...

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor, or its slice (step 1; slice(None) allowed), in its stored dtype."""
        ...
