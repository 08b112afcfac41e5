"""Preparing data: which documents, which split, which tokenizer, which bytes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from llama_jax.chat import encode_chat
from llama_jax.entry import run_entry
from llama_jax.tokenizer import load_tokenizer
from train import corpus, prepare
from train.data import PackedRows, TokenDataset

WORDS = "the a lamp llama reads writes over under seven tokens in of quick brown old rows".split()


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
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def texts_of(directory, split):
    dataset, tokenizer = TokenDataset(directory, split), load_tokenizer(directory)
    return [tokenizer.decode(dataset.document(i)) for i in range(len(dataset.lengths))]


# Corpus


def test_held_out_is_a_threshold_on_the_hash_of_the_text():
    assert corpus.text_hash("llama") == "fc5a1047f5919892fcdf8aa79ea5d6bb6531b5c176939ef0110906cb225941c1"
    assert corpus.is_held_out("0" * 64, 0.01) and not corpus.is_held_out("0" * 64, 0.0)
    assert not corpus.is_held_out("8" + "0" * 63, 0.5) and corpus.is_held_out("7" + "f" * 63, 0.5)


def test_a_split_does_not_depend_on_the_other_documents(sources):
    whole, part = corpus.read(sources), corpus.read(sources[3:7])
    held = {document.text for document in whole.split("heldout", 0.3)}
    assert 0 < len(held) < 40
    assert {document.text for document in part.documents} & held == {d.text for d in part.split("heldout", 0.3)}
    assert held >= {document.text for document in whole.split("heldout", 0.1)}


def test_the_default_corpus_is_pythons_own_text_and_splits_docstrings_with_their_sources():
    library = corpus.read()
    characters = Counter()
    for document in library.documents:
        characters[document.source] += len(document.text)
    assert characters["topics"] > 3e5 and characters["docstrings"] > 1e6 and characters["sources"] > 7e6
    names = {document.id for document in library.documents}
    assert {"topics/assert", "docstrings/json/decoder.py", "sources/json/decoder.py"} <= names
    assert not [
        n for n in names if {"test", "tests", "site-packages", "idlelib"} & {*n.split("/")} or "_sysconfigdata" in n
    ]
    assert "sources/pydoc_data/topics.py" not in names
    split = {d.id: name for name in ("train", "heldout") for d in library.split(name, 0.3)}
    pairs = [n for n in names if n.startswith("docstrings/") and n.replace("docstrings", "sources", 1) in names]
    assert len(pairs) > 300 and all(split[n] == split[n.replace("docstrings", "sources", 1)] for n in pairs)


def test_docstrings_are_found_at_every_depth_in_order():
    source = (
        'if 1:\n    class A:\n        """One."""\n        async def f():\n            """Two\n            lines."""\n'
    )
    assert corpus._docstrings(source) == "A\n\nOne.\n\n\nA.f\n\nTwo\nlines."


def test_repeated_and_blank_documents_are_dropped_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": " \\n"}\n{"text": "two"}\n')
    found = corpus.read([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert [document.text for document in found.documents] == ["one", "two"]
    assert found.dropped == {"unreadable": 0, "blank": 1, "duplicate": 1}


def test_only_a_line_feed_ends_a_json_line(tmp_path):
    text = "one\u2028two\x85three\r\nfour"
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": text}, ensure_ascii=False) + "\r\n", encoding="utf-8", newline=""
    )
    assert [document.text for document in corpus.files([tmp_path / "a.jsonl"])] == [text]


def test_the_corpus_hash_sees_texts_and_order_but_not_names(tmp_path):
    for name, text in {"a": "one", "b": "two", "c": "one"}.items():
        (tmp_path / name).write_text(text)
    digest = {names: corpus.corpus_hash(corpus.files(tmp_path / n for n in names)) for names in ("ab", "cb", "ba")}
    assert digest["ab"] == digest["cb"] != digest["ba"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine \xff", r"a\.txt: not UTF-8 text \(invalid start byte at byte 5\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a\.jsonl, line 2: Expecting ',' delimiter"),
        ("a.jsonl", b'{"text": "x"}\n\n["y"]\n', r"a\.jsonl, line 3: not an object with a string under 'text'"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl, line 1: not an object with a string"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl, line 1: 'utf-8' codec can't decode"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: 'utf-8' codec can't encode"),
        ("a.txt", b" \n", r"no text in .*a\.txt; give text"),
    ],
)
def test_a_bad_source_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        corpus.read([tmp_path / name])


# Splits and bytes


def test_every_document_is_in_one_split_and_reads_back_as_its_text(sources, prepared):
    train, heldout = texts_of(prepared, "train"), texts_of(prepared, "heldout")
    assert len(train) + len(heldout) == 40 and not set(train) & set(heldout)
    expected = {f"<|begin_of_text|>{document.text}<|end_of_text|>" for document in corpus.read(sources).documents}
    assert {*train, *heldout} == expected


def test_the_metadata_counts_what_is_there(sources, prepared):
    metadata = json.loads((prepared / "metadata.json").read_bytes())
    assert metadata["corpus_hash"] == corpus.corpus_hash(corpus.read(sources).documents)
    assert metadata["python_version"] == sys.version.split()[0]
    assert (metadata["vocab_size"], metadata["dtype"], metadata["holdout"]) == (520, "uint16", 0.3)
    for name, split in metadata["splits"].items():
        lengths = TokenDataset(prepared, name).lengths
        texts = [text[len("<|begin_of_text|>") : -len("<|end_of_text|>")] for text in texts_of(prepared, name)]
        assert split["documents"] == len(lengths) and split["tokens"] == lengths.sum()
        assert split["characters"] == sum(map(len, texts))
        assert split["characters_per_token"] == round(sum(map(len, texts)) / (lengths.sum() - 2 * len(lengths)), 4)
        for unit, total in {"documents": len(lengths), "tokens": lengths.sum()}.items():
            assert sum(counts[unit] for counts in split["sources"].values()) == total
            assert sum(entry[unit] for entry in split["lengths"]) == total
        for entry in split["lengths"]:
            inside = (lengths >= entry["at_least"]) & (lengths < 2 * entry["at_least"])
            assert inside.sum() == entry["documents"] and lengths[inside].sum() == entry["tokens"]


def test_two_runs_write_the_same_bytes(sources, prepared, tmp_path):
    prepare.prepare(sources, tmp_path / "again", vocab_size=520, holdout=0.3)
    assert contents(tmp_path / "again") == contents(prepared)


def test_the_tokenizer_does_not_see_held_out_text(sources, prepared):
    texts = [document.text for document in corpus.read(sources).split("train", 0.3)]
    assert prepare.train_tokenizer(texts, 520).items() <= contents(prepared).items()


def test_prepared_data_makes_rows(prepared):
    dataset = TokenDataset(prepared, "train", vocab_size=520)
    rows = PackedRows(dataset, 32, 0)
    opening = [row for i in range(len(rows)) if (row := rows.row(i)).tokens[0] == 264]
    assert opening and all(row.tokens.shape == (32,) and row.positions[0] == 0 for row in opening)


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
    document = TokenDataset(tmp_path / "out", "train").document(0)
    assert len(document) == len("say <|end_of_text|> now") + 2 and (document[1:-1] < 256).all()


def test_a_given_tokenizer_is_used_and_copied(sources, prepared, tmp_path):
    metadata = prepare.prepare(sources[:2], tmp_path / "out", tokenizer=prepared, holdout=0.0)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (prepared / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer_config.json").is_file() and metadata["vocab_size"] == 520
    assert texts_of(tmp_path / "out", "train")[0].removeprefix("<|begin_of_text|>").startswith(sources[0].read_text())


def test_metas_tokenizer_makes_uint32_shards(sources, shared_data, tmp_path):
    model = shared_data / "llama3" / "tokenizer.model"
    metadata = prepare.prepare(sources[:2], tmp_path / "out", tokenizer=model, holdout=0.0)
    tokens = np.fromfile(tmp_path / "out" / "train.tokens", "<u4")
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
    assert TokenDataset(tmp_path / "out", "train").tokens[-1] == 265


# Runs


def test_the_same_inputs_again_do_nothing(sources, prepared, capsys, monkeypatch):
    before = contents(prepared)
    monkeypatch.setattr(prepare, "_write_split", lambda *_: pytest.fail("work was done"))
    metadata = prepare.prepare(sources, prepared, vocab_size=520, holdout=0.3)
    assert "already holds this preparation" in capsys.readouterr().err
    assert contents(prepared) == before and json.loads(before["metadata.json"]) == metadata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 530}, "vocab_size 520, not 530"),
        ({"holdout": 0.2}, "holdout 0.3, not 0.2"),
        ({"sources": slice(3)}, "corpus_hash .*, not .*; remove it or choose another --out"),
    ],
)
def test_other_inputs_are_refused_and_change_nothing(sources, prepared, change, message):
    before = contents(prepared)
    inputs = {"vocab_size": 520, "holdout": 0.3} | change
    with pytest.raises(FileExistsError, match=message):
        prepare.prepare(sources[inputs.pop("sources", slice(None))], prepared, **inputs)
    assert contents(prepared) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_nothing(sources, tmp_path, monkeypatch, error):
    write_split = prepare._write_split

    def interrupted(stem, *rest):
        if stem.name == "heldout":
            raise error
        return write_split(stem, *rest)

    monkeypatch.setattr(prepare, "_write_split", interrupted)
    with pytest.raises(error if isinstance(error, type) else OSError):
        prepare.prepare(sources, tmp_path / "out", vocab_size=520)
    assert os.listdir(tmp_path) == []


def test_a_killed_run_leaves_no_directory_and_the_next_one_succeeds(sources, prepared, tmp_path):
    script = (
        "import os, signal, sys; from train import prepare; write_split = prepare._write_split\n"
        "def killed(stem, *rest):\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if stem.name == 'heldout' else None\n"
        "    return write_split(stem, *rest)\n"
        "prepare._write_split = killed; prepare.main(sys.argv[1:])"
    )
    arguments = [*map(str, sources), "--vocab-size=520", "--holdout=0.3", f"--out={tmp_path / 'out'}"]
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True)
    assert run.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    prepare.main(arguments)
    assert contents(tmp_path / "out") == contents(prepared)


def test_the_command_prints_a_table_or_the_metadata(sources, tmp_path, capsys):
    arguments = [*map(str, sources), "--vocab-size=512", "--holdout=0.3", f"--out={tmp_path / 'out'}"]
    prepare.main(arguments)
    shown = capsys.readouterr()
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_bytes())
    assert metadata["corpus_hash"] in shown.out and metadata["python_version"] in shown.out and shown.err == ""
    prepare.main([*arguments, "--json"])
    assert json.loads(capsys.readouterr().out) == metadata


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "No such file or directory: .*missing.txt"),
        (["az://bucket/a.txt"], "expected a local path"),
        (["--vocab-size=300"], "vocab_size=300 is below 512, 256 bytes and 256 special tokens"),
        (["--vocab-size=9999"], r"the text has pairs for vocab_size=\d+ only, not 9999"),
        (["--vocab-size=0"], "vocab_size=0 is below 512"),
        (["--holdout=1.0"], "holdout=1.0 is not a fraction"),
        (["--holdout=0.999999"], "leaves none of 10 documents to train on"),
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
    assert [line.partition(" in ")[0] for line in lines] == ["train: 31.0 documents", "heldout: 9.00 documents"]
