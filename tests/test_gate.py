"""The gate between context lengths: what is read, what keeps it shut, and how it is told."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import llama_jax
from llama_jax.model import Llama
from llama_jax.tokenizer import Tokenizer
from tests.prepared import write_prepared
from tests.processes import free_address, outputs, start_python
from tests.tiny import TINY
from train import gate
from train.config import GateConfig
from train.data.shards import open_sources
from train.evaluation import losses_by_source
from train.gate import Reading, verdict

SMALL = dataclasses.replace(TINY, num_layers=2)
GATE = GateConfig(short_tolerance=0.01, needles=0.9, num_keys=1, num_depths=2)
LENGTH = 256


def cells(length: int, *found: int) -> list[dict]:
    depths = np.linspace(0, 1, len(found)).tolist()
    return [{"length": length, "depth": d, "found": n, "asked": 10} for d, n in zip(depths, found, strict=True)]


BEFORE = Reading(3.0, [3.0, 3.0, 6.0, 6.0], cells(4, 0, 0))
AFTER = Reading(3.01, [3.1, 3.1, 5.9, 5.9], cells(2, 10, 10) + cells(4, 8, 10))


def test_a_length_is_learned_when_the_short_loss_is_back_needles_are_found_and_new_positions_are_easier():
    assert verdict(BEFORE, AFTER, GATE, 2, 4) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"short_loss": 3.0111}, "the short-context loss is 3.0111, 0.0111 above the 3.0000 that the stage began with"),
        ({"short_loss": math.nan}, "the short-context loss is nan"),
        ({"needles": cells(2, 10, 7)}, "85% of the needles at 2 tokens are found; 90% must be"),
        ({"needles": cells(2, 9, 9) + cells(4, 0, 10)}, "50% of the needles at 4 tokens are found; 90% must be"),
        ({"losses": [0.0, 0.0, 6.0, 6.0]}, "the loss at positions 2 to 3 is 6.0000, not below the 6.0000"),
        ({"losses": [0.0, 0.0, 6.0, math.nan]}, "the loss at positions 2 to 3 is nan"),
    ],
)
def test_each_condition_alone_keeps_the_gate_shut_and_says_why(change, reason):
    (said,) = verdict(BEFORE, dataclasses.replace(AFTER, **change), GATE, 2, 4)
    assert reason in said


def test_a_phase_at_the_length_before_has_no_new_positions():
    assert verdict(BEFORE, dataclasses.replace(AFTER, losses=BEFORE.losses), GATE, 4, 4) == []


def test_a_reading_comes_back_from_json_as_it_was():
    assert Reading(**json.loads(json.dumps(dataclasses.asdict(AFTER)))) == AFTER


def test_a_report_says_in_json_and_in_text_what_was_found():
    shut = dataclasses.replace(AFTER, needles=cells(4, 0, 10))
    found = json.loads(json.dumps(gate.report(BEFORE, shut, verdict(BEFORE, shut, GATE, 2, 4), short_len=2)))
    assert found["passed"] is False
    assert (found["seq_len"], found["short_loss"], found["short_loss_before"]) == (4, 3.01, 3.0)
    assert found["needles"] == cells(4, 0, 10)
    assert found["needles_before"] == cells(4, 0, 0)
    assert found["perplexity"][1] == {
        "context": 4,
        "positions": [2, 4],
        "perplexity_before": pytest.approx(math.exp(6.0)),
        "perplexity_after": pytest.approx(math.exp(5.9)),
    }
    text = gate.report_text(found)
    assert text.startswith("gate at 4 tokens: not passed\n")
    assert "0/10  10/10" in text
    assert text.endswith("- 50% of the needles at 4 tokens are found; 90% must be")


def test_the_plot_shows_each_length_before_its_extension_and_as_it_was_last_asked(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "imshow", lambda self, shares, **_: drawn.append(shares.tolist()))
    reports = [gate.report(BEFORE, after, [], short_len=2) for after in (BEFORE, AFTER)]
    gate.draw(tmp_path / "gates.png", reports)
    empty = [[pytest.approx(math.nan, nan_ok=True), 0.0]] * 2  # a row a depth, a column a length
    assert drawn == [empty, [[1.0, 0.8], [1.0, 1.0]]]
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_needles_is_drawn(tmp_path):
    plain = dataclasses.replace(AFTER, needles=[])
    gate.draw(tmp_path / "gates.png", [gate.report(BEFORE, plain, [], short_len=2)])
    assert (tmp_path / "gates.png").exists()


# Read from weights


def letters() -> Tokenizer:
    """A character is a token; the ends are 0 and 1."""
    ends = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1}
    pieces = [b"", b"", *(bytes([i]) for i in range(2, 128))]
    return Tokenizer(lambda text: list(text.encode()), pieces, ends, 0, 1, 0, frozenset({1}))


def write_heldout(directory) -> None:
    random = np.random.default_rng(0)
    documents = [[0, *random.integers(2, 128, length).tolist(), 1] for length in (400, 50, 300, 400, 500)]
    write_prepared(directory, {"a": {"heldout": documents[:3]}, "b": {"heldout": documents[3:]}}, 128)


def read_everything(directory) -> dict:
    """What the gate and the loss by source read of fresh weights on the ambient mesh."""
    sources = open_sources(directory, "heldout")
    params = jax.jit(lambda: Llama(SMALL, rngs=nnx.Rngs(0)))()
    how = {"num_rows": 3, "compute_dtype": jnp.float32}
    reading = gate.measure(params, sources["a"], tokenizer=letters(), gate=GATE, short_len=64, seq_len=LENGTH, **how)
    return {"by_source": losses_by_source(params, sources, 64, **how), **dataclasses.asdict(reading)}


def assert_close(one: dict, other: dict) -> None:
    np.testing.assert_allclose(one["losses"], other["losses"], rtol=1e-5)
    np.testing.assert_allclose(one["short_loss"], other["short_loss"], rtol=1e-5)
    np.testing.assert_allclose(one["by_source"]["a"], other["by_source"]["a"], rtol=1e-5)
    np.testing.assert_allclose(one["by_source"]["b"], other["by_source"]["b"], rtol=1e-5)
    assert one["needles"] == other["needles"]


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """A prepared directory, and what one device reads of it."""
    directory = tmp_path_factory.mktemp("data")
    write_heldout(directory)
    with llama_jax.use_mesh("data=1"):
        return directory, read_everything(directory)


def test_a_reading_has_every_position_and_the_needles_of_both_lengths(heldout):
    _, read = heldout
    assert len(read["losses"]) == LENGTH
    assert 4.5 < read["short_loss"] < 5.5, "fresh weights know nothing: log(128) is 4.85"
    assert [(cell["length"], cell["depth"], cell["asked"]) for cell in read["needles"]] == [
        (128, 0.0, 1),
        (128, 1.0, 1),
        (256, 0.0, 1),
        (256, 1.0, 1),
    ]
    assert read["by_source"].keys() == {"a", "b"}
    assert read["by_source"]["a"] == pytest.approx(read["short_loss"]), "the very same rows"


def test_every_mesh_reads_the_same(heldout):
    directory, read = heldout
    with llama_jax.use_mesh("fsdp=2,context=2,tensor=2"):
        assert_close(read_everything(directory), read)


PROCESS = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
address, process, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(address, num_processes=2, process_id=process)
import llama_jax
from tests.test_gate import read_everything
with llama_jax.use_mesh("fsdp=2,context=2"):
    print(json.dumps(read_everything(directory)))
"""


def test_each_of_two_processes_reads_the_same_as_one(heldout):
    directory, read = heldout
    address = free_address()
    for each in outputs(*(start_python(PROCESS, address, process, directory) for process in range(2))):
        assert_close(each, read)
