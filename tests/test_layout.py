"""Reading into the model's arrays: each stored byte once over all processes, in blocks, in bounded memory."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import llama_jax
from llama_jax.checkpoint import layout, load_opened, open_checkpoint
from llama_jax.checkpoint.layout import reading_spec
from llama_jax.checkpoint.names import StoredWeight
from llama_jax.checkpoint.safetensors import num_bytes
from llama_jax.model import Llama
from tests.processes import free_address, outputs, start_python
from tests.tiny import TINY

CONFIG = dataclasses.replace(TINY, num_layers=2, head_dim=8)
LAYOUTS = ("stacked", "layers")


class CountingSource:
    """A source that notes the name and the bytes of each slice that is asked for."""

    def __init__(self, source):
        self.tensors, self._source, self.reads = source.tensors, source, []

    def read(self, name, index=None):
        values = self._source.read(name, index)
        self.reads.append((name, values.nbytes))
        return values


def counted(path) -> tuple[Any, CountingSource]:
    checkpoint = open_checkpoint(path)
    source = CountingSource(checkpoint.source)
    return dataclasses.replace(checkpoint, source=source), source


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """One random model in every form: {form: directory}."""
    directory = tmp_path_factory.mktemp("saved")
    with llama_jax.use_mesh("data=1"):
        model = jax.jit(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))()
        for form in ("hf", "meta", "orbax"):
            llama_jax.save(model, directory / form, form)
    return {form: directory / form for form in ("hf", "meta", "orbax")}


@pytest.fixture(scope="module")
def arrays(saved) -> dict[str, dict[str, np.ndarray]]:
    """Every whole array of the model: {layout: {path: values}}."""
    with llama_jax.use_mesh("data=1"):
        return {name: leaves(llama_jax.load(saved["hf"], layout=name)) for name in LAYOUTS}  # pyright: ignore


def leaves(model) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(model)}


# One process


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "fsdp=2,tensor=4", "data=2,context=2,tensor=2"])
def test_one_process_reads_each_byte_once_however_many_devices_want_it(saved, arrays, mesh, name):
    checkpoint, source = counted(saved["hf"])
    with llama_jax.use_mesh(mesh):
        loaded = leaves(load_opened(checkpoint, layout=name))
    assert sum(size for _, size in source.reads) == sum(map(num_bytes, source.tensors.values()))
    assert all(np.array_equal(loaded[path], array) for path, array in arrays[name].items())


@pytest.mark.parametrize("mesh", ["data=1", "fsdp=2,tensor=4"])
def test_blocks_and_tiles_that_do_not_divide_a_part_give_the_same_arrays(saved, arrays, mesh, monkeypatch):
    monkeypatch.setattr(layout, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(layout, "_TILE", 7)
    checkpoint, source = counted(saved["hf"])
    with llama_jax.use_mesh(mesh):
        loaded = leaves(load_opened(checkpoint))
    assert max(size for _, size in source.reads) <= 7 * 4 * CONFIG.mlp_dim
    assert all(np.array_equal(loaded[path], array) for path, array in arrays["stacked"].items())


def test_a_leaf_is_on_the_devices_before_the_next_is_read_where_the_host_holds_one(saved, monkeypatch):
    monkeypatch.setattr(layout, "_HOST_BYTES", 1)
    checkpoint, source = counted(saved["hf"])
    with llama_jax.use_mesh("data=8"):
        load_opened(checkpoint)
    kinds = [name.replace(".0.", ".").replace(".1.", ".") for name, _ in source.reads]
    changes = [kind for i, kind in enumerate(kinds) if kinds[i - 1 : i] != [kind]]
    assert len(changes) == len(set(kinds)) == 12


def test_a_read_that_fails_ends_the_load_with_its_own_error(saved):
    checkpoint, source = counted(saved["hf"])

    def read(name, index=None):
        raise OSError("the disk is gone")

    source.read = read
    with llama_jax.use_mesh("data=8"), pytest.raises(OSError, match="the disk is gone"):
        load_opened(checkpoint)


def test_an_array_that_devices_share_with_the_host_survives_a_donation(saved):
    with llama_jax.use_mesh("data=8"):
        embedding = llama_jax.load(saved["hf"]).embedding[...]
        before = np.array(embedding)
        doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(embedding)
        assert all(np.array_equal(part.data, 2 * before) for part in doubled.addressable_shards)


# Who reads what


def mesh_of(**axes: tuple[int, bool]) -> Mesh:
    """Axes of a size, and whether each spans processes; enough of a mesh for reading_spec."""
    sizes = {name: size for name, (size, _) in axes.items()}
    places = np.indices(list(sizes.values()))
    process = sum(
        place * 100**i for i, (place, (_, spans)) in enumerate(zip(places, axes.values(), strict=True)) if spans
    )
    devices = np.vectorize(lambda index: SimpleNamespace(process_index=index), otypes=[object])(process + 0 * places[0])
    return cast(Mesh, SimpleNamespace(devices=devices, axis_names=tuple(sizes), shape=sizes))


@pytest.mark.parametrize(
    ("shape", "spec", "num_leading", "stacked", "expected"),
    [
        ((8, 64, 96), P(None, None, "tensor"), 1, True, P("data", None, "tensor")),  # replicas: to layers
        ((3, 64, 96), P(None, None, "tensor"), 1, True, P(None, None, ("tensor", "data"))),  # or rows
        ((64, 96), P(None, "tensor"), 1, False, P(None, ("tensor", "data"))),
        ((64, 6), P(None, "tensor"), 1, False, P("data", "tensor")),  # or columns
        ((64, 96), P("data", "tensor"), 1, False, P(None, ("tensor", "data"))),  # columns: to rows
        ((96, 64), P("tensor", "data"), 0, False, P(("tensor", "data"), None)),
        ((64, 6), P("data", "tensor"), 1, False, P("data", "tensor")),  # or they stay
        ((9, 9), P(None, None), 1, False, P(None, None)),
        ((8, 64), P(None, None), 0, True, P(None, None)),  # norms
    ],
)
def test_axes_between_processes_share_the_reading(shape, spec, num_leading, stacked, expected):
    mesh = mesh_of(data=(4, True), tensor=(2, False))
    weight = StoredWeight("w", num_leading, transposed=True)
    assert reading_spec(shape, spec, weight, stacked, mesh) == expected


def test_the_rows_of_a_weight_with_its_outputs_first_are_its_first_dimensions():
    mesh = mesh_of(data=(4, True), tensor=(2, False))
    weight = StoredWeight("w", 2)
    assert reading_spec((4, 8, 96), P("tensor", None, None), weight, False, mesh) == P("tensor", "data", None)
    assert reading_spec((4, 8, 96), P("tensor", None, "data"), weight, False, mesh) == P("tensor", "data", None)


def test_axes_within_a_process_stay_where_they_are():
    mesh = mesh_of(data=(4, False), tensor=(2, False))
    assert reading_spec((64, 96), P("data", None), StoredWeight("w", 1), False, mesh) == P("data", None)


FOUR_PROCESSES = """
import json, sys
import jax
import numpy as np
jax.distributed.initialize(sys.argv[1], num_processes=4, process_id=int(sys.argv[2]))
import llama_jax
from llama_jax.checkpoint import load_opened
from tests.test_layout import counted
results = []
for form, mesh, layout in json.loads(sys.argv[4]):
    checkpoint, source = counted(f"{sys.argv[3]}/{form}")
    with llama_jax.use_mesh(mesh):
        model = load_opened(checkpoint, layout=layout)
    whole = np.load(f"{sys.argv[3]}/{layout}.npz")
    equal = all(
        np.array_equal(whole[jax.tree_util.keystr(path)][part.index], part.data)
        for path, leaf in jax.tree.leaves_with_path(model) for part in leaf.addressable_shards
    )
    results.append([sum(size for _, size in source.reads), equal])
print(json.dumps(results))
"""


def test_four_processes_read_each_byte_once_and_hold_their_parts(saved, arrays):
    directory = saved["hf"].parent
    for name in LAYOUTS:
        np.savez(directory / f"{name}.npz", **arrays[name])
    cases = [("hf", mesh, name) for mesh in ("data=4", "fsdp=4", "tensor=4", "data=2,tensor=2") for name in LAYOUTS]
    cases += [(form, "data=2,fsdp=2", "layers") for form in ("meta", "orbax")]
    address, asked = free_address(), json.dumps(cases)
    results = outputs(*(start_python(FOUR_PROCESSES, address, i, directory, asked) for i in range(4)))
    weights = 4 * CONFIG.num_params()
    norms = 4 * CONFIG.embed_dim * (2 * CONFIG.num_layers + 1)  # read by each
    for case, *processes in zip(cases, *results, strict=True):
        assert sum(size for size, _ in processes) == weights + 3 * norms <= 1.1 * weights, case
        assert all(equal for _, equal in processes), case
