"""AdamW, its learning-rate schedule, and the jitted training step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import DTypeLike

from llama_jax.model import Llama
from train.config import OptimizerConfig, StageConfig
from train.data import Batch
from train.loss import loss_sum

# An optax.GradientTransformation; optax's own type does not admit a module as its tree of parameters.
Optimizer = Any


class TrainState(NamedTuple):
    """Parameters in float32 and the optimizer's state; mu and nu are Llamas split like the parameters."""

    params: Llama
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """Mean loss in nats a token, norm of the gradient before clipping, number of tokens in the loss."""

    loss: Array
    grad_norm: Array
    tokens: Array


def learning_rate_schedule(stage: StageConfig) -> optax.Schedule:
    """Linear warm-up, then a cosine to the final rate at the last step of the stage; steps count from 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if stage.warmup_steps else stage.learning_rate,
        peak_value=stage.learning_rate,
        warmup_steps=stage.warmup_steps,
        decay_steps=max(sum(stage.phase_steps()), stage.warmup_steps + 1),
        end_value=stage.final_learning_rate,
    )


def make_optimizer(cfg: OptimizerConfig, stage: StageConfig) -> Optimizer:
    """Clipping, Adam, weight decay on all but the norms' scales, and the stage's schedule."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(cfg.weight_decay, mask=_is_decayed),
        optax.scale_by_learning_rate(learning_rate_schedule(stage)),
    )


def _is_decayed(params: Llama) -> Llama:
    return jax.tree.map_with_path(lambda path, _: "scale" not in jax.tree_util.keystr(path), params)


def train_step(
    optimizer: Optimizer,
    compute_dtype: DTypeLike,
    remat: str,
    num_chunks: int,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, StepMetrics]:
    """One optimizer step; the loss is the mean over the batch's tokens, however the rows are packed."""

    def mean_loss(params: Llama) -> tuple[Array, Array]:
        model = jax.tree.map(lambda w: w.astype(compute_dtype), params)
        total, tokens = loss_sum(model, batch, remat=remat, num_chunks=num_chunks)
        return total / jnp.maximum(tokens, 1.0), tokens

    (loss, tokens), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    return TrainState(params, opt_state), StepMetrics(loss, optax.tree.norm(grads), tokens)
