"""Quantized weights: what rounding costs, and their products against those of the same weights as floats."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llama_jax.kernels import narrow as kernel
from llama_jax.kernels import narrow_cpu
from llama_jax.kernels.narrow import NF4, round_inputs
from llama_jax.mesh import use_mesh
from llama_jax.quantize import QuantizedArray, block_spec, einsum
from llama_jax.rounding import quantized
from llama_jax.schemes import SCHEMES, Quantization, find_scheme

# The products of the model: subscripts, sizes of the letters, dimensions of the weight that are inputs.
SIZES = {"B": 8, "T": 2, "D": 256, "K": 2, "G": 2, "H": 64, "F": 128}
PRODUCTS = {
    "BTD,KGHD->BTKGH": (3,),
    "BTD,DF->BTF": (0,),
    "BTKGH,KGHD->BTD": (0, 1, 2),
    "BTF,FD->BTD": (0,),
}
MESHES = {
    "fsdp=2,tensor=4": {"B": "fsdp", "D": "fsdp", "K": "tensor0", "G": "tensor1", "F": ("tensor0",)},
    "data=2,fsdp=2,tensor=2": {"B": ("data", "fsdp"), "D": "fsdp", "K": "tensor0", "F": "tensor0"},
    "data=2,fsdp=4": {"B": ("data", "fsdp"), "D": "fsdp"},
}


@pytest.fixture(autouse=True)
def mesh():
    with use_mesh("data=1") as mesh:
        yield mesh


def random(letters: str, seed: int, sizes=SIZES) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), [sizes[letter] for letter in letters])


def operands(subscripts: str) -> tuple[jax.Array, jax.Array]:
    x, weight = subscripts.split("->")[0].split(",")
    return random(x, 0), random(weight, 1)


def plain(subscripts: str) -> P:
    return P(*(None for _ in subscripts.split("->")[1]))


def gaps(scheme, values: jax.Array) -> jax.Array:
    """The distance of each value to its neighbours of the scheme's type, in steps of its scale."""
    if scheme.rest.code == "nf4":
        return jnp.float32(np.max(np.diff(NF4)))
    if scheme.dtype == "float8_e4m3fn":
        exponent = jnp.floor(jnp.log2(jnp.maximum(jnp.abs(values.astype(jnp.float32)), 2.0**-6)))
        return 2.0 ** (exponent - 3)
    return jnp.float32(1)


@pytest.mark.parametrize("name", SCHEMES)
def test_no_value_is_off_by_more_than_half_a_step(name):
    scheme, weight = find_scheme(name), random("DF", 1)
    narrow = quantized(weight, scheme, (0,))
    scales = jnp.repeat(narrow.plain().scales, weight.shape[0] // narrow.scales.shape[0], axis=0)
    off = jnp.abs(narrow.dequantize() - weight) / scales / gaps(scheme, narrow.values)
    # A scale in bfloat16 is up to 1/256 too small: the largest of a group lies 1/256 of its 7.5 or 15 steps beyond.
    # Nested scales, in int8, are off by 1/255 of what they spread.
    slack = 0.0625 if scheme.group and not scheme.nested else 0.02 if scheme.nested else 1e-4
    assert 0.4 < float(jnp.max(off)) <= 0.5 + slack


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("name", ["int8", "int4-asym", "nf4"])
@pytest.mark.parametrize("subscripts", PRODUCTS)
def test_a_product_is_that_of_the_dequantized_weight(name, subscripts, rows, monkeypatch):
    monkeypatch.setattr(kernel, "_SLAB", 2**12)  # several slabs of a weight here, too
    x, weight = operands(subscripts)
    x = jnp.tile(x, (1, rows, *(1,) * (x.ndim - 2)))
    narrow = quantized(weight, find_scheme(name), PRODUCTS[subscripts])
    out = jax.jit(lambda x, w: einsum(subscripts, x, w, out_sharding=plain(subscripts)))(x, narrow)
    expected = jnp.einsum(subscripts, x, narrow.dequantize())
    np.testing.assert_allclose(out, expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("subscripts", PRODUCTS)
def test_small_groups_may_share_a_product(subscripts):
    x, weight = operands(subscripts)
    x, narrow = x[:2, :1], quantized(weight, find_scheme("int4-asym"), PRODUCTS[subscripts]).plain()
    out, expected = (kernel.product(subscripts, x, narrow, depth=depth) for depth in (128, 0))
    np.testing.assert_allclose(out, expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["int8", "int4", "int4-g128-asym", "fp8"])
@pytest.mark.parametrize("subscripts", PRODUCTS)
def test_a_product_of_few_rows_is_that_of_the_dequantized_weight(name, subscripts, rows):
    x, weight = operands(subscripts)
    x = x[:rows, :1]
    narrow = quantized(weight, find_scheme(name), PRODUCTS[subscripts])
    narrow = dataclasses.replace(narrow, rest=Quantization())  # with activations as they are
    assert narrow_cpu.suits(subscripts, x, narrow.plain())
    out = jax.jit(lambda x, w: einsum(subscripts, x, w, out_sharding=plain(subscripts)))(x, narrow)
    expected = jnp.einsum(subscripts, x, narrow.dequantize())
    np.testing.assert_allclose(out, expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


def test_a_loop_of_decode_steps_does_not_widen_weights_before_it():
    x, weight = random("BTD", 0)[:1, :1], random("DF", 1)
    square = quantized(weight @ weight.T, find_scheme("int8"), (0,))
    step = functools.partial(einsum, "BTD,DF->BTF", out_sharding=P(None, None, None))
    loop = jax.jit(lambda x, w: jax.lax.fori_loop(0, 4, lambda _, x: step(x, w), x))
    assert loop.lower(x, square).compile().memory_analysis().temp_size_in_bytes < square.values.nbytes


@pytest.mark.parametrize("name", ["int8-a8", "fp8"])
def test_a_product_with_rounded_activations_is_that_of_both_dequantized(name):
    x, weight = operands("BTD,DF->BTF")
    x = x.at[0, 0, 0].set(2000.0)  # beyond the bound of fp8
    narrow = quantized(weight, find_scheme(name), (0,))
    values, scales = round_inputs(x, 1, narrow.rest.inputs, narrow.rest.bound)
    out = einsum("BTD,DF->BTF", x, narrow, out_sharding=P(None, None, None))
    expected = jnp.einsum("BTD,DF->BTF", values.astype(jnp.float32) * scales[..., None], narrow.dequantize())
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5 * float(jnp.max(jnp.abs(expected))))
    assert float(scales[0, 0]) == pytest.approx(min(2000.0, narrow.rest.bound) / (127 if name == "int8-a8" else 448))


@pytest.mark.parametrize("name", ["int8-a8", "int4-asym", "nf4"])
@pytest.mark.parametrize("subscripts", ["BTD,KGHD->BTKGH", "BTF,FD->BTD"])
def test_product_and_gradient_are_the_same_on_every_mesh(name, subscripts):
    x, weight = operands(subscripts)
    narrow = quantized(weight, find_scheme(name), PRODUCTS[subscripts])
    away = random(subscripts.split("->")[1], 2)
    expected = jnp.einsum(subscripts, x, narrow.dequantize())
    (of_x,) = jax.linear_transpose(lambda x: jnp.einsum(subscripts, x, narrow.dequantize()), x)(away)
    found = []
    for spec, axes in MESHES.items():
        with use_mesh(spec) as mesh:
            x_letters, w_letters = subscripts.split("->")[0].split(",")
            result = subscripts.split("->")[1]
            inputs = [a for a in w_letters if a not in result]
            x_axes = [None if a == "D" else axes.get(a) for a in x_letters]
            out_axes = [None if a == "D" else axes.get(a) for a in result]
            here = put(narrow, [axes.get(a) for a in w_letters], mesh)
            x_here = jax.device_put(x, jax.NamedSharding(mesh, P(*x_axes)))
            away_here = jax.device_put(away, jax.NamedSharding(mesh, P(*out_axes)))
            run = jax.jit(lambda x, w, out=tuple(out_axes): einsum(subscripts, x, w, out_sharding=P(*out)))
            out, back = jax.vjp(lambda x, run=run, w=here: run(x, w), x_here)
            assert inputs and jax.typeof(out).sharding.spec == P(*out_axes)
            found.append((np.asarray(out), np.asarray(back(away_here)[0])))
    for out, gradient in found:
        np.testing.assert_allclose(out, found[0][0], atol=1e-5 * np.abs(out).max())
        np.testing.assert_allclose(gradient, of_x, atol=2e-5 * np.abs(of_x).max())
    np.testing.assert_allclose(out, expected, atol=0.02 * np.abs(expected).max())


def put(narrow: QuantizedArray, axes, mesh) -> QuantizedArray:
    """On a mesh, split by these axes as far as its blocks go."""

    def place(array):
        if array is None:
            return None
        if isinstance(array, QuantizedArray):
            return put(array, axes, mesh)
        return jax.device_put(array, jax.NamedSharding(mesh, block_spec(array.shape, axes)))

    return QuantizedArray(*map(place, (narrow.values, narrow.scales, narrow.zeros, narrow.order)), rest=narrow.rest)


def test_inputs_in_another_order_are_found():
    x, weight = operands("BTKGH,KGHD->BTD")
    flat = weight.reshape(-1, weight.shape[-1])
    order = jax.random.permutation(jax.random.key(3), len(flat))
    narrow = quantized(flat[order].reshape(weight.shape), find_scheme("int4"), (0, 1, 2))
    narrow = QuantizedArray(narrow.values, narrow.scales, order=order, rest=narrow.rest)
    out = einsum("BTKGH,KGHD->BTD", x, narrow, out_sharding=P(None, None, None))
    wide = narrow.dequantize().reshape(flat.shape)
    expected = x.reshape(*x.shape[:2], -1) @ wide[jnp.argsort(order)]
    np.testing.assert_allclose(out, expected, atol=2e-5 * float(jnp.max(jnp.abs(expected))))


def test_groups_that_do_not_divide_are_refused_with_those_that_do():
    with pytest.raises(ValueError, match="groups of 64 inputs do not divide .* use groups of 32"):
        quantized(jnp.zeros((96, 8)), find_scheme("int4-g64"), (0,))
    with pytest.raises(ValueError, match="use int8"):
        quantized(jnp.zeros((24, 8)), find_scheme("int4"), (0,))


def test_a_mesh_that_splits_a_group_is_refused():
    with use_mesh("tensor=8"), pytest.raises(ValueError, match="splits 4 groups .* into 8 parts"):
        block_spec((4, 16), [("tensor0", "tensor1", "tensor2"), None])
