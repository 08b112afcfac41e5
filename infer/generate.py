"""Continue prompts, or talk: `python -m infer.generate ["Once upon a time"] [--checkpoint C] [--chat]`.

Text goes to stdout, one prompt's as it comes; what ran and how fast goes to stderr. The invariant:
a prompt reaches the model exactly as it was given, be it an argument, a file, a pipe or token ids.
"""

import argparse
import contextlib
import json
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from infer.entry import add_model_options, add_sampling_options, load_model, open_model, sampling_params, summary

if TYPE_CHECKING:
    from infer.engine import Engine
    from infer.request import Request, Result
    from infer.sampling import SamplingParams

# Continued where no prompt is given; the demo model has read Python's standard library.
DEFAULT_PROMPT = 'def read_config(path):\n    """'

# Above this number of parameters a step takes so long that a stream shows every token by itself.
_LARGE = 100_000_000


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m infer.generate", description="Continue prompts, or talk.", allow_abbrev=False
    )
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="default: what is piped in, else a prompt that suits the demo"
    )
    parser.add_argument("--prompt-file", metavar="F", help="a UTF-8 file that is one prompt, exactly as it is")
    parser.add_argument("--prompt-tokens", metavar="1,2,3", help="token ids in place of text; text is then null")
    parser.add_argument("--chat", action="store_true", help="prompts are messages; without one, a conversation")
    parser.add_argument("--system", metavar="S", help="the system message of --chat")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt and nothing else")
    add_sampling_options(parser)
    add_model_options(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Do what the options say. Raises ValueError or OSError for what is wrong with them."""
    from infer.engine import Engine
    from llama_jax.chat import encode_chat
    from llama_jax.tokenizer import load_tokenizer

    prompts = read_prompts(args)
    checkpoint = open_model(args)
    tokenizer = None if args.prompt_tokens else load_tokenizer(checkpoint.companions)
    params = sampling_params(args, checkpoint)
    if args.chat:
        assert tokenizer is not None
        encode_chat(tokenizer, _dialog(args.system, "Hello"))  # tells now if there is no chat format
    model = load_model(args, checkpoint)
    streamed = len(prompts) <= 1 and not args.json
    steps = 1 if streamed and model.cfg.num_params() > _LARGE else 8
    engine = Engine(model, tokenizer, max_seq_len=args.max_seq_len, steps_per_dispatch=steps)
    requests = engine.requests([_dialog(args.system, text) for text in prompts] if args.chat else prompts, params)
    print(summary(args, model, params), file=sys.stderr)
    shown = ["" if args.chat or args.prompt_tokens else text for text in prompts]
    if not requests:
        converse(engine, params, args.system)
    elif streamed:
        print_stream(engine, requests[0], shown[0])
    else:
        for _ in engine.run(requests):
            pass
        for request, prompt, before in zip(requests, prompts, shown, strict=True):
            print(json_line(engine, request.result, prompt) if args.json else before + _readable(request.result) + "\n")
    print(engine.throughput, file=sys.stderr)


def read_prompts(args: argparse.Namespace) -> list:
    """The prompts, texts or one list of token ids; none for a conversation.

    Raises ValueError for an empty prompt, one that is not UTF-8, and options that exclude each other.
    """
    if args.system is not None and not args.chat:
        raise ValueError("--system is the system message of --chat; give both")
    if args.prompt_tokens is not None:
        if args.prompts or args.prompt_file or args.chat:
            raise ValueError("--prompt-tokens takes the place of text: give no prompt, --prompt-file or --chat with it")
        return [_token_ids(args.prompt_tokens)]
    prompts = list(args.prompts)
    if args.prompt_file is not None:
        prompts.append(_text(Path(args.prompt_file).read_bytes(), args.prompt_file))
    if not prompts and _is_piped():
        prompts.append(_text(sys.stdin.buffer.read(), "standard input"))
    if "" in prompts:
        raise ValueError("the prompt is empty; give at least one character")
    if not prompts and not (args.chat and sys.stdin.isatty() and not args.json):
        prompts.append(DEFAULT_PROMPT)
    return prompts


def _token_ids(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--prompt-tokens {text!r}: expected token ids separated by commas, as 1,2,3") from None


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from None


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file, not a terminal or /dev/null."""
    try:
        return not stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):  # there is none, or it is closed
        return False


def _dialog(system: str | None, user: str) -> list[dict]:
    start = [] if system is None else [{"role": "system", "content": system}]
    return [*start, {"role": "user", "content": user}]


def print_stream(engine: "Engine", request: "Request", before: str) -> None:
    """Print the text of one request as it comes, after what stands before it."""
    print(before, end="", flush=True)
    for _, text in engine.run([request]):
        print(text, end="", flush=True)
    print("" if request.result.text else _readable(request.result))


def _readable(result: "Result") -> str:
    """The text; the token ids where there is no tokenizer."""
    return ",".join(map(str, result.tokens)) if result.text is None else result.text


def json_line(engine: "Engine", result: "Result", prompt: str | list[int]) -> str:
    """The result and the speed of its run as one JSON object."""
    line = asdict(result) | {"prompt": prompt if isinstance(prompt, str) else None}
    for speed in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        line[speed] = getattr(engine.throughput, speed)
    return json.dumps(line)


def converse(engine: "Engine", params: "SamplingParams", system: str | None) -> None:
    """Read messages and stream answers until Ctrl-D; Ctrl-C stops an answer."""
    messages = _dialog(system, "")[:-1]
    while True:
        try:
            text = input("> ")
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
            continue
        messages.append({"role": "user", "content": text})
        answer = ""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in engine.stream(messages, params):
                print(piece, end="", flush=True)
                answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    arguments = parse_args()
    from llama_jax.entry import run_entry  # imports jax, which --help need not wait for

    run_entry(lambda: run(arguments))
