"""Hub ids against a hub in this process: what is fetched, what is said, and what is refused before it is fetched."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from infer.entry import check_weights
from llama_jax import memory
from llama_jax.checkpoint.formats import find_checkpoint
from llama_jax.checkpoint.hf import write_config
from llama_jax.checkpoint.hub import download
from llama_jax.config import PRESETS
from tests.fake_hub import FakeHub
from tests.tiny import TINY

ROOT = Path(__file__).parents[1]
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
USUAL = ["LICENSE", "USE_POLICY.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]


def repository(tmp_path: Path) -> dict[str, bytes]:
    """The files of a repository as Meta's are, a megabyte a shard, with everything that is not wanted."""
    write_config(tmp_path, TINY, dtype="bfloat16", token_ids={})
    files = {name: name.encode() for name in [*USUAL, ".gitattributes", "README.md", "pytorch_model.bin"]}
    files |= {f"original/{name}": b"x" for name in ("params.json", "tokenizer.model", "model.safetensors")}
    files |= {name: os.urandom(1_000_000) for name in [*SHARDS, "model.safetensors", "model.fp16.safetensors"]}
    files["config.json"] = (tmp_path / "config.json").read_bytes()
    files[INDEX] = json.dumps({"weight_map": dict(enumerate(SHARDS))}).encode()
    return files


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The fake hub, and a cache of one's own."""
    server = FakeHub(repository(tmp_path))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "cache" / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield server
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# What is fetched


@pytest.mark.parametrize("weights", [SHARDS, ["model.safetensors"]], ids=["sharded", "single"])
def test_the_weights_that_the_index_names_and_what_lies_beside_them_are_fetched_once(hub, capfd, weights):
    if weights != SHARDS:
        del hub.files[INDEX]
    expected = sorted([*USUAL, *weights, *([INDEX] if weights == SHARDS else [])])
    directory = find_checkpoint("org/name")
    assert contents(directory) == {name: hub.files[name] for name in expected}
    assert hub.served() == expected
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("downloading")]
    assert re.fullmatch(rf"downloading org/name: 0.00\d* GB of 0.00\d* GB to {directory}", line)
    assert download("org/name") == directory
    assert hub.served() == expected
    assert "downloading" not in capfd.readouterr().err


def test_a_revision_and_the_token_reach_the_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.revisions = {"refs/pr/1"}
    assert download("org/name@refs/pr/1").name == hub.sha
    assert hub.token == "Bearer hf_secret"


def test_a_connection_that_breaks_is_resumed_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.cut = {SHARDS[0]}
    assert (download("org/name") / SHARDS[0]).read_bytes() == hub.files[SHARDS[0]]
    assert [asked for name, asked in hub.fetched if name == SHARDS[0]] == [None, "bytes=500000-"]


def test_a_download_that_failed_goes_on_with_the_files_that_are_missing(hub):
    hub.refuse = {f"/org/name/resolve/{hub.sha}/{SHARDS[1]}": (403, "")}
    with pytest.raises(FileNotFoundError, match=r"does not let this account read org/name \(403\)"):
        download("org/name")
    hub.refuse, hub.fetched = {}, []
    directory = download("org/name")
    assert SHARDS[1] in hub.served() and SHARDS[0] not in hub.served()
    assert (directory / SHARDS[1]).read_bytes() == hub.files[SHARDS[1]]


def test_a_new_revision_with_the_same_weights_fetches_only_what_changed(hub, capfd):
    download("org/name@v1")
    hub.sha, hub.files["LICENSE"], hub.fetched = "2" * 40, b"changed", []
    assert contents(download("org/name"))["LICENSE"] == b"changed"
    assert hub.served() == ["LICENSE"]
    assert "downloading org/name: 7e-09 GB of 0.00" in capfd.readouterr().err


def test_two_processes_at_once_leave_one_whole_copy(hub, tmp_path):
    code = "import sys; from llama_jax.checkpoint.hub import download; print(download('org/name'))"
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    start = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(start, cwd=ROOT, env=os.environ | environment, **pipes) for _ in range(2)]
    [one, other] = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], (one, other)
    assert one[0] == other[0]
    assert contents(Path(one[0].strip())) == {name: hub.files[name] for name in [*USUAL, *SHARDS, INDEX]}


def test_what_was_checked_is_fetched_though_the_branch_moves_meanwhile(hub, monkeypatch):
    def moved(*args, **kwargs):
        hub.revisions = set()  # the hub still has the commit
        return fetch(*args, **kwargs)

    fetch = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", moved)
    directory = download("org/name@v1")
    assert directory.name == hub.sha
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download("org/name@v1") == directory


def test_in_a_log_the_download_is_told_in_lines(hub, monkeypatch, capfd):
    monkeypatch.setattr("llama_jax.progress._QUIET_SECONDS", 0)
    download("org/name")
    _, last = capfd.readouterr().err.splitlines()
    assert re.match(r"org/name: 2.00MB in \d", last)


# Without the hub


def test_offline_uses_what_is_cached_without_a_word(hub, monkeypatch, capfd):
    directory = download("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    capfd.readouterr()
    assert download("org/name") == directory
    assert capfd.readouterr().err == ""
    (directory / SHARDS[0]).unlink()
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        download("org/name")


def test_offline_without_a_copy_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = "^org/name is no local directory and not whole in .*/cache/hub, and HF_HUB_OFFLINE is set$"
    with pytest.raises(FileNotFoundError, match=message):
        download("org/name")
    assert hub.fetched == []


def test_without_network_the_copy_is_used_and_why_is_said(hub, monkeypatch, capfd):
    directory = download("org/name")
    hub.refuse = {"/api/": (503, "")}
    capfd.readouterr()
    assert download("org/name") == directory
    assert capfd.readouterr().err.startswith(f"using the copy in {directory}, because org/name is no local dir")
    (directory / SHARDS[1]).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"^{directory} lacks {SHARDS[1]}: org/name .* could not be downloaded: .*503"
    ):
        download("org/name")


def test_no_network_and_no_copy_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = r"^org/name is no local directory and could not be downloaded: .*Connection refused$"
    with pytest.raises(FileNotFoundError, match=message):
        download("org/name")


# What is refused

PAGE = "https://huggingface.co/org/name"


@pytest.mark.parametrize(
    ("where", "status", "code", "message"),
    [
        ("/org/name/", 401, "GatedRepo", rf"\(401\): .* accept the licence at {PAGE} and set HF_TOKEN to a token"),
        ("/org/name/", 403, "GatedRepo", rf"\(403\): .* accept the licence at {PAGE} and set HF_TOKEN to a token"),
        ("/api/", 401, "", rf"\(401\): if the name is right, accept the licence at {PAGE} and set HF_TOKEN"),
        ("/api/", 403, "", rf"\(403\): if the name is right, accept the licence at {PAGE} and set HF_TOKEN"),
        (
            "/api/",
            404,
            "RepoNotFound",
            f"no local directory, and on the hub there is no {PAGE}, or none for",
        ),
        ("/api/", 500, "", "^org/name is no local directory and could not be downloaded: .*500"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_what_to_do(hub, capfd, where, status, code, message):
    hub.refuse = {where: (status, code)}
    with pytest.raises(FileNotFoundError, match=message) as caught:
        download("org/name")
    assert "\n" not in str(caught.value)
    assert "downloading" not in capfd.readouterr().err
    assert not {*hub.served()} - {"config.json"}


def test_a_revision_that_is_not_there_is_named(hub):
    with pytest.raises(FileNotFoundError, match="^org/name has no revision 'v2'; .*/tree/main shows those"):
        download("org/name@v2")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["original/consolidated.00.pth", "original/params.json", "README.md"], "Meta's original form, not safeten"),
        (["consolidated.00.pth", "params.json"], "fetch it with `hf download org/name --local-dir DIR` and give the"),
        (["config.json", "pytorch_model.bin"], r"pickled weights alone \(pytorch_model.bin\), which are not opened"),
        (["config.json", "model.gguf"], "is no model in safetensors: .* it has config.json, model.gguf$"),
        (["adapter/model.safetensors", "adapter/config.json"], "is no model in safetensors"),
    ],
)
def test_a_repository_of_another_form_is_refused_before_anything_is_fetched(hub, names, message):
    hub.files = dict.fromkeys(names, b"x")
    with pytest.raises(ValueError, match=f"^org/name .*{message}"):
        download("org/name")
    assert hub.fetched == []


def test_another_architecture_is_refused_before_its_weights_are_fetched(hub):
    hub.files["config.json"] = b'{"model_type": "mistral", "architectures": ["MistralForCausalLM"]}'
    with pytest.raises(ValueError, match="only a LlamaForCausalLM of model_type 'llama' is supported"):
        download("org/name")
    assert hub.served() == ["config.json", INDEX]


def test_a_model_that_the_caller_refuses_is_not_fetched(hub):
    def check(cfg, stored):
        assert (cfg, stored) == (TINY, None)
        raise ValueError("too large")

    with pytest.raises(ValueError, match="too large"):
        find_checkpoint("org/name", check)
    assert hub.served() == ["config.json", INDEX]


def test_weights_in_few_bits_are_checked_by_the_bytes_of_their_files(hub):
    config = json.loads(hub.files["config.json"]) | {"quantization_config": {"quant_method": "gptq"}}
    hub.files["config.json"] = json.dumps(config).encode()

    def check(cfg, stored):
        assert stored == sum(len(hub.files[name]) for name in SHARDS)
        raise ValueError("too large")

    with pytest.raises(ValueError, match="too large"):
        find_checkpoint("org/name", check)


def test_weights_that_stay_in_few_bits_fit_where_floats_do_not(monkeypatch):
    monkeypatch.setattr(memory, "bytes_left", lambda devices: 12 * 10**9)
    cfg = PRESETS["llama3.1-8b"]
    check_weights(argparse.Namespace(mesh="data=1", dtype=None, quantize=None), cfg, 9 * 10**9)
    for stored, dtype in ((None, None), (13 * 10**9, None), (9 * 10**9, "float32")):
        with pytest.raises(ValueError, match="llama3.1-8b needs .* but 12.0 GB are left"):
            check_weights(argparse.Namespace(mesh="data=1", dtype=dtype, quantize=None), cfg, stored)


def test_an_index_that_names_what_is_not_there_or_names_nothing_is_refused(hub):
    del hub.files[SHARDS[1]]
    with pytest.raises(ValueError, match=f"^org/name lacks {SHARDS[1]}, which its {INDEX} names$"):
        download("org/name")
    for sha, index in (("3", b"[]"), ("4", b'{"weight_map": {"a": 1}}')):
        hub.sha, hub.files[INDEX] = sha * 40, index
        with pytest.raises(ValueError, match=f"{INDEX}: a JSON object with a weight_map of file names was expected"):
            download("org/name")


def test_too_little_room_is_refused_with_both_numbers(hub, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1_500_000))
    message = "^org/name takes 0.002 GB more and .*/cache/hub/.* has 0.0015 GB free; make room, or set HF_HOME to a dir"
    with pytest.raises(OSError, match=message):
        download("org/name")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2_500_000))
    assert download("org/name").is_dir()
