"""Recall over the whole window: a synthetic source that teaches it, and needles that show it.

Packed text seldom rewards looking far back. Here statements such as "small turtle month signal." are strewn over
text and made again later: the value, "month signal", is predicted only by looking back to where the key, "small
turtle", stood. The value follows its key at once, and many rows hold little else: so induction heads (arXiv
2209.11895) can form within a few hundred steps of a model of a few million parameters (docs/demo.md); with words
between the two and statements strewn thinly they did not form within a thousand.
A needle is a statement in held-out text that is asked for at the end (the test of
github.com/gkamradt/LLMTest_NeedleInAHaystack). The invariant: rows are functions of their arguments alone, made
from the raw 64-bit draws of Philox, which NumPy promises never to change (NEP 19).
"""

import functools
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec, reshard
from jax.typing import DTypeLike

from llama_jax.model import Llama
from llama_jax.rounding import computed_in
from llama_jax.tokenizer import Tokenizer
from train.data.packing import Batch, pack, stack
from train.data.shards import TokenDataset
from train.device import put_batch
from train.evaluation import equal_batches

SHARES = (1.0, 0.5, 0.25)  # of a row's tokens are statements, each in a third of the rows

# Words that the demo's vocabulary of 4,096 has whole.
KINDS = (
    "binary closed common complete current custom default different empty equal exact final first full global internal "
    "last left local long low main missing new next normal old open original previous public random"
).split()
THINGS = (
    "action address block body browser buffer client color command cookie date day document domain email event factory "
    "feature field file filter flag frame group hand handler heap host letter line link lock log mail mark "
    "match member message name object pair path pattern pipe platform point policy port process program proxy "
    "queue quote range record screen server socket table target turtle"
).split()
WORDS = (
    "above again also before below body bound break cache call case change character class close copy count "
    "debug each end error even exit extra fail first hash header help how import index just "
    "key know left lib limit list look loop make many mean memory method mode month more need never "
    "number once order other over part pass place read real report result root run same "
    "save search second see send set short sign signal size some sort space stack standard start stop "
    "stream string such system tag task test text than thread time token tree true try two type used user "
    "value version wait want week when which width word work write year yield zero"
).split()
VALUE_WORDS = 2  # of which there are twenty thousand


class Draws:
    """Whole numbers drawn by a key of whole numbers."""

    def __init__(self, *key: int):
        """The stream of this key."""
        self._stream = np.random.Philox(np.random.SeedSequence(key))

    def below(self, bound: int) -> int:
        """One of 0 to bound - 1; the bias, of bound / 2**64, is nothing."""
        return int(self._stream.random_raw() % bound)

    def order(self, count: int) -> list[int]:
        """0 to count - 1 in an order of chance."""
        return np.argsort(self._stream.random_raw(count), kind="stable").tolist()


class Statement(NamedTuple):
    """Tokens int32 of "small turtle", " month signal" and "."."""

    question: np.ndarray
    answer: np.ndarray
    end: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """All of it."""
        return np.concatenate(self)


def statements(count: int, draws: Draws, tokenizer: Tokenizer) -> list[Statement]:
    """Statements about different things, their values drawn independently; at most len(KINDS) * len(THINGS).

    A thing comes in a second kind only when all others have come in one.
    """

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text), np.int32)

    things, kinds = draws.order(len(THINGS)), [draws.below(len(KINDS)) for _ in THINGS]
    made = []
    for number in range(min(count, len(KINDS) * len(THINGS))):
        turn, thing = divmod(number, len(THINGS))
        kind = KINDS[(kinds[thing] + turn) % len(KINDS)]
        value = "".join(f" {WORDS[draws.below(len(WORDS))]}" for _ in range(VALUE_WORDS))
        made.append(Statement(encode(f"\n {kind} {THINGS[things[thing]]}"), encode(value), encode(".\n")))
    return made


def drawn_text(dataset: TokenDataset, length: int, draws: Draws, tokenizer: Tokenizer) -> np.ndarray:
    """So many tokens of running text, int32, from places of the dataset that are drawn, without its special tokens."""
    special, pieces, missing = list(tokenizer.special_ids), [np.zeros(0, np.int32)], length
    while missing:
        tokens = dataset.shards[draws.below(len(dataset.shards))].tokens
        start = draws.below(len(tokens))
        piece = np.asarray(tokens[start : start + missing], np.int32)
        pieces.append(piece[~np.isin(piece, special)])
        missing -= len(pieces[-1])
    return np.concatenate(pieces)


def strewn(text: np.ndarray, inserts: Sequence[np.ndarray], places: Sequence[int]) -> np.ndarray:
    """The text with each insert put in before the token at its place; at one place they keep their order."""
    order = np.argsort(places, kind="stable")
    first, *rest = np.split(text, np.sort(places))
    return np.concatenate(
        [first, *(part for i, piece in zip(order, rest, strict=True) for part in (inserts[i], piece))]
    )


class RecallRows:
    """Rows of seq_len tokens (see train.data.packing.Rows), each one document of text with statements strewn over it.

    Statements take up one of SHARES of a row. Rows also differ in how many there are: from one, made again and again,
    to so many that each is made twice. So distances go from a few tokens to the whole window. Every token is in the
    loss.
    """

    def __init__(self, seq_len: int, seed: int, *, stage: int = 0, text: TokenDataset, tokenizer: Tokenizer):
        """Statements are strewn over this text; stage counts from 0.

        Raises ValueError if a row is too short for two statements or the tokenizer has no <|begin_of_text|>.
        """
        self.seq_len, self._key, self._text, self._tokenizer = seq_len, (seed, stage, seq_len), text, tokenizer
        self._begin = np.array(tokenizer.encode("", bos=True), np.int32)
        (example,) = statements(1, Draws(0), tokenizer)
        self._most = [int(share * seq_len) // len(example.tokens) for share in SHARES]
        if min(self._most) < 2:
            raise ValueError(
                f"seq_len={seq_len} is too short for two statements of {len(example.tokens)} tokens in "
                f"{min(SHARES):.0%} of it; leave the source recall out of the mixture of this stage"
            )

    def __len__(self) -> int:
        """As many as there can be: rows do not come again."""
        return sys.maxsize

    def row(self, index: int) -> Batch:
        """Row `index` >= 0, its arrays [T]."""
        draws = Draws(*self._key, index)
        most = self._most[draws.below(len(SHARES))]
        different = min(most // 2, len(KINDS) * len(THINGS))
        different = max(1, different >> draws.below(different.bit_length()))
        made = statements(different, draws, self._tokenizer) * (most // different)
        inserts = [made[i].tokens for i in draws.order(len(made))]
        length = max(0, self.seq_len - sum(map(len, inserts)))
        text = drawn_text(self._text, length, draws, self._tokenizer)
        row = strewn(text, inserts, [draws.below(length + 1) for _ in inserts])
        return pack([np.concatenate([self._begin, row])[: self.seq_len + 1]])


class Needles(NamedTuple):
    """Rows whose last targets are the answer to a question.

    batch: arrays [B, T]. answers: int [B], tokens of the answer. depths: float [B], where the statement stands, from 0,
    the start of the text, to 1, its end.
    """

    batch: Batch
    answers: np.ndarray
    depths: np.ndarray


def needle_rows(text: TokenDataset, tokenizer: Tokenizer, *, seq_len: int, num_keys: int, num_depths: int) -> Needles:
    """num_keys rows for each of num_depths depths: texts with num_keys statements, of which that at the depth is asked.

    The others stand anywhere. Raises ValueError if they do not fit in seq_len.
    """
    rows, answers, depths = [], [], []
    for number in range(num_keys * num_depths):
        draws, depth = Draws(seq_len, number), number // num_keys / max(1, num_depths - 1)
        asked, *others = statements(num_keys, draws, tokenizer)
        ends = [np.array(tokenizer.encode("", bos=True), np.int32), asked.question, asked.answer]
        inserts = [statement.tokens for statement in (asked, *others)]
        length = seq_len + 1 - sum(map(len, (*ends, *inserts)))
        if length < 0:
            raise ValueError(f"{num_keys} keys and a question do not fit in seq_len={seq_len}; lower gate.num_keys")
        places = [round(depth * length), *(draws.below(length + 1) for _ in others)]
        body = strewn(drawn_text(text, length, draws, tokenizer), inserts, places)
        rows.append(pack([np.concatenate([ends[0], body, *ends[1:]])]))
        answers.append(len(asked.answer))
        depths.append(depth)
    return Needles(stack(rows), np.array(answers), np.array(depths))


def found_needles(
    params: Llama,
    text: TokenDataset,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    num_keys: int,
    num_depths: int,
    compute_dtype: DTypeLike,
) -> list[dict]:
    """How many needles are found, by depth: dicts of length, depth, found and asked.

    One is found if each token of its answer, after those before it, is the most likely one.
    """
    needles = needle_rows(text, tokenizer, seq_len=seq_len, num_keys=num_keys, num_depths=num_depths)
    longest, found = int(needles.answers.max()), []
    for part, size in equal_batches(needles.batch, params.rules):
        hits = answer_hits(params, put_batch(part, params.rules), compute_dtype, longest)
        found.append(np.asarray(hits)[:size])
    in_answer = np.arange(longest) >= longest - needles.answers[:, None]
    whole = np.all(np.concatenate(found) | ~in_answer, axis=1)
    return [
        {"length": seq_len, "depth": depth, "found": int(whole[here].sum()), "asked": int(here.sum())}
        for depth in np.unique(needles.depths).tolist()
        for here in [needles.depths == depth]
    ]


@functools.partial(jax.jit, static_argnames=("compute_dtype", "count"))
def answer_hits(params: Llama, batch: Batch, compute_dtype: DTypeLike, count: int) -> Array:
    """Whether each of the last `count` targets is the most likely token: bool [B, count], the same on all devices.

    Logits are made of these tokens alone.
    """
    model = computed_in(params, compute_dtype)
    x = model.hidden(batch.tokens, batch.positions, batch.segment_ids)
    rows = PartitionSpec(jax.typeof(x).sharding.spec[0])
    # A product with ones and zeros takes them from whichever devices hold the end of the sequence.
    is_last = jnp.arange(x.shape[1]) == jnp.arange(x.shape[1] - count, x.shape[1])[:, None]
    x = jnp.einsum("BTD,AT->BAD", x, is_last.astype(x.dtype), precision="highest", out_sharding=rows)
    likely = jnp.argmax(reshard(model.unembed(x), rows), axis=-1)
    targets = reshard(batch.targets, rows)[:, -count:]
    return reshard(likely == targets, PartitionSpec())
