"""The files beside the weights: tokenizer, chat template, generation settings, licence.

What a checkpoint has is carried along to the byte; here is made what Hugging Face's form needs beside
that, so that its readers take the directory as it is. The one invariant: a file that came with the
checkpoint is never rewritten.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.tokenizer_json import is_metas, write_tokenizer_config, write_tokenizer_json
from llama_jax.config import PRESETS, LlamaConfig
from llama_jax.paths import make_directory
from llama_jax.tokenizer import Tokenizer, load_tokenizer

# Files of a checkpoint that are not weights, carried along; from the hub only those beside the weights are fetched.
COMPANION_FILES = (
    "original/tokenizer.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "LICENSE*",
    "USE_POLICY*",
    "NOTICE*",
)

# How Meta's generation_config.json of Llama 3.1, 3.2 and 3.3 has text sampled.
_SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}

_ATTRIBUTION = (
    "Llama {0} is licensed under the Llama {0} Community License, "
    "Copyright \u00a9 Meta Platforms, Inc. All Rights Reserved.\n"
    "https://www.llama.com/llama{1}/license/\n"
)


def complete_hf_directory(directory: Path, cfg: LlamaConfig, token_ids: Mapping[str, Any]) -> None:
    """Write what a Hugging Face directory lacks: tokenizer.json, tokenizer_config.json, generation_config.json.

    token_ids, those of config.json, go into the last; with none it is not made. Meta's tokenizer.model
    moves to original/, where Meta's own repositories have it: beside config.json a file of that name
    is taken for a sentencepiece model. Does nothing without a tokenizer.
    """
    model, made = directory / "tokenizer.model", directory / "tokenizer.json"
    if not model.exists() and not made.exists():
        return
    tokenizer = load_tokenizer(model if model.exists() else made)
    if model.exists() and is_metas(tokenizer):
        if not made.exists():
            write_tokenizer_json(directory, tokenizer)
        make_directory(directory / "original")
        (directory / "original" / model.name).write_bytes(model.read_bytes())
        model.unlink()
    if made.exists() and not (directory / "tokenizer_config.json").exists():
        write_tokenizer_config(directory, tokenizer, cfg.max_seq_len)
    settings = {key: value for key, value in token_ids.items() if value is not None}
    if settings and not (directory / "generation_config.json").exists():
        settings |= _SAMPLING if is_llama_3(tokenizer) else {}
        text = json.dumps(settings, indent=2, sort_keys=True)
        (directory / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def is_llama_3(tokenizer: Tokenizer) -> bool:
    """Whether this is the vocabulary that Meta published with Llama 3, as far as size and names tell."""
    return is_metas(tokenizer) and tokenizer.vocab_size == 128_256


def write_notice(directory: Path, cfg: LlamaConfig) -> None:
    """Write NOTICE, the attribution that Meta's licence asks for and its address, beside Meta's weights without one.

    Only where they are evidently Meta's: the architecture of a published size with the Llama 3
    vocabulary. 70B may be Llama 3.1 or 3.3, so there both sentences stand.
    """
    sizes = {name: dataclasses.replace(preset, max_seq_len=cfg.max_seq_len) for name, preset in PRESETS.items()}
    versions = [name.removeprefix("llama").partition("-")[0] for name, size in sizes.items() if size == cfg]
    named = any(any(directory.glob(pattern)) for pattern in ("LICENSE*", "NOTICE*"))
    model = directory / "tokenizer.model"
    if versions and not named and model.exists() and is_llama_3(load_tokenizer(model)):
        text = "".join(_ATTRIBUTION.format(version, version.replace(".", "_")) for version in versions)
        (directory / "NOTICE").write_text(text, encoding="utf-8")
