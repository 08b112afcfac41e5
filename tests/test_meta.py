"""Meta's directories: any number of shards reads as the canonical tensors and is written back bit-equal."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
import torch

from llama_jax.checkpoint import meta
from llama_jax.checkpoint.meta import MetaSource, config_from_params, read_params, write_meta
from llama_jax.checkpoint.pth import PthFile
from llama_jax.checkpoint.source import TensorSpec
from llama_jax.config import PRESETS, LlamaConfig, RopeConfig

CFG = LlamaConfig(
    vocab_size=32, num_layers=2, embed_dim=128, mlp_dim=24, num_heads=16, num_kv_heads=8, head_dim=8, norm_eps=1e-5
)
PARAMS = {
    "dim": 128,
    "n_layers": 2,
    "n_heads": 16,
    "n_kv_heads": 8,
    "vocab_size": 32,
    "ffn_dim_multiplier": 0.05,
    "multiple_of": 8,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
# Two KV heads, each stored twice by four shards: the form of the 405B in 16.
REPLICATED_CFG = dataclasses.replace(CFG, embed_dim=64, num_heads=8, num_kv_heads=2, mlp_dim=16)
REPLICATED_PARAMS = PARAMS | {"dim": 64, "n_heads": 8, "n_kv_heads": 4, "ffn_dim_multiplier": 0.06}

TABLES = ("tok_embeddings", "output")
FIRST_SPLIT = (*TABLES, "wq", "wk", "wv", "w1", "w3")
LAST_SPLIT = ("wo", "w2")


def meta_tensors(cfg: LlamaConfig) -> dict[str, np.ndarray]:
    """A model as Meta would store it in one shard."""
    rng = np.random.default_rng(0)
    d, q, kv = cfg.embed_dim, cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    shapes = {"tok_embeddings": (cfg.vocab_size, d), "norm": (d,), "output": (cfg.vocab_size, d)}
    for i in range(cfg.num_layers):
        shapes |= {f"layers.{i}.attention.w{x}": (n, d) for x, n in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {f"layers.{i}.attention.wo": (d, q), f"layers.{i}.feed_forward.w2": (d, cfg.mlp_dim)}
        shapes |= {f"layers.{i}.feed_forward.w{x}": (cfg.mlp_dim, d) for x in (1, 3)}
        shapes |= {f"layers.{i}.attention_norm": (d,), f"layers.{i}.ffn_norm": (d,)}
    return {f"{name}.weight": rng.normal(size=shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}


def save_shards(directory, tensors, num_shards, *, embedding_dim=0, params=None):
    """Cuts and saves with torch; dim 1 of tok_embeddings is how files before Llama 3 were cut."""
    directory.mkdir(exist_ok=True)
    for n in range(num_shards):
        shard = {}
        for name, array in tensors.items():
            kind = name.split(".")[-2]
            if kind in FIRST_SPLIT + LAST_SPLIT:
                dim = 1 if kind in LAST_SPLIT else embedding_dim if kind == "tok_embeddings" else 0
                array = np.split(array, num_shards, axis=dim)[n]
            bits = torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).clone()
            shard[name] = bits.view(torch.bfloat16)
        shard["rope.freqs"] = torch.ones(2)
        torch.save(shard, directory / f"consolidated.{n:02d}.pth")
    (directory / "params.json").write_text(json.dumps(params or PARAMS))
    return directory


def canonical(cfg: LlamaConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What Hugging Face's files hold, with the permutation of its conversion script."""

    def permute(array, num_heads):
        return array.reshape(num_heads, cfg.head_dim // 2, 2, -1).swapaxes(1, 2).reshape(array.shape)

    names = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
    layer = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    layer |= {f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    layer |= {f"feed_forward.w{i}": f"mlp.{x}_proj" for i, x in ((1, "gate"), (2, "down"), (3, "up"))}
    for i in range(cfg.num_layers):
        names |= {f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in layer.items()}
    heads = {"wq": cfg.num_heads, "wk": cfg.num_kv_heads}
    result = {}
    for ours, theirs in names.items():
        array, kind = tensors[f"{ours}.weight"], ours.split(".")[-1]
        result[f"{theirs}.weight"] = permute(array, heads[kind]) if kind in heads else array
    return result


def assert_bit_equal(a: np.ndarray, b: np.ndarray, name: str):
    assert a.shape == b.shape and a.dtype == b.dtype, name
    np.testing.assert_array_equal(a.view(np.uint16), b.view(np.uint16), err_msg=name)


class ArraySource:
    def __init__(self, arrays):
        self.arrays = arrays
        self.tensors = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}

    def read(self, name, index=None):
        return self.arrays[name][index or ()]


@pytest.fixture
def meta_directory(tmp_path):
    return save_shards(tmp_path / "meta", meta_tensors(CFG), 1)


@pytest.mark.parametrize(("num_shards", "embedding_dim"), [(1, 0), (2, 0), (8, 0), (2, 1), (8, 1)])
def test_shards_read_as_canonical_tensors(tmp_path, num_shards, embedding_dim):
    tensors = meta_tensors(CFG)
    directory = save_shards(tmp_path / "meta", tensors, num_shards, embedding_dim=embedding_dim)
    cfg = read_params(directory)
    assert cfg == CFG
    source, expected = MetaSource(directory, cfg), canonical(CFG, tensors)
    assert source.tensors == ArraySource(expected).tensors
    for name, array in expected.items():
        assert_bit_equal(source.read(name), array, name)


@pytest.mark.parametrize("num_shards", [1, 8])
def test_every_slice_equals_the_slice_of_the_whole(tmp_path, num_shards):
    source = MetaSource(save_shards(tmp_path / "meta", meta_tensors(CFG), num_shards), CFG)
    rng = np.random.default_rng(1)
    for name, array in canonical(CFG, meta_tensors(CFG)).items():
        for _ in range(5):
            ends = [sorted(rng.integers(0, size + 1, 2)) for size in array.shape]
            index = tuple(slice(int(start), int(stop)) for start, stop in ends)
            assert_bit_equal(source.read(name, index), array[index], f"{name}{index}")
        assert_bit_equal(source.read(name, (slice(3, 17),)), array[3:17], name)


def test_a_slice_opens_only_the_shards_that_hold_it(tmp_path, monkeypatch):
    source = MetaSource(save_shards(tmp_path / "meta", meta_tensors(CFG), 8), CFG)
    touched = []
    view = PthFile.view
    monkeypatch.setattr(PthFile, "view", lambda self, name: touched.append(self.path.name) or view(self, name))
    source.read("model.layers.1.self_attn.q_proj.weight", (slice(40, 56),))  # two heads, 5 and 6, two a shard
    source.read("model.layers.1.self_attn.o_proj.weight", (slice(None), slice(120, 128)))
    source.read("model.norm.weight")
    assert touched == [f"consolidated.{n:02d}.pth" for n in (2, 3, 7, 0)]


@pytest.mark.parametrize("stated_kv_heads", [4, 2])
def test_kv_heads_stored_twice_are_read_once(tmp_path, stated_kv_heads):
    tensors = meta_tensors(REPLICATED_CFG)
    stored = dict(tensors)
    for name, array in tensors.items():
        if name.endswith(("wk.weight", "wv.weight")):
            stored[name] = np.repeat(array.reshape(2, 8, -1), 2, axis=0).reshape(32, -1)  # heads 0 0 1 1
    directory = save_shards(
        tmp_path / "meta", stored, 4, params=REPLICATED_PARAMS | {"n_kv_heads": stated_kv_heads, "vocab_size": -1}
    )
    cfg = read_params(directory)
    assert cfg == REPLICATED_CFG
    source = MetaSource(directory, cfg)
    for name, array in canonical(REPLICATED_CFG, tensors).items():
        assert_bit_equal(source.read(name), array, name)
        assert_bit_equal(source.read(name, (slice(3, 7),)), array[3:7], name)

    stored["layers.1.attention.wv.weight"][9, 0] += 1  # the copy of head 0
    source = MetaSource(save_shards(tmp_path / "meta", stored, 4), cfg)
    source.read("model.layers.1.self_attn.k_proj.weight")
    source.read("model.layers.1.self_attn.v_proj.weight", (slice(2, 8),))  # without the row that differs
    with pytest.raises(ValueError, match="layers.1.attention.wv.weight: KV heads stored twice are not equal"):
        source.read("model.layers.1.self_attn.v_proj.weight")


@pytest.mark.parametrize("num_shards", [1, 2, 8])
def test_meta_to_canonical_to_meta_is_bit_equal(tmp_path, num_shards):
    original = save_shards(tmp_path / "original", meta_tensors(CFG), num_shards)
    write_meta(tmp_path / "again", CFG, MetaSource(original, CFG), num_shards=num_shards)
    assert read_params(tmp_path / "again") == CFG
    for n in range(num_shards):
        name = f"consolidated.{n:02d}.pth"
        ours = torch.load(tmp_path / "again" / name, weights_only=True)
        theirs = torch.load(original / name, weights_only=True)
        del theirs["rope.freqs"]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype == torch.bfloat16
            assert torch.equal(ours[key].view(torch.int16), theirs[key].view(torch.int16)), key


def test_canonical_to_meta_to_canonical_is_bit_equal_with_a_tied_head(tmp_path):
    cfg = dataclasses.replace(CFG, tie_embeddings=True, rope=RopeConfig(theta=1e4, factor=1.0), max_seq_len=8192)
    arrays = canonical(CFG, meta_tensors(CFG))
    del arrays["lm_head.weight"]
    write_meta(tmp_path / "meta", cfg, ArraySource(arrays), num_shards=2)
    loaded = torch.load(tmp_path / "meta" / "consolidated.01.pth", weights_only=True)
    assert loaded["output.weight"].data_ptr() == loaded["tok_embeddings.weight"].data_ptr()
    assert read_params(tmp_path / "meta") == cfg
    source = MetaSource(tmp_path / "meta", cfg)
    assert source.tensors == ArraySource(arrays).tensors
    for name, array in arrays.items():
        assert_bit_equal(source.read(name), array, name)


def test_head_is_tied_if_absent_or_equal_to_the_embedding(tmp_path, meta_directory):
    assert not read_params(meta_directory).tie_embeddings
    tensors = meta_tensors(CFG)
    tensors["output.weight"] = tensors["tok_embeddings.weight"]
    assert read_params(save_shards(tmp_path / "equal", tensors, 2, embedding_dim=1)).tie_embeddings
    del tensors["output.weight"]
    assert read_params(save_shards(tmp_path / "absent", tensors, 1)).tie_embeddings


def test_a_published_tied_size_takes_its_rope_factor_and_refuses_an_untied_head(tmp_path, meta_directory, monkeypatch):
    published = dataclasses.replace(CFG, tie_embeddings=True, rope=RopeConfig(factor=32.0))
    monkeypatch.setitem(meta._PUBLISHED, (128, 2, 16), published)
    with pytest.raises(ValueError, match="output.weight equal to tok_embeddings.weight, here they differ"):
        read_params(meta_directory)
    tensors = meta_tensors(CFG)
    del tensors["output.weight"]
    assert read_params(save_shards(tmp_path / "absent", tensors, 1)) == published
    assert read_params(tmp_path / "absent", rope_factor=8).rope.factor == 8.0


PUBLISHED_PARAMS = {  # dim, n_layers, n_heads, ffn_dim_multiplier, multiple_of
    "llama3.1-8b": (4096, 32, 32, 1.3, 1024),
    "llama3.1-70b": (8192, 80, 64, 1.3, 4096),
    "llama3.1-405b": (16384, 126, 128, 1.2, 4096),
    "llama3.2-1b": (2048, 16, 32, 1.5, 256),
    "llama3.2-3b": (3072, 28, 24, 1.0, 256),
}


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_published_params_are_the_presets_both_ways(name):
    dim, n_layers, n_heads, multiplier, multiple_of = PUBLISHED_PARAMS[name]
    params = {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": 8,
        "vocab_size": 128256,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    }
    cfg = config_from_params(params, tie_embeddings=name.startswith("llama3.2"))
    assert cfg == PRESETS[name]
    assert meta._params(cfg) == params


def test_without_scaled_rope_it_is_llama_3_0():
    params = {key: value for key, value in PARAMS.items() if key != "use_scaled_rope"}
    cfg = config_from_params(params, tie_embeddings=False)
    assert (cfg.rope.factor, cfg.max_seq_len) == (1.0, 8192)
    assert cfg == config_from_params(PARAMS | {"use_scaled_rope": False}, tie_embeddings=False)
    cfg = config_from_params(params, tie_embeddings=False, rope_factor=4, max_seq_len=100)
    assert (cfg.rope.factor, cfg.max_seq_len) == (4.0, 100)


def test_absent_params_take_meta_s_defaults():
    params = {key: PARAMS[key] for key in ("dim", "n_layers", "n_heads", "vocab_size", "rope_theta")}
    cfg = config_from_params(params | {"n_kv_heads": None, "lora_args": None, "max_seq_len": 5}, tie_embeddings=False)
    assert (cfg.num_kv_heads, cfg.mlp_dim, cfg.norm_eps, cfg.max_seq_len) == (16, 512, 1e-5, 8192)


@pytest.mark.parametrize("key", ["quantization_args", "lora_args", "vision_chunk_size", "vision_model"])
def test_unsupported_params_are_refused_by_name_whatever_is_allowed(key):
    with pytest.raises(ValueError, match=f"{key} is not supported"):
        config_from_params(PARAMS | {key: {"group_size": 32}}, tie_embeddings=False, allow_unknown=True)


def test_unknown_params_are_refused_by_name_unless_allowed():
    with pytest.raises(ValueError, match="unknown key 'q_norm'"):
        config_from_params(PARAMS | {"q_norm": True}, tie_embeddings=False)
    assert config_from_params(PARAMS | {"q_norm": True}, tie_embeddings=False, allow_unknown=True) == CFG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"dim": "64"}, "dim='64', expected a positive int"),
        ({"n_heads": 0}, "n_heads=0, expected a positive int"),
        ({"dim": 60}, "dim=60 is not a multiple of n_heads=16"),
    ],
)
def test_params_that_make_no_model_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_params(PARAMS | change, tie_embeddings=False)


def test_missing_files_are_named(tmp_path, meta_directory):
    save_shards(meta_directory, meta_tensors(CFG), 4)
    (meta_directory / "consolidated.02.pth").unlink()
    with pytest.raises(FileNotFoundError, match="consolidated.02.pth is missing"):
        MetaSource(meta_directory, CFG)
    save_shards(meta_directory, meta_tensors(CFG), 4)
    (meta_directory / "consolidated.03.pth").unlink()  # the last one: only the shapes can tell
    with pytest.raises(ValueError, match="is a shard missing"):
        MetaSource(meta_directory, CFG)
    with pytest.raises(FileNotFoundError, match="consolidated.00.pth is missing"):
        MetaSource(tmp_path, CFG)
    (meta_directory / "params.json").write_text("{")
    with pytest.raises(ValueError, match="params.json: not JSON"):
        read_params(meta_directory)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("layers.1.ffn_norm.weight", None, "consolidated.01.pth: layers.1.ffn_norm.weight is missing"),
        ("layers.2.ffn_norm.weight", (64,), "consolidated.01.pth: layers.2.ffn_norm.weight is not a tensor"),
        ("layers.1.attention.wq.bias", (32,), "consolidated.01.pth: layers.1.attention.wq.bias is not a tensor"),
        (
            "layers.1.attention.wo.weight",
            (128, 31),
            r"consolidated.01.pth: layers.1.attention.wo.weight is .*\(128, 31\)",
        ),
    ],
)
def test_missing_surplus_and_misshapen_tensors_are_named_with_their_file(tmp_path, name, shape, message):
    directory = save_shards(tmp_path / "meta", meta_tensors(CFG), 2)
    shard = torch.load(directory / "consolidated.01.pth", weights_only=True)
    if shape:
        shard[name] = torch.zeros(shape, dtype=torch.bfloat16)
    else:
        del shard[name]
    torch.save(shard, directory / "consolidated.01.pth")
    with pytest.raises(ValueError, match=message):
        MetaSource(directory, CFG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": RopeConfig(factor=4.0)}, "params.json cannot say rope=.*factor=4.0"),
        ({"rope": RopeConfig(high_freq_factor=8.0)}, "params.json cannot say rope=.*high_freq_factor=8.0"),
        ({"rope": RopeConfig(original_max_seq_len=4096)}, "params.json cannot say rope="),
        ({"head_dim": 16}, "params.json cannot say head_dim=16: its reader would take 8"),
    ],
)
def test_configs_that_params_json_cannot_say_are_refused(tmp_path, change, message):
    cfg = dataclasses.replace(CFG, **change)
    with pytest.raises(ValueError, match=message):
        write_meta(tmp_path / "meta", cfg, ArraySource({}))
    assert not (tmp_path / "meta").exists()


def test_writing_refuses_indivisible_shards_and_sources_of_another_model(tmp_path):
    arrays = canonical(CFG, meta_tensors(CFG))
    with pytest.raises(ValueError, match="num_kv_heads=8 is not divisible into num_shards=16"):
        write_meta(tmp_path / "meta", CFG, ArraySource(arrays), num_shards=16)
    with pytest.raises(ValueError, match="'model.bias' is not one of this model"):
        write_meta(tmp_path / "meta", CFG, ArraySource(arrays | {"model.bias": np.zeros(2)}))
    with pytest.raises(ValueError, match="'model.norm.weight' has shape"):
        write_meta(tmp_path / "meta", CFG, ArraySource(arrays | {"model.norm.weight": np.zeros(2)}))
    del arrays["model.norm.weight"]
    with pytest.raises(ValueError, match="'model.norm.weight' is missing"):
        write_meta(tmp_path / "meta", CFG, ArraySource(arrays))
    assert not (tmp_path / "meta").exists()


def test_any_feed_forward_width_is_reproduced():
    for embed_dim in (8, 24, 64, 288, 1000):
        for mlp_dim in (1, 7, embed_dim, 4 * embed_dim - 1):
            cfg = dataclasses.replace(CFG, embed_dim=embed_dim, mlp_dim=mlp_dim, num_heads=1, num_kv_heads=1)
            cfg = dataclasses.replace(cfg, head_dim=embed_dim)
            assert config_from_params(meta._params(cfg), tie_embeddings=False).mlp_dim == mlp_dim
