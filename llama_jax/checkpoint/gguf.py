"""A Llama in a GGUF file: its config, and its tensors under canonical names; and the same written.

Source: convert_hf_to_gguf.py and gguf/constants.py of ggml-org/llama.cpp. Rows of q and k are in Meta's order, in
which RoPE turns neighbours. The scaling of Llama 3.1's RoPE is stored as one factor for each pair of a head.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.gguf_vocab import tokenizer_metadata
from llama_jax.checkpoint.meta import head_rows
from llama_jax.checkpoint.names import canonical_shapes
from llama_jax.checkpoint.quantized import QuantizedSource
from llama_jax.checkpoint.quantized.blocks import FLOAT_DTYPES, NARROW, pack_rows, unpack_blocks
from llama_jax.checkpoint.quantized.packed import Narrow, Packed
from llama_jax.checkpoint.ranges import RemoteArray, RemoteFile
from llama_jax.checkpoint.source import Source, TensorSpec
from llama_jax.config import LlamaConfig, RopeConfig
from llama_jax.gguf import TYPES_BY_NAME, BlockType, GgufFile, StoredTensor, write_gguf
from llama_jax.paths import is_remote, staged_file
from llama_jax.rope import inverse_frequencies

_MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FACTORS = "rope_freqs.weight"
_MAX_LAYERS = 10_000
_ROWS = 1024  # that are packed at a time

# general.file_type by the type of the matrices.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}


def read_gguf(path: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """The config in a file, and the token ids for config.json.

    Raises ValueError for another architecture and for what is missing or not supported.
    """
    file = GgufFile(path)
    try:
        cfg = _read_config(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    ids = {f"{role}_token_id": file.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}
    return cfg, {key: value for key, value in ids.items() if value is not None}


def _read_config(file: GgufFile) -> LlamaConfig:
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture={architecture!r:.80} is not supported, only 'llama'")
    read = _Metadata(file.metadata)
    if read.number("expert_count", int, 0):
        raise ValueError("a mixture of experts is not supported")
    kind = file.metadata.get("llama.rope.scaling.type", "none")
    if kind != "none":
        raise ValueError(f"llama.rope.scaling.type={kind!r:.80} is not supported, only Llama 3's and none")
    heads, width = read.number("attention.head_count", int), read.number("embedding_length", int)
    head_dim = read.number("attention.key_length", int, width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if read.number(key, int, head_dim) != head_dim:
            raise ValueError(f"llama.{key} is not the size of a head, {head_dim}; this is not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError("tensor token_embd.weight is missing or no matrix")
    return LlamaConfig(
        vocab_size=embedding.shape[0],
        num_layers=read.number("block_count", int),
        embed_dim=width,
        mlp_dim=read.number("feed_forward_length", int),
        num_heads=heads,
        num_kv_heads=read.number("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        rope=_read_rope(file, read, head_dim),
        norm_eps=_shortest(read.number("attention.layer_norm_rms_epsilon", float)),
        tie_embeddings="output.weight" not in file.tensors,
        max_seq_len=read.number("context_length", int),
    )


class _Metadata:
    """Metadata below "llama.". Raises ValueError for what is missing or of the wrong kind."""

    def __init__(self, metadata: Mapping[str, Any]):
        self._metadata = metadata

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        """A number of this kind, of sizes a positive one."""
        value = self._metadata.get(f"llama.{key}", default)
        if type(value) is not kind or not math.isfinite(value) or (value is not default and value <= 0):
            raise ValueError(f"llama.{key}={value!r:.80}; a positive {kind.__name__} was expected")
        return value


def _shortest(number: float) -> float:
    """The shortest decimal that is this float32: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(number)))


def _read_rope(file: GgufFile, read: _Metadata, head_dim: int) -> RopeConfig:
    """RoPE whose frequencies are those that the factors give."""
    theta = _shortest(read.number("rope.freq_base", float, 10_000.0))
    plain = RopeConfig(theta, factor=1.0)
    stored = file.tensors.get(_FACTORS)
    if stored is None:
        return plain
    if stored.shape != (head_dim // 2,) or stored.block.name != "F32":
        raise ValueError(f"tensor {_FACTORS} is {stored.block.name} {stored.shape}; expected F32 {(head_dim // 2,)}")
    factors = np.asarray(_octets(file, stored)[(slice(None),)]).view("<f4").reshape(-1)
    lengths = {read.number("rope.scaling.original_context_length", int, 8192), 8192}
    wanted = inverse_frequencies(plain, head_dim) / factors
    for length in lengths:
        if np.isfinite(factors).all() and factors.max() >= 1:
            rope = RopeConfig(theta, _shortest(factors.max()), original_max_seq_len=length)
            if np.allclose(inverse_frequencies(rope, head_dim), wanted, rtol=1e-6, atol=0):
                return rope
    raise ValueError(f"the factors of {_FACTORS} are not those of Llama 3's scaling from {sorted(lengths)} tokens")


def _octets(file: GgufFile, tensor: StoredTensor) -> np.ndarray | RemoteArray:
    """The tensor as bytes, a row for each of its own (one for a vector)."""
    shape = (tensor.num_bytes // tensor.row_bytes, tensor.row_bytes)
    if is_remote(file.path):
        return RemoteArray(RemoteFile(file.path), tensor.start, shape, np.dtype(np.uint8))
    return np.memmap(file.path, np.uint8, "r", tensor.start, shape)


def open_gguf(path: Path, cfg: LlamaConfig) -> QuantizedSource:
    """The tensors of a file by canonical name. Raises ValueError for one that is not supported."""
    file = GgufFile(path)
    if cfg.num_layers > _MAX_LAYERS:
        raise ValueError(f"{file.path}: llama.block_count={cfg.num_layers} is more than {_MAX_LAYERS}")
    canonical = dict(_names(cfg.num_layers))
    orders = {
        "q_proj": head_rows(cfg.num_heads, cfg.head_dim, rotary=True),
        "k_proj": head_rows(cfg.num_kv_heads, cfg.head_dim, rotary=True),
    }
    floats, packed = _Floats(), {}
    for name, tensor in file.tensors.items():
        if name == _FACTORS:
            continue
        name = canonical.get(name, name)  # one that is no part of a Llama is refused under its own name
        order = orders.get(name.split(".")[-2]) if "." in name else None
        if order is not None and tensor.shape[:1] != order.shape:
            raise ValueError(f"{file.path}: {name} has {tensor.shape[0]} rows, the config says {len(order)}")
        rows = _Rows(file, tensor, order)
        if tensor.block.name in FLOAT_DTYPES:
            floats.add(name, rows)
        elif len(tensor.shape) == 2:
            packed[name] = BlockWeight(rows)
        else:
            raise ValueError(f"{file.path}: {name} is {tensor.block.name} of shape {tensor.shape}, no matrix")
    return QuantizedSource(floats, packed)


def _names(num_layers: int) -> Iterator[tuple[str, str]]:
    """GGUF's name and the canonical one of each tensor."""
    yield from _MODEL_NAMES.items()
    for layer in range(num_layers):
        for ours, theirs in _LAYER_NAMES.items():
            yield f"blk.{layer}.{ours}.weight", f"model.layers.{layer}.{theirs}.weight"


class _Rows:
    """The bytes of a stored tensor by canonical rows."""

    def __init__(self, file: GgufFile, tensor: StoredTensor, order: np.ndarray | None):
        self.tensor, self._order, self._octets = tensor, order, _octets(file, tensor)

    def read(self, rows: slice, octets: slice) -> np.ndarray:
        """uint8 [R, B]."""
        return np.asarray(self._octets[rows if self._order is None else self._order[rows], octets])


class _Floats:
    """A Source of the tensors that are stored as floats."""

    def __init__(self) -> None:
        self._rows: dict[str, _Rows] = {}
        self.tensors: dict[str, TensorSpec] = {}

    def add(self, name: str, rows: _Rows) -> None:
        """One more."""
        self._rows[name] = rows
        self.tensors[name] = TensorSpec(rows.tensor.shape, FLOAT_DTYPES[rows.tensor.block.name])

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The tensor or its slice."""
        shape, dtype = self.tensors[name]
        whole = [slice(*s.indices(size)[:2]) for s, size in zip(index or (), shape, strict=False)]
        whole += [slice(0, size) for size in shape[len(whole) :]]
        rows, columns = whole if len(shape) == 2 else (slice(0, 1), whole[0])
        octets = slice(columns.start * dtype.itemsize, columns.stop * dtype.itemsize)
        values = np.ascontiguousarray(self._rows[name].read(rows, octets)).view(dtype)
        return values if len(shape) == 2 else values[0]


class BlockWeight:
    """A PackedWeight in blocks of one type."""

    parts, zeros = (), None

    def __init__(self, rows: _Rows):
        self._rows = rows
        self.shape: tuple[int, int] = rows.tensor.shape  # type: ignore[assignment]

    @property
    def narrow(self) -> Narrow | None:
        """Values in int4 or int8, of the types whose numbers are multiples of a scale."""
        return NARROW.get(self._rows.tensor.block.name)

    def scales(self, rows: slice, groups: slice) -> np.ndarray:
        """Of a type that can be held narrow."""
        assert self.narrow is not None
        size, block = self.narrow.group, self._rows.tensor.block.num_values
        first, last = groups.start * size // block, -(-groups.stop * size // block)
        scales = self.read(rows, slice(first * block, last * block)).scales
        start = groups.start - first * block // size
        return scales[:, start : start + groups.stop - groups.start].astype(self.narrow.scale_dtype)

    def read(self, rows: slice, columns: slice) -> Packed:
        """The slice."""
        block = self._rows.tensor.block
        first, last = columns.start // block.num_values, -(-columns.stop // block.num_values)
        octets = self._rows.read(rows, slice(first * block.num_bytes, last * block.num_bytes))
        packed = unpack_blocks(block.name, octets.reshape(len(octets), last - first, block.num_bytes))
        start = columns.start - first * block.num_values
        return packed.columns(slice(start, start + columns.stop - columns.start))


def write_gguf_model(directory: Path, cfg: LlamaConfig, source: Source, *, type_name: str | None = None) -> None:
    """Write canonical tensors as model.gguf into a directory, with the tokenizer that is there.

    type_name: that of the matrices, F32, F16, BF16, Q8_0 or Q4_0; by default the embedding's own. Vectors are F32.
    Raises ValueError for widths that blocks do not divide and for what a GGUF file cannot say.
    """
    dtype = source.tensors["model.embed_tokens.weight"].dtype
    type_name = type_name or next(name for name, other in FLOAT_DTYPES.items() if other == dtype)
    if type_name not in _FILE_TYPES:
        raise ValueError(f"GGUF is written in {', '.join(_FILE_TYPES).lower()}, not in {type_name.lower()}")
    if cfg.rope.factor != 1.0 and (cfg.rope.low_freq_factor, cfg.rope.high_freq_factor) != (1.0, 4.0):
        raise ValueError(f"its reader takes low_freq_factor 1 and high_freq_factor 4; the model has {cfg.rope}")
    orders = {
        "q_proj": np.argsort(head_rows(cfg.num_heads, cfg.head_dim, rotary=True)),
        "k_proj": np.argsort(head_rows(cfg.num_kv_heads, cfg.head_dim, rotary=True)),
    }
    shapes, stored = {}, canonical_shapes(cfg)
    names = {ours: theirs for ours, theirs in _names(cfg.num_layers) if theirs in stored}
    for ours, theirs in names.items():
        shapes[ours] = (stored[theirs], TYPES_BY_NAME[type_name if len(stored[theirs]) == 2 else "F32"])
    factors = None
    if cfg.rope.factor != 1.0:
        plain = RopeConfig(cfg.rope.theta, factor=1.0)
        factors = inverse_frequencies(plain, cfg.head_dim) / inverse_frequencies(cfg.rope, cfg.head_dim)
        shapes[_FACTORS] = (factors.shape, TYPES_BY_NAME["F32"])

    def rows() -> Iterator[Iterable[memoryview]]:
        for ours, theirs in names.items():
            yield _packed_pieces(source, theirs, orders.get(theirs.split(".")[-2]), shapes[ours])
        if factors is not None:
            yield [pack_rows("F32", factors[None]).data]

    metadata = _metadata(cfg, type_name) | tokenizer_metadata(directory, cfg.vocab_size)
    with staged_file(directory / "model.gguf") as path:
        write_gguf(path, metadata, shapes, rows())


def _packed_pieces(
    source: Source, name: str, order: np.ndarray | None, stored: tuple[tuple[int, ...], BlockType]
) -> Iterator[memoryview]:
    """The bytes of a tensor, some rows at a time; order says which canonical row each stored one is."""
    shape, block = stored
    if len(shape) == 1:
        yield pack_rows(block.name, source.read(name)[None]).reshape(-1).data
        return
    for start in range(0, shape[0], _ROWS):
        stop = min(start + _ROWS, shape[0])
        if order is None:
            rows = source.read(name, (slice(start, stop),))
        else:  # rows change places within their heads
            picked = order[start:stop]
            first = picked.min()
            rows = source.read(name, (slice(first, picked.max() + 1),))[picked - first]
        yield pack_rows(block.name, rows).reshape(-1).data


def _metadata(cfg: LlamaConfig, type_name: str) -> dict[str, Any]:
    described = {
        "general.architecture": "llama",
        "general.file_type": _FILE_TYPES[type_name],
        "general.quantization_version": 2,
        "llama.block_count": cfg.num_layers,
        "llama.context_length": cfg.max_seq_len,
        "llama.embedding_length": cfg.embed_dim,
        "llama.feed_forward_length": cfg.mlp_dim,
        "llama.attention.head_count": cfg.num_heads,
        "llama.attention.head_count_kv": cfg.num_kv_heads,
        "llama.attention.key_length": cfg.head_dim,
        "llama.attention.value_length": cfg.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(cfg.norm_eps),
        "llama.rope.dimension_count": cfg.head_dim,
        "llama.rope.freq_base": float(cfg.rope.theta),
        "llama.vocab_size": cfg.vocab_size,
    }
    if cfg.rope.factor != 1.0:
        described["llama.rope.scaling.original_context_length"] = cfg.rope.original_max_seq_len
    return described
