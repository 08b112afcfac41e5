"""What a run says of its plan: measured beside planned, once, and a warning beyond a quarter."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from llama_jax.mesh import use_mesh
from llama_jax.plan import Expectation, expectation
from llama_jax.slices import Slice, attached_slice
from tests.test_train import run, workdir  # noqa: F401
from train.watching import expected
from train.watching.expected import NUM_STEPS, Expected

GIB = 2**30


def comparison(monkeypatch, planned: Expectation, *peaks: int | None) -> Expected:
    """A plan on one device whose runtime counts these bytes: before the program and after it."""
    counts = iter(peaks)
    device = SimpleNamespace(process_index=0, memory_stats=lambda: {"peak_bytes_in_use": next(counts)})
    mesh = SimpleNamespace(devices=SimpleNamespace(flat=[device]))
    monkeypatch.setattr(expected, "get_mesh", lambda: mesh)
    monkeypatch.setattr(expected, "expectation", lambda compiled, model_flops: planned)
    return Expected(None, model_flops=1.0, first_step=100)  # type: ignore[arg-type]


def test_a_step_as_planned_is_one_line_that_comes_once(monkeypatch):
    held = comparison(monkeypatch, Expectation(8 * GIB, 2.0), GIB, 9 * GIB)
    assert list(held.compare(100 + NUM_STEPS - 1, 2.2)) == []
    (line,) = held.compare(100 + NUM_STEPS, 2.2)
    assert line == "a step 2.2 s (2 s planned, +10%); memory a device 9.00 GiB (8.00 GiB planned, +12%)"
    assert list(held.compare(200, 9.0)) == []


def test_more_than_a_quarter_off_is_a_warning_for_each(monkeypatch):
    held = comparison(monkeypatch, Expectation(8 * GIB, 2.0), GIB, 11 * GIB)
    line, *warnings = held.compare(200, 1.0)
    assert "-50%" in line
    assert [warning.split(" is ")[0] for warning in warnings] == ["warning: a step", "warning: memory a device"]
    assert "+38% off its plan" in warnings[1]


def test_memory_that_another_program_needed_is_not_held_against_this_one(monkeypatch):
    held = comparison(monkeypatch, Expectation(8 * GIB, 2.0), 20 * GIB, 20 * GIB)
    assert list(held.compare(200, 2.0)) == ["a step 2 s (2 s planned, +0%)"]


def test_on_cpus_memory_alone_is_planned_and_where_it_is_not_counted_nothing_is_said():
    with use_mesh("fsdp=1", jax.devices()[:1]):
        compiled = jax.jit(lambda x: x @ x.T).lower(jnp.ones((64, 32))).compile()
        planned = expectation(compiled, model_flops=1.0)
        held = Expected(compiled, model_flops=1.0, first_step=0)
    assert planned.seconds is None
    assert planned.peak_bytes >= 4 * (64 * 32 + 64 * 64)
    assert list(held.compare(NUM_STEPS, 1.0)) == []


def test_a_run_tells_it_while_it_trains(workdir, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(expected, "NUM_STEPS", 4)
    monkeypatch.setattr(expected, "expectation", lambda compiled, model_flops: Expectation(1, 1e6))
    run("1")
    said = capsys.readouterr().err
    assert said.count("(1e+06 s planned, -100%)") == 1
    assert "warning: a step is -100% off its plan" in said


@pytest.mark.parametrize(
    ("kind", "coords", "slice_index", "found"),
    [
        ("TPU v4", [(x, y, 0) for x in range(2) for y in range(2)], 0, Slice("v4", (2, 2, 1))),
        ("TPU v5 lite", [(x, y, 0) for x in range(4) for y in range(2)], 0, Slice("v5e", (4, 2))),
        ("NVIDIA H200", [None] * 8, 0, Slice("h200", (8,))),
        ("NVIDIA A100-SXM4-40GB", [None] * 2, 0, Slice("a100-40", (2,))),
        ("cpu", [None] * 3, 0, Slice("cpu", (3,))),
        ("something new", [None], 0, Slice("cpu", (1,))),
    ],
)
def test_devices_that_are_here_are_known_as_a_slice(kind, coords, slice_index, found):
    devices = [SimpleNamespace(device_kind=kind, coords=place, slice_index=slice_index) for place in coords]
    assert attached_slice(devices) == found


def test_devices_of_several_slices_are_several():
    devices = [SimpleNamespace(device_kind="TPU v5p", coords=(x, 0, 0), slice_index=i) for i in (0, 1) for x in (0, 1)]
    assert attached_slice(devices) == Slice("v5p", (2, 1, 1), 2)
