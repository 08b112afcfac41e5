"""Loading and saving: the same bits through every mesh, layout and form, and a clear word about what is wrong."""

import dataclasses
import json
import math
import os
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch

import llama_jax
from llama_jax.checkpoint.formats import open_checkpoint
from llama_jax.checkpoint.safetensors import SafetensorsDirectory
from tests.processes import free_address, outputs, start_python
from tests.reference import hf_model, relative_error, save_hf
from tests.tiny import TINY

# tensor=4 pads the vocabulary, and takes two of the four query heads of each of three KV heads.
ODD = dataclasses.replace(TINY, vocab_size=131, num_layers=2, embed_dim=96, num_heads=24, num_kv_heads=6, head_dim=4)
TOKENS = np.random.default_rng(0).integers(0, 128, (2, 20))


def bits(directory: Path) -> dict[str, tuple]:
    """Every tensor of a Hugging Face directory as the reference package reads it: dtype, shape, bytes."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in safetensors.torch.load_file(file).items():
            assert name not in tensors
            tensors[name] = (tensor.dtype, tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes())
    return tensors


def rewrite(directory: Path, change) -> None:
    """Replace the tensors of a directory of one file by what change makes of them."""
    file = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def logits(path, **options) -> np.ndarray:
    with llama_jax.use_mesh("data=1"):
        return np.asarray(llama_jax.load(path, **options)(TOKENS))


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """One model in both dtypes: {dtype: directory}, written by transformers."""
    model = hf_model(ODD)
    return {
        dtype: save_hf(model.to(getattr(torch, dtype)), tmp_path_factory.mktemp(dtype))
        for dtype in ("float32", "bfloat16")
    }


@pytest.fixture
def copied(hf, tmp_path):
    """A directory of one's own with the float32 model."""
    return shutil.copytree(hf["float32"], tmp_path / "copy")


# The same bits


@pytest.mark.parametrize(
    ("spec", "dtype", "layout"),
    [
        ("data=1", "float32", "stacked"),
        ("fsdp=2,tensor=4", "bfloat16", "stacked"),
        ("fsdp=2,tensor=4", "float32", "layers"),
        ("context=2,tensor=4", "bfloat16", "layers"),
        ("fsdp=4,context=2", "float32", "stacked"),
    ],
)
def test_hugging_face_to_a_mesh_and_back_is_bit_equal(hf, tmp_path, spec, dtype, layout):
    with llama_jax.use_mesh(spec):
        model = llama_jax.load(hf[dtype], dtype=dtype, layout=layout)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(model))
        llama_jax.save(model, tmp_path / "out")
    assert bits(tmp_path / "out") == bits(hf[dtype])
    assert open_checkpoint(tmp_path / "out").cfg == ODD


@pytest.mark.parametrize("form", ["orbax", "meta"])
def test_a_model_saved_in_another_form_loads_bit_equal(hf, tmp_path, form):
    with llama_jax.use_mesh("fsdp=2,tensor=4"):
        model = llama_jax.load(hf["bfloat16"], dtype="bfloat16")
        llama_jax.save(model, tmp_path / "out", format=form)
        again = llama_jax.load(tmp_path / "out", dtype="bfloat16")
    assert again.cfg == dataclasses.replace(ODD, max_seq_len=again.cfg.max_seq_len)  # params.json has none
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(np.asarray(ours).view(np.uint16), np.asarray(theirs).view(np.uint16))


@pytest.mark.parametrize("layout", ["stacked", "layers"])
@pytest.mark.parametrize("spec", ["data=1", "fsdp=2,tensor=4", "data=8"])
def test_every_value_of_every_tensor_is_read_exactly_once(hf, monkeypatch, spec, layout):
    read, values = SafetensorsDirectory.read, Counter()

    def count(self, name, index=None):
        part = read(self, name, index)
        values[name] += part.size
        return part

    monkeypatch.setattr(SafetensorsDirectory, "read", count)
    with llama_jax.use_mesh(spec):
        model = llama_jax.load(hf["float32"], layout=layout)
    assert values == {name: math.prod(shape) for name, (_, shape, _) in bits(hf["float32"]).items()}
    for table in (model.embedding, model.head):
        assert table.shape[0] == (132 if "tensor" in spec else 131) and not np.asarray(table)[131:].any()


def test_values_are_cast_as_torch_casts_them(hf, tmp_path):
    with llama_jax.use_mesh("data=1"):
        llama_jax.save(llama_jax.load(hf["float32"], dtype="bfloat16"), tmp_path / "narrow")
        llama_jax.save(llama_jax.load(hf["bfloat16"]), tmp_path / "wide")  # float32 is the default on CPU
    assert bits(tmp_path / "narrow") == bits(hf["bfloat16"])
    widened = {
        name: (torch.float32, shape, torch.frombuffer(bytearray(data), dtype=dtype).float().numpy().tobytes())
        for name, (dtype, shape, data) in bits(hf["bfloat16"]).items()
    }
    assert bits(tmp_path / "wide") == widened


# What Hugging Face directories look like


def test_several_shards_and_their_index_are_one_model_and_a_missing_one_is_named(hf, tmp_path):
    save_hf(hf_model(ODD), tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    np.testing.assert_array_equal(logits(tmp_path / "sharded"), logits(hf["float32"]))
    next((tmp_path / "sharded").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="index.json names model-00002-.*, which .*sharded does not have"):
        llama_jax.load(tmp_path / "sharded")


def test_a_tied_head_and_old_buffers_that_are_stored_all_the_same_are_left_behind(tmp_path):
    tied = save_hf(hf_model(dataclasses.replace(ODD, tie_embeddings=True)), tmp_path / "tied")
    expected = bits(tied)
    surplus = {"lm_head.weight": torch.zeros(131, 96), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    rewrite(tied, lambda tensors: tensors.update(surplus))
    with llama_jax.use_mesh("fsdp=2,tensor=4"):
        llama_jax.save(llama_jax.load(tied), tmp_path / "out")
    assert "lm_head.weight" not in expected
    assert bits(tmp_path / "out") == expected


def test_rope_in_the_form_of_transformers_4_and_5_gives_the_same_logits(copied, hf):
    config = json.loads((copied / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (copied / "config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(logits(copied), logits(hf["float32"]))


# Run directories


@pytest.fixture(scope="module")
def steps(hf, tmp_path_factory):
    """Steps 9 and 10 of a run, which differ."""
    steps = tmp_path_factory.mktemp("steps")
    with llama_jax.use_mesh("data=1"):
        for step, dtype in (("9", "bfloat16"), ("10", "float32")):
            llama_jax.save(llama_jax.load(hf[dtype]), steps / step, format="orbax")
    return steps


@pytest.fixture
def run(steps, tmp_path):
    """A run directory with those steps, a tokenizer, and what interrupted saves leave."""
    run = tmp_path / "runs" / "x"
    shutil.copytree(steps, run / "checkpoints")
    for unfinished in (".11.partial-0a", "12.orbax-checkpoint-tmp", "tmp"):
        (run / "checkpoints" / unfinished).mkdir()
    (run / "tokenizer.json").write_text("{}")
    return run


def test_a_run_is_its_newest_step_or_the_one_that_is_named(run, hf):
    np.testing.assert_array_equal(logits(run), logits(hf["float32"]))
    np.testing.assert_array_equal(logits(f"{run}@10"), logits(hf["float32"]))
    np.testing.assert_array_equal(logits(f"{run}@9"), logits(hf["bfloat16"]))
    for path in (run, f"{run}@9", run / "checkpoints" / "9"):
        assert open_checkpoint(path).companions == run


def test_the_average_of_a_run_is_loaded_by_name_only(run):
    average = run / "checkpoints" / "10" / "average"
    (run / "checkpoints" / "9").rename(average)
    assert open_checkpoint(run).directory.name == "10"
    assert open_checkpoint(f"{run}@average").directory == average


@pytest.mark.parametrize("step", ["8", "", "tmp", ".11.partial-0a", "9/params"])
def test_a_step_that_is_not_there_names_those_that_are(run, step):
    with pytest.raises(FileNotFoundError, match=f"x has no checkpoint '{step}'; it has 9, 10"):
        llama_jax.load(f"{run}@{step}")


def test_a_run_without_a_whole_step_is_refused(tmp_path):
    (tmp_path / "run" / "checkpoints" / ".1.partial-0a").mkdir(parents=True)
    for path in (tmp_path / "run", f"{tmp_path / 'run'}@1"):
        with pytest.raises(FileNotFoundError, match="run holds no saved checkpoints"):
            llama_jax.load(path)


def test_a_directory_that_happens_to_be_called_checkpoints_is_no_run(hf, steps, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name, directory in (("mine", steps / "9"), ("hf", hf["float32"])):
        (tmp_path / "checkpoints" / name).symlink_to(directory)
        opened = open_checkpoint(tmp_path / "checkpoints" / name)
        assert opened.companions == opened.directory == tmp_path / "checkpoints" / name


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": {}, "metadata": {}}', '{"config": [], "metadata": {}}'])
def test_a_damaged_description_is_named(run, text):
    (run / "checkpoints" / "10" / "model.json").write_text(text)
    with pytest.raises(ValueError, match="10/model.json is not a model description"):
        llama_jax.load(run)


# What is wrong


def test_paths_that_are_no_directory_are_refused(hf, tmp_path):
    with pytest.raises(ValueError, match="model.safetensors is a file; a checkpoint is given as its directory"):
        llama_jax.load(hf["float32"] / "model.safetensors")
    for path in (tmp_path / "nothing", "nothing", "./nothing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no checkpoint at .*"):
            llama_jax.load(path)
    with pytest.raises(ValueError, match="expected a local path, gs://"):
        llama_jax.load("az://bucket/model")


def test_directories_without_weights_say_what_they_have(copied, tmp_path):
    with pytest.raises(ValueError, match="is empty; expected a Hugging Face, Meta, GGUF or Orbax checkpoint"):
        (tmp_path / "empty").mkdir()
        llama_jax.load(tmp_path / "empty")
    with pytest.raises(
        ValueError, match=r"none of model.json, config.json, params.json, \*.gguf, but generation_config"
    ):
        (copied / "config.json").rename(tmp_path / "config.json")
        llama_jax.load(copied)
    with pytest.raises(ValueError, match="has neither model.safetensors nor model.safetensors.index.json"):
        (tmp_path / "config.json").rename(copied / "config.json")
        (copied / "model.safetensors").unlink()
        llama_jax.load(copied)
    with pytest.raises(ValueError, match="pytorch_model.bin is a pickle, which is not opened; save .* safetensors"):
        (copied / "pytorch_model.bin").touch()
        llama_jax.load(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda t: t.update({"model.layers.2.x": torch.ones(1)}), "tensor model.layers.2.x is not part of a Llama"),
        (
            lambda t: t.update({"lm_head.weight": torch.ones(130, 96)}),
            r"tensor lm_head.weight has shape \(130, 96\), the config says \(131, 96\)",
        ),
        (lambda t: t.update({"lm_head.weight": torch.ones(131, 96).char()}), "tensor lm_head.weight holds int8; only"),
    ],
    ids=["missing", "surplus", "misshapen", "integers"],
)
def test_tensors_that_are_not_the_config_s_are_named_with_their_file(copied, change, message):
    rewrite(copied, change)
    where = "copy" if "missing" in message else "copy/model.safetensors"
    with pytest.raises(ValueError, match=f"{where}: {message}"):
        llama_jax.load(copied)


def test_a_truncated_file_is_named(copied):
    file = copied / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match="copy/model.safetensors: truncated: tensor '.*' ends at byte"):
        llama_jax.load(copied)


def test_another_architecture_is_refused_before_its_weights_are_looked_at(copied):
    (copied / "config.json").write_text('{"model_type": "mistral", "architectures": ["MistralForCausalLM"]}')
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="only a LlamaForCausalLM .*this is .'MistralForCausalLM'. of 'mistral'"):
        llama_jax.load(copied)


def test_options_that_do_not_exist_are_refused(hf):
    with llama_jax.use_mesh("data=1"):
        for dtype in ("bf16", "int8"):
            with pytest.raises(ValueError, match=f"dtype='{dtype}' is no type of floats; expected 'float32'"):
                llama_jax.load(hf["float32"], dtype=dtype)
        with pytest.raises(ValueError, match="layout='flat'; expected one of stacked, layers, decoding"):
            llama_jax.load(hf["float32"], layout="flat")  # pyright: ignore


def test_saving_refuses_an_unknown_format_and_a_full_directory(hf, tmp_path):
    with llama_jax.use_mesh("data=1"):
        model = llama_jax.load(hf["float32"])
        with pytest.raises(ValueError, match="unknown format 'npz'; expected one of hf, meta, orbax"):
            llama_jax.save(model, tmp_path / "out", format="npz")  # pyright: ignore
        (tmp_path / "precious").touch()
        with pytest.raises(FileExistsError, match="is not an empty directory"):
            llama_jax.save(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


# Processes of their own


WITHOUT_A_MESH = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
import llama_jax
model = llama_jax.load(sys.argv[1])
print(json.dumps({
    "mesh": dict(jax.sharding.get_mesh().shape),
    "part": model.layers.mlp.w_up[...].addressable_data(0).shape,
    "imported": sorted({name.partition(".")[0] for name in sys.modules} & {"orbax", "torch", "transformers"}),
    "logits": model(jax.numpy.arange(8)[None]).tolist(),
}))
"""


def test_without_a_mesh_loading_sets_the_largest_legal_tensor_and_imports_no_orbax(hf):
    [result] = outputs(start_python(WITHOUT_A_MESH, hf["float32"]))
    assert result["mesh"] == {"data": 1, "fsdp": 1, "context": 1, "tensor0": 2, "tensor1": 2}
    assert result["part"] == [2, 96, 160 // 4]
    assert result["imported"] == []
    with llama_jax.use_mesh("data=1"):
        assert relative_error(result["logits"], llama_jax.load(hf["float32"])(np.arange(8)[None])) < 1e-5


TWO_PROCESSES = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import llama_jax
from llama_jax.checkpoint.safetensors import SafetensorsDirectory
read, num_bytes = SafetensorsDirectory.read, 0
def count(self, name, index=None):
    global num_bytes
    part = read(self, name, index)
    num_bytes += part.nbytes
    return part
SafetensorsDirectory.read = count
results = {}
for spec in ("fsdp=2", "tensor=2"):
    num_bytes = 0
    with llama_jax.use_mesh(spec):
        model = llama_jax.load(sys.argv[3])
        logits = jax.sharding.reshard(model(jax.numpy.arange(8)[None]), jax.P(None, None, None))
        results[spec] = {"num_bytes": num_bytes, "logits": jax.device_get(logits.addressable_data(0)).tolist()}
print(json.dumps(results))
"""


def test_each_of_two_processes_reads_only_the_slices_that_its_devices_hold(hf):
    address = free_address()
    first, second = outputs(*(start_python(TWO_PROCESSES, address, i, hf["float32"]) for i in range(2)))
    row = 4 * ODD.embed_dim
    norms = row * (2 * ODD.num_layers + 1)  # replicated
    with llama_jax.use_mesh("data=1"):
        expected = llama_jax.load(hf["float32"])(np.arange(8)[None])
    for spec in ("fsdp=2", "tensor=2"):
        sizes = [process[spec]["num_bytes"] for process in (first, second)]
        assert sum(sizes) == 4 * ODD.num_params() + norms
        assert 0 <= sizes[0] - sizes[1] <= 2 * row  # of 66 and 65 rows of embedding and head
        for process in (first, second):
            assert relative_error(process[spec]["logits"], expected) < 1e-5
