"""The training loop of one stage: phases of rising context, metrics, checkpoints, and the report.

The invariant: everything that the next step depends on is in the checkpoint, so a run that was
stopped anywhere goes on with the very same numbers.
"""

import dataclasses
import functools
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import get_mesh

from llama_jax.config import LlamaConfig
from llama_jax.memory import check_program
from llama_jax.paths import staged_file
from train.checkpoints import Progress, remove_old_steps, save_step, saved_steps
from train.config import PhaseConfig, TrainConfig
from train.data import Batches, PackedRows, TokenDataset
from train.device import put_batch
from train.evaluation import extension_report, format_report, losses_by_position
from train.metrics import MetricsLog, clock, plot_loss, say
from train.optimizer import Optimizer, TrainState, learning_rate_schedule, train_step

# Ways out for a run that does not fit.
WAYS = "a smaller model or batch_tokens, more devices along fsdp in run.mesh or more run.loss_chunks"


class Stage:
    """One stage of a run, from wherever it stands to its end."""

    def __init__(self, config: TrainConfig, name: str, run_dir: Path, optimizer: Optimizer):
        """Reads the data; trains nothing yet."""
        self.config, self.name, self.run_dir, self.optimizer = config, name, run_dir, optimizer
        self.settings = config.stage[name]
        self.model: LlamaConfig = config.stage_model(name)
        self.compute_dtype = jnp.dtype(config.run.compute_dtype)
        self.train_data = TokenDataset(config.data.directory, "train", vocab_size=self.model.vocab_size)
        self.heldout = TokenDataset(config.data.directory, "heldout", vocab_size=self.model.vocab_size)
        run = config.run
        self._step = jax.jit(
            functools.partial(train_step, optimizer, self.compute_dtype, run.remat, run.loss_chunks), donate_argnums=0
        )
        self._schedule = learning_rate_schedule(self.settings)

    def train(self, state: TrainState, progress: Progress) -> None:
        """Run the stage to its end, saving as it goes. Ctrl-C saves the step it is at and raises KeyboardInterrupt."""
        self.log = MetricsLog(self.run_dir, progress.step)
        before = self._before(state, progress)
        with _interruptible() as interrupted:
            for phase_index in range(progress.phase, len(self.settings.phases)):
                state, progress = self._train_phase(state, progress, phase_index, interrupted)
                if interrupted:
                    if progress.step not in saved_steps(self.run_dir):
                        self._save(state, progress)
                    raise KeyboardInterrupt
        progress = dataclasses.replace(progress, stage_done=True)
        self._save(state, progress)
        if before is not None:
            self._report(before, self._losses(state))

    def _train_phase(self, state: TrainState, progress: Progress, index: int, interrupted: list):
        phase, steps = self.settings.phases[index], self.settings.phase_steps()[index]
        first = sum(self.settings.phase_steps()[:index])
        rows = PackedRows(
            self.train_data, phase.seq_len, self.config.run.seed, min_document_tokens=phase.min_document_tokens
        )
        batch_rows = self.settings.batch_tokens // phase.seq_len
        batches = Batches(rows, batch_rows, start_row=progress.row)
        say(f"stage {self.name}: seq_len {phase.seq_len}, {steps} steps of {batch_rows} rows")
        step = None
        while progress.phase_step < first + steps:
            batch = put_batch(next(batches), state.params.rules)
            if step is None:
                began = time.perf_counter()
                step = self._step.lower(state, batch).compile()
                say(f"compiled in {time.perf_counter() - began:.0f} s")
                check_program("a training step", step, get_mesh().devices.flat, ways=WAYS)
                self.log.restart_clock()
            state, metrics = step(state, batch)
            self.log.count(self.settings.batch_tokens)
            progress = dataclasses.replace(
                progress,
                step=progress.step + 1,
                tokens=progress.tokens + self.settings.batch_tokens,
                phase_step=progress.phase_step + 1,
                row=batches.state(),
            )
            self._after_step(state, progress, phase, metrics)
            if interrupted:
                return state, progress
        return state, dataclasses.replace(progress, phase=index + 1, row=0)

    def _after_step(self, state: TrainState, progress: Progress, phase: PhaseConfig, metrics) -> None:
        run, done = self.config.run, progress.phase_step
        total = sum(self.settings.phase_steps())
        if done % run.log_every == 0 or done == total:
            self._log_step(progress, phase, metrics, total)
        if done % run.eval_every == 0 or done == total:
            self._evaluate(state, progress)
        if done % run.save_every == 0 and done != total:
            self._save(state, progress)

    def _log_step(self, progress: Progress, phase: PhaseConfig, metrics, total: int) -> None:
        loss = float(metrics.loss)
        if not np.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {progress.step}; lower the learning rate")
        speed = self.log.tokens_per_second()
        rate = float(np.asarray(self._schedule(progress.phase_step - 1)))
        left = (total - progress.phase_step) * self.settings.batch_tokens / speed
        flops = self.model.train_flops_per_token(phase.seq_len) * speed
        self.log.write(
            step=progress.step,
            stage=self.name,
            tokens=progress.tokens,
            seq_len=phase.seq_len,
            loss=loss,
            grad_norm=float(metrics.grad_norm),
            learning_rate=rate,
            tokens_per_second=round(speed, 1),
            model_flops_per_second=round(flops),
            time=round(time.time(), 1),
        )
        say(
            f"stage {self.name}  step {progress.phase_step}/{total}  loss {loss:.4f}"
            f"  grad {float(metrics.grad_norm):.2f}"
            f"  lr {rate:.2e}  {speed:,.0f} tokens/s  {flops / 1e12:.3f} TFLOP/s  {clock(left)} left"
        )

    def _evaluate(self, state: TrainState, progress: Progress) -> None:
        losses = self._short_losses(state)
        self.log.write(step=progress.step, stage=self.name, tokens=progress.tokens, heldout_loss=losses.mean())
        say(f"stage {self.name}  held out at {len(losses)} tokens: loss {losses.mean():.4f}")
        self.log.restart_clock()

    def _save(self, state: TrainState, progress: Progress) -> None:
        path = save_step(self.run_dir, self.model, state, progress)
        remove_old_steps(self.run_dir, self.config.run.keep_checkpoints)
        plot_loss(self.run_dir)
        say(f"saved {path}")
        self.log.restart_clock()

    @property
    def _short(self) -> int:
        """The context that the run was first trained at."""
        return self.model.rope.original_max_seq_len

    def _short_losses(self, state: TrainState) -> np.ndarray:
        return losses_by_position(
            state.params,
            self.heldout,
            self._short,
            num_rows=self.config.run.eval_rows,
            compute_dtype=self.compute_dtype,
        )

    def _losses(self, state: TrainState) -> dict[str, np.ndarray]:
        """Held-out losses by position at the short context and at the longest of the stage."""
        long = losses_by_position(
            state.params,
            self.heldout,
            self.model.max_seq_len,
            num_rows=self.config.run.eval_rows,
            compute_dtype=self.compute_dtype,
        )
        return {"short": self._short_losses(state), "long": long}

    def _before(self, state: TrainState, progress: Progress) -> dict[str, np.ndarray] | None:
        """Losses before an extension, by the weights and the RoPE that it starts from; None if nothing is extended.

        Kept in the run directory, so that a resumed stage compares with the same.
        """
        if self.model.max_seq_len <= self._short:
            return None
        path = self.run_dir / f"before-stage-{self.name}.json"
        if progress.phase_step == 0:
            plain = dataclasses.replace(self.model, rope=self.config.model.rope)
            losses = self._losses(state._replace(params=_with_config(state.params, plain)))
            with staged_file(path) as staged:
                staged.write_text(json.dumps({name: values.tolist() for name, values in losses.items()}))
        return {name: np.array(values) for name, values in json.loads(path.read_text()).items()}

    def _report(self, before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> None:
        rows = extension_report(before, after, self._short)
        with staged_file(self.run_dir / "extension.json") as staged:
            staged.write_text(json.dumps(rows, indent=1) + "\n")
        say(f"held-out perplexity before and after stage {self.name}:\n{format_report(rows)}")


def _with_config(params, cfg: LlamaConfig):
    """The same weights under another config (RoPE is not a weight)."""
    params = jax.tree.map(lambda w: w, params)
    params.cfg = cfg
    return params


@contextmanager
def _interruptible() -> Iterator[list]:
    """A list that Ctrl-C or SIGTERM puts the signal into, so that the step at hand ends first; twice stops at once."""
    received: list = []

    def receive(number, frame):
        del frame
        if received:
            raise KeyboardInterrupt
        received.append(number)
        say("stopping after this step; once more stops at once")

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
