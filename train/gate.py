"""The gate between the context lengths of a stage: what shows that a longer context is learned, and whether it is.

A length counts as learned when the short context is as good as before, needles are found at the new length, and the
loss at the positions that are new has fallen (The Llama 3 Herd of Models, arXiv 2407.21783, section 3.4.2). The
invariant: a verdict follows from two readings and the gate's settings alone, so what was read before may come from
a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from llama_jax.model import Llama
from llama_jax.paths import staged_file
from llama_jax.tokenizer import Tokenizer
from train.config import GateConfig
from train.data.recall import found_needles
from train.data.shards import TokenDataset
from train.evaluation import format_report, losses_by_position, perplexity_rows, position_ranges


@dataclass(frozen=True)
class Reading:
    """What the weights can do at one moment of a stage.

    short_loss: mean held-out loss in nats over the context that the run was first trained at. losses: the held-out
    loss at each position of the length that is learned. needles: how many were asked and found, by length and depth,
    as `train.data.recall.found_needles` gives them.
    """

    short_loss: float
    losses: Sequence[float]
    needles: Sequence[Mapping[str, Any]] = ()

    def share_found(self, length: int) -> float:
        """Share of the needles of this length that were found."""
        cells = [cell for cell in self.needles if cell["length"] == length]
        return sum(cell["found"] for cell in cells) / max(1, sum(cell["asked"] for cell in cells))


def measure(
    params: Llama,
    heldout: TokenDataset,
    *,
    tokenizer: Tokenizer,
    gate: GateConfig | None,
    short_len: int,
    seq_len: int,
    num_rows: int,
    compute_dtype: DTypeLike,
) -> Reading:
    """What the weights can do at seq_len and half of it, and at the short context, on the mesh that they train on.

    Needles are asked where there is a gate. Raises ValueError if no held-out document reaches seq_len or they do not
    fit in half of it.
    """
    rows: dict[str, Any] = {"num_rows": num_rows, "compute_dtype": compute_dtype}
    needles = []
    if gate is not None:
        asked: dict[str, Any] = {"num_keys": gate.num_keys, "num_depths": gate.num_depths, "tokenizer": tokenizer}
        for length in (seq_len // 2, seq_len):
            needles += found_needles(params, heldout, seq_len=length, compute_dtype=compute_dtype, **asked)
    return Reading(
        short_loss=float(losses_by_position(params, heldout, short_len, **rows).mean()),
        losses=losses_by_position(params, heldout, seq_len, **rows).tolist(),
        needles=needles,
    )


def verdict(before: Reading, after: Reading, gate: GateConfig, old_len: int, new_len: int) -> list[str]:
    """Why the length is not learned, a clause each; [] if it is.

    before: losses as the phase began, short_loss as the stage began. old_len is the length before, new_len the one
    that is learned; where they are equal no position is new.
    """
    reasons = []
    rise = after.short_loss - before.short_loss
    if not rise <= gate.short_tolerance:
        reasons.append(
            f"the short-context loss is {after.short_loss:.4f}, {rise:.4f} above the {before.short_loss:.4f} that the "
            f"stage began with; at most {gate.short_tolerance:g} is allowed"
        )
    for length in sorted({cell["length"] for cell in after.needles}):
        share = after.share_found(length)
        if share < gate.needles:
            reasons.append(f"{share:.0%} of the needles at {length:,} tokens are found; {gate.needles:.0%} must be")
    if old_len < new_len:
        was, now = (float(np.mean(reading.losses[old_len:new_len])) for reading in (before, after))
        if not now < was:
            reasons.append(
                f"the loss at positions {old_len:,} to {new_len - 1:,} is {now:.4f}, not below the {was:.4f} that "
                "the phase began with"
            )
    return reasons


def report(before: Reading, after: Reading, reasons: Sequence[str], *, short_len: int) -> dict:
    """What a gate found, to be written as JSON: passed, reasons, short losses, needles and perplexity by position.

    The last three each as the gate found them and as they were before.
    """
    return {
        "seq_len": len(after.losses),
        "passed": not reasons,
        "reasons": list(reasons),
        "short_loss_before": before.short_loss,
        "short_loss": after.short_loss,
        "needles_before": [dict(cell) for cell in before.needles],
        "needles": [dict(cell) for cell in after.needles],
        "perplexity": perplexity_rows(before.losses, after.losses, position_ranges(short_len, len(after.losses))),
    }


def report_text(found: Mapping[str, Any]) -> str:
    """A gate's report as lines for people: verdict, needles by depth, perplexity by position, reasons."""
    lines = [
        f"gate at {found['seq_len']:,} tokens: {'passed' if found['passed'] else 'not passed'}",
        f"short-context loss {found['short_loss']:.4f}, at the stage's start {found['short_loss_before']:.4f}",
    ]
    if found["needles"]:
        lines.append(f"{'needles at':>10}  found by depth, from the start of the text to its end")
    for length in sorted({cell["length"] for cell in found["needles"]}):
        cells = (cell for cell in found["needles"] if cell["length"] == length)
        lines.append(f"{length:>10,}  " + "  ".join(f"{cell['found']}/{cell['asked']}" for cell in cells))
    lines.append(format_report(found["perplexity"]))
    return "\n".join([*lines, *(f"- {reason}" for reason in found["reasons"])])


def draw(path: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """A PNG of a run's gates: needles by depth and length and perplexity by position, before each extension and after.

    Of several gates at one length the last is shown.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = {found["seq_len"]: found for found in reports}
    cells: dict[str, list[Mapping[str, Any]]] = {
        "before each extension": [cell for found in last.values() for cell in _at_new_length(found)],
        "after it": [cell for found in reports for cell in found["needles"]],
    }
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    lengths = sorted({cell["length"] for found in cells.values() for cell in found})
    for axes, (title, found) in zip((left, middle), cells.items(), strict=True):
        _draw_needles(axes, found, lengths)
        axes.set(xlabel="context in tokens", ylabel="depth of the needle", title=f"needles found {title}")
    _draw_perplexity(right, last)
    with staged_file(path) as staged:
        figure.savefig(staged, format="png", dpi=100)
    pyplot.close(figure)


def _at_new_length(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in found.get("needles_before", ()) if cell["length"] == found["seq_len"]]


def _draw_needles(axes: Any, cells: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> None:
    """The map of one moment; of several cells at one place the last is shown."""
    depths = sorted({cell["depth"] for cell in cells}) or [0.0]
    shares = np.full((len(depths), max(1, len(lengths))), np.nan)
    for (depth, length), cell in {(cell["depth"], cell["length"]): cell for cell in cells}.items():
        row, column = depths.index(depth), lengths.index(length)
        shares[row, column] = cell["found"] / cell["asked"]
        axes.text(column, row, f"{cell['found']}/{cell['asked']}", ha="center", va="center")
    if cells:
        axes.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])


def _draw_perplexity(axes: Any, last: Mapping[int, Mapping[str, Any]]) -> None:
    """Perplexity by position of the last gate at each length: dashed before the extension, solid after it."""
    edges: list[int] = []
    for number, (length, found) in enumerate(sorted(last.items())):
        rows = found["perplexity"]
        edges = [rows[0]["positions"][0], *(row["positions"][1] for row in rows)]
        before, after = ([row[f"perplexity_{when}"] for row in rows] for when in ("before", "after"))
        axes.stairs(before, edges, baseline=None, color=f"C{number}", ls="--")
        axes.stairs(after, edges, baseline=None, color=f"C{number}", lw=2, label=f"{length:,} tokens")
    axes.set_xscale("symlog", base=2, linthresh=edges[1])
    axes.set_xticks(edges, [f"{edge:,}" for edge in edges])
    axes.set(yscale="log", xlabel="position", ylabel="perplexity", title="held out: before (dashed) and after")
    axes.grid(alpha=0.3)
    axes.legend()
