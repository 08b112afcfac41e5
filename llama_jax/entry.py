"""What every command shares: one clear line for an error, lines about the run, settings from the command line."""

import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


def run_entry(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit: 0, 1 with one line on stderr for an error, 130 for Ctrl-C.

    ValueError, OSError, a device without memory and an option that a compiler does not have are what a user
    can cause; anything else is our mistake and shows its traceback. LLAMA_JAX_TRACEBACK=1 shows it for all.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        _fail(error, " ".join(str(error).split()))
    except RuntimeError as error:
        first_line = str(error).partition("\n")[0]  # what follows lists every array
        if "RESOURCE_EXHAUSTED" in str(error):
            _fail(error, f"{first_line} Use a smaller model, batch or context, or more devices.")
        if "No such compile option" in first_line or "While setting option" in first_line:
            _fail(error, f"{first_line} Set compiler_options to what the installed compiler has.")
        raise
    sys.exit(0)


def _fail(error: Exception, line: str) -> NoReturn:
    if os.environ.get("LLAMA_JAX_TRACEBACK"):
        raise error
    print(f"error: {line}", file=sys.stderr)
    sys.exit(1)


def say(line: str) -> None:
    """Print a line about the run on stderr; of several connected processes the first does."""
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Values of `--set key=value`, read as TOML and, where that fails, as text.

    Raises ValueError for one without "=".
    """
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {setting}: expected key=value")
        try:
            parsed[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed[key.strip()] = value.strip()
    return parsed
