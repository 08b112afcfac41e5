"""A tokenizer as the metadata of a GGUF file, for llama.cpp: the other way of llama_jax/gguf_tokenizer.py.

llama.cpp knows a split rule by name only, so of byte-level vocabularies those of Llama 3's rule can be written.
"""

import json
from pathlib import Path
from typing import Any

import sentencepiece

from llama_jax.checkpoint.tokenizer_json import is_metas, write_tokenizer_json
from llama_jax.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llama_jax.tokenizer import META_WORDS, Tokenizer, load_tokenizer


def tokenizer_metadata(directory: Path, vocab_size: int) -> dict[str, Any]:
    """tokenizer.ggml.* for the tokenizer in a directory, filled up to vocab_size; without one its model is "none".

    A tokenizer.json is made there of Meta's tokenizer.model. Raises ValueError for a tokenizer that llama.cpp has no
    name for.
    """
    files = [directory / name for name in ("tokenizer.json", "tokenizer.model")]
    if not any(file.is_file() for file in files):
        return {"tokenizer.ggml.model": "none"}
    tokenizer = load_tokenizer(directory)
    if not files[0].is_file() and is_metas(tokenizer):
        write_tokenizer_json(directory, tokenizer)
    described = _byte_level(files[0]) if files[0].is_file() else _sentencepiece(files[1])
    tokens, types = described["tokens"], described["token_type"]
    if len(tokens) > vocab_size:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, the model only {vocab_size}")
    missing = range(len(tokens), vocab_size)
    described["tokens"] = tokens + [f"[PAD{i}]" for i in missing]
    described["token_type"] = types + [UNUSED for _ in missing]
    if "scores" in described:
        described["scores"] += [0.0 for _ in missing]
    described |= _ends(tokenizer)
    described = {f"tokenizer.ggml.{key}": value for key, value in described.items()}
    if tokenizer.chat_template:
        described["tokenizer.chat_template"] = tokenizer.chat_template
    return described


def _ends(tokenizer: Tokenizer) -> dict[str, Any]:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "padding_token_id": tokenizer.pad_id}
    if tokenizer.pad_id not in tokenizer.special_ids:
        del ids["padding_token_id"]
    ids |= {"eot_token_id": tokenizer.special_tokens.get("<|eot_id|>"), "add_bos_token": tokenizer.bos_id is not None}
    return {key: value for key, value in ids.items() if value is not None}


def _byte_level(file: Path) -> dict[str, Any]:
    stored = json.loads(file.read_text(encoding="utf-8"))
    model, before = stored["model"], stored.get("pre_tokenizer") or {}
    rules = [step.get("pattern", {}).get("Regex") for step in before.get("pretokenizers", [before])]
    if model.get("type") != "BPE" or META_WORDS not in rules:
        raise ValueError(f"{file}: llama.cpp has no name for this tokenizer, only for one that splits as Llama 3's")
    added = {entry["id"]: entry for entry in stored.get("added_tokens", ())}
    ids = {token_id: token for token, token_id in model["vocab"].items()}
    ids |= {token_id: entry["content"] for token_id, entry in added.items()}
    types = [NORMAL] * (max(ids) + 1)
    for token_id in range(len(types)):
        if token_id in added:
            types[token_id] = CONTROL if added[token_id]["special"] else USER_DEFINED
        elif token_id not in ids:
            types[token_id] = UNUSED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens = [ids.get(token_id, f"[PAD{token_id}]") for token_id in range(len(types))]
    return {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": types, "merges": merges}


def _sentencepiece(file: Path) -> dict[str, Any]:
    model = sentencepiece.SentencePieceProcessor()
    model.LoadFromSerializedProto(file.read_bytes())
    kinds = ((model.is_unknown, UNKNOWN), (model.is_control, CONTROL), (model.is_unused, UNUSED), (model.is_byte, BYTE))
    ids = range(model.vocab_size())
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": [next((kind for test, kind in kinds if test(i)), NORMAL) for i in ids],
        "unknown_token_id": max(model.unk_id(), 0),
        "add_space_prefix": model.encode("a", out_type=str)[0].startswith("\u2581"),
    }
