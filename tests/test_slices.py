"""Names of slices, those that do not exist, and what is known of their chips."""

import math

import jax
import pytest

from llama_jax.chips import CHIPS
from llama_jax.slices import Slice, open_slice, parse_slice, slice_shapes, smallest_slice, use_slice, wraps


@pytest.mark.parametrize(
    ("text", "expected", "chips"),
    [
        ("v4:4x4x8", Slice("v4", (4, 4, 8)), 128),
        ("v4:8x4x4", Slice("v4", (4, 4, 8)), 128),
        ("v4:2x2x1", Slice("v4", (2, 2, 1)), 4),
        ("v5e:4x4", Slice("v5e", (4, 4)), 16),
        ("v4-256", Slice("v4", (4, 4, 8)), 128),
        ("v4-4096", Slice("v4", (8, 16, 16)), 2048),
        ("v5litepod-16", Slice("v5e", (4, 4)), 16),
        ("v5p-128", Slice("v5p", (4, 4, 4)), 64),
        ("v6e-8", Slice("v6e", (2, 4)), 8),
        ("v6e-1", Slice("v6e", (1, 1)), 1),
        ("2xv5p:8x8x8", Slice("v5p", (8, 8, 8), 2), 1024),
        ("tpu7x:4x4x4", Slice("tpu7x", (4, 4, 4)), 128),
        ("tpu7x-16", Slice("tpu7x", (2, 2, 2)), 16),
        ("cpu:8", Slice("cpu", (8,)), 8),
        ("h100:8", Slice("h100", (8,)), 8),
        ("8xh100:8", Slice("h100", (8,), 8), 64),
        ("h200:256", Slice("h200", (8,), 32), 256),
        ("a100-80:4", Slice("a100-80", (4,)), 4),
    ],
)
def test_a_slice_is_named_by_its_shape_or_as_the_vendor_does(text, expected, chips):
    assert parse_slice(text) == expected
    assert parse_slice(text).num_chips == chips
    assert parse_slice(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4:3x5x7", "there is no slice v4:3x5x7; the nearest is v4:4x4x8"),
        ("v5e:3x3", "the nearest is v5e:2x4"),
        ("v4-250", "the nearest is v4-256"),
        ("v4:0x0x0", "the nearest is v4:1x1x1"),
        ("v9:2x2", "unknown slice 'v9:2x2'; expected as v4:4x4x8"),
        ("v4", "unknown slice 'v4'"),
        ("", "unknown slice ''"),
        ("2xcpu:8", "unknown slice"),
        ("cpu:2x4", "CPU devices are one number"),
        ("cpu:0", "CPU devices are one number"),
        ("h100:9", "GPUs of a node are one number up to 8, as in h100:8"),
        ("h100:2x4", "GPUs of a node are one number"),
        ("h100-8", "unknown slice"),
        ("1024xh100:8", "8192 GPUs are more than can be planned, 4096"),
    ],
)
def test_a_slice_that_does_not_exist_is_one_line_that_says_what_does(text, message):
    with pytest.raises(ValueError, match=message):
        parse_slice(text)


@pytest.mark.parametrize("kind", ["v4", "v5p", "v5e", "v6e", "tpu7x"])
def test_every_shape_that_can_be_rented_can_be_named(kind):
    shapes = slice_shapes(kind)
    assert all(parse_slice(str(Slice(kind, shape))).shape == shape for shape in shapes)
    assert max(map(math.prod, shapes)) == CHIPS[kind].most


@pytest.mark.parametrize(
    ("kind", "gib", "expected"),
    [
        ("v5e", 15, "v5e:1x1"),
        ("v5e", 16, "v5e:2x2"),
        ("v5e", 250, "v5e:4x4"),
        ("v5e", 9000, "None"),
        ("h100", 100, "h100:2"),
        ("h100", 1000, "2xh100:8"),
        ("cpu", 1, "None"),
    ],
)
def test_the_smallest_slice_that_holds_something(kind, gib, expected):
    assert str(smallest_slice(kind, gib * 2**30)) == expected


def test_whole_cubes_and_whole_pods_are_rings():
    assert wraps((4, 4, 8)) == (True, True, True)
    assert wraps((2, 2, 4)) == (False, False, False)
    assert wraps((8, 16)) == (False, True, False)


# In matrix units of 128 x 128; one of v6e's and tpu7x's, 256 x 256, makes four.
UNITS = {"v4": 8, "v5p": 8, "v5e": 4, "v6e": 16, "tpu7x": 16}


@pytest.mark.parametrize("kind", UNITS)
def test_peak_and_clock_make_whole_matrix_units(kind):
    chip = CHIPS[kind]
    assert chip.flops / chip.clock / (2 * 128 * 128) == pytest.approx(UNITS[kind], rel=3e-3)


def test_a_cpu_slice_is_this_processs_devices():
    assert open_slice(parse_slice("cpu:4")) == jax.devices()[:4]
    with pytest.raises(ValueError, match="has 8 CPU devices open"):
        open_slice(parse_slice("cpu:9"))


def test_a_mesh_that_leaves_chips_of_a_slice_unused_is_refused():
    with pytest.raises(ValueError, match=r"mesh 'fsdp=3' uses 3 of the 4 chips of v4:2x2x1; give one axis -1"):
        use_slice(parse_slice("v4:2x2x1"), "fsdp=3").__enter__()


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps 'libtpu==[\d.*]+'"):
        open_slice(parse_slice("v5e:2x2"))


def test_prices_come_from_the_users_file_and_else_from_the_list(tmp_path, monkeypatch):
    file = tmp_path / "prices.toml"
    file.write_text('v4 = 1.5\n"a100-40" = 2\n')
    monkeypatch.setenv("LLAMA_JAX_PRICES", str(file))
    assert [parse_slice(name).price for name in ("v4-8", "a100-40:8", "v5p-8")] == [1.5, 2, CHIPS["v5p"].price]


@pytest.mark.parametrize(
    ("text", "message"),
    [("v4 = ", "is not TOML"), ("v9 = 1.0", "v9 = 1.0; expected dollars an hour"), ('v4 = "2"', "v4 = '2'")],
)
def test_a_file_that_is_no_table_of_prices_is_refused(tmp_path, monkeypatch, text, message):
    file = tmp_path / "prices.toml"
    file.write_text(text)
    monkeypatch.setenv("LLAMA_JAX_PRICES", str(file))
    with pytest.raises(ValueError, match=message):
        _ = parse_slice("v4-8").price
