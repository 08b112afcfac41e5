"""llama_jax's side of every measurement: the engine and the training step that the commands run."""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax
from benchmarks.shapes import OPTIMIZER, constant_rate_stage, random_tokens
from benchmarks.worker import answer_requests
from infer.engine import Engine
from infer.sampling import SamplingParams
from infer.sizes import CacheOptions
from llama_jax.devices import open_devices
from llama_jax.model import Llama
from train.data.packing import Batch
from train.device import put_batch
from train.optimizer import TrainState, make_optimizer, train_step


class Inference:
    """One engine for every request, so that only a new bucket compiles."""

    def __init__(self, model: Llama):
        self._engine = Engine(model, cache=CacheOptions(share_prefixes=False))  # every prompt is computed

    def prefill(self, rows: int, length: int) -> dict:
        """From tokens on the host to the first new token of every row on the host."""
        return self._run(rows, length, 1)

    def decode(self, rows: int, length: int, steps: int) -> dict:
        """The steps after the first token, greedily; the prompts are prefilled off the clock."""
        return self._run(rows, length, steps + 1)

    def _run(self, rows: int, length: int, new_tokens: int) -> dict:
        engine = self._engine
        prompts = random_tokens(engine.cfg.vocab_size, rows, length).tolist()
        results = engine.generate(prompts, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
        measured = engine.throughput
        return {
            "seconds": measured.decode_seconds if new_tokens > 1 else measured.prefill_seconds,
            "compile_seconds": measured.compile_seconds,
            "answer": [result.tokens for result in results],
        }


class Training:
    """One optimizer step a request, on the same batch, which uses up the params given."""

    def __init__(self, params: Llama, rows: int, length: int, **how: Any):
        """how: compute_dtype, remat and num_chunks of train_step."""
        optimizer = make_optimizer(OPTIMIZER, constant_rate_stage(length))
        tokens = random_tokens(params.cfg.vocab_size, rows, length + 1)
        positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
        ones = np.ones((rows, length), np.int32)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], positions, ones, ones.astype(np.float32))
        self._batch = put_batch(batch, params.rules)
        self._state = TrainState(params, jax.jit(optimizer.init)(params))
        step = jax.jit(functools.partial(train_step, optimizer, **how), donate_argnames="state")
        began = time.perf_counter()
        self._step = step.lower(state=self._state, batch=self._batch).compile()
        self._compile_seconds = time.perf_counter() - began

    def step(self) -> dict:
        began = time.perf_counter()
        self._state, metrics = self._step(state=self._state, batch=self._batch)
        jax.block_until_ready(self._state)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "compile_seconds": self._compile_seconds, "answer": float(metrics.loss)}


def product_limits(dtype: str, size: int, rows: int) -> dict:
    """Seconds of the fastest of five: a square product, and a matrix [rows, rows] times a vector."""

    product = jax.jit(jnp.matmul)

    def seconds(*shapes: tuple[int, ...]) -> float:
        operands = [jnp.full(shape, 0.5, dtype) for shape in shapes]
        times = []
        for _ in range(6):
            began = time.perf_counter()
            product(*operands).block_until_ready()
            times.append(time.perf_counter() - began)
        return min(times[1:])

    return {"product_seconds": seconds((size, size), (size, size)), "vector_seconds": seconds((rows, rows), (rows,))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    open_devices()
    jax.set_mesh(llama_jax.make_mesh("data=1"))

    @functools.cache
    def inference() -> Inference:
        return Inference(llama_jax.load(args.checkpoint, dtype=args.dtype, layout="decoding"))

    @functools.cache
    def training(rows: int, length: int) -> Training:
        params = llama_jax.load(args.checkpoint, dtype="float32")
        return Training(params, rows, length, compute_dtype=jnp.dtype(args.dtype), remat="dots", num_chunks=1)

    answer_requests(
        {
            "prefill": lambda **request: inference().prefill(**request),
            "decode": lambda **request: inference().decode(**request),
            "train": lambda **request: training(**request).step(),
            "limits": lambda **request: product_limits(args.dtype, **request),
        }
    )


if __name__ == "__main__":
    main()
