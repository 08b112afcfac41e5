"""What a text under a JSON schema costs a batch: rows of the demo decode with none, one or all of them under it.

A row under a schema makes a token a dispatch and waits for its mask; others beside it go on as they did. In turns,
after a round that compiles. On a machine that others use, processor seconds compare where seconds do not.
"""

import argparse
import time

import jax

import llama_jax
from benchmarks.environment import environment, print_results, spread
from infer.engine import Engine
from infer.entry import DEMO
from infer.grammar import Grammars
from infer.sampling import SamplingParams
from infer.sizes import CacheOptions
from llama_jax.devices import open_devices
from llama_jax.entry import run_entry
from llama_jax.tokenizer import load_tokenizer

PROMPT = "def read_config(path):\n"
SCHEMA = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1000}


def decoded(engine: Engine, grammars: Grammars, num_rows: int, num_under: int, tokens: int) -> dict[str, float]:
    """Tokens a second of all rows, processor milliseconds a token, and microseconds of a mask; under a schema: so many.

    Masks are timed again over the first text under the schema, each with the token that was taken.
    """
    requests = engine.requests([PROMPT] * num_rows, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
    for request in requests[:num_under]:
        request.constraint = grammars.json_schema(SCHEMA)
    began, processor = time.perf_counter(), time.process_time()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    made = sum(len(request.result.tokens) for request in requests)
    found = {"tokens_per_second": made / seconds, "processor_ms_a_token": 1e3 * processor / made}
    if num_under:
        constraint, text = grammars.json_schema(SCHEMA), requests[0].result.tokens
        began = time.perf_counter()
        for token in text:
            constraint.mask()
            constraint.accept(token)
        found["mask_microseconds"] = 1e6 * (time.perf_counter() - began) / len(text)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.constraints", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", default=str(DEMO), metavar="C")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    open_devices()
    where, tokenizer = environment(), load_tokenizer(args.checkpoint)
    with llama_jax.use_mesh("data=1"):
        model = llama_jax.load(args.checkpoint, layout="decoding")
    engine = Engine(model, tokenizer, max_batch_size=args.rows, cache=CacheOptions(share_prefixes=False))
    grammars = Grammars(tokenizer, model.cfg.vocab_size)
    found: dict[int, list[dict[str, float]]] = {0: [], 1: [], args.rows: []}
    for _ in range(1 + args.repeats):
        for num_under, values in found.items():
            values.append(decoded(engine, grammars, args.rows, num_under, args.tokens))
    rows = []
    for num_under, (_, *values) in found.items():
        row = {"rows": args.rows, "under_a_schema": num_under}
        row |= {name: spread([value[name] for value in values]) for name in values[0]}
        rows.append(row)
        print(row, flush=True)
    print_results(rows, where, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    run_entry(main)
