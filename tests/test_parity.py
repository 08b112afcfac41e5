"""Equal to transformers: rope, norm, attention, block, logits, gradients, greedy tokens; both directions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

import llama_jax
from llama_jax.attention import Tokens
from llama_jax.checkpoint.layout import ModelSource
from llama_jax.model import Block
from llama_jax.rope import inverse_frequencies, rope_angles, rotate
from tests.reference import hf_logits, hf_model, relative_error, save_hf
from tests.tiny import TINY, VARIANTS


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """A transformers model and this project's model read from the directory that it saved."""
    theirs = hf_model(VARIANTS[request.param])
    path = save_hf(theirs, tmp_path_factory.mktemp("hf"))
    with llama_jax.use_mesh("data=1"):
        ours = llama_jax.load(path)
        assert ours.cfg == VARIANTS[request.param]
        yield theirs, ours


def random_tokens(cfg, shape, seed=0):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape)


def hidden_states(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("head_dim", "factor", "ranges"),
    [(128, 8.0, (29, 35)), (64, 32.0, (15, 18))],
    ids=["llama3.1", "llama3.2"],
)
def test_frequencies_are_kept_then_interpolated_then_divided(head_dim, factor, ranges):
    rope = dataclasses.replace(TINY.rope, factor=factor)
    scaled = inverse_frequencies(rope, head_dim)
    plain = inverse_frequencies(dataclasses.replace(rope, factor=1.0), head_dim)
    first, last = ranges
    np.testing.assert_array_equal(scaled[:first], plain[:first])
    np.testing.assert_array_equal(scaled[last:], plain[last:] / np.float32(factor))
    assert np.all((scaled[first:last] < plain[first:last]) & (scaled[first:last] > plain[first:last] / factor))


def test_frequencies_are_the_published_ones():
    published = {28: 3.2114459948e-03, 29: 2.1665707635e-03, 34: 1.7850781277e-04, 35: 9.5562123540e-05}
    ours = inverse_frequencies(TINY.rope, 128)
    for pair_index, value in (published | {63: 3.0689259889e-07}).items():
        assert ours[pair_index] == pytest.approx(value, rel=2e-7)  # the published digits are float64's


@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies_equal_transformers_to_the_bit(variant):
    cfg = VARIANTS[variant]
    theirs = hf_model(cfg).model.rotary_emb.inv_freq.numpy()
    np.testing.assert_array_equal(inverse_frequencies(cfg.rope, cfg.head_dim), theirs)


def test_rotation(pair):
    theirs, ours = pair
    cfg = ours.cfg
    x = hidden_states((2, 9, cfg.num_heads, cfg.head_dim))
    positions = np.stack([np.arange(9), np.arange(9) + 8190])
    cos, sin = theirs.model.rotary_emb(torch.tensor(x), torch.tensor(positions))
    expected, _ = modeling_llama.apply_rotary_pos_emb(
        torch.tensor(x).transpose(1, 2), torch.zeros(2, 1, 9, cfg.head_dim), cos, sin
    )
    rotated = rotate(jnp.asarray(x), *rope_angles(cfg.rope, cfg.head_dim, jnp.asarray(positions)))
    np.testing.assert_allclose(rotated, expected.transpose(1, 2).numpy(), atol=1e-5)


def test_norm(pair):
    theirs, ours = pair
    x = hidden_states((2, 5, ours.cfg.embed_dim))
    expected = theirs.model.norm(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(ours.final_norm(jnp.asarray(x)), expected, atol=1e-5)


def their_layer_inputs(theirs, x):
    length = x.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    angles = theirs.model.rotary_emb(torch.tensor(x), torch.arange(length)[None])
    return {"hidden_states": torch.tensor(x), "position_embeddings": angles, "attention_mask": mask}


def our_layer_inputs(ours, x):
    positions = jnp.arange(x.shape[1])[None].repeat(x.shape[0], 0)
    angles = rope_angles(ours.cfg.rope, ours.cfg.head_dim, positions)
    return jnp.asarray(x), angles, Tokens(positions, None), None


def test_attention(pair):
    theirs, ours = pair
    x = hidden_states((2, 11, ours.cfg.embed_dim))
    expected = theirs.model.layers[1].self_attn(**their_layer_inputs(theirs, x))[0].detach().numpy()
    out, _ = ours.blocks()[1].attention(*our_layer_inputs(ours, x))
    np.testing.assert_allclose(out, expected, atol=2e-5)  # outputs of size 3


def test_block(pair):
    theirs, ours = pair
    x = hidden_states((2, 11, ours.cfg.embed_dim))
    expected = theirs.model.layers[2](**their_layer_inputs(theirs, x))
    expected = (expected[0] if isinstance(expected, tuple) else expected).detach().numpy()
    block = ours.blocks()[2]
    assert isinstance(block, Block)
    out, _ = block(*our_layer_inputs(ours, x))
    np.testing.assert_allclose(out, expected.reshape(x.shape), atol=5e-5)  # outputs of size 10


def test_logits(pair):
    theirs, ours = pair
    tokens = random_tokens(ours.cfg, (2, 37))
    assert relative_error(ours(jnp.asarray(tokens)), hf_logits(theirs, tokens)) < 1e-5


@pytest.mark.parametrize(("start", "tolerance"), [(8_100, 1e-4), (16_200, 1e-3)])
def test_logits_at_far_positions(pair, start, tolerance):
    """float32 angles of 10,000 radians hold 1e-3, so errors grow with the position in any library."""
    theirs, ours = pair
    tokens = random_tokens(ours.cfg, (1, 64))
    positions = np.arange(start, start + 64)[None]
    expected = hf_logits(theirs, tokens, position_ids=torch.tensor(positions))
    assert relative_error(ours(jnp.asarray(tokens), jnp.asarray(positions)), expected) < tolerance


def test_logits_of_a_sequence_long_enough_for_query_blocks(pair):
    theirs, ours = pair
    tokens = random_tokens(ours.cfg, (1, 700))
    assert relative_error(ours(jnp.asarray(tokens)), hf_logits(theirs, tokens)) < 1e-4


def test_gradients(pair):
    theirs, ours = pair
    tokens = random_tokens(ours.cfg, (2, 160))
    theirs.zero_grad()
    theirs(torch.tensor(tokens), labels=torch.tensor(tokens)).loss.backward()

    def loss(model):
        log_probs = jax.nn.log_softmax(model(jnp.asarray(tokens)))[:, :-1]
        return -jnp.mean(jnp.take_along_axis(log_probs, jnp.asarray(tokens)[:, 1:, None], axis=-1))

    grads = ModelSource(jax.jit(jax.grad(loss))(ours))
    for name, parameter in theirs.named_parameters():
        expected = parameter.grad.numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grads.read(name), expected, atol=2e-4 * scale, err_msg=name)


def test_checkpoint_written_here_gives_equal_logits_in_transformers(pair, tmp_path):
    theirs, ours = pair
    llama_jax.save(ours, tmp_path / "out")
    again, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = random_tokens(ours.cfg, (2, 20))
    np.testing.assert_array_equal(hf_logits(again, tokens), hf_logits(theirs, tokens))


def test_segments_isolate_documents_to_the_bit(pair):
    _, ours = pair
    tokens = random_tokens(ours.cfg, (1, 24))
    segments = np.array([[1] * 10 + [2] * 14])
    positions = np.concatenate([np.arange(10), np.arange(14)])[None]
    run = jax.jit(lambda tokens: ours(tokens, jnp.asarray(positions), jnp.asarray(segments)))
    changed = tokens.copy()
    changed[0, :10] = random_tokens(ours.cfg, 10, seed=1)
    np.testing.assert_array_equal(run(tokens)[0, 10:], run(changed)[0, 10:])
    alone = ours(jnp.asarray(tokens[:, 10:]))
    np.testing.assert_allclose(run(tokens)[:, 10:], alone, atol=1e-4)
