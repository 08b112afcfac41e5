"""A model of quantized weights: the logits of the same weights as floats, in both layouts and on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llama_jax
from infer.engine import Engine
from infer.sampling import SamplingParams
from llama_jax import memory
from llama_jax.cache import init_cache
from llama_jax.mesh import use_mesh
from llama_jax.model import Llama
from llama_jax.quantize import QuantizedArray
from llama_jax.schemes import find_scheme
from llama_jax.tree import leaf_name
from tests.tiny import TINY

CFG = dataclasses.replace(TINY, embed_dim=128, mlp_dim=256)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with weights so large that a mistake shows."""
    path = tmp_path_factory.mktemp("model") / "hf"
    with use_mesh("data=1"):
        model = Llama(CFG, rngs=nnx.Rngs(0))
        llama_jax.save(jax.tree.map(lambda w: w * (3 if w.ndim > 2 else 1), model), path)
    return path


def is_quantized(leaf) -> bool:
    return isinstance(leaf, QuantizedArray)


def widened(model: Llama) -> Llama:
    """The same model with its weights as floats."""
    return jax.tree.map(lambda w: w.dequantize() if is_quantized(w) else w, model, is_leaf=is_quantized)


TOKENS = np.random.default_rng(0).integers(0, CFG.vocab_size, (4, 24), np.int32)


@pytest.mark.parametrize("name", ["int8", "int4-asym", "nf4"])
def test_logits_are_those_of_the_dequantized_weights_on_every_mesh_and_layout(checkpoint, name):
    with use_mesh("data=1"):
        model = llama_jax.load(checkpoint, quantize=name)
        found = np.asarray(model(TOKENS))
        np.testing.assert_allclose(found, widened(model)(TOKENS), atol=2e-4)
    for spec, layout in (("data=2,tensor=4", "layers"), ("data=2,fsdp=2,tensor=2", "stacked")):
        with use_mesh(spec):
            there = llama_jax.load(checkpoint, quantize=name, layout=layout)
            np.testing.assert_allclose(there(TOKENS), found, atol=2e-4)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_decoding_equals_the_full_forward(checkpoint, name):
    with use_mesh("data=2,tensor=2"):
        model = llama_jax.load(checkpoint, quantize=name, layout="layers")
        caches = init_cache(CFG, model.rules, 4, 32, dtype=jnp.float32)
        positions = np.broadcast_to(np.arange(24, dtype=np.int32), TOKENS.shape)
        extend = jax.jit(lambda model, tokens, positions, caches: model.extend(tokens, positions, caches))
        tokens = jnp.asarray(TOKENS, jnp.int32)
        hidden, caches = extend(model, tokens[:, :20], positions[:, :20], caches)
        logits = [model.unembed(hidden)]
        for i in range(20, 24):
            hidden, caches = extend(model, tokens[:, i : i + 1], positions[:, i : i + 1], caches)
            logits.append(model.unembed(hidden))
        np.testing.assert_allclose(np.concatenate(logits, 1), model(TOKENS), atol=2e-4)


@pytest.mark.parametrize("name", ["int8", "int4-asym", "nf4"])
def test_the_engine_s_tokens_are_the_likeliest_of_the_model_s_logits(checkpoint, name):
    prompt = TOKENS[0, :9].tolist()
    with use_mesh("data=1"):
        model = llama_jax.load(checkpoint, quantize=name, layout="layers")
        (result,) = Engine(model, max_batch_size=1).generate([prompt], SamplingParams(max_new_tokens=6))
        logits = model(np.array([prompt + result.tokens]))[0, len(prompt) - 1 : -1]
    assert result.tokens == np.argmax(logits, axis=-1).tolist()
    expected = jax.nn.log_softmax(logits)[np.arange(6), np.array(result.tokens)]
    np.testing.assert_allclose(result.logprobs, expected, atol=1e-3)


def test_fp8_leaves_attention_and_the_first_and_the_last_layer_as_they_are(checkpoint):
    with use_mesh("data=1"):
        model = llama_jax.load(checkpoint, quantize="fp8", layout="layers")
        narrow = [
            leaf_name(path)
            for path, leaf in jax.tree.leaves_with_path(model, is_leaf=is_quantized)
            if is_quantized(leaf)
        ]
        assert narrow == [f"layers.1.mlp.{name}" for name in ("w_down", "w_gate", "w_up")]
        floats = llama_jax.load(checkpoint, layout="layers")
        np.testing.assert_allclose(model(TOKENS), floats(TOKENS), atol=0.1)
        with pytest.raises(ValueError, match='use layout="layers"'):
            llama_jax.load(checkpoint, quantize="fp8")


# Bits of a value and, over the inputs that share it, of a scale; here an output has at least 64 inputs.
IDEAL = {"int8": 8 + 32 / 128, "int4-g64": 4 + 16 / 64, "nf4": 4 + 8 / 64 + 40 / 128}


@pytest.mark.parametrize("name", IDEAL)
def test_memory_is_counted_as_it_is_taken_and_close_to_the_ideal(checkpoint, name):
    with use_mesh("data=1"):
        model = llama_jax.load(checkpoint, quantize=name)
        counted = memory.weight_bytes(CFG, jnp.float32, find_scheme(name))
        # jax counts a byte for four bits of an array, the compiled program half of one.
        program = jax.jit(lambda model: model, keep_unused=True).lower(model).compile()
        assert counted == program.memory_analysis().argument_size_in_bytes
        weights = [leaf for leaf in jax.tree.leaves(model, is_leaf=is_quantized) if is_quantized(leaf)]
        bits = 8 * memory.bytes_a_device(weights) / sum(np.prod(weight.shape) for weight in weights)
        assert bits < 1.05 * IDEAL[name]


def test_a_quantized_model_is_not_saved_as_floats(checkpoint, tmp_path):
    with use_mesh("data=1"):
        model = llama_jax.load(checkpoint, quantize="int8")
        with pytest.raises(ValueError, match="llama_jax.convert SRC DST --quantize"):
            llama_jax.save(model, tmp_path / "out")


def test_a_mesh_that_splits_a_group_is_refused(checkpoint):
    with use_mesh("fsdp=8"), pytest.raises(ValueError, match="splits 4 groups of quantized weights into 8 parts"):
        llama_jax.load(checkpoint, quantize="int4")


def test_an_unknown_quantization_is_refused_with_those_there_are(checkpoint):
    with pytest.raises(ValueError, match="unknown quantization 'int3'; expected one of int8, "):
        llama_jax.load(checkpoint, quantize="int3")
