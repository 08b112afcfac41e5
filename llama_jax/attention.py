"""Attention of grouped queries over keys and values that are never repeated.

The one place that picks a kernel by platform: tiles on CPUs (kernels/tiled.py) for a gradient, splash on TPUs
(kernels/splash.py), cuDNN on GPUs that have it (kernels/cudnn.py), elsewhere the reference in blocks; over the
pages of a cache kernels/paged_tpu.py and kernels/paged_gpu.py, elsewhere the gather, on CPUs with tiles for long
chunks. The invariant: a query sees a key if the key's position is not after its own and both belong to the same
document. Positions and documents are data, so packed rows, right padding and any order of the sequence over the mesh
need no other mask.

Letters: B batch, T queries, S keys, K KV heads, G query heads per KV head, H head dimension, M = T * G.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec, reshard

from llama_jax.kernels import SAVED_NAME, Tokens, visible
from llama_jax.kernels.paged import Pages, gather_pages, page_positions
from llama_jax.kernels.tiled import TILE, tiled_attention
from llama_jax.kernels.two_ended import places, plain
from llama_jax.mesh import platform

# Of `blocked_attention`: groups of queries that skip keys, and queries that are scored at once.
_MAX_GROUPS = 8
_MIN_BLOCK = 128
_MAX_BLOCK = 512
_MAX_SCORES = 2**26  # of `gathered_attention`, at once
_LANES = 128
LONGEST_IN_BLOCKS = 2048  # tokens of a sequence, on CPUs
_CHUNK_TILE = 256  # of a chunk of a prompt, most of whose keys stand before it


def attend(q: Array, k: Array, v: Array, *, queries: Tokens, keys: Tokens, out_sharding: PartitionSpec) -> Array:
    """Softmax attention of q [B, T, K, G, H] over k and v [B, K, S, H]; returns [B, T, K, G, H].

    Every device attends with the queries and keys that it holds. Where the mesh splits S (a cache),
    it does not split T and G, and the partial softmaxes are merged by their maximum and sum.
    """
    q_split, kv_split = jax.typeof(q).sharding.spec, jax.typeof(k).sharding.spec
    slots = kv_split[2]
    key_rows = None if keys.positions.shape[0] == 1 else kv_split[0]
    query_split, key_split = PartitionSpec(*q_split[:2]), PartitionSpec(key_rows, slots)
    keys = jax.tree.map(lambda ids: reshard(ids, key_split), keys)
    out = jax.shard_map(
        partial(_attend_here, merged_axes=mesh_axes(slots)),
        in_specs=(q_split, kv_split, kv_split, query_split, key_split),
        out_specs=q_split,
    )(q, k, v, queries, keys)
    return reshard(out, out_sharding)


def _attend_here(q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, *, merged_axes: tuple[str, ...]) -> Array:
    """`attend` on one device. Scores and sums are float32, exponentials enter the product with v in its dtype.

    Queries and their groups are one matrix side, M = T * G, so that forward and backward are plain
    batched products; contracting T and G apart transposes the scores on CPU.
    """
    batch, length, num_kv_heads, num_groups, head_dim = q.shape
    q = q.transpose(0, 2, 1, 3, 4).reshape(batch, num_kv_heads, length * num_groups, head_dim)
    scores = jnp.einsum("BKMH,BKSH->BKMS", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = scores.reshape(batch, num_kv_heads, length, num_groups, k.shape[2])
    # A finite floor: a row of padding that sees nothing then averages instead of giving NaN.
    scores = jnp.where(visible(queries, keys)[:, None, :, None], scores, jnp.finfo(jnp.float32).min)
    highest = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    if merged_axes:
        highest = jax.lax.pmax(highest, merged_axes)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1)
    weights = weights.reshape(batch, num_kv_heads, length * num_groups, -1).astype(v.dtype)
    out = jnp.einsum("BKMS,BKSH->BKMH", weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, num_kv_heads, length, num_groups, head_dim)
    if merged_axes:
        out, total = jax.lax.psum((out, total), merged_axes)
    return (out / total[..., None]).transpose(0, 2, 1, 3, 4).astype(v.dtype)


def attend_pages(q: Array, pages: Pages, table: Array, positions: Array) -> Array:
    """`attend` of q [B, T, K, G, H] at positions int32 [B, T] over the pages that table int32 [B, N] names.

    A query sees the tokens of its row that are not after it. Every data shard has rows and pages of its
    own; where the mesh splits the slots of a page, the partial softmaxes are merged. Split as q is.
    """
    pages_split = jax.tree.map(lambda pool: jax.typeof(pool).sharding.spec, pages)
    rows, heads, slots, _ = pages_split.k
    split, whole = PartitionSpec(rows, None, heads, None, None), PartitionSpec(rows, None)
    kernel = _paged_kernel(jax.sharding.get_abstract_mesh().abstract_device)
    run = jax.shard_map(
        partial(kernel, axes=mesh_axes(slots)),
        in_specs=(split, pages_split, whole, whole),
        out_specs=split,
        check_vma=False,
    )
    out = run(reshard(q, split), pages, reshard(table, whole), reshard(positions, whole))
    return reshard(out, jax.typeof(q).sharding.spec)


def page_head_dim(head_dim: int) -> int:
    """Elements that a head has in a page: on TPUs whole lanes, or the pool would be copied to be read."""
    return -(-head_dim // _LANES) * _LANES if platform() == "tpu" else head_dim


def gathers_pages(mesh: Mesh) -> bool:
    """Whether attention over pages puts those of every row in order first, in as much memory again."""
    return _paged_kernel(mesh.abstract_mesh.abstract_device) in (cpu_paged_attention, gathered_attention)


def _paged_kernel(device: Any) -> Callable[..., Array]:
    """What attends over pages on one device of a mesh: takes and gives what `gathered_attention` does."""
    if device.platform == "tpu":
        from llama_jax.kernels.paged_tpu import paged_attention

        return partial(paged_attention, otherwise=gathered_attention)
    if device.platform == "cpu":
        return cpu_paged_attention
    from llama_jax.kernels.cudnn import suits

    if suits(device.device_kind):  # as there, what is not known to have all that the kernel needs is not picked
        with contextlib.suppress(ImportError):  # jax means to leave Triton behind
            from llama_jax.kernels.paged_gpu import paged_attention

            return partial(paged_attention, otherwise=gathered_attention)
    return gathered_attention


def gathered_attention(q: Array, pages: Pages, table: Array, positions: Array, *, axes: tuple[str, ...] = ()) -> Array:
    """The reference over pages: those of each row are put in order, and then attended to.

    q [B, T, K, G, H] at positions int32 [B, T], table int32 [B, N]; axes are those of the mesh that split
    the slots of a page. Queries are taken in blocks whose scores are bounded.
    """
    k, v = (x[..., : q.shape[4]] for x in gather_pages(pages, table, q.dtype))
    keys, queries = Tokens(page_positions(pages, table, axes=axes), None), Tokens(positions, None)
    num_scores = q.shape[0] * q.shape[2] * q.shape[3] * k.shape[2]  # of one query a row
    block = max(1, _MAX_SCORES // num_scores)
    if q.shape[1] <= block:
        return _attend_here(q, k, v, queries, keys, merged_axes=axes)
    return _attend_group(q, queries, k, v, keys, block=block, merged_axes=axes)


def cpu_paged_attention(q: Array, pages: Pages, table: Array, positions: Array, *, axes: tuple[str, ...] = ()) -> Array:
    """`gathered_attention`, with a long chunk of a prompt in tiles, which skip the pages after it."""
    if axes or q.shape[1] < TILE:
        return gathered_attention(q, pages, table, positions, axes=axes)
    k, v = gather_pages(pages, table, q.dtype)
    # What is off stands before every table and what pads a chunk behind it.
    places = jnp.where((positions >= 0) & (positions < k.shape[2]), positions, 0).max(axis=0)
    queries, keys = Tokens(positions, None), Tokens(page_positions(pages, table), None)
    return tiled_attention(q, k, v, queries, keys, places, tile=_CHUNK_TILE)


def mesh_axes(split: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return () if split is None else (split,) if isinstance(split, str) else tuple(split)


def self_attend(q: Array, k: Array, v: Array, *, tokens: Tokens) -> Array:
    """`attend` of a sequence over itself; here k and v are [B, T, K, H], whole in T.

    Positions rise along each document of a row: what stands later is skipped unseen. Where the mesh
    splits T, q, k, v and tokens are in two-ended order. The kernel is that of the mesh's platform.
    """
    q_split, kv_split = jax.typeof(q).sharding.spec, jax.typeof(k).sharding.spec
    num_shards = 1 if q_split[1] is None else jax.sharding.get_abstract_mesh().shape[q_split[1]]
    kernel = _kernel(jax.sharding.get_abstract_mesh().abstract_device)
    whole = PartitionSpec(q_split[0], None)

    def attend_here(q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens) -> Array:
        shard = 0
        if num_shards > 1:
            shard = jax.lax.axis_index(q_split[1])
            k, v, keys = jax.tree.map(lambda x: plain(x, num_shards), (k, v, keys))
        return kernel(q, k.swapaxes(1, 2), v.swapaxes(1, 2), queries, keys, places(shard, num_shards, q.shape[1]))

    # Without check_vma, or every loop in a kernel would have to say what its first values vary over.
    run = jax.shard_map(
        attend_here,
        in_specs=(q_split, kv_split, kv_split, PartitionSpec(*q_split[:2]), whole),
        out_specs=q_split,
        check_vma=False,
    )
    return run(q, k, v, tokens, jax.tree.map(lambda ids: reshard(ids, whole), tokens))


def _kernel(device: Any) -> Callable[[Array, Array, Array, Tokens, Tokens, Array], Array]:
    """What attends on one device of a mesh: q [B, T, K, G, H], k and v [B, K, S, H], queries, keys, places int32 [T].

    device: its platform and device_kind are looked at.
    """
    if device.platform == "cpu":
        return cpu_attention
    if device.platform == "tpu":
        from llama_jax.kernels.splash import splash_attention  # Pallas takes a tenth of a second to import

        return splash_attention
    from llama_jax.kernels.cudnn import cudnn_attention, suits

    if suits(device.device_kind):
        return partial(cudnn_attention, otherwise=blocked_attention)
    return blocked_attention


@jax.custom_vjp
def cpu_attention(q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, places: Array) -> Array:
    """`blocked_attention` where no gradient is asked for, else `tiled_attention`; both in float32.

    Blocks are larger products, which several cores share better: a prefill of 512 takes two thirds
    of the time. But for a gradient they would be computed twice, and the scores of all groups, which
    XLA:CPU holds at once, are too large in a long sequence: there it is tiles, too.
    """
    kernel = blocked_attention if q.shape[1] <= LONGEST_IN_BLOCKS else tiled_attention
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    return kernel(q32, k32, v32, queries, keys, places).astype(v.dtype)


cpu_attention.defvjp(lambda *args: jax.vjp(tiled_attention, *args), lambda pull, d_out: pull(d_out))


def blocked_attention(q: Array, k: Array, v: Array, queries: Tokens, keys: Tokens, places: Array) -> Array:
    """The reference in blocks of queries, by XLA alone, where no kernel keeps documents apart: on many GPUs.

    Takes and gives what `tiled_attention` does. Each of a few groups of queries skips the keys after the
    last that any of them sees on any device. Its blocks run one after the other and are computed again
    for the gradient, so that memory grows with S and not with T * S.
    """
    del places  # shapes alone say the last that any device has
    length, num_shards = q.shape[1], k.shape[2] // q.shape[1]
    num_chunks = 1 if num_shards == 1 else 2
    chunk, group = length // num_chunks, max(_MIN_BLOCK, -(-length // _MAX_GROUPS))
    groups = []
    for i in range(num_chunks):
        before = (i + 1) * (num_shards - 1) * chunk  # tokens between those here, on the last device
        for start in range(i * chunk, (i + 1) * chunk, group):
            stop = min(start + group, (i + 1) * chunk)
            seen = before + stop
            q_group, query_group = _columns((q, queries), start, stop)
            groups.append(_attend_group(q_group, query_group, k[:, :, :seen], v[:, :, :seen], _columns(keys, 0, seen)))
    return checkpoint_name(jnp.concatenate(groups, axis=1), SAVED_NAME)


def _attend_group(
    q: Array,
    queries: Tokens,
    k: Array,
    v: Array,
    keys: Tokens,
    *,
    block: int = _MAX_BLOCK,
    merged_axes: tuple[str, ...] = (),
) -> Array:
    """Queries over all of these keys, a block at a time."""
    length = q.shape[1]
    block = min(length, block)

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -length % block), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def attend_block(part: tuple[Array, Tokens]) -> Array:
        return _attend_here(part[0], k, v, part[1], keys, merged_axes=merged_axes)

    out = jnp.moveaxis(jax.lax.map(attend_block, jax.tree.map(blocks, (q, queries))), 0, 1)
    return out.reshape(q.shape[0], -1, *q.shape[2:])[:, :length]


def _columns(tree: Any, start: int, stop: int) -> Any:
    """The tokens from start to stop of arrays [B, T, ...]."""
    return jax.tree.map(lambda x: x[:, start:stop], tree)
