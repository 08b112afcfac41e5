"""`--profile`: a trace that holds whole steps and can be read, also of a run that ends within it."""

import gzip
import json
from pathlib import Path

import pytest

from tests.test_train import run
from tests.test_train import workdir as workdir
from train.pretrain import main


def traced_steps(run_dir: str) -> list[int]:
    """The numbers of the steps that the trace of a run holds, in order."""
    (path,) = Path(run_dir).glob("profile/plugins/profile/*/*.trace.json.gz")
    (beside,) = path.parent.glob("*.xplane.pb")
    assert beside.stat().st_size > 1000
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [int(event["args"]["step_num"]) for event in events if event.get("name") == "step"]


def test_three_steps_behind_the_first_are_traced(workdir, capsys):
    run("1", "--profile", "--set", "run.trackers=[]")
    assert traced_steps("runs/tiny") == [3, 4, 5]
    assert "a trace of 3 steps is in runs/tiny/profile" in capsys.readouterr().err


def test_a_run_that_ends_within_the_trace_leaves_what_there_is(workdir):
    run("1", "--profile", "--set", "run.trackers=[]", "--set", "stage.1.phases=[{seq_len=16, tokens=512}]")
    assert traced_steps("runs/tiny") == [3]


def test_what_trains_nothing_cannot_be_profiled(capsys):
    with pytest.raises(SystemExit):
        main(["--stage", "1", "--profile", "--check"])
    assert "--profile belongs to training" in capsys.readouterr().err
