"""The training loop of one stage: phases of rising context, gates between them, checkpoints, what is logged.

The invariant: everything that the next step depends on is in the checkpoint, so a run that was
stopped anywhere goes on with the very same numbers, on other processes or another mesh, too.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import get_mesh

from llama_jax.config import LlamaConfig, RopeConfig
from llama_jax.entry import say
from llama_jax.memory import check_program
from llama_jax.mesh import ShardingRules
from llama_jax.model import Llama
from llama_jax.peers import Peers, slow_processes
from llama_jax.rounding import rounded_in_training
from llama_jax.slices import chip_kind
from llama_jax.tokenizer import load_tokenizer
from train.checkpoints import Checkpoints, Progress, read_progress, resumed_state, saved_steps, write_progress
from train.config import PhaseConfig, TrainConfig
from train.data.inputs import Inputs
from train.data.shards import open_sources
from train.device import put_batch
from train.evaluation import losses_by_source
from train.extension import Extension
from train.faults.interruption import Interruption
from train.faults.watchdog import Watchdog
from train.lock import RunLock
from train.optimizer import (
    Optimizer,
    StepMetrics,
    TrainState,
    learning_rate_schedule,
    num_micro_batches,
    train_step,
)
from train.watching.expected import Expected
from train.watching.goodput import EventLog
from train.watching.metrics import MetricsLog, peak_flops, plot_loss, progress_line
from train.watching.profile import Profile
from train.watching.trackers import open_trackers

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
    how = {"remat": run.remat, "num_chunks": run.loss_chunks, "z_loss": config.optimizer.z_loss}
    dtype = jnp.dtype(run.compute_dtype)
    step = functools.partial(train_step, optimizer, dtype, num_parts=num_parts, scheme=run.scheme, **how)
    device = get_mesh().devices.flat[0]
    options = {
        name: value
        for where in (device.platform, chip_kind(device))
        for name, value in run.compiler_options.get(where, {}).items()
    }
    return jax.jit(step, donate_argnums=0, compiler_options=options)


class Stage:
    """One stage of a run, from wherever it stands to its end."""

    def __init__(self, config: TrainConfig, name: str, run_dir: Path, optimizer: Optimizer, *, rope_before: RopeConfig):
        """Reads the data; trains nothing yet. rope_before: the RoPE that the weights come with."""
        self.config, self.name, self.run_dir, self.optimizer = config, name, run_dir, optimizer
        self.settings = config.stage[name]
        self.model: LlamaConfig = config.stage_model(name)
        tokenizer = load_tokenizer(config.data.directory)
        self.inputs = Inputs(config, name, tokenizer)
        self.heldout = open_sources(config.data.directory, "heldout", vocab_size=self.model.vocab_size)
        self.extension = Extension(config, name, run_dir, self.heldout, tokenizer, rope_before=rope_before)
        self._schedule = learning_rate_schedule(self.settings)
        self._programs: dict[tuple[int, int], jax.stages.Compiled] = {}
        self._expected: Expected | None = None
        # Skipped steps that the log tells of, and returns to the newest checkpoint.
        self._skipped = self._rollbacks = 0

    def train(
        self,
        state: TrainState,
        progress: Progress,
        *,
        record: Mapping[str, Any],
        peers: Peers,
        lock: RunLock,
        profile: bool = False,
    ) -> None:
        """Run the stage to its end, saving as it goes; profile: with a trace of a few steps in the run directory.

        A signal saves the step it comes in and ends the run as `Interruption.leave` does. Raises ValueError for
        a gate that stays shut and for a loss that does not come back, OSError for a checkpoint that
        cannot be written, or would be into a directory that is not the one of lock.
        """
        run, first = self.config.run, peers.process == 0
        with contextlib.ExitStack() as stack:
            self.events = stack.enter_context(EventLog(self.run_dir, progress.step, writes=first, stage=self.name))
            names = run.trackers if first else ()
            trackers = open_trackers(names, self.run_dir, resumed_step=progress.step, record=record)
            log = MetricsLog(self.run_dir, progress.step, trackers=trackers, writes=first)
            self.log = stack.enter_context(contextlib.closing(log))
            self.profile = stack.enter_context(
                contextlib.closing(Profile(self.run_dir / "profile" if profile else None))
            )
            self.peers, self.stop = peers, stack.enter_context(Interruption(peers))
            watchdog = Watchdog(run.watchdog_seconds, peers, run_dir=self.run_dir)
            self.watchdog = stack.enter_context(watchdog)
            self.checkpoints = Checkpoints(self.run_dir, self.model, keep=run.keep_checkpoints, lock=lock)
            self._train(state, progress)

    def _train(self, state: TrainState, progress: Progress) -> None:
        while progress.phase < len(self.settings.phases):
            with self._aside("eval", state):
                self.extension.before(self._as_computed(state), progress)
            state, progress = self._train_phase(state, progress)
            if self._stopped:
                self._save(state, progress, wait=True)
                self.stop.leave()
            if progress.phase_step == self._end(progress):
                progress = self._after_phase(state, progress)
        self._save(state, dataclasses.replace(progress, stage_done=True), wait=True)
        say(str(self.events.goodput()))

    def _end(self, progress: Progress) -> int:
        """The stage's step at which its phase ends, as far as its gate has not added to it yet."""
        return sum(self.settings.phase_steps()[: progress.phase + 1]) + progress.extra_steps

    def _train_phase(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """Train to the end of the phase, to an interruption, or to a spike that is rolled back."""
        self._stopped, end = False, self._end(progress)
        if progress.phase_step == end:
            return state, progress
        phase, rules = self.settings.phases[progress.phase], state.params.rules
        stream, mine = self.inputs.stream(phase, progress, rules)
        with stream:
            while progress.phase_step < end and not self._stopped:
                with self.profile.step(progress.step):
                    batch = next(stream)
                    waited = stream.take_wait()
                    batch = put_batch(batch, rules, rows=mine, num_rows=self.settings.phase_rows(phase))
                    step = self._program(state, batch, phase, done=progress.phase_step)
                    state, metrics = step(state, batch)
                self.profile.done(metrics.loss)
                progress = _advanced(progress, phase.batch_tokens, stream.state())
                self.watchdog.step_done(metrics.loss)
                self.log.count(phase.batch_tokens, waited=waited)
                self.events.stepped(progress.step, waited=waited)
                if self._spiked(progress, metrics) and (saved := self._rollback_point(progress)) is not None:
                    del state  # makes room for the one that is read
                    return resumed_state(self.run_dir, saved.step, self.model, self.optimizer), saved
                progress = self._after_step(state, progress, phase, metrics)
                self._stopped = self.stop.agreed()
        return state, progress

    def _program(self, state: TrainState, batch: Any, phase: PhaseConfig, *, done: int) -> jax.stages.Compiled:
        """The compiled step of a phase; done: steps of the stage before it."""
        shape = batch.tokens.shape
        if shape not in self._programs:
            with self._aside("compile", state):
                began = time.perf_counter()
                step = jit_step(self.config, self.name, phase=phase, optimizer=self.optimizer, rules=state.params.rules)
                self._programs[shape] = step.lower(state, batch).compile()
                say(f"compiled in {time.perf_counter() - began:.0f} s")
                check_program("a training step", self._programs[shape], get_mesh().devices.flat, ways=WAYS)
                flops = phase.batch_tokens * self.model.train_flops_per_token(phase.seq_len)
                self._expected = Expected(self._programs[shape], model_flops=flops, first_step=done)
        return self._programs[shape]

    def _after_phase(self, state: TrainState, progress: Progress) -> Progress:
        """Where the run goes on: in the next phase, or in this one if its gate stays shut.

        Raises ValueError if it has been asked too often.
        """
        with self._aside("eval", state):
            reasons = self.extension.after(self._as_computed(state), progress)
        gate, phase = self.settings.gate, self.settings.phases[progress.phase]
        if not reasons or gate is None:
            return self._next_phase(progress)
        if progress.retries == gate.max_retries:
            self._save(state, progress, wait=True)
            self.peers.part()
            raise ValueError(
                f"stage {self.name} has not learned {phase.seq_len} tokens of context after {gate.max_retries} more "
                f"tries: {'; '.join(reasons)}. Train with other data, or change stage.{self.name}.gate"
            )
        steps = max(1, (gate.retry_tokens or phase.tokens // 10) // phase.batch_tokens)
        say(f"stage {self.name}: {steps} more steps at {phase.seq_len} tokens")
        return dataclasses.replace(progress, retries=progress.retries + 1, extra_steps=progress.extra_steps + steps)

    def _next_phase(self, progress: Progress) -> Progress:
        """The start of the next phase: behind the rows that were read, if they are of the same kind."""
        index, phases = progress.phase, self.settings.phases
        kinds = [(phase.seq_len, phase.min_document_tokens) for phase in phases[index : index + 2]]
        rows = progress.rows
        if kinds[0] != kinds[-1]:
            rows = {name: (0, credit) for name, (_, credit) in rows.items()}
        return dataclasses.replace(progress, phase=index + 1, rows=rows, retries=0)

    def _spiked(self, progress: Progress, metrics: StepMetrics) -> bool:
        """Whether steps were skipped since it was last asked; looked up when a step is logged, not to wait for each.

        Raises ValueError if too many in a row were.
        """
        cfg = self.config.optimizer
        if not self._is_logged(progress):
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
            self.events.record("skipped", progress.step, count=new)
            say(f"stage {self.name}  {new} steps up to {progress.step} skipped: loss {loss:.4f}  grad {norm:.2f}")
        return new > 0

    def _rollback_point(self, progress: Progress) -> Progress | None:
        """The newest checkpoint's place in this phase, but behind the data read since; None to go on as it is."""
        if self.config.optimizer.on_spike != "rollback":
            return None
        self.checkpoints.wait()
        steps = saved_steps(self.run_dir)
        saved = read_progress(self.run_dir, steps[-1]) if steps else Progress()
        if (saved.stage, saved.phase) != (progress.stage, progress.phase):
            return None
        self._skipped, self._rollbacks = 0, self._rollbacks + 1
        self.log.rewind(saved.step)
        self.log.write(step=saved.step, stage=self.name, rolled_back_from=progress.step)
        self.events.record("rollback", saved.step)
        say(f"stage {self.name}  back from step {progress.step} to {saved.step}, without the data between")
        saved = dataclasses.replace(saved, rows=progress.rows)
        write_progress(self.run_dir, saved)  # a run that stops before its next checkpoint leaves them out, too
        return saved

    def _is_logged(self, progress: Progress) -> bool:
        return progress.phase_step % self.config.run.log_every == 0 or progress.phase_step == self._end(progress)

    def _after_step(self, state: TrainState, progress: Progress, phase: PhaseConfig, metrics: StepMetrics) -> Progress:
        run, done = self.config.run, progress.phase_step
        last = done == self._end(progress) and progress.phase + 1 == len(self.settings.phases)
        if self._is_logged(progress) and not int(metrics.skipped):
            self._log_step(progress, phase, metrics)
        if done % run.eval_every == 0 or last:
            with self._aside("eval", state):
                self._evaluate(state, progress)
        if done % (self.settings.save_every or run.save_every) == 0 and not last:
            progress = self._save(state, progress)
        return progress

    def _log_step(self, progress: Progress, phase: PhaseConfig, metrics: StepMetrics) -> None:
        loss, speed = float(metrics.loss), self.log.speed()
        planned = progress.phase_step - progress.extra_steps
        flops = self.model.train_flops_per_token(phase.seq_len) * speed.tokens_per_second
        peak = peak_flops(get_mesh().devices.flat)
        values = {
            "stage": self.name,
            "tokens": progress.tokens,
            "seq_len": phase.seq_len,
            "loss": loss,
            "grad_norm": float(metrics.grad_norm),
            "learning_rate": float(np.asarray(self._schedule(progress.phase_step - 1))),
            "tokens_per_second": round(speed.tokens_per_second, 1),
            "model_flops_per_second": round(flops),
            "data_wait": round(speed.data_wait, 5),
            **({"mfu": round(flops / peak, 5)} if peak else {}),
            "time": round(time.time(), 1),
        }
        self.log.write(step=progress.step, **values)
        total = sum(self.settings.phase_steps()) + progress.extra_steps
        left = self.settings.tokens_after(planned) / max(speed.tokens_per_second, 1e-9)
        say(progress_line(values, step=progress.phase_step, num_steps=total, seconds_left=left))
        seconds = 1 / max(speed.steps_per_second, 1e-9)
        for line in self._expected.compare(progress.phase_step, seconds) if self._expected else ():
            say(line)
        self.peers.tell(step_seconds=seconds, data_seconds=seconds * speed.data_wait)
        for line in slow_processes(self.peers.records()) if self.peers.process == 0 else ():
            say(f"slow: {line}")

    def _evaluate(self, state: TrainState, progress: Progress) -> None:
        """Held-out loss at the short context, by source and over all of them."""
        short, run = self.extension.short_len, self.config.run
        params, dtype = self._as_computed(state), jnp.dtype(run.compute_dtype)
        losses = losses_by_source(params, self.heldout, short, num_rows=run.eval_rows, compute_dtype=dtype)
        mean = sum(losses.values()) / len(losses)
        by_source = {f"heldout_loss/{name}": loss for name, loss in losses.items()} if len(losses) > 1 else {}
        self.log.write(step=progress.step, stage=self.name, tokens=progress.tokens, heldout_loss=mean, **by_source)
        parts = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        say(f"stage {self.name}  held out at {short} tokens: loss {mean:.4f} ({parts})")

    def _as_computed(self, state: TrainState) -> Llama:
        """The parameters to evaluate, rounded as in training."""
        return rounded_in_training(state.params, self.config.run.scheme, self.model.num_layers)

    def _save(self, state: TrainState, progress: Progress, *, wait: bool = False) -> Progress:
        """Begin to save, or with wait save to the end; where the run stands then, the averaged checkpoint counted."""
        with self._aside("save", state):
            self.log.flush()
            self.events.flush()
            progress = self.checkpoints.save(state, progress, average=self.settings.average)
            self._rollbacks = 0
            if self.peers.process == 0:
                plot_loss(self.run_dir)
            if wait:
                self.checkpoints.wait()
        say(f"{'saved' if wait else 'saving'} {self.run_dir}/checkpoints/{progress.step}")
        return progress

    @contextlib.contextmanager
    def _aside(self, what: str, state: TrainState) -> Iterator[None]:
        """What is no training: not watched, and not in the speed."""
        jax.block_until_ready(state)
        with self.watchdog.paused(), self.events.spent(what):
            yield
        self.log.restart_clock()


def _advanced(progress: Progress, tokens: int, rows: Mapping[str, tuple[int, int]]) -> Progress:
    return dataclasses.replace(
        progress,
        step=progress.step + 1,
        tokens=progress.tokens + tokens,
        stage_tokens=progress.stage_tokens + tokens,
        phase_step=progress.phase_step + 1,
        rows=rows,
    )
