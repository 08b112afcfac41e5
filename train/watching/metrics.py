"""What a run leaves to look at: metrics.jsonl, the line on the terminal, speed and MFU, a plot of the loss.

A line of metrics.jsonl is one JSON object with "step" (over all stages) and "stage". Those of training steps
have loss, grad_norm, learning_rate, tokens_per_second, model_flops_per_second, mfu and data_wait over tokens;
others heldout_loss, heldout_loss/<source> or skipped. The invariant: lines past the step that a run goes on from
are dropped, so that no step is told twice.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llama_jax.chips import CHIPS
from llama_jax.paths import is_remote, staged_file

METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Somewhere else that wants to hear the numbers of a run (see train/watching/trackers.py)."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one line."""
        ...

    def rewind(self, step: int) -> None:
        """Forget what comes after this step."""
        ...

    def flush(self) -> None:
        """Make what was logged last."""
        ...

    def close(self) -> None:
        """Take no more."""
        ...


class Speed(NamedTuple):
    """Steps and tokens a second, and the share of the time that was spent waiting for the data."""

    steps_per_second: float
    tokens_per_second: float
    data_wait: float


class JsonLines:
    """A file of JSON objects that grows, a line each.

    An object store cannot append: there lines wait for `flush`, which comes with each checkpoint, so
    that a run that is killed loses only those that going on would drop.
    """

    def __init__(self, path: Path, keep: Callable[[dict], bool] = lambda line: True):
        """Goes on with the lines that the file has, those to keep."""
        self.path = path
        self._lines = [json.dumps(line) for line in read_lines(path) if keep(line)]
        self._write_all()

    def append(self, values: Mapping[str, Any]) -> None:
        """Add one line."""
        self._lines.append(json.dumps(values))
        if not is_remote(self.path):
            with self.path.open("a") as file:
                file.write(self._lines[-1] + "\n")

    def objects(self) -> list[dict]:
        """What the lines say."""
        return [json.loads(line) for line in self._lines]

    def flush(self) -> None:
        """Write the lines that an object store does not have yet, with all the others."""
        if is_remote(self.path):
            self._write_all()

    def _write_all(self) -> None:
        with staged_file(self.path) as staged:
            staged.write_text("".join(line + "\n" for line in self._lines))


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines, [] if there is none; a last line that was cut off is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return read_lines(run_dir / METRICS_FILE)


class MetricsLog:
    """Appends to run_dir/metrics.jsonl, tells the trackers, and keeps the clock that speed is measured by."""

    def __init__(self, run_dir: Path, resumed_step: int, *, trackers: Sequence[Tracker] = (), writes: bool = True):
        """Drops lines of a run that went past the step that it now resumes from.

        Of several processes the first one writes; the others pass writes=False and only measure.
        """
        self.path, self._writes, self._trackers = run_dir / METRICS_FILE, writes, trackers
        self._drop_after(resumed_step)
        self.restart_clock()

    def _drop_after(self, step: int) -> None:
        self._lines = JsonLines(self.path, lambda line: line["step"] <= step) if self._writes else None

    def write(self, *, step: int, **values: Any) -> None:
        """Append one line; its numbers go to the trackers."""
        if self._lines is None:
            return
        self._lines.append({"step": step} | values)
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "time"}
        for tracker in self._trackers:
            tracker.log(step, numbers)

    def rewind(self, step: int) -> None:
        """Drop what comes after this step, to which the run goes back."""
        self._drop_after(step)
        for tracker in self._trackers:
            tracker.rewind(step)
        self.restart_clock()

    def flush(self) -> None:
        """Write what an object store does not have yet."""
        if self._lines is not None:
            self._lines.flush()
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Write what waits, and let the trackers go."""
        self.flush()
        for tracker in self._trackers:
            tracker.close()

    def count(self, tokens: int, *, waited: float = 0.0) -> None:
        """Count a step on so many tokens, for whose data the run waited so many seconds."""
        self._steps, self._tokens, self._waited = self._steps + 1, self._tokens + tokens, self._waited + waited

    def speed(self) -> Speed:
        """Speed since the clock was started, which starts it again."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        speed = Speed(self._steps / seconds, self._tokens / seconds, min(1.0, self._waited / seconds))
        self.restart_clock()
        return speed

    def tokens_per_second(self) -> float:
        """Tokens a second since the clock was started, which starts it again."""
        return self.speed().tokens_per_second

    def restart_clock(self) -> None:
        """Leave out of the speed what was not training: compiling, evaluating, saving."""
        self._began, self._steps, self._tokens, self._waited = time.perf_counter(), 0, 0, 0.0


def peak_flops(devices: Iterable[Any]) -> float:
    """FLOP/s in dense bfloat16 that these devices can do together, 0.0 if that is not known of all."""
    from llama_jax.slices import chip_kind  # with jax, which `train.report --help` need not wait for

    peaks = [CHIPS[chip_kind(device)].flops for device in devices]
    return sum(peaks) if all(peaks) else 0.0


def progress_line(values: Mapping[str, Any], *, step: int, num_steps: int, seconds_left: float) -> str:
    """The line on the terminal about a training step: what metrics.jsonl has of it, and where its stage stands.

    MFU (model FLOPs utilisation, arXiv 2204.02311, appendix B) where the device's peak is known, else TFLOP/s.
    """
    flops = f"{values['model_flops_per_second'] / 1e12:.3f} TFLOP/s"
    parts = [
        f"stage {values['stage']}",
        f"step {step}/{num_steps}",
        f"loss {values['loss']:.4f}",
        f"grad {values['grad_norm']:.2f}",
        f"lr {values['learning_rate']:.2e}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
        f"MFU {values['mfu']:.1%}" if "mfu" in values else flops,
        f"data wait {values['data_wait']:.1%}" if "data_wait" in values else "",
        f"{clock(seconds_left)} left",
    ]
    return "  ".join(filter(None, parts))


def clock(seconds: float) -> str:
    """Seconds as m:ss, h:mm:ss or 2d 03:04:05."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}:{seconds:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def plot_loss(run_dir: Path) -> Path:
    """Draw training and held-out loss over tokens, a colour a stage, as run_dir/loss.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(run_dir)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for i, stage in enumerate(dict.fromkeys(line["stage"] for line in lines)):
        for key, style, label in (("loss", "-", "training"), ("heldout_loss", "o--", "held out, short context")):
            points = [(line["tokens"], line[key]) for line in lines if line["stage"] == stage and key in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", ms=4, lw=1, label=f"stage {stage}, {label}")
    axes.set(xlabel="tokens", ylabel="loss in nats a token", title=run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / "loss.png"
    with staged_file(path) as staged:
        figure.savefig(staged, format="png", dpi=120)
    pyplot.close(figure)
    return path
