"""Installation on fake machines, the console command, what --help imports, the shipped configs."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import llama_jax
from llama_jax.__main__ import COMMANDS
from llama_jax.checkpoint.formats import FORMATS
from train.config import CONFIGS, read_config

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "dirname", "grep", "sed", "sort", "head", "cat", "rm", "touch", "mkdir", "cp", "ls")
OLD_PYTHON = "#!/bin/sh\nexit 1\n"
NEW_PYTHON = "#!/bin/sh\nexit 0\n"


@pytest.fixture
def machine(tmp_path):
    """A machine of its own: PATH holds what install.sh calls and no Python; DEVICE_ROOT is empty."""
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        os.symlink(shutil.which(tool) or pytest.skip(f"there is no {tool}"), tmp_path / "bin" / tool)
    return tmp_path


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def install(machine: Path, *args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    environment = {"PATH": str(machine / "bin"), "HOME": str(machine), "DEVICE_ROOT": str(machine)} | environment
    command = ["sh", ROOT / "install.sh", *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def target(machine: Path, *args: str, **environment: str) -> str:
    """What a dry run would give to pip."""
    write(machine / "bin/python3.11", NEW_PYTHON)
    return install(machine, "-n", "venv", *args, **environment).stdout.split()[1]


OPEN_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12.3.0\n"
CLOSED_DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 23 08:09:10 UTC 2023\n"
DRIVER, CARD, OTHER = "proc/driver/nvidia/version", "sys/bus/pci/devices/1/vendor", "sys/bus/pci/devices/0/vendor"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "."),
        ({"dev/accel0": ""}, ".[tpu]"),
        ({"dev/accel/accel0": ""}, "."),  # an Intel NPU
        ({"dev/vfio/0": "", OTHER: "0x8086", CARD: "0x1ae0"}, ".[tpu]"),
        ({"dev/vfio/vfio": "", CARD: "0x1ae0"}, "."),  # a network card of Google's
        ({"dev/vfio/0": "", CARD: "0x8086"}, "."),
        ({"dev/nvidia0": "", DRIVER: OPEN_DRIVER}, ".[cuda]"),
        ({"dev/nvidia3": "", DRIVER: CLOSED_DRIVER}, ".[cuda12]"),
        ({DRIVER: OPEN_DRIVER}, "."),  # a driver without a card that may be used
    ],
)
def test_the_extra_is_that_of_the_device_files(machine, files, expected):
    for path, text in files.items():
        write(machine / path, text)
    assert target(machine) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("580.65.06, 9.0\n580.65.06, 9.0", ".[cuda]"),
        ("580.65.06, 12.0", ".[cuda]"),
        ("580.65.06, 9.0\n580.65.06, 7.0", ".[cuda12]"),  # a V100 beside an H100
        ("570.86.15, 9.0", ".[cuda12]"),
        ("470.82.01, 7.5", "."),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "."),
    ],
)
def test_the_extra_is_that_of_the_driver_and_the_oldest_gpu(machine, said, expected):
    write(machine / "bin/nvidia-smi", f'#!/bin/sh\necho "{said}"\n')
    assert target(machine) == expected


def test_the_extra_joins_the_tests_and_can_be_named(machine):
    write(machine / "dev/accel0")
    assert target(machine, "test") == ".[test,tpu]"
    assert target(machine, "test", EXTRA="") == ".[test]"
    assert target(machine, EXTRA="cuda12") == ".[cuda12]"


def test_a_driver_that_is_too_old_is_told(machine):
    write(machine / "bin/nvidia-smi", "#!/bin/sh\necho '470.82.01, 7.5'\n")
    write(machine / "bin/python3.11", NEW_PYTHON)
    done = install(machine, "-n", "venv")
    told = "installing for the CPU; set JAX_PLATFORMS=cpu to run there\n"
    assert done.stderr == f"NVIDIA driver 470.82 is too old for jax, which needs 525: {told}"


@pytest.mark.parametrize(
    ("pythons", "python"),
    [
        ({"python3.11": NEW_PYTHON, "python3.12": NEW_PYTHON}, "python3.11"),
        ({"python3.11": OLD_PYTHON, "python3.14": NEW_PYTHON, "python3": NEW_PYTHON}, "python3.14"),
        ({"python3": NEW_PYTHON}, "python3"),
        ({"python3": OLD_PYTHON, "uv": NEW_PYTHON}, "uv"),
    ],
)
def test_the_first_python_that_fits_is_taken_else_uv(machine, pythons, python):
    for name, text in pythons.items():
        write(machine / "bin" / name, text)
    assert f" with {python}, " in install(machine, "-n", "venv").stdout


@pytest.mark.parametrize(
    ("version", "fits"), [((3, 10, 9), False), ((3, 11, 0), True), ((3, 14, 9), True), ((3, 15, 0), False)]
)
def test_a_python_fits_by_its_version(machine, version, fits):
    code = f"import sys; sys.version_info = {version}; $2"
    write(machine / "bin/snake", f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    done = install(machine, "-n", "venv", PYTHON="nothing snake")
    if fits:
        assert " with snake, " in done.stdout
    else:
        assert done.stderr == "error: none of these is a Python from 3.11 to 3.14 that has venv: nothing snake\n"
        assert (done.returncode, done.stdout) == (1, "")


# A uv or python3 that makes environments, each with a uv and a Python that only writes down what pip is asked.
MAKER = """#!/bin/sh
case "$*" in "-m venv"* | "venv "*) ;; *) exit 1 ;; esac
echo "$*" >>"$HOME/log"
for last; do :; done
mkdir -p "$last/bin"
cp "$HOME/asked" "$last/bin/python"
cp "$0" "$last/bin/uv"
"""
ASKED = """#!/bin/sh
case "$*" in
*"-m pip install"*) echo "$*" >>"$HOME/log"; exit "${PIP_STATUS:-0}" ;;
*constraints*) echo constraints/py312.txt ;;
esac
"""


@pytest.mark.parametrize("beside", [False, True])
def test_where_no_python_fits_uv_fetches_one(machine, beside):
    venv = machine / "venv"
    write(machine / "bin" / ("python3" if beside else "uv"), MAKER)
    write(machine / "asked", ASKED)
    write(machine / "dev/accel0")
    done = install(machine, str(venv))
    assert (done.returncode, done.stderr) == (0, "")
    first = [f"-m venv {venv}-uv", "-m pip install uv"] if beside else []
    pins = "-m pip install -qq --disable-pip-version-check -c constraints/py312.txt -e .[tpu]"
    calls = [*first, f"venv --quiet --seed --python 3.12 {venv}", pins]
    assert (machine / "log").read_text().splitlines() == calls
    assert sorted(path.name for path in venv.iterdir()) == ["bin", "core"]


def test_an_install_that_fails_leaves_no_stamp(machine):
    write(machine / "bin/uv", MAKER)
    write(machine / "asked", ASKED)
    assert install(machine, str(machine / "venv"), "test").returncode == 0
    assert {"core", "test"} < set(os.listdir(machine / "venv"))
    done = install(machine, str(machine / "venv"), "test", PIP_STATUS="1")
    assert (done.returncode, done.stderr) == (1, "error: pip could not install .[test]; what it said stands above\n")
    assert os.listdir(machine / "venv") == ["bin"]


@pytest.mark.parametrize("name", [".", "..", "home"])
def test_a_directory_that_is_no_environment_is_refused_and_left_as_it_is(machine, name):
    write(machine / "bin/uv", MAKER)
    write(machine / "home/.letters")
    done = install(machine, name, cwd=machine / "home" if name != "home" else machine)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "is not empty and no Python environment; name a dir" in done.stderr
    assert (machine / "home/.letters").exists() and not (machine / "log").exists()


def test_an_interrupted_environment_and_an_empty_directory_are_taken(machine):
    write(machine / "bin/uv", MAKER)
    write(machine / "asked", ASKED)
    write(machine / "begun/pyvenv.cfg")
    (machine / "empty").mkdir()
    assert [install(machine, str(machine / name)).returncode for name in ("begun", "empty")] == [0, 0]


def test_a_relative_name_is_the_callers(machine):
    write(machine / "bin/uv", MAKER)
    write(machine / "asked", ASKED)
    assert install(machine, "venv", cwd=machine).returncode == 0
    assert (machine / "venv/core").exists()


def test_a_machine_with_nothing_is_told_what_to_install(machine):
    done = install(machine, str(machine / "venv"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt install python3-venv" in done.stderr


def run_python(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=cwd, env=environment)


def test_every_command_is_a_module_that_there_is():
    for module, _, _ in COMMANDS.values():
        assert importlib.util.find_spec(module)


def test_bare_the_console_lists_its_commands(tmp_path):
    done = run_python("-m", "llama_jax", cwd=tmp_path)
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")] == list(COMMANDS)
    assert done.stdout == run_python("-m", "llama_jax", "--help", cwd=tmp_path).stdout


def test_an_unknown_command_is_one_line():
    done = run_python("-m", "llama_jax", "serv")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: there is no command 'serv'; there are {', '.join(COMMANDS)}\n"


def test_the_console_tells_the_version():
    assert run_python("-m", "llama_jax", "--version").stdout == f"llama-jax {llama_jax.__version__}\n"


def test_a_command_gets_its_options_and_its_status():
    done = run_python("-m", "llama_jax", "chat", "--prompt-tokens", "1")
    assert (done.returncode, done.stdout) == (1, "")
    assert "--prompt-tokens takes the place of text" in done.stderr  # only with --chat, which `chat` stands for


@pytest.mark.parametrize("name", COMMANDS)
def test_help_does_not_import_jax(name):
    done = run_python("-X", "importtime", "-m", "llama_jax", name, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: python -m {COMMANDS[name][0]} ")
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"jax", "flax", "torch", "transformers", "matplotlib.pyplot"}


def test_help_of_convert_names_every_format():
    assert f"--to {{{','.join(FORMATS)}}}" in run_python("-m", "llama_jax.convert", "--help").stdout


def test_jax_is_imported_when_a_name_needs_it():
    code = "import llama_jax, sys; print('jax' in sys.modules); llama_jax.Llama; print('jax' in sys.modules)"
    assert run_python("-c", code).stdout.split() == ["False", "True"]


def test_every_name_that_the_package_lists_is_there():
    assert set(llama_jax.__all__) <= set(dir(llama_jax))
    assert all(hasattr(llama_jax, name) for name in llama_jax.__all__)
    assert not hasattr(llama_jax, "lod")


def test_a_type_checker_sees_the_names_that_the_package_imports_later():
    (block,) = [node for node in ast.parse(Path(llama_jax.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == {name: f"llama_jax.{module}" for name, module in llama_jax._MODULES.items()}
    assert sorted(seen) == sorted(llama_jax.__all__)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_config_is_found_by_its_name_from_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = read_config(path.stem)
    assert config.name == path.stem
    assert config == read_config(path.name) == read_config(str(path))
    for stage in config.stage:
        assert config.stage_model(stage).max_seq_len >= config.stage[stage].phases[-1].seq_len


def test_the_8b_config_is_the_recipe_of_the_report():
    config = read_config("llama3.1-8b")
    first, second = config.stage["1"], config.stage["2"]
    assert config.stage_model("1").num_params() == 8_030_261_248
    assert [phase.seq_len for phase in first.phases] == [4096, 8192, 8192]
    assert (first.rope_factor, second.rope_factor, config.model.rope.original_max_seq_len) == (1.0, 8.0, 8192)
    assert [phase.seq_len // 1024 for phase in second.phases] == [16, 32, 48, 64, 96, 128]
    assert sum(phase.tokens for phase in second.phases) == pytest.approx(800e9, rel=0.01)
    assert config.stage_model("2") == llama_jax.PRESETS["llama3.1-8b"]
    assert (first.learning_rate, first.warmup_steps) == (3e-4, 8000)
