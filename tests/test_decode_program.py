"""The decode step through the real TPU compiler, two layers of the published widths; skipped where libtpu is not."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which holds the TPU compiler, is not installed"
)

NUM_LAYERS = 2

PROGRAM = r"""
import dataclasses, json, re, sys
from infer.engine import Engine
from infer.sampling import SamplingParams
from llama_jax.config import PRESETS
from llama_jax.memory import abstract_model, bytes_a_device
from llama_jax.program import read_program
from llama_jax.schemes import find_scheme
from llama_jax.slices import parse_slice, use_slice

num_layers, cases = map(json.loads, sys.argv[1:])
for preset, scheme, slice_name, mesh, batch, context in cases:
    cfg = dataclasses.replace(PRESETS[preset], num_layers=num_layers)
    with use_slice(parse_slice(slice_name), mesh):
        model = abstract_model(cfg, "bfloat16", find_scheme(scheme) if scheme else None, layout="layers")
        engine = Engine(model, max_seq_len=context, steps_per_dispatch=1)
        params = SamplingParams(max_new_tokens=128)
        _, decode, caches = engine.lower(engine.requests([[0] * (context - 128)] * batch, params))
        program = decode.compile()
    memory, text = program.memory_analysis(), program.as_text()
    exchanges = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    print(json.dumps({
        "copied": read_program(text).copied_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "weights": bytes_a_device(model),
        "cache": bytes_a_device(caches),
        "collectives": len(re.findall(rf" (?:{exchanges})(?:-start)?\(", text)),
        "logits": 4 * max(batch, 2) * cfg.vocab_size,
    }))
"""

# Preset, scheme, slice, mesh, prompts, context, and the collectives of a layer: one after each of its two blocks; where
# query heads that share keys are apart, they are gathered, and the softmax's maximum and sums merged.
CASES = {
    "8b-1": ("llama3.1-8b", None, "v4:1x1x1", "tensor=1", 8, 8192, 0),
    "8b-1-int8": ("llama3.1-8b", "int8", "v4:1x1x1", "tensor=1", 8, 8192, 0),
    "8b-4": ("llama3.1-8b", None, "v4:2x2x1", "tensor=4", 8, 8192, 2),
    "8b-8": ("llama3.1-8b", None, "v4:2x2x2", "tensor=8", 8, 8192, 2),
    "70b-8": ("llama3.1-70b", None, "v4:2x2x2", "tensor=8", 8, 8192, 2),
    "70b-16": ("llama3.1-70b", None, "v4:2x2x4", "tensor=16", 8, 8192, 5),
    "405b-32-128k": ("llama3.1-405b", None, "v4:2x4x4", "tensor=32", 1, 131_072, 5),
}


def printed(*command: str) -> list[dict]:
    """The JSON lines that a command of the project prints, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def programs() -> dict[str, dict]:
    """What the compiler says of each case."""
    cases = [case[:-1] for case in CASES.values()]
    return dict(zip(CASES, printed("-c", PROGRAM, str(NUM_LAYERS), json.dumps(cases)), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_neither_the_cache_nor_a_weight_is_copied(programs, name):
    # But the logits, a few times, for sampling.
    assert programs[name]["copied"] <= 4 * programs[name]["logits"]


@pytest.mark.parametrize("name", CASES)
def test_temporaries_are_a_few_copies_of_the_logits(programs, name):
    found = programs[name]
    # And what is read ahead of weights.
    assert found["temporaries"] <= 8 * found["logits"] + 8 * 2**20


@pytest.mark.parametrize("name", CASES)
def test_the_arguments_are_weights_and_cache_once(programs, name):
    found = programs[name]
    # And where each row stands: a quarter of a MiB.
    assert 0 <= found["arguments"] - found["weights"] - found["cache"] < 2**18


@pytest.mark.parametrize("name", CASES)
def test_collectives_are_as_few_as_the_split_needs(programs, name):
    each = CASES[name][-1]
    # And one for the token's embedding, one for the logits.
    assert programs[name]["collectives"] == (NUM_LAYERS * each + 2 if each else 0)


def test_8b_with_its_whole_context_does_not_fit_a_v4_chip_and_the_report_says_what_does():
    command = ("-m", "infer.generate", "--checkpoint", "llama3.1-8b", "--plan", "v4:1x1x1", "--mesh", "tensor=1")
    (found,) = printed(*command, "--max-seq-len", "131072", "--set", "num_layers=32", "--json")
    assert not found["fits"]
    gib = 2**30
    assert (found["weights_bytes"] / gib, found["cache_bytes"] / gib) == pytest.approx((14.96, 16.0), abs=0.01)
    assert " fits: " in found["advice"]
