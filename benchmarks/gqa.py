"""Multi-head, grouped-query (arXiv 2305.13245) and multi-query attention (arXiv 1911.02150), side by side.

The model of configs/demo.toml at equal width with 8, 4, 2 and 1 KV heads. For each seed, which
chooses initial weights and order of the data together, every variant trains with the project's own
code on the same rows in the same order. Then the held-out text is scored whole, and decoding is
timed with the variants in turns. The invariant: variants differ by what VARIANTS says, and by nothing else.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import llama_jax
from benchmarks.environment import environment, print_results, spread
from benchmarks.shapes import decode_bytes
from benchmarks.worker_llama_jax import Inference
from llama_jax.config import LlamaConfig
from llama_jax.devices import open_devices
from llama_jax.entry import run_entry
from llama_jax.model import Llama
from llama_jax.paths import staged_file
from train.config import TrainConfig, read_config
from train.data.packing import PackedRows, stack
from train.data.shards import TokenDataset, all_documents, open_sources
from train.device import put_batch
from train.evaluation import row_losses
from train.pretrain import pretrain

# GQA-2 has 2 KV heads. MHA-narrow has exactly GQA-2's parameters: its MLP pays for the KV heads.
VARIANTS: dict[str, dict[str, int]] = {
    "MHA": {"model.num_kv_heads": 8},
    "GQA-2": {"model.num_kv_heads": 2},
    "MQA": {"model.num_kv_heads": 1},
    "GQA-4": {"model.num_kv_heads": 4},
    "MHA-narrow": {"model.num_kv_heads": 8, "model.mlp_dim": 512},
}
BASELINE = "MHA"

SEQ_LEN = 256
EVAL_ROWS = 16
DECODE = {"rows": 8, "length": 1919, "steps": 128}  # with the first token after the prompt 2,048 slots
BYTES_PER_VALUE = 4


def variant_config(variant: str, seed: int, tokens: int) -> TrainConfig:
    """The demo's run with one stage-1 phase of so many tokens of text alone and the values of a variant."""
    text_alone = {"data.mixture": {}, "stage.1.mixture": {}, "stage.1.mixture_changes": []}
    phases = {"stage.1.phases": [{"seq_len": SEQ_LEN, "tokens": tokens}]}
    return read_config("demo", {**VARIANTS[variant], **text_alone, **phases, "run.seed": seed})


def variant_model(variant: str) -> LlamaConfig:
    """The architecture, with the demo's full context."""
    return variant_config(variant, 0, SEQ_LEN).stage_model("2")


def heldout_loss(params: Llama, dataset: TokenDataset, seq_len: int) -> float:
    """Mean loss in nats over the whole split, packed into rows of seq_len as in training, in params' dtype."""
    rows = PackedRows(dataset, seq_len, seed=0)
    total = count = 0.0
    for start in range(0, len(rows), EVAL_ROWS):
        batch = stack([rows.row(index) for index in range(start, start + EVAL_ROWS)])
        is_first_epoch = start + np.arange(EVAL_ROWS) < len(rows)
        mask = batch.loss_mask * is_first_epoch[:, None]
        losses = row_losses(params, put_batch(batch, params.rules), params.embedding[...].dtype)
        total += float((np.asarray(losses, np.float64) * mask).sum())
        count += float(mask.sum())
    return total / count


def trained_loss(variant: str, seed: int, tokens: int, out: Path, *, train: bool = True) -> float | None:
    """Held-out loss of one run, from its result file or by training it to its end, from where it was stopped.

    None if it is not done and train is False.
    """
    run_dir = out / f"{variant}-seed{seed}-{tokens}"
    path = run_dir / "result.json"
    if not path.exists():
        if not train:
            return None
        config = variant_config(variant, seed, tokens)
        pretrain(config, "1", run_dir)
        with llama_jax.use_mesh(config.run.mesh):
            params = llama_jax.load(run_dir, dtype=config.run.compute_dtype)
            dataset = all_documents(open_sources(config.data.directory, "heldout"))
            loss = heldout_loss(params, dataset, SEQ_LEN)
        with staged_file(path) as staged:
            staged.write_text(json.dumps({"heldout_loss": loss, "environment": environment()}) + "\n")
        print(f"{variant} seed {seed}: held-out loss {loss:.4f}", flush=True)
    return json.loads(path.read_text())["heldout_loss"]


def decode_speeds(variants: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Tokens a second, rows together, of each round over all variants; a first one compiles and is not counted."""

    def inference(cfg: LlamaConfig) -> Inference:
        return Inference(jax.jit(lambda: Llama(cfg, rngs=nnx.Rngs(0), layout="layers"))())

    with llama_jax.use_mesh("data=1"):
        engines = {variant: inference(variant_model(variant)) for variant in variants}
        seconds = {variant: [] for variant in variants}
        for _ in range(1 + repeats):
            for variant, engine in engines.items():
                seconds[variant].append(engine.decode(**DECODE)["seconds"])
    return {variant: [DECODE["rows"] * DECODE["steps"] / s for s in values[1:]] for variant, values in seconds.items()}


def mean_and_range(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and greatest."""
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}


def result_row(variant: str, losses: dict[int, float], baseline: dict[int, float], speeds: dict) -> dict:
    """One variant: counts, loss by seed and its distance to the baseline's of that seed, decode speed by round."""
    cfg, rows = variant_model(variant), DECODE["rows"]
    step_bytes = decode_bytes(cfg, rows, DECODE["length"] + DECODE["steps"] / 2, BYTES_PER_VALUE)
    row = {
        "variant": variant,
        "num_kv_heads": cfg.num_kv_heads,
        "mlp_dim": cfg.mlp_dim,
        "params": cfg.num_params(),
        "cache_bytes_per_token": cfg.cache_bytes_per_token(BYTES_PER_VALUE),
        "decode_bytes_per_step": round(step_bytes),
        "decode_tokens_per_second": spread(speeds[variant]),
        "decode_bytes_per_second": spread([speed / rows * step_bytes for speed in speeds[variant]], 3),
        "decode_ratio": spread([ours / base for ours, base in zip(speeds[variant], speeds[BASELINE], strict=True)], 3),
    }
    if losses:
        row["heldout_loss"] = mean_and_range(list(losses.values())) | {"by_seed": losses}
    if both := losses.keys() & baseline.keys():
        row["loss_difference"] = mean_and_range([losses[seed] - baseline[seed] for seed in both])
    return row


def table_row(row: dict) -> str:
    """A row of the table in docs/gqa.md."""

    def ranged(name: str, middle: str, form: str) -> str:
        if name not in row:
            return "not trained"
        value = row[name]
        return f"{value[middle]:{form}} ({value['min']:{form}} to {value['max']:{form}})"

    cells = [
        row["variant"],
        str(row["num_kv_heads"]),
        f"{row['params']:,}",
        f"{row['cache_bytes_per_token']:,}",
        ranged("heldout_loss", "mean", ".3f"),
        ranged("loss_difference", "mean", "+.3f"),
        ranged("decode_tokens_per_second", "median", ",.0f"),
        ranged("decode_ratio", "median", ".2f"),
        f"{row['decode_bytes_per_step'] / 1e6:.0f}",
        f"{row['decode_bytes_per_second']['median'] / 1e9:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| variant | KV heads | parameters | cache bytes a token | held-out loss | to MHA, by seed "
    "| decode tokens/s | to MHA, by round | MB a step | GB/s |\n|---|---|---|---|---|---|---|---|---|---|"
)


def plot(rows: Sequence[dict], path: Path) -> None:
    """Draw held-out loss (mean and range of the seeds) and decode speed (median and range) over cache bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss_axes, speed_axes) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    _draw(loss_axes, [row for row in rows if "heldout_loss" in row], "heldout_loss", "mean")
    loss_axes.set(ylabel="held-out loss, nats a token")
    _draw(speed_axes, rows, "decode_tokens_per_second", "median")
    speed_axes.set(ylabel="decode, tokens/s", ylim=(0, None))
    with staged_file(path) as staged:
        figure.savefig(staged, format="png", dpi=120)
    pyplot.close(figure)


def _draw(axes, rows: Sequence[dict], name: str, middle: str) -> None:
    """A point and its range for every row, hollow unless at equal width; a line through those at equal width."""
    full_width = variant_model(BASELINE).mlp_dim
    for row in rows:
        value, x, is_full = row[name], row["cache_bytes_per_token"], row["mlp_dim"] == full_width
        extent = [[value[middle] - value["min"]], [value["max"] - value[middle]]]
        axes.errorbar(x, value[middle], extent, fmt="o", color="C0", mfc="C0" if is_full else "w", ms=5, capsize=3)
        place = {"xytext": (7, 7)} if is_full else {"xytext": (-7, -7), "ha": "right", "va": "top"}
        axes.annotate(row["variant"], (x, value[middle]), textcoords="offset points", size=8, **place)
    line = sorted((row["cache_bytes_per_token"], row[name][middle]) for row in rows if row["mlp_dim"] == full_width)
    axes.plot([x for x, _ in line], [y for _, y in line], "-", color="C0", lw=1)
    ticks = sorted({row["cache_bytes_per_token"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
    axes.set(xlabel="cache bytes a token, float32")
    axes.margins(0.2)
    axes.grid(alpha=0.3)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gqa", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000, help="each run trains on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of %(default)s, always with MHA")
    parser.add_argument("--out", type=Path, default=Path("runs/gqa"), help="runs, their results and gqa.png")
    parser.add_argument("--decode-only", action="store_true", help="train nothing; losses are those that --out holds")
    parser.add_argument("--repeats", type=int, default=5, help="measured rounds of decoding")
    args = parser.parse_args()
    if unknown := set(args.variants.split(",")) - set(VARIANTS):
        raise ValueError(f"--variants {unknown.pop()}: expected some of {', '.join(VARIANTS)}")
    variants = [name for name in VARIANTS if name in {BASELINE, *args.variants.split(",")}]
    open_devices()
    losses: dict[str, dict[int, float]] = {variant: {} for variant in variants}
    for seed in range(args.seeds):
        for variant in variants:
            loss = trained_loss(variant, seed, args.tokens, args.out, train=not args.decode_only)
            if loss is not None:
                losses[variant][seed] = loss
    where = environment()
    speeds = decode_speeds(variants, args.repeats)
    rows = [result_row(variant, losses[variant], losses[BASELINE], speeds) for variant in variants]
    rows.sort(key=lambda row: -row["num_kv_heads"])
    print("\n".join([HEADER, *map(table_row, rows)]), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(rows, args.out / "gqa.png")
    print_results(rows, where, tokens=args.tokens, decode=DECODE)


if __name__ == "__main__":
    run_entry(main)
