"""The kernels over pages give what the gather gives; on TPUs, in the interpreter and through the real compiler."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ref_ragged_paged_attention

from llama_jax import attention
from llama_jax.attention import cpu_paged_attention, gathered_attention
from llama_jax.cache import PagedCache, init_pages
from llama_jax.kernels import paged_tpu
from llama_jax.kernels.paged import Pages, write_pages
from llama_jax.mesh import sharding_rules, use_mesh
from tests.tiny import TINY

AFTER_ALL = 2**30


def filled(dtype, *, num_kv_heads=2, head_dim=128, page_size=16, table=None, seed=0):
    """Pools that random keys and values were written into, garbage elsewhere; the table int32 [B, N]; both exact."""
    table = jnp.asarray([[3, 0, 6, -1], [5, 1, -1, -1], [2, 7, 4, 8]] if table is None else table, jnp.int32)
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = 9, num_kv_heads, page_size, head_dim
    narrow = jnp.dtype(dtype).itemsize == 1
    garbage = (100 * jax.random.normal(keys[i], shape, jnp.float32) for i in range(2))
    pages = Pages(*(x.astype(dtype) for x in garbage), *(jnp.ones(shape[:3]),) * 2 * narrow)
    length = table.shape[1] * page_size
    k, v = jax.random.normal(keys[2], (2, len(table), length, num_kv_heads, head_dim), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(length), (len(table), length))
    return write_pages(pages, k, v, positions, table), table


def queries(positions, *, num_kv_heads=2, num_groups=4, head_dim=128, dtype=jnp.float32):
    positions = jnp.asarray(positions, jnp.int32)
    shape = (*positions.shape, num_kv_heads, num_groups, head_dim)
    return jax.random.normal(jax.random.key(7), shape, jnp.float32).astype(dtype), positions


def assert_equal_where_seen(got, expected, positions, tolerance=2e-6):
    """Rows that are off and padding may be anything finite."""
    tokens = ((positions >= 0) & (positions < AFTER_ALL))[..., None, None, None]
    assert np.isfinite(np.asarray(got, np.float32)).all()
    got, expected = (np.where(tokens, np.asarray(x, np.float32), 0) for x in (got, expected))
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


DECODE = [[40], [-1], [63]]
CHUNK = [[*range(20, 45)], [*range(7), *[AFTER_ALL] * 18], [-1] * 25]


def no_kernel(*_, **__):
    """In place of the gather where the kernel is to run."""
    pytest.fail("the kernel did not take it")


on_tpu = functools.partial(paged_tpu.paged_attention, otherwise=no_kernel, interpret=True)


@pytest.mark.parametrize("positions", [DECODE, CHUNK], ids=["decode", "chunk"])
@pytest.mark.parametrize("heads", [(2, 4, 128), (1, 8, 64), (4, 1, 64)], ids=str)
def test_the_tpu_kernel_gives_what_the_gather_gives(positions, heads):
    """Heads of 128 and, as in the 1B model, of 64; groups that fill no tile; several pages a step."""
    num_kv_heads, num_groups, head_dim = heads
    pages, table = filled(jnp.float32, num_kv_heads=num_kv_heads, head_dim=head_dim)
    q, positions = queries(positions, num_kv_heads=num_kv_heads, num_groups=num_groups, head_dim=head_dim)
    expected = gathered_attention(q, pages, table, positions)
    assert_equal_where_seen(on_tpu(q, pages, table, positions), expected, positions)


@pytest.mark.parametrize(("dtype", "positions"), [(jnp.int8, CHUNK), (jnp.float8_e4m3fn, DECODE)])
def test_the_tpu_kernel_reads_narrow_pages_by_their_scales(dtype, positions):
    pages, table = filled(dtype)
    q, positions = queries(positions)
    expected = gathered_attention(q, pages, table, positions)
    assert_equal_where_seen(on_tpu(q, pages, table, positions), expected, positions)


def test_the_tpu_kernel_takes_blocks_of_queries_and_one_page_a_step(monkeypatch):
    monkeypatch.setattr(paged_tpu, "_MAX_PAGES", 1)
    monkeypatch.setattr(paged_tpu, "_QUERY_BYTES", 1)
    pages, table = filled(jnp.float32)
    q, positions = queries(CHUNK)
    expected = gathered_attention(q, pages, table, positions)
    assert_equal_where_seen(on_tpu(q, pages, table, positions), expected, positions)


def test_the_tpu_kernel_rounds_bfloat16_as_little_as_the_gather():
    pages, table = filled(jnp.bfloat16)
    q, positions = queries(DECODE, dtype=jnp.bfloat16)
    exact = gathered_attention(
        q.astype(jnp.float32), jax.tree.map(lambda x: x.astype(jnp.float32), pages), table, positions
    )
    assert_equal_where_seen(on_tpu(q, pages, table, positions), exact, positions, tolerance=0.02)


def test_the_gather_and_the_tpu_kernel_give_what_the_reference_that_ships_with_jax_gives():
    """Its pages hold keys and values alternately, its queries end at the end of their row."""
    pages, table = filled(jnp.float32)
    q, positions = queries([[*range(30, 40)], [*range(10)], [*range(54, 64)]])
    combined = jnp.stack([pages.k, pages.v], axis=2).reshape(9, 4, 16, 128).swapaxes(1, 2)
    expected = ref_ragged_paged_attention(
        q.reshape(30, 8, 128),
        combined,
        positions[:, -1] + 1,
        jnp.maximum(table, 0),
        jnp.arange(4, dtype=jnp.int32) * 10,
        jnp.array([3]),
        sm_scale=128**-0.5,
    ).reshape(q.shape)
    for attend in (gathered_attention, on_tpu):
        assert_equal_where_seen(attend(q, pages, table, positions), expected, positions)


def test_blocks_of_queries_bound_the_scores_and_change_nothing(monkeypatch):
    pages, table = filled(jnp.float32)
    q, positions = queries(CHUNK)
    expected = gathered_attention(q, pages, table, positions)
    monkeypatch.setattr("llama_jax.attention._MAX_SCORES", 3 * 8 * 64 * 4)
    got = gathered_attention(q, pages, table, positions)
    np.testing.assert_allclose(got[:2], expected[:2], rtol=1e-6, atol=1e-6)
    text = jax.jit(gathered_attention).lower(q, pages, table, positions).as_text()
    assert "tensor<3x2x16x64xf32>" in text and "tensor<3x2x100x64xf32>" not in text


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_tiles_give_what_the_gather_gives_and_skip_what_stands_behind_a_chunk(dtype, monkeypatch):
    pages, table = filled(dtype, page_size=128, head_dim=16)
    q, positions = queries([[*range(50, 190)], [*range(7), *[AFTER_ALL] * 133], [-1] * 140], head_dim=16)
    expected = gathered_attention(q, pages, table, positions)
    spoiled = "k" if pages.k_scale is None else "k_scale"
    behind = pages._replace(**{spoiled: getattr(pages, spoiled).at[jnp.array([6, 4, 8])].set(jnp.nan)})
    monkeypatch.setattr("llama_jax.attention.gathered_attention", no_kernel)
    assert_equal_where_seen(cpu_paged_attention(q, behind, table, positions), expected, positions)


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,context=2,tensor=2"])
def test_the_tpu_kernel_merges_softmaxes_over_devices_that_share_a_page(mesh, monkeypatch):
    """tensor=8 splits the slots of a page over query groups, the other over `context`."""
    positions = jnp.array([[21], [9], [31], [-1]], jnp.int32)

    def attended() -> np.ndarray:
        rules = sharding_rules(TINY)
        pages = init_pages(TINY, rules, 16, 8, dtype=jnp.float32)[0]
        cache = PagedCache(pages, jnp.array([[5, 0, 3, -1], [1, 7, -1, -1], [2, 6, 4, 0], [7, 1, 5, 3]]))
        k, v = jax.random.normal(jax.random.key(0), (2, 4, 32, 2, 16))
        q = jax.random.normal(jax.random.key(1), (4, 1, 2, 4, 16))
        split = rules("batch", None, "kv_heads", "q_groups", None)
        stored = jnp.broadcast_to(jnp.arange(32), (4, 32))
        run = jax.jit(lambda q: cache.update(k, v, stored).attend(jax.sharding.reshard(q, split), positions))
        return np.asarray(run(q))

    with use_mesh(mesh):
        expected = attended()
        monkeypatch.setattr(attention, "_paged_kernel", lambda device: on_tpu)
        assert_equal_where_seen(attended(), expected, np.asarray(positions))


def test_pages_too_large_for_the_tpu_kernel_go_to_the_gather():
    pages, table = filled(jnp.float32, page_size=1024)
    q, positions = queries(DECODE)
    otherwise = functools.partial(paged_tpu.paged_attention, otherwise=gathered_attention)
    expected = gathered_attention(q, pages, table, positions)
    np.testing.assert_array_equal(otherwise(q, pages, table, positions), expected)


needs_triton = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@needs_triton
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("heads", [(2, 4, 128), (2, 3, 16)], ids=str)
def test_the_gpu_kernel_gives_what_the_gather_gives(dtype, heads):
    """In the interpreter; lowered for CUDA too, where jax does so without a GPU: from 0.11 on it does not."""
    paged_gpu = pytest.importorskip("llama_jax.kernels.paged_gpu")
    num_kv_heads, num_groups, head_dim = heads
    pages, table = filled(dtype, num_kv_heads=num_kv_heads, head_dim=head_dim)
    q, positions = queries(DECODE, num_kv_heads=num_kv_heads, num_groups=num_groups, head_dim=head_dim)
    kernel = functools.partial(paged_gpu.paged_attention, otherwise=no_kernel)
    got = functools.partial(kernel, interpret=True)(q, pages, table, positions)
    assert_equal_where_seen(got, gathered_attention(q, pages, table, positions), positions)
    if jax.__version_info__ >= (0, 11):
        return
    text = jax.jit(kernel).trace(q, pages, table, positions).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text and "transpose" not in text.split("triton")[0], "and the pools are not moved before it"


@needs_triton
@pytest.mark.parametrize(
    "change",
    [
        {"positions": CHUNK},
        {"page_size": 8},
        {"head_dim": 48},
        {"page_size": 256},
        {"table": [[3, 0, 6], [5, 1, 7], [2, 4, 8]]},
    ],
    ids=["several queries", "short page", "odd head", "large page", "odd table"],
)
def test_what_the_gpu_kernel_has_not_goes_to_the_gather(change):
    paged_gpu = pytest.importorskip("llama_jax.kernels.paged_gpu")
    positions = change.pop("positions", [[20], [-1], [30]])
    pages, table = filled(jnp.float32, **change)
    q, positions = queries(positions, head_dim=change.get("head_dim", 128))
    got = paged_gpu.paged_attention(q, pages, table, positions, otherwise=gathered_attention)
    np.testing.assert_array_equal(got, gathered_attention(q, pages, table, positions))


def test_the_kernel_follows_the_device_of_the_mesh():
    def picked(platform, kind=""):
        device = type("Device", (), {"platform": platform, "device_kind": kind})
        return getattr(attention._paged_kernel(device), "func", attention._paged_kernel(device)).__module__

    assert picked("cpu") == picked("gpu", "NVIDIA A100-SXM4-80GB") == "llama_jax.attention"
    assert picked("tpu", "TPU v4") == "llama_jax.kernels.paged_tpu"


PROGRAM = r"""
import dataclasses, json, re, sys
import jax, jax.numpy as jnp
from flax import nnx
from llama_jax.cache import PagedCache, init_pages
from llama_jax.config import PRESETS
from llama_jax.model import Llama
from llama_jax.slices import parse_slice, use_slice

def run(model, pages, table, tokens, positions):
    caches = tuple(PagedCache(pool, table) for pool in pages)
    hidden, caches = model.extend(tokens, positions, caches)
    return hidden, tuple(cache.pages for cache in caches)

for slice_name, mesh_spec, preset, dtype, length in json.loads(sys.argv[1]):
    cfg = dataclasses.replace(PRESETS[preset], num_layers=1, vocab_size=1024)
    with use_slice(parse_slice(slice_name), mesh_spec) as mesh:
        init = lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), Llama(cfg, rngs=nnx.Rngs(0), layout="layers"))
        model = jax.eval_shape(init)
        pages = jax.eval_shape(lambda: init_pages(cfg, model.rules, 512, 128, dtype=dtype))
        rows = jax.sharding.NamedSharding(mesh, model.rules("batch", None))
        ids = [jax.ShapeDtypeStruct((4, n), jnp.int32, sharding=rows) for n in (16, length, length)]
        program = jax.jit(run, donate_argnums=1).lower(model, pages, *ids).compile()
    text, pool = program.as_text(), pages[0].k.sharding.shard_shape(pages[0].k.shape)
    made = rf" = \w+\[{','.join(map(str, pool))}\]\S* ([a-z-]+)\("
    print(json.dumps({
        "kernels": len(re.findall(r"%paged_attention\S* = .*custom-call", text)),
        "copies": sum("copy" in maker or maker == "transpose" for maker in re.findall(made, text)),
    }))
"""

# Slice, mesh, preset, dtype of the cache, tokens of a row: decode and a chunk; 1B with its heads of 64, 405B with
# query groups on other devices than their keys.
CASES = [
    ("v4:1x1x1", "tensor=1", "llama3.1-8b", "bfloat16", 1),
    ("v4:1x1x1", "tensor=1", "llama3.1-8b", "int8", 1),
    ("v4:1x1x1", "tensor=1", "llama3.2-1b", "bfloat16", 1),
    ("v4:2x2x4", "tensor=16", "llama3.1-405b", "bfloat16", 1),
    ("v4:2x2x1", "context=2,tensor=2", "llama3.1-8b", "bfloat16", 256),
    ("v5p:2x2x1", "tensor=4", "llama3.1-8b", "float8_e4m3fn", 256),
    ("v5e:2x2", "data=2,tensor=2", "llama3.2-1b", "int8", 1),
]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
def test_the_real_compiler_runs_the_kernel_on_the_pool_as_it_lies():
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(each["kernels"], each["copies"]) for each in found] == [(1, 0)] * len(CASES)
