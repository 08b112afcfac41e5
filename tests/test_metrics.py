"""What a run writes about itself: lines that are dropped and kept, speed, the line on the terminal, the plot."""

import json
from types import SimpleNamespace

import pytest

from train.watching import metrics
from train.watching.metrics import MetricsLog, clock, peak_flops, plot_loss, progress_line, read_lines, read_metrics

LINE = {
    "stage": "1",
    "loss": 2.34567,
    "grad_norm": 0.5,
    "learning_rate": 3e-4,
    "tokens_per_second": 1234.5,
    "model_flops_per_second": 5e10,
}


class Recorded:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.calls = []

    def log(self, step, values):
        self.calls.append((step, values))

    def rewind(self, step):
        self.calls.append(f"rewind {step}")

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


@pytest.fixture
def ticking(monkeypatch):
    """A clock that stands at .now."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    return clock


def test_lines_past_the_resumed_step_and_a_cut_off_one_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step=step, stage="1", loss=0.5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sta')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    MetricsLog(tmp_path, 2).write(step=3, stage="1", loss=0.25)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [(line["step"], line["loss"]) for line in map(json.loads, lines)] == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_a_rollback_drops_lines_and_tells_the_trackers(tmp_path):
    tracker = Recorded()
    log = MetricsLog(tmp_path, 0, trackers=[tracker])
    for step in (1, 2):
        log.write(step=step, stage="1", loss=0.5, time=99.0)
    log.rewind(1)
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert tracker.calls == [(1, {"loss": 0.5}), (2, {"loss": 0.5}), "rewind 1", "flush", "close"]


def test_a_process_that_does_not_write_only_measures(tmp_path, ticking):
    log = MetricsLog(tmp_path, 0, writes=False)
    log.write(step=1, stage="1", loss=0.5)
    log.rewind(0)
    log.close()
    log.count(64)
    ticking.now += 2
    assert log.speed().tokens_per_second == 32
    assert list(tmp_path.iterdir()) == []


def test_speed_counts_steps_tokens_and_the_wait_for_data_since_it_was_asked(tmp_path, ticking):
    log = MetricsLog(tmp_path, 0)
    log.count(1000, waited=5.0)
    ticking.now += 5
    log.restart_clock()
    for _ in range(3):
        log.count(40, waited=0.25)
    ticking.now += 2
    assert log.speed() == (1.5, 60.0, 0.375)
    ticking.now += 1
    assert log.speed() == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", 0.0),
    ],
)
def test_the_peak_of_a_device_follows_from_its_name(kind, peak):
    assert peak_flops([SimpleNamespace(device_kind=kind)] * 2) == 2 * peak


def test_the_peak_is_unknown_if_that_of_one_device_is():
    assert peak_flops([SimpleNamespace(device_kind=kind) for kind in ("TPU v4", "TPU v9")]) == 0.0


def test_the_progress_line_tells_mfu_where_it_is_known_and_teraflops_elsewhere():
    line = progress_line(LINE, step=7, num_steps=90, seconds_left=3725)
    assert line == (
        "stage 1  step 7/90  loss 2.3457  grad 0.50  lr 3.00e-04  1,234 tokens/s  0.050 TFLOP/s  1:02:05 left"
    )
    known = LINE | {"mfu": 0.4567, "data_wait": 0.0012}
    line = progress_line(known, step=7, num_steps=90, seconds_left=200_000)
    assert line.endswith("1,234 tokens/s  MFU 45.7%  data wait 0.1%  2d 07:33:20 left")


def test_time_that_is_left_at_no_speed_is_unknown():
    assert clock(float("inf")) == "?"


def test_a_plot_is_drawn_of_all_stages(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for step, stage in ((1, "1"), (2, "2")):
        log.write(step=step, stage=stage, tokens=step * 100, loss=3.0 / step)
        log.write(step=step, stage=stage, tokens=step * 100, heldout_loss=3.1 / step)
    assert plot_loss(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "nothing.jsonl") == []
