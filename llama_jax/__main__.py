"""The console command: `llama-jax generate ...` is `python -m infer.generate ...`, and so on.

The invariant: a command is the module it names, run as `python -m` runs it, and no other is imported.
"""

import runpy
import sys
from collections.abc import Sequence

from llama_jax import __version__

# name: module, the options that the name stands for, what it does
COMMANDS: dict[str, tuple[str, list[str], str]] = {
    "generate": ("infer.generate", [], "continue a text, with the demo model or --checkpoint"),
    "chat": ("infer.generate", ["--chat"], "talk with a model: generate --chat"),
    "serve": ("infer.serve", [], "answer OpenAI's clients, and browsers"),
    "batch": ("infer.batch", [], "answer a file of requests, or make data of a template"),
    "evaluate": ("infer.evaluate", [], "score a model by lm-eval's tasks"),
    "pretrain": ("train.pretrain", [], "train a model, stage by stage"),
    "prepare": ("train.prepare", [], "turn text into the tokens that pretrain reads"),
    "report": ("train.report", [], "show a run as one HTML page"),
    "convert": ("llama_jax.convert", [], "write a checkpoint in another format"),
}

USAGE = "\n".join(
    [
        "usage: llama-jax COMMAND [OPTION ...]",
        "",
        *(f"    {name:<10}{what}" for name, (_, _, what) in COMMANDS.items()),
        "",
        "llama-jax COMMAND --help tells the options; llama-jax --version the version.",
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names with the others; exits as that command does."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
    elif name == "--version":
        print(f"llama-jax {__version__}")
    elif name in COMMANDS:
        module, options, _ = COMMANDS[name]
        sys.argv[1:] = [*options, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.exit(f"error: there is no command {name!r}; there are {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
