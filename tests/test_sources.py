"""Reading text: which files and documents a SOURCE stands for, of every kind, and what is said of bad ones."""

import gzip
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from train.preparation import sources
from train.preparation.sources import find_parts, read_part


def read(*given, field="text"):
    """Name and text of every document."""
    return [(d.source, d.text) for part in find_parts(given, field) for d in read_part(part)]


def texts(*given, field="text"):
    return [text for _, text in read(*given, field=field)]


def lines(*texts, field="text"):
    return "".join(json.dumps({field: text}) + "\n" for text in texts)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of four documents in three kinds of file, and a hidden one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/deep/.git").mkdir(parents=True)
    (tmp_path / "data/a.txt").write_text("one")
    (tmp_path / "data/deep/b.jsonl").write_text(lines("two", "three"))
    (tmp_path / "data/deep/c.md").write_text("# four")
    (tmp_path / "data/deep/.git/x.txt").write_text("hidden")
    return tmp_path / "data"


# Arguments


def test_a_folder_is_read_recursively_in_the_order_of_names_without_hidden_files(folder):
    assert texts(folder) == texts("data") == ["one", "two", "three", "# four"]


def test_a_glob_matches_files_and_folders(folder):
    assert texts("data/**/*.md") == ["# four"]
    assert texts("data/*") == texts("data")
    assert texts("data/deep/[bc].*") == ["two", "three", "# four"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(folder):
    (folder / "[a].txt").write_text("brackets")
    assert texts("data/[a].txt") == ["brackets"]


def test_names_go_with_their_paths_in_the_given_order_and_may_repeat(folder):
    given = ["web=data/a.txt", "books/de=data/deep/c.md", "data/a.txt", "web=data/deep/b.jsonl"]
    assert read(*given) == [("web", "one"), ("books/de", "# four"), ("text", "one"), ("web", "two"), ("web", "three")]


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(folder):
    (folder / "x=1.txt").write_text("equal")
    assert read("data/x=1.txt") == [("text", "equal")]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("Web=data", "'Web' is not a name of a source; expected a-z, 0-9"),
        ("../up=data", "'../up' is not a name"),
        ("recall=data", "the name recall is kept for the synthetic source"),
        ("az://bucket/a.txt", "expected a local path, gs://"),
        ("hf://models/x", r"expected hf://datasets/NAME\[:SPLIT\]\[@CONFIG\]"),
    ],
)
def test_a_source_that_cannot_be_is_named(folder, source, message):
    with pytest.raises(ValueError, match=message):
        find_parts([source])


@pytest.mark.parametrize("path", ["nothing.txt", "data/*.csv", "data/deep/.hg"])
def test_a_path_without_files_is_named(folder, path):
    with pytest.raises(FileNotFoundError, match=f"^{path.replace('*', '.')}: no such file; expected a file, a folder"):
        find_parts([path])


# Parts


def test_parts_divide_lines_at_any_byte_and_hold_small_files_together(folder, monkeypatch):
    expected = [f"line {i} " * (i % 7) + "\u2028\x85" for i in range(50)]
    (folder / "many.jsonl").write_text(lines(*expected).replace("\n", "\n\n"))
    for size in (1, 7, 64, 1000, 2**20):
        monkeypatch.setattr(sources, "PART_BYTES", size)
        assert texts("data/many.jsonl") == expected
    assert len(find_parts(["data"])) == len(find_parts(["data/a.txt", "data/deep"])) == 1
    assert [part.source for part in find_parts(["a=data", "b=data", "a=data"])] == ["a", "b", "a"]
    monkeypatch.setattr(sources, "PART_BYTES", 40)
    assert [len(part.extents) for part in find_parts(["data/a.txt", "data/deep"])] == [2, 1]


def test_only_a_line_feed_ends_a_json_line(tmp_path):
    text = "one\u2028two\x85three\r\nfour"
    content = json.dumps({"text": text}, ensure_ascii=False) + "\r\n"
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8", newline="")
    assert texts(tmp_path / "a.jsonl") == [text]


def test_the_text_field_is_chosen(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines("one", field="content"))
    assert texts(tmp_path / "a.jsonl", field="content") == ["one"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_text_and_lines_are_read_and_a_cut_is_noticed(tmp_path, suffix):
    if suffix == "gz":
        compress = gzip.compress
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")

        def compress(content):
            return pyarrow.Codec("zstd").compress(content, asbytes=True)

    (tmp_path / f"a.txt.{suffix}").write_bytes(compress(b"one\ntwo"))
    content = compress(lines(*(f"{i * i} text" for i in range(1000))).encode())
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(content)
    assert texts(tmp_path) == ["one\ntwo", *(f"{i * i} text" for i in range(1000))]
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(content[:-20])
    with pytest.raises(ValueError, match=rf"b\.jsonl\.{suffix}: damaged or cut short \(.*\); fetch it again"):
        texts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine \xff", r"a\.txt: not UTF-8 text \(invalid start byte at byte 5\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a\.jsonl, line 2: Expecting ',' delimiter"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n["y"]\n',
            r"a\.jsonl, line 3: expected an object with the field 'text'",
        ),
        ("a.jsonl", b'{"id": 1, "body": "x"}', r"a\.jsonl, line 1: no field 'text'; it has id, body; choose"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl, line 1: 'text' is of type int, not text"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl, line 1: 'utf-8' codec can't decode"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: 'utf-8' codec can't encode"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: damaged or cut short \(Not a gzipped file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name)


def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"a\.parquet needs pyarrow, .*: python -m pip install \"llama_jax\[data\]\""):
        texts(tmp_path / "a.parquet")


# Parquet and the hub


def write_parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=100)


def test_parquet_is_read_in_order_over_row_groups(tmp_path):
    expected = [f"text {i}" for i in range(700)]
    write_parquet(tmp_path / "a.parquet", id=list(range(701)), body=[*expected, None])
    assert texts(tmp_path / "a.parquet", field="body") == [*expected, ""]
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'; it has id, body; choose with --text-field"):
        texts(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: 'id' is of type int, not text"):
        texts(tmp_path / "a.parquet", field="id")
    (tmp_path / "a.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.parquet: not a Parquet file"):
        texts(tmp_path / "a.parquet")


def test_a_data_set_of_the_hub_is_streamed_shard_by_shard(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for i in range(3):
        write_parquet(tmp_path / f"mine/train-{i}.parquet", text=[f"{i}.{j}" for j in range(4)])
    write_parquet(tmp_path / "mine/test-0.parquet", text=["other"])
    parts = find_parts(["web=hf://datasets/mine:train"])  # a folder stands for a data set of the hub
    assert len(parts) == 3
    expected = [("web", f"{i}.{j}") for i in range(3) for j in range(4)]
    assert [(d.source, d.text) for part in parts for d in read_part(part)] == expected
    assert texts("hf://datasets/mine:test@default") == ["other"]
    with pytest.raises(ValueError, match="hf://datasets/mine:test, shard 0, row 1: no field 'body'; it has text"):
        texts("hf://datasets/mine:test", field="body")
    with pytest.raises(OSError, match="^hf://datasets/mine:dev cannot be read: Bad split: dev[^\n]*$"):
        texts("hf://datasets/mine:dev")


# Object stores

IN_A_BUCKET = """
import json, sys
from pathlib import Path
from llama_jax import paths
from train.preparation import sources
sources.PART_BYTES = 10
paths._filesystem("s3").mkdir("texts")
for file in Path("data").rglob("*.*"):
    if file.is_file():
        paths.as_path(f"s3://texts/{file}").write_bytes(file.read_bytes())
for path in ("data", "data/**/*.md", "data/deep/b.jsonl", "nothing"):
    try:
        parts = sources.find_parts([f"s3://texts/{path}"])
        print(json.dumps([document.text for part in parts for document in sources.read_part(part)]))
    except FileNotFoundError as error:
        print(error)
"""


def test_folders_globs_and_parts_of_files_in_a_bucket_are_those_on_disk(folder):
    moto = pytest.importorskip("moto.server", reason="the emulator of s3 (moto) is not installed")
    if not find_spec("s3fs"):
        pytest.skip("s3fs is not installed")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    environment = {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.get_host_and_port()[1]}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
    }
    command = [sys.executable, "-c", IN_A_BUCKET]  # a process of its own: etils keeps the first bucket's server
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    server.stop()
    assert run.returncode == 0, run.stderr
    *found, missing = run.stdout.splitlines()
    assert list(map(json.loads, found)) == [["one", "two", "three", "# four"], ["# four"], ["two", "three"]]
    assert missing.startswith("s3://texts/nothing: no such file; expected a file, a folder")
