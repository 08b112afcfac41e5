"""The page about a run: what is on it, what it leaves out, and directories that hold no run."""

import dataclasses
import json
import re
from html.parser import HTMLParser

import pytest

from tests.tiny import TINY
from train.record import write_record
from train.report import main
from train.watching import charts
from train.watching.charts import Axis, Series, heat_map, line_chart, number, share_bar
from train.watching.goodput import EventLog
from train.watching.metrics import MetricsLog

PHASES = [{"seq_len": 1024, "tokens": 800, "batch_tokens": 100}, {"seq_len": 2048, "tokens": 200, "batch_tokens": 200}]
MODEL = {key: value for key, value in dataclasses.asdict(TINY).items() if key not in ("rope", "max_seq_len")}
RATES = {"learning_rate": 3e-4, "final_learning_rate": 0.0}
GATE = {
    "stage": "2",
    "seq_len": 2048,
    "tokens": 500,
    "passed": False,
    "reasons": ["75% of the needles at 2,048 tokens are found; 100% must be <now>"],
    "short_loss": 2.5,
    "needles": [{"length": 2048, "depth": depth, "found": found, "asked": 4} for depth, found in ((0.0, 4), (1.0, 2))],
    "perplexity": [{"context": 2048, "positions": [1024, 2048], "perplexity_before": 91.5, "perplexity_after": 7.25}],
}


class Page(HTMLParser):
    """Checks that tags are closed, and keeps the text and the addresses."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.addresses, self.html = [], "", [], html
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """Nothing stays open."""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += f"{data} "


def made(run_dir, *options):
    main([str(run_dir), *options])
    return Page((run_dir / "report.html").read_text())


@pytest.fixture
def run_dir(tmp_path):
    """A run of two stages, the first one done, that was killed once."""
    stages = {name: RATES | {"phases": PHASES} for name in ("1", "2")}
    write_record(tmp_path, {"run_id": "1f2e3d4c", "name": "tiny", "model": MODEL, "seed": 0, "stage": stages})
    EventLog(tmp_path, 0, stage="1", mesh="fsdp=8")
    log = MetricsLog(tmp_path, 0)
    for step in range(1, 16):
        values = {"stage": "1" if step <= 10 else "2", "tokens": 100 * step, "loss": 5.0 - step / 10, "mfu": 0.375}
        log.write(step=step, **values, grad_norm=0.5, seq_len=1024, learning_rate=1e-4, tokens_per_second=64, time=99.0)
    log.write(
        step=15, stage="2", tokens=1500, heldout_loss=3.625, **{"heldout_loss/de": 4.125, "heldout_loss/fr": 3.25}
    )
    with EventLog(tmp_path, 15, stage="2", mesh="fsdp=4") as events:
        events.record("rollback", 14, lost_from=15)
    (tmp_path / "gates.json").write_text(json.dumps([GATE]))
    return tmp_path


def test_the_page_tells_of_stages_losses_gates_and_events(run_dir):
    text = made(run_dir).text
    for part in ("tiny", "run 1f2e3d4c", "3.5000", "3.6250", "37.5%", "fsdp=4", "1K, 2K", "50.0%", "held out, stage 2"):
        assert part in text, part
    for part in ("de", "4.1250", "not yet", "6 of 8", "1,024 \u2013 2,047", "91.50", "rollback", "lost from 15"):
        assert part in text, part


def test_the_page_asks_no_network_runs_no_script_and_escapes_what_the_run_says(run_dir):
    page = made(run_dir)
    assert page.addresses == [] and "<script" not in page.html and "url(" not in page.html
    assert "&lt;now&gt;" in page.html and "<now>" not in page.html


def test_the_page_goes_where_it_is_told_and_json_has_the_numbers(run_dir, tmp_path, capsys):
    main([str(run_dir), "--out", str(tmp_path / "x.html"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert Page((tmp_path / "x.html").read_text()).text.count("tiny") >= 1
    assert not (run_dir / "report.html").exists()
    assert (found["step"], found["loss"], found["heldout_loss"], found["starts"]) == (15, 3.5, 3.625, 2)
    assert found["gates"] == [{"stage": "2", "seq_len": 2048, "passed": False}]
    assert found["page"] == str(tmp_path / "x.html")


def test_a_run_that_has_only_just_begun_says_so(tmp_path):
    EventLog(tmp_path, 0)
    assert "only just begun" in made(tmp_path).text


def test_a_run_without_record_and_events_is_drawn_from_its_metrics(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(step=1, stage="1", tokens=8, loss=float("nan"), grad_norm=0.5)
    rows = [{"context": 64, "positions": [0, 64], "perplexity_before": 9.0, "perplexity_after": 8.0}]
    (tmp_path / "extension.json").write_text(json.dumps(rows))
    text = made(tmp_path).text
    assert "Gradient norm" in text and "perplexity before" in text and "Stages" not in text


def test_damaged_checkpoints_are_told(run_dir):
    for step in ("5", "10"):
        (run_dir / "checkpoints" / step).mkdir(parents=True)
        (run_dir / "checkpoints" / step / "model.json").write_text("{}")
        (run_dir / "checkpoints" / step / "state.json").write_text("{")
    text = made(run_dir).text
    assert all(f"damaged: {run_dir}/checkpoints/{step}/state.json" in text for step in ("5", "10"))


@pytest.mark.parametrize("name", ["", "nothing"])
def test_a_directory_that_holds_no_run_is_one_line(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"holds no run \(no run.json, .*; give the directory of one"):
        main([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 10, False, [0, 2, 4, 6, 8, 10]),
        (1.97, 2.38, False, [2.0, 2.1, 2.2, 2.3]),
        (0.1, 2000, True, [0.1, 1, 10, 100, 1000]),
        (0.3, 6, True, [0.5, 1, 2, 5]),
        (3, 3, False, [2, 3, 4]),
    ],
)
def test_ticks_are_round_numbers_in_the_range(low, high, log, ticks):
    assert Axis(low, high, log=log).ticks() == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (3e-5, "3e-5"), (950, "950"), (999.6, "1K"), (15.6e12, "15.6T"), (-2e6, "-2M")],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_ticks_near_each_other_are_told_apart():
    chart = line_chart("x", [Series("", [(16.30e12, 1.0), (16.38e12, 2.0)])])
    assert re.findall(r'class="x"[^>]*>([^<]*)<', chart) == ["16.3T", "16.32T", "16.34T", "16.36T", "16.38T"]


def test_many_points_become_means_over_a_band(monkeypatch):
    monkeypatch.setattr(charts, "MOST_POINTS", 2)
    chart = line_chart("x", [Series("", [(0.0, 0.0), (1.0, 4.0), (2.0, 0.0), (3.0, 4.0)])])
    line, band = (re.search(f'd="([^"]*)" class="{kind}', chart) for kind in ("line", "band"))
    assert line is not None and band is not None
    assert len(re.findall("L", line[1])) == 1 and len(re.findall("L", band[1])) == 3
    ys = {place.split(" ")[1] for place in line[1].removeprefix("M").split("L")}
    assert len(ys) == 1


def test_a_chart_of_nothing_is_nothing():
    assert line_chart("x", [Series("a", []), Series("b", [(1.0, float("nan"))])]) == ""


def test_a_heat_map_leaves_out_what_was_not_asked():
    cells = re.findall("<td[^>]*>([^<]*)</td>", heat_map(["0%", "50%"], ["1K"], {("50%", "1K"): 0.75}))
    assert cells == ["", "75"]


def test_a_bar_leaves_out_what_took_no_time():
    assert re.findall("<b>(.*?)</b>", share_bar([("a", 0.75), ("b", 0.0), ("c", 0.25)])) == ["75.0%", "25.0%"]
