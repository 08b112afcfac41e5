"""Our safetensors reader and writer against the reference package, bit for bit, and damaged files."""

import json
import os
import weakref

import ml_dtypes
import numpy as np
import pytest

from llama_jax.checkpoint.safetensors import (
    DTYPES,
    SafetensorsDirectory,
    SafetensorsFile,
    write_safetensors,
    write_sharded,
)
from llama_jax.checkpoint.source import TensorSpec


def random_bits(shape, dtype) -> np.ndarray:
    """Every bit pattern, so NaN payloads and subnormals too."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 256, size, np.uint8)
    return bits.view(dtype).reshape(shape)


def specs_of(tensors: dict[str, np.ndarray]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())


def every_dtype() -> dict[str, np.ndarray]:
    """Odd sizes, so that a careless layout would leave the wide ones unaligned."""
    return {f"t.{code}": random_bits((3, 5), dtype) for code, dtype in DTYPES.items()}


# Round trips


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    tensors = every_dtype()
    write_safetensors(tmp_path / "a", specs_of(tensors), tensors.items(), metadata={"format": "pt"})
    source = SafetensorsFile(tmp_path / "a")
    assert source.metadata == {"format": "pt"} and source.tensors == specs_of(tensors)
    assert all(same_bits(source.read(name), tensor) for name, tensor in tensors.items())


def test_scalars_empty_tensors_and_transposed_arrays_come_back(tmp_path):
    tensors = {
        "scalar": np.float32(3).reshape(()),
        "empty": np.zeros((0, 4), np.int8),
        "t": np.arange(6).reshape(2, 3).T,
    }
    write_safetensors(tmp_path / "a", specs_of(tensors), tensors.items())
    source = SafetensorsFile(tmp_path / "a")
    assert all(same_bits(source.read(name), tensor) for name, tensor in tensors.items())


def test_the_reference_package_reads_every_dtype_that_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    tensors = every_dtype()
    write_safetensors(tmp_path / "a", specs_of(tensors), tensors.items(), metadata={"format": "pt"})
    theirs = safetensors_torch.load_file(tmp_path / "a")
    assert theirs.keys() == tensors.keys() and theirs["t.BF16"].dtype == torch.bfloat16
    for name, tensor in tensors.items():
        assert theirs[name].contiguous().view(torch.uint8).numpy().tobytes() == tensor.tobytes(), name


def test_we_read_every_dtype_that_the_reference_package_writes(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors_torch = pytest.importorskip("safetensors.torch")
    tensors = every_dtype()
    names = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "BF16": "bfloat16"}
    theirs = {
        name: torch.from_numpy(tensor.view(np.uint8).copy()).view(
            getattr(torch, names.get(name.removeprefix("t."), tensor.dtype.name))
        )
        for name, tensor in tensors.items()
    }
    safetensors_torch.save_file(theirs, tmp_path / "a", metadata={"format": "pt"})
    source = SafetensorsFile(tmp_path / "a")
    assert source.tensors == specs_of(tensors)
    assert all(same_bits(source.read(name), tensor) for name, tensor in tensors.items())


def test_our_bytes_are_the_reference_writers_bytes(tmp_path):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    tensors = {  # the widest comes first on disk
        "c": random_bits((7,), np.int8),
        "a": random_bits((5,), np.float32),
        "b": random_bits((2, 3), np.float16),
    }
    write_safetensors(tmp_path / "a", specs_of(tensors), tensors.items(), metadata={"format": "pt"})
    assert (tmp_path / "a").read_bytes() == safetensors_numpy.save(tensors, metadata={"format": "pt"})


# Slices


@pytest.mark.parametrize(
    "index",
    [(slice(1, 3),), (slice(None), slice(2, 4)), (slice(0, 2), slice(None), slice(1, 9)), (slice(2, 2),), ()],
)
def test_a_slice_is_numpys_slice(tmp_path, index):
    tensors = {"pad": random_bits((3,), np.int8), "t": random_bits((4, 5, 6), ml_dtypes.bfloat16)}
    write_safetensors(tmp_path / "a", specs_of(tensors), tensors.items())
    assert same_bits(SafetensorsFile(tmp_path / "a").read("t", index), tensors["t"][index])


def test_a_slice_of_a_tensor_larger_than_memory_is_read(tmp_path):
    rows, columns = 1 << 30, 1 << 12  # 4 TiB, a hole on disk but for the last row
    header = json.dumps({"t": {"dtype": "U8", "shape": [rows, columns], "data_offsets": [0, rows * columns]}}).encode()
    with open(tmp_path / "a", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(rows * columns - 3, os.SEEK_CUR)
        file.write(b"end")
    row = SafetensorsFile(tmp_path / "a").read("t", (slice(rows - 1, rows), slice(columns - 3, columns)))
    assert row.tobytes() == b"end"


def test_many_living_views_take_one_open_file_and_the_last_closes_it(tmp_path):
    names = [f"t{i}" for i in range(50)]
    shard(tmp_path / "a", names)
    before = len(os.listdir("/dev/fd"))
    source = SafetensorsFile(tmp_path / "a")
    views = [source.read(name) for name in names]
    assert len(os.listdir("/dev/fd")) == before + 1
    del views
    assert len(os.listdir("/dev/fd")) == before


def test_tensors_are_aligned_in_memory_even_behind_an_odd_header(tmp_path):
    header = b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (1 - len(header) % 2)
    values = np.array([1.5, -2.5], np.float32)
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    tensor = SafetensorsFile(tmp_path / "a").read("t")
    assert len(header) % 2 == 1 and tensor.flags.aligned and same_bits(tensor, values)


# Directories


def shard(directory, names, **arrays):
    tensors = {name: np.zeros(2, np.float32) for name in names} | arrays
    write_safetensors(directory, specs_of(tensors), tensors.items())


def write_index(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_small_model_is_one_file(tmp_path):
    tensors = {"b": random_bits((2, 3), np.float32), "a": random_bits((4,), np.int8)}
    write_sharded(tmp_path / "out", specs_of(tensors), tensors.items())
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    source = SafetensorsDirectory(tmp_path / "out")
    assert source.tensors == specs_of(tensors)
    assert same_bits(source.read("b", (slice(1, 2),)), tensors["b"][1:2])


def test_a_large_model_is_cut_where_the_next_tensor_would_not_fit(tmp_path):
    tensors = {name: random_bits((size,), np.uint8) for name, size in zip("abcde", (60, 40, 1, 150, 99), strict=True)}
    write_sharded(tmp_path / "out", specs_of(tensors), tensors.items(), max_shard_bytes=100)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 350
    assert index["weight_map"] == {
        "a": "model-00001-of-00004.safetensors",
        "b": "model-00001-of-00004.safetensors",
        "c": "model-00002-of-00004.safetensors",
        "d": "model-00003-of-00004.safetensors",
        "e": "model-00004-of-00004.safetensors",
    }
    source = SafetensorsDirectory(tmp_path / "out")
    assert all(same_bits(source.read(name), tensor) for name, tensor in tensors.items())
    assert SafetensorsFile(tmp_path / "out" / "model-00001-of-00004.safetensors").metadata == {"format": "pt"}


def test_a_model_is_written_beside_other_files_but_not_beside_another_model(tmp_path):
    tensors = {"a": random_bits((4,), np.int8)}
    (tmp_path / "config.json").write_text("{}")
    write_sharded(tmp_path, specs_of(tensors), tensors.items())
    with pytest.raises(FileExistsError, match="already holds model.safetensors; remove it"):
        write_sharded(tmp_path, specs_of(tensors), tensors.items())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has neither model.safetensors nor model.safetensors.index.json"):
        SafetensorsDirectory(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    shard(tmp_path / "model-1.safetensors", ["a"])
    write_index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"})
    with pytest.raises(ValueError, match="names model-2.safetensors, model-3.safetensors, which .* does not have"):
        SafetensorsDirectory(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    shard(tmp_path / "1.safetensors", ["a"])
    write_index(tmp_path, {"a": "1.safetensors", "lost": "1.safetensors"})
    with pytest.raises(ValueError, match="1.safetensors: tensor 'lost' is not in it"):
        SafetensorsDirectory(tmp_path)


def test_a_tensor_in_two_shards_is_named(tmp_path):
    shard(tmp_path / "1.safetensors", ["a", "b"])
    shard(tmp_path / "2.safetensors", ["b"])
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(ValueError, match="tensor 'b' is in both 1.safetensors and 2.safetensors"):
        SafetensorsDirectory(tmp_path)


def test_a_damaged_shard_is_found_when_the_directory_is_opened(tmp_path):
    shard(tmp_path / "1.safetensors", ["a"])
    shard(tmp_path / "2.safetensors", ["b"])
    os.truncate(tmp_path / "2.safetensors", (tmp_path / "2.safetensors").stat().st_size - 1)
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(ValueError, match="2.safetensors: truncated: tensor 'b' ends at byte 8 .* only 7"):
        SafetensorsDirectory(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "weight_map of file names was expected"),
        ("[]", "weight_map of file names was expected"),
        ('{"metadata": {}}', "weight_map of file names was expected"),
        ('{"weight_map": ["a"]}', "weight_map of file names was expected"),
        ('{"weight_map": {"a": ["1.safetensors"]}}', "weight_map of file names was expected"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "key 'a' appears twice"),
        ('{"weight_map": {"a": "../1.safetensors"}}', "must name files in its own directory, got"),
        ('{"weight_map": {}}', "must name files in its own directory, got"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=f"model.safetensors.index.json: .*{message}"):
        SafetensorsDirectory(tmp_path)


# Damaged files


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def fields(start, stop, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "num_data_bytes", "message"),
    [
        (b"{", 0, "the header is not valid JSON: Expecting"),
        (b"\xff\xfe", 0, "the header is not valid JSON: .*decode"),
        (b"[1]", 0, "the header is not valid JSON: an object was expected, got list"),
        (b"[" * 100_000, 0, "the header is not valid JSON: it is nested too deep"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', 1, "key 'a' appears twice"),
        ({"a": 7}, 0, "tensor 'a' needs dtype, shape and two data_offsets, got 7"),
        ({"a": {"dtype": "U8", "shape": [1]}}, 1, "tensor 'a' needs dtype, shape and two data_offsets"),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, 1, "tensor 'a' needs dtype, shape and two"),
        ({"a": fields(0, 1, "F4")}, 1, "tensor 'a' has unknown dtype 'F4'; known are BOOL, U8"),
        ({"a": fields(0, 1, ["U8"])}, 1, "tensor 'a' has unknown dtype"),
        ({"a": fields(0, 1, shape=[-1, -1])}, 1, "tensor 'a' has shape .* whole numbers"),
        ({"a": fields(0, 1, shape=[1.0])}, 1, "tensor 'a' has shape .* whole numbers"),
        ({"a": fields(0, 1, shape=[True])}, 1, "tensor 'a' has shape .* whole numbers"),
        ({"a": fields(-1, 1)}, 1, "tensor 'a' has shape .* whole numbers"),
        ({"a": fields(0, 8, "F32", [3])}, 8, r"tensor 'a' has 8 bytes where F32 \[3\] takes 12"),
        ({"a": fields(4, 0, "U8", [4])}, 4, r"tensor 'a' has -4 bytes where U8 \[4\] takes 4"),
        ({"a": fields(0, 4), "b": fields(2, 6)}, 6, "tensor 'b' starts at byte 2 .* not 4: it overlaps"),
        ({"a": fields(0, 4), "b": fields(0, 4)}, 4, "tensor 'b' starts at byte 0 .* not 4: it overlaps"),
        ({"a": fields(0, 4), "b": fields(5, 9)}, 9, "tensor 'b' starts at byte 5 .* not 4: it leaves a gap"),
        ({"a": fields(1, 4)}, 4, "tensor 'a' starts at byte 1 .* not 0: it leaves a gap"),
        ({"a": fields(0, 4), "b": fields(4, 9)}, 8, "truncated: tensor 'b' ends at byte 9 .* only 8"),
        ({"a": fields(0, 4)}, 6, "2 bytes after the last tensor belong to none"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header, num_data_bytes, message):
    write_raw(tmp_path / "bad.safetensors", header, bytes(num_data_bytes))
    with pytest.raises(ValueError, match=f"bad.safetensors: .*{message}"):
        SafetensorsFile(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 20])
def test_a_file_cut_within_its_header_is_refused(tmp_path, num_bytes):
    write_raw(tmp_path / "bad", {"a": fields(0, 4)}, bytes(4))
    os.truncate(tmp_path / "bad", num_bytes)
    with pytest.raises(ValueError, match=f"bad: truncated within the header at {num_bytes} bytes"):
        SafetensorsFile(tmp_path / "bad")


def test_a_git_lfs_pointer_is_not_taken_for_a_checkpoint(tmp_path):
    (tmp_path / "bad").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="bad: a header of [0-9]* bytes is absurd .a Git LFS pointer"):
        SafetensorsFile(tmp_path / "bad")


def test_a_file_that_shrinks_while_in_use_is_refused(tmp_path):
    shard(tmp_path / "a", ["a"])
    source = SafetensorsFile(tmp_path / "a")
    os.truncate(tmp_path / "a", 10)
    with pytest.raises(ValueError, match="changed from [0-9]* to 10 bytes while it was in use"):
        source.read("a")


# Writing


def test_each_tensor_is_let_go_before_the_next_is_asked_for(tmp_path):
    earlier, alive = [], []

    def tensors():
        for name in specs:
            alive.append(sum(ref() is not None for ref in earlier))
            tensor = np.zeros(1000, np.float32)
            earlier.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    specs = {name: TensorSpec((1000,), np.dtype(np.float32)) for name in "abcd"}
    write_safetensors(tmp_path / "a", specs, tensors())
    write_sharded(tmp_path / "b", specs, tensors(), max_shard_bytes=4000)
    assert alive == [0] * 8


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
        write_safetensors(tmp_path / "a", specs, got)
    with pytest.raises(ValueError, match=message):
        write_sharded(tmp_path, specs, got, max_shard_bytes=8)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_in_the_middle_leaves_nothing(tmp_path, error):
    def tensors():
        yield "a", np.zeros(2, np.float32)
        raise error

    specs = {name: TensorSpec((2,), np.dtype(np.float32)) for name in "ab"}
    with pytest.raises(error):
        write_safetensors(tmp_path / "a", specs, tensors())
    with pytest.raises(error):
        write_sharded(tmp_path, specs, tensors(), max_shard_bytes=8)
    assert os.listdir(tmp_path) == []


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tensor 'a' has dtype int4, which safetensors does not know"):
        write_safetensors(tmp_path / "a", {"a": TensorSpec((2,), np.dtype(ml_dtypes.int4))}, [])
    assert os.listdir(tmp_path) == []
