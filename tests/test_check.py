"""The check before a long run: passes on a slice that is as it should be, and names what is not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import llama_jax
from tests.prepared import write_prepared
from tests.processes import ROOT, free_address
from train.config import read_config
from train.preflight import check as check_module
from train.preflight.check import Finding, _compared, _same, check
from train.preflight.speeds import link_speeds, matrix_speeds, slow_devices

CONFIG = """
[model]
vocab_size = 540
num_layers = 1
embed_dim = 32
mlp_dim = 64
num_heads = 4
num_kv_heads = 2
head_dim = 8
tie_embeddings = true
max_seq_len = 16
rope = { factor = 1.0, original_max_seq_len = 16 }
[data]
directory = "data"
mixture = { code = 0.25, text = 0.75 }
[run]
compute_dtype = "float32"
mesh = "fsdp=-1"
[stage.1]
phases = [{ seq_len = 16, tokens = 1024 }]
batch_tokens = 256
learning_rate = 1e-2
final_learning_rate = 1e-3
"""


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A folder with a config and its data, in which the command runs."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, 540, 100).tolist() for _ in range(8)]
    write_prepared(tmp_path / "data", {"code": {"train": documents}, "text": {"train": documents}}, 540)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(llama_jax.__file__).parent / "demo" / name, tmp_path / "data")
    (tmp_path / "tiny.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checked(capsys, **settings) -> dict[str, tuple[bool, str]]:
    """Whether each check passed, and what it says."""
    passed = check(read_config("tiny.toml", settings), "1", Path("run").absolute(), as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] == passed == all(line["passed"] for line in report["checks"])
    return {line["name"]: (line["passed"], line["detail"]) for line in report["checks"]}


def test_a_slice_that_is_as_it_should_be_passes_and_nothing_is_left_behind(workdir, capsys):
    found = checked(capsys)
    assert list(found) == [
        "hosts",
        "topology",
        "matrix products",
        "links",
        "run directory",
        "its sharing",
        "data",
        "steps",
    ]
    assert all(passed for passed, _ in found.values()), found
    assert found["topology"][1] == "8 x cpu in 1 processes, fsdp=8"
    assert found["data"][1].startswith("code, text, and a batch of them, in ")
    assert "the same to the bit" in found["steps"][1]
    assert not Path("run").exists()


@pytest.fixture
def without_steps(monkeypatch):
    """Leaves out what takes long."""
    monkeypatch.setattr(check_module, "_steps", lambda *_: Finding("steps", True, "none"))


def test_people_get_a_line_a_check(workdir, capsys, without_steps):
    assert check(read_config("tiny.toml"), "1", Path("run").absolute())
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines] == ["pass"] * 8
    assert lines[1] == "pass  topology: 8 x cpu in 1 processes, fsdp=8"


def test_devices_that_the_mesh_leaves_out_are_counted(workdir, capsys, without_steps):
    passed, detail = checked(capsys, **{"run.mesh": "data=4"})["topology"]
    assert not passed and detail == "mesh data=4 takes 4 of 8 devices; give an axis -1"


def test_a_run_directory_that_cannot_be_written_is_an_error_of_that_check(workdir, capsys, without_steps):
    Path("run").write_text("a file")
    found = checked(capsys)
    assert not found["run directory"][0] and "run" in found["run directory"][1]
    assert Path("run").read_text() == "a file"


def test_damaged_data_are_named_and_no_steps_are_trained(workdir, capsys):
    path = Path("data/code/train-00000.tokens")
    path.write_bytes(path.read_bytes()[:-2])
    found = checked(capsys)
    assert "steps" not in found
    assert not found["data"][0] and "code/train-00000.tokens is damaged" in found["data"][1]


def test_a_bit_that_is_not_restored_is_seen(workdir, capsys, monkeypatch):
    resumed_state = check_module.resumed_state

    def altered(*args):
        state = resumed_state(*args)
        one_bit = np.zeros(state.params.embedding.shape, np.float32)
        one_bit[3, 5] = 2**-20
        state.params.embedding[...] = state.params.embedding[...] + one_bit
        return state

    monkeypatch.setattr(check_module, "resumed_state", altered)
    assert checked(capsys)["steps"] == (False, "what was restored is not what was saved; look at the storage")
    assert not Path("run").exists()


# What processes tell each other.


def test_what_differs_between_hosts_is_named(monkeypatch):
    values = {"code": "abc", "config": "1f", "jax": "0.10.2", "python": "3.12.1", "XLA_FLAGS": ""}
    others = [values, values | {"jax": "0.10.1", "XLA_FLAGS": "--fast"}, values]
    told = [json.dumps([f"host-{i}", other]) for i, other in enumerate(others)]
    monkeypatch.setattr(check_module, "together", lambda what, work: told)
    assert _same(values)[1:] == (
        False,
        "process 1 (host-1) has jax 0.10.1, most have 0.10.2; process 1 (host-1) has XLA_FLAGS --fast, most have unset",
    )
    monkeypatch.setattr(check_module, "together", lambda what, work: told[:1] * 3)
    assert _same(values)[1:] == (True, "3 with code abc, config 1f, jax 0.10.2, Python 3.12.1")


def test_a_slow_device_is_named_with_its_process(monkeypatch):
    told = [json.dumps([[0, 100e12], [1, 101e12]]), json.dumps([[2, 79e12], [3, 99e12]])]
    monkeypatch.setattr(check_module, "together", lambda what, work: told)
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="tpu")])
    assert _compared("matrix products", dict, 1e12, "TFLOP/s") == (
        "matrix products",
        False,
        "device 2 of process 1 reaches 79% of the median, expected 80%; 79 to 101 TFLOP/s a device",
    )
    assert slow_devices({0: 100.0, 1: 80.0}) == {}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_device_and_link_is_measured(monkeypatch, count):
    devices = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert list(matrix_speeds()) == list(range(count))
    links = link_speeds()
    assert sorted(links) == ([] if count == 1 else list(range(count)))
    assert all(speed > 0 for speed in links.values())


TWO_PROCESSES = """
import sys
from pathlib import Path
from llama_jax.entry import run_entry
from train.preflight.check import check
from train.config import read_config
run_entry(lambda: sys.exit(not check(read_config("tiny.toml"), "1", Path("run").absolute())))
"""


def test_two_processes_make_the_checks_together_and_find_what_one_has_set(workdir):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_NUM_PROCESSES": "2"}
    environment["JAX_COORDINATOR_ADDRESS"] = free_address()
    environment["JAX_COMPILATION_CACHE_DIR"] = str(workdir / "cache")
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES],
            env=environment | {"JAX_PROCESS_ID": str(process)} | ({"NCCL_ALGO": "Ring"} if process else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    (printed, errors), (silent, others) = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [1, 1], errors + others
    lines = [line for line in printed.splitlines() if line[:4] in ("pass", "FAIL")]
    assert len(lines) == 8
    assert lines[0].startswith("FAIL  hosts: process 1 (") and lines[0].endswith(
        ") has NCCL_ALGO Ring, most have unset"
    )
    assert all(line.startswith("pass") for line in lines[1:]), lines
    assert not Path("run").exists()
