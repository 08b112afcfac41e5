"""A sequence split over `context`: the same loss and gradients, balanced work, memory that grows with T alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec, reshard

from llama_jax import attention, model
from llama_jax.attention import Tokens, blocked_attention, self_attend
from llama_jax.kernels.splash import splash_attention
from llama_jax.kernels.tiled import TILE, tiled_attention
from llama_jax.kernels.two_ended import places, plain, plain_split, two_ended
from llama_jax.mesh import use_mesh
from llama_jax.model import Llama
from tests.tiny import TINY
from train.data.packing import Batch
from train.device import put_batch
from train.loss import loss_sum, token_losses

SMALL = dataclasses.replace(TINY, num_layers=2)
LENGTH = 80
KERNELS = {
    "tiled": tiled_attention,
    "blocked": blocked_attention,
    "splash": functools.partial(splash_attention, interpret=True),
}


@pytest.fixture
def kernel(request, monkeypatch):
    monkeypatch.setattr(attention, "_kernel", lambda platform: KERNELS[request.param])


every_kernel = pytest.mark.parametrize("kernel", KERNELS, indirect=True)


def test_two_ended_order_is_a_chunk_of_either_end_for_each_device():
    whole = jnp.arange(8)[None]
    with use_mesh("data=1"):
        assert two_ended(whole, 2)[0].tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
        assert plain(two_ended(whole, 4), 4)[0].tolist() == list(range(8))
    assert [places(shard, 2, 4).tolist() for shard in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert places(0, 1, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_shards", [2, 4, 8])
def test_devices_give_a_split_sequence_back_in_plain_order(num_shards):
    with use_mesh(f"context={num_shards}"):
        split = PartitionSpec(None, "context", None)
        x = jnp.arange(96).reshape(2, 48, 1)
        moved = jax.jit(plain_split)(reshard(two_ended(x, num_shards), split))
        assert jax.typeof(moved).sharding.spec == split
        np.testing.assert_array_equal(moved, x)


@pytest.mark.parametrize("num_shards", [2, 4])
def test_every_device_meets_as_many_tiles_of_keys_and_none_after_its_queries(num_shards):
    length = 8 * TILE * num_shards

    def tiles_met(shard: int, count: int) -> int:
        return int((places(shard, count, length // count).reshape(-1, TILE).max(axis=1) // TILE + 1).sum())

    met = [tiles_met(shard, num_shards) for shard in range(num_shards)]
    assert len(set(met)) == 1 and sum(met) == tiles_met(0, 1)


def packed_batch() -> Batch:
    """Rows of three documents, whose bounds differ from row to row and from the chunks."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, SMALL.vocab_size, (2, 4, LENGTH)).astype(np.int32)
    ends = np.array([[7, 50], [33, 34], [20, 61], [1, 79]])
    segments = np.stack([np.searchsorted(row, np.arange(LENGTH), side="right") for row in ends]).astype(np.int32)
    starts = np.where(segments == 0, 0, np.take_along_axis(ends, np.maximum(segments - 1, 0), axis=1))
    positions = (np.arange(LENGTH) - starts).astype(np.int32)
    return Batch(tokens, targets, positions, segments + 1, rng.integers(0, 2, (4, LENGTH)).astype(np.float32))


def random_model() -> Llama:
    """Weights scaled up so that errors show; the same on every mesh."""
    model = jax.jit(lambda: Llama(SMALL, rngs=nnx.Rngs(0)))()
    return jax.tree.map(lambda x: x * 5 if x.ndim > 3 else x, model)


def loss_and_gradients(mesh: str, remat: str = "full") -> list[np.ndarray]:
    with use_mesh(mesh):
        model = random_model()
        batch = put_batch(packed_batch(), model.rules)
        step = jax.jit(jax.value_and_grad(lambda model: loss_sum(model, batch, remat=remat, num_chunks=2)[0]))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(step(model))]


@pytest.fixture(scope="module")
def on_one_device():
    return loss_and_gradients("data=1")


@pytest.mark.parametrize(
    ("kernel", "mesh", "remat"),
    [
        ("tiled", "context=2,fsdp=2,tensor=2", "full"),
        ("tiled", "context=4,fsdp=2", "dots"),
        ("blocked", "context=4,tensor=2", "full"),
        ("splash", "data=1", "full"),
        ("splash", "context=2,fsdp=2,tensor=2", "dots"),
    ],
    indirect=["kernel"],
)
def test_loss_and_gradients_are_the_same_with_every_kernel_and_split(kernel, mesh, remat, on_one_device):
    actual = loss_and_gradients(mesh, remat)
    assert len(actual) == len(on_one_device) > 10
    for got, want in zip(actual, on_one_device, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)


@every_kernel
@pytest.mark.parametrize("mesh", ["data=1", "context=4"])
def test_a_change_of_one_document_leaves_the_losses_of_the_others_to_the_bit(kernel, mesh):
    batch = packed_batch()
    changed = batch._replace(tokens=np.where(batch.segment_ids == 1, (batch.tokens + 1) % 128, batch.tokens))
    with use_mesh(mesh):
        model = random_model()

        @jax.jit
        def losses(batch: Batch):
            x = model.hidden(batch.tokens, batch.positions, batch.segment_ids)
            return token_losses(model, x, batch.targets, num_chunks=3)[0]

        before, after = (np.asarray(losses(put_batch(b, model.rules))) for b in (batch, changed))
    first = batch.segment_ids == 1
    np.testing.assert_array_equal(after[~first], before[~first])
    assert (after[first] != before[first]).all()


@pytest.mark.parametrize("kernel", ["tiled", "blocked"], indirect=True)
@pytest.mark.parametrize("num_shards", [1, 4])
def test_memory_of_attention_grows_with_the_sequence_and_not_with_its_square(kernel, num_shards, monkeypatch):
    # So that a short sequence has many blocks, and few to compile.
    monkeypatch.setattr(attention, "_MAX_BLOCK", 128)
    monkeypatch.setattr(attention, "_MAX_GROUPS", 2)

    def temporaries(length: int) -> int:
        with use_mesh(f"context={num_shards}"):
            sequence = None if num_shards == 1 else "context"

            def array(dtype, *shape, split=sequence):
                spec = PartitionSpec(None, split, *(None,) * (len(shape) - 1))
                sharding = jax.sharding.NamedSharding(jax.sharding.get_abstract_mesh(), spec)
                return jax.ShapeDtypeStruct((1, *shape), dtype, sharding=sharding)

            q, ids = array(jnp.float32, length, 2, 1, 8), array(jnp.int32, length)
            k = array(jnp.float32, length, 2, 8, split=None)
            step = jax.grad(lambda q, k, v, tokens: self_attend(q, k, v, tokens=tokens).sum(), argnums=(0, 1, 2))
            program = jax.jit(step).lower(q, k, k, Tokens(ids, ids)).compile()
            return program.memory_analysis().temp_size_in_bytes

    # Both have tiles of the largest size.
    short, long = temporaries(4096 * num_shards), temporaries(8192 * num_shards)
    assert long < 2.2 * short


def test_a_sequence_that_has_not_two_chunks_a_device_is_refused():
    with use_mesh("context=4"):
        model = jax.eval_shape(lambda: Llama(SMALL, rngs=nnx.Rngs(0)))
        tokens = jnp.zeros((1, 12), jnp.int32)
        with pytest.raises(ValueError, match="a sequence of 12 tokens cannot be split .* use a multiple of 8"):
            model.hidden(tokens, tokens)


@pytest.mark.parametrize("mesh", ["fsdp=4", "fsdp=2,context=2"])
def test_an_embedding_looked_up_in_parts_is_the_same_with_the_same_gradient(mesh, monkeypatch):
    tokens = np.random.default_rng(0).integers(0, SMALL.vocab_size, (4, 16)).astype(np.int32)

    def embedded() -> tuple[np.ndarray, np.ndarray]:
        with use_mesh(mesh):
            llama = Llama(SMALL, rngs=nnx.Rngs(0))
            definition, params = nnx.split(llama)

            def summed(params: nnx.State) -> tuple[jax.Array, jax.Array]:
                x = nnx.merge(definition, params).embed(jnp.asarray(tokens), "sequence")
                weights = reshard(jnp.arange(x.size, dtype=x.dtype).reshape(x.shape), jax.typeof(x).sharding.spec)
                return (x * weights).sum(), x

            (_, x), gradients = jax.jit(jax.value_and_grad(summed, has_aux=True))(params)
            return np.asarray(x), np.asarray(gradients["embedding"][...])

    whole = embedded()
    monkeypatch.setattr(model, "_MOST_LOOKED_UP", 16)
    for in_parts, at_once in zip(embedded(), whole, strict=True):
        np.testing.assert_allclose(in_parts, at_once, rtol=1e-6)
