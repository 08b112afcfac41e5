"""A run as one HTML page that a person can read: `python -m train.report RUN_DIR`.

Curves of all stages, held-out loss by source, gates of the longer context, goodput, events and checkpoints, from
what lies in the run directory. The one invariant: the page stands alone; it asks no network and runs no script.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.config import LlamaConfig
from llama_jax.devices import model_name
from llama_jax.entry import run_entry
from llama_jax.paths import as_path, staged_file
from train.record import RECORD_FILE, read_record
from train.watching.charts import STYLE, Html, Series, heat_map, line_chart, number, share_bar, table
from train.watching.goodput import LABELS, Goodput, goodput, read_events
from train.watching.metrics import clock, read_metrics

# What the gates of a context extension found; without one, perplexities before and after a stage.
GATE_FILES = ("gates.json", "extension.json")

# Curves in their order: key, title, unit, and how the y-axis is.
CURVES: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("grad_norm", "Gradient norm", "", {"log": True}),
    ("learning_rate", "Learning rate", "", {}),
    ("tokens_per_second", "Speed", "tokens/s", {"zero": True}),
    ("mfu", "Model FLOPs utilisation", "of the devices' peak", {"percent": True}),
    ("model_flops_per_second", "Model FLOP/s", "", {"zero": True}),
    ("data_wait", "Waiting for data", "share of the time", {"percent": True}),
)
_NOT_CURVES = {"step", "stage", "tokens", "seq_len", "time", "loss", "heldout_loss", "skipped", "rolled_back_from"}
_HIDDEN = {"time", "event", "step", "seen", "seen_step"}  # of an event, for it is said elsewhere
_MOST_EVENTS = 40


class Run(NamedTuple):
    """What lies in a run directory; parts that are not there yet are empty."""

    directory: Path
    record: dict[str, Any]
    metrics: list[dict]
    events: list[dict]
    gates: list[dict]
    checkpoints: list[dict]

    @property
    def stages(self) -> list[str]:
        """Their names in the order of the run."""
        return list(dict.fromkeys([*(line["stage"] for line in self.metrics), *self.record.get("stage", {})]))

    @property
    def goodput(self) -> Goodput | None:
        """That of all its starts; None without events."""
        until = max((line["time"] for line in self.metrics if "time" in line), default=0.0)
        return goodput(self.events, until) if self.events else None

    def last(self, key: str) -> Any:
        """The newest value of a metric, None if there is none."""
        return next((line[key] for line in reversed(self.metrics) if key in line), None)

    def points(self, key: str, stage: str | None = None) -> list[tuple[float, float]]:
        """A metric over tokens, of all stages or of one."""
        lines = (line for line in self.metrics if stage in (None, line["stage"]))
        return [(line["tokens"], line[key]) for line in lines if key in line and "tokens" in line]


def read_run(run_dir: Path) -> Run:
    """What a run directory holds. Raises FileNotFoundError for one that is none, ValueError for a damaged record."""
    gates = next((json.loads((run_dir / name).read_text()) for name in GATE_FILES if (run_dir / name).exists()), [])
    run = Run(
        run_dir, read_record(run_dir), read_metrics(run_dir), read_events(run_dir), gates, list(_checkpoints(run_dir))
    )
    if not any(run[1:]):
        raise FileNotFoundError(
            f"{run_dir} holds no run (no {RECORD_FILE}, metrics.jsonl or checkpoints); give the directory of one, "
            "such as runs/demo"
        )
    return run


def _checkpoints(run_dir: Path) -> Iterable[dict]:
    from train.checkpoints import read_progress, saved_steps  # with jax

    for step in saved_steps(run_dir):
        try:
            yield dataclasses.asdict(read_progress(run_dir, step))
        except (OSError, ValueError) as error:
            yield {"step": step, "stage": "?", "note": f"damaged: {error}"}


def summary(run: Run) -> dict[str, Any]:
    """The run in numbers, as `--json` prints them; null for what is not known."""
    spent = run.goodput
    keys = ("step", "stage", "tokens", "loss", "heldout_loss", "tokens_per_second", "mfu", "data_wait")
    return {key: run.last(key) for key in keys} | {
        "goodput": spent and spent.of_alive,
        "goodput_of_all_time": spent and spent.of_all,
        "seconds": spent and spent.seconds,
        "starts": spent and spent.starts,
        "lost_steps": spent and spent.lost_steps,
        "checkpoints": [saved["step"] for saved in run.checkpoints],
        "gates": [
            {key: gate.get(key) for key in ("stage", "seq_len", "passed")} for gate in run.gates if "passed" in gate
        ],
    }


def page(run: Run) -> str:
    """The page as HTML."""
    name = run.record.get("name") or run.directory.name
    sections = [
        ("Stages", _stages(run)),
        ("Loss", _loss(run)),
        ("Training", _grid(_curves(run))),
        ("Held out, by source", _by_source(run)),
        ("Context extension", _gates(run)),
        ("Where the time went", _time(run)),
        ("Events", _events(run)),
        ("Checkpoints", _saved(run)),
    ]
    body = "".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections if content)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body>{_head(run, name)}{body}</body></html>\n"
    )


def _head(run: Run, name: str) -> str:
    facts = [f"run {run.record['run_id']}"] if run.record else []
    if run.record:
        model = LlamaConfig(**run.record["model"])
        facts += [model_name(model), f"{model.num_layers} layers of width {model.embed_dim:,}"]
    start = next((event for event in reversed(run.events) if event["event"] == "start"), {})
    facts += [str(value) for key, value in start.items() if key not in {*_HIDDEN, "stage"}]
    spent, flops = run.goodput, run.last("model_flops_per_second")
    mfu = run.last("mfu")
    tiles = [
        ("step", f"{run.last('step'):,}" if run.metrics else None),
        ("tokens", _or_none(run.last("tokens"), number)),
        ("training loss", _or_none(run.last("loss"), "{:.4f}".format)),
        ("held-out loss", _or_none(run.last("heldout_loss"), "{:.4f}".format)),
        ("tokens/s", _or_none(run.last("tokens_per_second"), number)),
        ("MFU", f"{mfu:.1%}") if mfu is not None else ("FLOP/s", _or_none(flops, number)),
        ("goodput", spent and f"{spent.of_alive:.1%}"),
    ]
    shown = "".join(f"<div><small>{label}</small><b>{value}</b></div>" for label, value in tiles if value)
    shown = f'<div class="tiles">{shown}</div>' if shown else ""
    if not run.metrics:
        shown += (
            '<p class="card" style="margin-top:20px">This run has only just begun: no step has been logged yet.</p>'
        )
    heard = max((line["time"] for line in (*run.metrics, *run.events) if "time" in line), default=None)
    facts.append(f"last heard of {_day(heard)}" if heard else "")
    line = escape(" \u00b7 ".join(filter(None, facts)))
    return f'<h1>{escape(name)}</h1><p class="soft">{line}</p>{shown}'


def _or_none(value: Any, form: Any) -> str | None:
    return None if value is None else form(value)


def _stages(run: Run) -> str:
    rows, before = [], 0
    for name in run.stages if run.record else ():
        settings = run.record["stage"].get(name, {})
        phases = settings.get("phases", [])
        planned = sum(phase["tokens"] for phase in phases)
        reached = max((tokens for tokens, _ in run.points("loss", name)), default=before)
        lengths = dict.fromkeys(phase["seq_len"] for phase in phases)
        batches = dict.fromkeys(phase["batch_tokens"] for phase in phases)
        done = any(saved.get("stage_done") and saved["stage"] == name for saved in run.checkpoints)
        share = f"{min(1.0, (reached - before) / planned):.1%}" if planned else ""
        rates = (settings.get("learning_rate"), settings.get("final_learning_rate"))
        rows.append(
            (
                name,
                ", ".join(map(_length, lengths)),
                number(planned) if planned else "",
                " \u2192 ".join(map(number, batches)),
                " \u2192 ".join(number(rate) for rate in rates if rate is not None),
                "done" if done else share,
            )
        )
        before = reached
    return table(("stage", "context", "tokens", "tokens a batch", "learning rate", "trained"), rows)


def _loss(run: Run) -> str:
    stages, several = run.stages, len(run.stages) > 1
    curves = [
        [Series(_label("training", s, several), run.points("loss", s), i)]
        + [Series(_label("held out", s, several), run.points("heldout_loss", s), i, dots=True)]
        for i, s in enumerate(stages)
    ]
    whole = line_chart("Loss", sum(curves, []), unit="nats a token, over tokens", tall=True, marks=_starts(run))
    parts = [
        line_chart(f"Stage {s}", [c._replace(label="") for c in pair], marks=_lengths(run, s))
        for s, pair in zip(stages, curves, strict=True)
    ]
    return whole + (_grid(parts) if several else "")


def _label(what: str, stage: str, several: bool) -> str:
    return f"{what}, stage {stage}" if several else what


def _starts(run: Run) -> list[tuple[float, str]]:
    """Where each stage but the first begins; its colour says which it is."""
    points = [run.points("loss", stage) for stage in run.stages]
    return [(found[0][0], "") for found in points if found][1:]


def _lengths(run: Run, stage: str) -> list[tuple[float, str]]:
    """Where each context length of a stage begins, if there are several."""
    begins: dict[float, float] = {}
    for tokens, length in run.points("seq_len", stage):
        begins.setdefault(length, tokens)
    return [(tokens, _length(int(length))) for length, tokens in begins.items()] if len(begins) > 1 else []


def _length(tokens: int) -> str:
    """A context as people say it: 512, 8K, 128K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def _curves(run: Run) -> list[str]:
    """The curves of CURVES, and of every other number that the run has logged."""
    has_mfu = run.last("mfu") is not None
    figures = [
        line_chart(title, _by_stage(run, key), unit=unit, **options)
        for key, title, unit, options in CURVES
        if not (has_mfu and key == "model_flops_per_second")
    ]
    known = _NOT_CURVES | {key for key, *_ in CURVES}
    others = dict.fromkeys(key for line in run.metrics for key in line if key not in known and "/" not in key)
    return figures + [line_chart(key.replace("_", " ").capitalize(), _by_stage(run, key)) for key in others]


def _by_stage(run: Run, key: str) -> list[Series]:
    several = len(run.stages) > 1
    return [Series(f"stage {s}" if several else "", run.points(key, s), i) for i, s in enumerate(run.stages)]


def _by_source(run: Run) -> str:
    prefix = "heldout_loss/"
    keys = sorted({key for line in run.metrics for key in line if key.startswith(prefix)})
    found = {key.removeprefix(prefix): run.points(key) for key in keys}
    chart = line_chart(
        "Held-out loss by source",
        [Series(name, points, i, dots=True) for i, (name, points) in enumerate(found.items())],
        unit="nats a token",
        marks=_starts(run),
    )
    rows = []
    for name, points in found.items():
        losses = [loss for _, loss in points]
        rows.append((name, *(f"{loss:.4f}" for loss in (losses[0], min(losses), losses[-1]))))
    return _grid([chart, table(("source", "first", "lowest", "last"), rows)])


def _gates(run: Run) -> str:
    gates = [gate for gate in run.gates if "passed" in gate]
    rows = []
    for gate in gates:
        found, asked = (sum(cell[key] for cell in gate.get("needles", [])) for key in ("found", "asked"))
        verdict = '<span class="good">passed</span>' if gate["passed"] else '<span class="bad">not yet</span>'
        reasons = "".join(f"<br><small>{escape(reason)}</small>" for reason in gate.get("reasons", []))
        rows.append(
            (
                str(gate.get("stage", "")),
                _length(gate["seq_len"]),
                number(gate["tokens"]) if "tokens" in gate else "",
                Html(verdict + reasons),
                f"{found} of {asked}" if asked else "",
                f"{gate['short_loss']:.4f}" if "short_loss" in gate else "",
            )
        )
    tried = table(("stage", "context", "after tokens", "verdict", "needles", "short-context loss"), rows)
    perplexity = next((gate["perplexity"] for gate in reversed(gates) if gate.get("perplexity")), None)
    return tried + _grid([_needles(gates), _perplexity(perplexity or [g for g in run.gates if "passed" not in g])])


def _needles(gates: Sequence[Mapping[str, Any]]) -> str:
    """Where needles are found, by length and depth, as each length was last asked about."""
    newest: dict[Any, Mapping[str, Any]] = {}
    for gate in gates:
        newest |= {(cell["length"], cell["depth"]): cell for cell in gate.get("needles", [])}
    lengths, depths = (sorted({key[i] for key in newest}) for i in (0, 1))
    shares = {(f"{d:.0%}", _length(n)): cell["found"] / max(cell["asked"], 1) for (n, d), cell in newest.items()}
    cells = heat_map([f"{d:.0%}" for d in depths], [_length(n) for n in lengths], shares)
    title = "<figcaption>Needles found <small>% by depth and context</small></figcaption>"
    return f'<figure style="overflow-x:auto">{title}{cells}</figure>' if newest else ""


def _perplexity(rows: Sequence[Mapping[str, Any]]) -> str:
    shown = [
        (
            _length(row["context"]),
            "{:,} \u2013 {:,}".format(row["positions"][0], row["positions"][1] - 1),
            f"{row['perplexity_before']:.2f}",
            f"{row['perplexity_after']:.2f}",
        )
        for row in rows
    ]
    return table(("context", "positions", "perplexity before", "after"), shown)


def _time(run: Run) -> str:
    spent = run.goodput
    if spent is None:
        return ""
    total = max(sum(spent.seconds.values()), 1e-9)
    bar = share_bar([(LABELS.get(kind, kind), seconds / total) for kind, seconds in spent.seconds.items()])
    line = (
        f"<b>{spent.of_alive:.1%}</b> of {clock(spent.alive)} in which the run was alive and "
        f"<b>{spent.of_all:.1%}</b> of {clock(total)} since its first start went to steps that count; "
        f"{spent.starts} starts, {spent.lost_steps:,} steps lost."
    )
    return f'<div class="card">{bar}<p style="margin-top:12px">{line}</p></div>'


def _events(run: Run) -> str:
    told = [event for event in run.events if event["event"] in ("start", "stop", "rollback", "skipped")]
    rows = []
    for event in reversed(told[-_MOST_EVENTS:]):
        facts = {k: v for k, v in event.items() if k not in _HIDDEN}
        text = ", ".join(f"{key.replace('_', ' ')} {value}".removeprefix("reason ") for key, value in facts.items())
        rows.append((_day(event["time"]), event["event"], f"{event['step']:,}", text))
    more = f'<p class="soft">and {len(told) - _MOST_EVENTS} before</p>' if len(told) > _MOST_EVENTS else ""
    return table(("time (UTC)", "event", "step", ""), rows) + more


def _saved(run: Run) -> str:
    rows = [
        (
            f"{saved['step']:,}",
            str(saved["stage"]),
            number(saved["tokens"]) if "tokens" in saved else "",
            _note(saved),
        )
        for saved in reversed(run.checkpoints)
    ]
    return table(("step", "stage", "tokens", ""), rows)


def _note(saved: Mapping[str, Any]) -> str:
    notes = [saved.get("note"), "end of the stage" if saved.get("stage_done") else None]
    notes.append(f"with the average of {saved['averaged']}" if saved.get("averaged") else None)
    return ", ".join(filter(None, notes))


def _grid(figures: Iterable[str]) -> str:
    shown = "".join(figures)
    return f'<div class="grid">{shown}</div>' if shown else ""


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m train.report", description="Show a run as one HTML page.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="where the run lives, e.g. runs/demo; may be gs:// or s3://")
    parser.add_argument("--out", metavar="FILE", help="the page; default: RUN_DIR/report.html")
    parser.add_argument("--json", action="store_true", help="print the run's numbers as one JSON object, too")
    args = parser.parse_args(argv)
    run = read_run(as_path(args.run_dir))
    path = as_path(args.out) if args.out else run.directory / "report.html"
    with staged_file(path) as staged:
        staged.write_text(page(run), encoding="utf-8")
    print(json.dumps(summary(run) | {"page": str(path)}) if args.json else path)


if __name__ == "__main__":
    run_entry(main)
