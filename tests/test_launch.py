"""The files of docs/launch/ and the commands of docs/pods.md, as far as they can be tried without a cluster."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import llama_jax.peers
import train.faults.interruption
import train.faults.watchdog
from infer.generate import main as generate
from llama_jax.chips import CHIPS
from llama_jax.mesh import parse_mesh, sharding_rules
from llama_jax.slices import parse_slice, slice_shapes
from tests.test_train_config import abstract_mesh
from train.config import read_config
from train.prepare import main as prepare
from train.pretrain import main as pretrain

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "docs/launch"
ENTRIES = {"train.pretrain": pretrain, "train.prepare": prepare, "infer.generate": generate}
PREEMPTED = train.faults.interruption.EXIT_PREEMPTED
RESTARTED = {PREEMPTED, train.faults.watchdog.EXIT_HUNG, llama_jax.peers.EXIT_PEER_LOST}
KINDS = {"tpu-v5p-slice": "v5p"}  # what GKE calls them, and what we do


def jobset(name: str) -> dict:
    return yaml.safe_load((LAUNCH / f"jobset-{name}.yaml").read_text())


def job(name: str) -> dict:
    (one,) = jobset(name)["spec"]["replicatedJobs"]
    return one


def container(name: str) -> dict:
    (one,) = job(name)["template"]["spec"]["template"]["spec"]["containers"]
    return one


def documented() -> list[list[str]]:
    """Every command line of docs/pods.md and of the scripts' own comments that begins with `python -m`."""
    texts = [ROOT / "docs/pods.md", LAUNCH / "restart.sh"]
    text = "\n".join(path.read_text() for path in texts).replace("\\\n", " ")
    commands = [shlex.split(found) for found in re.findall(r"python -m ([^\n`']*)", text)]
    return [command for command in commands if command[0] in ENTRIES]


COMMANDS = [*(container(name)["args"] for name in ("tpu", "gpu")), *documented()]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_one_that_the_entry_takes(command, capsys):
    with pytest.raises(SystemExit):
        ENTRIES[command[0]](["--help"])
    known = capsys.readouterr().out
    options = [option.partition("=")[0] for option in command[1:] if option.startswith("--")]
    assert [option for option in options if not re.search(rf"{option}\b", known)] == []


def values(command: list[str], option: str) -> list[str]:
    """What follows an option, as `--option value` or `--option=value`."""
    pairs = zip(command, [*command[1:], ""], strict=True)
    return [this.partition("=")[2] or then for this, then in pairs if this.partition("=")[0] == option]


@pytest.mark.parametrize("command", [one for one in COMMANDS if one[0] == "train.pretrain"], ids=" ".join)
def test_every_run_names_a_config_that_is_shipped_and_settings_that_it_has(command):
    settings = dict(setting.partition("=")[::2] for setting in values(command, "--set"))
    config = read_config(*(values(command, "--config") or ["demo"]), settings)
    assert set(values(command, "--stage")) <= set(config.stage)
    for plan in values(command, "--plan"):
        mesh = parse_mesh(config.stage_mesh("1"), parse_slice(plan).num_chips)
        assert mesh["data"] % parse_slice(plan).num_slices == 0


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_the_mesh_and_the_batches_of_a_jobset_suit_its_devices(name):
    spec, args = job(name), container(name)["args"]
    pods = spec["template"]["spec"]["parallelism"]
    (chips,) = container(name)["resources"]["limits"].values()
    config = read_config(*values(args, "--config"), dict(x.split("=", 1) for x in values(args, "--set")))
    num_devices = spec["replicas"] * pods * chips
    mesh = config.stage_mesh("1")
    assert parse_mesh(mesh, num_devices)["data"] % spec["replicas"] == 0
    rules = sharding_rules(config.stage_model("1"), abstract_mesh(mesh, num_devices))
    for phase in config.stage["1"].phases:
        assert config.stage["1"].phase_rows(phase) % rules.batch_multiple == 0
    if name == "tpu":
        selector = spec["template"]["spec"]["template"]["spec"]["nodeSelector"]
        kind = KINDS[selector["cloud.google.com/gke-tpu-accelerator"]]
        shape = tuple(int(size) for size in selector["cloud.google.com/gke-tpu-topology"].split("x"))
        assert shape in slice_shapes(kind) and math.prod(shape) == pods * chips
    else:
        assert chips == CHIPS["h100"].most
        environment = {one["name"]: one.get("value") for one in container(name)["env"]}
        assert environment["JAX_NUM_PROCESSES"] == str(pods)
        first = f"{jobset(name)['metadata']['name']}-{spec['name']}-0-0.{jobset(name)['metadata']['name']}"
        assert environment["JAX_COORDINATOR_ADDRESS"].split(":")[0] == first


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_a_jobset_starts_all_again_and_counts_what_was_no_preemption(name):
    assert jobset(name)["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset(name)["kind"] == "JobSet"
    policy, spec = jobset(name)["spec"]["failurePolicy"], job(name)["template"]["spec"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    (pod_rule,) = spec["podFailurePolicy"]["rules"]
    assert pod_rule["action"] == "FailJob" and pod_rule["onExitCodes"]["values"] == [PREEMPTED]
    assert pod_rule["onExitCodes"]["containerName"] == container(name)["name"]
    # A pod that the job replaced by itself would wait for the others in vain; a pod policy needs Never.
    assert spec["backoffLimit"] == 0 and spec["completions"] == spec["parallelism"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 60


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_a_jobset_keeps_run_data_and_programs_where_every_pod_sees_them(name):
    assert values(container(name)["args"], "--run-dir")[0].startswith("gs://")
    assert any(setting.startswith("data.directory=gs://") for setting in values(container(name)["args"], "--set"))
    environment = {one["name"]: one.get("value", "") for one in container(name)["env"]}
    assert environment["JAX_COMPILATION_CACHE_DIR"].startswith("gs://")


@pytest.mark.parametrize(("name", "extra", "guide"), [("tpu", "tpu", "tpu-vm.md"), ("gpu", "cuda", "gpu.md")])
def test_an_image_is_installed_as_the_guide_says_and_holds_what_is_installed(name, extra, guide):
    text = (LAUNCH / f"Dockerfile.{name}").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = re.search(r"-e '\.\[(.*)\]'", text)[1].split(",")
    assert extra in extras and set(extras) <= set(project["project"]["optional-dependencies"])
    constraints, python = re.search(r"-c (constraints/py(\d+)\.txt)", text).groups()
    assert re.search(r"FROM python:(\d)\.(\d+)-", text).groups() == (python[0], python[1:])
    assert f"pip install -e '.[{extra}]' -c {constraints}" in (ROOT / "docs" / guide).read_text()
    copied = [source for line in re.findall(r"COPY (.*)", text) for source in line.split()[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    packages = {include.rstrip("*") for include in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {constraints.split("/")[0], "pyproject.toml", project["project"]["readme"]} <= set(copied)
    assert json.loads(re.search(r"ENTRYPOINT (.*)", text)[1]) == ["python", "-m"]
    assert json.loads(re.search(r"CMD (.*)", text)[1])[0] in ENTRIES


@pytest.fixture
def commands(tmp_path):
    """Stand-ins for srun, python and scontrol that write what they are called with, and a checkout's .venv."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    for name in ("srun", "scontrol", "python"):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >> calls\n[ {name} = scontrol ] || exit $STATUS\n')
        path.chmod(0o755)
    return tmp_path


def run_script(folder: Path, *command: str, **environment: str) -> tuple[int, list[str]]:
    """The status of a script and what it called."""
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"} | environment
    status = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=60).returncode
    return status, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 1, 2, 75, 76, 77, 130, 137])
def test_slurm_starts_again_what_can_go_on_and_nothing_else(status, commands):
    script = str(LAUNCH / "slurm.sh")
    ended, called = run_script(commands, "bash", script, "--stage", "1", "--set", "a=b c", STATUS=str(status))
    assert ended == status
    assert called[0] == "srun --kill-on-bad-exit=0 python -m train.pretrain --stage 1 --set a=b c"
    assert called[1:] == (["scontrol requeue 7"] if status in RESTARTED | {137} else [])


def test_slurm_starts_again_so_many_times_at_most(commands):
    _, called = run_script(commands, "bash", str(LAUNCH / "slurm.sh"), STATUS="75", SLURM_RESTART_COUNT="50")
    assert len(called) == 1


def test_slurm_asks_for_a_process_a_node_and_a_signal_before_the_end():
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == "1" and "requeue" in asked
    assert re.fullmatch(r"TERM@\d{2,}", asked["signal"])  # without B: to the processes, not to the script alone


@pytest.mark.parametrize(("status", "times"), [(0, 1), (1, 1), (130, 1), (75, 4), (76, 4), (77, 4)])
def test_a_machine_starts_again_what_can_go_on_and_nothing_else(status, times, commands):
    command = ["sh", str(LAUNCH / "restart.sh"), "python", "-m", "train.pretrain", "--stage", "1"]
    ended, called = run_script(commands, *command, STATUS=str(status), MAX_RESTARTS="3")
    assert (ended, called) == (status, ["python -m train.pretrain --stage 1"] * times)


@pytest.mark.parametrize("name", ["slurm.sh", "restart.sh"])
def test_shellcheck_finds_nothing(name):
    if not shutil.which("shellcheck"):
        pytest.skip("there is no shellcheck here")
    command = ["shellcheck", "--exclude=SC1091", str(LAUNCH / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
