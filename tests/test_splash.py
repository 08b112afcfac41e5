"""Splash attention, interpreted on a CPU, against the reference `attend`: values and gradients."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import attention
from llama_jax.attention import self_attend
from llama_jax.kernels import SAVED_NAME, splash
from llama_jax.kernels.splash import splash_attention
from llama_jax.mesh import use_mesh
from tests.test_tiled import both, documents, in_order, reference, sequence

on_cpu = functools.partial(splash_attention, interpret=True)


def interpreted(q, k, v, tokens):
    with mock.patch.object(attention, "_kernel", lambda platform: on_cpu):
        return self_attend(q, k, v, tokens=tokens)


@pytest.mark.parametrize(("length", "head_dim", "tokens"), [(200, 128, documents), (300, 64, in_order)])
def test_values_and_gradients_equal_the_reference(length, head_dim, tokens, monkeypatch):
    monkeypatch.setattr(splash, "BLOCK", 128)  # several blocks, of which some are skipped
    with use_mesh("data=1"):
        q, k, v = sequence(length, num_groups=2, head_dim=head_dim)
        expected = both(jax.jit(reference), q, k, v, tokens(length))
        actual = both(jax.jit(interpreted), q, k, v, tokens(length))
    for got, want in zip(actual, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(jnp.abs(want).max()), rtol=0)


def test_bfloat16_differs_by_its_rounding_of_the_scaled_queries_and_of_the_result():
    with use_mesh("data=1"):
        q, k, v = sequence(130, num_groups=1, head_dim=64, dtype=jnp.bfloat16)
        out = jax.jit(interpreted)(q, k, v, in_order(130))
        exact = jax.jit(reference)(*(x.astype(jnp.float32) for x in (q, k, v)), in_order(130))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=2**-8 * float(jnp.abs(exact).max()))


@pytest.mark.parametrize("starts", [[0], [512, 1792], [1024, 1280]])
def test_blocks_that_no_query_sees_are_skipped_and_only_those(starts):
    places = np.concatenate([np.arange(start, start + 256) for start in starts])
    by_queries, by_keys = splash._causal_blocks(jnp.asarray(places), 2048, 128, 256)
    scored = (places[:, None] >= np.arange(2048)).reshape(-1, 128, 8, 256).any(axis=(1, 3))
    for info in (by_queries, by_keys):
        np.testing.assert_array_equal(np.asarray(info.block_mask[0]) > 0, scored)
    rows, columns = np.nonzero(scored)
    np.testing.assert_array_equal(by_queries.data_next[0][rows, columns], columns)
    np.testing.assert_array_equal(by_keys.data_next[0][rows, columns], rows)


@pytest.mark.parametrize(("names", "saved"), [([], set()), ([SAVED_NAME], {(2, 4, 128, 64), (2, 4, 128)})])
def test_a_remat_policy_can_save_the_result_and_the_log_of_its_sum(names, saved):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    with use_mesh("data=1"):
        q, k, v = sequence(128, num_groups=2, head_dim=64)
        attend = jax.checkpoint(lambda q: jnp.sin(interpreted(q, k, v, documents(128))), policy=policy)
        _, pull = jax.eval_shape(lambda q: jax.vjp(attend, q), q)
    shapes = {leaf.shape for leaf in jax.tree.leaves(pull)} - {k.shape, q.shape}
    assert {shape for shape in shapes if shape[:2] == (2, 4)} == saved
