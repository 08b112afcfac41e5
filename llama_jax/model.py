"""Llama 3.1 as Flax NNX modules on an explicit mesh: the file to read first.

Source: The Llama 3 Herd of Models (arXiv 2407.21783) section 3.2. The invariants: each weight
declares its shape, logical axes and initial spread in one line, from which initialisation,
shardings and the checkpoint layout follow; modules hold no mutable state; every weight product
goes through quantize.einsum; attention meets a cache only through its protocol.

Letters: B batch, T tokens, S keys, D model width, F MLP width, V vocabulary (padded to the mesh),
K KV heads, G query heads per KV head, H head dimension, L layers.
"""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec, reshard

from llama_jax.attention import mesh_axes, self_attend
from llama_jax.cache import LayerCache
from llama_jax.config import LlamaConfig
from llama_jax.kernels import Tokens
from llama_jax.kernels.two_ended import plain_split, two_ended
from llama_jax.mesh import ShardingRules, sharding_rules
from llama_jax.quantize import einsum
from llama_jax.remat import GATE, KEY, MIDDLE, QUERY, REMAT_POLICIES, RESIDUAL, UP, VALUE
from llama_jax.rope import rope_angles, rotate

Layout = Literal["stacked", "layers"]

INIT_STDDEV = 0.02

# Tokens whose columns of the embedding a device looks up at once: at a TPU's 128 lanes 1 GiB in float32.
_MOST_LOOKED_UP = 2**21


def weight(
    rngs: nnx.Rngs, rules: ShardingRules, shape: Sequence[int], axes: Sequence[str | None], stddev: float = INIT_STDDEV
) -> nnx.Param:
    """A float32 parameter of this shape, normally distributed, split by its logical axes."""
    init = jax.nn.initializers.normal(stddev)
    return nnx.Param(init(rngs.params(), tuple(shape), jnp.float32, out_sharding=rules(*axes)))


def token_table(rngs: nnx.Rngs, cfg: LlamaConfig, rules: ShardingRules, axes: Sequence[str | None]) -> nnx.Param:
    """A [V, D] table, rows padded with zeros to a multiple that the mesh divides.

    Random bits are counted along rows, so the true rows are the same on every mesh.
    """
    rows = padded_vocab(cfg, rules)
    table = weight(rngs, rules, (rows, cfg.embed_dim), axes)
    if rows == cfg.vocab_size:
        return table
    return nnx.Param(jnp.where(jnp.arange(rows)[:, None] < cfg.vocab_size, table[...], 0.0))


def padded_vocab(cfg: LlamaConfig, rules: ShardingRules) -> int:
    """Rows of the embedding and of the head in memory."""
    return -(-cfg.vocab_size // rules.vocab_multiple) * rules.vocab_multiple


def whole_in_tensor(x: Array, rules: ShardingRules) -> Array:
    """X [B, T, D] gathered where its sequence is split over `tensor`, as the residual stream may be."""
    batch, sequence, _ = jax.typeof(x).sharding.spec
    left = tuple(axis for axis in mesh_axes(sequence) if axis in rules.sequence)
    return reshard(x, PartitionSpec(batch, left or None, None))


def split_like(x: Array, rules: ShardingRules, *axes: str | None) -> PartitionSpec:
    """Batch and sequence split as in x [B, T, ...], further dimensions by logical axis."""
    return PartitionSpec(*jax.typeof(x).sharding.spec[:2], *rules(*axes))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, statistics in float32 (arXiv 1910.07467)."""

    def __init__(self, cfg: LlamaConfig, rules: ShardingRules):
        self.eps = cfg.norm_eps
        self.scale = nnx.Param(jnp.ones((cfg.embed_dim,), jnp.float32, out_sharding=rules(None)))

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D] in the dtype of x."""
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...].astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, cfg: LlamaConfig, rules: ShardingRules, *, rngs: nnx.Rngs):
        d, k, g, h = cfg.embed_dim, cfg.num_kv_heads, cfg.num_groups, cfg.head_dim
        self.rules = rules
        self.wq = weight(rngs, rules, (k, g, h, d), ("kv_heads", "q_groups", None, "embed"))
        self.wk = weight(rngs, rules, (k, h, d), ("kv_heads", None, "embed"))
        self.wv = weight(rngs, rules, (k, h, d), ("kv_heads", None, "embed"))
        self.wo = weight(
            rngs,
            rules,
            (k, g, h, d),
            ("kv_heads", "q_groups", None, "embed"),
            INIT_STDDEV / (2 * cfg.num_layers) ** 0.5,
        )

    def __call__(
        self, x: Array, angles: tuple[Array, Array], tokens: Tokens, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        """[B, T, D] -> [B, T, D], and the cache with these tokens in it (None without one)."""
        residual, x = jax.typeof(x).sharding.spec, whole_in_tensor(x, self.rules)
        split = functools.partial(split_like, x, self.rules)
        q = rotate(
            einsum("BTD,KGHD->BTKGH", x, self.wq[...], out_sharding=split("kv_heads", "q_groups", None)), *angles
        )
        k = rotate(einsum("BTD,KHD->BTKH", x, self.wk[...], out_sharding=split("kv_heads", None)), *angles)
        v = einsum("BTD,KHD->BTKH", x, self.wv[...], out_sharding=split("kv_heads", None))
        q, k, v = checkpoint_name(q, QUERY), checkpoint_name(k, KEY), checkpoint_name(v, VALUE)
        alone = cache is None or cache.empty
        if cache is not None:
            cache = cache.update(k, v, tokens.positions)
        if cache is None or alone:
            whole = self.rules("batch", None, "kv_heads", None)
            out = self_attend(q, reshard(k, whole), reshard(v, whole), tokens=tokens)
        else:
            out = cache.attend(q, tokens.positions)
        # Split only now, so that the gradient is gathered once, before the products that take it.
        return reshard(einsum("BTKGH,KGHD->BTD", out, self.wo[...], out_sharding=split(None)), residual), cache


@jax.custom_vjp
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up, elementwise."""
    return jax.nn.silu(gate) * up


def _swiglu_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    """Both gradients in one pass; else XLA computes each again within every product that takes it."""
    _, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, *saved)
    return lax.optimization_barrier(pull(gradient))


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


class MLP(nnx.Module):
    """SwiGLU feed-forward layer (arXiv 2002.05202)."""

    def __init__(self, cfg: LlamaConfig, rules: ShardingRules, *, rngs: nnx.Rngs):
        d, f = cfg.embed_dim, cfg.mlp_dim
        self.rules = rules
        self.w_gate = weight(rngs, rules, (d, f), ("embed", "mlp"))
        self.w_up = weight(rngs, rules, (d, f), ("embed", "mlp"))
        self.w_down = weight(rngs, rules, (f, d), ("mlp", "embed"), INIT_STDDEV / (2 * cfg.num_layers) ** 0.5)

    def __call__(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        residual, x = jax.typeof(x).sharding.spec, whole_in_tensor(x, self.rules)
        split = functools.partial(split_like, x, self.rules)
        gate = einsum("BTD,DF->BTF", x, self.w_gate[...], out_sharding=split("mlp"))
        up = einsum("BTD,DF->BTF", x, self.w_up[...], out_sharding=split("mlp"))
        gate, up = checkpoint_name(gate, GATE), checkpoint_name(up, UP)
        return reshard(einsum("BTF,FD->BTD", swiglu(gate, up), self.w_down[...], out_sharding=split(None)), residual)


class Block(nnx.Module):
    """One decoder layer: attention and MLP, each on the normed residual stream."""

    def __init__(self, cfg: LlamaConfig, rules: ShardingRules, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(cfg, rules)
        self.attention = Attention(cfg, rules, rngs=rngs)
        self.mlp_norm = RMSNorm(cfg, rules)
        self.mlp = MLP(cfg, rules, rngs=rngs)

    def __call__(
        self, x: Array, angles: tuple[Array, Array], tokens: Tokens, cache: LayerCache | None
    ) -> tuple[Array, LayerCache | None]:
        """[B, T, D] -> [B, T, D], and the cache with these tokens in it (None without one)."""
        attended, cache = self.attention(self.attention_norm(x), angles, tokens, cache)
        x = checkpoint_name(x + attended, MIDDLE)
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """The decoder: embedding, layers, norm and head.

    layout "stacked" holds the layers as one Block whose arrays have a leading L, scanned in
    training; "layers" holds one Block a layer, which decodes faster. Computes in the dtype of its
    weights.
    """

    def __init__(
        self,
        cfg: LlamaConfig,
        rules: ShardingRules | None = None,
        *,
        rngs: nnx.Rngs,
        layout: Layout = "stacked",
    ):
        """A model with fresh weights, born split over the ambient mesh. Raises ValueError if that cannot be."""
        self.cfg = cfg
        self.rules = rules = sharding_rules(cfg) if rules is None else rules
        self.embedding = token_table(rngs, cfg, rules, (None, "columns"))
        keys = jax.random.split(rngs.params(), cfg.num_layers)
        if layout == "stacked":
            self.layers = jax.vmap(lambda key: Block(cfg, rules, rngs=nnx.Rngs(key)))(keys)
        else:
            self.layers = nnx.List([Block(cfg, rules, rngs=nnx.Rngs(key)) for key in keys])
        self.final_norm = RMSNorm(cfg, rules)
        self.head = None if cfg.tie_embeddings else token_table(rngs, cfg, rules, ("vocab", "embed"))

    @jax.jit
    def __call__(self, tokens: Array, positions: Array | None = None, segment_ids: Array | None = None) -> Array:
        """Logits float32 [B, T, V] of tokens int32 [B, T] with the true vocabulary.

        positions int32 [B, T] default to 0, 1, 2, ...; with segment_ids int32 [B, T] a token sees
        only those of its own segment, in which positions must rise. Any B and T: they are padded
        here to what the mesh divides. Compiled once for each shape.
        """
        batch, length = tokens.shape
        tokens, positions, segment_ids = self._padded(tokens, positions, segment_ids)
        logits = self.unembed(self.hidden(tokens, positions, segment_ids))
        if logits.shape != (batch, length, self.cfg.vocab_size):
            logits = reshard(logits, PartitionSpec(None, None, None))[:batch, :length, : self.cfg.vocab_size]
        return logits

    def hidden(
        self, tokens: Array, positions: Array, segment_ids: Array | None = None, *, remat: str = "none"
    ) -> Array:
        """Normed output of the last layer [B, T, D]. Raises ValueError for a T that the mesh does not divide."""
        if tokens.shape[1] % self.rules.sequence_multiple:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens cannot be split in two ends over `context`; "
                f"use a multiple of {self.rules.sequence_multiple}"
            )
        x, angles, where = self._enter(tokens, Tokens(positions, segment_ids), stream="residual")

        @functools.partial(jax.checkpoint, policy=REMAT_POLICIES[remat], prevent_cse=False)
        def run(x: Array, layer: Block) -> tuple[Array, None]:
            return layer(checkpoint_name(x, RESIDUAL), angles, where, None)[0], None

        if isinstance(self.layers, Block):
            x, _ = jax.lax.scan(run, x, self.layers)
        else:
            for layer in self.layers:
                x, _ = run(x, layer)
        return plain_split(whole_in_tensor(self.final_norm(x), self.rules))

    def extend(
        self, tokens: Array, positions: Array, caches: Sequence[LayerCache]
    ) -> tuple[Array, tuple[LayerCache, ...]]:
        """Run tokens int32 [B, T] at positions int32 [B, T] on top of a cache a layer.

        Prefill and decode alike. Returns the normed output [B, T, D] and the caches with the tokens
        stored.
        """
        x, angles, where = self._enter(tokens, Tokens(positions, None), stream="sequence")
        extended = []
        for layer, cache in zip(self.blocks(), caches, strict=True):
            x, cache = layer(x, angles, where, cache)
            extended.append(cache)
        return plain_split(self.final_norm(x)), tuple(extended)

    def _enter(self, tokens: Array, where: Tokens, *, stream: str) -> tuple[Array, tuple[Array, Array], Tokens]:
        """Embedded tokens [B, T, D], their angles and where they stand; in two-ended order if T is split.

        stream: the logical axis of T in the result, "sequence" or "residual", as far as the mesh divides it.
        """
        rules, length = self.rules, tokens.shape[1]
        sequence = "sequence" if length % rules.sequence_multiple == 0 else None
        if rules.sequence and sequence:
            whole, num_shards = rules("batch", None), rules.sequence_multiple // 2
            tokens, where = jax.tree.map(lambda ids: two_ended(reshard(ids, whole), num_shards), (tokens, where))
        x = self.embed(tokens, stream if sequence and length % rules.residual_multiple == 0 else sequence)
        where = jax.tree.map(lambda ids: reshard(ids, rules("batch", sequence)), where)
        return x, rope_angles(self.cfg.rope, self.cfg.head_dim, where.positions), where

    def blocks(self) -> list[Block]:
        """The layers one by one; slices, when they are stacked."""
        if isinstance(self.layers, Block):
            return [jax.tree.map(lambda a, i=i: a[i], self.layers) for i in range(self.cfg.num_layers)]
        return list(self.layers)

    def embed(self, tokens: Array, stream: str | None = None) -> Array:
        """Rows of the embedding: int32 [B, T] -> [B, T, D], T split as this logical axis.

        The table is never gathered: each device looks up its columns for all tokens of those that it
        shares the table with, then they exchange columns for tokens; of many tokens a part at a time, because
        few columns fill whole lanes.
        """
        table, split = self.embedding[...], self.rules("batch", stream)
        dtype = table.dtype
        dims = {axis: dim for dim, part in enumerate(split) for axis in mesh_axes(part)}
        exchanged = tuple(axis for axis in self.rules.columns if axis in dims)
        kept = tuple(axis for axis in self.rules.columns if axis not in dims)

        def look_up(table: Array, tokens: Array) -> Array:
            for axis in exchanged:
                tokens = lax.all_gather(tokens, axis, axis=dims[axis], tiled=True)
            x = table[tokens].astype(dtype)
            for axis in reversed(exchanged):
                x = lax.all_to_all(x, axis, dims[axis], 2, tiled=True)
            return x

        def look_up_in_parts(table: Array, tokens: Array) -> Array:
            # Looked up in float32, so that the gradients of a token's places are added up in it.
            look = functools.partial(look_up, table.astype(jnp.float32))
            batch, length = tokens.shape
            num_looked_up = tokens.size * math.prod(lax.axis_size(axis) for axis in exchanged)
            num_parts = math.gcd(length, 1 << (num_looked_up // _MOST_LOOKED_UP).bit_length())
            if num_parts == 1:
                return look(tokens)
            x = lax.map(look, tokens.reshape(batch, num_parts, -1).swapaxes(0, 1))
            return x.swapaxes(0, 1).reshape(batch, length, -1)

        run = jax.shard_map(
            look_up_in_parts,
            in_specs=(self.rules(None, "columns"), split),
            out_specs=PartitionSpec(*split, kept or None),
        )
        return reshard(run(table, reshard(tokens, split)), PartitionSpec(*split, None))

    def output_table(self) -> Array:
        """The head [V, D], or the embedding where they are tied, split over `vocab` and `embed`."""
        return self.head[...] if self.head is not None else reshard(self.embedding[...], self.rules("vocab", "embed"))

    def unembed(self, x: Array) -> Array:
        """Logits float32 [B, T, V] of normed outputs [B, T, D]; the padding of V has the lowest float."""
        table = reshard(self.output_table(), self.rules("vocab", None))
        logits = einsum("BTD,VD->BTV", x, table, out_sharding=split_like(x, self.rules, "vocab"), out_dtype=jnp.float32)
        if logits.shape[-1] == self.cfg.vocab_size:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.cfg.vocab_size, logits, jnp.finfo(jnp.float32).min)

    def _padded(
        self, tokens: Array, positions: Array | None, segment_ids: Array | None
    ) -> tuple[Array, Array, Array | None]:
        """Rows and columns padded to what the mesh divides; padding stands after every query."""
        tokens = jnp.asarray(tokens, jnp.int32)
        batch, length = tokens.shape
        pad = ((0, -batch % self.rules.batch_multiple), (0, -length % self.rules.sequence_multiple))
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        if pad == ((0, 0), (0, 0)):
            return tokens, positions, segment_ids
        after = jnp.iinfo(jnp.int32).max
        positions = jnp.pad(jnp.asarray(positions, jnp.int32), pad, constant_values=after)
        if segment_ids is not None:
            segment_ids = jnp.pad(jnp.asarray(segment_ids, jnp.int32), pad, constant_values=-1)
        return jnp.pad(tokens, pad), positions, segment_ids
