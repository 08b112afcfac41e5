"""Attention in tiles, and in blocks, against the reference `attend`: values and gradients."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llama_jax import attention
from llama_jax.attention import Tokens, attend, blocked_attention, self_attend
from llama_jax.kernels.tiled import TILE
from llama_jax.mesh import use_mesh

UNSPLIT = PartitionSpec(None, None, None, None, None)


def sequence(length: int, *, batch=2, num_kv_heads=2, num_groups=3, head_dim=8, dtype=jnp.float32):
    """Random q, k, v as `self_attend` takes them; scores spread widely."""
    rng = np.random.default_rng(length)
    q, k, v = (
        jnp.asarray(rng.normal(size=(batch, length, *heads, head_dim)) * 1.5, dtype)
        for heads in ((num_kv_heads, num_groups), (num_kv_heads,), (num_kv_heads,))
    )
    return q, k, v


def in_order(length: int, batch=2) -> Tokens:
    return Tokens(jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length)), None)


def documents(length: int) -> Tokens:
    """Rows of documents that end within tiles, positions starting anew in each."""
    ends = np.array([[length // 3, length // 2], [1, length - 1]])
    segments = np.stack([np.searchsorted(row, np.arange(length), side="right") for row in ends])
    first = np.diff(segments, prepend=-1) != 0
    starts = np.maximum.accumulate(np.where(first, np.arange(length), 0), axis=1)
    return Tokens(jnp.asarray(np.arange(length) - starts, jnp.int32), jnp.asarray(segments, jnp.int32))


def reference(q, k, v, tokens: Tokens):
    return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), queries=tokens, keys=tokens, out_sharding=UNSPLIT)


def both(function, q, k, v, tokens: Tokens):
    """The result, and the gradients of q, k and v for a cotangent that differs everywhere."""
    out, pull = jax.vjp(lambda q, k, v: function(q, k, v, tokens), q, k, v)
    return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype))


def tiled(q, k, v, tokens: Tokens):
    return self_attend(q, k, v, tokens=tokens)


def blocked(q, k, v, tokens: Tokens):
    with mock.patch.object(attention, "_kernel", lambda platform: blocked_attention):
        return self_attend(q, k, v, tokens=tokens)


@pytest.mark.parametrize("tokens", [in_order, documents])
@pytest.mark.parametrize("length", [3, TILE - 1, TILE, 3 * TILE + 5])
@pytest.mark.parametrize("function", [tiled, blocked])
def test_values_and_gradients_equal_the_reference(function, length, tokens):
    with use_mesh("data=1"):
        q, k, v = sequence(length)
        expected = both(jax.jit(reference), q, k, v, tokens(length))
        actual = both(jax.jit(function), q, k, v, tokens(length))
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()), rtol=0)


def test_one_query_head_a_key_head_is_equal_too():
    with use_mesh("data=1"):
        q, k, v = sequence(TILE + 9, num_groups=1)
        np.testing.assert_allclose(
            jax.jit(tiled)(q, k, v, in_order(TILE + 9)), reference(q, k, v, in_order(TILE + 9)), atol=1e-5, rtol=0
        )


def test_bfloat16_is_computed_in_float32_and_returned_as_it_came():
    with use_mesh("data=1"):
        q, k, v = sequence(TILE + 1, dtype=jnp.bfloat16)
        tokens = in_order(TILE + 1)
        out = jax.jit(tiled)(q, k, v, tokens)
        exact = reference(*(x.astype(jnp.float32) for x in (q, k, v)), tokens)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def test_a_split_over_batch_and_heads_changes_nothing():
    length = TILE + 9
    with use_mesh("data=1"):
        q, k, v = sequence(length, num_groups=4)
        expected = [np.asarray(x) for x in both(jax.jit(tiled), q, k, v, in_order(length))]
    with use_mesh("data=2,tensor=4"):
        # Groups are split beside KV heads: the gradients of k and v are sums over devices.
        split = PartitionSpec("data", None, "tensor0", "tensor1", None)
        put = jax.sharding.reshard
        q, k, v = sequence(length, num_groups=4)
        q, k, v = put(q, split), put(k, PartitionSpec(*split[:3])), put(v, PartitionSpec(*split[:3]))
        tokens = Tokens(put(in_order(length).positions, PartitionSpec("data", None)), None)

        @jax.jit
        def run(q, k, v, tokens):
            return self_attend(q, k, v, tokens=tokens)

        out, pull = jax.vjp(lambda q, k, v: run(q, k, v, tokens), q, k, v)
        cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        actual = (out, *pull(put(cotangent, split)))
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(np.abs(want).max()), rtol=0)


def test_the_scores_of_a_long_sequence_are_never_held():
    length = 64 * TILE
    with use_mesh("data=1"):
        shapes = sequence(1, batch=1)
        args = [jax.ShapeDtypeStruct((1, length, *x.shape[2:]), x.dtype) for x in shapes]
        tokens = jax.eval_shape(lambda: in_order(length, batch=1))
        step = jax.jit(jax.grad(lambda q, k, v, tokens: tiled(q, k, v, tokens).sum(), argnums=(0, 1, 2)))
        memory = step.lower(*args, tokens).compile().memory_analysis()
    scores = 4 * length**2 * 6
    assert memory.temp_size_in_bytes < scores / 20
