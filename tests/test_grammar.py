"""Constraints against what they promise: brute force on tiny vocabularies, texts by other parsers, hostile input."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders

from infer.grammar import MAX_DEPTH, MAX_SOURCE_BYTES, Constraint, Grammars
from infer.sampling import SamplingParams, row_settings, sample
from llama_jax.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("llguidance", reason="llguidance is not installed")
DEMO = Path(__file__).parents[1] / "llama_jax" / "demo"


def tiny_tokenizer(*words: bytes, **fields) -> Tokenizer:
    """Every byte and some words; the last two are special, and called </s> and <pad>."""
    token_bytes = [bytes([i]) for i in range(256)] + [*words, b"</s>", b"<pad>"]
    stop = len(token_bytes) - 2

    def longest_first(text: str) -> list[int]:
        ids, rest = [], text.encode()
        while rest:
            ids.append(max(range(stop), key=lambda i: len(token_bytes[i]) if rest.startswith(token_bytes[i]) else 0))
            rest = rest[len(token_bytes[ids[-1]]) :]
        return ids

    special = {"</s>": stop, "<pad>": stop + 1}
    plain = Tokenizer(longest_first, token_bytes, special, None, stop, 0, frozenset([stop]))
    return dataclasses.replace(plain, **fields)


def may(constraint: Constraint) -> list[int]:
    return np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist()


def written(tokenizer: Tokenizer, constraint: Constraint, seed: int, most: int = 4000) -> str | None:
    """A text from random logits, sampled under the masks; None if it does not end."""
    random, draw, ids = np.random.default_rng(seed), jax.jit(sample), []
    rows = row_settings([SamplingParams(temperature=1.0, seed=seed)])
    # Random texts go ever deeper: what closes something, or ends the text, is likelier.
    closing = np.array([8.0 if piece[:1] in (b"}", b"]", b'"') else 0.0 for piece in tokenizer.token_bytes], np.float32)
    closing[list(tokenizer.stop_ids)] = 8.0
    for _ in range(most):
        logits = random.normal(0, 2, (1, tokenizer.vocab_size)).astype(np.float32) + closing
        mask = constraint.mask()[None]
        token = int(draw(logits, rows, np.array([len(ids)], np.int32), allowed=mask).tokens[0])
        if token in tokenizer.stop_ids:
            return tokenizer.decode(ids)
        ids.append(token)
        assert constraint.accept(token)
        if constraint.finished:
            assert not constraint.error
            return tokenizer.decode(ids)
    return None


# What comes out fits.


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def grammars(demo) -> Grammars:
    return Grammars(demo)


SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["a", "b\n", "\u00e9"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "choice": {"anyOf": [{"type": "null"}, {"type": "number"}, {"const": {"x": [1, True]}}]},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,4}$"},
    "date": {"type": "object", "properties": {"on": {"type": "string", "format": "date"}}, "required": ["on"]},
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"of": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}},
                "required": ["of"],
                "additionalProperties": False,
            }
        },
    },
}


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
def test_texts_of_random_logits_are_json_of_the_schema(demo, grammars, schema):
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    texts = [written(demo, grammars.json_schema(schema), seed) for seed in range(8)]
    assert len(set(texts) - {None}) > 3
    for text in filter(None, texts):
        validator.validate(json.loads(text))


def test_texts_of_random_logits_are_json_objects(demo, grammars):
    texts = [written(demo, grammars.json_object(), seed) for seed in range(8)]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 3 and all(isinstance(json.loads(text), dict) for text in ended)


@pytest.mark.parametrize(
    "pattern", ["[a-c]{3}-[0-9]+x", "(yes|no|maybe)", "[a-z]{2,5}( [a-z]{2,5}){0,3}[.]", "[\u03b1-\u03c9]{2}"]
)
def test_texts_of_random_logits_match_the_pattern(demo, grammars, pattern):
    for seed in range(6):
        text = written(demo, grammars.regex(pattern), seed)
        assert text is not None and re.fullmatch(pattern, text)


def test_texts_of_random_logits_follow_the_grammar(demo, grammars):
    grammar = 'start: sum\nsum: term ("+" term)*\nterm: /[0-9]{1,3}/ | "(" sum ")"'
    texts = [written(demo, grammars.lark(grammar), seed, most=300) for seed in range(8)]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 3
    for text in ended:
        assert re.fullmatch(r"[0-9+()]+", text)
        compile(re.sub(r"\d+", "1", text), "sum", "eval")


# The masks are exact.

WORDS = (b"a", b"ab", b"abc", b"b", b"ba", b"cab", b"</s>", b"\xc3\xa9", b"a\xc3", b"<pad>", b"bb")


def beginnings(texts: list[str]) -> set[bytes]:
    return {text.encode()[:i] for text in texts for i in range(len(text.encode()) + 1)}


LANGUAGES: dict[str, Callable[[], Iterator[str]]] = {
    "(a|b){1,4}": lambda: ("".join("ab"[i >> k & 1] for k in range(n)) for n in range(1, 5) for i in range(2**n)),
    "a?b?c?(ab|\u00e9)": lambda: (a + b + c + end for a in ("", "a") for b in ("", "b") for c in ("", "c")
                                  for end in ("ab", "\u00e9")),
    "(</s>|<pad>|a)b": lambda: iter(["</s>b", "<pad>b", "ab"]),
}  # fmt: skip


@pytest.mark.parametrize("pattern", LANGUAGES)
def test_masks_equal_brute_force_over_every_text(pattern):
    """Where one text is forced, its own tokens alone may come; elsewhere all that begin a text do."""
    tokenizer, texts = tiny_tokenizer(*WORDS), list(LANGUAGES[pattern]())
    whole, begun = {text.encode() for text in texts}, beginnings(texts)
    pending, seen, forced = [(b"", Grammars(tokenizer).regex(pattern))], set(), 0
    while pending:
        so_far, constraint = pending.pop()
        if so_far in seen:
            continue
        seen.add(so_far)
        expected = {i for i in range(256 + len(WORDS)) if so_far + tokenizer.token_bytes[i] in begun}
        expected |= set(tokenizer.stop_ids) if so_far in whole else set()
        got = set(may(constraint))
        if len({(so_far + tokenizer.token_bytes[i])[: len(so_far) + 1] for i in expected}) == 1 and expected != got:
            forced += 1
            assert got and got < expected
        else:
            assert got == expected, so_far
        for token in got - tokenizer.stop_ids:
            after = constraint.copy()
            assert after.accept(token)
            pending.append((so_far + tokenizer.token_bytes[token], after))
    assert whole <= seen and forced < len(seen) / 3


def test_special_tokens_are_not_the_text_they_are_called_by():
    tokenizer = tiny_tokenizer(b"</", b"s>")
    constraint = Grammars(tokenizer).regex("(</s>|<pad>){3}")
    assert not set(may(constraint)) & tokenizer.special_ids
    assert b"</s>" not in [tokenizer.token_bytes[token] for token in may(constraint)]


def test_text_that_is_forced_is_written_without_the_space_that_an_encoder_adds(tmp_path):
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={"</s>": 0, "\u2581": 1, "a": 2, "b": 3, "\u2581a": 4, "ab": 5, "\u2581ab": 6, ",": 7},
            merges=[("\u2581", "a"), ("a", "b"), ("\u2581a", "b")],
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()  # type: ignore[assignment]
    backend.decoder = decoders.Metaspace()  # type: ignore[assignment]
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab" and tokenizer.encode("ab") == [6]
    for pattern in ("ab,ab", " ab,ab"):
        constraint, pieces = Grammars(tokenizer).regex(pattern), []
        while not constraint.finished:
            token = may(constraint)[-1]
            pieces.append(tokenizer.token_bytes[token])
            assert constraint.accept(token)
        assert b"".join(pieces) == pattern.encode()


def test_the_text_may_end_only_where_it_fits_and_by_every_stop_token():
    tokenizer = tiny_tokenizer()
    stops = frozenset([tokenizer.vocab_size - 2, tokenizer.vocab_size - 1])
    constraint = Grammars(dataclasses.replace(tokenizer, stop_ids=stops)).regex("ab+")
    assert may(constraint) == [ord("a")]
    assert constraint.accept(ord("a")) and may(constraint) == [ord("b")]
    assert constraint.accept(ord("b")) and set(may(constraint)) == stops | {ord("b")}
    assert not constraint.finished
    assert constraint.accept(min(stops)) and constraint.finished and not constraint.error


def test_tokens_that_only_the_model_has_never_come():
    tokenizer = tiny_tokenizer()
    constraint = Grammars(tokenizer, 1000).regex("(?s:.){3}")
    assert len(constraint.mask()) == 32
    assert max(may(constraint)) < tokenizer.vocab_size


def test_a_token_that_may_not_come_ends_the_text_with_an_error():
    constraint = Grammars(tiny_tokenizer()).regex("ab")
    apart = constraint.copy()
    assert not constraint.accept(ord("x"))
    assert constraint.finished and constraint.error and "\n" not in constraint.error
    assert may(constraint) == [256]  # so that the text ends
    assert apart.accept(ord("a")) and not apart.error


# What cannot be used.


def nested(depth: int) -> dict:
    schema: dict = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


REFUSED = {
    "a regex without an end": (lambda g: g.regex("(a"), "unclosed group"),
    "a back reference": (lambda g: g.regex(r"(a)\1"), "backreferences are not supported"),
    "look-around": (lambda g: g.regex("(?=a)b"), "look-ahead"),
    "a regex bomb": (lambda g: g.regex("(a{1000}){1000}"), "too many expressions"),
    "a deeper regex bomb": (lambda g: g.regex("((a{1000}){1000}){1000}"), "too many expressions"),
    "a deep regex": (lambda g: g.regex("(" * 30_000 + ")" * 30_000), "nested parentheses"),
    "half a surrogate pair": (lambda g: g.regex("\ud800"), "surrogates not allowed"),
    "a large regex": (lambda g: g.regex("a" * MAX_SOURCE_BYTES + "b"), "131073 bytes, at most 131072"),
    "a name that is not there": (lambda g: g.lark("start: x"), "unknown name"),
    "a deep grammar": (lambda g: g.lark("start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "too deeply nested"),
    "a wrong type": (lambda g: g.json_schema({"type": "strnig"}), "Invalid type: strnig"),
    "an unknown keyword": (lambda g: g.json_schema({"not": {"type": "null"}}), "Unimplemented keys"),
    "what nothing fits": (lambda g: g.json_schema({"type": "string", "minLength": 5, "maxLength": 2}), "Unsatisfiable"),
    "false": (lambda g: g.json_schema(False), "Unsatisfiable"),
    "a list": (lambda g: g.json_schema([1]), "must be an object or boolean"),
    "an object that is not JSON": (lambda g: g.json_schema({"const": {1, 2}}), "is not JSON"),
    "not a number": (lambda g: g.json_schema({"minimum": float("nan")}), "not JSON"),
    "a reference elsewhere": (lambda g: g.json_schema({"$ref": "http://localhost/x"}), "does not fetch"),
    "a reference to itself": (
        lambda g: g.json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        "no text fits it",
    ),
    "a deep schema": (lambda g: g.json_schema(nested(100_000)), f"deeper than {MAX_DEPTH} levels"),
    "a large schema": (lambda g: g.json_schema({"enum": ["x" * MAX_SOURCE_BYTES]}), "bytes, at most"),
    "a bomb in a schema": (lambda g: g.json_schema({"type": "string", "pattern": "^(a{1000}){1000}$"}), "too many"),
    "too many branches": (
        lambda g: g.json_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}),
        "too|max is",
    ),
}


@pytest.mark.parametrize(("compiled", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_one_line(grammars, compiled, reason):
    with pytest.raises(ValueError, match=reason) as error:
        compiled(grammars)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_schema_as_deep_as_is_taken_compiles(grammars):
    assert not grammars.json_schema(nested(MAX_DEPTH // 2 - 1)).error


def test_without_llguidance_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="need llguidance: install"):
        Grammars(tiny_tokenizer())


def test_a_tokenizer_that_cannot_end_a_text_is_refused():
    with pytest.raises(ValueError, match="a stop token"):
        Grammars(tiny_tokenizer(stop_ids=frozenset()))


def test_the_vocabulary_of_llama_3_writes_json_of_a_schema(shared_data):
    tokenizer = load_tokenizer(shared_data / "llama3")
    grammars = Grammars(tokenizer)
    text = '{"name": "J\u00fcrgen \U0001f600", "age": 34, "tags": ["a", "\u00e9"]}'
    constraint = grammars.json_schema(SCHEMAS["person"])
    for token in tokenizer.encode(text):
        assert token in may(constraint) and constraint.accept(token)
    assert set(may(constraint)) == tokenizer.stop_ids and constraint.finished
    assert not set(may(grammars.regex("(?s:.)*"))) & (tokenizer.special_ids - tokenizer.stop_ids)
