"""What a run needs and what is left: against real arrays, hand-computed bytes, and fake hosts and devices.

The hosts are files under tmp_path, the devices are stand-ins that say what a runtime would say.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

import llama_jax
from infer import entry
from infer.hosts import Hosts
from llama_jax import memory
from llama_jax.cache import init_cache
from llama_jax.config import PRESETS
from llama_jax.model import Llama
from tests.tiny import TINY, VARIANTS
from train import pretrain

ROOT = Path(__file__).parents[1]
GIB = 1 << 30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1):
    """A mesh of devices that are not here; tensor a power of two."""
    names = tuple(f"tensor{i}" for i in range(tensor.bit_length() - 1))
    axes = ("data", "fsdp", "context", *names)
    return AbstractMesh((data, fsdp, 1, *(2,) * len(names)), axes, axis_types=(AxisType.Explicit,) * len(axes))


def real_bytes(tree, device) -> int:
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.fixture
def limit(monkeypatch) -> Callable[[int | None], None]:
    """Say how many bytes are left on a device."""
    return lambda size: monkeypatch.setattr(memory, "bytes_left", lambda _: size)


# What is needed.


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2", "context=2,fsdp=4"])
def test_bytes_of_weights_and_cache_are_those_of_the_arrays(variant, mesh):
    cfg = VARIANTS[variant]
    with llama_jax.use_mesh(mesh) as devices:
        model = jax.jit(lambda: Llama(cfg, rngs=nnx.Rngs(0), layout="stacked"))()
        cache = init_cache(cfg, model.rules, 4, 64, dtype=jnp.bfloat16)
        weights = memory.weight_bytes(cfg, "float32")
        needs = memory.generation_bytes(cfg, "bfloat16", num_rows=4, prompt_tokens=1, num_tokens=64)
    device = devices.devices.flat[0]
    assert weights == real_bytes(model, device)
    assert needs["cache"] == real_bytes(cache, device)


@pytest.mark.parametrize(
    ("preset", "tensor", "gigabytes"),
    [("llama3.1-8b", 1, 16.1), ("llama3.1-70b", 8, 17.6), ("llama3.1-405b", 16, 51.3)],
)
def test_published_models_need_two_bytes_a_parameter_over_tensor(preset, tensor, gigabytes):
    with jax.sharding.use_abstract_mesh(mesh_of(tensor=tensor)):
        assert memory.weight_bytes(PRESETS[preset], "bfloat16") / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_a_cache_of_8b_is_128_kib_a_token():
    with jax.sharding.use_abstract_mesh(mesh_of(data=2, tensor=4)):
        needs = memory.generation_bytes(
            PRESETS["llama3.1-8b"], "bfloat16", num_rows=1, prompt_tokens=1, num_tokens=8192
        )
    assert needs["cache"] == 8192 * 128 * 1024 // 4


@pytest.mark.parametrize("length", [512, 2048, 8192])
def test_the_allowance_covers_a_compiled_prefill_and_is_less_than_twice_as_much(length):
    cfg = dataclasses.replace(PRESETS["llama3.2-1b"], num_layers=2)

    def prefill(model: Llama, tokens):
        caches = init_cache(cfg, model.rules, 1, length, dtype=jnp.float32)
        hidden, caches = model.extend(tokens, tokens, caches)
        return model.unembed(hidden[:, -1:]), caches

    with llama_jax.use_mesh("data=1"):
        needs = memory.generation_bytes(cfg, "float32", num_rows=1, prompt_tokens=length, num_tokens=length)
        model = jax.eval_shape(lambda: Llama(cfg, rngs=nnx.Rngs(0), layout="layers"))
        stats = jax.jit(prefill).lower(model, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile().memory_analysis()
    assert stats.temp_size_in_bytes <= needs["temporaries"] <= 2 * stats.temp_size_in_bytes


@pytest.mark.parametrize(("moment_dtype", "bytes_a_parameter"), [("float32", 16), ("bfloat16", 12)])
def test_training_needs_weights_gradients_and_moments_split_over_fsdp(moment_dtype, bytes_a_parameter):
    cfg = PRESETS["llama3.1-8b"]
    with jax.sharding.use_abstract_mesh(mesh_of(fsdp=64)):
        needs = memory.training_bytes(
            cfg, "bfloat16", num_rows=64, seq_len=8192, loss_chunks=8, moment_dtype=moment_dtype
        )
    state = needs["weights"] + needs["gradients"] + needs["optimizer"]
    assert state / (bytes_a_parameter * cfg.num_params() / 64) == pytest.approx(
        1, abs=0.01
    )  # norms are on every device
    assert needs["activations"] == 32 * 8192 * 4096 * 2 + 8192 * 128_256 * 4 // 8


# What is left.


def host(root: Path, available: int, cgroup: str = "") -> None:
    write(root / "proc/meminfo", f"MemTotal: 999999999 kB\nMemAvailable: {available >> 10} kB\nSwapFree: 5 kB\n")
    write(root / "proc/self/cgroup", cgroup)


def group(folder: Path, limit: str, usage: int, stat: str, names=("memory.max", "memory.current")) -> None:
    write(folder / names[0], f"{limit}\n")
    write(folder / names[1], f"{usage}\n")
    write(folder / "memory.stat", stat)


VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_a_host_has_what_the_kernel_says_is_available(tmp_path):
    host(tmp_path, 5 * GIB)
    assert memory.host_bytes_left(tmp_path) == 5 * GIB
    assert memory.host_bytes_left(tmp_path / "nothing") is None


def test_the_tightest_control_group_bounds_it_and_its_file_cache_is_free(tmp_path):
    host(tmp_path, 50 * GIB, "0::/jobs/mine\n")
    group(tmp_path / "sys/fs/cgroup/jobs/mine", "max", 3 * GIB, "")
    stat = f"anon 5\nactive_file {GIB}\ninactive_file {GIB}\n"
    group(tmp_path / "sys/fs/cgroup/jobs", str(8 * GIB), 5 * GIB, stat)
    assert memory.host_bytes_left(tmp_path) == 5 * GIB


def test_a_container_of_version_1_sees_its_group_at_the_top(tmp_path):
    host(tmp_path, 50 * GIB, "5:devices:/\n4:cpu,memory:/docker/0123\n")
    stat = f"active_file 1\ntotal_active_file 0\ntotal_inactive_file {GIB}\n"
    group(tmp_path / "sys/fs/cgroup/memory", str(8 * GIB), 5 * GIB, stat, VERSION_1)
    assert memory.host_bytes_left(tmp_path) == 4 * GIB


def test_on_macos_all_that_is_built_in_is_there(monkeypatch):
    asked = []
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    monkeypatch.setattr(
        memory.subprocess, "run", lambda command, **_: asked.append(command) or SimpleNamespace(stdout=b"17179869184\n")
    )
    assert memory.host_bytes_left() == 16 * GIB
    assert asked == [["sysctl", "-n", "hw.memsize"]]


def device(platform: str, kind: str, stats: dict | None = None):
    return SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: stats, process_index=0)


def test_devices_on_a_cpu_share_the_host(monkeypatch):
    monkeypatch.setattr(memory, "host_bytes_left", lambda: 8 * GIB)
    assert memory.bytes_left(jax.devices()[:4]) == 2 * GIB


def test_an_accelerator_says_what_it_has_left_and_the_fullest_counts():
    stats = [{"bytes_limit": 100, "bytes_in_use": used} for used in (10, 40)]
    assert memory.bytes_left([device("gpu", "NVIDIA H100", each) for each in stats]) == 60


def test_a_tpu_that_does_not_say_has_the_size_of_its_kind():
    assert memory.bytes_left([device("tpu", "TPU v4")]) == 32 * GIB
    assert memory.bytes_left([device("tpu", "TPU v99")]) is None


# What does not fit.


def test_what_fits_to_the_byte_passes_and_one_byte_less_is_refused_with_the_numbers(limit):
    needs = {"weights": 3_000_000_000, "cache": 1_000_000_000}
    limit(4_000_000_000)
    memory.check_fit("it", needs, jax.devices(), ways="less")
    limit(None)
    memory.check_fit("it", needs, jax.devices(), ways="less")
    limit(3_999_999_999)
    with pytest.raises(ValueError) as error:
        memory.check_fit("it", needs, jax.devices(), ways="less")
    expected = "it needs 4.0 GB on each of 8 x cpu (weights 3.0, cache 1.0), but 4.0 GB are left there; use less"
    assert str(error.value) == expected


def test_a_compiled_program_is_refused_for_its_temporaries_and_results(limit):
    step = jax.jit(lambda x: jnp.sort(x @ x)).lower(jnp.ones((512, 512))).compile()
    limit(1 << 30)
    memory.check_program("a step", step, jax.devices(), ways="less")
    limit(512 * 512 * 4 - 1)
    with pytest.raises(ValueError, match=r"a step needs .* \(temporaries .*, results 0.001\)"):
        memory.check_program("a step", step, jax.devices(), ways="less")


def test_the_host_must_hold_the_largest_part_of_a_weight(monkeypatch):
    with llama_jax.use_mesh("tensor=8"):
        part = PRESETS["llama3.1-8b"].vocab_size * 4096 * 2 // 8
        monkeypatch.setattr(memory, "host_bytes_left", lambda: part)
        memory.check_host(PRESETS["llama3.1-8b"], "bfloat16")
        monkeypatch.setattr(memory, "host_bytes_left", lambda: part - 1)
        with pytest.raises(ValueError, match="reading a weight needs 0.1 GB of host memory"):
            memory.check_host(PRESETS["llama3.1-8b"], "bfloat16")


def options(*argv: str):
    parser = argparse.ArgumentParser()
    entry.add_model_options(parser)
    entry.add_sampling_options(parser)
    return parser.parse_args(argv)


def test_a_model_that_does_not_fit_is_refused_before_a_weight_is_read(limit, monkeypatch, capsys):
    args = options("--mesh", "tensor=2")
    checkpoint = entry.open_model(args)
    monkeypatch.setattr(checkpoint.source, "read", lambda *_: pytest.fail("a weight was read"))
    limit(1_000_000)
    complaint = r"4.3M parameters needs .* 2 x cpu \(weights .*--dtype bfloat16, --quantize int8 or a shorter"
    with pytest.raises(ValueError, match=complaint):
        entry.load_model(args, checkpoint, Hosts())
    assert capsys.readouterr().err.startswith("2 x cpu, tensor=2, float32, 4.3M parameters from the demo")


def test_training_that_does_not_fit_is_refused_before_data_are_prepared(limit, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "_prepare_data", lambda *_: pytest.fail("data were prepared"))
    limit(1_000_000)
    with pytest.raises(ValueError, match=r"training 4.3M parameters at seq_len 256 needs .*optimizer .* use a smaller"):
        pretrain.main(["--stage", "1", "--run-dir", str(tmp_path / "run")])


@pytest.fixture
def tiny() -> Llama:
    with llama_jax.use_mesh("tensor=2"):
        return Llama(TINY, rngs=nnx.Rngs(0), layout="layers")


def test_a_conversation_is_as_long_as_the_memory_left_allows(limit, tiny):
    def needs(length: int) -> float:
        with llama_jax.use_mesh("tensor=2"):
            sizes = memory.generation_bytes(TINY, "float32", num_rows=1, prompt_tokens=length, num_tokens=length)
        return sum(sizes.values())

    for size, expected in ((None, 1024), (GIB, 1024), (needs(512) / 0.9 + 2, 512), (needs(512) / 0.9 - 2, 256)):
        limit(size)
        assert entry.conversation_length(options(), tiny) == expected
    limit(GIB)
    assert entry.conversation_length(options("--max-seq-len", "300"), tiny) == 300
    limit(100_000)
    with pytest.raises(ValueError, match="a conversation needs .* GB"):
        entry.conversation_length(options(), tiny)


def test_load_refuses_weights_that_do_not_fit_before_one_is_read(limit, monkeypatch):
    monkeypatch.setattr("llama_jax.checkpoint.read_model", lambda *_, **__: pytest.fail("a weight was read"))
    limit(1_000_000)
    with llama_jax.use_mesh("data=1"), pytest.raises(ValueError, match=r"the model needs 0.017 GB .*weights 0.017"):
        llama_jax.load(entry.DEMO)
