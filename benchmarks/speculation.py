"""What speculation gains: the demo decodes a text that repeats itself and one that does not, with guesses and without.

In turns, after a round that compiles. On a machine that others use, processor seconds compare where seconds do not.
"""

import argparse
import time

import jax

import llama_jax
from benchmarks.environment import environment, print_results, spread
from infer.engine import Engine
from infer.entry import DEMO
from infer.sampling import SamplingParams
from infer.sizes import CacheOptions
from infer.speculation import DraftModel, Ngrams
from llama_jax.devices import open_devices
from llama_jax.entry import run_entry
from llama_jax.tokenizer import load_tokenizer

# Code that says one thing over and over, and the beginning of some that need not.
PROMPTS = {
    "repeats": "".join(f"    self.value_{name} = options.get('value_{name}')\n" for name in "abcdefgh"),
    "new": 'def read_config(path):\n    """',
}


def measured(engine: Engine, prompts: list[list[int]], tokens: int) -> tuple[float, float, float]:
    """Tokens a second of decoding, processor milliseconds a token, and the share of guesses that were right."""
    before = time.process_time()
    engine.generate(prompts, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
    milliseconds = 1e3 * (time.process_time() - before) / (tokens * len(prompts))
    run = engine.throughput
    return run.decode_tokens_per_second, milliseconds, run.accepted_tokens / max(1, run.draft_tokens)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", default=str(DEMO), metavar="C")
    parser.add_argument("--draft", metavar="C", help="a draft model beside n-grams")
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--texts", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    open_devices()
    where, tokenizer = environment(), load_tokenizer(args.checkpoint)
    with llama_jax.use_mesh("data=1"):
        model = llama_jax.load(args.checkpoint, layout="decoding")
        guessers = {"none": None, "ngram": Ngrams(args.num_draft_tokens)}
        if args.draft:
            draft = llama_jax.load(args.draft, layout="decoding")
            guessers["draft"] = DraftModel(draft, args.num_draft_tokens)
    cache = CacheOptions(share_prefixes=False)  # each round computes its prompts
    engines = {name: Engine(model, cache=cache, speculation=guesser) for name, guesser in guessers.items()}
    rows = []
    for text, num_rows in ((text, n) for text in args.texts for n in args.rows):
        prompts = [tokenizer.encode(PROMPTS[text], bos=True)] * num_rows
        found = {name: [] for name in engines}
        for _ in range(1 + args.repeats):
            for name, engine in engines.items():
                found[name].append(measured(engine, prompts, args.tokens))
        for name, values in found.items():
            speeds, milliseconds, rates = zip(*values[1:], strict=True)
            times = [plain[1] / own[1] for plain, own in zip(found["none"][1:], values[1:], strict=True)]
            row = {"text": text, "rows": num_rows, "guesses": name, "tokens_per_second": spread(speeds)}
            row |= {"processor_ms_a_token": spread(milliseconds), "times_as_fast_by_processor": spread(times)}
            rows.append(row | {"accepted": round(rates[-1], 3)})
            print(row, f"accepted {rates[-1]:.0%}", flush=True)
    print_results(rows, where, device=jax.devices()[0].device_kind)


if __name__ == "__main__":
    run_entry(main)
