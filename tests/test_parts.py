"""Encoding in parts: by several processes, stopped, failed and gone on with, always to the same bytes."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_jax.entry import run_entry
from train import prepare
from train.preparation import parts, shard_writer, sources
from train.preparation.corpus import is_held_out, text_hash
from train.preparation.tokenizer_training import train_tokenizer

WORDS = "the a lamp llama reads writes over under seven tokens in of quick brown old rows".split()
PART_BYTES = 20_000


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with lines.jsonl, 1000 documents, some 60 parts of work, and a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 400))) for _ in range(1000)]
    (folder / "lines.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for name, content in train_tokenizer(texts[:50], 520).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def expected(text):
    """What one process makes of it at a stretch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PART_BYTES", PART_BYTES)
        prepare.prepare([text / "lines.jsonl"], text / "out", tokenizer=text, workers=1)
    return contents(text / "out")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sources, "PART_BYTES", PART_BYTES)


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_line_is_in_one_of_the_parts_in_order(text):
    found = sources.find_parts([text / "lines.jsonl"])
    assert len(found) > 40 and all(extent.size <= PART_BYTES for part in found for extent in part.extents)
    lines = (text / "lines.jsonl").read_text().splitlines()
    assert [d.text for part in found for d in sources.read_part(part)] == [json.loads(line)["text"] for line in lines]


def test_two_workers_make_the_bytes_of_one(text, expected, tmp_path):
    prepare.prepare([text / "lines.jsonl"], tmp_path / "out", tokenizer=text, workers=2)
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_process_and_the_same_command_goes_on_to_the_same_bytes(
    text, expected, tmp_path, capsys, ending
):
    script = (
        "import signal, sys, time; from llama_jax.entry import run_entry; from train import prepare; "
        "from train.preparation import sources\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background has ignored\n"
        "prepare._write = lambda *_: time.sleep(60)  # or it may end before the signal comes\n"
        f"sources.PART_BYTES = {PART_BYTES}; run_entry(lambda: prepare.main(sys.argv[1:]))"
    )
    arguments = [f"{text}/lines.jsonl", f"--tokenizer={text}", f"--out={tmp_path / 'out'}", "--workers=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as run:
        while not list(tmp_path.glob("out.parts/*.done")):
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(ending)
        shown = run.communicate(timeout=300)[1]  # to the end of the last process that could write
    work = f"{tmp_path}/out.parts"
    assert os.listdir(tmp_path) == ["out.parts"]
    assert run.returncode == (130 if ending == signal.SIGINT else -ending)
    if ending == signal.SIGINT:
        assert shown.endswith(f"what is finished stays in {work}; the same command goes on from there\ninterrupted\n")
        assert "Traceback" not in shown
    prepare.main(arguments)
    assert re.search(rf"^\d+ of \d+ parts are there, in {work}; going on$", capsys.readouterr().err, re.MULTILINE)
    assert contents(tmp_path / "out") == expected and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_while_writing_leaves_no_directory_and_keeps_the_parts(text, expected, tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
        patch.setattr(shard_writer.ShardWriter, "_close_shard", fail)
        prepare.prepare([text / "lines.jsonl"], tmp_path / "out", tokenizer=text, workers=1)
    assert os.listdir(tmp_path) == ["out.parts"]
    assert isinstance(error, KeyboardInterrupt) or str(tmp_path) in str(raised.value)
    monkeypatch.setattr(parts.Encoder, "encode", lambda *_: pytest.fail("encoded again"))
    prepare.prepare([text / "lines.jsonl"], tmp_path / "out", tokenizer=text, workers=1)
    assert contents(tmp_path / "out") == expected and os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_one_line_that_names_the_place(text, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parts.np, "savez", fail)
    with pytest.raises(SystemExit):
        run_entry(
            lambda: prepare.main(
                [f"{text}/lines.jsonl", f"--tokenizer={text}", f"--out={tmp_path}/out"] + ["--workers=1"]
            )
        )
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"error: [Errno 28] No space left on device: '{tmp_path}/out.parts'"


def test_finished_parts_and_a_trained_tokenizer_are_used_again(text, tmp_path, monkeypatch):
    def prepared(holdout):
        return prepare.prepare([text / "lines.jsonl"], tmp_path / "out", vocab_size=514, holdout=holdout, workers=1)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(prepare, "_write", lambda *_: sys.exit())
        prepared(0.1)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "train_tokenizer", lambda *_: pytest.fail("trained again"))
        patch.setattr(parts.Encoder, "encode", lambda *_: pytest.fail("encoded again"))
        prepared(0.1)


def test_parts_of_a_given_tokenizer_serve_another_holdout(text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(prepare, "_write", lambda *_: sys.exit())
        prepare.prepare([text / "lines.jsonl"], tmp_path / "out", tokenizer=text, holdout=0.1, workers=1)
    monkeypatch.setattr(parts.Encoder, "encode", lambda *_: pytest.fail("encoded again"))
    held = prepare.prepare([text / "lines.jsonl"], tmp_path / "out", tokenizer=text, holdout=0.3, workers=1)
    texts = {d.text for part in sources.find_parts([text / "lines.jsonl"]) for d in sources.read_part(part)}
    assert held["sources"]["text"]["heldout"]["documents"] == sum(is_held_out(text_hash(t), 0.3) for t in texts)


def test_an_error_in_a_worker_is_its_one_line(text, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n' * 3000 + '{"body": "x"}\n')
    message = r"bad\.jsonl, line 3001: no field 'text'; it has body; choose with --text-field"
    with pytest.raises(ValueError, match=message):
        prepare.prepare([tmp_path / "bad.jsonl"], tmp_path / "out", tokenizer=text, workers=2)
    assert not (tmp_path / "out").exists()


def killed(part):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_was_killed_is_one_line(text, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_encode", killed)
    with pytest.raises(OSError, match="a worker was killed, perhaps for want of memory; the same command goes on"):
        prepare.prepare([text / "lines.jsonl"], tmp_path / "out", tokenizer=text, workers=2)
