"""A conversation on a terminal: what `python -m infer.generate --chat` opens where no prompt is given.

The invariant: the model sees the whole dialog, which is what /save writes. No turn is dropped in
silence: a message that the context has no room for is refused, and the way out told.
"""

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from llama_jax.entry import say

if TYPE_CHECKING:
    from infer.engine import Engine
    from infer.entry import Startup
    from infer.request import Request
    from infer.sampling import SamplingParams
    from llama_jax.tokenizer import Tokenizer

HELP = '''\
/reset          forget the dialog and keep the system message
/system [TEXT]  set or remove the system message and keep the dialog
/save FILE      write the dialog as JSON to a new file
/help           show this
/exit           leave, as Ctrl-D does
Ctrl-C stops an answer. For several lines paste them, end each but the last with \\, or put """ before and after.'''

# Above this share of the context in use, each answer is followed by a warning.
_NEARLY_FULL = 0.8


def chat_notice(tokenizer: "Tokenizer", ends: Collection[int]) -> str | None:
    """What a user should know of the chat format: nothing if the tokenizer has a template.

    Without one it is Meta's format, which Meta's own files of instruct weights do not mention either. ends
    are the token ids that end a text by generation_config.json, none if it is not there. Raises
    ValueError for a base model: it has no template, and ends that leave out the end of a turn.
    """
    if tokenizer.chat_template is not None:
        return None
    end_of_turn = tokenizer.special_tokens.get("<|eot_id|>")
    if end_of_turn is None or (ends and end_of_turn not in ends):
        raise ValueError(
            "this is a base model, which continues text but has not learned to talk: it has no chat template and "
            "does not end with <|eot_id|>; drop --chat, or name an instruct model with --checkpoint"
        )
    return "no chat template: Meta's format is used, which instruct weights know; for base weights drop --chat"


def dialog(system: str | None, *users: str) -> list[dict]:
    """The messages of a dialog that has no answers yet."""
    start = [] if system is None else [{"role": "system", "content": system}]
    return start + [{"role": "user", "content": text} for text in users]


class Conversation:
    """A dialog with a model, read from the terminal: answers go to stdout, all else to stderr."""

    def __init__(
        self,
        engine: "Engine",
        params: "SamplingParams",
        *,
        system: str | None = None,
        startup: "Startup | None" = None,
        adapter: str | None = None,
    ):
        """The settings of params and the adapter hold for every answer; the first is followed by startup's line."""
        self._engine, self._params, self._startup, self._adapter = engine, params, startup, adapter
        self.messages = dialog(system)

    def run(self) -> None:
        """Take turns until /exit, Ctrl-D or the second Ctrl-C in a row; in an answer that raises KeyboardInterrupt."""
        pastes_whole = edit_lines()
        say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        interrupted = False
        while True:
            try:
                text = read_message(pastes_whole)
            except UnicodeDecodeError:
                say("that was not UTF-8 and is left out")
            except EOFError:
                return print()
            except KeyboardInterrupt:
                print()
                if interrupted:
                    return
                interrupted = True
                say("Ctrl-D or /exit leaves, and so does Ctrl-C once more")
            else:
                interrupted = False
                if not self._turn(text):
                    return

    def _turn(self, text: str) -> bool:
        """Do what a message asks for; false if that is to leave."""
        if text.startswith("/") and "\n" not in text:
            name, _, argument = text[1:].partition(" ")
            if name == "exit":
                return False
            self.command(name, argument.strip())
        elif text.strip():
            self.answer(text)
        return True

    def command(self, name: str, argument: str) -> None:
        """Do what /name says, or say that there is no such command."""
        match name:
            case "reset":
                self.messages = [message for message in self.messages if message["role"] == "system"]
                say("the dialog is forgotten" + (", the system message kept" if self.messages else ""))
            case "system":
                turns = [message for message in self.messages if message["role"] != "system"]
                self.messages = dialog(argument or None) + turns
                say(f"the system message is {'set' if argument else 'removed'}, the dialog kept")
            case "save":
                self._save(argument)
            case "help":
                say(HELP)
            case _:
                say(f"there is no /{name}; /help lists the commands, and a message may begin with a space before its /")

    def _save(self, file: str) -> None:
        if not file:
            return say("/save needs a file name")
        text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2)
        try:
            # Half a surrogate pair, which UTF-8 cannot spell, becomes its escape in JSON.
            with open(os.path.expanduser(file), "x", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(text + "\n")
        except FileExistsError:
            say(f"{file} exists and is left as it is; give /save another name")
        except OSError as error:
            say(f"/save {file}: {error.strerror}")
        else:
            say(f"{len(self.messages)} messages are in {file}")

    def answer(self, text: str) -> None:
        """Print the answer to a message as it comes and take both into the dialog; Ctrl-C ends it early."""
        messages, said = [*self.messages, {"role": "user", "content": text}], ""
        with interrupts() as pressed:
            try:
                (request,) = self._engine.requests([messages], self._params, adapter=self._adapter)
                for _, piece in self._engine.run([request]):
                    print(piece, end="", flush=True)
                    said += piece
                    if pressed:
                        break
            except ValueError as error:  # no room, in the context or on the devices, or a template that refuses
                return say(f"the message is left out: {error}; /reset empties the dialog, /save FILE keeps it")
        print()
        self.messages = [*messages, {"role": "assistant", "content": said}]
        say(f"[{self._status(request)}]")
        if self._startup:
            say(self._startup.line(self._engine.throughput))
            self._startup = None

    def _status(self, request: "Request") -> str:
        result, size = request.result, self._engine.max_seq_len
        used = len(result.prompt_tokens) + len(result.tokens)
        status = f"{used:,} of {size:,} tokens"
        if result.finish_reason is None:
            status += ", stopped"
        elif speed := self._engine.throughput.decode_tokens_per_second:
            status += f", {speed:.1f} tokens/s"
        if used >= size:
            return f"{status}; the context is full: /reset empties it"
        if result.finish_reason == "length":
            status += f"; cut off after --max-new-tokens {self._params.max_new_tokens}"
        return status + (f"; room for {size - used:,} more: /reset empties it" if used > _NEARLY_FULL * size else "")


def edit_lines() -> bool:
    """Let readline, where Python has it, edit lines and remember them; whether it takes in a paste as a whole."""
    try:
        import readline
    except ImportError:
        return False
    if "GNU" not in (readline.__doc__ or ""):  # libedit, as on macOS
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")  # Python turns it off
    return True


def read_message(pastes_whole: bool) -> str:
    """One message: a line, lines that end in a backslash, lines between triple quotes, or a paste.

    Where the terminal does not mark a paste, more lines that come with the first belong to it. Raises
    EOFError and KeyboardInterrupt as input does.
    """
    text = input("> ")
    if text.startswith('"""'):
        text = text[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + input(". ")
        return text.rstrip()[:-3].strip("\n")
    while text.endswith("\\") or (not pastes_whole and _more_waits()):
        text = text.removesuffix("\\") + "\n" + input(". ")
    return text.rstrip("\n")


def _more_waits() -> bool:
    return os.name == "posix" and bool(select.select([sys.stdin], [], [], 0.02)[0])


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """The Ctrl-C pressed meanwhile, which breaks off nothing halfway; the second raises KeyboardInterrupt as ever.

    That may be between what this process and the others run, so nothing can go on after it.
    """
    pressed: list[int] = []

    def press(number, frame) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
