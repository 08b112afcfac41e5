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
from itertools import takewhile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import get_mesh

from llama_jax.config import LlamaConfig
from llama_jax.entry import say
from llama_jax.memory import check_program
from llama_jax.mesh import ShardingRules
from llama_jax.paths import staged_file
from train.checkpoints import (
    Progress,
    read_progress,
    remove_leftovers,
    remove_old_steps,
    resumed_state,
    save_step,
    saved_steps,
    write_progress,
)
from train.config import PhaseConfig, TrainConfig
from train.data import Batches, PackedRows, TokenDataset
from train.device import put_batch
from train.evaluation import extension_report, format_report, losses_by_position
from train.metrics import MetricsLog, clock, plot_loss
from train.optimizer import (
    Optimizer,
    StepMetrics,
    TrainState,
    learning_rate_schedule,
    num_micro_batches,
    train_step,
)

# Ways out for a run that does not fit.
WAYS = (
    "a smaller model, run.micro_batch_tokens, more devices along fsdp in run.mesh, more run.loss_chunks or "
    "optimizer.moment_dtype=bfloat16"
)


def jit_step(
    config: TrainConfig, stage: str, *, phase: PhaseConfig, optimizer: Optimizer, rules: ShardingRules
) -> jax.stages.Wrapped:
    """The step (state, batch) -> (state, metrics) of a phase, as a run jits it and --plan too; it donates the state."""
    run, num_rows = config.run, config.stage[stage].phase_rows(phase)
    num_parts = num_micro_batches(num_rows, phase.seq_len, run.micro_batch_tokens, rules)
    numerics = {"z_loss": config.optimizer.z_loss, "num_parts": num_parts}
    dtype = jnp.dtype(run.compute_dtype)
    step = functools.partial(train_step, optimizer, dtype, run.remat, run.loss_chunks, **numerics)
    return jax.jit(step, donate_argnums=0)


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
        self._schedule = learning_rate_schedule(self.settings)
        # Skipped steps that the log tells of, and returns to the newest checkpoint.
        self._skipped = self._rollbacks = 0

    def train(self, state: TrainState, progress: Progress) -> None:
        """Run the stage to its end, saving as it goes. Ctrl-C saves the step it is at and raises KeyboardInterrupt."""
        remove_leftovers(self.run_dir)
        self.log = MetricsLog(self.run_dir, progress.step)
        before = self._before(state, progress)
        with _interruptible() as interrupted:
            while progress.phase < len(self.settings.phases):
                state, progress = self._train_phase(state, progress, interrupted)
                if interrupted:
                    if progress.step not in saved_steps(self.run_dir):
                        self._save(state, progress)
                    raise KeyboardInterrupt
        progress = dataclasses.replace(progress, stage_done=True)
        self._save(state, progress)
        if before is not None:
            self._report(before, self._losses(state))

    def _train_phase(self, state: TrainState, progress: Progress, interrupted: list) -> tuple[TrainState, Progress]:
        """Train to the end of the phase, to an interruption, or to a spike that is rolled back."""
        phase = self.settings.phases[progress.phase]
        *before, steps = self.settings.phase_steps()[: progress.phase + 1]
        rows = PackedRows(
            self.train_data,
            phase.seq_len,
            self.config.run.seed,
            stage=list(self.config.stage).index(self.name),
            min_document_tokens=phase.min_document_tokens,
        )
        num_rows = self.settings.phase_rows(phase)
        batches = Batches(rows, num_rows, start_row=progress.row)
        say(f"stage {self.name}: seq_len {phase.seq_len}, {steps} steps of {num_rows} rows")
        step = None
        while progress.phase_step < sum(before) + steps:
            batch = put_batch(next(batches), state.params.rules)
            if step is None:
                began = time.perf_counter()
                rules = state.params.rules
                step = jit_step(self.config, self.name, phase=phase, optimizer=self.optimizer, rules=rules)
                step = step.lower(state, batch).compile()
                say(f"compiled in {time.perf_counter() - began:.0f} s")
                check_program("a training step", step, get_mesh().devices.flat, ways=WAYS)
                self.log.restart_clock()
            state, metrics = step(state, batch)
            self.log.count(phase.batch_tokens)
            progress = dataclasses.replace(
                progress,
                step=progress.step + 1,
                tokens=progress.tokens + phase.batch_tokens,
                phase_step=progress.phase_step + 1,
                row=batches.state(),
            )
            if self._spiked(progress, metrics) and (saved := self._rollback_point(progress)) is not None:
                del state  # makes room for the one that is read
                return resumed_state(self.run_dir, saved.step, self.model, self.optimizer), saved
            self._after_step(state, progress, phase, metrics)
            if interrupted:
                return state, progress
        return state, self._next_phase(progress)

    def _next_phase(self, progress: Progress) -> Progress:
        """Where the next phase starts: behind the rows that were read, if they are of the same kind."""
        index, phases = progress.phase, self.settings.phases
        kinds = [(phase.seq_len, phase.min_document_tokens) for phase in phases[index : index + 2]]
        row = progress.row if kinds[0] == kinds[-1] else 0
        return dataclasses.replace(progress, phase=index + 1, row=row)

    def _spiked(self, progress: Progress, metrics: StepMetrics) -> bool:
        """Whether steps were skipped since it was last asked; looked up when a step is logged, not to wait for each.

        Raises ValueError if too many in a row were.
        """
        cfg = self.config.optimizer
        if not self._is_logged(progress.phase_step):
            return False
        skipped, new = int(metrics.skipped), int(metrics.total_skipped) - self._skipped
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        if skipped > cfg.max_skipped or self._rollbacks > cfg.max_skipped:
            raise ValueError(
                f"the loss is {loss} at step {progress.step} and the gradient norm {norm}, {skipped} steps in a row "
                f"changed nothing and {self._rollbacks} were rolled back; lower the learning rate, look at the data "
                "or raise optimizer.max_loss, max_grad_norm or max_skipped"
            )
        self._skipped += new
        if new:
            self.log.write(step=progress.step, stage=self.name, skipped=new)
            say(f"stage {self.name}  {new} steps up to {progress.step} skipped: loss {loss:.4f}  grad {norm:.2f}")
        return new > 0

    def _rollback_point(self, progress: Progress) -> Progress | None:
        """The newest checkpoint's place in this phase, but behind the data read since; None to go on as it is."""
        steps = saved_steps(self.run_dir) if self.config.optimizer.on_spike == "rollback" else []
        saved = read_progress(self.run_dir, steps[-1]) if steps else Progress()
        if (saved.stage, saved.phase) != (progress.stage, progress.phase):
            return None
        self._skipped, self._rollbacks = 0, self._rollbacks + 1
        self.log = MetricsLog(self.run_dir, saved.step)
        self.log.write(step=saved.step, stage=self.name, rolled_back_from=progress.step)
        say(f"stage {self.name}  back from step {progress.step} to {saved.step}, without the data between")
        saved = dataclasses.replace(saved, row=progress.row)
        write_progress(self.run_dir, saved)  # a run that stops before its next checkpoint leaves them out, too
        return saved

    def _is_logged(self, done: int) -> bool:
        return done % self.config.run.log_every == 0 or done == sum(self.settings.phase_steps())

    def _after_step(self, state: TrainState, progress: Progress, phase: PhaseConfig, metrics) -> None:
        run, done = self.config.run, progress.phase_step
        total = sum(self.settings.phase_steps())
        if self._is_logged(done) and not int(metrics.skipped):
            self._log_step(progress, phase, metrics, total)
        if done % run.eval_every == 0 or done == total:
            self._evaluate(state, progress)
        if done % run.save_every == 0 and done != total:
            self._save(state, progress)

    def _log_step(self, progress: Progress, phase: PhaseConfig, metrics, total: int) -> None:
        loss = float(metrics.loss)
        speed = self.log.tokens_per_second()
        rate = float(np.asarray(self._schedule(progress.phase_step - 1)))
        left = self.settings.tokens_after(progress.phase_step) / speed
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
        self.log.flush()
        path = save_step(self.run_dir, self.model, state, progress)
        self._rollbacks = 0
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
        earlier = [self.config.stage_model(name) for name in takewhile(self.name.__ne__, self.config.stage)]
        start = [dataclasses.replace(self.config.model, max_seq_len=self._short), *earlier][-1]
        if self.model.max_seq_len <= max(self._short, start.max_seq_len):
            return None
        path = self.run_dir / f"before-stage-{self.name}.json"
        if progress.phase_step == 0:
            plain = dataclasses.replace(self.model, rope=start.rope)
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
