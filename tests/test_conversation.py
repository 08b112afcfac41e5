"""A conversation as a person has it: on a pseudo-terminal, with an engine of known answers and with the demo model."""

import contextlib
import inspect
import itertools
import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from infer.conversation import Conversation, chat_notice

pty = pytest.importorskip("pty", reason="pseudo-terminals are there on Unix alone")

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "llama_jax" / "demo"


class Parrot:
    """An engine that answers with the last message in angle brackets, at "long" without end; a word is a token."""

    max_seq_len = 20
    throughput = SimpleNamespace(decode_tokens_per_second=31.52)

    def __init__(self):
        self.heard = []

    def requests(self, prompts, params, *, adapter):
        (messages,) = prompts
        tokens = [word for message in messages for word in message["content"].split()]
        if len(tokens) >= self.max_seq_len:
            raise ValueError(f"the prompt has {len(tokens)} tokens, which leaves no room")
        self.heard.append([message["content"] for message in messages])
        return [SimpleNamespace(result=SimpleNamespace(prompt_tokens=tokens, tokens=[], finish_reason=None))]

    def run(self, requests):
        (request,), text = requests, self.heard[-1][-1]
        if text == "large":
            raise ValueError("this batch needs 9 GB")
        for piece in itertools.repeat("~") if text == "long" else ["<", text, ">"]:
            yield 0, piece
        if text == "stuck":
            raise KeyboardInterrupt  # what Ctrl-C does once it was pressed before
        request.result.tokens, request.result.finish_reason = text.split(), "length" if text == "cut" else "stop"


# A shell without job control starts what runs in its background with Ctrl-C ignored, which is inherited.
ON_A_TERMINAL = """
import fcntl, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
"""
TALK = f"""{ON_A_TERMINAL}
import itertools, json, sys
from types import SimpleNamespace
if "plain" in sys.argv:
    sys.modules["readline"] = None
from infer.conversation import Conversation

{inspect.getsource(Parrot)}

parrot = Parrot()
Conversation(parrot, SimpleNamespace(max_new_tokens=7), system="sys").run()
print("HEARD", json.dumps(parrot.heard))
"""
GENERATE = f"""{ON_A_TERMINAL}
import runpy
runpy.run_module("infer.generate", run_name="__main__", alter_sys=True)
"""


class Terminal:
    """A program on a terminal of its own: send what is typed, await what is shown."""

    def __init__(self, code: str, *argv: str, **environment: str):
        self._keys, screen = pty.openpty()
        env = os.environ | {"TERM": "xterm", "INPUTRC": os.devnull, "JAX_PLATFORMS": "cpu"} | environment
        env["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        command = [sys.executable, "-c", code, *argv]
        self.program = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=screen, stdout=screen, stderr=screen, start_new_session=True
        )
        os.close(screen)
        self._shown = ""

    def send(self, text: str) -> None:
        os.write(self._keys, text.encode())

    def interrupt(self, pattern: str) -> str:
        """Press Ctrl-C and see the pattern; once more if the prompt was there before Python listened."""
        time.sleep(0.2)
        self.send("\x03")
        with contextlib.suppress(AssertionError):
            return self.see(pattern, seconds=5)
        self.send("\x03")
        return self.see(pattern)

    def see(self, pattern: str, seconds: float = 60) -> str:
        """What is shown up to the end of the pattern; what follows is kept for the next call."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self._shown)):
            assert time.monotonic() < end, f"no {pattern!r} in {self._shown!r}"
            if select.select([self._keys], [], [], 1)[0]:
                new = b""
                with contextlib.suppress(OSError):  # Linux's way to say that the program has ended
                    new = os.read(self._keys, 65536)
                assert new, f"ended without {pattern!r} in {self._shown!r}"
                self._shown += new.decode(errors="replace")
        seen, self._shown = self._shown[: found.end()], self._shown[found.end() :]
        return seen

    def status(self) -> int:
        return self.program.wait(timeout=60)

    def heard(self) -> list[list[str]]:
        """Leave; the contents of every dialog that the parrot was given."""
        self.see("> $")
        self.send("/exit\n")
        self.see("HEARD ")
        dialogs = json.loads(self.see(r"\]\r"))
        assert self.status() == 0
        return dialogs

    def close(self) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self._keys)


@pytest.fixture
def terminal():
    """terminal(code, *argv) -> the program on a terminal, at its first prompt."""
    with contextlib.ExitStack() as opened:

        def start(code: str, *argv: str) -> Terminal:
            program = Terminal(code, *argv)
            opened.callback(program.close)
            program.see("> ")
            return program

        yield start


KINDS = pytest.mark.parametrize("kind", ["readline", "plain"])


@KINDS
def test_a_dialog_keeps_its_history_and_shows_how_full_the_context_is(terminal, kind):
    program = terminal(TALK, kind)
    program.send("a b\n")
    program.see(r"<a b>\r\n\[5 of 20 tokens, 31\.5 tokens/s\]\r\n.*> ")
    program.send("c\n")
    program.see("<c>")
    assert program.heard() == [["sys", "a b"], ["sys", "a b", "<a b>", "c"]]


@KINDS
def test_ctrl_c_stops_an_answer_and_what_was_said_stays_in_the_dialog(terminal, kind):
    program = terminal(TALK, kind)
    program.send("long\n")
    program.see("~~~")
    program.send("\x03")
    program.see(r"\[2 of 20 tokens, stopped\]\r\n.*> ")
    program.send("b\n")
    program.see("<b>")
    first, (_, question, answer, last) = program.heard()
    assert first == ["sys", "long"]
    assert (question, set(answer), last) == ("long", {"~"}, "b")


@KINDS
def test_ctrl_c_at_the_prompt_says_how_to_leave_and_leaves_at_the_second(terminal, kind):
    program = terminal(TALK, kind)
    program.interrupt(r"Ctrl-D or /exit leaves, and so does Ctrl-C once more\r\n.*> ")
    program.send("a\n")
    program.see(r"<a>\r\n.*\r\n.*> ")
    program.interrupt(r"once more\r\n.*> ")
    program.interrupt("HEARD")
    assert program.status() == 0


@KINDS
def test_ctrl_d_leaves(terminal, kind):
    program = terminal(TALK, kind)
    program.send("\x04")
    program.see(r"HEARD \[\]")
    assert program.status() == 0


def test_a_marked_paste_is_one_message_and_may_be_edited_before_it_is_sent(terminal):
    if "GNU" not in (pytest.importorskip("readline").__doc__ or ""):
        pytest.skip("libedit knows no marks of a paste")
    program = terminal(TALK, "readline")
    program.send("\x1b[200~/a\nb\n\nc\x1b[201~d\n")
    program.see("of 20 tokens")
    assert program.heard() == [["sys", "/a\nb\n\ncd"]]


def test_lines_that_come_together_are_one_message_where_a_paste_is_not_marked(terminal):
    program = terminal(TALK, "plain")
    program.send("a\nb\n\nc\n")
    program.see("of 20 tokens")
    assert program.heard() == [["sys", "a\nb\n\nc"]]


def test_an_arrow_key_brings_the_last_line_back(terminal):
    pytest.importorskip("readline")
    program = terminal(TALK, "readline")
    program.send("a\n")
    program.see(r"<a>\r\n.*\r\n.*> ")
    program.send("\x1b[A!\n")
    program.see("<a!>")
    assert program.heard()[1] == ["sys", "a", "<a>", "a!"]


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo model is not there")
def test_the_demo_model_is_stopped_and_answers_again(terminal):
    program = terminal(GENERATE, "--chat", "--mesh", "data=1", "--temperature", "0", "--max-new-tokens", "4000")
    program.send("Why?\n")
    program.see(r"Why\?\r\n(\x1b\[\?2004l\r)?[^\w\x1b]*\w")
    program.send("\x03")
    program.see(r"\d+ of 4,096 tokens, stopped\]\r\nfirst token after .*\r\n.*> ")
    program.send("/exit\n")
    assert program.status() == 0


# Without a terminal.


@pytest.fixture
def talk(monkeypatch):
    """talk(*lines) -> the contents of the dialog after these lines were typed, then Ctrl-D."""
    monkeypatch.setattr("infer.conversation.edit_lines", lambda: True)

    def talk(*lines: str) -> list[str]:
        typed = iter(lines)

        def listen(prompt):
            with contextlib.suppress(StopIteration):
                return next(typed)
            raise EOFError

        monkeypatch.setattr("builtins.input", listen)
        engine: Any = Parrot()
        params: Any = SimpleNamespace(max_new_tokens=7)
        startup: Any = SimpleNamespace(line=lambda throughput: "first token after 6.0 s")
        conversation = Conversation(engine, params, system="sys", startup=startup)
        conversation.run()
        return [message["content"] for message in conversation.messages]

    return talk


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a\\", "b\\", "", "c"], "a\nb\n"),
        (['"""', "/a", "", "  b", '"""'], "/a\n\n  b"),
        (['"""a', 'b"""'], "a\nb"),
        (['"""a"""'], "a"),
        ([" /a"], " /a"),
        (["", "  ", "a\n"], "a"),
    ],
)
def test_a_message_may_have_several_lines(talk, lines, message):
    assert talk(*lines)[1] == message.rstrip("\n")


def test_reset_forgets_the_dialog_and_keeps_the_system_message(talk, capsys):
    assert talk("a", "/reset", "b") == ["sys", "b", "<b>"]
    assert "the dialog is forgotten, the system message kept" in capsys.readouterr().err


def test_system_sets_or_removes_the_system_message_and_keeps_the_dialog(talk, capsys):
    assert talk("a", "/system be brief") == ["be brief", "a", "<a>"]
    assert talk("a", "/system") == ["a", "<a>"]
    said = capsys.readouterr().err
    assert "the system message is set, the dialog kept" in said and "is removed, the dialog kept" in said


def test_save_writes_the_dialog_as_json_and_never_over_a_file(talk, tmp_path, capsys):
    file = tmp_path / "dialog.json"
    talk("\u0e2a", "/system \udcff", f"/save {file}", "b", f"/save {file}", f"/save {tmp_path / 'no' / 'x'}", "/save")
    assert json.loads(file.read_text(encoding="utf-8")) == {
        "messages": [
            {"role": "system", "content": "\udcff"},
            {"role": "user", "content": "\u0e2a"},
            {"role": "assistant", "content": "<\u0e2a>"},
        ]
    }
    said = capsys.readouterr().err
    assert f"3 messages are in {file}" in said and f"{file} exists and is left as it is" in said
    assert said.count("No such file or directory") == 1 and "/save needs a file name\n" in said


def test_an_unknown_command_is_told_and_not_sent(talk, capsys):
    assert talk("/rest now", "/help", "/exit", "a") == ["sys"]
    said = capsys.readouterr().err
    assert "there is no /rest; /help lists the commands" in said and "/save FILE" in said


def test_a_message_without_room_is_left_out_and_the_way_out_told(talk, capsys):
    assert talk("a", "b " * 20, "c") == ["sys", "a", "<a>", "c", "<c>"]
    said = capsys.readouterr().err
    assert "the message is left out: the prompt has 23 tokens, which leaves no room; /reset empties the dialog" in said


def test_an_answer_that_the_devices_have_no_room_for_is_told_and_the_dialog_kept(talk, capsys):
    assert talk("a", "large", "c") == ["sys", "a", "<a>", "c", "<c>"]
    assert "the message is left out: this batch needs 9 GB; /reset empties the dialog" in capsys.readouterr().err


def test_a_second_ctrl_c_in_an_answer_ends_the_command(talk):
    with pytest.raises(KeyboardInterrupt):
        talk("a", "stuck", "c")


def test_the_start_is_told_once_after_the_first_answer(talk, capsys):
    talk("large", "a", "b")
    _, missing, status, told, last = capsys.readouterr().err.splitlines()
    assert (told, missing[:11], status[0], last[0]) == ("first token after 6.0 s", "the message", "[", "[")


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("cut", "[3 of 20 tokens, 31.5 tokens/s; cut off after --max-new-tokens 7]"),
        ("a " * 8, "[17 of 20 tokens, 31.5 tokens/s; room for 3 more: /reset empties it]"),
        ("a " * 10, "[21 of 20 tokens, 31.5 tokens/s; the context is full: /reset empties it]"),
    ],
)
def test_a_cut_answer_and_a_nearly_full_context_are_told(talk, capsys, message, status):
    talk(message)
    assert status in capsys.readouterr().err


def test_a_chat_format_comes_from_the_template_or_is_metas_or_there_is_none():
    def notice(template=None, tokens=("<|eot_id|>",), ends=()):
        tokenizer: Any = SimpleNamespace(chat_template=template, special_tokens=dict.fromkeys(tokens, 9))
        return chat_notice(tokenizer, ends)

    assert notice(template="x", ends=[1]) is None
    assert str(notice()).startswith("no chat template: Meta's format is used")
    assert notice(ends=[1, 9]) == notice()
    for base in ({"ends": [1]}, {"tokens": ()}):
        with pytest.raises(ValueError, match="this is a base model, .*; drop --chat"):
            notice(**base)
