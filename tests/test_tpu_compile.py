"""The training step through the real TPU compiler, for slices that are not here; skipped where libtpu is not."""

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

# Compiling for a TPU on a host that has none: no question to a metadata server, no lock between processes.
OFF_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

PROGRAM = """
import dataclasses, functools, json, re, sys
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from llama_jax.mesh import make_mesh
from llama_jax.model import Llama
from tests.tiny import TINY
from train.config import read_config
from train.data.packing import Batch
from train.optimizer import TrainState, make_optimizer, train_step

slice_name, mesh_spec, remat, head_dim = sys.argv[1:]
cfg = dataclasses.replace(
    TINY, num_layers=2, embed_dim=256, mlp_dim=512, num_heads=4, num_kv_heads=2, head_dim=int(head_dim)
)
config = read_config("demo")
optimizer = make_optimizer(config.optimizer, config.stage["1"])
# A v4 chip is two cores that work as one device.
one_device = dict(chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), num_slices=1)
topology = topologies.get_topology_desc(slice_name, "tpu", **(one_device if "v4" in slice_name else {}))
mesh = make_mesh(mesh_spec, topology.devices)

def init():
    params = Llama(cfg, rngs=nnx.Rngs(0))
    return TrainState(params, optimizer.init(params))

with jax.set_mesh(mesh):
    state = jax.eval_shape(init)
    sharding = NamedSharding(mesh, state.params.rules("batch", "sequence"))
    ids, mask = (jax.ShapeDtypeStruct((4, 2048), dtype, sharding=sharding) for dtype in (jnp.int32, jnp.float32))
    how = {"remat": remat, "num_chunks": 4}
    step = jax.jit(functools.partial(train_step, optimizer, jnp.bfloat16, **how), donate_argnums=0)
    program = step.lower(state, Batch(ids, ids, ids, ids, mask)).compile()
calls = [line for line in program.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
names = [re.search(r"splash_mha_(fwd|dq|dkv)", line)[1] for line in calls]
print(json.dumps({"kind": topology.devices[0].device_kind, "kernels": sorted(names)}))
"""


def compiled(*arguments: str) -> dict:
    """The kind of device and the kernels in the program of one training step."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=os.environ | OFF_TPU,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("slice_name", "mesh", "remat", "head_dim", "kind", "forward"),
    [
        ("v4:2x2x1", "fsdp=2,tensor=2", "full", "128", "TPU v4", 2),
        ("v5e:2x2", "context=2,fsdp=2", "dots", "64", "TPU v5 lite", 1),
    ],
)
def test_a_training_step_compiles_with_splash_attention(slice_name, mesh, remat, head_dim, kind, forward):
    """The forward kernel runs a second time for the gradient unless the remat policy saves what it gave."""
    found = compiled(slice_name, mesh, remat, head_dim)
    assert found == {"kind": kind, "kernels": ["dkv", "dq"] + ["fwd"] * forward}
