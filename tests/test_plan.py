"""Plans against runs on CPU devices, what their numbers follow from, and the commands that print them."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax.plan
import llama_jax.slices
import train.plan
from infer.generate import main as generate
from infer.serve import main as serve
from llama_jax.chips import CHIPS
from llama_jax.mesh import use_mesh
from llama_jax.plan import _refused, collective_seconds, plan, rows
from llama_jax.program import Collective, read_program
from llama_jax.slices import parse_slice
from tests.test_train import workdir  # noqa: F401
from tests.tiny import TINY
from train.checkpoints import initial_state
from train.config import DataConfig, PhaseConfig, RunConfig, StageConfig, TrainConfig
from train.data.packing import Batch
from train.device import put_batch
from train.loop import jit_step
from train.optimizer import make_optimizer

CPU8 = parse_slice("cpu:8")

CONFIG = TrainConfig(
    name="tiny",
    model=dataclasses.replace(TINY, num_layers=2),
    data=DataConfig("data/tiny"),
    stage={"1": StageConfig((PhaseConfig(16, 6400),), 256, 1e-3, 1e-4)},
    run=RunConfig(mesh="fsdp=4,tensor=2", compute_dtype="float32"),
)


@pytest.fixture(scope="module")
def planned():
    """The plan of the tiny stage on 8 CPU devices, with its report; its program is kept, however quick to compile."""
    least = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    (found,) = train.plan.plan_stage(CONFIG, "1", CPU8)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    return found


def test_a_planned_step_is_the_program_that_the_run_takes_from_the_cache(planned):
    found, _ = planned
    settings = CONFIG.stage["1"]
    optimizer = make_optimizer(CONFIG.optimizer, settings)
    with use_mesh(CONFIG.run.mesh):
        state = initial_state(CONFIG.stage_model("1"), optimizer, 0)
        ids = np.ones((16, 16), np.int32)
        batch = put_batch(Batch(ids, ids, ids, ids, ids.astype(np.float32)), state.params.rules)
        phase = settings.phases[0]
        step = jit_step(CONFIG, "1", phase=phase, optimizer=optimizer, rules=state.params.rules)
        lowered = step.lower(state, batch)
        events: list[str] = []
        jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
        stats = lowered.compile().memory_analysis()
        abstract = train.plan.abstract_state(CONFIG, "1", optimizer)
        same, _ = train.plan.lower_phase(CONFIG, "1", phase, optimizer=optimizer, state=abstract)
    assert same.as_text() == lowered.as_text()
    assert "/jax/compilation_cache/cache_hits" in events
    assert stats is not None
    assert found.hbm_arguments_bytes == stats.argument_size_in_bytes
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert found.hbm_temporaries_bytes == stats.temp_size_in_bytes + results


@pytest.mark.slow
def test_a_command_takes_the_program_that_its_plan_has_compiled_from_the_cache(workdir):  # noqa: F811
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "XDG_CACHE_HOME": str(workdir / "cache")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])

    def steps_in_cache(*options: str) -> set[str]:
        command = [sys.executable, "-m", "train.pretrain", "--config", "tiny.toml", "--stage", "1", *options]
        command += ["--set", "run.mesh=fsdp=4,tensor=2"]
        subprocess.run(command, capture_output=True, env=environment, cwd=workdir, check=True)
        return {file.name for file in (workdir / "cache").rglob("*step*-cache")}

    planned = steps_in_cache("--plan", "cpu:8")
    assert len(planned) == 1
    assert steps_in_cache("--run-dir", "runs/tiny") == planned


@pytest.mark.slow
def test_generation_takes_the_programs_that_its_plan_has_compiled_from_the_cache(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "XDG_CACHE_HOME": str(tmp_path)}

    def in_cache(*options: str) -> set[str]:
        command = [sys.executable, "-m", "infer.generate", "--prompt-tokens", ",".join(["1"] * 120)]
        command += ["--max-new-tokens", "8", "--max-seq-len", "128", "--mesh", "data=4,tensor=2", *options]
        subprocess.run(command, capture_output=True, env=environment, cwd=Path(__file__).parents[1], check=True)
        return {file.name for name in ("prefill", "decode") for file in tmp_path.rglob(f"*{name}*-cache")}

    planned = in_cache("--plan", "cpu:8")
    assert len(planned) == 2
    assert in_cache() == planned


def test_arguments_are_weights_twice_as_much_for_adam_with_its_counters_and_the_batch(planned):
    found, _ = planned
    counters = found.parts["optimizer"] - 2 * found.parts["weights"]
    assert 0 <= counters <= 4 * 4
    assert found.parts["batch"] == 5 * 4 * 256 // 4
    assert found.hbm_arguments_bytes == sum(found.parts.values())


def test_a_report_says_what_the_stage_stores_and_nothing_of_a_cpus_speed(planned):
    found, report = planned
    assert report["checkpoint_bytes"] == 3 * 4 * CONFIG.model.num_params()
    assert report["stage_tokens"] == 6400
    assert report["tokens_per_second"] is report["cost"] is report["estimated_step_seconds"] is None
    assert found.model_flops_per_chip == pytest.approx(CONFIG.model.train_flops_per_token(16) * 256 / 8)
    assert set(found.collectives) >= {"all-gather"}
    assert report["advice"] is None
    json.dumps(report)


# What a report must have, whatever is planned.
KEYS = """slice chips mesh remat fits hbm_capacity_bytes hbm_peak_bytes hbm_arguments_bytes hbm_temporaries_bytes
    host_bytes matmul_flops_per_chip model_flops_per_chip kernel_flops_per_chip collectives estimated_compute_seconds
    estimated_collective_seconds estimated_step_seconds estimated_mfu tokens_per_second tokens_per_dollar stage_tokens
    stage_days device_hours cost checkpoint_bytes checkpoint_seconds host_ram_to_load_bytes disk_bytes
    compile_seconds""".split()


def test_a_report_has_every_key_and_says_where_the_numbers_are_from(planned):
    _, report = planned
    assert set(KEYS) <= set(report)
    assert set(report["sources"]) <= set(report)
    assert set(report["sources"].values()) >= {"exact", "compiled", "measured", "estimated", "assumed"}


def test_a_batch_that_the_mesh_cannot_split_is_refused_with_the_ways_out():
    small = dataclasses.replace(CONFIG, stage={"1": StageConfig((PhaseConfig(16, 6400),), 32, 1e-3, 1e-4)})
    with pytest.raises(ValueError, match="2 rows of 16 tokens cannot be split over"):
        list(train.plan.plan_stage(small, "1", CPU8))


def test_what_does_not_fit_is_said_with_what_takes_the_space_and_a_change_that_was_compiled(planned, monkeypatch):
    found, _ = planned
    capacity = found.hbm_peak_bytes - 1
    monkeypatch.setattr(llama_jax.plan, "capacity", lambda target: capacity)
    config = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, remat="none"))
    ((crowded, report),) = train.plan.plan_stage(config, "1", CPU8)
    assert not crowded.fits
    assert list(report["largest"]) == list(crowded.largest)
    assert report["advice"].startswith("--set run.remat=full --set run.loss_chunks=4 fits: ")


def test_the_largest_buffers_have_the_models_names(planned):
    found, _ = planned
    # 16 tokens of 4 rows a device; half of the vocabulary of 128, and half of the MLP's width of 160.
    assert found.largest["logits of a chunk of the loss (f32)"] == 4 * 64 * 64
    assert found.largest["gradient of gate or up of a layer (f32)"] == 4 * 64 * 80
    sizes = list(found.largest.values())
    assert sizes == sorted(sizes, reverse=True)


def test_the_programs_text_is_written_where_it_is_asked_for(tmp_path):
    path = tmp_path / "step.hlo"
    ((found, _),) = train.plan.plan_stage(CONFIG, "1", CPU8, hlo=path)
    assert read_program(path.read_text()).matmul_flops == found.matmul_flops_per_chip


def test_a_directory_that_is_not_there_is_told_before_anything_is_compiled(tmp_path, capsys):
    hlo = tmp_path / "absent" / "step.hlo"
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        train.plan.print_plan(CONFIG, "1", "cpu:8", as_json=True, hlo=hlo)
    assert "compiling" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "peak"),
    [
        ("the total memory required for HLO temporaries (2.50G) exceeds available HBM (1.75G).", 2.5 * 2**30),
        ("Ran out of memory in memory space hbm. Used 47.50G of 30.75G hbm.", 47.5 * 2**30),
    ],
)
def test_a_compilers_refusal_says_how_much_is_needed(message, peak):
    assert _refused(message, 100).peak == peak


def test_a_refusal_that_says_nothing_is_passed_on():
    with pytest.raises(ValueError, match="refuses the program: no"):
        _refused("no", 0)


def places(*coords):
    return [SimpleNamespace(coords=place) for place in coords]


@pytest.mark.parametrize(
    ("slice_name", "members", "links"),
    [
        ("v4:4x4x4", places(*((x, 0, 0) for x in range(4))), 2),
        ("v4:4x4x4", places(*((x, y, z) for x in range(4) for y in range(4) for z in range(4))), 6),
        ("v4:4x4x4", places((0, 0, 0), (1, 0, 0)), 1),
        ("v5e:4x4", places(*((x, 0, 0) for x in range(4))), 1),
    ],
)
def test_a_collective_uses_the_links_along_which_its_members_lie(slice_name, members, links):
    target, size = parse_slice(slice_name), 1e9
    share = (len(members) - 1) / len(members)
    seconds = collective_seconds(Collective("all-gather", (), False), size, members, target)
    assert seconds == pytest.approx(size * share / (links * target.chip.link_bandwidth))
    doubled = collective_seconds(Collective("all-reduce", (), False), size, members, target)
    assert doubled == pytest.approx(2 * seconds)


def test_a_plan_counts_the_programs_own_work():
    with use_mesh("fsdp=1", jax.devices()[:1]):
        x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
        found = plan(jax.jit(lambda x: x @ x.T).lower(x), parse_slice("cpu:1"), parts={"x": 8192})
    assert found.matmul_flops_per_chip == 2 * 64 * 32 * 64
    assert found.hbm_arguments_bytes == 8192
    assert found.hbm_peak_bytes >= 8192 + 4 * 64 * 64
    assert found.fits


def test_a_gpu_is_planned_on_cpu_devices_and_says_so(planned):
    found, report = next(train.plan.plan_stage(CONFIG, "1", parse_slice("2xh100:4")))
    assert found.hbm_arguments_bytes == planned[0].hbm_arguments_bytes
    assert (found.compiler, found.hbm_capacity_bytes) == ("cpu", CHIPS["h100"].hbm_bytes)
    assert {source for _, source, _ in rows(found)} == {"compiled for CPU", "exact", "assumed", "estimated"}
    moved = [networks["network"] for networks in found.collectives.values()]
    assert max(moved) > 0
    assert report["cost"] > 0


@pytest.mark.parametrize(
    ("members", "seconds"),
    [
        (range(4), 3 / 4 / 4.5e11),
        (range(8), 1 / 2 / (4 * 5.0e10)),
        ((0, 4), 1 / 2 / 5.0e10),
    ],
)
def test_gpus_exchange_over_nvlink_in_a_node_and_over_all_their_networks_between(members, seconds):
    target = parse_slice("2xh100:4")
    devices = [SimpleNamespace(id=number) for number in members]
    assert collective_seconds(Collective("all-gather", (), True), 1.0, devices, target) == pytest.approx(seconds)


def test_slices_of_tpus_exchange_each_devices_own_array_over_the_data_centers_network():
    target = parse_slice("2xv5p:4x4x4")
    devices = [SimpleNamespace(coords=(0, 0, 0))] * 2
    seconds = collective_seconds(Collective("all-reduce", (), True, across=True), 1e9, devices, target)
    assert seconds == pytest.approx(2 * 1e9 / 2 / 6.25e9)


@pytest.mark.parametrize("entry", [generate, serve])
def test_without_libtpu_the_command_that_installs_it_is_named(entry, monkeypatch):
    monkeypatch.setattr(llama_jax.slices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps 'libtpu==[\d.*]+'"):
        entry(["--checkpoint", "llama3.1-8b", "--plan", "v4:2x2x1"])


needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu, the TPU's compiler, is not installed")


def planned_by_command(slice_name: str, mesh: str, *options: str) -> tuple[dict, str]:
    """The report of a small model's stage on a slice of TPUs, from a process of its own, and what it says on stderr."""
    sets = ["model.num_layers=2", "model.embed_dim=256", "model.mlp_dim=512", "model.num_heads=2"]
    sets += ["model.num_kv_heads=1", "model.head_dim=128", f"run.mesh={mesh}", "run.compute_dtype=bfloat16", *options]
    command = [sys.executable, "-m", "train.pretrain", "--stage", "1", "--plan", slice_name, "--json"]
    command += [part for setting in sets for part in ("--set", setting)]
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    (report,) = map(json.loads, done.stdout.splitlines())
    return report, done.stderr


@needs_libtpu
def test_a_tpu_that_is_not_there_is_planned_quietly():
    report, said = planned_by_command("v4:2x2x1", "fsdp=-1")
    assert said.count("\n") == 1  # what is compiled
    assert report["fits"]
    assert report["hbm_capacity_bytes"] == CHIPS["v4"].hbm_bytes
    assert 0 < report["estimated_mfu"] < 1
    assert report["matmul_flops_per_chip"] + report["kernel_flops_per_chip"] > report["model_flops_per_chip"]


@needs_libtpu
def test_gradients_alone_cross_from_slice_to_slice():
    report, _ = planned_by_command("2xv4:2x2x1", "data=2,fsdp=-1", "run.loss_chunks=1")
    assert (report["chips"], report["mesh"]) == (8, "data=2,fsdp=4")
    (crossing,) = [networks["dcn"] for networks in report["collectives"].values() if networks["dcn"]]
    # Each chip's share of the gradients, in bfloat16 or float32, and a few scalars.
    assert report["parts"]["weights"] / 2 <= crossing <= 1.01 * report["parts"]["weights"]


@needs_libtpu
def test_a_compilers_refusal_names_what_takes_the_space_and_a_change_that_it_takes():
    report, _ = planned_by_command(
        "v5e:2x2",
        "fsdp=-1",
        "model.num_layers=1",
        "model.vocab_size=128256",
        "stage.1.batch_tokens=131072",
        "run.remat=none",
    )
    assert not report["fits"]
    assert report["hbm_peak_bytes"] > CHIPS["v5e"].hbm_bytes
    assert "logits" in next(iter(report["largest"]))
    assert " fits: " in report["advice"]
