"""Conversion: equal to the bit through every form, whole or not at all, in the memory of a few tensors."""

import base64
import dataclasses
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llama_jax.checkpoint import meta
from llama_jax.checkpoint.formats import CanonicalSource, open_checkpoint
from llama_jax.checkpoint.hf import write_config
from llama_jax.checkpoint.names import canonical_shapes
from llama_jax.checkpoint.safetensors import write_sharded
from llama_jax.checkpoint.source import TensorSpec
from llama_jax.convert import convert, main
from llama_jax.entry import parse_settings, run_entry
from tests.processes import ROOT, outputs, start_python
from tests.reference import hf_logits, hf_model, relative_error, save_hf
from tests.test_checkpoint import ODD, TOKENS, bits, logits, rewrite

EVEN = dataclasses.replace(ODD, vocab_size=132)  # for two shards

COMPANIONS = {
    "tokenizer.model": "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)),
    "tokenizer_config.json": '{"a": 1}',
    "generation_config.json": "{}",
    "LICENSE.txt": "ours",
    "chat_template.jinja": "{{ messages }}",
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A bfloat16 model in two shards with float32 norms, token ids, companions and a stranger."""
    directory = tmp_path_factory.mktemp("hf")
    model = hf_model(EVEN).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 5, [6, 7], 8
    save_hf(model, directory, max_shard_size="150KB")
    for name, text in (COMPANIONS | {"README.md": "not carried"}).items():
        (directory / name).write_text(text)
    assert len(list(directory.glob("*.safetensors"))) > 1
    return directory


def companions(directory: Path) -> dict[str, str]:
    """What came along; Hugging Face's form keeps Meta's tokenizer.model in original/."""
    moved = directory / "original" / "tokenizer.model"
    files = [moved if moved.exists() and name == moved.name else directory / name for name in COMPANIONS]
    return {path.name: path.read_text() for path in files}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def save_meta(model, cfg, directory: Path) -> Path:
    """Meta's form of a transformers model, its rows of q and k turned back to neighbouring pairs."""
    names = {canonical: name for name, canonical, _ in meta._TABLE}
    state = {}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        layer = parts[2] if "layers" in parts else ""
        if parts[-2] in ("q_proj", "k_proj"):
            tensor = tensor.view(-1, 2, cfg.head_dim // 2, cfg.embed_dim).transpose(1, 2).reshape(tensor.shape)
        key = name.replace(f".{layer}.", ".{}.", 1) if layer else name
        state[names[key].format(layer)] = tensor.clone()
    directory.mkdir()
    torch.save(state, directory / "consolidated.00.pth")
    params = {
        "dim": cfg.embed_dim,
        "n_layers": cfg.num_layers,
        "n_heads": cfg.num_heads,
        "n_kv_heads": cfg.num_kv_heads,
        "vocab_size": cfg.vocab_size,
        "ffn_dim_multiplier": 0.6,
        "multiple_of": 32,
        "norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope.theta,
        "use_scaled_rope": cfg.rope.factor != 1.0,
    }
    (directory / "params.json").write_text(json.dumps(params))
    return directory


# The same bits


@pytest.mark.parametrize(
    "route",
    [
        [("hf", 1)],
        [("orbax", 1)],
        [("meta", 1)],
        [("meta", 2)],
        [("meta", 2), ("orbax", 1)],
        [("orbax", 1), ("meta", 1)],
    ],
    ids=lambda route: "-".join(f"{to}{num_shards}" for to, num_shards in route),
)
def test_hugging_face_by_any_route_and_back_is_bit_equal(hf, tmp_path, route):
    at = hf
    for i, (to, num_shards) in enumerate([*route, ("hf", 1)]):
        at, before = tmp_path / str(i), at
        convert(str(before), str(at), to=to, num_shards=num_shards)
        assert open_checkpoint(at).format == to
        assert companions(at) == COMPANIONS
        assert not (at / "README.md").exists()
    assert bits(at) == bits(hf)


@pytest.mark.parametrize("to", ["hf", "orbax", "meta"])
def test_a_tied_head_that_is_stored_all_the_same_is_not_converted(tmp_path, to):
    tied = save_hf(hf_model(dataclasses.replace(EVEN, tie_embeddings=True)), tmp_path / "tied")
    expected = bits(tied)
    rewrite(tied, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(132, 96)}))
    convert(str(tied), str(tmp_path / "out"), to=to)
    convert(str(tmp_path / "out"), str(tmp_path / "back"), to="hf")
    assert bits(tmp_path / "back") == expected


def test_dtype_casts_as_torch_does(hf, tmp_path):
    main([str(hf), str(tmp_path / "out"), "--to", "hf", "--dtype", "float16"])
    stored = {name: torch.frombuffer(bytearray(data), dtype=dtype) for name, (dtype, _, data) in bits(hf).items()}
    assert {name: data for name, (_, _, data) in bits(tmp_path / "out").items()} == {
        name: tensor.half().numpy().tobytes() for name, tensor in stored.items()
    }
    assert read_json(tmp_path / "out" / "config.json")["torch_dtype"] == "float16"


# What is not weights


def test_token_ids_are_kept_and_where_the_form_has_none_taken_from_the_tokenizer(hf, tmp_path):
    def token_ids(directory):
        config = read_json(directory / "config.json")
        return [config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")]

    for to, expected in (("hf", [5, [6, 7], 8]), ("orbax", [5, [6, 7], 8]), ("meta", [256, [257, 264, 265], None])):
        convert(str(hf), str(tmp_path / to), to=to)
        convert(str(tmp_path / to), str(tmp_path / f"{to}-hf"), to="hf")
        assert token_ids(tmp_path / f"{to}-hf") == expected
    (tmp_path / "meta" / "tokenizer.model").unlink()
    convert(str(tmp_path / "meta"), str(tmp_path / "without"), to="hf")
    assert token_ids(tmp_path / "without") == [None, None, None]


def test_a_run_is_converted_with_its_tokenizer(hf, tmp_path):
    convert(str(hf), str(tmp_path / "run" / "checkpoints" / "7"), to="orbax")
    for name in COMPANIONS:
        (tmp_path / "run" / "checkpoints" / "7" / name).rename(tmp_path / "run" / name)
    convert(f"{tmp_path / 'run'}@7", str(tmp_path / "out"), to="hf")
    assert bits(tmp_path / "out") == bits(hf)
    made = {"config.json", "model.safetensors", "original", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*COMPANIONS} - {"tokenizer.model"} | made
    assert companions(tmp_path / "out") == COMPANIONS


def test_set_changes_the_config_that_is_written(hf, tmp_path):
    main([str(hf), str(tmp_path / "out"), "--to", "hf", "--set", "rope.factor=16", "--set", "max_seq_len=4096"])
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["rope_scaling"]["factor"], config["max_position_embeddings"]) == (16, 4096)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.factor", "eight", "rope.factor='eight': expected a value like 8.0"),
        ("rope.factor", True, "rope.factor=True: expected"),
        ("vocab_size", 1.5, "vocab_size=1.5: expected a value like 132"),
        ("tie_embeddings", "yes", "tie_embeddings='yes': expected a value like False"),
        ("rope.base", 1.0, "unknown model key 'rope.base'"),
        ("num_params", 1, "unknown model key 'num_params'"),
        ("rope.factor", 0.5, "factor at least 1"),
    ],
)
def test_an_override_that_makes_no_config_is_refused(hf, key, value, message):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(hf, overrides={key: value})


# Meta's form


@pytest.mark.parametrize("kv_heads", [6, 24])
@pytest.mark.parametrize("factor", [8.0, 1.0])
def test_meta_s_form_gives_the_logits_of_the_same_model_in_transformers(tmp_path, kv_heads, factor):
    cfg = dataclasses.replace(EVEN, num_kv_heads=kv_heads, rope=dataclasses.replace(EVEN.rope, factor=factor))
    model = hf_model(cfg)
    assert relative_error(logits(save_meta(model, cfg, tmp_path / "meta")), hf_logits(model, TOKENS)) < 1e-5


def test_a_tied_size_of_llama_3_2_has_factor_32_unless_it_is_set(tmp_path, monkeypatch):
    tied = dataclasses.replace(EVEN, tie_embeddings=True)
    cfg = dataclasses.replace(tied, rope=dataclasses.replace(tied.rope, factor=32.0))
    monkeypatch.setitem(meta._PUBLISHED, (cfg.embed_dim, cfg.num_layers, cfg.num_heads), cfg)
    model = hf_model(cfg)
    directory = save_meta(model, cfg, tmp_path / "meta")
    assert relative_error(logits(directory), hf_logits(model, TOKENS)) < 1e-5
    of_8 = logits(directory, overrides={"rope.factor": 8})
    assert relative_error(of_8, hf_logits(hf_model(tied), TOKENS)) < 1e-5
    assert relative_error(of_8, hf_logits(model, TOKENS)) > 1e-4


@pytest.mark.parametrize(
    ("set_", "message"),
    [
        ("rope.factor=16", "params.json cannot say rope="),
        ("rope.low_freq_factor=2", "params.json cannot say rope="),
        ("num_kv_heads=1", "tensor model.layers.0.self_attn.k_proj.weight has shape"),
    ],
)
def test_what_params_json_cannot_say_is_refused(hf, tmp_path, set_, message):
    with pytest.raises(ValueError, match=message):
        main([str(hf), str(tmp_path / "out"), "--to", "meta", "--set", set_])
    assert os.listdir(tmp_path) == []


def test_shards_are_refused_where_they_do_not_divide_or_do_not_exist(hf, tmp_path):
    with pytest.raises(ValueError, match="num_kv_heads=6 is not divisible into num_shards=4"):
        main([str(hf), str(tmp_path / "out"), "--to", "meta", "--num-shards", "4"])
    with pytest.raises(ValueError, match="--num-shards 2 is for --to meta only"):
        main([str(hf), str(tmp_path / "out"), "--to", "hf", "--num-shards", "2"])
    assert os.listdir(tmp_path) == []


# Failures


@pytest.mark.parametrize("to", ["hf", "meta", "orbax"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "the source broke")], ids=["ctrl-c", "io"])
def test_a_failure_in_the_middle_leaves_nothing(hf, tmp_path, monkeypatch, to, error):
    read, calls = CanonicalSource.read, []

    def fail(self, name, index=None):
        calls.append(name)
        if len(calls) == 5:
            raise error
        return read(self, name, index)

    monkeypatch.setattr(CanonicalSource, "read", fail)
    with pytest.raises(type(error)):
        convert(str(hf), str(tmp_path / "out"), to=to)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("to", ["hf", "meta", "orbax"])
def test_a_write_that_fails_is_an_os_error_and_leaves_nothing(hf, tmp_path, to):
    """A limit on the size of files stands for a full disk: the system refuses the write itself."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{tmp_path}.*out"):
            convert(str(hf), str(tmp_path / "out"), to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_an_earlier_result_is_kept_whole(hf, tmp_path):
    convert(str(hf), str(tmp_path / "out"), to="hf")
    before = bits(tmp_path / "out")
    for src in (hf, tmp_path / "nothing"):
        with pytest.raises(FileExistsError, match="out exists and is not an empty directory"):
            convert(str(src), str(tmp_path / "out"), to="orbax")
    assert os.listdir(tmp_path) == ["out"] and bits(tmp_path / "out") == before


# The command


def run_convert(*args, **environment) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "llama_jax.convert", *map(str, args)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=300)


def test_the_command_converts_and_says_so_without_a_word_on_stderr(hf, tmp_path):
    done = run_convert(hf, tmp_path / "out", "--to", "orbax")
    said = [line for line in done.stderr.decode().splitlines() if not line.startswith("convert: ")]  # if it takes long
    assert (done.returncode, said) == (0, [])
    assert done.stdout.decode() == f"wrote {tmp_path / 'out'}\n"
    assert open_checkpoint(tmp_path / "out").cfg == EVEN


def test_progress_is_told_in_a_log_up_to_the_bytes_of_the_weights(hf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("llama_jax.progress._QUIET_SECONDS", 0)
    convert(str(hf), str(tmp_path / "out"), to="hf", dtype="float32")
    (line,) = capsys.readouterr().err.splitlines()
    size = 4 * EVEN.num_params()
    assert line.startswith(f"convert: {size / 1e3:.0f}kB in ")


def test_a_hub_id_without_network_is_one_clear_line(tmp_path):
    done = run_convert("org/name", tmp_path / "out", "--to", "hf", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"error: org/name is no local directory and not whole in ")
    assert done.stderr.count(b"\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (ValueError("two\n  lines"), 1, "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x"), 1, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["none", "value", "os", "ctrl-c"],
)
def test_an_entry_exits_with_its_code_and_one_line(capsys, error, code, line):
    def run():
        if error:
            raise error

    with pytest.raises(SystemExit) as exit:
        run_entry(run)
    assert (exit.value.code, capsys.readouterr().err) == (code, line)


def test_a_mistake_of_ours_shows_its_traceback_and_so_does_any_error_when_asked(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_entry(lambda: 1 // 0)
    monkeypatch.setenv("LLAMA_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError):
        run_entry(lambda: int("x"))


def test_settings_are_toml_and_else_text():
    settings = ["a=1", "b.c=0.5", "d=true", "e=[1, 2]", "f=text", "g=a=b", 'h="1"', " i = x "]
    assert parse_settings(settings) == {
        **{"a": 1, "b.c": 0.5, "d": True, "e": [1, 2], "f": "text", "g": "a=b", "h": "1", "i": "x"}
    }
    for setting in ("a", "=1", ""):
        with pytest.raises(ValueError, match="expected key=value"):
            parse_settings([setting])


# Memory

SMALL = dataclasses.replace(EVEN, embed_dim=768, mlp_dim=2048, head_dim=32, num_layers=12, vocab_size=4096)
LARGE = dataclasses.replace(SMALL, embed_dim=2304, mlp_dim=8192, head_dim=96, num_layers=24, vocab_size=32_768)

MEASURE = """
import json, re, shutil, sys, threading
from pathlib import Path
from llama_jax.checkpoint import orbax
from llama_jax.convert import convert
peak, done = 0, threading.Event()
def anonymous():  # the pages of mapped files are the system's to take back
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())
threading.Thread(target=watch, daemon=True).start()
grown = {}
for to in ("meta", "orbax", "hf"):
    peak = before = anonymous()
    convert(sys.argv[1], f"{sys.argv[1]}-{to}", to=to)
    shutil.rmtree(f"{sys.argv[1]}-{to}")
    grown[to] = round(peak - before)
done.set()
print(json.dumps(grown | {"peak": round(peak)}))
"""


@pytest.mark.parametrize(
    ("cfg", "most"), [(SMALL, 40), pytest.param(LARGE, 800, marks=pytest.mark.slow)], ids=["160MB", "3.7GB"]
)
def test_conversion_takes_the_memory_of_a_few_tensors(tmp_path, cfg, most):
    """Megabytes that the process grows by, above what Python and its libraries take."""
    specs = {name: TensorSpec(shape, np.dtype("bfloat16")) for name, shape in canonical_shapes(cfg).items()}
    rng = np.random.default_rng(0)
    random = ((name, rng.standard_normal(shape, np.float32).astype(dtype)) for name, (shape, dtype) in specs.items())
    (tmp_path / "hf").mkdir()
    write_config(tmp_path / "hf", cfg, dtype="bfloat16", token_ids={})
    write_sharded(tmp_path / "hf", specs, random, max_shard_bytes=1_000_000_000)
    [grown] = outputs(start_python(MEASURE, tmp_path / "hf"))
    print(f"{2 * cfg.num_params() / 1e6:.0f} MB of weights, grown by MB: {grown}")
    shutil.rmtree(tmp_path)
    assert max(grown["meta"], grown["orbax"], grown["hf"]) < most
