"""What others publish in few bits: each format as its own library writes it, loaded to the library's own numbers."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

import llama_jax
from llama_jax.checkpoint.formats import open_checkpoint
from llama_jax.config import LlamaConfig
from llama_jax.convert import Recipe, convert
from llama_jax.quantize import QuantizedArray
from tests.reference import hf_logits, hf_model, relative_error, save_hf
from tests.tiny import TINY

TOKENS = np.random.default_rng(0).integers(0, 128, (2, 20))
ROUNDING = 2e-5  # float32, of logits that are sums over three layers


def logits(path, spec: str = "data=1", **options) -> np.ndarray:
    with llama_jax.use_mesh(spec):
        return np.asarray(llama_jax.load(path, dtype="float32", **options)(TOKENS))


def kept_logits(path, spec: str = "data=1", **options) -> np.ndarray:
    """Of weights that stay in few bits."""
    with llama_jax.use_mesh(spec):
        model = llama_jax.load(path, **options)
        leaves = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, QuantizedArray))
        assert any(isinstance(leaf, QuantizedArray) for leaf in leaves)
        return np.asarray(model(TOKENS % model.cfg.vocab_size))


def linears(model) -> dict[str, torch.nn.Linear]:
    """The matrices of the layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}


def add_quantization(directory: Path, described: dict, tensors: dict[str, torch.Tensor], gone: set[str]) -> Path:
    """Replace tensors of a saved model by quantized ones, and say so in config.json."""
    file = directory / "model.safetensors"
    kept = {name: tensor for name, tensor in safetensors.torch.load_file(file).items() if name not in gone}
    safetensors.torch.save_file(kept | {name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
    return directory


# compressed-tensors: written by its own compressor, read by transformers

INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = INT8 | {"type": "float"}
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
STATIC = PER_TOKEN | {"strategy": "tensor", "dynamic": False}
COMPRESSED = {
    "w8a8-int": ("int-quantized", INT8, PER_TOKEN),
    "w8a8-float": ("float-quantized", FP8, PER_TOKEN | {"type": "float"}),
    "w8a8-int-static": ("int-quantized", INT8, STATIC),
    "w8a8-int-static-asymmetric": ("int-quantized", INT8, STATIC | {"symmetric": False}),
    "w8a8-float-static": ("float-quantized", FP8 | {"strategy": "tensor"}, STATIC | {"type": "float"}),
    "w8a16": ("pack-quantized", INT8, None),
    "w8a16-tensor": ("naive-quantized", FP8 | {"strategy": "tensor"}, None),
    "w8a16-asymmetric": ("pack-quantized", INT8 | {"symmetric": False}, None),
    "w4a16": ("pack-quantized", INT4, None),
    "w4a16-asymmetric": ("pack-quantized", INT4 | {"symmetric": False}, None),
    "w4a16-channel": ("pack-quantized", INT4 | {"strategy": "channel", "group_size": None}, None),
}


def compressed(directory: Path, format: str, weights: dict, inputs: dict | None, cfg: LlamaConfig = TINY) -> np.ndarray:
    """A random model as llm-compressor saves one after calibrating by the largest value; returns its own logits."""
    from compressed_tensors.quantization.utils import calculate_qparams

    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        format=format,
        ignore=["lm_head"],
        quantization_status="frozen",
    )
    model, seen = hf_model(cfg), {}
    save_hf(model, directory)
    hooks = [m.register_forward_pre_hook(lambda m, x: seen.update({m: x[0]})) for m in linears(model).values()]
    hf_logits(model, TOKENS)
    for hook in hooks:
        hook.remove()
    apply_quantization_config(model, config)
    for module in linears(model).values():
        args, w = module.quantization_scheme.weights, module.weight
        parts = w if args.strategy == "tensor" else w.unflatten(1, (-1, args.group_size or w.shape[1]))
        dims = None if args.strategy == "tensor" else -1
        scale, zero = calculate_qparams(torch.amin(parts, dims or ()), torch.amax(parts, dims or ()), args)
        module.weight_scale.data = scale.reshape(module.weight_scale.shape)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)
        if hasattr(module, "input_scale"):
            x, args = seen[module], module.quantization_scheme.input_activations
            scale, zero = calculate_qparams(x.min()[None], x.max()[None], args)
            module.input_scale.data, module.input_zero_point.data = scale, zero
    theirs = hf_logits(model, TOKENS)
    compressor = ModelCompressor.from_pretrained_model(model, quantization_format=format)
    compressor.compress_model(model)
    described = json.loads(json.dumps(config.model_dump(), default=str)) | {"quantization_status": "compressed"}
    gone = set(safetensors.torch.load_file(directory / "model.safetensors"))
    add_quantization(directory, described, model.state_dict(), gone)
    return theirs


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors_load_to_transformers_own_numbers(tmp_path, kind):
    directory = tmp_path / "model"
    compressed(directory, *COMPRESSED[kind])
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        directory, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    assert relative_error(logits(directory), hf_logits(theirs, TOKENS)) < ROUNDING


# The others: the library's own modules in place of a random model's, and the same model with what they stand for


def dequantized(weights: dict[str, torch.Tensor], cfg: LlamaConfig = TINY) -> np.ndarray:
    """Logits of the random model with these matrices."""
    model = hf_model(cfg)
    missing = model.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()}, strict=False)
    assert not missing.unexpected_keys
    return hf_logits(model, TOKENS)


def fbgemm(directory: Path) -> np.ndarray:
    """Llama 3's rule for FP8, with the list of modules as Meta published it."""
    model, tensors, meant = hf_model(TINY), {}, {}
    save_hf(model, directory)
    for name, module in linears(model).items():
        if "mlp" in name and ".1." in name:
            scale = module.weight.abs().amax(1, keepdim=True) / 448
            tensors[f"{name}.weight"] = (module.weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = scale.detach()
            meant[name] = tensors[f"{name}.weight"].float() * scale
    floats = ["lm_head", *(name for name in linears(model) if name not in meant)]
    config = transformers.FbgemmFp8Config(activation_scale_ub=1200.0, modules_to_not_convert=floats)
    add_quantization(directory, config.to_dict(), tensors, set())
    return dequantized(meant)


def bitsandbytes(directory: Path, make, meaning) -> np.ndarray:
    """Modules of bitsandbytes, which quantize as they are moved, saved as transformers saves them."""
    model, tensors, meant = hf_model(TINY), {}, {}
    save_hf(model, directory)
    for name, module in linears(model).items():
        replaced = make(module.in_features, module.out_features)
        replaced.load_state_dict(module.state_dict())
        replaced.to("cpu")
        tensors |= {f"{name}.{part}": tensor for part, tensor in replaced.state_dict().items()}
        meant[name] = meaning(replaced.weight)
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    add_quantization(directory, config.to_dict(), tensors, {f"{name}.weight" for name in meant})
    return dequantized(meant)


def four_bits(kind: str, nested: bool, directory: Path) -> np.ndarray:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    def make(num_inputs: int, num_outputs: int):
        return Linear4bit(num_inputs, num_outputs, bias=False, quant_type=kind, compress_statistics=nested)

    def meaning(weight):
        # As one row: 0.50.2 on CPU gives rows that are no number of blocks the scales of others.
        state, shape = weight.quant_state, weight.quant_state.shape
        state.shape = torch.Size([1, shape.numel()])
        return dequantize_4bit(weight.data, state).reshape(shape)

    return bitsandbytes(directory, make, meaning)


def eight_bits(directory: Path) -> np.ndarray:
    from bitsandbytes.functional import int8_vectorwise_dequant
    from bitsandbytes.nn import Linear8bitLt

    def make(num_inputs: int, num_outputs: int):
        return Linear8bitLt(num_inputs, num_outputs, bias=False, has_fp16_weights=False)

    return bitsandbytes(directory, make, lambda w: int8_vectorwise_dequant(w.data, w.SCB))


WRITERS = {
    "fbgemm": fbgemm,
    "nf4": functools.partial(four_bits, "nf4", False),
    "nf4-nested": functools.partial(four_bits, "nf4", True),
    "fp4": functools.partial(four_bits, "fp4", False),
    "int8": eight_bits,
}


@pytest.fixture(scope="module", params=WRITERS)
def written(request, tmp_path_factory):
    """A directory, and the logits of what it stands for."""
    directory = tmp_path_factory.mktemp(request.param) / "model"
    return directory, WRITERS[request.param](directory)


def test_files_load_to_their_publishers_own_numbers(written):
    directory, theirs = written
    assert relative_error(logits(directory), theirs) < ROUNDING


PUBLISHED = sorted((Path(__file__).parent / "published").glob("*.safetensors"))


def published(file: Path, directory: Path) -> np.ndarray:
    """Make a directory of a file in tests/published; returns the logits of the tokens 0 to 31."""
    with safetensors.safe_open(file, "pt") as opened:
        config = opened.metadata()["config.json"]
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    theirs = tensors.pop("logits").numpy()
    directory.mkdir()
    (directory / "config.json").write_text(config)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return theirs


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_kept_files_load_to_their_publishers_own_numbers(tmp_path, file):
    theirs = published(file, tmp_path / "model")
    with llama_jax.use_mesh("tensor=2"):
        ours = llama_jax.load(tmp_path / "model", dtype="float32")(np.arange(32)[None])
    assert relative_error(ours, theirs) < ROUNDING
    check_slices(open_checkpoint(tmp_path / "model").source)


@pytest.mark.parametrize("kind", ["nf4-nested"])
def test_every_mesh_gives_the_same_numbers(tmp_path, kind):
    theirs = WRITERS[kind](tmp_path / "model")
    assert relative_error(logits(tmp_path / "model", "fsdp=2,tensor=4", layout="layers"), theirs) < ROUNDING


def check_slices(source) -> None:
    for name, spec in source.tensors.items():
        whole = source.read(name)
        if len(spec.shape) == 2:
            for index in [(slice(3, 11), slice(5, 29)), (slice(16, 32), slice(16, 32)), (slice(None), slice(8, 9))]:
                np.testing.assert_array_equal(source.read(name, index), whole[index])


def test_slices_are_slices_of_the_whole(written):
    check_slices(open_checkpoint(written[0]).source)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_converting_gives_floats(tmp_path, dtype):
    theirs = fbgemm(tmp_path / "model")
    convert(str(tmp_path / "model"), str(tmp_path / "floats"), to="hf", dtype=dtype)
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    stored = open_checkpoint(tmp_path / "floats").source.tensors.values()
    assert {spec.dtype.name for spec in stored} == {dtype or "float32"}
    assert relative_error(logits(tmp_path / "floats"), theirs) < (2e-2 if dtype else ROUNDING)


# Meta's FP8 shards


def test_metas_fp8_shards_load_with_their_scales(tmp_path):
    cfg = dataclasses.replace(TINY, head_dim=8)  # of all that params.json can say
    save_hf(hf_model(cfg), tmp_path / "hf")
    convert(str(tmp_path / "hf"), str(tmp_path / "meta"), to="meta", num_shards=2, overrides={"max_seq_len": 131_072})
    meant: dict[str, list[torch.Tensor]] = {}
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for rank in range(2):
        file, scales = tmp_path / "meta" / f"consolidated.{rank:02d}.pth", {}
        shard = torch.load(file, weights_only=True)
        for matrix, ours in names.items():
            weight = shard[f"layers.1.feed_forward.{matrix}.weight"]
            scale = weight.abs().amax(1) / 448
            shard[f"layers.1.feed_forward.{matrix}.weight"] = rounded = (weight / scale[:, None]).to(
                torch.float8_e4m3fn
            )
            scales[f"1_feed_forward.{matrix}_{rank}"] = scale
            meant.setdefault(f"model.layers.1.mlp.{ours}", []).append(rounded.float() * scale[:, None])
        torch.save(shard, file)
        torch.save(scales, tmp_path / "meta" / f"fp8_scales_{rank}.pt")
    joined = {name: torch.cat(parts, 1 if "down" in name else 0) for name, parts in meant.items()}
    assert relative_error(logits(tmp_path / "meta"), dequantized(joined, cfg)) < ROUNDING
    check_slices(open_checkpoint(tmp_path / "meta").source)
    (tmp_path / "meta" / "fp8_scales_1.pt").unlink()
    with pytest.raises(ValueError, match="fp8_scales_1.pt is missing, the scales of model.layers.1.mlp.gate_proj"):
        open_checkpoint(tmp_path / "meta")


# Written here, read by compressed-tensors


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", ["int8", "int8-a8", "int4", "int4-asym", "fp8"])
def test_compressed_tensors_reads_what_is_written(tmp_path, scheme):
    model = hf_model(TINY)
    convert(str(save_hf(model, tmp_path / "floats")), str(tmp_path / "few"), to="hf", recipe=Recipe(scheme))
    theirs = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "few", quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    source = open_checkpoint(tmp_path / "few").source
    assert relative_error(logits(tmp_path / "few"), hf_logits(theirs, TOKENS)) < ROUNDING
    for name, module in linears(model).items():
        weight, read = module.weight.detach().numpy(), source.read(f"{name}.weight")
        assert np.array_equal(weight, read) == (scheme == "fp8" and not ("mlp" in name and ".1." in name))
        step = {"int8": 1 / 127, "int8-a8": 1 / 127, "int4": 1 / 7, "int4-asym": 1 / 7, "fp8": 1 / 14}[scheme]
        assert np.abs(weight - read).max() <= step / 2 * np.abs(weight).max() * 1.01


# Written here, read by bitsandbytes


@pytest.fixture(scope="module")
def nf4(tmp_path_factory):
    """A random model, and where it lies in NF4; its rows are whole blocks."""
    cfg = dataclasses.replace(TINY, embed_dim=64, mlp_dim=192, num_heads=4, head_dim=16)
    model, directory = hf_model(cfg), tmp_path_factory.mktemp("nf4")
    convert(str(save_hf(model, directory / "floats")), str(directory / "few"), to="hf", recipe=Recipe("nf4"))
    return model, directory / "few"


def test_bitsandbytes_reads_the_nf4_that_is_written(nf4):
    theirs = transformers.LlamaForCausalLM.from_pretrained(nf4[1])
    assert theirs.model.layers[0].mlp.up_proj.weight.quant_state.nested
    expected = hf_logits(theirs.dequantize(), TOKENS)  # on CPUs its products are of bfloat16
    assert relative_error(logits(nf4[1]), expected) < ROUNDING
    assert relative_error(kept_logits(nf4[1], layout="layers"), expected) < ROUNDING


def test_nf4_is_what_bitsandbytes_would_make_of_the_same_weights(nf4):
    from bitsandbytes.nn import Linear4bit

    model, directory = nf4
    ours, off = safetensors.torch.load_file(directory / "model.safetensors"), []
    for name, module in linears(model).items():
        made = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
        made.load_state_dict(module.state_dict())
        for part, theirs in made.to("cpu").state_dict().items():
            mine = ours.pop(f"{name}.{part}")
            if "quant_state" in part:
                mine, theirs = (json.loads(bytes(state.tolist())) for state in (mine, theirs))
                assert mine.pop("nested_offset") == pytest.approx(theirs.pop("nested_offset"), rel=1e-6)
                assert mine == theirs
            elif part == "weight.absmax":
                off.append((mine.short() - theirs.short()).abs())
            else:
                torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    # On CPUs it rounds scales by a table: some that lie between two numbers go to the other.
    off = torch.cat(off).float()
    assert off.max() <= 1 and off.mean() < 0.01
    assert not any("_proj" in name for name in ours)


# Kept in few bits


@pytest.mark.parametrize("kind", ["w8a16", "w4a16", "w4a16-asymmetric", "w8a16-tensor"])
def test_weights_stay_in_few_bits(tmp_path, kind):
    theirs = compressed(tmp_path / "model", *COMPRESSED[kind])
    assert relative_error(kept_logits(tmp_path / "model"), theirs) < ROUNDING


# Without int8 a token at a time: compressed-tensors takes the largest to be 127.5, and vLLM 127 as here.
@pytest.mark.parametrize("kind", ["w8a8-float", "w8a8-float-static", "w8a8-int-static", "w8a8-int-static-asymmetric"])
def test_activations_are_rounded_as_by_compressed_tensors(tmp_path, kind):
    # Of one layer: beyond it some values, next to the middle of two, fall to either side.
    theirs = compressed(tmp_path / "model", *COMPRESSED[kind], dataclasses.replace(TINY, num_layers=1))
    assert relative_error(logits(tmp_path / "model"), theirs) > 0.01  # with activations as they are
    assert relative_error(kept_logits(tmp_path / "model", layout="layers"), theirs) < 1e-3


@pytest.mark.parametrize("name", ["nf4-nested", "int8", "fbgemm"])
def test_other_files_stay_in_few_bits(tmp_path, name):
    theirs = WRITERS[name](tmp_path / "model")
    # FP8 weights ask for activations in FP8, as Meta's stack has them: 3 bits of mantissa in one of three layers.
    bound = 0.1 if name == "fbgemm" else ROUNDING
    assert relative_error(kept_logits(tmp_path / "model", layout="layers"), theirs) < bound


@pytest.mark.parametrize("kind", ["gptq", "gptq-sym", "gptq-8-bits", "awq"])
def test_kept_files_stay_in_few_bits(tmp_path, kind):
    published(Path(__file__).parent / "published" / f"{kind}.safetensors", tmp_path / "model")
    with llama_jax.use_mesh("tensor=2"):
        floats = llama_jax.load(tmp_path / "model", dtype="float32")(TOKENS % 32)
    assert relative_error(kept_logits(tmp_path / "model", "tensor=2", layout="layers"), floats) < ROUNDING
