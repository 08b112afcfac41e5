"""Orbax checkpoints: bit-equal for us and for Orbax, streamed in the memory of one tensor, damage named."""

import os
import shutil
import weakref
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.checkpoint import orbax
from llama_jax.checkpoint.orbax import OrbaxSource, write_orbax
from llama_jax.checkpoint.source import TensorSpec
from tests.processes import free_address, outputs, start_python

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32", "bool", "int64"]


def random_bits(shape, dtype) -> np.ndarray:
    """Every bit pattern, so NaN payloads and subnormals too."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    size = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 256, size, np.uint8)
    return bits.view(dtype).reshape(shape)


def specs_of(tensors: dict[str, np.ndarray]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def same_bits(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def save_with_orbax(directory: Path, arrays: dict[str, jax.Array]):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(directory, arrays)


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    """Every dtype under names with dots, and the awkward ones: all zeros, a scalar, nothing at all."""
    found = {f"model.layers.{i}.weight": random_bits((6, 10), dtype) for i, dtype in enumerate(DTYPES)}
    found["zeros"] = np.zeros((3, 4), np.float32)
    found["scalar"] = np.float32(3).reshape(())
    found["empty"] = np.zeros((0, 4), np.float32)
    return found


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 64 bytes, so that a small tensor has many and its edges are ragged."""
    monkeypatch.setattr(orbax, "_CHUNK_BYTES", 64)


# Round trips


def test_every_dtype_comes_back_bit_for_bit(tmp_path, tensors, small_chunks):
    write_orbax(tmp_path / "out", specs_of(tensors), tensors.items())
    source = OrbaxSource(tmp_path / "out")
    assert source.tensors == specs_of(tensors)
    assert all(same_bits(source.read(name), tensor) for name, tensor in tensors.items())


def test_orbax_itself_restores_what_we_write(tmp_path, tensors, small_chunks):
    write_orbax(tmp_path / "out", specs_of(tensors), tensors.items())
    with ocp.PyTreeCheckpointer() as checkpointer:
        theirs = checkpointer.restore(tmp_path / "out")
    assert theirs.keys() == tensors.keys()
    assert all(same_bits(theirs[name], tensor) for name, tensor in tensors.items())


def test_orbax_restores_onto_a_mesh_what_we_write(tmp_path, small_chunks):
    tensors = {"a.weight": random_bits((8, 12), "float32"), "b.weight": random_bits((4, 2), "bfloat16")}
    write_orbax(tmp_path / "out", specs_of(tensors), tensors.items())
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, P("x", "y"))
    target = {name: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=sharding) for name, t in tensors.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        theirs = checkpointer.restore(tmp_path / "out", target)
    assert all(theirs[name].sharding == sharding for name in tensors)
    assert all(same_bits(theirs[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("spec", [P(), P("x", "y"), P(None, ("x", "y")), P("y")])
def test_arrays_that_orbax_saved_from_a_mesh_are_read_in_any_slice(tmp_path, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    tensor = random_bits((16, 24), "bfloat16")
    save_with_orbax(tmp_path / "out", {"a.weight": jax.device_put(tensor, NamedSharding(mesh, spec))})
    source = OrbaxSource(tmp_path / "out")
    assert source.tensors == {"a.weight": TensorSpec((16, 24), tensor.dtype)}
    assert same_bits(source.read("a.weight"), tensor)
    assert same_bits(source.read("a.weight", (slice(3, 9), slice(5, 17))), tensor[3:9, 5:17])


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "int64"])
def test_every_dtype_of_jax_comes_back_from_orbaxs_own_saving(tmp_path, dtype):
    tensor = random_bits((6, 10), dtype)
    save_with_orbax(tmp_path / "out", {"a": jax.device_put(tensor)})
    assert same_bits(OrbaxSource(tmp_path / "out").read("a"), tensor)


def test_a_nested_tree_is_read_under_a_prefix(tmp_path):
    tree = {"params": {"a.weight": np.arange(4), "b": np.ones(2)}, "step": 7, "name": "run", "none": None}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "out", tree)
    assert set(OrbaxSource(tmp_path / "out").tensors) == {"params.a.weight", "params.b", "step"}
    source = OrbaxSource(tmp_path / "out", prefix="params.")
    assert set(source.tensors) == {"a.weight", "b"} and same_bits(source.read("a.weight"), np.arange(4))
    with pytest.raises(ValueError, match="out has no array under 'ema.'; it has .*params.a.weight"):
        OrbaxSource(tmp_path / "out", prefix="ema.")


PROCESS = """
import sys
import jax
import numpy as np
import orbax.checkpoint as ocp
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
whole = np.arange(96, dtype=np.float32).reshape(8, 12)
def place(*spec):
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[3], {"rows": place("x"), "columns": place(None, "x"), "whole": place()})
print(1)
"""


def test_one_process_reads_what_two_have_written_with_orbax(tmp_path):
    address = free_address()
    outputs(*(start_python(PROCESS, address, i, tmp_path / "out") for i in range(2)))
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= set(os.listdir(tmp_path / "out"))
    source, whole = OrbaxSource(tmp_path / "out"), np.arange(96, dtype=np.float32).reshape(8, 12)
    for name in ("rows", "columns", "whole"):
        assert same_bits(source.read(name), whole)
        assert same_bits(source.read(name, (slice(3, 7), slice(2, 11))), whole[3:7, 2:11])


# Slices and memory


@pytest.mark.parametrize(
    "index", [(slice(1, 3),), (slice(None), slice(2, 4)), (slice(-2, None), slice(4, 99)), (slice(5, 2),), ()]
)
def test_a_slice_is_numpys_slice(tmp_path, index, small_chunks):
    tensor = random_bits((7, 9), "bfloat16")
    write_orbax(tmp_path / "out", specs_of({"a": tensor}), [("a", tensor)])
    assert same_bits(OrbaxSource(tmp_path / "out").read("a", index), tensor[index])


def test_a_slice_needs_none_of_the_other_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "_CHUNK_BYTES", 4096)
    monkeypatch.setattr(orbax, "_BYTES_IN_FLIGHT", 0)  # a file for each chunk
    tensor = random_bits((64, 64), "float32")
    write_orbax(tmp_path / "out", specs_of({"a": tensor}), [("a", tensor)])
    source = OrbaxSource(tmp_path / "out")
    for file in (tmp_path / "out" / "ocdbt.process_0" / "d").iterdir():
        if np.frombuffer(tensor[32:, 32:].tobytes(), np.uint8).tobytes() not in file.read_bytes():
            file.unlink()
    assert same_bits(source.read("a", (slice(32, 64), slice(32, 64))), tensor[32:, 32:])
    with pytest.raises(ValueError, match="array 'a' is damaged"):
        source.read("a")


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((4096, 14336), [1024, 896]),
        ((128_257, 4096), [1003, 1024]),
        ((16_384, 53_248), [1024, 832]),
        ((100,), [100]),
        ((), []),
        ((0, 4), [1, 4]),
    ],
)
def test_chunks_of_float32_hold_at_most_4_mib(shape, chunk):
    assert orbax.chunk_shape(shape, 4) == chunk
    assert 4 * np.prod(chunk) <= 4 * 2**20


@pytest.mark.parametrize(
    ("shape", "grain", "chunk"),
    [
        ((14336, 4096), (1792, 512), [1792, 512]),  # 8 x 8 devices; 3.5 MiB
        ((14336, 4096), (1792, 4096), [896, 1024]),
        ((128_257, 4096), (16_033, 4096), [16_033, 64]),  # an odd number of rows is left as it is
        ((9, 4096), (3, 4096), [3, 4096]),
    ],
)
def test_chunks_divide_what_each_process_writes(shape, grain, chunk):
    assert orbax.chunk_shape(shape, 4, grain) == chunk
    assert all(side % part == 0 for side, part in zip(grain, chunk, strict=True))


def test_each_tensor_is_let_go_before_the_next_is_asked_for(tmp_path, small_chunks):
    earlier, alive = [], []

    def stream():
        for name in specs:
            alive.append(sum(ref() is not None for ref in earlier))
            tensor = random_bits((100, 10), "float32")
            earlier.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    specs = {name: TensorSpec((100, 10), np.dtype(np.float32)) for name in "abcd"}
    write_orbax(tmp_path / "out", specs, stream())
    assert alive == [0] * 4


STREAM = """
import resource, sys
import numpy as np
from llama_jax.checkpoint.orbax import write_orbax
from llama_jax.checkpoint.source import TensorSpec
def write(directory, count):
    specs = {f"t{i}": TensorSpec((2, 2**20), np.dtype(np.float32)) for i in range(count)}
    write_orbax(directory, specs, ((name, np.full((2, 2**20), i, np.float32)) for i, name in enumerate(specs)))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = write(sys.argv[1] + "/small", 4)
print(write(sys.argv[1] + "/large", 40) - before)
"""


def test_ten_times_the_tensors_take_no_more_memory(tmp_path):
    [grown] = outputs(start_python(STREAM, tmp_path))
    assert grown < 60  # MiB; 36 more tensors of 8 MiB are 288


# Failures


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ([("a", np.zeros(3, np.float32))], "expected tensor 'a' of shape .2,. and dtype float32, got 'a' of shape .3,"),
        ([("a", np.zeros(2, np.float16))], "expected tensor 'a' .* got 'a' of shape .2,. and dtype float16"),
        ([("b", np.zeros(2, np.float32))], "expected tensor 'a' .* got 'b'"),
        ([("a", np.zeros(2, np.float32))], "the tensors ended where 'b' was expected"),
        ([(name, np.zeros(2, np.float32)) for name in "abc"], "tensor 'c' came after the last one"),
    ],
)
def test_a_stream_that_differs_from_its_specs_is_refused_and_leaves_nothing(tmp_path, got, message):
    specs = {name: TensorSpec((2,), np.dtype(np.float32)) for name in "ab"}
    with pytest.raises(ValueError, match=message):
        write_orbax(tmp_path / "out", specs, got)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, error):
    def stream():
        yield "a", np.zeros(2, np.float32)
        raise error

    specs = {name: TensorSpec((2,), np.dtype(np.float32)) for name in "ab"}
    with pytest.raises(error):
        write_orbax(tmp_path / "out", specs, stream())
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_is_an_os_error_and_leaves_nothing(tmp_path):
    def stream():
        yield "a", np.zeros(2, np.float32)
        [staged] = tmp_path.iterdir()
        data = staged / "ocdbt.process_0" / "d"
        shutil.rmtree(data)
        data.touch()
        yield "b", np.zeros(2, np.float32)

    specs = {name: TensorSpec((2,), np.dtype(np.float32)) for name in "ab"}
    with pytest.raises(OSError, match="array 'b' could not be written: [^[]*$"):
        write_orbax(tmp_path / "out", specs, stream())
    assert os.listdir(tmp_path) == []


def test_an_empty_directory_is_filled_and_a_full_one_is_kept(tmp_path):
    tensors = {"a": np.ones(2, np.float32)}
    (tmp_path / "out").mkdir()
    write_orbax(tmp_path / "out", specs_of(tensors), tensors.items())
    with pytest.raises(FileExistsError, match="out exists and is not an empty directory"):
        write_orbax(tmp_path / "out", {}, [])
    assert same_bits(OrbaxSource(tmp_path / "out").read("a"), tensors["a"])


@pytest.fixture
def written(tmp_path):
    tensors = {"a": random_bits((40, 100), "float32"), "b": np.ones(2, np.float32)}
    write_orbax(tmp_path / "out", specs_of(tensors), tensors.items())
    return tmp_path / "out"


def largest_file(directory: Path) -> Path:
    return max((directory / "ocdbt.process_0" / "d").iterdir(), key=lambda path: path.stat().st_size)


def flip_a_bit(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, lambda path: os.truncate(path, 100)])
def test_damaged_data_name_the_array_and_leave_the_others_readable(written, damage):
    damage(largest_file(written))
    source = OrbaxSource(written)
    assert same_bits(source.read("b"), np.ones(2, np.float32))
    with pytest.raises(ValueError, match="out: array 'a' is damaged or was never finished: .*a/c/0/0"):
        source.read("a")


def test_a_chunk_that_was_never_written_is_not_taken_for_zeros(written):
    base = {"driver": "file", "path": f"{written}/"}
    ts.KvStore.open({"driver": "ocdbt", "base": base}).result().delete_range(ts.KvStore.KeyRange("a/c", "a/d")).result()
    with pytest.raises(ValueError, match="out: array 'a' is damaged or was never finished"):
        OrbaxSource(written).read("a")


@pytest.mark.parametrize("damage", [flip_a_bit, Path.unlink, lambda path: os.truncate(path, 100)])
def test_a_check_reads_everything(written, damage):
    OrbaxSource(written).check()
    damage(largest_file(written))
    with pytest.raises(ValueError, match="out: array 'a' is damaged or was never finished"):
        OrbaxSource(written).check()


def test_damaged_arrays_of_orbaxs_own_saving_are_named(tmp_path):
    save_with_orbax(tmp_path / "out", {"a": jax.device_put(random_bits((40, 100), "uint8"))})
    os.truncate(largest_file(tmp_path / "out"), 100)
    with pytest.raises(ValueError, match="out: array 'a' is damaged or was never finished"):
        OrbaxSource(tmp_path / "out").read("a")


@pytest.mark.parametrize("file", ["_METADATA", "manifest.ocdbt"])
def test_an_unfinished_checkpoint_is_refused(written, file):
    (written / file).unlink()
    with pytest.raises(ValueError, match=f"out is no finished Orbax checkpoint: it has no {file}"):
        OrbaxSource(written)


def test_an_index_without_its_nodes_is_refused(written):
    shutil.rmtree(written / "d")
    with pytest.raises(ValueError, match="out: array 'a' is damaged or was never finished"):
        OrbaxSource(written)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"tree_metadata": {"a": 1}}'])
def test_a_damaged_description_is_refused(written, text):
    (written / "_METADATA").write_text(text)
    with pytest.raises(ValueError, match="_METADATA is damaged"):
        OrbaxSource(written)


def test_an_array_that_is_described_but_not_there_is_named(written):
    path = written / "_METADATA"
    path.write_text(path.read_text().replace('"key": "a"', '"key": "lost"'))
    with pytest.raises(ValueError, match="out: array 'lost' is damaged or was never finished"):
        OrbaxSource(written)
