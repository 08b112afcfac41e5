"""Trains a tokenizer of the Llama 3 kind, smaller: byte-level BPE over the same split into words.

The source of the split and of the special tokens is Meta's tokenizer (see llama_jax/tokenizer.py). The one
invariant: the same texts in the same order give the same bytes.
"""

import json
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llama_jax.tokenizer import META_SPECIAL_TOKENS, META_WORDS

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> dict[str, bytes]:
    """Trains byte-level BPE; returns the contents of `tokenizer.json` and `tokenizer_config.json`.

    Ids: 256 bytes, then the merges, then the 256 special tokens of Llama 3 up to vocab_size - 1.
    Raises ValueError if vocab_size is too small for these, or too large for the texts.
    """
    smallest = 256 + len(META_SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is below {smallest}, 256 bytes and 256 special tokens")
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(META_WORDS), "isolated")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(META_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False) for name in META_SPECIAL_TOKENS])
    if (reached := backend.get_vocab_size()) != vocab_size:
        raise ValueError(f"the text has pairs for vocab_size={reached} only, not {vocab_size}; lower it or add text")
    bos, eos = META_SPECIAL_TOKENS[:2]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131_072,
    }
    return {
        "tokenizer.json": backend.to_str(pretty=True).encode(),
        "tokenizer_config.json": f"{json.dumps(config, indent=1)}\n".encode(),
    }
