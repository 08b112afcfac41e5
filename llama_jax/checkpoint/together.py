"""What all processes of a run do together, without the devices.

Words go through the store of jax.distributed, so threads may use this while the devices train. The
one invariant: what fails in one process fails in all, so that none waits for what will not come.
"""

import collections
import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
from jax._src import distributed  # the one way to its store

from llama_jax.paths import staged_directory

_TIMEOUT_MS = 3_600_000  # a process that died is noticed earlier by jax.distributed itself

_uses: collections.Counter[str] = collections.Counter()


def together(what: str, work: Callable[[], str | None]) -> list[str]:
    """Do this process's part of what all are at; what each process's gave, in order.

    Processes must do the same works in the same order, those of one thread apart from another's by `what`.
    Raises what the work raised here, OSError if it raised in another process.
    """
    said, failure = {}, None
    try:
        said["gave"] = work() or ""
    except Exception as error:  # raised below, when the others know
        failure = error
        said["failed"] = f"{type(error).__name__}: {error}"
    answers = _exchange(what, said) if jax.process_count() > 1 else [said]
    if failure is not None:
        raise failure
    for process, answer in enumerate(answers):
        if "failed" in answer:
            raise OSError(f"process {process} failed: {answer['failed']}")
    return [answer["gave"] for answer in answers]


def _exchange(what: str, said: dict[str, str]) -> list[dict[str, str]]:
    client = distributed.global_state.client
    if client is None:
        raise ValueError("jax.distributed is not initialized, yet there are several processes")
    key = f"llama_jax/{what}/{_uses[what]}"
    _uses[what] += 1
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(said))
    try:
        keys = [f"{key}/{process}" for process in range(jax.process_count())]
        return [json.loads(client.blocking_key_value_get(key, _TIMEOUT_MS)) for key in keys]
    except jax.errors.JaxRuntimeError as error:
        raise OSError(f"{what}: another process does not answer: {' '.join(str(error).split())}") from None


def write_together(path: Path, fill: Callable[[Path], None], finish: Callable[[Path], None]) -> None:
    """Fill one directory from all processes; it appears at path when the first has finished it, or not at all.

    Raises FileExistsError before any work if something is there; OSError in all if one fails.
    """
    is_first = jax.process_index() == 0
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            return stack.enter_context(staged_directory(path)).name if is_first else ""

        def end() -> None:
            if is_first:
                finish(staged)
                stack.close()

        staged = path.with_name(together(f"begin {path}", begin)[0])
        together(f"fill {path}", lambda: fill(staged))
        together(f"end {path}", end)
