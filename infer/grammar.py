"""Texts that must fit a JSON schema, a regular expression or a grammar, by llguidance (extra "serve").

A constraint tells before each token which may come, as bits that `infer.sampling.sample` applies on the
device. The invariant: what is generated under it is a beginning of a text that fits, made of the bytes of
ordinary tokens alone; special tokens are never taken for the text they are named by, and the tokens that
end a generation come only where the text fits.
"""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SOURCE_BYTES = 2**17
MAX_DEPTH = 64
_SPACE = r"( |\n{1,2}[ \t]{0,20})?"  # without an end a model may write nothing else until its tokens are used up
# llguidance's own, but the first, a fifth of theirs: text that a pattern forces, as (a{1000}){1000} does, is built
# at once, which ends after a tenth of a second at this; an enum of 10,000 strings still passes.
_LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 250_000,
    "verbose_errors": False,
}


class Grammars:
    """Compiles what a text must fit, for one tokenizer; building it takes a second for 128,256 tokens.

    Its methods may be called from several threads, and leave Python free while they work.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int | None = None):
        """vocab_size is the model's, if it is not the tokenizer's: tokens that only the model has never come.

        Raises ValueError without llguidance and for a tokenizer that has no token to end a text with.
        """
        try:
            import llguidance
        except ImportError:
            raise ValueError(
                'schemas and grammars need llguidance: install it, or this package with "[serve]"'
            ) from None
        if not tokenizer.stop_ids:
            raise ValueError("schemas and grammars need a tokenizer with a stop token, and this one has none")
        self._library = llguidance
        self._limits = llguidance.LLParserLimits(**_LIMITS)
        self._num_words = -(-(vocab_size or tokenizer.vocab_size) // 32)
        self._stops = np.zeros(self._num_words, np.uint32)
        for stop in tokenizer.stop_ids:
            self._stops[stop // 32] |= np.uint32(1 << stop % 32)
        self._tokenizer = _guidance_tokenizer(tokenizer)

    def json_schema(self, schema: Mapping[str, Any] | bool) -> "Constraint":
        """Texts that are JSON and fit a schema, with a space or a new indented line where JSON may have it.

        Raises ValueError for a schema that is wrong, too large, or has what llguidance does not know.
        """
        _check_depth(schema)
        try:
            source = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the schema is not JSON: {error}") from None
        _check_size("the schema", source)
        space: Any = {"whitespace_pattern": _SPACE} if isinstance(schema, Mapping) else None
        grammar = self._library.LLMatcher.grammar_from_json_schema(source, overrides=space)
        return self._compiled("the schema", grammar)

    def json_object(self) -> "Constraint":
        """Texts that are a JSON object, whatever is in it."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> "Constraint":
        """Texts that a regular expression matches from end to end; no look-around, no back references.

        Raises ValueError for a pattern that is wrong or too large.
        """
        _check_size("the regular expression", pattern)
        return self._compiled("the regular expression", self._library.LLMatcher.grammar_from_regex(pattern))

    def lark(self, grammar: str) -> "Constraint":
        """Texts of a context-free grammar in the form of Lark, whose first rule is `start`.

        Raises ValueError for a grammar that is wrong or too large.
        """
        _check_size("the grammar", grammar)
        return self._compiled("the grammar", self._library.LLMatcher.grammar_from_lark(grammar))

    def _compiled(self, what: str, source: str) -> "Constraint":
        matcher = self._library.LLMatcher(self._tokenizer, source, log_level=0, limits=self._limits)
        constraint = Constraint(matcher, self._stops)
        # What is too much shows at the first tokens, if not before.
        trial = constraint.copy()
        trial.accept(int(np.flatnonzero(np.unpackbits(trial.mask().view(np.uint8), bitorder="little"))[0]))
        trial.mask()
        if error := constraint.error or trial.error:
            raise ValueError(f"{what} cannot be used: {error}")
        return constraint


class Constraint:
    """Where one text stands in what it must fit."""

    def __init__(self, matcher: "LLMatcher", stops: np.ndarray):
        self._matcher = matcher
        self._stops = stops

    def mask(self) -> np.ndarray:
        """The tokens that may come next, bits uint32 [ceil(V / 32)] as in `infer.sampling.token_mask`.

        Where the text fits, the tokens that end it are among them. They are the only ones after an error.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), "<u4")[: len(self._stops)]
        if self._matcher.is_error():
            return self._stops.copy()
        return np.pad(words, (0, len(self._stops) - len(words)))

    def accept(self, token: int) -> bool:
        """Take the token that came; False, and an error, if it was not among those that may."""
        return self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether nothing more can come: the text is complete and no longer one fits, or there was an error."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why the text cannot go on, in one line; "" if it can or has ended."""
        if not self._matcher.is_error():
            return ""
        said = " ".join(self._matcher.get_error().replace("<non-verbose/>", "").split())
        if said.startswith("NoExtension"):
            return "no text fits it"
        # Around the reason stand the place and the source, which may be long.
        return re.sub(r" \d+ \| .*", "", said.rpartition("error: ")[2])[:200]

    def copy(self) -> "Constraint":
        """The same, from here on apart: for another text of the same beginning."""
        return Constraint(self._matcher.deep_copy(), self._stops)


def _guidance_tokenizer(tokenizer: Tokenizer) -> "LLTokenizer":
    from llguidance import LLTokenizer, TokenizerWrapper

    class Vocabulary:
        """What llguidance reads of a tokenizer."""

        eos_token_id = min(tokenizer.stop_ids)
        bos_token_id = tokenizer.bos_id
        tokens = tokenizer.token_bytes
        special_token_ids = sorted(tokenizer.special_ids)

        def __call__(self, text: str) -> list[int]:
            """Ids with exactly the bytes of a text: where only one text fits, they are all that may come."""
            # An encoder that puts a space before the text has put the one that the text begins with.
            for shorter in (text, text.removeprefix(" ")):
                ids = tokenizer.encode(shorter)
                if b"".join(tokenizer.token_bytes[i] for i in ids) == text.encode():
                    return ids
            return built.greedy_tokenize(text)

    vocabulary = TokenizerWrapper(Vocabulary())
    built = LLTokenizer(vocabulary, eos_token=sorted(tokenizer.stop_ids), slices=LLTokenizer.json_slices())
    return built


def _check_size(what: str, source: str) -> None:
    size = len(source.encode(errors="replace"))
    if size > MAX_SOURCE_BYTES:
        raise ValueError(f"{what} has {size} bytes, at most {MAX_SOURCE_BYTES} are taken; make it smaller")


def _check_depth(schema) -> None:
    """Raises ValueError for values within values deeper than MAX_DEPTH, which would exhaust a parser's stack."""
    level = [schema]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError(f"the schema is nested deeper than {MAX_DEPTH} levels; make it flatter, or use $ref")


def _inside(value) -> list:
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [inner for inner in values if isinstance(inner, Mapping | list | tuple)]
