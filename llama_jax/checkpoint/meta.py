"""Meta's checkpoint directory, consolidated.NN.pth and params.json, as canonical tensors and back.

Source: models/llama3/args.py and models/checkpoint.py of meta-llama/llama-models. Each shard holds one
tensor-parallel rank's part of every matrix and all of every norm. Meta's RoPE turns neighbouring rows
of q and k, the canonical order turns row i with row i + head_dim / 2, so within each head their rows
change places. The one invariant: values only move, so Meta -> canonical -> Meta is bit-equal.
"""

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama_jax.checkpoint.names import canonical_shapes
from llama_jax.checkpoint.pth import PthFile, write_pth
from llama_jax.checkpoint.source import Source, TensorSpec
from llama_jax.config import PRESETS, LlamaConfig, RopeConfig, llama3_mlp_dim
from llama_jax.paths import as_path, make_directory

# Meta's name, the canonical name, the dimension that the shards split (None: each holds the whole).
_TABLE = (
    ("tok_embeddings.weight", "model.embed_tokens.weight", 0),
    ("norm.weight", "model.norm.weight", None),
    ("output.weight", "lm_head.weight", 0),
    ("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight", None),
    ("layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight", 0),
    ("layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight", 0),
    ("layers.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight", 0),
    ("layers.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight", 1),
    ("layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight", None),
    ("layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate_proj.weight", 0),
    ("layers.{}.feed_forward.w3.weight", "model.layers.{}.mlp.up_proj.weight", 0),
    ("layers.{}.feed_forward.w2.weight", "model.layers.{}.mlp.down_proj.weight", 1),
)
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"

_PARAM_TYPES = {
    **dict.fromkeys(("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"), int),
    **dict.fromkeys(("ffn_dim_multiplier", "norm_eps", "rope_theta"), float),
    "use_scaled_rope": bool,
}
_REQUIRED_PARAMS = ("dim", "n_layers", "n_heads", "vocab_size", "rope_theta")  # the others' defaults never changed
_IGNORED_PARAMS = ("max_seq_len", "max_batch_size")  # sizes of a cache
_UNSUPPORTED_PARAMS = re.compile(r"quantization_args|lora_args|(vision|moe|rope)_.*")

# What Meta published with ffn_dim_multiplier and multiple_of; in this order each preset finds its own.
_MLP_RULES = ((1.0, 256), (1.5, 256), (1.3, 4096), (1.3, 1024), (1.2, 4096))

# params.json says neither the RoPE factor (Meta's own code takes 8 for all) nor whether the head is tied.
_PUBLISHED = {(cfg.embed_dim, cfg.num_layers, cfg.num_heads): cfg for cfg in PRESETS.values()}


def config_from_params(
    params: Mapping[str, Any],
    *,
    tie_embeddings: bool,
    rope_factor: float | None = None,
    max_seq_len: int | None = None,
    allow_unknown: bool = False,
) -> LlamaConfig:
    """The config that the contents of a params.json describe.

    rope_factor replaces the inferred one: 32 for the 3.2 1B and 3B, otherwise 8, and 1 without
    use_scaled_rope. max_seq_len is 131,072 with scaled RoPE and 8,192 without, if not given.
    Raises ValueError naming the key that is missing, of the wrong type, unsupported, or (unless
    allow_unknown) unknown.
    """
    params = {key: value for key, value in params.items() if value is not None and key not in _IGNORED_PARAMS}
    _check_params(params, allow_unknown=allow_unknown)
    dim, num_heads = params["dim"], params["n_heads"]
    if dim % num_heads:
        raise ValueError(f"params.json: dim={dim} is not a multiple of n_heads={num_heads}")
    published = _PUBLISHED.get((dim, params["n_layers"], num_heads))
    if published and published.tie_embeddings and not tie_embeddings:
        raise ValueError(
            f"a Llama 3.2 of dim {dim} has {_HEAD} equal to {_EMBEDDING}, here they differ; "
            f"remove {_HEAD} to tie them, or keep this model in the Hugging Face format"
        )
    if rope_factor is None:
        scaled = published.rope.factor if published else 8.0
        rope_factor = scaled if params.get("use_scaled_rope", False) else 1.0
    return LlamaConfig(
        vocab_size=params["vocab_size"],
        num_layers=params["n_layers"],
        embed_dim=dim,
        mlp_dim=llama3_mlp_dim(dim, params.get("ffn_dim_multiplier", 1.0), params.get("multiple_of", 256)),
        num_heads=num_heads,
        num_kv_heads=params.get("n_kv_heads", num_heads),
        head_dim=dim // num_heads,
        rope=RopeConfig(theta=float(params["rope_theta"]), factor=float(rope_factor)),
        norm_eps=float(params.get("norm_eps", 1e-5)),
        tie_embeddings=tie_embeddings,
        max_seq_len=max_seq_len or (131_072 if rope_factor > 1 else 8192),
    )


def _check_params(params: Mapping[str, Any], *, allow_unknown: bool) -> None:
    for key, value in params.items():
        if key in _PARAM_TYPES:
            kind = _PARAM_TYPES[key]
            if not isinstance(value, (int, kind)) or (kind is not bool and value <= 0):
                raise ValueError(f"params.json: {key}={value!r}, expected a positive {kind.__name__}")
        elif _UNSUPPORTED_PARAMS.fullmatch(key):
            raise ValueError(f"params.json: {key} is not supported: quantized, LoRA, vision or other RoPE variant")
        elif not allow_unknown:
            raise ValueError(f"params.json: unknown key {key!r}; allow_unknown=True reads on as if it were not there")
    for key in _REQUIRED_PARAMS:
        if key not in params:
            raise ValueError(f"params.json: {key} is missing")


def read_params(
    directory: str | os.PathLike,
    *,
    rope_factor: float | None = None,
    max_seq_len: int | None = None,
    allow_unknown: bool = False,
) -> LlamaConfig:
    """The config of a Meta directory: params.json (see config_from_params) and what only the shards say.

    From the shards come a vocabulary size of -1, whether the head is tied (no output.weight, or one
    equal to the embedding) and whether n_kv_heads counts copies (405B MP16: 16 heads in 16 shards,
    neighbours equal). Raises ValueError, FileNotFoundError if files are missing.
    """
    params = _load_params(as_path(directory) / "params.json")
    shards = _open_shards(directory)
    stored = shards[0].tensors
    embedding = stored.get(_EMBEDDING)
    if params.get("vocab_size") in (None, -1) and embedding and len(embedding.shape) == 2:
        rows, width = embedding.shape
        params["vocab_size"] = rows * len(shards) if width == params.get("dim") else rows
    describe = functools.partial(
        config_from_params, rope_factor=rope_factor, max_seq_len=max_seq_len, allow_unknown=allow_unknown
    )
    cfg = describe(params, tie_embeddings=True)
    tied = _HEAD not in stored
    source = MetaSource(directory, dataclasses.replace(cfg, tie_embeddings=tied))
    if cfg.num_kv_heads == len(shards) and cfg.num_kv_heads % 2 == 0 and _first_heads_equal(source, cfg.head_dim):
        params["n_kv_heads"] = cfg.num_kv_heads // 2
    tied = tied or _head_is_embedding(source, cfg.vocab_size)
    return describe(params, tie_embeddings=tied)


def _load_params(path: Path) -> dict[str, Any]:
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(params, dict):
        raise ValueError(f"{path}: expected an object, found {type(params).__name__}")
    return params


def _first_heads_equal(source: Source, head_dim: int) -> bool:
    heads = source.read("model.layers.0.self_attn.k_proj.weight", (slice(0, 2 * head_dim),))
    return _bit_equal(heads[:head_dim], heads[head_dim:])


def _head_is_embedding(source: Source, vocab_size: int, step: int = 1024) -> bool:
    """Whether both tables are bit-equal. Untied ones differ at once, so little is read of them."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    parts = ((slice(start, start + step),) for start in range(0, vocab_size, step))
    return all(_bit_equal(*(source.read(name, part) for name in names)) for part in parts)


def _bit_equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


class _Stored(NamedTuple):
    """How Meta keeps one canonical tensor: its name there, canonical shape, the dimension that shards split.

    rows: for q, k, v, the stored row of each canonical row. copies: how often each head is stored.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None
    rows: np.ndarray | None
    copies: int

    def shard_shape(self, num_shards: int) -> tuple[int, ...]:
        """Shape of one shard's part."""
        return tuple(
            size * self.copies // num_shards if dim == self.dim else size for dim, size in enumerate(self.shape)
        )


def _layout(cfg: LlamaConfig, *, kv_copies: int = 1, embedding_dim: int = 0) -> dict[str, _Stored]:
    """Canonical name -> how Meta keeps it."""
    rows = {
        "wq": head_rows(cfg.num_heads, cfg.head_dim, rotary=True),
        "wk": head_rows(cfg.num_kv_heads, cfg.head_dim, rotary=True, copies=kv_copies),
        "wv": head_rows(cfg.num_kv_heads, cfg.head_dim, rotary=False, copies=kv_copies),
    }
    shapes = canonical_shapes(cfg)
    entries = {}
    for name, canonical, dim in _TABLE:
        matrix = name.split(".")[-2]
        dim = embedding_dim if name == _EMBEDDING else dim
        copies = kv_copies if matrix in ("wk", "wv") else 1
        for layer in range(cfg.num_layers if "{}" in name else 1):
            key = canonical.format(layer)
            if key in shapes:  # a tied model has no head
                entries[key] = _Stored(name.format(layer), shapes[key], dim, rows.get(matrix), copies)
    return entries


def head_rows(num_heads: int, head_dim: int, *, rotary: bool, copies: int = 1) -> np.ndarray:
    """Stored row of every canonical row, first copy of each head. Rotary: even rows first, then odd ones."""
    within = np.arange(head_dim)
    if rotary:
        within = within.reshape(head_dim // 2, 2).T.reshape(-1)
    return (np.arange(num_heads)[:, None] * copies * head_dim + within).reshape(-1)


def _open_shards(directory: str | os.PathLike) -> list[PthFile]:
    """consolidated.00.pth to the last. Raises FileNotFoundError naming the one that is missing."""
    directory = as_path(directory)
    found = {path.name for path in directory.glob("consolidated.*.pth")}
    names = [f"consolidated.{n:02d}.pth" for n in range(max(len(found), 1))]
    for name in names:
        if name not in found:
            raise FileNotFoundError(f"{directory / name} is missing; shards that are there: {sorted(found)}")
    return [PthFile(directory / name) for name in names]


class MetaSource:
    """The shards of a Meta directory as one Source of canonical tensors.

    A slice reads its own bytes, from the shards that hold them. KV heads that are stored more than
    once are read once more each and compared.
    """

    def __init__(self, directory: str | os.PathLike, cfg: LlamaConfig):
        """Raises ValueError naming file and tensor where the shards are not a model of this config.

        With tied embeddings an output.weight in the files is left alone (read_params compared it).
        """
        self._shards = _open_shards(directory)
        self._head_dim = cfg.head_dim
        _check_names(self._shards, cfg)
        stored = self._shards[0].tensors
        kv_size = math.prod(stored["layers.0.attention.wk.weight"].shape) * len(self._shards)
        self._entries = _layout(
            cfg,
            kv_copies=max(1, kv_size // (cfg.num_kv_heads * cfg.head_dim * cfg.embed_dim)),
            embedding_dim=int(stored[_EMBEDDING].shape[:1] == (cfg.vocab_size,)),  # older files split the width
        )
        for entry in self._entries.values():
            _check_shapes(self._shards, entry, cfg.head_dim)
        self.tensors = {
            name: TensorSpec(entry.shape, stored[entry.name].dtype) for name, entry in self._entries.items()
        }

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The canonical tensor, or its slice, in its stored dtype.

        Raises ValueError for a name that is not there, and if heads that should be copies of each other differ.
        """
        if name not in self._entries:
            raise ValueError(f"{self._shards[0].path.parent}: no tensor {name!r}")
        entry = self._entries[name]
        index = (index or ()) + (slice(None),) * (len(entry.shape) - len(index or ()))
        first = self._merge(entry, index, copy=0)
        for copy in range(1, entry.copies):
            if not _bit_equal(first, self._merge(entry, index, copy=copy)):
                raise ValueError(f"{self._shards[0].path.parent}: {entry.name}: KV heads stored twice are not equal")
        return first

    def _merge(self, entry: _Stored, index: tuple[slice, ...], *, copy: int) -> np.ndarray:
        """The slice put together from the shards that hold a part of it."""
        dim = entry.dim
        if dim is None:
            return self._shards[0].read(entry.name, index)
        start, stop, _ = index[dim].indices(entry.shape[dim])
        size = entry.shard_shape(len(self._shards))[dim]
        parts = []
        for n, shard in enumerate(self._shards):
            if entry.rows is None:
                low, high = max(start - n * size, 0), min(stop - n * size, size)
                here = np.s_[low:high] if low < high else None
            else:
                rows = entry.rows[start:stop] + copy * self._head_dim
                rows = rows[rows // size == n] - n * size
                here = rows if rows.size else None
            if here is not None:
                parts.append(shard.view(entry.name)[(*index[:dim], here, *index[dim + 1 :])])
        if not parts:
            return self._shards[0].read(entry.name, (*index[:dim], slice(0, 0), *index[dim + 1 :]))
        return np.concatenate(parts, axis=dim)


def _check_names(shards: list[PthFile], cfg: LlamaConfig) -> None:
    """Every shard holds every tensor of the config and no other."""
    expected = {entry.name for entry in _layout(cfg).values()}
    for shard in shards:
        missing = expected - shard.tensors.keys()
        if missing:
            raise ValueError(f"{shard.path}: {min(missing)} is missing")
        surplus = {name for name in shard.tensors.keys() - expected if not name.endswith("rope.freqs")}
        surplus -= {_HEAD} if cfg.tie_embeddings else set()
        if surplus:
            raise ValueError(f"{shard.path}: {min(surplus)} is not a tensor of this model")


def _check_shapes(shards: list[PthFile], entry: _Stored, head_dim: int) -> None:
    """Every shard holds an equal part, and whole heads."""
    count = len(shards)
    expected = TensorSpec(entry.shard_shape(count), shards[0].tensors[entry.name].dtype)
    unit = count * (1 if entry.rows is None else head_dim)
    divides = entry.dim is None or entry.shape[entry.dim] * entry.copies % unit == 0
    for shard in shards:
        found = shard.tensors[entry.name]
        if found != expected or not divides:
            raise ValueError(
                f"{shard.path}: {entry.name} is {found.dtype}{found.shape}, expected {expected.dtype}{expected.shape}, "
                f"one of {count} parts of {entry.shape}; is a shard missing, or params.json another model's?"
            )


def write_meta(directory: str | os.PathLike, cfg: LlamaConfig, source: Source, *, num_shards: int = 1) -> None:
    """Writes canonical tensors as consolidated.NN.pth and params.json, one shard's part of one tensor at a time.

    A tied head is written too, as Meta does, over the embedding's storage. The caller stages the
    directory and adds the tokenizer. Raises ValueError, before anything is written, if params.json
    cannot carry the config, num_shards does not divide it, or source does not hold exactly its tensors.
    """
    params = _params(cfg)
    for field in ("num_heads", "num_kv_heads", "mlp_dim", "vocab_size"):
        if num_shards < 1 or getattr(cfg, field) % num_shards:
            raise ValueError(f"{field}={getattr(cfg, field)} is not divisible into num_shards={num_shards}")
    layout = _layout(cfg)
    if differing := layout.keys() ^ source.tensors.keys():
        name = min(differing)
        raise ValueError(f"tensor {name!r} is {'missing' if name in layout else 'not one of this model'}")
    for name, entry in layout.items():
        if source.tensors[name].shape != entry.shape:
            raise ValueError(f"tensor {name!r} has shape {source.tensors[name].shape}, expected {entry.shape}")
    directory = as_path(directory)
    make_directory(directory)
    specs = {
        entry.name: TensorSpec(entry.shard_shape(num_shards), source.tensors[name].dtype)
        for name, entry in layout.items()
    }
    shared = {_HEAD: _EMBEDDING} if cfg.tie_embeddings else {}
    for n in range(num_shards):
        parts = ((entry.name, _read_part(source, name, entry, n, num_shards)) for name, entry in layout.items())
        write_pth(directory / f"consolidated.{n:02d}.pth", specs, parts, shared=shared)
    (directory / "params.json").write_text(json.dumps(params) + "\n", encoding="utf-8")


def _read_part(source: Source, name: str, entry: _Stored, n: int, num_shards: int) -> np.ndarray:
    """What shard n holds of a canonical tensor, in Meta's order of rows."""
    if entry.dim is None:
        return source.read(name)
    size = entry.shape[entry.dim] // num_shards
    index = [slice(None), slice(None)]
    index[entry.dim] = slice(n * size, (n + 1) * size)
    part = source.read(name, tuple(index))
    return part if entry.rows is None else part[np.argsort(entry.rows[:size])]


def _params(cfg: LlamaConfig) -> dict[str, Any]:
    """params.json of a config. Raises ValueError if reading it would give another config."""
    multiplier, multiple_of = _mlp_rule(cfg)
    params = {
        "dim": cfg.embed_dim,
        "n_layers": cfg.num_layers,
        "n_heads": cfg.num_heads,
        "n_kv_heads": cfg.num_kv_heads,
        "vocab_size": cfg.vocab_size,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope.theta,
        "use_scaled_rope": cfg.rope.factor != 1.0,
    }
    reread = config_from_params(params, tie_embeddings=cfg.tie_embeddings, max_seq_len=cfg.max_seq_len)
    for field in dataclasses.fields(cfg):
        ours, theirs = getattr(cfg, field.name), getattr(reread, field.name)
        if ours != theirs:
            raise ValueError(f"params.json cannot say {field.name}={ours}: its reader would take {theirs}")
    return params


def _mlp_rule(cfg: LlamaConfig) -> tuple[float, int]:
    """ffn_dim_multiplier and multiple_of that give the config's width: a published pair, else one to the row."""
    # The half keeps the product above mlp_dim whatever way it rounds; the reader truncates it.
    exact = ((cfg.mlp_dim + 0.5) / int(8 * cfg.embed_dim / 3), 1)
    return next((rule for rule in _MLP_RULES if llama3_mlp_dim(cfg.embed_dim, *rule) == cfg.mlp_dim), exact)
