"""Opening devices: hardware that is there but not used, runs of several processes, the line that a run begins with.

The hardware is fake: files under tmp_path stand for /dev, /sys and /proc, a slow or failing device
query is a function in place of jax.devices, and the cloud's records come from a server in a thread.
"""

import http.server
import importlib.util
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

import llama_jax
from llama_jax import devices
from llama_jax.config import PRESETS, RopeConfig, set_field
from llama_jax.devices import describe_run, device_holders, num_processes, open_devices, tpu_files
from llama_jax.mesh import inference_mesh_spec, make_mesh
from tests.processes import until
from tests.tiny import TINY

ROOT = Path(__file__).parents[1]


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def add_pci(root: Path, name: str, vendor: str, kind: str) -> None:
    write(root / "sys/bus/pci/devices" / name / "vendor", f"{vendor}\n")
    write(root / "sys/bus/pci/devices" / name / "class", f"{kind}\n")


def add_tpu(root: Path, *files: str) -> None:
    add_pci(root, "0000:00:04.0", "0x1ae0", "0x120000")
    for file in files:
        write(root / file)


@pytest.fixture
def any_platform(monkeypatch):
    """As without JAX_PLATFORMS=cpu; the device query still gives the CPUs of the tests."""
    found = jax.devices()
    monkeypatch.setattr(devices, "_cpu_is_asked_for", lambda: False)
    monkeypatch.setattr(jax, "devices", lambda: found)


@pytest.fixture
def installed(monkeypatch):
    """Say which packages are installed."""
    return lambda *names: monkeypatch.setattr(devices, "_installed", lambda *asked: bool(set(names) & set(asked)))


# What is there.


@pytest.mark.parametrize("files", [("dev/accel0", "dev/accel1"), ("dev/vfio/0", "dev/vfio/1")])
def test_tpu_chips_are_device_files_beside_a_pci_device_of_googles(tmp_path, files):
    write(tmp_path / "dev/vfio/vfio")
    add_tpu(tmp_path, *files)
    assert tpu_files(tmp_path) == [tmp_path / file for file in files]


@pytest.mark.parametrize(("vendor", "kind"), [("0x8086", "0x120000"), ("0x1ae0", "0x020000"), ("0x1ae0", "0x010802")])
def test_another_vendors_chip_and_googles_network_card_and_disk_are_no_tpu(tmp_path, vendor, kind):
    write(tmp_path / "dev/accel0")
    write(tmp_path / "dev/vfio/0")
    add_pci(tmp_path, "0000:00:04.0", vendor, kind)
    assert tpu_files(tmp_path) == []


def test_without_other_hardware_the_cpu_is_used(tmp_path, any_platform):
    assert open_devices(tmp_path, {}) == jax.devices()


def test_a_tpu_without_libtpu_names_the_extra(tmp_path, any_platform, installed):
    add_tpu(tmp_path, "dev/accel0")
    installed()
    with pytest.raises(ValueError, match=r"there is a TPU \(/dev/accel0\).*pip install 'jax\[tpu\]', or set JAX_"):
        open_devices(tmp_path, {"TPU_SKIP_MDS_QUERY": "1"})


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ([], r"an NVIDIA GPU \(/dev/nvidia0\).*pip install 'jax\[cuda13\]' .*, or set JAX_PLATFORMS=cpu"),
        (["jax_cuda12_plugin"], "could not open it: .*CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_gpu_without_its_plugin_names_the_extra_and_with_it_where_to_look(
    tmp_path, any_platform, installed, plugins, message
):
    write(tmp_path / "dev/nvidia0")
    write(tmp_path / "dev/nvidiactl")
    installed(*plugins)
    with pytest.raises(ValueError, match=message):
        open_devices(tmp_path, {})


def test_a_tpu_that_another_process_holds_names_its_id_and_command(tmp_path, any_platform, installed, monkeypatch):
    def held():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    add_tpu(tmp_path, "dev/accel0")
    installed("libtpu")
    monkeypatch.setattr(jax, "devices", held)
    for pid, target in ((4242, "/dev/accel0"), (4243, "/dev/null"), (os.getpid(), "/dev/accel0")):
        write(tmp_path / f"proc/{pid}/cmdline", "python\0serve.py\0")
        (tmp_path / f"proc/{pid}/fd").mkdir()
        (tmp_path / f"proc/{pid}/fd/7").symlink_to(target)
    assert device_holders([tmp_path / "dev/accel0"], tmp_path) == {4242: "python serve.py"}
    with pytest.raises(ValueError, match=r"held by process 4242 \(python serve.py\): end that, .*initialize backend"):
        open_devices(tmp_path, {"TPU_SKIP_MDS_QUERY": "1"})


def test_hardware_is_left_alone_when_the_cpu_is_asked_for(tmp_path):
    assert jax.config.jax_platforms == "cpu"  # type: ignore[attr-defined]
    add_tpu(tmp_path, "dev/accel0")
    write(tmp_path / "dev/nvidia0")
    assert open_devices(tmp_path, {"TPU_WORKER_HOSTNAMES": "a,b"})[0].platform == "cpu"


# Several processes.


@pytest.fixture
def metadata(monkeypatch):
    """Records of a pod with three workers, at the address of the cloud's server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            right = self.path.endswith("/worker-network-endpoints") and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if right else 404)
            self.end_headers()
            self.wfile.write(b"a:1:10.0.0.1,b:2:10.0.0.2,c:3:10.0.0.3")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("environ", "on_tpu", "expected"),
    [
        ({}, False, 1),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, True, 6),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_PROCESS_BOUNDS": "1,1,1"}, True, 1),
        ({"JAX_NUM_PROCESSES": "8", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "a:1"}, False, 8),
        ({"SLURM_STEP_NUM_TASKS": "4"}, False, 4),
    ],
)
def test_the_environment_says_how_many_processes_there_are(environ, on_tpu, expected):
    assert num_processes(environ, on_tpu=on_tpu) == expected


def test_a_pods_own_records_say_how_many_workers_it_has(metadata):
    assert num_processes({"GCE_METADATA_IP": metadata}, on_tpu=True) == 3
    assert num_processes({"GCE_METADATA_IP": "127.0.0.1:9"}, on_tpu=True) == 1


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID must be set, too"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two': expected a number"),
    ],
)
def test_half_of_a_run_of_several_processes_is_an_error(environ, message):
    with pytest.raises(ValueError, match=message):
        num_processes(environ, on_tpu=False)


def no_timer_runs() -> bool:
    return not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


@pytest.fixture
def slow(monkeypatch, any_platform):
    """A device query that takes longer than patience, and a connection to other processes that is only written down."""
    found, connected = jax.devices(), []
    monkeypatch.setattr(jax, "devices", lambda: until(no_timer_runs) or found)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: connected.append(how))
    return connected


def test_a_worker_started_alone_says_which_command_starts_all(tmp_path, slow, capsys, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "infer.generate", "two words"])
    monkeypatch.chdir(tmp_path)
    add_tpu(tmp_path, "dev/accel0")
    monkeypatch.setattr(devices, "_unused", lambda *_: None)
    open_devices(tmp_path, {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_NAME": "pod"}, patience=0.1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "this TPU slice has 4, and all must run the same command" in line
    assert "gcloud compute tpus tpu-vm ssh pod --worker=all --command='cd " in line
    assert "python -m infer.generate" in line and "two words" in line
    assert slow == [{}]


def test_processes_find_each_other_by_what_the_environment_says(tmp_path, slow, capsys):
    environ = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "localhost:1"}
    open_devices(tmp_path, environ, patience=0.1)
    assert "all 2 must run the same command, each with its own JAX_PROCESS_ID" in capsys.readouterr().err
    assert slow == [{"num_processes": 2, "process_id": 1}]


def test_a_coordinator_that_is_absent_is_an_error_that_names_it(tmp_path, any_platform, monkeypatch):
    def absent(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: Deadline Exceeded")

    monkeypatch.setattr(jax.distributed, "initialize", absent)
    environ = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "nowhere:1"}
    with pytest.raises(ValueError, match=r"the 2 processes .* see that nowhere:1 can be reached .*\(DEADLINE_EX"):
        open_devices(tmp_path, environ)


def test_devices_that_answer_in_time_say_nothing(tmp_path, any_platform, capsys):
    open_devices(tmp_path, {}, patience=120)
    until(no_timer_runs)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
def test_the_tpu_compiler_says_nothing_about_a_tpu_that_is_not_there():
    if tpu_files():
        pytest.skip("this host has a TPU")
    code = "from llama_jax.devices import open_devices; print(open_devices()[0].platform)"
    environ = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS" and "TPU" not in key}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert (done.stdout.strip() in ("cpu", "gpu"), done.stderr) == (True, "")


def test_of_two_processes_the_first_alone_prints():
    code = (
        "from llama_jax.devices import open_devices; from llama_jax.entry import say;"
        "say(str(len(open_devices()))); print('result')"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": address}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environ | {"JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    assert [process.communicate(timeout=300) for process in running] == [("result\n", "2\n"), ("", "")]


# The line that a run begins with, and its mesh.


def test_a_run_is_described_in_one_line():
    mesh = make_mesh("data=2,tensor=4")
    line = describe_run(PRESETS["llama3.1-8b"], mesh, "bfloat16", "models/8b")
    assert line == "8 x cpu, data=2,tensor=4, bfloat16, llama3.1-8b from models/8b"
    line = describe_run(TINY, make_mesh("data=1"), "float32", "the demo")
    assert line == "1 x cpu, tensor=1, float32, 0.2M parameters from the demo"


def test_a_model_is_named_if_its_architecture_is_a_published_one_and_counted_if_not():
    assert devices.model_name(PRESETS["llama3.3-70b"]) == "llama3.1-70b/llama3.3-70b"
    changed = set_field(PRESETS["llama3.1-8b"], "rope.factor", 32.0)
    assert changed.rope == RopeConfig(factor=32.0)
    assert devices.model_name(changed) == "8.0B parameters"


def test_tensor_stays_among_the_devices_of_one_process():
    assert inference_mesh_spec(PRESETS["llama3.1-8b"], 16, 4) == "data=4,tensor=4"
    assert inference_mesh_spec(PRESETS["llama3.2-3b"], 16, 16) == "data=2,tensor=8"


def test_an_entry_asks_for_devices_without_importing_jax_before():
    code = "import sys, llama_jax.devices; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_load_outside_a_mesh_takes_tensor_among_the_local_devices(monkeypatch):
    asked = []
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    monkeypatch.setattr("llama_jax.checkpoint.make_mesh", lambda spec: asked.append(spec) or make_mesh("data=1"))
    before = jax.sharding.get_mesh()
    try:
        llama_jax.load(ROOT / "llama_jax" / "demo")
    finally:
        jax.set_mesh(before)
    assert asked == ["data=4,tensor=2"]
