"""The engine alone, stepped as the server steps it: what `benchmarks.serve` holds the server against."""

import os
import sys

from benchmarks.worker import answer_requests


def main(checkpoint: str, context: str, rows: str) -> None:
    """Answer requests for one checkpoint."""
    import llama_jax
    from infer.engine import Engine, SamplingParams
    from llama_jax.devices import open_devices

    open_devices()
    with llama_jax.use_mesh():
        model = llama_jax.load(checkpoint, dtype="float32", layout="decoding")
    engine = Engine(model, llama_jax.load_tokenizer(checkpoint), max_seq_len=int(context), max_batch_size=int(rows))

    def run(prompts: list[str], tokens: int) -> dict:
        before = sum(os.times()[:2])
        for request in engine.requests(prompts, SamplingParams(max_new_tokens=tokens)):
            engine.add(request)
        while engine.has_work:
            engine.step()
        return {"processor_seconds": sum(os.times()[:2]) - before}

    answer_requests({"run": run})


if __name__ == "__main__":
    main(*sys.argv[1:])
