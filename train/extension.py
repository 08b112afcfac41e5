"""A stage that lengthens the context: what is read before and after each phase, and the gate between them.

The invariant: what a later reading is compared with lies in the run directory before the first step that
could change it, so a resumed run is judged by the same numbers.
"""

import dataclasses
import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig, RopeConfig
from llama_jax.entry import say
from llama_jax.model import Llama
from llama_jax.paths import make_directory, staged_file
from llama_jax.tokenizer import Tokenizer
from train import gate
from train.checkpoints import Progress
from train.config import TrainConfig
from train.data.shards import TokenDataset, all_documents
from train.gate import Reading

GATES_FILE = "gates.json"


class Extension:
    """The readings of one stage, for those of its phases that are longer than what came before."""

    def __init__(
        self,
        config: TrainConfig,
        stage: str,
        run_dir: Path,
        heldout: Mapping[str, TokenDataset],
        tokenizer: Tokenizer,
        *,
        rope_before: RopeConfig,
    ):
        """Reads nothing yet. rope_before: the RoPE of the weights that the stage begins with."""
        self._rope_before = rope_before
        self._config, self._stage, self._run_dir, self._tokenizer = config, stage, run_dir, tokenizer
        self._settings, self._model = config.stage[stage], config.stage_model(stage)
        self._heldout = all_documents(heldout)

    @property
    def short_len(self) -> int:
        """The context that the run was first trained at."""
        return self._model.rope.original_max_seq_len

    def old_len(self, phase: int) -> int:
        """The longest context before a phase, in this stage and those before it."""
        earlier = [self._config.stage[name].phases for name in takewhile(self._stage.__ne__, self._config.stage)]
        lengths = [p.seq_len for phases in [*earlier, self._settings.phases[:phase]] for p in phases]
        return max([self.short_len, *lengths])

    def lengthens(self, phase: int) -> bool:
        """Whether a phase is longer than all before it."""
        return self._settings.phases[phase].seq_len > self.old_len(phase)

    def before(self, params: Llama, progress: Progress) -> None:
        """Read what a phase will be compared with, if that was not done before it was interrupted."""
        if not self.lengthens(progress.phase) or self._path(progress.phase).exists():
            return
        if progress.phase_step == 0:  # the stage's start is judged by the RoPE that the weights came with
            params = with_config(params, dataclasses.replace(self._model, rope=self._rope_before))
        reading = self._measure(params, progress.phase)
        if jax.process_index() == 0:
            make_directory(self._path(progress.phase).parent)
            with staged_file(self._path(progress.phase)) as staged:
                staged.write_text(json.dumps(dataclasses.asdict(reading)) + "\n")

    def after(self, params: Llama, progress: Progress) -> list[str]:
        """Why the phase that has ended cannot be left, a clause each; written down with what was read."""
        index = progress.phase
        if not self.lengthens(index):
            return []
        begun, first = self._read(index), min(filter(self.lengthens, range(index + 1)))
        begun = dataclasses.replace(begun, short_loss=self._read(first).short_loss)
        now = self._measure(params, index)
        lengths = self.old_len(index), self._settings.phases[index].seq_len
        reasons = gate.verdict(begun, now, self._settings.gate, *lengths) if self._settings.gate else []
        found = gate.report(begun, now, reasons, short_len=self.short_len)
        say(f"stage {self._stage}: {gate.report_text(found)}")
        if jax.process_index() == 0:
            self._append(
                {"stage": self._stage, "phase": index, "step": progress.step, "tokens": progress.tokens, **found}
            )
        return reasons

    def _measure(self, params: Llama, phase: int) -> Reading:
        return gate.measure(
            params,
            self._heldout,
            tokenizer=self._tokenizer,
            gate=self._settings.gate,
            short_len=self.short_len,
            seq_len=self._settings.phases[phase].seq_len,
            num_rows=self._config.run.eval_rows,
            compute_dtype=jnp.dtype(self._config.run.compute_dtype),
        )

    def _path(self, phase: int) -> Path:
        return self._run_dir / "readings" / f"stage-{self._stage}-phase-{phase}.json"

    def _read(self, phase: int) -> Reading:
        try:
            return Reading(**json.loads(self._path(phase).read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{self._path(phase)} is damaged ({error}); start the stage in another --run-dir"
            ) from None

    def _append(self, entry: dict) -> None:
        path = self._run_dir / GATES_FILE
        entries = [*(json.loads(path.read_text()) if path.exists() else []), entry]
        with staged_file(path) as staged:
            staged.write_text(json.dumps(entries, indent=1) + "\n")
        gate.draw(self._run_dir / "gates.png", entries)


def with_config(params: Llama, cfg: LlamaConfig) -> Llama:
    """The same weights under another config (RoPE is not a weight)."""
    params = jax.tree.map(lambda w: w, params)
    params.cfg = cfg
    return params
