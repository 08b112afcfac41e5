"""Weights with their outputs first: in products and files what the same weights are in the model's own order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import llama_jax
from llama_jax import quantize
from llama_jax.lora import with_fresh_adapter
from llama_jax.mesh import use_mesh
from llama_jax.model import Llama
from llama_jax.outputs_first import OutputsFirst, in_own_order
from llama_jax.quantize import QuantizedArray, einsum
from llama_jax.rounding import quantize_model
from llama_jax.schemes import find_scheme
from tests.tiny import TINY

TOKENS = np.arange(24).reshape(4, 6)

# Products of the model with how many dimensions of the weight are inputs, of sizes that matter.
PRODUCTS = {"BTD,DF->BTF": 1, "BTKGH,KGHD->BTD": 3}
SIZES = {"T": 2, "D": 1024, "F": 1024, "K": 4, "G": 2, "H": 128}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A directory with a random model."""
    directory = tmp_path_factory.mktemp("outputs_first") / "model"
    with use_mesh("data=1"):
        llama_jax.save(jax.jit(lambda: Llama(TINY, rngs=nnx.Rngs(5)))(), directory)
    return directory


def turned(weight: jax.Array, num_inputs: int) -> OutputsFirst:
    dims = range(weight.ndim)
    return OutputsFirst(jnp.transpose(weight, [*dims[num_inputs:], *dims[:num_inputs]]), num_inputs)


@pytest.mark.parametrize("num_rows", [1, 16, 64])
@pytest.mark.parametrize("subscripts", PRODUCTS)
def test_a_product_and_its_gradients_are_those_of_the_weight_in_its_own_order(subscripts, num_rows):
    of_x, of_weight = subscripts.split("->")[0].split(",")
    x, weight = (
        jax.random.normal(jax.random.key(i), [(SIZES | {"B": num_rows})[letter] for letter in letters])
        for i, letters in enumerate((of_x, of_weight))
    )

    def loss(x, weight):
        out = einsum(subscripts, x, weight, out_sharding=P(*(None for _ in subscripts.split("->")[1])))
        return jnp.sum(jnp.sin(out / 32)), out

    with use_mesh("data=1"):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, expected), expected_gradients = run(x, weight)
        (_, out), (of_x, of_weight) = run(x, turned(weight, PRODUCTS[subscripts]))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(of_x, expected_gradients[0], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(of_weight.in_own_order(), expected_gradients[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mesh", ["data=1", "data=2,tensor=4", "fsdp=2,tensor=4", "fsdp=4,context=2"])
def test_a_model_is_read_so_for_decoding_and_computes_the_same_on_every_mesh(files, mesh, monkeypatch):
    monkeypatch.setattr(quantize, "_LARGE", 1)
    with use_mesh(mesh):
        model, stacked = llama_jax.load(files, layout="decoding"), llama_jax.load(files)
        assert isinstance(model.layers[1].mlp.w_gate[...], OutputsFirst)
        assert isinstance(llama_jax.load(files, layout="layers").layers[1].mlp.w_gate[...], jax.Array)
        np.testing.assert_allclose(jax.jit(Llama.__call__)(model, TOKENS), stacked(TOKENS), rtol=1e-4, atol=1e-5)
        weight, plain = model.layers[1].attention.wo[...], in_own_order(model).layers[1].attention.wo[...]
        assert weight.shape == plain.shape == stacked.layers.attention.wo.shape[1:]
        assert tuple(weight.sharding.spec) == tuple(jax.typeof(plain).sharding.spec)
        np.testing.assert_array_equal(plain, stacked.layers.attention.wo[1])


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_it_is_written_as_it_was_read(files, format, tmp_path):
    with use_mesh("data=1"):
        llama_jax.save(llama_jax.load(files, layout="decoding"), tmp_path / "again", format)
        again, expected = llama_jax.load(tmp_path / "again"), llama_jax.load(files)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_its_weights_are_quantized_and_adapted_in_their_own_order(files):
    with use_mesh("data=1"):
        model = llama_jax.load(files, layout="decoding")
        narrow = quantize_model(model, find_scheme("int8"), TINY.num_layers)
        expected = llama_jax.load(files, layout="decoding", quantize="int8")
        assert isinstance(narrow.layers[0].mlp.w_down[...], QuantizedArray)
        jax.tree.map(np.testing.assert_array_equal, narrow, expected)
        adapted = with_fresh_adapter(model, jax.random.key(0), rank=2)
        np.testing.assert_allclose(adapted(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-5)
        assert adapted.layers[0].mlp.w_down[...].down.shape == (TINY.mlp_dim, 1, 2)


def test_such_a_weight_is_not_indexed(files):
    with use_mesh("data=1"), pytest.raises(TypeError, match="index what `in_own_order` gives"):
        llama_jax.load(files, layout="decoding").layers[0].mlp.w_up[...][0]
