"""A run directory holds one run: what may not change while it lasts, and what may."""

import dataclasses

import pytest

from train.config import read_config
from train.record import check_record, read_record, write_record

BEGUN = read_config("llama3.1-8b-continue")


def begun(run_dir, stage="1"):
    write_record(run_dir, check_record(run_dir, BEGUN, stage, "corpus"))
    return read_record(run_dir)


def changed(**settings):
    return read_config("llama3.1-8b-continue", settings)


def test_a_run_that_goes_on_keeps_its_record(tmp_path):
    record = begun(tmp_path)
    assert check_record(tmp_path, BEGUN, "1", "corpus") == record
    assert len(record["run_id"]) == 8


def test_a_stage_remembers_the_checkpoint_that_it_began_from(tmp_path):
    write_record(tmp_path, check_record(tmp_path, BEGUN, "1", "corpus", init="C"))
    assert check_record(tmp_path, BEGUN, "1", "corpus") == read_record(tmp_path)
    with pytest.raises(ValueError, match="stage.1.init='C', and now it is 'D'"):
        check_record(tmp_path, BEGUN, "1", "corpus", init="D")


def test_each_stage_is_recorded_when_it_begins(tmp_path):
    first, both = begun(tmp_path), begun(tmp_path, "2")
    assert (list(first["stage"]), sorted(both["stage"])) == (["1"], ["1", "2"])
    assert both["run_id"] == first["run_id"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"run.seed": 1}, "seed=0, and now it is 1"),
        ({"model.num_layers": 30}, "model.num_layers=32"),
        ({"stage.1.learning_rate": 2e-5}, "stage.1.learning_rate=1e-05, and now it is 2e-05"),
        ({"stage.1.batch_tokens": 8192 * 128}, "stage.1.batch_tokens"),
        ({"optimizer.b2": 0.99}, "stage.1.optimizer.b2=0.95"),
    ],
)
def test_what_may_not_change_is_named(tmp_path, settings, named):
    begun(tmp_path)
    with pytest.raises(ValueError, match="was begun with") as error:
        check_record(tmp_path, changed(**settings), "1", "corpus")
    assert named in str(error.value)


def test_another_run_and_other_data_are_refused(tmp_path):
    begun(tmp_path)
    with pytest.raises(ValueError, match="name='llama3.1-8b-continue', and now it is 'other'"):
        check_record(tmp_path, dataclasses.replace(BEGUN, name="other"), "1", "corpus")
    with pytest.raises(ValueError, match="stage.1.corpus='corpus', and now it is 'another'"):
        check_record(tmp_path, BEGUN, "1", "another")


@pytest.mark.parametrize(
    "settings",
    [
        {"run.mesh": "fsdp=4,tensor=2"},
        {"run.log_every": 3},
        {"stage.1.mixture": {"text": 1.0}},
        {"stage.1.save_every": 7},
        {"stage.2.learning_rate": 6e-6},
    ],
)
def test_mesh_mixture_and_other_stages_may_change(tmp_path, settings):
    record = begun(tmp_path)
    assert check_record(tmp_path, changed(**settings), "1", "corpus") == record


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"):
        read_record(tmp_path)
