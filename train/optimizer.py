"""The optimizer of a stage with its learning-rate schedule, and the jitted training step.

AdamW (arXiv 1711.05101) or Muon over gradients clipped by their global norm. The invariants: a
batch gives the same step however many micro-batches it is taken in, because each adds its share of
the mean over all tokens of the batch; and the optimizer counts the stage's steps, also those that it
skips, so that the count follows from where the run stands.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from llama_jax.mesh import ShardingRules, current_mesh
from llama_jax.model import Llama
from llama_jax.rounding import computed_in, rounded_in_training
from llama_jax.schemes import Scheme
from train.config import OptimizerConfig, StageConfig
from train.data.packing import Batch
from train.loss import loss_sum
from train.muon import scale_by_muon

# An optax.GradientTransformationExtraArgs; optax's own type does not admit a module as its tree of parameters.
Optimizer = Any


class TrainState(NamedTuple):
    """Parameters in float32 and the optimizer's state; mu and nu are Llamas split like the parameters."""

    params: Llama
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Mean loss in nats a token, norm of the gradient before clipping, number of tokens in the loss.

    skipped: int32, how many steps in a row, up to this one, have changed nothing, because loss or
    gradient were out of bounds. total_skipped: int32, all of them since the state was made.
    """

    loss: Array
    grad_norm: Array
    tokens: Array
    skipped: Array
    total_skipped: Array


class GuardState(NamedTuple):
    """Counts of skipped steps as in StepMetrics, and the state of the optimizer that is guarded."""

    skipped: Array
    total_skipped: Array
    inner: optax.OptState


def learning_rate_schedule(stage: StageConfig) -> optax.Schedule:
    """Linear warm-up, then the stage's way down to the final rate; steps count from 0."""
    steps = max(1, (stage.decay_steps or sum(stage.phase_steps())) - stage.warmup_steps)
    if stage.schedule == "linear":
        decay = optax.linear_schedule(stage.learning_rate, stage.final_learning_rate, steps)
    else:
        share = stage.final_learning_rate / stage.learning_rate
        decay = optax.cosine_decay_schedule(stage.learning_rate, steps, alpha=share)
    if not stage.warmup_steps:
        return decay
    return optax.join_schedules(
        [optax.linear_schedule(0.0, stage.learning_rate, stage.warmup_steps), decay], [stage.warmup_steps]
    )


def make_optimizer(cfg: OptimizerConfig, stage: StageConfig) -> Optimizer:
    """Clipping, Adam or Muon, weight decay on all but the norms' scales, the stage's schedule, and the guard."""
    if cfg.name == "muon":
        scale = scale_by_muon(cfg.b1, cfg.b2, cfg.eps)
    else:
        scale = optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=jnp.float32)
    chain = optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        stored_as(jnp.dtype(cfg.moment_dtype), scale),
        optax.add_decayed_weights(cfg.weight_decay, mask=_is_decayed),
        optax.scale_by_learning_rate(learning_rate_schedule(stage)),
    )
    return guarded(chain, max_loss=cfg.max_loss, max_grad_norm=cfg.max_grad_norm)


def _is_decayed(params: Llama) -> Llama:
    return jax.tree.map_with_path(lambda path, _: "scale" not in jax.tree_util.keystr(path), params)


def stored_as(dtype: jnp.dtype, inner: Optimizer) -> Optimizer:
    """The optimizer with its floats kept in dtype between steps and in float32 during one."""

    def cast(state: optax.OptState, dtype: DTypeLike) -> optax.OptState:
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)


def guarded(inner: Optimizer, *, max_loss: float, max_grad_norm: float) -> Optimizer:
    """The optimizer, but a step whose loss or gradient norm is not finite or not below its bound changes only counts.

    Its update takes the step's loss, a float32 scalar, as `loss=`.
    """

    def init(params) -> GuardState:
        return GuardState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates, state: Any, params=None, **step):
        # Neither NaN nor infinity is below a bound, be it infinite.
        good = (step["loss"] < max_loss) & (optax.tree.norm(updates) < max_grad_norm)
        updates, after = inner.update(updates, state.inner, params)

        def choose(new: Array, old: Array) -> Array:
            return jnp.where(good, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

        updates = jax.tree.map(lambda u: jnp.where(good, u, 0.0), updates)
        skipped = jnp.where(good, 0, state.skipped + 1)
        total = state.total_skipped + jnp.where(good, 0, 1)
        return updates, GuardState(skipped, total, jax.tree.map(choose, after, state.inner))

    return optax.GradientTransformationExtraArgs(init, update)


def num_micro_batches(rows: int, seq_len: int, max_tokens: int, rules: ShardingRules) -> int:
    """The fewest equal parts of a batch that give no device more than max_tokens, or a row, at a time.

    The rows are split over the ambient mesh as rules say. 0 for max_tokens sets no bound. Raises
    ValueError if the mesh does not divide the rows.
    """
    if rows % rules.batch_multiple:
        raise ValueError(
            f"a batch of {rows} rows of {seq_len} tokens cannot be split over data * fsdp = {rules.batch_multiple}; "
            "give devices to context or tensor in the mesh, or raise batch_tokens"
        )
    sizes, share = current_mesh().shape, rows // rules.batch_multiple
    row_tokens = seq_len // math.prod(sizes[axis] for axis in rules.sequence)
    most = max(1, max_tokens // row_tokens) if max_tokens else share
    return next(parts for parts in range(1, share + 1) if share % parts == 0 and share // parts <= most)


def train_step(
    optimizer: Optimizer,
    compute_dtype: DTypeLike,
    state: TrainState,
    batch: Batch,
    *,
    num_parts: int = 1,
    scheme: Scheme | None = None,
    **how: Any,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step; the loss is the mean over the batch's tokens, however the rows are packed.

    num_parts micro-batches go through the model one after the other (see num_micro_batches); their
    gradients are added in float32. scheme: by which weights are rounded in every product. how: remat, num_chunks and
    z_loss of `loss_sum`.
    """
    tokens = jnp.sum(batch.loss_mask)

    def share_of_mean(params: Llama, part: Batch) -> Array:
        model = computed_in(rounded_in_training(params, scheme, params.cfg.num_layers), compute_dtype)
        total, _ = loss_sum(model, part, **how)
        return total / jnp.maximum(tokens, 1.0)

    def add(so_far: tuple[Array, Llama], part: Batch) -> tuple[tuple[Array, Llama], None]:
        return jax.tree.map(jnp.add, so_far, jax.value_and_grad(share_of_mean)(state.params, part)), None

    nothing = jax.tree.map(jnp.zeros_like, (jnp.float32(0), state.params))
    (loss, grads), _ = jax.lax.scan(add, nothing, jax.tree.map(functools.partial(_parts, num_parts), batch))
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, loss=loss)
    params = jax.tree.map(jnp.add, state.params, updates)
    metrics = StepMetrics(loss, optax.tree.norm(grads), tokens, opt_state.skipped, opt_state.total_skipped)
    return TrainState(params, opt_state), metrics


def _parts(num_parts: int, x: Array) -> Array:
    """[B, T] -> [A, B / A, T]; each part takes every A-th row, so that rows stay on their devices."""
    return jnp.swapaxes(x.reshape(-1, num_parts, x.shape[1]), 0, 1)
