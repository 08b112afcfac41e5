"""A checkpoint in Meta's form, converted to Hugging Face's, is what transformers takes at once."""

import base64
import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_jax.chat import encode_chat
from llama_jax.checkpoint.companions import complete_hf_directory, write_notice
from llama_jax.checkpoint.tokenizer_json import write_tokenizer_config, write_tokenizer_json
from llama_jax.config import PRESETS, LlamaConfig
from llama_jax.convert import convert
from llama_jax.tokenizer import load_tokenizer
from tests.conftest import SHARED_DATA
from tests.reference import hf_logits, hf_model, relative_error
from tests.test_convert import EVEN, read_json, save_meta

META = SHARED_DATA / "llama3" / "tokenizer.model"
LANGUAGES = ("english", "french", "german", "hindi", "italian", "portuguese", "spanish", "thai")
needs_data = pytest.mark.skipif(not META.is_file(), reason=f"{META} is not there")

SMALL = dataclasses.replace(EVEN, vocab_size=128_256, num_layers=1, embed_dim=24, mlp_dim=64, num_heads=6)
BOS, END_OF_TEXT, EOM, EOT = 128_000, 128_001, 128_008, 128_009
STOPS = [END_OF_TEXT, EOM, EOT]


SAID = [[9, 10, 11, 12, EOT, 13], [20, 21, EOM, 22], [30, 31, 32, END_OF_TEXT, 33]]


def parrot(cfg: LlamaConfig) -> torch.nn.Module:
    """A model that says each of these one token after the other, for certain: a token is a direction the head knows."""
    model = hf_model(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        for i, (token, following) in enumerate(pair for said in SAID for pair in itertools.pairwise(said)):
            model.model.embed_tokens.weight[token, i] = 1.0
            model.lm_head.weight[following, i] = 100.0
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model with Meta's vocabulary, written in Meta's form and converted: params.json and tokenizer.model."""
    folder = tmp_path_factory.mktemp("exported")
    save_meta(parrot(SMALL), SMALL, folder / "meta")
    (folder / "meta" / "tokenizer.model").symlink_to(META)
    convert(str(folder / "meta"), str(folder / "hf"), to="hf")
    return folder / "hf"


@pytest.fixture(scope="module")
def theirs(exported):
    return AutoTokenizer.from_pretrained(exported)


@pytest.fixture(scope="module")
def ours(exported):
    return load_tokenizer(exported)


@pytest.fixture(scope="module")
def meta():
    return load_tokenizer(META)


# Files


@needs_data
def test_a_directory_of_params_and_tokenizer_model_becomes_all_that_transformers_reads(exported):
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in exported.iterdir()) == sorted([*names, "original"])
    assert (exported / "original" / "tokenizer.model").read_bytes() == META.read_bytes()
    assert read_json(exported / "generation_config.json") == {
        "bos_token_id": BOS,
        "do_sample": True,
        "eos_token_id": STOPS,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    config, tokens = read_json(exported / "config.json"), read_json(exported / "tokenizer_config.json")
    assert config["rope_scaling"]["factor"] == 8.0
    assert config["max_position_embeddings"] == tokens["model_max_length"] == 131_072
    assert (config["bos_token_id"], config["eos_token_id"]) == (BOS, STOPS)
    assert [tokens[key] for key in ("bos_token", "eos_token")] == ["<|begin_of_text|>", "<|end_of_text|>"]


def test_without_scaled_rope_the_context_is_8192(tmp_path):
    cfg = dataclasses.replace(EVEN, rope=dataclasses.replace(EVEN.rope, factor=1.0))
    save_meta(hf_model(cfg), cfg, tmp_path / "meta")
    convert(str(tmp_path / "meta"), str(tmp_path / "hf"), to="hf")
    config = read_json(tmp_path / "hf" / "config.json")
    assert (config["max_position_embeddings"], config["rope_scaling"]) == (8192, None)


@needs_data
def test_a_second_conversion_changes_nothing_and_the_way_back_has_tokenizer_model(exported, tmp_path):
    def files(directory: Path) -> dict[str, bytes]:
        return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}

    convert(str(exported), str(tmp_path / "again"), to="hf")
    assert files(tmp_path / "again") == files(exported)
    convert(str(exported), str(tmp_path / "meta"), to="meta")
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == META.read_bytes()
    assert not (tmp_path / "meta" / "original").exists()


def bytes_only() -> str:
    """A vocabulary of bytes in Meta's format."""
    return "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))


def test_another_vocabulary_gets_its_ids_but_not_metas_sampling(tmp_path):
    (tmp_path / "tokenizer.model").write_text(bytes_only())
    complete_hf_directory(tmp_path, EVEN, {"bos_token_id": 256, "eos_token_id": [257], "pad_token_id": None})
    assert read_json(tmp_path / "generation_config.json") == {"bos_token_id": 256, "eos_token_id": [257]}


def test_files_that_came_with_the_checkpoint_are_left_alone(tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer.model").write_text(bytes_only())
    write_tokenizer_json(tmp_path, load_tokenizer(tmp_path / "tokenizer.model"))
    before = (tmp_path / "tokenizer.json").read_bytes()
    complete_hf_directory(tmp_path, EVEN, {"bos_token_id": 256})
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert [read_json(tmp_path / f"{name}_config.json") for name in ("tokenizer", "generation")] == [{}, {}]


def test_no_tokenizer_no_files(tmp_path):
    complete_hf_directory(tmp_path, EVEN, {"bos_token_id": 1})
    assert list(tmp_path.iterdir()) == []


# Tokenizer


@needs_data
def test_tokenizer_json_is_the_one_that_transformers_would_make(exported, meta):
    converter = TikTokenConverter(str(META), extra_special_tokens=list(meta.special_tokens))
    made, oracle = read_json(exported / "tokenizer.json"), json.loads(converter.converted().to_str())
    for key in ("vocab", "merges", "ignore_merges"):
        assert made["model"][key] == oracle["model"][key], key
    assert len(made["model"]["merges"]) == 280_147
    for key in ("pre_tokenizer", "decoder", "added_tokens"):
        assert made[key] == oracle[key]


@needs_data
@pytest.mark.parametrize("language", LANGUAGES)
def test_transformers_gives_metas_ids(theirs, meta, language):
    text = (SHARED_DATA / "pud" / f"{language}.txt").read_text(encoding="utf-8")
    ids = meta.encode(text, bos=True)
    assert theirs.encode(text) == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text


@needs_data
def test_our_tokenizer_of_the_exported_directory_is_metas(ours, meta):
    for field in ("token_bytes", "special_tokens", "bos_id", "eos_id", "pad_id", "stop_ids"):
        assert getattr(ours, field) == getattr(meta, field)


def test_a_small_vocabulary_keeps_every_byte_and_every_merge(tmp_path):
    words = [bytes([i]) for i in range(256)] + [b"th", b"he", b"the", b" the", b"\xe0\xb8", b"\xff\xfe"]
    text = "".join(f"{base64.b64encode(word).decode()} {i}\n" for i, word in enumerate(words))
    (tmp_path / "tokenizer.model").write_text(text)
    meta = load_tokenizer(tmp_path / "tokenizer.model")
    write_tokenizer_json(tmp_path, meta)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").token_bytes == meta.token_bytes
    for said in ("the theme, then", "\u0e01\u0e02 \x00\x7f\xa0\xad\u0142", " the\r\n\r\n  they"):
        assert backend.encode(said).ids == meta.encode(said, bos=True)
    merges = [("t", "h"), ("h", "e"), ("t", "he"), ("th", "e"), ("\u0120", "the")]
    assert [tuple(merge) for merge in read_json(tmp_path / "tokenizer.json")["model"]["merges"]][:5] == merges


# Chat

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "Ort \u0e1d"}}}}
CALL = {"function": {"name": "weather", "arguments": {"city": "M\u00fcnchen", "days": 2}}}
DIALOG = [
    {"role": "system", "content": " Be brief. \n"},
    {"role": "user", "content": "\nWie ist das Wetter?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"sky": "<clear> & blue"}'},
    {"role": "assistant", "content": "Clear."},
    {"role": "user", "content": ""},
]


@needs_data
@pytest.mark.parametrize("tools", [None, [WEATHER], [WEATHER, WEATHER]], ids=["no-tools", "one", "two"])
@pytest.mark.parametrize("messages", [DIALOG, DIALOG[1:], DIALOG[:2]], ids=["all", "no-system", "short"])
@pytest.mark.parametrize("prompt", [True, False])
def test_dialogs_have_the_ids_of_metas_format_in_transformers_and_here(ours, theirs, meta, messages, tools, prompt):
    expected = encode_chat(meta, messages, tools=tools, add_generation_prompt=prompt)
    options = {"tools": tools, "add_generation_prompt": prompt}
    assert theirs.apply_chat_template(messages, return_dict=False, **options) == expected
    assert encode_chat(ours, messages, **options) == expected


# Generation


@needs_data
def test_transformers_loads_the_model_with_its_logits(exported):
    tokens = np.array([[BOS, 9, 10, 20, 500]])
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    assert relative_error(hf_logits(model, tokens), hf_logits(parrot(SMALL), tokens)) < 1e-6


@needs_data
@pytest.mark.parametrize("said", SAID, ids=["eot", "eom", "end_of_text"])
def test_transformers_generates_until_the_model_stops(exported, said):
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    prompt = torch.tensor([[BOS, said[0]]])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=128_004, max_new_tokens=6)
    assert ids.tolist() == [[BOS, *said[:-1]]]


# Licence


@needs_data
@pytest.mark.parametrize(
    ("preset", "versions"), [("llama3.1-8b", ["3.1"]), ("llama3.2-1b", ["3.2"]), ("llama3.3-70b", ["3.1", "3.3"])]
)
def test_metas_sizes_without_a_licence_get_its_attribution(tmp_path, preset, versions):
    (tmp_path / "tokenizer.model").symlink_to(META)
    write_notice(tmp_path, PRESETS[preset])
    assert (tmp_path / "NOTICE").read_text(encoding="utf-8").splitlines() == [
        line
        for version in versions
        for line in (
            f"Llama {version} is licensed under the Llama {version} Community License, "
            "Copyright \u00a9 Meta Platforms, Inc. All Rights Reserved.",
            f"https://www.llama.com/llama3_{version[-1]}/license/",
        )
    ]


@needs_data
def test_the_attribution_goes_with_the_weights_into_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "llama3.1-tiny", SMALL)
    save_meta(parrot(SMALL), SMALL, tmp_path / "meta")
    (tmp_path / "meta" / "tokenizer.model").symlink_to(META)
    convert(str(tmp_path / "meta"), str(tmp_path / "orbax"), to="orbax")
    convert(str(tmp_path / "orbax"), str(tmp_path / "hf"), to="hf")
    assert (tmp_path / "hf" / "NOTICE").read_text(encoding="utf-8").startswith("Llama 3.1 is licensed under the ")


@needs_data
@pytest.mark.parametrize("why", ["another size", "another vocabulary", "no vocabulary", "a licence is there"])
def test_what_is_not_evidently_metas_or_has_a_licence_gets_no_notice(tmp_path, why):
    cfg = SMALL if why == "another size" else PRESETS["llama3.1-8b"]
    if why == "another vocabulary":
        (tmp_path / "tokenizer.model").write_text(bytes_only())
    elif why != "no vocabulary":
        (tmp_path / "tokenizer.model").symlink_to(META)
    if why == "a licence is there":
        (tmp_path / "LICENSE.txt").touch()
    before = sorted(tmp_path.iterdir())
    write_notice(tmp_path, cfg)
    assert sorted(tmp_path.iterdir()) == before


def test_tokenizer_config_of_another_kind_says_its_ends_and_no_dialog_format(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_tokenizer_config(tmp_path, load_tokenizer(tmp_path), 4096)
    config = read_json(tmp_path / "tokenizer_config.json")
    assert (config["bos_token"], config["eos_token"], config["model_max_length"]) == ("<s>", "</s>", 4096)
    assert "chat_template" not in config
