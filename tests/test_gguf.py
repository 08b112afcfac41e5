"""GGUF: what llama.cpp's own package writes is read to its own numbers, and it reads what is written here."""

import dataclasses
import io
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import sentencepiece
import torch
import transformers

import llama_jax
from llama_jax.checkpoint.formats import open_checkpoint
from llama_jax.checkpoint.gguf import write_gguf_model
from llama_jax.checkpoint.gguf_vocab import tokenizer_metadata
from llama_jax.checkpoint.quantized.blocks import pack_rows, unpack_blocks
from llama_jax.convert import convert
from llama_jax.gguf import BLOCK_TYPES, write_gguf
from llama_jax.tokenizer import load_tokenizer
from tests.reference import hf_logits, hf_model, relative_error, save_hf
from tests.tiny import TINY, VARIANTS

TOKENS = np.random.default_rng(0).integers(0, 128, (2, 20))
ROUNDING = 2e-5  # float32, of logits that are sums over three layers
WIDE = dataclasses.replace(
    VARIANTS["mha-unscaled"], embed_dim=256, mlp_dim=512, num_kv_heads=2, head_dim=32, num_layers=2
)
BLOCKS = [block.name for block in BLOCK_TYPES.values() if block.num_values > 1]
DEMO = Path(llama_jax.__file__).parent / "demo"


def random_blocks(name: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Bytes of rows of this type whose numbers are of the size of weights; any bits but the scales' are sound."""
    block = next(block for block in BLOCK_TYPES.values() if block.name == name)
    rng = np.random.default_rng(seed)
    octets = rng.integers(0, 256, (shape[0] * shape[1] // block.num_values, block.num_bytes), np.uint8)
    for place in {"Q6_K": [208], "Q4_0": [0], "Q5_0": [0], "Q8_0": [0]}.get(name, [0, 2]):
        large = {"Q8_0": 0.002, "Q4_0": 0.02, "Q5_0": 0.01, "Q4_1": 0.02, "Q5_1": 0.01}.get(name, 0.0002)
        scales = rng.uniform(-large, large, len(octets)).astype("<f2")
        octets[:, place : place + 2] = scales.view(np.uint8).reshape(-1, 2)
    return octets.reshape(shape[0], -1)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_the_numbers_that_the_package_reads(name):
    octets = random_blocks(name, (6, 512))
    block = next(block for block in BLOCK_TYPES.values() if block.name == name)
    ours = unpack_blocks(name, octets.reshape(6, -1, block.num_bytes)).dequantize()
    theirs = gguf.dequantize(octets, gguf.GGMLQuantizationType[name])
    np.testing.assert_allclose(ours, theirs, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_numbers_become_the_bytes_that_the_package_makes(name):
    rows = np.random.default_rng(0).normal(size=(16, 128)).astype(np.float32)
    rows[3, 32:64] = 0
    theirs = gguf.quantize(rows, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(pack_rows(name, rows), theirs.view(np.uint8).reshape(16, -1))


# Models


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order, as convert_hf_to_gguf.py puts them."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def package_file(path: Path, types: dict[str, str]) -> Path:
    """A random model written by the gguf package, matrices in these types by the last part of their names."""
    cfg, model = WIDE, hf_model(WIDE)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(cfg.num_layers)
    writer.add_context_length(cfg.max_seq_len)
    writer.add_embedding_length(cfg.embed_dim)
    writer.add_feed_forward_length(cfg.mlp_dim)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(cfg.rope.theta)
    writer.add_vocab_size(cfg.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, cfg.num_layers)
    for i, (name, parameter) in enumerate(model.state_dict().items()):
        weight, kind = parameter.numpy(), types.get(name.split(".")[-2], "F32")
        if kind in BLOCKS and kind.endswith("K"):  # the package does not make these; any bits will do
            data = random_blocks(kind, weight.shape, seed=i)
        else:
            heads = {"q_proj": cfg.num_heads, "k_proj": cfg.num_kv_heads}.get(name.split(".")[-2])
            weight = weight if heads is None else permuted(weight, heads)
            data = gguf.quantize(weight, gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"])
        kind = gguf.GGMLQuantizationType[kind if weight.ndim == 2 else "F32"]
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MIXES = {
    "floats": {"q_proj": "F16", "k_proj": "BF16", "down_proj": "F16"},
    "q8_0": dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "Q8_0"),
    "q4": {"embed_tokens": "Q8_0", "q_proj": "Q4_0", "k_proj": "Q5_0", "o_proj": "Q4_1", "up_proj": "Q5_1"},
    "k": {"embed_tokens": "Q6_K", "q_proj": "Q4_K", "k_proj": "Q5_K", "v_proj": "Q6_K", "down_proj": "Q4_K"},
}


def logits(path, spec: str = "data=1", **options) -> np.ndarray:
    with llama_jax.use_mesh(spec):
        return np.asarray(llama_jax.load(path, dtype="float32", **options)(TOKENS))


@pytest.mark.parametrize("mix", MIXES)
def test_a_model_loads_to_transformers_own_numbers(tmp_path, mix):
    file = package_file(tmp_path / "tiny.gguf", MIXES[mix])
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    assert relative_error(logits(file), hf_logits(theirs, TOKENS)) < ROUNDING


def test_every_mesh_and_slice_gives_the_same_numbers(tmp_path):
    file = package_file(tmp_path / "tiny.gguf", MIXES["k"])
    whole = logits(file)
    with llama_jax.use_mesh("fsdp=2"):
        kept = llama_jax.load(file, layout="layers")
        assert {w.dtype.name for w in jax.tree.leaves(kept)} == {"float32", "int8"}  # Q6_K stays, Q4_K and Q5_K cannot
        assert relative_error(kept(TOKENS), whole) < ROUNDING
    assert relative_error(logits(tmp_path, "fsdp=2,tensor=4", layout="layers"), whole) < ROUNDING
    source = open_checkpoint(file).source
    for name, spec in source.tensors.items():
        index = (slice(3, 61), slice(5, 38), slice(None))[: len(spec.shape)]
        np.testing.assert_array_equal(source.read(name, index), source.read(name)[index])


# Written here


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A model with Llama 3.1's RoPE in float32, as transformers writes it."""
    return save_hf(hf_model(TINY), tmp_path_factory.mktemp("hf"))


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_0"])
def test_the_package_reads_what_is_written(hf, tmp_path, type_name):
    opened = open_checkpoint(hf)
    write_gguf_model(tmp_path, opened.cfg, opened.source, type_name=type_name)
    ours = open_checkpoint(tmp_path).source
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    weights = {name: gguf.dequantize(t.data, t.tensor_type).reshape(*t.shape[::-1]) for name, t in stored.items()}
    weight = opened.source.read("model.layers.1.self_attn.k_proj.weight")
    expected = gguf.quantize(permuted(weight, TINY.num_kv_heads), gguf.GGMLQuantizationType[type_name])
    np.testing.assert_array_equal(stored["blk.1.attn_k.weight"].data.view(np.uint8), expected.view(np.uint8))
    np.testing.assert_allclose(ours.read("model.layers.0.mlp.up_proj.weight"), weights["blk.0.ffn_up.weight"])
    np.testing.assert_array_equal(weights["rope_freqs.weight"][[0, -1]], [1, TINY.rope.factor])
    assert open_checkpoint(tmp_path).cfg == opened.cfg


def test_there_and_back_is_equal_to_the_bit(hf, tmp_path):
    convert(str(hf), str(tmp_path / "gguf"), to="gguf")
    convert(str(tmp_path / "gguf"), str(tmp_path / "back"), to="hf")
    first, last = open_checkpoint(hf).source, open_checkpoint(tmp_path / "back").source
    for name in first.tensors:
        np.testing.assert_array_equal(first.read(name), last.read(name))


def test_the_tokenizer_comes_along(tmp_path):
    convert(str(DEMO), str(tmp_path / "demo"), to="gguf")
    file = tmp_path / "demo" / "model.gguf"
    before, after = load_tokenizer(DEMO), load_tokenizer(file)
    text = "Once upon a time,\n\n  there was (maybe) a caf\u00e9: 12345 it's <|eot_id|> \U0001f600"
    assert after.encode(text, bos=True) == before.encode(text, bos=True)
    assert after.token_bytes == before.token_bytes
    assert (after.bos_id, after.eos_id, after.stop_ids) == (before.bos_id, before.eos_id, before.stop_ids)
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    plain = text.replace("<|eot_id|>", "")
    assert theirs.encode(plain) == after.encode(plain, bos=True)
    convert(str(file), str(tmp_path / "back"), to="hf")
    assert load_tokenizer(tmp_path / "back").encode(text) == before.encode(text)


def test_a_sentencepiece_tokenizer_comes_along(tmp_path):
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ran to the cat"] * 40),
        model_writer=written,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    write_gguf(tmp_path / "vocab.gguf", tokenizer_metadata(tmp_path, 300), {}, [])
    before, after = load_tokenizer(tmp_path / "tokenizer.model"), load_tokenizer(tmp_path / "vocab.gguf")
    for text in ("the cat ran on  the mat", " caf\u00e9", "dog\n"):
        assert after.encode(text, bos=True, eos=True) == before.encode(text, bos=True, eos=True)
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))
