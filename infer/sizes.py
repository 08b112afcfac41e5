"""How large the pool of the cache's pages is, and into which buckets the engine's programs are rounded.

The invariant: a pool takes a stated share of what the devices have left.
"""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from infer.scheduler import ChunkSizes, bucket
from llama_jax.config import LlamaConfig
from llama_jax.memory import bytes_left, generation_bytes
from llama_jax.mesh import platform

# Tokens of a page on one device; to within so many a prompt is found in the cache. A TPU's lanes are 128.
PAGE_SIZE = {"tpu": 128}
PAGE_SIZE_ELSEWHERE = 64

# Tokens of the shortest table: up to here a longer sequence compiles nothing. The next is so many times as long: the
# kernel over pages of TPUs reads only those that are there, a gather all. Where few requests come, few programs do.
MIN_TABLE = 256
TABLE_BASE = {"tpu": 64}
TABLE_BASE_ELSEWHERE = 4
TABLE_BASE_OF_FEW = 16

# Numbers of pages in the table of a dispatch: those that the kernel of TPUs has scalar memory for.
MOST_NUMBERS = 2**17

# Tokens of the longest text whose embedding is compiled before it is asked for: OpenAI's own take no longer ones.
LONGEST_TEXT = 8192

# Rows of a decode dispatch: powers of this. What is read for a row that is off costs an accelerator next to nothing.
ROW_BASE = {"cpu": 2}
ROW_BASE_ELSEWHERE = 4

# Of the memory that is left; on CPUs others live in it, and a dispatch that decodes holds its rows' pages twice.
_SHARE = {"cpu": 0.25}
_SHARE_ELSEWHERE = 0.9


# What a cache may be kept in: the dtype of the weights, another float, or a narrow type with scales.
CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")


@dataclass(frozen=True)
class CacheOptions:
    """How an engine caches.

    dtype: by default the weights'. num_bytes on each device: by default what there is room for. share_prefixes:
    full pages are kept for prompts that begin alike. prefill_chunk: tokens of prompts in a dispatch of a shard.
    """

    dtype: str | None = None
    num_bytes: int | None = None
    share_prefixes: bool = True
    prefill_chunk: int = 512

    def __post_init__(self):
        """Raises ValueError for an unknown dtype and for chunks without a token."""
        if self.prefill_chunk < 1:
            raise ValueError(f"prefill_chunk={self.prefill_chunk} must be at least 1")
        if self.dtype is not None and self.dtype not in CACHE_DTYPES:
            raise ValueError(f"a cache of {self.dtype!r}: expected {', '.join(CACHE_DTYPES)}")


def bases(platform: str) -> dict[str, int]:
    """How much coarser the next bucket of rows and that of tables is."""
    row_base = ROW_BASE.get(platform, ROW_BASE_ELSEWHERE)
    return {"row_base": row_base, "table_base": TABLE_BASE.get(platform, TABLE_BASE_ELSEWHERE)}


def chunk_sizes(prefill_chunk: int, platform: str) -> ChunkSizes:
    """Of prompts, of which a shard computes prefill_chunk tokens in a dispatch.

    A CPU computes what pads them as slowly as all else; elsewhere up to some hundred tokens take as long as reading
    the weights, and few programs compile sooner.
    """
    if platform == "cpu":
        return ChunkSizes(prefill_chunk, min(prefill_chunk, 128), row_base=2, later_base=2, finest=32, part=1 / 8)
    return ChunkSizes(prefill_chunk, prefill_chunk, row_base=4, later_base=4, finest=64, part=1 / 4)


def page_size(max_seq_len: int, multiple: int, platform: str) -> int:
    """Tokens of a page, a multiple of what the mesh divides it by; a short context is one page."""
    of_all = PAGE_SIZE.get(platform, PAGE_SIZE_ELSEWHERE) * (multiple if platform == "tpu" else 1)
    return bucket(of_all, bucket(max_seq_len), multiple)


def bytes_for_pages(
    cfg: LlamaConfig,
    mesh: Mesh,
    dtype: DTypeLike,
    *,
    num_rows: int,
    prefill_chunk: int,
    held: int,
    left: int | None = None,
) -> int | None:
    """Bytes that a pool may take on each device of this process, of those left and those held by the pool there is.

    left: by default what the devices say. What programs need for a while is left to them. None if nobody knows how
    many there are.
    """
    left = bytes_left(mesh.local_devices) if left is None else left
    if left is None:
        return None
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        needs = generation_bytes(cfg, dtype, num_rows=num_rows, prompt_tokens=1, num_tokens=1)["temporaries"]
        needs += generation_bytes(cfg, dtype, num_rows=1, prompt_tokens=prefill_chunk, num_tokens=1)["temporaries"]
    return max(0, int(_SHARE.get(platform(mesh), _SHARE_ELSEWHERE) * (left + held)) - needs)


def table_width(pages: int, pages_a_row: int, size: int, base: int) -> int:
    """Pages of a dispatch's table: MIN_TABLE tokens, base times as many, and so on."""
    width = max(1, MIN_TABLE // size)
    while width < pages:
        width *= base
    return min(width, pages_a_row)


def table_widths(pages_a_row: int, size: int, base: int) -> list[int]:
    """All of them."""
    widths = [table_width(1, pages_a_row, size, base)]
    while widths[-1] < pages_a_row:
        widths.append(table_width(widths[-1] + 1, pages_a_row, size, base))
    return widths
