"""Beam search against transformers' own, and against every text there is."""

import itertools

import numpy as np
import pytest
import torch

import llama_jax
from infer.beam import Beam, beam_search
from tests.reference import hf_model, save_hf
from tests.tiny import TINY

PROMPT = [5, 99, 3, 17, 64]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    theirs = hf_model(TINY)
    theirs.generation_config.eos_token_id = None
    return theirs, save_hf(theirs, tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def pair(path):
    """A transformers model, and ours of the same weights."""
    with llama_jax.use_mesh("data=1"):
        return path[0], llama_jax.load(path[1])


def their_beams(model, num_beams: int, max_new_tokens: int, stops: list[int], length_penalty: float) -> list[Beam]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT)),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=127,
            do_sample=False,
            length_penalty=length_penalty,
            return_dict_in_generate=True,
            output_scores=True,
        )
    beams = []
    for row, score in zip(out.sequences[:, len(PROMPT) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        beams.append(Beam(tuple(row[:end]), score))
    return beams


@pytest.mark.parametrize(
    ("num_beams", "stops", "length_penalty"),
    [
        (4, [], 1.0),
        (3, [40, 41], 1.0),
        (4, list(range(30, 60)), 1.0),
        (4, list(range(30, 60)), 0.0),
        (5, list(range(20, 40)), -1.0),
        (2, list(range(0, 127, 3)), 2.0),
    ],
)
def test_beams_and_scores_equal_transformers(pair, num_beams, stops, length_penalty):
    theirs, ours = pair
    expected = their_beams(theirs, num_beams, 12, stops, length_penalty)
    found = beam_search(
        ours, PROMPT, num_beams=num_beams, max_new_tokens=12, stop_tokens=stops, length_penalty=length_penalty
    )
    assert [beam.tokens for beam in found] == [beam.tokens for beam in expected]
    np.testing.assert_allclose([b.score for b in found], [b.score for b in expected], rtol=1e-4)


def test_one_beam_is_the_greedy_text(pair):
    theirs, ours = pair
    with torch.no_grad():
        expected = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    (found,) = beam_search(ours, PROMPT, num_beams=1, max_new_tokens=12)
    assert list(found.tokens) == expected[len(PROMPT) :].tolist()


def test_enough_beams_find_the_likeliest_of_all_texts(pair):
    _, ours = pair
    with llama_jax.use_mesh("data=1"):
        first = np.asarray(ours(np.array([PROMPT], np.int32)))[0, -1]
        each = np.asarray(ours(np.array([[*PROMPT, token] for token in range(128)], np.int32)))[:, -1]
    first, each = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (first, each))
    texts = sorted(itertools.product(range(128), repeat=2), key=lambda text: -(first[text[0]] + each[text]))
    found = beam_search(ours, PROMPT, num_beams=128, max_new_tokens=2)
    assert [beam.tokens for beam in found[:20]] == texts[:20]


def test_a_mesh_finds_the_same_beams(path, pair):
    expected = beam_search(pair[1], PROMPT, num_beams=3, max_new_tokens=6)
    with llama_jax.use_mesh("data=2,context=2,tensor=2"):
        model = llama_jax.load(path[1])
    found = beam_search(model, PROMPT, num_beams=3, max_new_tokens=6)
    assert [beam.tokens for beam in found] == [beam.tokens for beam in expected]


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ([], {}, "expected a prompt, got 0 tokens"),
        ([1], {"num_beams": 0}, "num_beams=0"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([1] * 1000, {"max_new_tokens": 25}, "do not fit the model's 1024"),
    ],
)
def test_what_cannot_be_searched_is_refused(pair, prompt, options, reason):
    with pytest.raises(ValueError, match=reason):
        beam_search(pair[1], prompt, **options)
