"""Torch's files: what torch writes is read bit-equal, what is written torch reads, and nothing is run."""

import os
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch

from llama_jax.checkpoint.pth import PthFile, write_pth
from llama_jax.checkpoint.source import TensorSpec

DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


def torch_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)


def rewrite_zip(source, target, change, compression=zipfile.ZIP_STORED):
    """Copies a zip, each member's content replaced by change(short name, content); None drops it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for member in old.infolist():
            content = change(member.filename.partition("/")[2], old.read(member))
            if content is not None:
                new.writestr(member.filename, content)


@pytest.fixture
def saved(tmp_path):
    torch.save({"w": random_tensor((6, 8))}, tmp_path / "saved.pth")
    return tmp_path / "saved.pth"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_file_reads_bit_equal(tmp_path, dtype):
    tensor = random_tensor((5, 3), dtype)
    torch.save({"w": tensor}, tmp_path / "a.pth")
    file = PthFile(tmp_path / "a.pth")
    assert file.tensors == {"w": TensorSpec((5, 3), np.dtype(DTYPES[dtype]))}
    assert file.read("w").tobytes() == torch_bytes(tensor)


def test_views_strides_scalars_and_empty_tensors_read_bit_equal(tmp_path):
    base = random_tensor((6, 8), torch.bfloat16)
    tensors = {
        "base": base,
        "rows": base[2:5],
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": base[0, 0].expand(4, 2),
        "scalar": base[3, 3],
        "empty": base[:, 8:],
    }
    torch.save(tensors, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 1  # torch stored one storage for all
    file = PthFile(tmp_path / "a.pth")
    for name, tensor in tensors.items():
        assert file.tensors[name].shape == tuple(tensor.shape)
        assert file.read(name).tobytes() == torch_bytes(tensor), name


def test_module_state_dict_reads(tmp_path):
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "a.pth")  # an OrderedDict with a _metadata attribute
    file = PthFile(tmp_path / "a.pth")
    assert list(file.tensors) == ["weight", "bias"]
    assert file.read("weight").tobytes() == torch_bytes(module.weight.detach())


def test_slice_is_the_slice_of_the_whole_and_view_maps_the_file(tmp_path):
    tensor = random_tensor((7, 9))
    torch.save({"w": tensor.T}, tmp_path / "a.pth")
    file = PthFile(tmp_path / "a.pth")
    index = (slice(2, 5), slice(None))
    np.testing.assert_array_equal(file.read("w", index), tensor.T.numpy()[index])
    np.testing.assert_array_equal(file.read("w", (slice(1, 2),)), tensor.T.numpy()[1:2])
    assert file.read("w", index).flags.c_contiguous
    view = file.view("w")
    assert not view.flags.owndata and not view.flags.writeable


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_loads_what_is_written(tmp_path, dtype, mmap):
    tensors = {"a.weight": random_tensor((5, 3), dtype), "b": random_tensor((2, 1, 3, 2), dtype)}
    tensors |= {"scalar": random_tensor((), dtype), "empty": random_tensor((0, 3), dtype)}
    arrays = {name: np.frombuffer(torch_bytes(t), DTYPES[dtype]).reshape(t.shape) for name, t in tensors.items()}
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    write_pth(tmp_path / "a.pth", specs, reversed(arrays.items()))
    loaded = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype and loaded[name].shape == tensor.shape
        assert torch_bytes(loaded[name]) == torch_bytes(tensor)
    assert PthFile(tmp_path / "a.pth").read("b").tobytes() == torch_bytes(tensors["b"])


def test_written_storages_are_aligned_and_not_contiguous_arrays_written_in_order(tmp_path):
    arrays = {f"t{i}": np.arange(6 * i, dtype=np.float32).reshape(i, 6).T for i in range(1, 6)}
    specs = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    write_pth(tmp_path / "a.pth", specs, arrays.items())
    file = PthFile(tmp_path / "a.pth")
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)
        assert (tmp_path / "a.pth").read_bytes().index(array.tobytes()) % 64 == 0
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        assert archive.testzip() is None  # the checksums are right


def test_shared_name_has_the_same_storage_in_torch(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    specs = {"a": TensorSpec((2, 3), array.dtype)}
    write_pth(tmp_path / "a.pth", specs, [("a", array)], shared={"b": "a"})
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    np.testing.assert_array_equal(PthFile(tmp_path / "a.pth").read("b"), array)


@pytest.mark.parametrize(
    ("specs", "tensors", "message"),
    [
        ({"a": (2,)}, [], "'a' is in the specs and never came"),
        ({"a": (2,)}, [("b", (2,))], "'b' came twice or is not in the specs"),
        ({"a": (2,)}, [("a", (2,)), ("a", (2,))], "'a' came twice"),
        ({"a": (2,)}, [("a", (3,))], r"'a' is float32\(3,\), expected"),
    ],
)
def test_writing_refuses_tensors_that_are_not_as_announced(tmp_path, specs, tensors, message):
    announced = {name: TensorSpec(shape, np.dtype(np.float32)) for name, shape in specs.items()}
    arrays = ((name, np.zeros(shape, np.float32)) for name, shape in tensors)
    with pytest.raises(ValueError, match=message):
        write_pth(tmp_path / "a.pth", announced, arrays)


def test_writing_refuses_a_dtype_that_torch_files_lack(tmp_path):
    with pytest.raises(ValueError, match="'a': torch's files hold no dtype complex64"):
        write_pth(tmp_path / "a.pth", {"a": TensorSpec((2,), np.dtype(np.complex64))}, [])


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_a_command_is_refused_by_name_and_runs_nothing(tmp_path, saved, protocol):
    marker = tmp_path / "ran"
    bomb = pickle.dumps({"w": Payload(marker)}, protocol=protocol)
    rewrite_zip(saved, tmp_path / "bad.pth", lambda name, content: bomb if name == "data.pkl" else content)
    with pytest.raises(ValueError, match=rf"bad.pth: .*refused global {os.system.__module__}.system"):
        PthFile(tmp_path / "bad.pth")
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists()  # the same pickle does run elsewhere


def global_then(name: bytes, rest: bytes) -> bytes:
    return b"\x80\x02c" + name + b"\n" + rest


@pytest.mark.parametrize(
    "data_pkl",
    [
        global_then(b"builtins\neval", b"."),
        global_then(b"collections\nOrderedDict.fromkeys", b"."),
        global_then(b"torch._utils\n_rebuild_parameter", b"."),
        global_then(b"torch._utils\n_rebuild_tensor_v2", b"}X\x01\x00\x00\x00aK\x01sb."),  # sets an attribute
        global_then(b"torch\nFloatStorage", b")R."),  # calls a storage class
        b"\x80\x02].",
        b"\x80\x02}",
        b"",
    ],
    ids=["eval", "method", "parameter", "set_attribute", "call", "list", "cut", "nothing"],
)
def test_a_pickle_of_anything_else_is_refused(tmp_path, saved, data_pkl):
    rewrite_zip(saved, tmp_path / "bad.pth", lambda name, content: data_pkl if name == "data.pkl" else content)
    with pytest.raises(ValueError, match="bad.pth: "):
        PthFile(tmp_path / "bad.pth")


@pytest.mark.parametrize("keep", [0, 3, 40, 0.5, 0.99])
def test_a_truncated_file_is_refused_by_name(tmp_path, saved, keep):
    content = saved.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: keep if keep > 1 else int(keep * len(content))])
    with pytest.raises(ValueError, match="cut.pth: (truncated|not a zip)"):
        PthFile(tmp_path / "cut.pth")


def test_a_file_with_a_hole_is_refused_when_the_tensor_is_read(tmp_path, saved):
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        start = archive.getinfo("saved/data/0").header_offset
    content[start : start + 64] = bytes(64)
    (tmp_path / "hole.pth").write_bytes(content)
    with pytest.raises(ValueError, match="hole.pth: tensor 'w': the file is truncated or damaged"):
        PthFile(tmp_path / "hole.pth").read("w")


def test_legacy_and_foreign_files_are_refused_with_the_way_out(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="old.pth: not a zip.*torch.save it again"):
        PthFile(tmp_path / "old.pth")
    np.savez(tmp_path / "other.npz", w=np.zeros(2))
    with pytest.raises(ValueError, match="other.npz: a zip with 0 data.pkl"):
        PthFile(tmp_path / "other.npz")


def test_compressed_missing_and_short_storages_are_refused_by_tensor(tmp_path, saved):
    rewrite_zip(saved, tmp_path / "a.pth", lambda name, content: content, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="a.pth: tensor 'w': its storage is compressed"):
        PthFile(tmp_path / "a.pth")
    rewrite_zip(saved, tmp_path / "b.pth", lambda name, content: None if name == "data/0" else content)
    with pytest.raises(ValueError, match="b.pth: tensor 'w': its storage 'saved/data/0' is missing"):
        PthFile(tmp_path / "b.pth")
    rewrite_zip(saved, tmp_path / "c.pth", lambda name, content: content[:-1] if name == "data/0" else content)
    with pytest.raises(ValueError, match="c.pth: tensor 'w' of shape .* is out of bounds"):
        PthFile(tmp_path / "c.pth")


def test_big_endian_nested_and_other_contents_are_refused(tmp_path, saved):
    rewrite_zip(saved, tmp_path / "big.pth", lambda name, content: b"big" if name == "byteorder" else content)
    with pytest.raises(ValueError, match="big.pth: byte order is not little"):
        PthFile(tmp_path / "big.pth")
    torch.save({"model": {"w": torch.zeros(2)}}, tmp_path / "nested.pth")
    with pytest.raises(ValueError, match="nested.pth: 'model' is a nested state dict"):
        PthFile(tmp_path / "nested.pth")
    torch.save(OrderedDict(step=3, w=torch.zeros(2)), tmp_path / "run.pth")
    with pytest.raises(ValueError, match="run.pth: 'step' is not a tensor"):
        PthFile(tmp_path / "run.pth")
    torch.save({"w": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "complex.pth")
    with pytest.raises(ValueError, match="complex.pth: .*refused global torch.ComplexFloatStorage"):
        PthFile(tmp_path / "complex.pth")


def test_an_unknown_tensor_is_named(saved):
    with pytest.raises(ValueError, match="saved.pth: no tensor 'x'"):
        PthFile(saved).read("x")
