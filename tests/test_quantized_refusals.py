"""Damaged and hostile files of few bits: one line that says what is wrong, whatever the bytes."""

import dataclasses
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_jax.checkpoint.formats import open_checkpoint
from llama_jax.checkpoint.gguf import write_gguf_model
from llama_jax.checkpoint.quantized.compressing import Compression
from llama_jax.checkpoint.safetensors import write_safetensors
from llama_jax.checkpoint.source import TensorSpec
from llama_jax.config import LlamaConfig
from llama_jax.gguf import GgufFile
from llama_jax.schemes import find_scheme
from llama_jax.tokenizer import load_tokenizer

CFG = LlamaConfig(32, 1, 32, 32, 4, 2, 16, max_seq_len=64)
Q = "model.layers.0.self_attn.q_proj"


class Random:
    """A Source of random weights."""

    def __init__(self):
        from llama_jax.checkpoint.names import canonical_shapes

        self.tensors = {name: TensorSpec(shape, np.dtype(np.float32)) for name, shape in canonical_shapes(CFG).items()}

    def read(self, name, index=None):
        shape = self.tensors[name].shape
        return np.random.default_rng(len(name)).normal(size=shape).astype(np.float32)[index or ()]


def read_all(path: Path) -> None:
    """Open and read all, or fail as the commands expect it: with one line."""
    try:
        source = open_checkpoint(path).source
        for name in source.tensors:
            source.read(name)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error)


# Hugging Face's form


def unpacked(kind: str, directory: Path, change) -> Path:
    """A directory of a file in tests/published after change(tensors, quantization_config)."""
    file = Path(__file__).parent / "published" / f"{kind}.safetensors"
    with safetensors.safe_open(file, "np") as opened:
        config = json.loads(opened.metadata()["config.json"])
    tensors = safetensors.numpy.load_file(file)
    del tensors["logits"]
    change(tensors, config["quantization_config"])
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def put(name: str, value):
    return lambda tensors, config: tensors.update({f"{Q}.{name}": value(tensors.get(f"{Q}.{name}"))})


def say(**settings):
    return lambda tensors, config: config.update(settings)


REFUSALS = {
    "missing scales": ("gptq", lambda t, c: t.pop(f"{Q}.scales"), f"tensor {Q}.scales is missing"),
    "short zeros": ("gptq", put("qzeros", lambda z: z[:1]), f"tensor {Q}.qzeros is int32"),
    "wrong group size": ("gptq", say(group_size=8), "expected int32"),
    "groups that do not fit": ("gptq", say(group_size=24), "groups of 24 do not fit"),
    "absurd group size": ("awq", say(group_size=-7), "group_size=-7; a whole number"),
    "group out of range": ("gptq", put("g_idx", lambda g: g + 10**6), "does not put 16 columns into each"),
    "uneven groups": ("gptq", put("g_idx", np.zeros_like), "does not put 16 columns into each"),
    "three bits": ("gptq", say(bits=3), "bits=3 is not supported, only 4 or 8"),
    "marlin": ("gptq", say(checkpoint_format="marlin"), "checkpoint_format='marlin' is not supported"),
    "gemv": ("awq", say(version="gemv"), "version='gemv' is not supported, only 'gemm'"),
    "another method": ("awq", say(quant_method="hqq"), "quant_method='hqq' is not supported; these are: awq"),
    "float words": ("awq", put("qweight", lambda w: w.astype(np.float32)), "is float32"),
    "a vector": ("awq", put("qweight", lambda w: w.reshape(-1)), "a matrix was expected"),
    "a stranger": ("awq", lambda t, c: t.update(odd=np.ones(2)), "tensor odd is not part of a Llama"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_by_name(tmp_path, name):
    kind, change, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(unpacked(kind, tmp_path / "model", change))
    assert "\n" not in str(caught.value)


def four_bits(directory: Path, change) -> Path:
    """q_proj in NF4 with quantized scales, as bitsandbytes keeps it; change may alter tensors and the description."""
    described = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 32]}
    described |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}

    def to_bitsandbytes(tensors, config):
        source = Random()
        tensors.clear()
        tensors |= {name: source.read(name) for name in source.tensors if not name.startswith(Q)}
        tensors |= {
            f"{Q}.weight": np.zeros((1024, 1), np.uint8),
            f"{Q}.weight.absmax": np.zeros(32, np.uint8),
            f"{Q}.weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
            f"{Q}.weight.nested_absmax": np.ones(1, np.float32),
            f"{Q}.weight.nested_quant_map": np.linspace(-1, 1, 256, dtype=np.float32),
        }
        change(tensors, described)
        text = described["text"] if "text" in described else json.dumps(described).encode()
        tensors[f"{Q}.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text, np.uint8)
        config.clear()
        config |= {"quant_method": "bitsandbytes", "load_in_4bit": True}

    return unpacked("gptq", directory, to_bitsandbytes)


NF4_REFUSALS = {
    "a lying shape": (say(shape=[2**40, 2**40]), "expected uint8"),
    "a negative shape": (say(shape=[-64, 32]), "two positive numbers were expected"),
    "no block size": (say(blocksize=0), "blocksize=0; a positive whole number"),
    "an endless offset": (say(nested_offset=float("inf")), "nested_offset=inf"),
    "no JSON": (say(text=b"\x80\x04cposix"), "holds no description"),
    "deep JSON": (say(text=b"[" * 4000), "holds no description"),
    "a long description": (say(text=b"1" * 5000), "at most 4096 bytes"),
    "no scales": (lambda t, d: t.pop(f"{Q}.weight.absmax"), "absmax is missing"),
    "few levels": (lambda t, d: t.update({f"{Q}.weight.quant_map": np.ones(3, np.float32)}), "expected float32 .16,"),
}


@pytest.mark.parametrize("name", NF4_REFUSALS)
def test_what_bitsandbytes_would_not_write_is_refused(tmp_path, name):
    change, message = NF4_REFUSALS[name]
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(four_bits(tmp_path / "model", change))
    assert "\n" not in str(caught.value)


def test_what_bitsandbytes_would_write_is_read(tmp_path):
    read_all(four_bits(tmp_path / "model", lambda t, d: None))
    assert open_checkpoint(tmp_path / "model").packed.keys() == {f"{Q}.weight"}


def compressed(directory: Path, name: str, change=lambda tensors, described: None) -> Path:
    """All matrices by a scheme in compressed-tensors, or for "fbgemm" in FP8 as Meta published it."""
    scheme = find_scheme("fp8" if name == "fbgemm" else name)
    compression = Compression(Random(), dataclasses.replace(scheme, inner_mlp_only=False), CFG.num_layers)
    of_meta = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    described = of_meta if name == "fbgemm" else compression.described()
    tensors = dict(compression.tensors())
    change(tensors, described)
    unpacked("gptq", directory, lambda _, config: (config.clear(), config.update(described)))
    specs = {name: TensorSpec(value.shape, value.dtype) for name, value in tensors.items()}
    write_safetensors(directory / "model.safetensors", specs, iter(tensors.items()))
    return directory


COMPRESSED_REFUSALS = {
    "a lying shape": (
        "int4-asym",
        put("weight_shape", lambda s: s * 2**40),
        f"{Q}.weight_packed .64, 4. does not hold 4 or 8 bits",
    ),
    "a negative shape": ("int4-asym", put("weight_shape", lambda s: -s), "does not hold 4 or 8 bits"),
    "short zero points": ("int4-asym", put("weight_zero_point", lambda z: z[1:]), f"tensor {Q}.weight_zero_point"),
    "short scales": ("int8", put("weight_scale", lambda s: s[1:]), "fit none of config_groups"),
    "no values": ("int8-a8", lambda t, d: t.pop(f"{Q}.weight"), f"tensor {Q}.weight is missing"),
    "stored scales of activations": (
        "int8-a8",
        lambda t, d: d["config_groups"]["group_0"]["input_activations"].update(dynamic=False, strategy="tensor"),
        "input_scale is missing",
    ),
    "another format": ("int8", say(format="marlin-24"), "format='marlin-24' is not supported"),
    "no groups": ("int8", say(config_groups=[]), "an object of objects was expected"),
    "FP8 without scales": ("fbgemm", lambda t, d: t.pop(f"{Q}.weight_scale"), f"tensor {Q}.weight_scale is missing"),
    "FP8 where floats are said": ("fbgemm", say(modules_to_not_convert=[Q]), "though modules_to_not_convert names"),
    "an absurd bound": ("fbgemm", say(activation_scale_ub=-1), "activation_scale_ub=-1; a positive number"),
}


@pytest.mark.parametrize("name", COMPRESSED_REFUSALS)
def test_what_compressed_tensors_and_fbgemm_would_not_write_is_refused(tmp_path, name):
    kind, change, message = COMPRESSED_REFUSALS[name]
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(compressed(tmp_path / "model", kind, change))
    assert "\n" not in str(caught.value)


FUZZ = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PATCHES = st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=9)), min_size=1, max_size=3)


def patched(content: bytes, patches, extent: int) -> bytes:
    """The content with bytes replaced at shares of its first `extent` bytes."""
    changed = bytearray(content)
    for share, octets in patches:
        place = int(share * extent)
        changed[place : place + len(octets)] = octets
    return bytes(changed)


@pytest.mark.parametrize("kind", ["gptq-act-order", "awq", "bitsandbytes", "int4-asym", "int8-a8", "fp8", "fbgemm"])
def test_no_bytes_do_more_than_fail_with_one_line(tmp_path, kind):
    change = lambda tensors, config: None  # noqa: E731
    model = tmp_path / "model"
    if kind in ("gptq-act-order", "awq"):
        unpacked(kind, model, change)
    else:
        four_bits(model, change) if kind == "bitsandbytes" else compressed(model, kind)
    read_all(model)
    assert open_checkpoint(model).packed
    files = {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors")}
    header = 8 + struct.unpack("<Q", files["model.safetensors"][:8])[0]

    @FUZZ
    @given(
        st.sampled_from([("config.json", None), ("model.safetensors", header), ("model.safetensors", None)]), PATCHES
    )
    def check(where, patches):
        name, extent = where
        (model / name).write_bytes(patched(files[name], patches, extent or len(files[name])))
        read_all(model)
        (model / name).write_bytes(files[name])

    check()


# GGUF


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gguf")
    write_gguf_model(directory, CFG, Random(), type_name="Q8_0")
    return (directory / "model.gguf").read_bytes()


def entry(key: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key


GGUF_REFUSALS = {
    "not GGUF": (lambda b: b"GGML" + b[4:], "not a GGUF file"),
    "big endian": (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "version 50331648 is not supported"),
    "endless strings": (lambda b: b[:24] + struct.pack("<Q", 2**63) + b[32:], "truncated or damaged"),
    "endless metadata": (
        lambda b: b[:16] + struct.pack("<Q", 2**62) + b[24:],
        "truncated or damaged|not supported|twice",
    ),
    "another model": (lambda b: b.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0gemma", 1), "'gemma' is not"),
    "truncated": (lambda b: b[:-9000], "truncated: tensor"),
    "unknown type": (lambda b: typed(b, "blk.0.attn_q.weight", 99), "is unknown type 99, which is not supported"),
    "type by name": (
        lambda b: typed(b, "blk.0.attn_q.weight", 23),
        "is IQ4_XS, which is not supported; these are: F32",
    ),
    "overlap": (lambda b: typed(b, "blk.0.attn_q.weight", 8, 0), "overlaps the tensor before it"),
    "absurd shape": (lambda b: shaped(b, "blk.0.attn_q.weight", 2**60, 2**60), "truncated: tensor"),
    "layers": (lambda b: number(b, b"llama.block_count", 2**31), "block_count=2147483648 is more than"),
    "no heads": (lambda b: number(b, b"llama.attention.head_count", 0), "head_count=0; a positive int"),
}


def typed(content: bytes, name: str, kind: int, start: int | None = None) -> bytes:
    place = content.index(entry(name.encode())) + 8 + len(name) + 4 + 16
    was = struct.unpack("<Q", content[place + 4 : place + 12])[0]
    return content[:place] + struct.pack("<IQ", kind, was if start is None else start) + content[place + 12 :]


def shaped(content: bytes, name: str, *shape: int) -> bytes:
    place = content.index(entry(name.encode())) + 8 + len(name) + 4
    return content[:place] + struct.pack("<2Q", *shape) + content[place + 16 :]


def number(content: bytes, key: bytes, value: int) -> bytes:
    place = content.index(entry(key)) + 8 + len(key) + 4
    return content[:place] + struct.pack("<I", value) + content[place + 4 :]


@pytest.mark.parametrize("name", GGUF_REFUSALS)
def test_damaged_gguf_is_refused_in_one_line(tmp_path, gguf_bytes, name):
    change, message = GGUF_REFUSALS[name]
    (tmp_path / "x.gguf").write_bytes(change(gguf_bytes))
    with pytest.raises(ValueError, match=message) as caught:
        open_checkpoint(tmp_path / "x.gguf")
    assert "\n" not in str(caught.value)


def test_no_bytes_of_gguf_do_more_than_fail_with_one_line(tmp_path, gguf_bytes):
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf_bytes)
    read_all(file)
    front = min(tensor.start for tensor in GgufFile(file).tensors.values())

    @FUZZ
    @given(PATCHES)
    def check(patches):
        file.write_bytes(patched(gguf_bytes, patches, front))
        read_all(file)
        with pytest.raises(ValueError):
            load_tokenizer(file)  # there is none, whatever else is wrong

    check()
