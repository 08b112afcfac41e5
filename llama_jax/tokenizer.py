"""Text to token ids and back: one face for the kinds of file that a Llama's vocabulary comes in.

The kinds: Meta's tiktoken `tokenizer.model` (llama-models, models/llama3/tokenizer.py), Hugging Face's
`tokenizer.json`, a sentencepiece `.model`, and the metadata of a `.gguf`. The one invariant: `encode` never
makes a special token out of text, so "<|eot_id|>" typed by a user stays ordinary text; special tokens enter by
id alone.
"""

import base64
import codecs
import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers

from llama_jax.gguf import GgufFile
from llama_jax.gguf_tokenizer import tokenizer_files
from llama_jax.paths import as_path

# The 256 special tokens after the ranks, named as in the Llama 3.1 tokenizer.json.
META_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)
META_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Meta encodes 400,000 characters at a time, cut again after 25,000 in a row with or without whitespace,
# because tiktoken panics on the one and is quadratic in the other. One match is one such piece: runs that
# fit, then the first 25,000 of a run that does not.
_META_MAX_CHARS = 400_000
_META_PIECES = re.compile(r"(?:\S{1,25000}+(?!\S)|\s{1,25000}+(?!\s))*+(?:\S{25000}|\s{25000})?")

# What a token is called where no file beside the tokenizer says it.
_USUAL_NAMES = {
    "bos_token": ("<|begin_of_text|>", "<s>"),
    "eos_token": ("<|end_of_text|>", "</s>"),
    "pad_token": ("<|finetune_right_pad_id|>", "<pad>"),
}
_STOP_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


@dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """A vocabulary and its special tokens, whichever file they came from.

    encode_text: ordinary text to ids; `encode` is the same with checks and the two ends.
    token_bytes: for each id its UTF-8 bytes, which may begin or end inside a character.
    special_tokens: name to id. Tokens that the file declares as plain vocabulary (an added token with
        special = false, a user-defined sentencepiece) are not among them and are matched in text.
    bos_id, eos_id: None where the vocabulary has none.
    pad_id: a filler for positions that are masked; 0 where the vocabulary names none.
    stop_ids: the ids that end a generation.
    chat_template, tool_template: Jinja sources; the second, if there, replaces the first when tools are given.
    drops_first_space: the encoder puts a space before the text, so decoding takes it away.
    """

    encode_text: Callable[[str], list[int]]
    token_bytes: list[bytes]
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    stop_ids: frozenset[int]
    chat_template: str | None = None
    tool_template: str | None = None
    drops_first_space: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of ids: they are 0 .. vocab_size - 1."""
        return len(self.token_bytes)

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special_tokens."""
        return frozenset(self.special_tokens.values())

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text, with the begin and end tokens if asked.

        Raises ValueError if an end is asked for that the vocabulary does not have.
        """
        # Half a surrogate pair, as cut JSON leaves it, has no UTF-8: it becomes U+FFFD, as in tiktoken.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        first = [_existing("bos", self.bos_id)] if bos else []
        last = [_existing("eos", self.eos_id)] if eos else []
        return first + self.encode_text(text) + last

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of some ids, special tokens by their names or left out; bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id outside the vocabulary.
        """
        stream = self.stream(skip_special=skip_special)
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self, *, skip_special: bool = False) -> "TextStream":
        """A decoder that takes one id at a time; its pieces joined are `decode` of the same ids."""
        return TextStream(self, skip_special)


class TextStream:
    """Turns ids into text as they come, never giving out half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._drops_space = tokenizer.drops_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this id completes, maybe none. Raises ValueError outside the vocabulary."""
        if not 0 <= token_id < self._tokenizer.vocab_size:
            raise ValueError(f"token id {token_id} is not in the vocabulary, 0 to {self._tokenizer.vocab_size - 1}")
        piece = self._tokenizer.token_bytes[token_id]
        if token_id in self._tokenizer.special_ids:
            piece = b"" if self._skip_special else piece
        elif self._drops_space:
            piece = piece.removeprefix(b" ")
            self._drops_space = False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What the end leaves of a character that was never completed: U+FFFD or nothing."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer from a file or directory, local or remote; its content tells the kind (of a .gguf its name).

    A directory is searched for tokenizer.json, tokenizer.model and original/tokenizer.model. Beside the file,
    tokenizer_config.json, special_tokens_map.json, generation_config.json and chat_template.jinja are read
    where they exist. Raises ValueError if there is no tokenizer or it cannot be read.
    """
    file = _find(as_path(path))
    if file.suffix == ".gguf":
        data, config = _read_gguf(file)
    else:
        data, config = file.read_bytes(), _read_config(file.parent)
    if data[:64].lstrip().startswith(b"{"):
        kind, build = "tokenizer.json", _from_huggingface
    elif re.match(rb"[A-Za-z0-9+/]+=* \d+\s", data):
        kind, build = "tiktoken vocabulary", _from_tiktoken
    else:
        kind, build = "sentencepiece model", _from_sentencepiece
    try:
        return build(data, config)
    except Exception as error:  # tokenizers has no narrower class
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read as a {kind}: {reason}; fetch it again") from error


def _find(path: Path) -> Path:
    names = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
    for file in [path, *(path / name for name in names)]:
        if file.is_file():
            return file
    raise ValueError(f"no tokenizer at {path}: expected a file, or a directory with {' or '.join(names)}")


def _read_gguf(file: Path) -> tuple[bytes, dict]:
    """The tokenizer in a GGUF file as the file that it would be, and what is said beside it."""
    files = gguf_tokenizer_files(file)
    if not files:
        raise ValueError(f"{file} holds no tokenizer")
    config = json.loads(files.pop("tokenizer_config.json"))
    return next(iter(files.values())), config


def gguf_tokenizer_files(file: Path) -> dict[str, bytes]:
    """The contents by name of the files that hold the tokenizer of a GGUF file; none without one.

    Raises ValueError if there is one that cannot be read.
    """
    try:
        return tokenizer_files(GgufFile(file).metadata, META_WORDS)
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None


def _read_config(folder: Path) -> dict:
    """What the files beside a tokenizer say, the more specific file winning."""
    config = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json", "generation_config.json"):
        file = folder / name
        if file.is_file():
            try:
                said = json.loads(file.read_text(encoding="utf-8")).items()
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{file} is not a JSON object: {error}") from error
            config |= {key: value for key, value in said if value is not None}
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return config


def _from_tiktoken(data: bytes, config: dict) -> Tokenizer:
    fields = data.split()
    ranks = {base64.b64decode(word): int(rank) for word, rank in zip(fields[::2], fields[1::2], strict=True)}
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise ValueError("ranks or single bytes are missing")
    special_tokens = {name: len(ranks) + i for i, name in enumerate(META_SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("llama3", pat_str=META_WORDS, mergeable_ranks=ranks, special_tokens=special_tokens)

    def encode_text(text: str) -> list[int]:
        slices = (text[i : i + _META_MAX_CHARS] for i in range(0, len(text), _META_MAX_CHARS))
        pieces = chain.from_iterable(map(_META_PIECES.findall, slices))
        return list(chain.from_iterable(map(encoding.encode_ordinary, pieces)))

    token_bytes = sorted(ranks, key=ranks.__getitem__) + [name.encode() for name in special_tokens]
    return _assemble(encode_text, token_bytes, special_tokens, config)


def _from_huggingface(data: bytes, config: dict) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_buffer(data)
    backend.encode_special_tokens = True  # that is, as text
    backend.no_truncation()
    backend.no_padding()
    to_bytes, drops_first_space = _byte_rule(json.loads(data)["decoder"])
    added = backend.get_added_tokens_decoder()
    vocab = backend.get_vocab()
    token_bytes = [b""] * (max(vocab.values()) + 1)
    for token, token_id in vocab.items():
        token_bytes[token_id] = token.encode() if token_id in added else to_bytes(token)
    special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
    return _assemble(
        lambda text: backend.encode(text, add_special_tokens=False).ids,
        token_bytes,
        special_tokens,
        config,
        drops_first_space=drops_first_space,
    )


def _from_sentencepiece(data: bytes, config: dict) -> Tokenizer:
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(data)
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    special_tokens = {piece: i for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)}
    token_bytes = [piece.encode() if piece in special_tokens else _spaced_bytes(piece) for piece in pieces]
    ends = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "pad_token": model.pad_id()}
    config = config | {name: pieces[i] for name, i in ends.items() if i >= 0}
    spaced = next((i for i, piece in enumerate(pieces) if piece.startswith("\u2581")), None)
    drops_first_space = spaced is not None and not model.decode([spaced]).startswith(" ")
    return _assemble(model.encode, token_bytes, special_tokens, config, drops_first_space=drops_first_space)


def _assemble(
    encode_text: Callable[[str], list[int]],
    token_bytes: list[bytes],
    special_tokens: dict[str, int],
    config: dict,
    *,
    drops_first_space: bool = False,
) -> Tokenizer:
    """The Tokenizer, with the roles of its special tokens as the config or else their usual names tell."""

    def role(key: str) -> int | None:
        named = config.get(key)
        names = (named["content"] if isinstance(named, dict) else named, *_USUAL_NAMES[key])
        return next((special_tokens[name] for name in names if name in special_tokens), None)

    bos_id, eos_id, pad_id = role("bos_token"), role("eos_token"), role("pad_token")
    stops = config.get("eos_token_id", [])
    stops = {eos_id, *(stops if isinstance(stops, list) else [stops]), *map(special_tokens.get, _STOP_NAMES)}
    templates = config.get("chat_template") or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    elif isinstance(templates, list):
        templates = {entry["name"]: entry["template"] for entry in templates}
    return Tokenizer(
        encode_text,
        token_bytes,
        special_tokens,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=0 if pad_id is None else pad_id,
        stop_ids=frozenset(stop for stop in stops if stop is not None),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
        drops_first_space=drops_first_space,
    )


def _byte_rule(decoder: dict | None) -> tuple[Callable[[str], bytes], bool]:
    """How a tokenizer.json spells bytes in its tokens, and whether decoding drops the first space."""
    steps = {step["type"]: step for step in (decoder or {}).get("decoders", [decoder or {"type": "none"}])}
    if "ByteLevel" in steps:
        return _byte_level_bytes, False
    if "Metaspace" in steps:
        return _spaced_bytes, steps["Metaspace"].get("prepend_scheme", "always") != "never"
    if "ByteFallback" in steps:
        return _spaced_bytes, "Strip" in steps
    raise ValueError(f"its decoder is {' + '.join(steps)}, expected ByteLevel, ByteFallback or Metaspace")


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: the printable Latin-1 stand for themselves, the rest for 256, 257, ..."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = sorted(set(range(256)) - printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level_bytes(token: str) -> bytes:
    return bytes(map(_byte_level_alphabet().__getitem__, token))


def _spaced_bytes(token: str) -> bytes:
    """The sentencepiece spelling: <0x0A> is one byte, U+2581 is a space."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _existing(name: str, token_id: int | None) -> int:
    if token_id is None:
        raise ValueError(f"this tokenizer has no {name} token: encode with {name}=False")
    return token_id
