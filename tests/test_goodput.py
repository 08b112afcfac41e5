"""What the time of a run went to, over steps that count, restarts, kills, rollbacks and skipped steps."""

import json
from types import SimpleNamespace

import pytest

from train.watching import goodput as module
from train.watching.goodput import EventLog, goodput, read_events
from train.watching.metrics import MetricsLog


@pytest.fixture
def clock(monkeypatch):
    """A time of day that passes only by its .after(seconds)."""
    now = SimpleNamespace(seconds=1000.0)
    now.after = lambda seconds: setattr(now, "seconds", now.seconds + seconds)
    monkeypatch.setattr(module.time, "time", lambda: now.seconds)
    return now


def steps(events, clock, first, last, seconds=10.0, waited=0.0):
    for step in range(first, last):
        clock.after(seconds)
        events.stepped(step + 1, waited=waited)


def spent(run_dir, until=0.0):
    found = goodput(read_events(run_dir), until)
    return {kind: seconds for kind, seconds in found.seconds.items() if seconds}


def test_every_second_of_a_start_is_told_once(tmp_path, clock):
    with EventLog(tmp_path, 0, stage="1") as events:
        clock.after(3)
        with events.spent("compile"):
            clock.after(20)
        steps(events, clock, 0, 5, waited=1.0)
        with events.spent("eval"):
            clock.after(7)
        steps(events, clock, 5, 6)
        with events.spent("save"):
            clock.after(2)
    assert spent(tmp_path) == {"other": 3, "compile": 20, "steps": 55, "data": 5, "eval": 7, "save": 2}
    found = goodput(read_events(tmp_path))
    assert found.alive == 92 and found.of_alive == found.of_all == 55 / 92
    assert [event["event"] for event in read_events(tmp_path)] == "start compile steps eval steps save stop".split()
    assert str(found) == (
        "goodput 59.8% of 1:32 alive, 59.8% of all time since the first of 1 starts; waiting for data 5.4%, "
        "compiling 21.7%, evaluating 7.6%, saving 2.2%, starting and the rest 3.3%"
    )


def test_steps_behind_the_one_that_is_resumed_are_lost(tmp_path, clock):
    with EventLog(tmp_path, 0) as events:
        steps(events, clock, 0, 10)
    clock.after(50)
    with EventLog(tmp_path, 6) as events:
        steps(events, clock, 6, 8)
    assert spent(tmp_path) == {"steps": 80, "lost": 40, "down": 50}
    found = goodput(read_events(tmp_path))
    assert (found.starts, found.lost_steps, found.of_alive, found.of_all) == (2, 4, 80 / 120, 80 / 170)


def test_what_a_killed_process_did_after_its_last_event_is_known_from_its_metrics_and_lost(tmp_path, clock):
    events, log = EventLog(tmp_path, 0), MetricsLog(tmp_path, 0)
    steps(events, clock, 0, 4)
    with events.spent("save"):
        clock.after(1)
    steps(events, clock, 4, 7)
    log.write(step=7, stage="1", time=clock.seconds)
    assert spent(tmp_path, until=clock.seconds) == {"steps": 70, "save": 1}  # it may live, and save them
    clock.after(500)
    with EventLog(tmp_path, 4):
        MetricsLog(tmp_path, 4)
    assert spent(tmp_path) == {"steps": 40, "save": 1, "lost": 30, "down": 500}
    assert goodput(read_events(tmp_path)).lost_steps == 3


def test_steps_that_are_rolled_back_are_lost_in_the_same_process(tmp_path, clock):
    with EventLog(tmp_path, 0) as events:
        steps(events, clock, 0, 5)
        events.record("rollback", 3, lost_from=5)
        steps(events, clock, 3, 6)
    assert spent(tmp_path) == {"steps": 60, "lost": 20}


def test_skipped_steps_do_not_count(tmp_path, clock):
    with EventLog(tmp_path, 0) as events:
        steps(events, clock, 0, 10)
        events.record("skipped", 10, count=3)
    assert spent(tmp_path) == {"steps": 70, "lost": 30}


def test_the_running_process_tells_its_goodput_and_goes_on(tmp_path, clock):
    with EventLog(tmp_path, 0) as events:
        clock.after(25)
        with events.spent("compile"):
            clock.after(25)
        steps(events, clock, 0, 5)
        assert events.goodput().of_alive == 0.5
        steps(events, clock, 5, 10)
        assert events.goodput().of_alive == pytest.approx(2 / 3)


def test_the_stop_says_why(tmp_path, clock):
    with pytest.raises(ValueError), EventLog(tmp_path, 3):
        raise ValueError("the disk\nis full")
    stop = read_events(tmp_path)[-1]
    assert stop == {"time": 1000.0, "event": "stop", "step": 3, "reason": "ValueError: the disk is full"}


def test_a_process_that_does_not_write_leaves_nothing(tmp_path):
    with EventLog(tmp_path, 0, writes=False) as events, events.spent("eval"):
        events.stepped(1)
    assert list(tmp_path.iterdir()) == []
    assert events.goodput().starts == 0


def test_a_line_that_was_cut_off_is_mended_by_the_next_start(tmp_path, clock):
    EventLog(tmp_path, 0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1001.0, "eve')
    EventLog(tmp_path, 0)
    assert [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()] == ["start"] * 2
