"""Weights in few bits as the files of others hold them, on the host: what every format is unpacked to.

A weight is a matrix [out, in]. The one invariant: whatever way a format lays its bits, `dequantize` of a slice
is the slice of `dequantize`, computed in float32 from exactly the numbers that the file stores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.source import Source
from llama_jax.schemes import Quantization

# The 16 levels of NF4 (QLoRA, arXiv 2305.14314, appendix E).
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)

_INTEGERS = {4: np.dtype(ml_dtypes.int4), 8: np.dtype(np.int8)}
FLOATS = ("float32", "float16", "bfloat16")


class NestedScales(NamedTuple):
    """Scales [N] in 8 bits: levels[codes] times the outer scale of their block, and an offset."""

    codes: np.ndarray
    levels: np.ndarray
    outer: np.ndarray
    offset: np.float32
    block: int

    def wide(self) -> np.ndarray:
        """The scales, float32 [N]."""
        return self.levels[self.codes] * self.outer.repeat(self.block)[: len(self.codes)] + self.offset


class Packed(NamedTuple):
    """R rows and C columns of a weight: (values - zeros) * scales - offsets, or levels[values] * scales.

    values are integers or floats [R, C]. scales, zeros and offsets are [R, G], or [1, G] for all rows alike: each
    column of them for C / G neighbouring columns of values or, with groups int [C], for those that name it.
    bits: how many of a value count (8 for float8). levels: what the values 0, 1, ... stand for. nested: what scales are
    stored as, where these are quantized themselves.
    """

    values: np.ndarray
    scales: np.ndarray
    bits: int
    zeros: np.ndarray | None = None
    offsets: np.ndarray | None = None
    groups: np.ndarray | None = None
    levels: np.ndarray | None = None
    nested: NestedScales | None = None

    def dequantize(self) -> np.ndarray:
        """The numbers, float32 [R, C]."""
        values = self.values.astype(np.float32) if self.levels is None else self.levels[self.values]
        if self.zeros is not None:
            values = values - self._by_column(self.zeros)
        values = values * self._by_column(self.scales)
        return values if self.offsets is None else values - self._by_column(self.offsets)

    def columns(self, part: slice) -> "Packed":
        """Some of the columns."""
        count = self.values.shape[1]
        if (part.start, part.stop) == (0, count):
            return self
        groups = np.arange(count) // (count // self.scales.shape[1]) if self.groups is None else self.groups
        return self._replace(values=self.values[:, part], groups=groups[part])

    def _by_column(self, numbers: np.ndarray) -> np.ndarray:
        numbers = numbers.astype(np.float32)
        if self.groups is not None:
            return numbers[:, self.groups]
        columns = self.values.shape[1]
        return numbers if numbers.shape[1] == 1 else numbers.repeat(columns // numbers.shape[1], axis=1)


class Narrow(NamedTuple):
    """How the model itself can hold a packed weight: values of dtype, a scale for `group` columns of a row."""

    dtype: np.dtype
    group: int
    scale_dtype: np.dtype
    has_zeros: bool = False
    rest: Quantization = Quantization()


class PackedWeight(Protocol):
    """A weight of a file that is read in slices: what each format makes of its tensors.

    parts: the names of the stored tensors that it consists of. narrow: None if the model
    cannot hold it but as floats; else scales and zeros give slices of what they are for [out, in / group].
    """

    @property
    def narrow(self) -> Narrow | None: ...  # noqa: D102

    @property
    def scales(self) -> "Reader": ...  # noqa: D102

    @property
    def zeros(self) -> "Reader | None": ...  # noqa: D102

    @property
    def shape(self) -> tuple[int, int]: ...  # noqa: D102

    @property
    def parts(self) -> Sequence[str]: ...  # noqa: D102

    def read(self, rows: slice, columns: slice) -> Packed:
        """The slice (start and stop given, step 1)."""
        ...


Reader = Callable[[slice, slice], np.ndarray]


@dataclass(frozen=True)
class GroupedWeight:
    """A PackedWeight whose scales each stand for `group` columns of a row.

    values gives a slice of the matrix; scales and zeros give one of [out, in / group]. order int [in], where there is
    one, says the group of each column. rest: how its publisher rounds the activations.
    """

    shape: tuple[int, int]
    parts: Sequence[str]
    bits: int
    group: int
    values: Reader
    scales: Reader
    zeros: Reader | None = None
    order: np.ndarray | None = None
    rest: Quantization = Quantization()

    @property
    def narrow(self) -> Narrow | None:
        """Values in int4, int8 or float8; None where the inputs are out of order."""
        if self.order is not None:
            return None
        one = slice(0, 1)
        found = self.values(one, one).dtype
        dtype = found if found.name == "float8_e4m3fn" else _INTEGERS[self.bits]
        has_zeros = self.zeros is not None
        if found == np.uint8 and not has_zeros:
            return None
        scale_dtype = self.scales(one, one).dtype
        return Narrow(dtype, self.group, scale_dtype, has_zeros, self.rest)

    def read(self, rows: slice, columns: slice) -> Packed:
        """The slice."""
        if self.order is None:
            taken, groups = grouped(columns, self.group)
        else:
            taken, groups = slice(0, self.shape[1] // self.group), self.order[columns]
        zeros = None if self.zeros is None else self.zeros(rows, taken)
        values, scales = self.values(rows, columns), self.scales(rows, taken)
        return Packed(values, scales, self.bits, zeros=zeros, groups=groups)


def grouped(columns: slice, size: int) -> tuple[slice, np.ndarray | None]:
    """For columns of a matrix in groups of size: the columns of its scales, and which of them each column takes.

    The second is None where whole groups are asked for.
    """
    taken = slice(columns.start // size, -(-columns.stop // size))
    if columns.start % size == 0 and columns.stop % size == 0:
        return taken, None
    return taken, np.arange(columns.start, columns.stop) // size - taken.start


def unpack(words: np.ndarray, bits: int, order: Sequence[int] | None = None) -> np.ndarray:
    """Numbers of 4 or 8 bits, the lowest first, of rows of int32 words [R, W]: uint8 [R, W * 32 / bits].

    order: for each number of a word in turn, where in the word it is.
    """
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        octets = np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(words), -1)
    if order is None:
        return octets
    return octets.reshape(len(words), -1, len(order))[:, :, list(order)].reshape(len(words), -1)


def words_of(numbers: slice, bits: int) -> tuple[slice, slice]:
    """The words that hold a range of numbers, and where in those words' numbers the range is."""
    per_word = 32 // bits
    words = slice(numbers.start // per_word, -(-numbers.stop // per_word))
    start = numbers.start - words.start * per_word
    return words, slice(start, start + numbers.stop - numbers.start)


def expect(source: Source, name: str, shape: Sequence[int], dtypes: Sequence[str] = FLOATS) -> str:
    """The name, if there is a tensor of this shape and one of these dtypes. Raises ValueError for any other."""
    stored = source.tensors.get(name)
    wanted = f"{' or '.join(dtypes)} {tuple(shape)}"
    if stored is None:
        raise ValueError(f"tensor {name} is missing; expected {wanted}")
    if stored.shape != tuple(shape) or stored.dtype.name not in dtypes:
        raise ValueError(f"tensor {name} is {stored.dtype} {stored.shape}; expected {wanted}")
    return name


def matrix_shape(source: Source, name: str) -> tuple[int, int]:
    """Shape of a tensor. Raises ValueError if it is no matrix or holds nothing."""
    shape = source.tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"tensor {name} has shape {shape}; a matrix was expected")
    return shape


def check_order(name: str, order: np.ndarray, group: int) -> np.ndarray | None:
    """The group of each column if each has `group` of them, None if they come in order. Raises ValueError if not."""
    order = order.astype(np.int64)
    count = len(order) // group
    if order.min() < 0 or order.max() >= count or (np.bincount(order, minlength=count) != group).any():
        raise ValueError(f"tensor {name} does not put {group} columns into each of {count} groups")
    return None if (order == np.arange(len(order)) // group).all() else order


def modules(stored: Source, suffix: str) -> list[str]:
    """Names of the modules that have a tensor of this name ("qweight")."""
    return [name.removesuffix(f".{suffix}") for name in stored.tensors if name.endswith(f".{suffix}")]


def setting(described: Mapping[str, Any], key: str, default: Any, allowed: Sequence[Any]) -> Any:
    """A setting of quantization_config. Raises ValueError unless it is an allowed one (1 is not True)."""
    value = described.get(key, default)
    if not any(type(value) is type(other) and value == other for other in allowed):
        raise ValueError(f"{key}={value!r:.80} is not supported, only {' or '.join(map(repr, allowed))}")
    return value


def group_size(described: Mapping[str, Any], key: str = "group_size") -> int | None:
    """Columns that share a scale; None for all of a row. Raises ValueError if it is no such number."""
    size = described.get(key)
    if size is None or size == -1:
        return None
    if type(size) is not int or size < 1:
        raise ValueError(f"{key}={size!r:.80}; a whole number from 1, or -1 was expected")
    return size
