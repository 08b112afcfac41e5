"""A step of LoRA over a base in few bits, planned for a slice that need not be here: 70B on one host of eight chips.

Source: QLoRA (arXiv 2305.14314). The base is frozen, in bfloat16 where it is not quantized; adapters, their gradients
and Adam's moments are float32. The invariant: gradients and moments are those of the adapters alone.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, get_mesh, reshard

from llama_jax.config import PRESETS
from llama_jax.devices import model_name, use_compilation_cache
from llama_jax.entry import run_entry
from llama_jax.lora import for_rows, join_adapters, split_adapters, with_fresh_adapter
from llama_jax.memory import abstract_model, bytes_a_device
from llama_jax.model import Llama
from llama_jax.plan import Plan, plan, rows, table
from llama_jax.remat import REMAT_POLICIES
from llama_jax.schemes import SCHEMES, find_scheme
from llama_jax.slices import parse_slice, use_slice
from train.config import OptimizerConfig, PhaseConfig, StageConfig
from train.data.packing import Batch
from train.loss import loss_sum
from train.optimizer import Optimizer, TrainState, make_optimizer
from train.plan import abstract_batch


def step(
    optimizer: Optimizer, remat: str, num_chunks: int, state: TrainState, frozen: Llama, batch: Batch
) -> tuple[TrainState, jax.Array]:
    """One step of the adapters, and its loss."""

    def mean_loss(trained: Llama) -> jax.Array:
        model = join_adapters(trained, frozen)
        adapters = reshard(jnp.zeros(len(batch.tokens), jnp.int32), model.rules("batch"))
        total, count = loss_sum(for_rows(model, adapters), batch, remat=remat, num_chunks=num_chunks)
        return total / count

    loss, grads = jax.value_and_grad(mean_loss)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params, loss=loss)
    return TrainState(jax.tree.map(jnp.add, state.params, updates), opt_state), loss


def plan_step(args: argparse.Namespace) -> Plan:
    """Compile the step for the slice."""
    cfg, target = dataclasses.replace(PRESETS[args.model], max_seq_len=args.seq_len), parse_slice(args.slice)
    tokens = args.rows * args.seq_len
    stage = StageConfig((PhaseConfig(args.seq_len, 1000 * tokens),), tokens, 1e-4, 0.0)
    optimizer = make_optimizer(OptimizerConfig(), stage)
    with use_slice(target, args.mesh):
        everywhere = NamedSharding(get_mesh(), PartitionSpec())
        base = abstract_model(cfg, "bfloat16", find_scheme(args.quantize))

        def adapted(base: Llama) -> tuple[Llama, Llama]:
            return split_adapters(with_fresh_adapter(base, jax.random.key(0), rank=args.rank))

        trained, frozen = jax.eval_shape(adapted, base)
        state = TrainState(trained, jax.eval_shape(optimizer.init, trained))
        state = jax.tree.map(lambda x: x.update(sharding=x.sharding or everywhere), state)
        batch = abstract_batch(args.rows, args.seq_len, base.rules)
        run = jax.jit(functools.partial(step, optimizer, args.remat, args.loss_chunks), donate_argnums=0)
        parts = {"base": bytes_a_device(frozen), "adapters": bytes_a_device(state), "batch": bytes_a_device(batch)}
        return plan(run.lower(state, frozen, batch), target, parts=parts, hlo=args.hlo)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_qlora", description="A planned step of QLoRA.")
    parser.add_argument("--model", default="llama3.1-70b", choices=PRESETS, help="default: %(default)s")
    parser.add_argument("--slice", default="v5e:2x4", help="default: %(default)s")
    parser.add_argument("--mesh", default="fsdp=-1", help="default: %(default)s")
    parser.add_argument("--quantize", default="nf4", choices=SCHEMES, help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; default: %(default)s")
    parser.add_argument("--rows", type=int, default=8, help="of a batch; default: %(default)s")
    parser.add_argument("--seq-len", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--remat", default="full", choices=REMAT_POLICIES, help="default: %(default)s")
    parser.add_argument("--loss-chunks", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--hlo", type=Path, metavar="F", help="write the compiled module's text there")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    use_compilation_cache()
    found = plan_step(args)
    if args.json:
        print(json.dumps(dataclasses.asdict(found)))
    else:
        shape = f"{args.rows} rows of {args.seq_len:,}, {args.quantize}, rank {args.rank}, remat {args.remat}"
        print(table([(f"{model_name(PRESETS[args.model])}, {found.slice}, {found.mesh}", "", shape), *rows(found)]))


if __name__ == "__main__":
    run_entry(main)
