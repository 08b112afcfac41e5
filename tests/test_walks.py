"""The first hour of four people, as they type it. Each walk is a script in tests/walks that names its fakes.

Run `python -m pytest -m slow -s tests/test_walks.py` to read the transcripts.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub

ROOT = Path(__file__).parents[1]
WALKS = ROOT / "tests" / "walks"
DEMO = ROOT / "llama_jax" / "demo"

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}"
OWN_RUN = """
[model]
vocab_size = 4096
num_layers = 5
embed_dim = 256
mlp_dim = 640
num_heads = 8
num_kv_heads = 2
head_dim = 32
tie_embeddings = true
rope = { theta = 500000.0, factor = 8.0, original_max_seq_len = 256 }

[data]
directory = "data/own"

[run]
mesh = "fsdp=-1"
compute_dtype = "float32"
eval_rows = 8

[stage.1]
phases = [{ seq_len = 128, tokens = 16_384 }]
batch_tokens = 2048
learning_rate = 1e-3
final_learning_rate = 1e-4
warmup_steps = 2
rope_factor = 8.0
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def walk(tmp_path, monkeypatch):
    """Runs a walk in an empty folder, as an installed package would be used, and returns its transcript."""
    command = tmp_path / "bin" / "llama-jax"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m llama_jax "$@"\n')
    command.chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    paths = {
        "PROJECT": ROOT,
        "DEMO": DEMO,
        "DATA": ROOT / "data" / "demo",
        "PYTHONPATH": ROOT,
        "TPU_ROOT": tmp_path / "tpu",
    }
    for name, path in paths.items():
        monkeypatch.setenv(name, str(path))
    monkeypatch.setenv("GPU_ROOT", str(tmp_path / "gpu"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("HF_TOKEN", "JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)

    def run(name: str) -> str:
        script = f". {WALKS}/walk.sh; . {WALKS}/{name}.sh"
        done = subprocess.run(
            ["sh", "-c", script], cwd=home, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


def device(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_researcher_chats_with_an_8b_on_a_tpu_vm(walk, tmp_path, monkeypatch):
    device(tmp_path / "tpu/dev/accel0")
    device(tmp_path / "tpu/sys/bus/pci/devices/0000:00:04.0/vendor", "0x1ae0\n")
    files = {path.name: path.read_bytes() for path in DEMO.iterdir()}
    settings = json.loads(files.get("tokenizer_config.json", b"{}")) | {"chat_template": TEMPLATE}
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    hub = FakeHub(files, "meta-llama/Llama-3.1-8B-Instruct")
    threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    hub.token_needed = "Bearer hf_accepted"
    transcript = walk("researcher")
    hub.shutdown()
    hub.server_close()
    assert "installing .[tpu]" in transcript
    assert "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct" in transcript
    assert transcript.count("downloading meta-llama/Llama-3.1-8B-Instruct") == 1
    assert transcript.count("first token after") == 3
    assert "8 x cpu, tensor=8" in transcript


def test_an_engineer_trains_on_own_documents_with_eight_gpus(walk, tmp_path, monkeypatch):
    device(tmp_path / "gpu/dev/nvidia0")
    device(tmp_path / "gpu/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06\n")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    documents = tmp_path / "home" / "documents"
    documents.mkdir()
    for i in range(12):
        (documents / f"{i}.txt").write_text(f"Chapter {i}. " + "The king spoke, and the court was silent. " * (40 + i))
    (tmp_path / "home" / "own.toml").write_text(OWN_RUN)
    transcript = walk("engineer")
    assert "installing .[cuda]" in transcript
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)  grad", transcript)]
    assert losses and losses[-1] < 4
    assert "8 x cpu, fsdp=8" in transcript and "8 x cpu, data=2,tensor=4" in transcript
    assert (tmp_path / "home" / "own-hf" / "model.safetensors").stat().st_size > 8_000_000
    assert "error: tensor=7 cannot split 8 query heads" in transcript


def test_a_platform_engineer_starts_a_pod(walk, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("PORT", str(free.getsockname()[1]))
    transcript = walk("platform")
    assert "still waiting for the other processes: all 4 must run the same command" in transcript
    assert "8 x cpu, data=4,tensor=2" in transcript
    assert transcript.count("\nprefill ") == 1  # the first process alone tells
    assert not re.search("^import", (tmp_path / "home" / "worker-1.out").read_text(), re.MULTILINE)
    assert re.search(r"error: training 8.0B parameters .* needs \d+.* GB on each", transcript)


def test_a_student_looks_around_on_a_laptop(walk):
    if not (ROOT / "data" / "demo" / "metadata.json").exists():
        shutil.rmtree(ROOT / "data" / "demo", ignore_errors=True)  # or half of it; the walk makes it anew
    transcript = walk("student")
    assert "def read_config(path):" in transcript
    assert (
        json.loads(next(line for line in transcript.splitlines() if line.startswith("{")))["finish_reason"] == "length"
    )
    assert transcript.count("\nerror: ") == 4
    assert "8 x cpu, data=2,tensor=4" in transcript
