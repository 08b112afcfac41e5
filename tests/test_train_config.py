"""Shipped runs hold the report's numbers and fit their meshes; settings that cannot be are named."""

import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from llama_jax.config import PRESETS
from llama_jax.mesh import parse_mesh, prime_factors, sharding_rules
from tests.test_train import CONFIG
from train.config import CONFIGS, PhaseConfig, StageConfig, read_config
from train.optimizer import num_micro_batches

FROM_NOTHING = ("llama3.1-8b", "llama3.1-70b", "llama3.1-405b")
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.toml"))


def abstract_mesh(spec: str, num_devices: int) -> AbstractMesh:
    """The mesh of make_mesh over devices that are not there."""
    sizes = parse_mesh(spec, num_devices)
    factors = prime_factors(sizes.pop("tensor"))
    names = (*sizes, *(f"tensor{i}" for i in range(len(factors))))
    return AbstractMesh((*sizes.values(), *factors), names, axis_types=(AxisType.Explicit,) * len(names))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_is_read(name):
    config = read_config(name)
    assert (config.name, "1" in config.stage) == (name, True)
    assert list(config.stage) == ["1", "2", "anneal"]


@pytest.mark.parametrize("name", FROM_NOTHING)
@pytest.mark.parametrize("num_devices", [8, 128, 2048])
def test_shipped_batches_fit_8_and_2048_devices_row_by_row(name, num_devices):
    config = read_config(name)
    for stage, settings in config.stage.items():
        spec = config.stage_mesh(stage)
        if num_devices == 8 and "fsdp=16" in spec:
            continue  # 405B's long rows ask for 128 devices, as the file says
        context = parse_mesh(spec, num_devices)["context"]
        with use_abstract_mesh(abstract_mesh(spec, num_devices)):
            rules = sharding_rules(config.stage_model(stage))
            for phase in settings.phases:
                rows, limit = settings.phase_rows(phase), config.run.micro_batch_tokens
                parts = num_micro_batches(rows, phase.seq_len, limit, rules)
                rows_a_device, remainder = divmod(rows, parts * rules.batch_multiple)
                assert remainder == 0 and phase.seq_len % (2 * context) == 0
                assert rows_a_device * phase.seq_len // context <= limit or rows_a_device == 1


@pytest.mark.parametrize("name", FROM_NOTHING)
def test_the_stages_are_the_reports(name):
    config = read_config(name)
    first, second, anneal = config.stage.values()
    peak = {"llama3.1-8b": 3e-4, "llama3.1-70b": 1.5e-4, "llama3.1-405b": 8e-5}[name]
    assert config.model == config.stage_model("2") == config.stage_model("anneal") == PRESETS[name]
    assert (first.learning_rate, first.warmup_steps) == (peak, 8000)
    assert first.final_learning_rate == pytest.approx(peak / 100)
    assert [phase.batch_tokens >> 20 for phase in first.phases] == [4, 8, 16]
    assert [phase.seq_len for phase in first.phases] == [4096, 8192, 8192]
    assert [phase.tokens for phase in first.phases][0] == 252e6
    assert sum(phase.tokens for phase in first.phases[:2]) == 2.87e12
    assert sum(phase.tokens for phase in second.phases) == pytest.approx(800e9, rel=0.01)
    assert (len(second.phases), second.phases[-1].seq_len, anneal.phases[0].seq_len) == (6, 131_072, 131_072)
    assert (anneal.schedule, anneal.final_learning_rate) == ("linear", 0.0)
    total = sum(phase.tokens for stage in config.stage.values() for phase in stage.phases)
    assert total == pytest.approx({"llama3.1-405b": 15.6e12}.get(name, 15e12), rel=1e-3)
    cfg = config.optimizer
    assert (cfg.name, cfg.b1, cfg.b2, cfg.eps, cfg.weight_decay, cfg.clip_norm) == ("adamw", 0.9, 0.95, 1e-8, 0.1, 1.0)


def test_405b_falls_along_a_cosine_of_1_200_000_steps():
    stage = read_config("llama3.1-405b").stage["1"]
    assert (stage.decay_steps, stage.final_learning_rate) == (1_200_000, 8e-7)
    assert sum(stage.phase_steps()) == pytest.approx(1.05e6, rel=0.01)


def test_the_continued_8b_fits_8_devices():
    config = read_config("llama3.1-8b-continue")
    found = {}
    for stage, settings in config.stage.items():
        (phase,) = settings.phases
        rows = settings.phase_rows(phase)
        with use_abstract_mesh(abstract_mesh(config.stage_mesh(stage), 8)):
            rules = sharding_rules(config.stage_model(stage))
            parts = num_micro_batches(rows, phase.seq_len, config.run.micro_batch_tokens, rules)
        found[stage] = (parts, rows * phase.seq_len // parts // 8)
        assert config.stage_model(stage).rope == PRESETS["llama3.1-8b"].rope
    assert found == {"1": (8, 8192), "2": (8, 16_384), "anneal": (8, 8192)}


def test_tokens_after_counts_down_over_phases():
    phases = (PhaseConfig(16, 256, batch_tokens=64), PhaseConfig(16, 256))
    stage = StageConfig(phases, 128, learning_rate=1.0, final_learning_rate=0.0)
    assert stage.phase_steps() == [4, 2]
    assert [stage.tokens_after(step) for step in range(7)] == [512, 448, 384, 320, 256, 128, 0]


def test_a_stage_takes_the_mesh_of_the_run_unless_it_has_its_own(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    config = read_config(str(path), {"stage.2.mesh": "fsdp=2"})
    assert (config.stage_mesh("1"), config.stage_mesh("2")) == ("data=1", "fsdp=2")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.name", "adam", "optimizer: name='adam' is not one of adamw, muon"),
        ("optimizer.moment_dtype", "float16", "moment_dtype='float16' is not one of float32, bfloat16"),
        ("optimizer.on_spike", "stop", "on_spike='stop' is not one of skip, rollback"),
        ("optimizer.z_los", 1e-4, "unknown key optimizer.z_los"),
        ("optimizer.max_skipped", 2.5, "optimizer.max_skipped=2.5 must be of type int"),
        ("stage.1.schedule", "wsd", "stage.1: schedule='wsd' is not one of cosine, linear"),
        ("stage.1.learning_rate", 0.0, "stage.1: learning_rate=0.0 must be positive"),
        ("stage.1.final_learning_rate", 1.0, "final_learning_rate=1.0 between 0 and it"),
        ("stage.1.warmup_steps", -1, "warmup_steps=-1"),
        ("stage.1.phases", [], "stage.1: phases is empty"),
        ("stage.1.phases", [{"seq_len": 16, "tokens": 64, "batch_tokens": 40}], "batch_tokens=40 is not a multiple"),
        ("stage.1.phases", [{"seq_len": 16, "tokens": 8}], r"stage.1.phases\[0\]: a phase of 8 tokens"),
        ("stage.1.mash", "fsdp=2", "unknown key stage.1.mash"),
        ("run.micro_batch_tokens", -1, "run: micro_batch_tokens=-1 must be at least 0"),
        ("run.keep_checkpoints", 0, "run: keep_checkpoints=0 must be at least 1"),
        ("run.keep_checkpoints", -1, "run: keep_checkpoints=-1 must be at least 1"),
        ("run.save_every", 0, "run: save_every=0 must be at least 1"),
        ("run.eval_every", 0, "run: eval_every=0 must be at least 1"),
        ("run.eval_rows", 0, "run: eval_rows=0 must be at least 1"),
        ("run.log_every", 0, "run: log_every=0 must be at least 1"),
        ("run.loss_chunks", 0, "run: loss_chunks=0 must be at least 1"),
        ("run.compiler_options", {"v4-8": {}}, "run: compiler_options='v4-8' is not one of tpu, gpu, v4, "),
        ("run.compiler_options.tpu", {"xla_a": True}, "run.compiler_options.tpu.xla_a=True must be of type str"),
        ("model", 3, "model must be a table"),
        ("model.rope", 3, "model.rope must be a table"),
        ("model", {"preset": "llama3.1-8b", "rope": 3}, "model.rope must be a table"),
        ("model.preset", ["llama3.1-8b"], r"unknown model.preset \['llama3.1-8b'\]"),
        ("stage", 3, "stage must be a table"),
        ("run.compute_dtype", "float16", "run: compute_dtype='float16' is not one of bfloat16, float32"),
        ("run.quantize", "int3", "run: unknown quantization 'int3'; expected one of int8, "),
        ("run.quantize", "fp8", "run: quantize='fp8' treats layers unlike, .* use int8-a8"),
        ("model.num_heads", 3, "model: num_heads=3 is not a multiple"),
    ],
)
def test_a_setting_that_cannot_be_is_named(tmp_path, key, value, message):
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    with pytest.raises(ValueError, match=message):
        read_config(str(path), {key: value})
