"""cuDNN's attention: what is picked where, the offsets it is told, and, on a GPU, its numbers against the reference.

Without a GPU its function is replaced by what jax documents it to do, and the program is lowered for CUDA.
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import attention
from llama_jax.attention import _kernel, blocked_attention, self_attend
from llama_jax.kernels import SAVED_NAME, Tokens, cudnn
from llama_jax.kernels.cudnn import MOST_DOCUMENTS, cudnn_attention, documents
from llama_jax.mesh import use_mesh
from tests.test_tiled import both, in_order, reference, sequence
from tests.test_tiled import documents as packed

LENGTH = 48
H100 = "NVIDIA H100 80GB HBM3"
MASKS = cudnn.cudnn.MaskType


@pytest.mark.parametrize(
    "kind", [H100, "NVIDIA H200", "NVIDIA H20", "NVIDIA GH200 480GB", "NVIDIA B200", "NVIDIA GB200", "NVIDIA H100 PCIe"]
)
def test_from_hopper_on_data_center_gpus_take_cudnn(kind):
    assert _kernel(SimpleNamespace(platform="gpu", device_kind=kind)).func is cudnn_attention


@pytest.mark.parametrize(
    "kind",
    [
        "NVIDIA A100-SXM4-80GB",
        "Tesla V100-SXM2-16GB",
        "NVIDIA GeForce RTX 5090",
        "NVIDIA GB10",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_a_gpu_not_known_to_keep_documents_apart_takes_the_exact_blocks(kind):
    assert _kernel(SimpleNamespace(platform="gpu", device_kind=kind)) is blocked_attention


@pytest.mark.parametrize(("platform", "name"), [("cpu", "cpu_attention"), ("tpu", "splash_attention")])
def test_other_platforms_keep_their_kernels(platform, name):
    # A CPU that plans for GPUs has the kind of a CPU and no cuDNN.
    assert _kernel(SimpleNamespace(platform=platform, device_kind=H100)).__name__ == name


def test_offsets_and_lengths_say_where_each_document_stands():
    starts, lengths, apart = jax.jit(documents)(jnp.asarray([[1, 1, 1, 2, 2, 7, -1, -1], [5] * 8], jnp.int32))
    np.testing.assert_array_equal(starts[:, :6], [[0, 3, 5, 6, -1, -1], [0, -1, -1, -1, -1, -1]])
    np.testing.assert_array_equal(lengths[:, :5], [[3, 2, 1, 2, -1], [8, -1, -1, -1, -1]])
    assert starts.shape == (2, MOST_DOCUMENTS + 1) and lengths.shape == (2, MOST_DOCUMENTS)
    assert starts.dtype == lengths.dtype == jnp.int32 and apart


@pytest.mark.parametrize(
    ("ids", "apart"),
    [
        (range(MOST_DOCUMENTS), True),
        (range(MOST_DOCUMENTS + 1), False),
        ([1, 2, 1], False),  # the tokens of document 1 see each other, which the kernel would not know
        ([3, 2, 1, 0, -1], True),
    ],
)
def test_rows_that_the_kernel_would_get_wrong_are_seen(ids, apart):
    row = np.full(2 * MOST_DOCUMENTS, [*ids][-1], np.int32)
    row[: len(ids)] = ids
    assert bool(jax.jit(documents)(np.stack([row, np.zeros_like(row)]))[2]) is apart


def documented(q, k, v, *, scale, mask_type, **packed):
    """What jax says of its kernel; below 0.12 it must be given as many heads of keys as of queries."""
    batch, length, heads, _ = q.shape
    if not packed:
        assert mask_type == MASKS.CAUSAL
        segments = jnp.zeros((batch, length), jnp.int32)
    else:
        assert mask_type == MASKS.PADDING_CAUSAL and len(packed) == 4
        offsets, lengths = packed["q_offsets"], packed["q_seqlen"]
        assert offsets is packed["kv_offsets"] and lengths is packed["kv_seqlen"]
        assert jax.__version_info__ >= (0, 12) or k.shape[2] == heads
        index = jnp.arange(length)
        starts, ends = offsets[:, :-1, None], (offsets[:, :-1] + lengths)[:, :, None]
        inside = (lengths[:, :, None] >= 0) & (index >= starts) & (index < ends)  # [B, M, T]
        segments = jnp.where(inside.any(axis=1), inside.argmax(axis=1), -1 - index)
    tokens = Tokens(in_order(length, batch).positions, segments.astype(jnp.int32))
    q = q.reshape(batch, length, k.shape[2], -1, q.shape[3])
    assert scale == q.shape[-1] ** -0.5
    return attention._attend_here(q, k.swapaxes(1, 2), v.swapaxes(1, 2), tokens, tokens, merged_axes=()).reshape(
        batch, length, heads, -1
    )


def never(*_):
    raise AssertionError("the kernel should have been used")


@pytest.fixture
def use_cudnn(monkeypatch):
    """Let `self_attend` take the kernel with another `otherwise`, replaced by what it is documented to do."""
    monkeypatch.setattr(cudnn.cudnn, "dot_product_attention", documented)

    def use(otherwise=blocked_attention):
        kernel = functools.partial(cudnn_attention, otherwise=otherwise)
        monkeypatch.setattr(attention, "_kernel", lambda device: kernel)

    use()
    return use


def by_cudnn(q, k, v, tokens):
    return self_attend(q, k, v, tokens=tokens)


def many(length: int) -> Tokens:
    """A document a token, beside a row that is one."""
    segments = np.stack([np.arange(length), np.zeros(length)]).astype(np.int32)
    return Tokens(in_order(length).positions, jnp.asarray(segments))


def torn(length: int) -> Tokens:
    """A document in two places of its row."""
    return Tokens(in_order(length).positions, jnp.asarray(np.arange(length) // 20 % 2 + np.zeros((2, 1)), jnp.int32))


@pytest.mark.parametrize(
    ("tokens", "version"),
    [(in_order, (0, 10, 2)), (packed, (0, 10, 2)), (packed, (0, 12, 0)), (many, (0, 10, 2)), (torn, (0, 10, 2))],
)
def test_values_and_gradients_equal_the_reference(tokens, version, use_cudnn, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(cudnn, "MOST_DOCUMENTS", 16)  # of `many` there are more
    with use_mesh("data=1"):
        args = (*sequence(LENGTH, dtype=jnp.bfloat16), tokens(LENGTH))
        expected = both(jax.jit(reference), *args)
        actual = both(jax.jit(by_cudnn), *args)
    for got, want in zip(actual, expected, strict=True):
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        np.testing.assert_allclose(got, want, atol=2e-2 * float(jnp.abs(want).max()), rtol=0)  # bfloat16, other orders


@pytest.mark.parametrize("changed", ["k", "v"])
def test_a_change_to_one_document_leaves_the_others_to_the_bit(changed, use_cudnn):
    with use_mesh("data=1"):
        q, k, v = sequence(LENGTH, dtype=jnp.bfloat16)
        tokens = packed(LENGTH)
        other = {"k": k, "v": v} | {changed: dict(k=k, v=v)[changed].at[:, 0].set(9)}
        before = jax.jit(by_cudnn)(q, k, v, tokens)
        after = jax.jit(by_cudnn)(q, other["k"], other["v"], tokens)
    first = np.asarray(tokens.segment_ids == 0)
    np.testing.assert_array_equal(before[~first], after[~first])
    assert (before[first] != after[first]).any()


@pytest.mark.parametrize(("dtype", "head_dim"), [(jnp.float32, 64), (jnp.bfloat16, 20), (jnp.bfloat16, 264)])
def test_what_the_kernel_lacks_goes_to_the_blocks(dtype, head_dim, use_cudnn, monkeypatch):
    monkeypatch.setattr(cudnn.cudnn, "dot_product_attention", never)
    with use_mesh("data=1"):
        q, k, v = sequence(8, dtype=dtype, head_dim=head_dim)
        assert jax.jit(by_cudnn)(q, k, v, in_order(8)).dtype == dtype


def test_a_sequence_split_over_context_goes_to_the_blocks(use_cudnn, monkeypatch):
    with use_mesh("context=2"):
        q, k, v = sequence(LENGTH, dtype=jnp.bfloat16)
        split = jax.sharding.PartitionSpec(None, "context")
        positions = jax.sharding.reshard(in_order(LENGTH).positions, split)
        monkeypatch.setattr(cudnn.cudnn, "dot_product_attention", never)
        lowered = jax.jit(by_cudnn).lower(jax.sharding.reshard(q, split), k, v, Tokens(positions, positions * 0))
        assert "dot_general" in lowered.as_text(), "XLA's own products"


def test_a_remat_policy_can_save_the_result(use_cudnn):
    use_cudnn(never)  # no documents: the kernel alone
    policy = jax.checkpoint_policies.save_only_these_names(SAVED_NAME)
    with use_mesh("data=1"):
        q, k, v = sequence(LENGTH, dtype=jnp.bfloat16)

        def saved(**options):
            attend = jax.checkpoint(lambda q: jnp.sin(by_cudnn(q, k, v, in_order(LENGTH))), **options)
            _, pull = jax.eval_shape(lambda q: jax.vjp(attend, q), q)
            return len([leaf for leaf in jax.tree.leaves(pull) if leaf.shape == q.shape])

        assert saved(policy=policy) == saved() + 1


@pytest.fixture
def pretend_hopper(monkeypatch):
    """Before it lowers, jax asks the driver and cuDNN; let them answer like an H100's."""
    monkeypatch.setattr(cudnn.cudnn, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn.cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn.cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    kernel = _kernel(SimpleNamespace(platform="gpu", device_kind=H100))
    monkeypatch.setattr(attention, "_kernel", lambda device: kernel)


def calls(tokens: Tokens) -> list[tuple[str, dict]]:
    """Name and configuration of the calls of cuDNN in the program for CUDA of attention and its gradient."""
    with use_mesh("data=1"):
        q, k, v = sequence(LENGTH, num_kv_heads=2, num_groups=3, head_dim=64, dtype=jnp.bfloat16)
        traced = jax.jit(lambda *args: both(by_cudnn, *args)).trace(q, k, v, tokens)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    found = re.findall(r"custom_call @__cudnn\$(\w+)\(.*?backend_config = \"(.*?)\", ", text)
    configs = [json.loads(re.sub(r"\\(..)", lambda code: chr(int(code[1], 16)), config)) for _, config in found]
    return [(name, config["cudnn_fmha_backend_config"]) for (name, _), config in zip(found, configs, strict=True)]


@pytest.mark.parametrize(
    ("tokens", "mask", "segments"), [(in_order, "CAUSAL", 1), (packed, "PADDING_CAUSAL", MOST_DOCUMENTS)]
)
def test_the_program_for_cuda_calls_cudnn_forward_and_backward(tokens, mask, segments, pretend_hopper):
    found = calls(tokens(LENGTH))
    assert [name for name, _ in found] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    for _, config in found:
        assert (config["mask_type"], config["max_seg_per_batch"], config["fmha_scale"]) == (mask, segments, 64**-0.5)
        assert config["intermediate_tensor_shape"]["dimensions"] == ["2", "6", str(LENGTH), str(LENGTH)]


def main() -> None:
    """In a process of its own on a GPU: largest differences from the reference in float32, of the largest value."""
    with use_mesh("data=1"):
        kernel = _kernel(jax.sharding.get_abstract_mesh().abstract_device)
        length, worst = 1024, 0.0
        for tokens in (in_order(length), packed(length)):
            args = sequence(length, num_kv_heads=2, num_groups=4, head_dim=128, dtype=jnp.bfloat16)
            exact = [x.astype(jnp.float32) for x in args]
            pairs = zip(both(jax.jit(by_cudnn), *args, tokens), both(jax.jit(reference), *exact, tokens), strict=True)
            worst = max(worst, *(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs))
    print(json.dumps({"kernel": getattr(kernel, "func", kernel).__name__, "worst": worst}))


def test_on_a_gpu_values_and_gradients_equal_the_reference():
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is no NVIDIA GPU here")
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-c", "from tests.test_cudnn import main; main()"]
    run = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(run.stdout.splitlines()[-1])
    if found["kernel"] != "cudnn_attention":
        pytest.skip("the GPU here is not one that takes cuDNN's attention")
    assert found["worst"] < 3e-2  # bfloat16
