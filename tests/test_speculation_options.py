"""The options for speculation: the text stays the same, what was guessed is told, mistakes are one line."""

import json
import shutil

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from tests.test_generate import NAMES, checkpoint, expected, run, weights, write_tokenizer

__all__ = ["checkpoint", "expected", "run", "weights"]


@pytest.mark.parametrize("options", [["--speculate", "ngram"], ["--draft"]], ids=" ".join)
def test_a_text_is_the_same_with_guesses_and_what_became_of_them_is_told(options, run, checkpoint, expected):
    options = [*options, checkpoint] if options == ["--draft"] else options
    status, out, err = run("def f", "--json", "--checkpoint", checkpoint, "--num-draft-tokens", "2", *options)
    result = json.loads(out)
    assert (status, result["text"]) == (0, expected.text)
    if options[0] == "--draft":  # it is the model itself: 7 tokens after the first in 3 steps
        assert result["accepted_tokens"] == result["draft_tokens"] == 4
        assert "100% of 4 draft tokens accepted" in err[-2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--num-draft-tokens", "3"],
            "--num-draft-tokens needs something that guesses: --draft C or --speculate ngram",
        ),
        (["--speculate", "ngram", "--num-draft-tokens", "99"], "num_draft_tokens=99: expected 1 to 32"),
        (["--num-draft-tokens", "2", "--plan", "v4:1x1x1"], "needs something that guesses: --draft C or --speculate"),
        (["--draft", "absent"], "absent"),
    ],
)
def test_options_that_cannot_be_are_one_line(options, said, run, checkpoint):
    status, out, err = run("x", "--checkpoint", checkpoint, *options)
    assert (status, out) == (1, "") and said in err[-1]


def test_a_draft_with_another_tokenizer_or_a_shorter_context_is_refused(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "draft")
    write_tokenizer(tmp_path / "draft", names=[*NAMES[:-1], "other"])
    status, _, err = run("x", "--checkpoint", checkpoint, "--draft", str(tmp_path / "draft"))
    assert status == 1 and "has another tokenizer than the model; use one with the same" in err[-1]
    file = tmp_path / "draft" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 32}))
    status, _, err = run("x", "--checkpoint", checkpoint, "--draft", str(tmp_path / "draft"))
    assert status == 1 and "the draft has a context of 32 tokens and 64 are served; use max_seq_len=32" in err[-1]
