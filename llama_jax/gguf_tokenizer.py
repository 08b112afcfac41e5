"""The tokenizer in a GGUF file's metadata, as the files that it would be beside other weights.

Source: tokenizer.ggml.* in docs/gguf.md of ggml-org/ggml. Model "gpt2" is byte-level BPE, of which Llama 3's split
rule ("llama-bpe") becomes a tokenizer.json; model "llama" is sentencepiece's and becomes its tokenizer.model.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens, sentencepiece's own

_PREFIX = "tokenizer.ggml."
_LLAMA_3_RULES = ("llama-bpe", "llama3", "llama-v3")


def tokenizer_files(metadata: Mapping[str, Any], words: str) -> dict[str, bytes]:
    """Contents by name: tokenizer.json or tokenizer.model, and tokenizer_config.json; empty without a tokenizer.

    words is Llama 3's split rule. Raises ValueError for another kind of tokenizer, or one that is damaged.
    """
    model = metadata.get(f"{_PREFIX}model")
    if model in (None, "none", "no_vocab"):
        return {}
    tokens = _strings(metadata, "tokens")
    types = metadata.get(f"{_PREFIX}token_type")
    types = [NORMAL] * len(tokens) if types is None else [int(kind) for kind in types]
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    ends = {"bos_token": _token_id(metadata, "bos", tokens), "eos_token": _token_id(metadata, "eos", tokens)}
    ends["pad_token"] = _token_id(metadata, "padding", tokens)
    config: dict[str, Any] = {name: tokens[i] for name, i in ends.items() if i is not None}
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    config |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    if model == "gpt2":
        rule = metadata.get(f"{_PREFIX}pre")
        if rule not in _LLAMA_3_RULES:
            raise ValueError(f"tokenizer.ggml.pre={rule!r:.80} is not supported, only {' or '.join(_LLAMA_3_RULES)}")
        bos = config.get("bos_token") if metadata.get(f"{_PREFIX}add_bos_token", True) else None
        name, content = "tokenizer.json", _json(tokens, types, _strings(metadata, "merges"), words, bos)
    elif model == "llama":
        name, content = "tokenizer.model", _proto(metadata, tokens, types, ends)
        config["tokenizer_class"] = "LlamaTokenizer"
    else:
        raise ValueError(f"tokenizer.ggml.model={model!r:.80} is not supported, only gpt2 and llama")
    return {name: content, "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(f"{_PREFIX}{key}")
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{_PREFIX}{key} must be a list of strings")
    return value


def _token_id(metadata: Mapping[str, Any], role: str, tokens: Sequence[str]) -> int | None:
    value = metadata.get(f"{_PREFIX}{role}_token_id")
    if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
        raise ValueError(f"{_PREFIX}{role}_token_id={value!r:.80} is none of {len(tokens)} tokens")
    return value


def _json(tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], words: str, bos: str | None) -> bytes:
    added = [
        {"id": i, "content": token, "special": kind == CONTROL, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    pairs = [merge.split(" ") for merge in merges]
    if strange := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"tokenizer.ggml.merges holds {' '.join(strange)!r:.80}; two tokens were expected")
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    ids = {token: i for i, token in enumerate(tokens)}
    template = None
    if bos is not None:
        begin, text = {"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        template = {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, begin, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
        }
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
        "post_processor": template,
        "decoder": letters,
        # A word that is a token is that token, whatever its merges say.
        "model": {"type": "BPE", "vocab": ids, "merges": pairs, "ignore_merges": True},
    }
    return json.dumps(described, ensure_ascii=False).encode()


def _proto(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], ends: Mapping[str, int | None]
) -> bytes:
    """Sentencepiece's ModelProto (sentencepiece_model.proto): pieces, how it was trained, how text is normalized."""
    scores = metadata.get(f"{_PREFIX}scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError(f"{_PREFIX}scores must hold a number for each of {len(tokens)} tokens")
    pieces = b"".join(
        _field(1, _field(1, token.encode()) + _float(2, float(score)) + _varint_field(3, kind))
        for token, score, kind in zip(tokens, scores, types, strict=True)
    )
    unknown = next((i for i, kind in enumerate(types) if kind == UNKNOWN), -1)
    ids = [unknown, *(-1 if i is None else i for i in ends.values())]
    trainer = _varint_field(3, 2) + _varint_field(35, int(BYTE in types))  # BPE, which falls back to bytes
    trainer += b"".join(_varint_field(40 + i, token_id) for i, token_id in enumerate(ids))
    spaced = int(bool(metadata.get(f"{_PREFIX}add_space_prefix", True)))
    normalizer = _field(1, b"identity") + _varint_field(3, spaced) + _varint_field(4, 0) + _varint_field(5, 1)
    return pieces + _field(2, trainer) + _field(3, normalizer)


def _varint(number: int) -> bytes:
    number &= 2**64 - 1  # negative ones in two's complement
    octets = bytearray()
    while number >= 128:
        octets.append(number & 127 | 128)
        number >>= 7
    return bytes([*octets, number])


def _varint_field(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _float(field: int, number: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", number)
