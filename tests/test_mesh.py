"""Meshes from text, what they refuse, and the same numbers on every layout of eight CPU devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec, reshard

from llama_jax.cache import init_cache
from llama_jax.config import PRESETS
from llama_jax.mesh import (
    AXES,
    inference_mesh_spec,
    legal_tensor_sizes,
    make_mesh,
    parse_mesh,
    sharding_rules,
    use_mesh,
)
from llama_jax.model import Llama
from tests.tiny import TINY

LAYOUTS = [
    "data=8",
    "fsdp=8",
    "tensor=2",
    "tensor=8",
    "fsdp=2,tensor=4",
    "data=2,fsdp=2,tensor=2",
    "context=2,tensor=4",
    "fsdp=4,context=2",
    "data=2,context=2,tensor=2",
]

# 131 tokens and batches of 3: neither is a multiple of any mesh here.
ODD = dataclasses.replace(TINY, vocab_size=131, num_layers=2)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("", (1, 1, 1, 1)),
        ("fsdp=2,tensor=4", (1, 2, 1, 4)),
        ("tensor=2, data=-1", (4, 1, 1, 2)),
        ("context=8", (1, 1, 8, 1)),
    ],
)
def test_text_gives_the_sizes_of_the_four_axes(spec, sizes):
    assert parse_mesh(spec, 8) == dict(zip(AXES, sizes, strict=True))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("model=2", "unknown mesh axis 'model'"),
        ("fsdp=2,fsdp=2", "given twice"),
        ("fsdp=two", "needs a positive size"),
        ("fsdp=0", "needs a positive size"),
        ("fsdp=-1,data=-1", "only one mesh axis can be -1"),
        ("fsdp=3,data=-1", "not a multiple of 3"),
        ("fsdp=16", "needs 16 devices, but there are 8"),
    ],
)
def test_text_that_is_no_mesh_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(spec, 8)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What `make_mesh` looks at in a device: a made-up one of a slice of 2 x n, four a host."""

    slice_index: int
    index: int
    platform: str = "tpu"

    device_kind = "TPU v5e"
    core_on_chip = 0
    id = property(lambda self: 100 * self.slice_index + self.index)
    process_index = property(lambda self: self.id // 4)
    coords = property(lambda self: (self.index % 2, self.index // 2, 0))


def chips(*counts: int, platform: str = "tpu") -> list[Chip]:
    """So many chips of each slice, in the order of no torus."""
    return [Chip(number, i, platform) for number, count in enumerate(counts) for i in range(count)][::-1]


@pytest.mark.parametrize("spec", ["data=2,fsdp=-1", "data=2,fsdp=2,tensor=4", "data=2,context=8", "data=8,tensor=2"])
def test_over_several_slices_runs_data_and_no_other_axis(spec):
    devices = make_mesh(spec, chips(8, 8)).devices
    assert len(set(devices.flat)) == 16
    # Every step along `data` within a slice comes before the one that leaves it.
    assert [chip.slice_index for chip in devices.flat] == [0] * 8 + [1] * 8


def test_within_a_slice_the_mesh_is_that_of_the_slice_alone():
    both, first = make_mesh("data=2,fsdp=2,tensor=4", chips(8, 8)), make_mesh("fsdp=2,tensor=4", chips(8))
    np.testing.assert_array_equal(both.devices[0], first.devices[0])
    assert both.axis_names == first.axis_names and set(both.axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize(
    ("spec", "counts", "message"),
    [
        ("fsdp=-1", (8, 8), 'data=1 cannot run over 2 slices; give data=2 .* as in "data=2,fsdp=-1"'),
        ("data=2,fsdp=-1", (4, 4, 4, 4), "data=2 cannot run over 4 slices; give data=4"),
        ("data=2,fsdp=-1", (8, 4), "slices of the same number of devices: slice 0 has 8, slice 1 has 4"),
        ("data=2,fsdp=4", (8, 8), "uses 8 of 16 devices of several processes"),
    ],
)
def test_a_mesh_that_slices_cannot_be_cut_into_is_refused(spec, counts, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(spec, chips(*counts))


def test_fsdp_may_run_over_nodes_of_gpus_which_jax_numbers_like_slices():
    assert make_mesh("fsdp=-1", chips(8, 8, platform="gpu")).shape["fsdp"] == 16


def abstract_mesh(fsdp: int, tensor: tuple[int, ...]) -> AbstractMesh:
    names = AXES[:3] + tuple(f"tensor{i}" for i in range(len(tensor)))
    return AbstractMesh((1, fsdp, 1, *tensor), names, axis_types=(AxisType.Explicit,) * len(names))


def test_tensor_beyond_the_kv_heads_splits_query_groups():
    rules = sharding_rules(PRESETS["llama3.1-405b"], abstract_mesh(1, (2, 2, 2, 2)))
    assert rules.kv_heads == ("tensor0", "tensor1", "tensor2")
    assert rules.q_groups == ("tensor3",)
    assert rules.cache_sequence == ("tensor3",)


def test_an_mlp_that_tensor_does_not_divide_takes_the_part_that_does():
    rules = sharding_rules(PRESETS["llama3.2-3b"], abstract_mesh(1, (2, 2, 3)))
    assert rules.kv_heads == ("tensor0", "tensor1") and rules.q_groups == ("tensor2",)
    assert rules.mlp == ("tensor0", "tensor1")


def test_tensor_that_heads_do_not_allow_names_the_nearest():
    with pytest.raises(ValueError, match="nearest that can: tensor=8, 12, 24"):
        sharding_rules(PRESETS["llama3.2-3b"], abstract_mesh(1, (2, 2, 2, 2)))
    assert legal_tensor_sizes(PRESETS["llama3.2-3b"], 24) == [1, 2, 3, 4, 6, 8, 12, 24]


def test_fsdp_that_does_not_divide_the_width_names_the_nearest():
    with pytest.raises(
        ValueError, match="fsdp \\* context = 3 does not divide embed_dim=4096; the nearest that does: 2"
    ):
        sharding_rules(PRESETS["llama3.1-8b"], abstract_mesh(3, ()))


def test_inference_takes_the_largest_legal_tensor():
    assert inference_mesh_spec(PRESETS["llama3.2-3b"], 16) == "data=2,tensor=8"
    assert inference_mesh_spec(PRESETS["llama3.1-405b"], 64) == "data=1,tensor=64"


def test_without_a_mesh_the_error_says_how_to_enter_one():
    with pytest.raises(ValueError, match="use_mesh"):
        Llama(TINY, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_exactly_the_published_number_of_parameters(name):
    counts = {
        "llama3.1-8b": 8_030_261_248,
        "llama3.1-70b": 70_553_706_496,
        "llama3.1-405b": 405_853_388_800,
        "llama3.2-1b": 1_235_814_400,
        "llama3.2-3b": 3_212_749_824,
        "llama3.3-70b": 70_553_706_496,
    }
    with use_mesh("fsdp=2,tensor=4"):
        abstract = jax.eval_shape(lambda: Llama(PRESETS[name], rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == counts[name] == PRESETS[name].num_params()


def random_model(cfg):
    """Weights scaled up so that errors show; the same on every mesh."""
    model = jax.jit(lambda: Llama(cfg, rngs=nnx.Rngs(0)))()
    return jax.tree.map(lambda x: x * 5 if x.ndim > 2 or x.shape[0] != cfg.embed_dim else x, model)


def run_everything(spec: str):
    """Logits of packed rows, gradients, and greedy tokens by prefill and decode, on one mesh."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, ODD.vocab_size, (3, 21))
    segments = np.repeat([[1] * 8 + [2] * 13], 3, axis=0)
    with use_mesh(spec):
        model = random_model(ODD)
        assert model.cfg.num_params() == ODD.num_params()
        logits = jax.jit(lambda m: m(tokens, segment_ids=jnp.asarray(segments)))(model)

        def loss(model):
            return jnp.mean(jax.nn.logsumexp(model(tokens), axis=-1))

        grads = jax.jit(jax.grad(loss))(model)
        assert [*map(jax.typeof, jax.tree.leaves(grads))] == [*map(jax.typeof, jax.tree.leaves(model))]
        norms = [float(jnp.sqrt(jnp.sum(jnp.square(g)))) for g in jax.tree.leaves(grads)]
        return np.asarray(logits), np.array(norms), greedy(model, tokens)


def greedy(model, tokens, steps=6):
    """Greedy continuations of 3 prompts with a cache over the mesh."""
    rules = model.rules
    batch = -(-len(tokens) // rules.batch_multiple) * rules.batch_multiple
    prompts = np.pad(tokens[:, :16], ((0, batch - len(tokens)), (0, 0)))

    @jax.jit
    def extend(tokens, positions, caches):
        hidden, caches = model.extend(tokens, positions, caches)
        logits = reshard(model.unembed(hidden), PartitionSpec(None, None, None))
        return jnp.argmax(logits[:, -1:], axis=-1).astype(jnp.int32), caches

    caches = init_cache(model.cfg, rules, batch, 32, dtype=jnp.float32)
    token, caches = extend(prompts, jnp.broadcast_to(jnp.arange(16), (batch, 16)), caches)
    chosen = [token]
    for position in range(16, 15 + steps):
        token, caches = extend(token, jnp.full((batch, 1), position, jnp.int32), caches)
        chosen.append(token)
    return np.concatenate(chosen, axis=1)[: len(tokens)]


@pytest.fixture(scope="module")
def on_one_device():
    return run_everything("data=1")


@pytest.mark.parametrize("spec", LAYOUTS)
def test_the_numbers_are_the_same_on_every_mesh(spec, on_one_device):
    logits, norms, tokens = run_everything(spec)
    assert logits.shape == (3, 21, 131)
    np.testing.assert_allclose(logits, on_one_device[0], atol=5e-5)  # logits of size 10
    np.testing.assert_allclose(norms, on_one_device[1], rtol=1e-5)
    np.testing.assert_array_equal(tokens, on_one_device[2])


def test_decode_equals_the_full_forward():
    tokens = np.random.default_rng(1).integers(0, ODD.vocab_size, (2, 12))
    with use_mesh("data=1"):
        model = random_model(ODD)
        caches = init_cache(ODD, model.rules, 2, 16, dtype=jnp.float32)
        outputs = []
        extend = jax.jit(model.extend)
        for start, stop in [(0, 5), (5, 6), (6, 10), (10, 11), (11, 12)]:
            positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
            hidden, caches = extend(tokens[:, start:stop], positions, caches)
            outputs.append(model.unembed(hidden)[..., : ODD.vocab_size])
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), model(tokens), atol=2e-5)
