"""Generation planned: the programs of an engine with real weights, with the bytes that they take."""

import dataclasses
import json
import math

import jax
import pytest
from flax import nnx

import infer.plan
from infer.batch import main as batch
from infer.engine import Engine
from infer.generate import main as generate
from infer.serve import main as serve
from infer.sizes import CacheOptions
from infer.speculation import DraftModel
from llama_jax.config import PRESETS
from llama_jax.mesh import use_mesh
from llama_jax.plan import plan
from tests.test_plan import CPU8, KEYS
from tests.tiny import TINY

DRAFT = dataclasses.replace(TINY, num_layers=1)


@pytest.mark.parametrize("has_draft", [False, True])
def test_generation_plans_the_engines_own_programs(has_draft, monkeypatch):
    lowered = []
    monkeypatch.setattr(infer.plan, "plan", lambda *args, **known: lowered.append(args[0]) or plan(*args, **known))
    draft, guesses = ((DRAFT, "float32"), 2) if has_draft else (None, 0)
    work = infer.plan.Workload(TINY, "float32", 2, 24, 32, draft=draft, num_draft_tokens=guesses)
    found = infer.plan.plan_generation(work, CPU8, "tensor=2")
    assert found.weights_bytes == found.decode.parts["weights"]
    cache, drafted = (2 * cfg.cache_bytes_per_token(4) * 32 // 2 for cfg in (TINY, DRAFT))
    looked_up = 4 * TINY.vocab_size * TINY.embed_dim // 2
    read = found.weights_bytes - looked_up + cache
    if has_draft:
        cache, read = cache + drafted, read + 3 * (found.decode.parts["draft"] - looked_up + drafted)
    assert (found.cache_bytes, found.decode_read_bytes) == (cache, read)
    assert found.largest_context == TINY.max_seq_len
    with use_mesh("tensor=2"):

        def init(cfg):
            return jax.jit(lambda: infer.plan.Llama(cfg, rngs=nnx.Rngs(0), layout="layers"))()

        engine = Engine(init(TINY), max_seq_len=32, speculation=DraftModel(init(DRAFT), 2) if has_draft else None)
        engine.generate([[1] * 24] * 2, infer.plan.SamplingParams(max_new_tokens=8))
    run = [compiled.memory_analysis().temp_size_in_bytes for compiled in engine._compiled.values()]
    assert run == [program.compile().memory_analysis().temp_size_in_bytes for program in lowered]


def test_quantized_weights_are_planned_with_the_bytes_that_they_take():
    work = infer.plan.Workload(TINY, "float32", 2, 24, 32, quantize="int8")
    found = infer.plan.plan_generation(work, CPU8, "tensor=2")
    narrow = sum(TINY.num_layers * math.prod(shape) for shape in ((128, 64), (2, 32, 64), (64, 128), (3, 64, 160)))
    floats = 2 * TINY.vocab_size * TINY.embed_dim + (2 * TINY.num_layers + 1) * TINY.embed_dim
    assert found.weights_bytes == pytest.approx((narrow + 4 * floats) / 2, rel=0.1)  # and their scales
    assert found.disk_bytes == pytest.approx(narrow + 4 * floats, rel=0.1)


def test_a_server_is_planned_with_its_largest_batch_and_pool(monkeypatch):
    lowered = []
    monkeypatch.setattr(infer.plan, "plan", lambda *args, **known: lowered.append(args[0]) or plan(*args, **known))
    options = {"max_batch_size": 4, "cache": CacheOptions(prefill_chunk=16)}
    work = infer.plan.Workload(TINY, "float32", 4, 31, 32, options, is_served=True)
    found = infer.plan.plan_generation(work, CPU8, "tensor=2")
    assert (found.batch, found.context, found.cache_tokens) == (4, 32, 4 * 32)
    with use_mesh("tensor=2"):
        model = jax.jit(lambda: infer.plan.Llama(TINY, rngs=nnx.Rngs(0), layout="layers"))()
        rounds = Engine(model, max_seq_len=32, **options)._rounds  # pyright: ignore[reportArgumentType]
        rounds.open()
        programs, batches = rounds.programs, rounds._batches
        decode = [programs._lower(programs._decode_call(b, 1)) for b in batches.every_decode() if b.allowed is None]
    assert lowered[1].as_text() == decode[-1].as_text()


SERVED = ["--max-batch-size", "4"]


@pytest.mark.parametrize(
    ("entry", "options"),
    [(generate, ["--max-new-tokens", "8"]), (serve, SERVED), (batch, ["in.jsonl", "out.jsonl", *SERVED])],
)
def test_a_preset_is_planned_without_its_weights(entry, options, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    entry(["--checkpoint", "tiny", "--plan", "cpu:2", "--max-seq-len", "32", "--mesh", "tensor=2", "--json", *options])
    found = json.loads(capsys.readouterr().out)
    assert set(found["sources"]) <= set(found)
    assert (found["context"], found["dtype"], found["decode"]["mesh"]) == (32, "float32", "tensor=2")
    assert set(KEYS) <= set(found)
    assert found["matmul_flops_per_chip"] == found["decode"]["matmul_flops_per_chip"]
    assert found["hbm_peak_bytes"] == found["hbm_arguments_bytes"] + found["hbm_temporaries_bytes"]


def test_weights_that_no_mesh_can_hold_are_refused_with_the_smallest_slice_that_would():
    argv = ["--checkpoint", "llama3.1-70b", "--plan", "v5e:2x2"]
    for entry, options in ((generate, ["--mesh", "tensor=4"]), (serve, [])):
        with pytest.raises(ValueError, match="the smallest slice that holds them is v5e:4x4"):
            entry([*argv, *options])
