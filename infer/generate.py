"""Continue prompts, or talk: `python -m infer.generate ["Once upon a time"] [--checkpoint C] [--chat]`.

Text goes to stdout, one prompt's as it comes; what ran and how fast goes to stderr. The invariant:
a prompt reaches the model exactly as it was given, be it an argument, a file, a pipe or token ids.
"""

import argparse
import json
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from infer.conversation import Conversation, chat_notice, dialog
from infer.entry import (
    Startup,
    add_model_options,
    add_plan_options,
    add_sampling_options,
    add_speculation_options,
    check_weights,
    conversation_length,
    describe_sampling,
    follow,
    is_streamed,
    load_model,
    load_speculation,
    open_draft,
    open_model,
    sampling_params,
    steps_per_dispatch,
)
from llama_jax.devices import open_devices, use_compilation_cache
from llama_jax.entry import run_entry, say
from llama_jax.paths import as_path

if TYPE_CHECKING:
    from infer.engine import Engine
    from infer.hosts import Hosts
    from infer.request import Request, Result

# Continued where no prompt is given; the demo model has read Python's standard library.
DEFAULT_PROMPT = 'def read_config(path):\n    """'

# Of an answer in a conversation, where --max-new-tokens is not given.
ANSWER_TOKENS = 2048

# What is told of a result elsewhere.
_OF_SERVING = ("top_logprobs", "prompt_logprobs", "prompt_top_logprobs", "cached_tokens")

# What is told of the run beside each result.
_MEASURED = ("prefill_tokens_per_second", "decode_tokens_per_second", "draft_tokens", "accepted_tokens")


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
    add_speculation_options(parser)
    add_model_options(parser)
    add_plan_options(parser)
    args = parser.parse_intermixed_args(argv, argparse.Namespace(max_new_tokens=None))
    given = bool(args.prompts or args.prompt_file or args.prompt_tokens)
    args.conversation = args.chat and not (given or args.json) and _is_terminal()
    args.piped = not given and _is_piped()
    if args.max_new_tokens is None:
        args.max_new_tokens = ANSWER_TOKENS if args.conversation else parser.get_default("max_new_tokens")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Do what the options say. Raises ValueError or OSError for what is wrong with them."""
    check_prompt_options(args)
    if args.plan:
        from infer.plan import print_plan

        return print_plan(args)
    startup = Startup()
    import infer.engine  # noqa: F401
    from infer.hosts import Hosts

    startup.lap("import")
    use_compilation_cache()
    open_devices()
    startup.lap("devices")
    with Hosts() as hosts:
        continue_prompts(args, hosts, startup) if hosts.leads else follow(args, hosts)


def continue_prompts(args: argparse.Namespace, hosts: "Hosts", startup: Startup) -> None:
    """Print what follows the prompts, or talk; in the first process."""
    from infer.engine import Engine
    from llama_jax.chat import encode_chat
    from llama_jax.tokenizer import load_tokenizer

    prompts = read_prompts(args)
    checkpoint = open_model(args, lambda cfg, stored: check_weights(args, cfg, stored))
    tokenizer = None if args.prompt_tokens else load_tokenizer(checkpoint.companions)
    params = sampling_params(args, checkpoint)
    draft = open_draft(args, checkpoint, tokenizer)
    if args.chat:
        assert tokenizer is not None
        notice = chat_notice(tokenizer, params.stop_tokens)
        encode_chat(tokenizer, dialog(args.system, "Hello"))  # tells now what the template does not take
        if notice:
            say(notice)
    startup.lap("open")
    model = load_model(args, checkpoint, hosts, args.max_new_tokens)
    speculation = load_speculation(args, model, draft, hosts)
    del checkpoint, draft  # with what it keeps in memory of remote files
    startup.lap("load")
    streamed = is_streamed(args, len(prompts))
    steps = steps_per_dispatch(model.cfg, streamed=streamed)
    max_seq_len = conversation_length(args, model) if args.conversation else args.max_seq_len
    engine = Engine(
        model, tokenizer, max_seq_len=max_seq_len, steps_per_dispatch=steps, hosts=hosts, speculation=speculation
    )
    adapter = next(iter(engine.adapter_names), None)
    asked = [dialog(args.system, text) for text in prompts] if args.chat else prompts
    requests = engine.requests(asked, params, adapter=adapter)
    say(describe_sampling(params))
    if args.conversation:
        return Conversation(engine, params, system=args.system, startup=startup, adapter=adapter).run()
    shown = ["" if args.chat or args.prompt_tokens else text for text in prompts]
    if streamed:
        print_stream(engine, requests[0], shown[0])
    else:
        for _ in engine.run(requests):
            pass
        for request, prompt, before in zip(requests, prompts, shown, strict=True):
            print(json_line(engine, request.result, prompt) if args.json else before + _readable(request.result) + "\n")
    say(str(engine.throughput))
    say(startup.line(engine.throughput))


def check_prompt_options(args: argparse.Namespace) -> None:
    """Raise ValueError for options that exclude each other."""
    if len(args.adapter) > 1:
        raise ValueError("generate takes one --adapter; infer.serve and infer.batch take several")
    if args.system is not None and not args.chat:
        raise ValueError("--system is the system message of --chat; give both")
    if args.prompt_tokens is not None and (args.prompts or args.prompt_file or args.chat):
        raise ValueError("--prompt-tokens takes the place of text: give no prompt, --prompt-file or --chat with it")


def read_prompts(args: argparse.Namespace) -> list:
    """The prompts, texts or one list of token ids; none for a conversation.

    Raises ValueError for an empty prompt and for one that is not UTF-8.
    """
    if args.prompt_tokens is not None:
        return [_token_ids(args.prompt_tokens)]
    prompts = list(args.prompts)
    if args.prompt_file is not None:
        prompts.append(_text(as_path(args.prompt_file).read_bytes(), args.prompt_file))
    if args.piped:
        prompts.append(_text(sys.stdin.buffer.read(), "standard input"))
    if "" in prompts:
        raise ValueError("the prompt is empty; give at least one character")
    if not prompts and not args.conversation:
        if args.chat:
            raise ValueError("--chat needs a message here: a conversation needs a terminal, and has no --json")
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


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file, not a terminal or /dev/null."""
    try:
        return not stat.S_ISCHR(os.fstat(sys.stdin.fileno()).st_mode)
    except (AttributeError, OSError, ValueError):  # there is none, or it is closed
        return False


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
    """The result, the speed of its run and what became of its guesses as one JSON object."""
    line: dict[str, Any] = {key: value for key, value in asdict(result).items() if key not in _OF_SERVING}
    line["prompt"] = prompt if isinstance(prompt, str) else None
    for measured in _MEASURED:
        line[measured] = getattr(engine.throughput, measured)
    return json.dumps(line)


if __name__ == "__main__":
    run_entry(main)
