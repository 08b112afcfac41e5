"""Preparing data: which documents, which split, which tokenizer, which bytes."""

import hashlib
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llama_jax.chat import encode_chat
from llama_jax.entry import run_entry
from llama_jax.tokenizer import load_tokenizer
from train import prepare
from train.data.shards import open_sources
from train.preparation import corpus, parts, shard_writer
from train.preparation import sources as train_sources
from train.preparation.dedup import Filters
from train.preparation.sources import find_parts, read_part
from train.preparation.tokenizer_training import train_tokenizer

WORDS = "the a lamp llama reads writes over under seven tokens in of quick brown old rows".split()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """No lines about progress, however slow the machine is."""
    monkeypatch.setattr("llama_jax.progress._QUIET_SECONDS", 1e9)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Forty small documents: ten files and thirty lines."""
    folder = tmp_path_factory.mktemp("sources")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) + f"\n{i} = 0x{i:04X}\n" for i in range(40)]
    paths = [folder / f"{i}.txt" for i in range(10)]
    for path, text in zip(paths, texts, strict=False):
        path.write_text(text)
    lines = folder / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[10:]))
    return [*paths, lines]


@pytest.fixture(scope="module")
def prepared(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare.prepare(sources, out, vocab_size=520, holdout=0.3)
    return out


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def documents(sources):
    return [document for part in find_parts(sources) for document in read_part(part)]


def dataset(directory, split, source="text"):
    return open_sources(directory, split)[source]


def texts_of(directory, split, source="text"):
    shards, tokenizer = dataset(directory, split, source), load_tokenizer(directory)
    return [tokenizer.decode(shards.document(i)) for i in range(shards.num_documents)]


def bare(text):
    return text.removeprefix("<|begin_of_text|>").removesuffix("<|end_of_text|>")


# Corpus


def test_held_out_is_a_threshold_on_the_hash_of_the_text():
    assert corpus.text_hash("llama") == "fc5a1047f5919892fcdf8aa79ea5d6bb6531b5c176939ef0110906cb225941c1"
    assert corpus.is_held_out("0" * 64, 0.01) and not corpus.is_held_out("0" * 64, 0.0)
    assert not corpus.is_held_out("8" + "0" * 63, 0.5) and corpus.is_held_out("7" + "f" * 63, 0.5)


def test_the_default_corpus_is_pythons_own_text_and_ties_docstrings_to_their_sources():
    library = list(corpus.python_library())
    characters = Counter()
    for document in library:
        characters[document.source] += len(document.text)
    assert characters["topics"] > 3e5 and characters["docstrings"] > 1e6 and characters["sources"] > 7e6
    texts = {document.text for document in library}
    assert Path(json.decoder.__file__).read_text() in texts and Path(os.__file__).read_text() in texts
    assert Path(pytest.__file__).read_text() not in texts
    pairs = [(a, b) for a, b in zip(library, library[1:], strict=False) if a.source == "docstrings"]
    assert len(pairs) > 300 and all(a.origin == corpus.text_hash(b.text) and not b.origin for a, b in pairs)


def test_docstrings_are_found_at_every_depth_in_order():
    source = (
        'if 1:\n    class A:\n        """One."""\n        async def f():\n            """Two\n            lines."""\n'
    )
    assert corpus._docstrings(source) == "A\n\nOne.\n\n\nA.f\n\nTwo\nlines."


def test_a_text_falls_into_the_split_of_the_text_it_was_extracted_from(tmp_path, monkeypatch):
    modules = [f"module {i} " * 5 for i in range(40)]

    def library():
        for text in modules:
            yield corpus.Document(f"docstring of {text}", "docstrings", origin=corpus.text_hash(text))
            yield corpus.Document(text, "sources")

    monkeypatch.setattr(train_sources, "python_library", library)
    prepare.prepare([], tmp_path / "out", vocab_size=520, holdout=0.4)
    held = {bare(text) for text in texts_of(tmp_path / "out", "heldout", "sources")}
    assert 5 < len(held) < 30
    docstrings = {bare(text) for text in texts_of(tmp_path / "out", "heldout", "docstrings")}
    assert docstrings == {f"docstring of {text}" for text in held}


# Splits and bytes


def test_every_document_is_in_one_split_and_reads_back_as_its_text(sources, prepared):
    train, heldout = texts_of(prepared, "train"), texts_of(prepared, "heldout")
    assert len(train) + len(heldout) == 40 and not set(train) & set(heldout)
    expected = {f"<|begin_of_text|>{document.text}<|end_of_text|>" for document in documents(sources)}
    assert {*train, *heldout} == expected
    assert all(corpus.is_held_out(corpus.text_hash(bare(text)), 0.3) for text in heldout)


def test_a_split_does_not_depend_on_the_other_documents(sources, prepared, tmp_path):
    prepare.prepare(sources[3:7], tmp_path / "out", tokenizer=prepared, holdout=0.3)
    part = {document.text for document in documents(sources[3:7])}
    assert {bare(text) for text in texts_of(tmp_path / "out", "heldout")} == part & {
        bare(text) for text in texts_of(prepared, "heldout")
    }


def test_the_metadata_counts_what_is_there(sources, prepared):
    metadata = json.loads((prepared / "metadata.json").read_bytes())
    hashes = (corpus.text_hash(document.text) for document in documents(sources))
    assert metadata["corpus_hash"] == hashlib.sha256("".join(hashes).encode()).hexdigest()
    assert metadata["python_version"] == sys.version.split()[0]
    assert (metadata["vocab_size"], metadata["dtype"], metadata["holdout"]) == (520, "uint16", 0.3)
    for name, split in metadata["sources"]["text"].items():
        lengths = dataset(prepared, name).lengths
        texts = list(map(bare, texts_of(prepared, name)))
        assert split["documents"] == len(lengths) and split["tokens"] == lengths.sum()
        assert split["characters"] == sum(map(len, texts))
        assert split["characters_per_token"] == round(sum(map(len, texts)) / (lengths.sum() - 2 * len(lengths)), 4)
        for unit, total in {"documents": len(lengths), "tokens": lengths.sum()}.items():
            assert sum(entry[unit] for entry in split["lengths"]) == total
            assert sum(entry[unit] for entry in split["shards"]) == total
        for entry in split["lengths"]:
            inside = (lengths >= entry["at_least"]) & (lengths < 2 * entry["at_least"])
            assert inside.sum() == entry["documents"] and lengths[inside].sum() == entry["tokens"]


def test_repeated_and_blank_documents_are_dropped_and_counted_by_source(prepared, tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": " \\n"}\n{"text": "two"}\n{"text": null}')
    given = [f"a={tmp_path / 'a.txt'}", f"b={tmp_path / 'b.jsonl'}"]
    metadata = prepare.prepare(given, tmp_path / "out", tokenizer=prepared, holdout=0.0)
    assert texts_of(tmp_path / "out", "train", "a") == ["<|begin_of_text|>one<|end_of_text|>"]
    assert texts_of(tmp_path / "out", "train", "b") == ["<|begin_of_text|>two<|end_of_text|>"]
    assert metadata["dropped_documents"] == {"blank": 2, "contaminated": 0, "duplicate": 1, "near_duplicate": 0}
    assert metadata["dropped_by_source"]["a"]["duplicate"] == 0 and metadata["dropped_by_source"]["b"]["duplicate"] == 1


def test_filters_leave_documents_out_of_tokenizer_and_shards(tmp_path):
    words = [f"word{i}" for i in range(60)]
    texts = [" ".join(words), " ".join(words[:-1]), " ".join(reversed(words)), "a b c d e f g h i j k l m n o p"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    filters = Filters(0.8, frozenset([" ".join("bcdefghijklmn")]))
    metadata = prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=512, holdout=0.0, filters=filters)
    assert list(map(bare, texts_of(tmp_path / "out", "train"))) == [texts[0], texts[2]]
    assert metadata["dropped_documents"] == {"blank": 0, "contaminated": 1, "duplicate": 0, "near_duplicate": 1}
    with pytest.raises(FileExistsError, match="near_duplicates 0.8, not None"):
        prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=512, holdout=0.0)


def test_shards_are_full_and_hold_whole_documents_in_order(sources, prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 100)
    monkeypatch.setattr(parts, "_PIECE_CHARACTERS", 700)
    metadata = prepare.prepare(sources, tmp_path / "out", tokenizer=prepared, holdout=0.3)
    train = dataset(tmp_path / "out", "train")
    sizes = [entry["tokens"] for entry in metadata["sources"]["text"]["train"]["shards"]]
    assert len(sizes) > 10 and max(sizes) > 100
    for size, shard, following in zip(sizes, train.shards, train.shards[1:], strict=False):
        assert size <= 100 or shard.num_documents == 1
        assert size + following.lengths()[0] > 100
    assert texts_of(tmp_path / "out", "train") == texts_of(prepared, "train")


def test_documents_of_equal_length_fill_a_shard_to_the_last_token(tmp_path):
    with prepare.ExitStack() as files:
        writer = shard_writer.ShardWriter(tmp_path / "train", 6, files)
        writer.write(np.arange(9, dtype=np.uint16), np.array([3, 3, 3]), 1)
        writer.write(np.arange(9, 19, dtype=np.uint16), np.array([3, 7]), 1)
        counts = writer.close()
    assert [(shard["documents"], shard["tokens"]) for shard in counts["shards"]] == [(2, 6), (2, 6), (1, 7)]
    assert np.fromfile(tmp_path / "train-00001.tokens", "<u2").tolist() == [6, 7, 8, 9, 10, 11]
    assert np.fromfile(tmp_path / "train-00001.offsets", "<i8").tolist() == [0, 3, 6]


def test_two_runs_write_the_same_bytes(sources, prepared, tmp_path):
    prepare.prepare(sources, tmp_path / "again", vocab_size=520, holdout=0.3)
    assert contents(tmp_path / "again") == contents(prepared)


def test_the_tokenizer_does_not_see_held_out_text(sources, prepared):
    texts = [d.text for d in documents(sources) if not corpus.is_held_out(corpus.text_hash(d.text), 0.3)]
    assert train_tokenizer(texts, 520).items() <= contents(prepared).items()


# Tokenizer


def test_special_tokens_are_llama_3s_at_the_end_of_the_vocabulary(prepared):
    tokenizer = load_tokenizer(prepared)
    assert tokenizer.vocab_size == 520 and len(tokenizer.special_tokens) == 256
    first = "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 finetune_right_pad_id"
    first += " reserved_special_token_2 start_header_id end_header_id eom_id eot_id python_tag"
    names = first.split() + [f"reserved_special_token_{i}" for i in range(3, 248)]
    assert tokenizer.special_tokens == {f"<|{name}|>": 264 + i for i, name in enumerate(names)}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (264, 265, 268)
    assert {tokenizer.token_bytes[i] for i in range(256)} == {bytes([byte]) for byte in range(256)}


def test_special_tokens_have_the_order_of_metas_tokenizer(prepared, shared_data):
    meta, ours = load_tokenizer(shared_data / "llama3"), load_tokenizer(prepared)
    assert {name: i - meta.vocab_size for name, i in meta.special_tokens.items()} == {
        name: i - ours.vocab_size for name, i in ours.special_tokens.items()
    }


def test_transformers_reads_the_same_tokenizer(prepared):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(prepared), load_tokenizer(prepared)
    text = "The quick llama's 12345 rows\r\n\n  don't \u00e9\u4e16\u754c \U0001f999 tabs\t\tend   "
    assert theirs(text)["input_ids"] == ours.encode(text, bos=True)
    assert (
        theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == ours.decode(ours.encode(text)) == text
    )
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id, theirs.model_max_length) == (520, 264, 265, 131_072)
    assert {token: theirs.convert_tokens_to_ids(token) for token in ours.special_tokens} == ours.special_tokens


def test_the_chat_template_is_llama_3s(prepared):
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": " Hi \n"}, {"role": "assistant", "content": "Ho"}]
    theirs = AutoTokenizer.from_pretrained(prepared)
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_chat(load_tokenizer(prepared), messages) == ids


def test_special_names_in_a_text_stay_text(sources, tmp_path):
    (tmp_path / "a.txt").write_text("say <|end_of_text|> now")
    prepare.prepare([tmp_path / "a.txt", *sources], tmp_path / "out", vocab_size=512, holdout=0.0)
    document = dataset(tmp_path / "out", "train").document(0)
    assert len(document) == len("say <|end_of_text|> now") + 2 and (document[1:-1] < 256).all()


def test_a_given_tokenizer_is_used_and_copied(sources, prepared, tmp_path):
    metadata = prepare.prepare(sources[:2], tmp_path / "out", tokenizer=prepared, holdout=0.0)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() and metadata["vocab_size"] == 520
    assert texts_of(tmp_path / "out", "train")[0].removeprefix("<|begin_of_text|>").startswith(sources[0].read_text())


def test_metas_tokenizer_makes_uint32_shards(sources, shared_data, tmp_path):
    model = shared_data / "llama3" / "tokenizer.model"
    metadata = prepare.prepare(sources[:2], tmp_path / "out", tokenizer=model, holdout=0.0)
    tokens = np.fromfile(tmp_path / "out" / "text" / "train-00000.tokens", "<u4")
    assert metadata["dtype"] == "uint32" and tokens[0] == 128_000 and tokens[-1] == 128_001
    assert load_tokenizer(tmp_path / "out").vocab_size == metadata["vocab_size"] == 128_256


def test_documents_end_with_end_of_text_where_the_tokenizers_eos_ends_a_turn(sources, prepared, tmp_path):
    (tmp_path / "instruct").mkdir()
    for name, content in contents(prepared).items():
        if name.startswith("tokenizer"):
            (tmp_path / "instruct" / name).write_bytes(
                content.replace(b'"eos_token": "<|end_of_text|>"', b'"eos_token": "<|eot_id|>"')
            )
    assert load_tokenizer(tmp_path / "instruct").eos_id == 273
    prepare.prepare(sources[:1], tmp_path / "out", tokenizer=tmp_path / "instruct", holdout=0.0)
    assert dataset(tmp_path / "out", "train").document(0)[-1] == 265


# Runs


def test_the_same_inputs_again_do_nothing(sources, prepared, capsys, monkeypatch):
    before = contents(prepared)
    monkeypatch.setattr(prepare, "encode_parts", lambda *_: pytest.fail("work was done"))
    metadata = prepare.prepare(sources, prepared, vocab_size=520, holdout=0.3)
    assert "already holds this preparation" in capsys.readouterr().err
    assert contents(prepared) == before and json.loads(before["metadata.json"]) == metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 530}, "vocab_size 520, not 530"),
        ({"holdout": 0.2}, "holdout 0.3, not 0.2"),
        ({"sources": slice(3)}, r"files \w+, not \w+\); remove it or choose another --out"),
    ],
)
def test_other_inputs_are_refused_and_change_nothing(sources, prepared, change, message):
    before = contents(prepared)
    inputs = {"vocab_size": 520, "holdout": 0.3} | change
    with pytest.raises(FileExistsError, match=message):
        prepare.prepare(sources[inputs.pop("sources", slice(None))], prepared, **inputs)
    assert contents(prepared) == before


def test_a_file_that_has_changed_makes_other_data(tmp_path, prepared):
    (tmp_path / "a.txt").write_text("one")
    prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=prepared, holdout=0.0)
    (tmp_path / "a.txt").write_text("two")
    with pytest.raises(FileExistsError, match="was prepared from other files"):
        prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=prepared, holdout=0.0)


def test_the_command_prints_a_table_or_the_metadata(sources, tmp_path, capsys):
    arguments = [*map(str, sources), "--vocab-size=512", "--holdout=0.3", f"--out={tmp_path / 'out'}"]
    prepare.main(arguments)
    shown = capsys.readouterr()
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_bytes())
    assert metadata["corpus_hash"] in shown.out and metadata["python_version"] in shown.out and shown.err == ""
    counts = metadata["sources"]["text"]["train"]
    assert re.search(rf"\ntext +train +{counts['documents']} +{counts['tokens']:,} ", shown.out)
    assert re.search(r"\nsource +<256 +256\+\ntext +30 +10$", shown.out.rstrip())
    prepare.main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out) == metadata


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "missing.txt: no such file; expected a file, a folder that holds some, or a glob"),
        (["az://bucket/a.txt"], "expected a local path"),
        (["--vocab-size=300"], "vocab_size=300 is below 512, 256 bytes and 256 special tokens"),
        (["--vocab-size=9999"], r"the text has pairs for vocab_size=\d+ only, not 9999"),
        (["--vocab-size=0"], "vocab_size=0 is below 512"),
        (["--holdout=1.0"], "holdout=1.0 is not a fraction"),
        (["--holdout=0.999999"], "leaves none of 10 documents to train on"),
        (["--holdout=200%"], "holdout=2.0 is not a fraction"),
        (["--dedup=minhash", "--dedup-threshold=2"], "a threshold of 2.0 is not between 0 and 1"),
        (["--tokenizer=absent"], "no tokenizer at .*absent"),
        (["--tokenizer=absent", "--vocab-size=600"], "leave out vocab_size or the tokenizer"),
    ],
)
def test_bad_input_ends_in_one_line_and_no_files(sources, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [] if not arguments[0].startswith("--") else list(map(str, sources[:10]))
    with pytest.raises(SystemExit) as exit:
        run_entry(lambda: prepare.main([*arguments, *given, "--out=out"]))
    assert exit.value.code == 1 and re.fullmatch(rf"error: .*{message}.*\n", capsys.readouterr().err)
    assert os.listdir(tmp_path) == []


def test_a_log_gets_no_bar(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("llama_jax.progress._QUIET_SECONDS", 0.0)
    prepare.prepare(sources, tmp_path / "out", vocab_size=512, holdout=0.3)
    lines = capsys.readouterr().err.splitlines()
    expected = [f"{work}: 1 parts" for work in ("training the tokenizer", "encoding", "writing")]
    assert [line.partition(" in ")[0] for line in lines] == expected
