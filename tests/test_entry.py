"""What commands share: the one line of an error, who prints, the stopwatch of a start."""

import sys
from types import SimpleNamespace

import jax
import pytest

from infer.engine import Throughput
from infer.entry import Startup, describe_sampling
from infer.sampling import SamplingParams
from llama_jax.entry import run_entry, say


def outcome(error: BaseException | None, capsys) -> tuple[int, str]:
    """Exit status and stderr of a command that raises this."""

    def main() -> None:
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as exit:
        run_entry(main)
    assert isinstance(exit.value.code, int)
    return exit.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, (0, "")),
        (ValueError("too\n  large"), (1, "error: too large\n")),
        (FileNotFoundError("no file"), (1, "error: no file\n")),
        (KeyboardInterrupt(), (130, "interrupted\n")),
    ],
)
def test_an_error_is_one_line_and_a_status(capsys, error, expected):
    assert outcome(error, capsys) == expected


def test_a_device_without_memory_is_one_line_that_says_what_to_do(capsys):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nallocations:\n1\n2")
    expected = "error: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes. Use a smaller model, batch or context"
    assert outcome(error, capsys) == (1, f"{expected}, or more devices.\n")


def test_any_other_error_of_the_runtime_is_our_mistake_and_is_raised():
    with pytest.raises(RuntimeError, match="INTERNAL"):
        run_entry(lambda: (_ for _ in ()).throw(RuntimeError("INTERNAL: bug")))


def test_the_traceback_is_shown_when_asked_for(monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="too large"):
        run_entry(lambda: (_ for _ in ()).throw(ValueError("too large")))


@pytest.mark.parametrize(("process", "expected"), [(0, "hello\n"), (1, "")])
def test_of_connected_processes_the_first_prints(monkeypatch, capsys, process, expected):
    distributed = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(distributed=distributed, process_index=lambda: process))
    say("hello")
    assert capsys.readouterr() == ("", expected)


def test_a_start_is_told_step_by_step_and_in_sum(monkeypatch):
    times = iter([100.0, 101.5, 101.75, 104.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    startup = Startup()
    for step in ("import", "open", "load"):
        startup.lap(step)
    line = startup.line(Throughput(first_token_seconds=2.0, first_compile_seconds=1.5, began=0.0))
    assert line == "first token after 6.0 s: import 1.5, open 0.2, load 2.2, compile 1.5, prefill 0.5"


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(), "greedy"),
        (SamplingParams(top_p=0.9), "greedy"),
        (SamplingParams(temperature=0.6, top_p=0.9), "temperature=0.6 top_p=0.9"),
        (SamplingParams(temperature=1.0, top_k=5, min_p=0.1), "temperature=1.0 top_k=5 min_p=0.1"),
    ],
)
def test_sampling_is_described_by_what_differs_from_none(params, expected):
    assert describe_sampling(params) == expected
