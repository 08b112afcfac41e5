"""What a run is, recorded when a stage of it begins and compared when it goes on.

The one invariant: a run directory holds one run. A config, an architecture or data other than those that
it was begun with are refused before the first step; what may change while a run lasts is the mesh, the mixture,
the gates and all of [run] but the seed.
"""

import dataclasses
import json
import secrets
from pathlib import Path
from typing import Any

from llama_jax.paths import make_directory, staged_file
from train.config import TrainConfig

RECORD_FILE = "run.json"

_MAY_CHANGE = ("mesh", "mixture", "mixture_changes", "length_weights", "gate", "average", "save_every")


def read_record(run_dir: Path) -> dict[str, Any]:
    """What `run.json` holds; {} for a run that has not begun. Raises ValueError if it is damaged."""
    path = run_dir / RECORD_FILE
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("run_id", "name", "model", "seed", "stage")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); restore it, or start another --run-dir") from None


def check_record(
    run_dir: Path, config: TrainConfig, stage: str, corpus_hash: str, *, init: str | None = None
) -> dict[str, Any]:
    """The record of the run with this stage, which is compared, or added where the stage begins; not written yet.

    init: the checkpoint that it begins from, if it is one of another run; a stage that goes on needs not name it.
    Raises ValueError naming the first key that was another when the run, or the stage, began.
    """
    settings = dataclasses.asdict(config.stage[stage])
    kept = {key: value for key, value in settings.items() if key not in _MAY_CHANGE}
    # RoPE's scaling is the stage's; a stage that begins from a checkpoint may bring a context of its own.
    model = {k: v for k, v in dataclasses.asdict(config.model).items() if k not in ("rope", "max_seq_len")}
    now = {
        "run_id": secrets.token_hex(4),
        "name": config.name,
        "model": model,
        "seed": config.run.seed,
        "stage": {stage: kept | {"optimizer": dataclasses.asdict(config.optimizer), "corpus": corpus_hash}},
    }
    now = json.loads(json.dumps(now))  # tuples become lists, as in the file
    before = read_record(run_dir)
    now["stage"][stage]["init"] = init or before.get("stage", {}).get(stage, {}).get("init")
    if not before:
        return now
    for part in ("name", "model", "seed"):
        _compare(run_dir, part, before[part], now[part])
    if stage in before["stage"]:
        _compare(run_dir, f"stage.{stage}", before["stage"][stage], now["stage"][stage])
    return before | {"stage": before["stage"] | now["stage"]}


def write_record(run_dir: Path, record: dict[str, Any]) -> None:
    """Write `run.json`."""
    make_directory(run_dir)
    with staged_file(run_dir / RECORD_FILE) as staged:
        staged.write_text(json.dumps(record, indent=1) + "\n")


def _compare(run_dir: Path, where: str, before: Any, now: Any) -> None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            _compare(run_dir, f"{where}.{key}", before.get(key), now.get(key))
    elif before != now:
        raise ValueError(
            f"{run_dir} was begun with {where}={before!r}, and now it is {now!r}; "
            "set it back, or give another --run-dir"
        )
