"""The gate of a run: shut, it trains on and at last stops; open, the run goes on, whenever it was ended."""

import json
from pathlib import Path

import pytest

from tests.test_train import assert_same_weights, run, weights
from tests.test_train import workdir as workdir
from train.checkpoints import saved_steps
from train.watching.metrics import read_metrics

# 2 steps at the short context, 2 at the long one, and 2 more each time that its gate stays shut.
SHORT = ("--set", "stage.1.phases=[{seq_len=16, tokens=256}]", "--set", "run.trackers=[]")
LONG = (
    "--set",
    "stage.2.phases=[{seq_len=256, tokens=512, min_document_tokens=256}]",
    *("--set", "run.trackers=[]"),
    *("--set", "run.log_every=1"),
    *("--set", "run.save_every=1"),
    *("--set", "run.keep_checkpoints=9"),
)


def gate(needles: float) -> tuple[str, str]:
    values = f"needles={needles}, short_tolerance=100.0, num_keys=1, num_depths=2, retry_tokens=512, max_retries=2"
    return "--set", f"stage.2.gate={{{values}}}"


def gates() -> list[dict]:
    return json.loads(Path("runs/tiny/gates.json").read_text())


def steps() -> list[int]:
    return [line["step"] for line in read_metrics(Path("runs/tiny")) if "loss" in line]


def test_a_gate_that_stays_shut_trains_on_then_stops_and_a_lower_mark_lets_the_run_go_on(workdir):
    run("1", *SHORT)
    with pytest.raises(ValueError, match="has not learned 256 tokens of context after 2 more tries: 0% of the needles"):
        run("2", *LONG, *gate(1.0))
    assert [(found["step"], found["passed"]) for found in gates()] == [(4, False), (6, False), (8, False)]
    assert {cell["length"] for cell in gates()[-1]["needles"]} == {128, 256}
    assert steps() == [2, 3, 4, 5, 6, 7, 8]
    assert Path("runs/tiny/gates.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(ValueError, match="after 2 more tries"):
        run("2", *LONG, *gate(1.0))  # asked again, and nothing trained
    assert steps()[-1] == 8

    run("2", *LONG, *gate(0.0))
    assert gates()[-1]["passed"] and saved_steps(Path("runs/tiny"))[-1] == 8
    run("2", *LONG, *gate(0.0))  # is done


def test_a_run_that_ends_between_two_tries_of_a_gate_goes_on_to_the_same_weights(workdir):
    run("1", *SHORT)
    with pytest.raises(ValueError, match="after 2 more tries"):
        run("2", *LONG, *gate(1.0))
    whole = weights("runs/tiny", 8)
    for step in (7, 8):  # as if it had been killed in the second of them
        Path(f"runs/tiny/checkpoints/{step}/model.json").unlink()
    with pytest.raises(ValueError, match="after 2 more tries"):
        run("2", *LONG, *gate(1.0))
    assert steps() == [2, 3, 4, 5, 6, 7, 8]
    assert_same_weights(whole, weights("runs/tiny", 8))
