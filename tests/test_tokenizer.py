"""The tokenizers against tiktoken, tokenizers, transformers and sentencepiece themselves."""

import base64
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from tokenizers import decoders, pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_jax.tokenizer import load_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
META = DATA / "llama3" / "tokenizer.model"
LANGUAGES = ("english", "french", "german", "hindi", "italian", "portuguese", "spanish", "thai")
needs_data = pytest.mark.skipif(not META.is_file(), reason=f"{META} is not there")

THAI = "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e23\u0e31\u0e1a"
HINDI = "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e"
EMOJI = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f600"
SPECIAL_TEXT = "a<|begin_of_text|>b <|eot_id|> <|python_tag|></s><s><unk>"
KINDS = ("tiktoken", "huggingface", "sentencepiece")


def tiktoken_file() -> bytes:
    """256 bytes and three merges, in Meta's format."""
    words = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]
    return b"".join(base64.b64encode(word) + b" %d\n" % rank for rank, word in enumerate(words))


def huggingface_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of a few merges with Llama 3's special tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|python_tag|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=names, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat and the dog"] * 4, trainer)
    return tokenizer


def sentencepiece_model(**options) -> bytes:
    """A BPE with byte fallback as Llama 2's, of a few merges."""
    model = io.BytesIO()
    options = {"add_dummy_prefix": True, "remove_extra_whitespaces": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat and the dog", "a dog and the cats"] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    contents = {
        "tiktoken": tiktoken_file(),
        "huggingface": huggingface_tokenizer().to_str().encode(),
        "sentencepiece": sentencepiece_model(),
    }
    for kind, content in contents.items():
        (folder / kind).write_bytes(content)
    return {kind: folder / kind for kind in contents}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, files):
    return load_tokenizer(files[request.param])


@pytest.fixture(scope="module")
def meta():
    return load_tokenizer(META)


@pytest.fixture(scope="module")
def meta_oracle():
    fields = [line.split() for line in META.read_bytes().splitlines()]
    return tiktoken.Encoding(
        name="oracle",
        pat_str=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        mergeable_ranks={base64.b64decode(word): int(rank) for word, rank in fields},
        special_tokens={},
    )


@pytest.fixture(scope="module")
def converted(tmp_path_factory, meta):
    """Meta's vocabulary as transformers converts it to a tokenizer.json."""
    folder = tmp_path_factory.mktemp("converted")
    converter = TikTokenConverter(str(META), extra_special_tokens=list(meta.special_tokens))
    converter.converted().save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@needs_data
def test_metas_test_vector(meta):
    ids = meta.encode("This is a test sentence.", bos=True, eos=True)
    assert ids == [128000, 2028, 374, 264, 1296, 11914, 13, 128001]


@needs_data
def test_meta_special_tokens_have_llama_3_1_names_and_ids(meta):
    ids = meta.special_tokens
    assert meta.vocab_size == 128256
    assert sorted(ids.values()) == list(range(128000, 128256))
    named = ("begin_of_text", "end_of_text", "finetune_right_pad_id", "start_header_id", "end_header_id", "eom_id")
    assert [ids[f"<|{name}|>"] for name in named] == [128000, 128001, 128004, 128006, 128007, 128008]
    assert (ids["<|eot_id|>"], ids["<|python_tag|>"]) == (128009, 128010)
    reserved = [ids[f"<|reserved_special_token_{i}|>"] for i in (0, 1, 2, 3, 247)]
    assert reserved == [128002, 128003, 128005, 128011, 128255]
    assert (meta.bos_id, meta.eos_id, meta.pad_id) == (128000, 128001, 128004)
    assert meta.stop_ids == {128001, 128008, 128009}


@needs_data
@pytest.mark.parametrize("language", LANGUAGES)
def test_meta_ids_are_tiktokens_and_decode_gives_the_text(meta, meta_oracle, language):
    text = (DATA / "pud" / f"{language}.txt").read_text(encoding="utf-8")
    ids = meta.encode(text)
    assert ids == meta_oracle.encode_ordinary(text)
    assert meta.decode(ids) == text


@needs_data
@pytest.mark.parametrize("language", LANGUAGES)
def test_tokenizer_json_ids_are_tiktokens_and_decode_gives_the_text(converted, meta_oracle, language):
    text = (DATA / "pud" / f"{language}.txt").read_text(encoding="utf-8")
    ids = converted.encode(text)
    assert ids == meta_oracle.encode_ordinary(text)
    assert converted.decode(ids) == text


@needs_data
def test_tokenizer_json_of_llama_3_1_has_metas_special_tokens(converted, meta):
    assert converted.special_tokens == meta.special_tokens
    assert converted.token_bytes == meta.token_bytes
    assert (converted.bos_id, converted.eos_id, converted.pad_id) == (128000, 128001, 128004)
    assert converted.stop_ids == meta.stop_ids


def metas_pieces(text: str) -> list[str]:
    """Meta's rule, a character at a time: 400,000 at most, and 25,000 in a row with or without whitespace."""
    cuts = [0]
    run = 0
    for i, char in enumerate(text):
        run = run + 1 if i and char.isspace() == text[i - 1].isspace() else 1
        if i % 400_000 == 0 or run > 25_000:
            cuts.append(i)
            run = 1
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


@needs_data
@pytest.mark.parametrize(
    "text",
    [
        "a" * 60_000 + " y" + " " * 60_001 + "z",
        "ab " * 150_000,
        "\u0e01\u0e02\u0e04" * 10_000 + "\n" * 25_001 + "a" * 25_000 + "\t",
    ],
    ids=["runs", "length", "thai"],
)
def test_long_text_is_cut_where_meta_cuts_it(meta, meta_oracle, text):
    pieces = metas_pieces(text)
    assert len(pieces) > 2
    assert meta.encode(text) == [i for piece in pieces for i in meta_oracle.encode_ordinary(piece)]


def test_sentencepiece_ids_are_its_own_and_decode_gives_the_text(files):
    oracle = sentencepiece.SentencePieceProcessor(model_proto=files["sentencepiece"].read_bytes())
    tokenizer = load_tokenizer(files["sentencepiece"])
    for text in ("the cat", "  two  spaces ", "a\nb", THAI + HINDI + EMOJI, "", "<0x41> a"):
        ids = tokenizer.encode(text)
        assert ids == oracle.encode(text)
        assert tokenizer.decode(ids) == oracle.decode(ids) == text
    assert tokenizer.encode("the", bos=True, eos=True) == [1, *oracle.encode("the"), 2]
    assert (tokenizer.vocab_size, tokenizer.stop_ids, tokenizer.pad_id) == (290, {2}, 0)
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}


def test_sentencepiece_without_dummy_prefix_keeps_its_first_space(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(add_dummy_prefix=False))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(" the cat")) == " the cat"


def test_an_end_that_the_vocabulary_lacks_is_none_and_an_error_to_ask_for(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(eos_id=-1))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id is None
    assert tokenizer.stop_ids == frozenset()
    with pytest.raises(ValueError, match="no eos token"):
        tokenizer.encode("the", eos=True)


def test_text_never_becomes_a_special_token(tokenizer):
    ids = tokenizer.encode(SPECIAL_TEXT)
    assert not set(ids) & tokenizer.special_ids
    assert tokenizer.decode(ids) == SPECIAL_TEXT


@needs_data
def test_text_never_becomes_a_special_token_of_llama_3_1(meta, converted):
    text = "".join(meta.special_tokens)
    assert max(meta.encode(text)) < 128000
    assert converted.encode(text) == meta.encode(text)


def test_added_token_that_is_plain_vocabulary_is_matched_in_text(tmp_path):
    backend = huggingface_tokenizer()
    backend.add_tokens(["dogcat"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("dogcat") == [backend.token_to_id("dogcat")]
    assert "dogcat" not in tokenizer.special_tokens


def test_special_tokens_decode_to_their_names_or_to_nothing(tokenizer):
    special = list(tokenizer.special_tokens)[1]
    ids = tokenizer.encode("the") + [tokenizer.special_tokens[special]] + tokenizer.encode("x")[-1:]
    assert tokenizer.decode(ids) == f"the{special}x"
    assert tokenizer.decode(ids, skip_special=True) == "thex"


@pytest.mark.parametrize("text", [THAI, HINDI, EMOJI], ids=["thai", "hindi", "emoji"])
def test_stream_gives_only_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # so characters are split
    stream = tokenizer.stream()
    pieces = [stream.push(token_id) for token_id in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == text
    assert stream.flush() == ""
    assert sum(bool(piece) for piece in pieces) == len(text)  # each as soon as its last byte is there


def test_stream_of_any_ids_joins_to_their_decode(tokenizer):
    rng = random.Random(0)
    for skip in (False, True):
        for _ in range(200):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
            stream = tokenizer.stream(skip_special=skip)
            assert "".join([stream.push(i) for i in ids]) + stream.flush() == tokenizer.decode(ids, skip_special=skip)


def test_bytes_that_are_no_text_decode_as_python_replaces_them(files):
    tokenizer = load_tokenizer(files["tiktoken"])
    rng = random.Random(0)
    for _ in range(500):
        ids = [rng.choice((0x41, 0x80, 0xC3, 0xE0, 0xE2, 0x82, 0xB8, 0xF0, 0x9F, 0xFF)) for _ in range(8)]
        assert tokenizer.decode(ids) == bytes(ids).decode(errors="replace")


def test_an_id_outside_the_vocabulary_is_an_error(tokenizer):
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {token_id} is not in the vocabulary, 0 to"):
            tokenizer.decode([token_id])


def test_half_a_surrogate_pair_is_encoded_as_the_replacement_character(tokenizer):
    assert tokenizer.encode("a\ud83d b") == tokenizer.encode("a\ufffd b")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")


def test_truncation_and_padding_saved_in_a_tokenizer_json_are_ignored(tmp_path):
    backend = huggingface_tokenizer()
    expected = backend.encode("the cat and the dog").ids
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("the cat and the dog") == expected


def huggingface_folder(folder: Path, **files) -> Path:
    huggingface_tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_ends_come_from_the_files_beside_a_tokenizer_json(tmp_path):
    folder = huggingface_folder(
        tmp_path,
        special_tokens_map={"bos_token": "<|python_tag|>", "pad_token": "<|end_of_text|>"},
        tokenizer_config={"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|eot_id|>", "pad_token": None},
        generation_config={"eos_token_id": [3, 2]},
    )
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.special_tokens
    assert list(ids.values()) == [0, 1, 2, 3]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 1)
    assert tokenizer.stop_ids == {1, 2, 3}


def test_stop_ids_without_other_files_are_the_end_tokens_that_exist(files):
    assert load_tokenizer(files["huggingface"]).stop_ids == {1, 2}


def test_chat_template_is_read_as_text_as_a_list_and_as_a_file(tmp_path):
    assert load_tokenizer(huggingface_folder(tmp_path)).chat_template is None
    folder = huggingface_folder(tmp_path, tokenizer_config={"chat_template": "text"})
    assert load_tokenizer(folder).chat_template == "text"
    entries = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = load_tokenizer(huggingface_folder(tmp_path, tokenizer_config={"chat_template": entries}))
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("plain", "tools")
    (folder / "chat_template.jinja").write_text("file")
    assert load_tokenizer(folder).chat_template == "file"


def test_a_directory_prefers_tokenizer_json_and_looks_in_original(tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(tiktoken_file())
    assert load_tokenizer(tmp_path).vocab_size == 259 + 256
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    assert load_tokenizer(tmp_path).vocab_size == 290
    huggingface_folder(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == huggingface_tokenizer().get_vocab_size()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "sentencepiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "sentencepiece model"),
        (b'{"model": ', "tokenizer.json"),
        (b'{"model": {}}', "tokenizer.json"),
        (tiktoken_file()[:-9], "tiktoken vocabulary"),
        (tiktoken_file().replace(b"dGg= 256\n", b""), "ranks or single bytes are missing"),
        (tiktoken_file().replace(b"AA== 0\n", b"eHg= 0\n"), "ranks or single bytes are missing"),
        (huggingface_tokenizer().to_str().encode()[:-300], "tokenizer.json"),
        (sentencepiece_model()[:-40], "sentencepiece model"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_tokenizer_is_one_clear_error(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="no tokenizer at .* expected a file, or a directory with tokenizer.json"):
            load_tokenizer(path)


def test_a_broken_file_beside_the_tokenizer_is_named(tmp_path):
    huggingface_folder(tmp_path, tokenizer_config=["not", "an", "object"])
    with pytest.raises(ValueError, match="tokenizer_config.json is not a JSON object"):
        load_tokenizer(tmp_path)


def test_a_decoder_that_is_not_of_a_llama_is_refused_by_name(tmp_path):
    backend = huggingface_tokenizer()
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="decoder is WordPiece, expected ByteLevel"):
        load_tokenizer(tmp_path)


def test_tokenizer_json_in_sentencepiece_spelling_decodes_its_bytes_and_spaces(tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocab |= {"\u2581": 259, "a": 260, "\u2581a": 261}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("a a" + THAI)
    assert ids == backend.encode("a a" + THAI).ids
    assert ids[:2] == [261, 261]
    assert tokenizer.decode(ids) == backend.decode(ids) == "a a" + THAI
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
