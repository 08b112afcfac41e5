"""Meta's tokenizer.model as the tokenizer.json and tokenizer_config.json that Hugging Face's readers take.

Source: Meta's ranks and split rule (llama_jax/tokenizer.py), its dialog format (llama_jax/chat.py), and
the form of the files that it publishes for Llama 3.1. The one invariant: text and dialogs give the same
ids through these files as through tokenizer.model (but for runs of over 25,000 letters or spaces, which
Meta cuts and tokenizer.json cannot say).
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from llama_jax.tokenizer import META_SPECIAL_TOKENS, META_WORDS, Tokenizer

_BOS = "<|begin_of_text|>"

# llama_jax/chat.py's Meta format, a tool call an <|eom_id|> and tools offered by the user.
CHAT_TEMPLATE = r"""
{%- macro start(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}
{{- bos_token }}
{%- if tools %}
    {{- start('system') + 'Environment: ipython' }}
    {%- if messages[0].role == 'system' %}
        {{- '\n\n' + messages[0].content | trim }}
        {%- set messages = messages[1:] %}
    {%- endif %}
    {{- '<|eot_id|>' + start('user') }}
    {{- "Answer the user's question by making use of the following functions if needed.\n" }}
    {{- 'If none of the function can be used, please say so.\n' }}
    {{- 'Here is a list of functions in JSON format:\n' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) + '\n' }}
    {%- endfor %}
    {{- '\nReturn function calls in JSON format.<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {{- start('ipython' if message.role == 'tool' else message.role) + (message.content or '') | trim }}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length > 1 %}
            {{- raise_exception('Llama 3.1 makes one tool call at a time') }}
        {%- endif %}
        {%- set function = message.tool_calls[0].function %}
        {{- '<|python_tag|>{"type": "function", "name": ' + function.name | tojson }}
        {{- ', "parameters": ' + (function.arguments or {}) | tojson + '}<|eom_id|>' }}
    {%- else %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ start('assistant') }}{% endif %}
""".strip()


def is_metas(tokenizer: Tokenizer) -> bool:
    """Whether this is a vocabulary of ranks with Meta's 256 special tokens behind them."""
    first = tokenizer.vocab_size - len(META_SPECIAL_TOKENS)
    return tokenizer.special_tokens == {name: first + i for i, name in enumerate(META_SPECIAL_TOKENS)}


def write_tokenizer_json(directory: Path, tokenizer: Tokenizer) -> None:
    """Write tokenizer.json of a vocabulary that is_metas; encoding adds <|begin_of_text|>, as Meta's files do."""
    ranks = {word: rank for rank, word in enumerate(tokenizer.token_bytes[: -len(META_SPECIAL_TOKENS)])}
    # tiktoken joins whichever neighbours make the token of lowest rank, so every way to cut a token is a merge.
    cuts = ((word, i) for word in ranks for i in range(1, len(word)))
    pairs = [(ranks[w], ranks[w[:i]], ranks[w[i:]]) for w, i in cuts if w[:i] in ranks and w[i:] in ranks]
    letters = _byte_letters()
    spelled = ["".join(map(letters.__getitem__, word)) for word in ranks]
    backend = Backend(
        models.BPE(
            vocab={letters: rank for rank, letters in enumerate(spelled)},
            merges=[(spelled[left], spelled[right]) for _, left, right in sorted(pairs)],
            ignore_merges=True,  # a word that is a token is that token, whatever its merges say
        )
    )
    split = pre_tokenizers.Split(Regex(META_WORDS), behavior="isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_letters])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{_BOS} $A",
        pair=f"{_BOS}:0 $A:0 {_BOS}:1 $B:1",
        special_tokens=[(_BOS, tokenizer.special_tokens[_BOS])],
    )
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in META_SPECIAL_TOKENS])
    (directory / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte: itself where it is printable Latin-1, else the next above 255."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {ord(letter): letter for letter in alphabet if ord(letter) < 256}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | dict(zip(others, alphabet[len(letters) :], strict=True))


def write_tokenizer_config(directory: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Write tokenizer_config.json: which tokens are the ends and, for a vocabulary that is_metas, the dialog format.

    Without this file transformers takes the tokenizer.json of a Llama for one of Llama 2's kind.
    """
    config: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_seq_len,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    config |= {key: tokenizer.decode([token_id]) for key, token_id in ends.items() if token_id is not None}
    if is_metas(tokenizer):
        config |= {"chat_template": CHAT_TEMPLATE, "pad_token": "<|finetune_right_pad_id|>"}
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
