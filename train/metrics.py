"""What a run leaves to look at: metrics.jsonl, and a plot of the loss."""

import json
import time
from pathlib import Path
from typing import Any

from llama_jax.paths import is_remote, staged_file


class MetricsLog:
    """Appends JSON lines to run_dir/metrics.jsonl and keeps the clock of the current stage.

    An object store cannot append: there lines wait for `flush`, which comes before each checkpoint, so
    that a run that is killed loses only those that going on would drop.
    """

    def __init__(self, run_dir: Path, resumed_step: int):
        """Drops lines of a run that went past the step that it now resumes from."""
        self.path = run_dir / "metrics.jsonl"
        self._lines = [json.dumps(line) for line in read_metrics(run_dir) if line["step"] <= resumed_step]
        self._write_all()
        self.restart_clock()

    def write(self, **values: Any) -> None:
        """Append one line."""
        self._lines.append(json.dumps(values))
        if not is_remote(self.path):
            with self.path.open("a") as file:
                file.write(self._lines[-1] + "\n")

    def flush(self) -> None:
        """Write the lines that an object store does not have yet, with all the others."""
        if is_remote(self.path):
            self._write_all()

    def _write_all(self) -> None:
        with staged_file(self.path) as staged:
            staged.write_text("".join(line + "\n" for line in self._lines))

    def count(self, tokens: int) -> None:
        """Tokens that have been trained on since the clock was started."""
        self._tokens += tokens

    def tokens_per_second(self) -> float:
        """Speed since the clock was started, which starts it again."""
        speed = self._tokens / max(time.perf_counter() - self._began, 1e-9)
        self.restart_clock()
        return speed

    def restart_clock(self) -> None:
        """Leave out of the speed what was not training: compiling, evaluating, saving."""
        self._began, self._tokens = time.perf_counter(), 0


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl; a last line that was cut off is left out."""
    path = run_dir / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
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
