"""The two ends of a pipe between the driver of a comparison and the process of one library.

A request and its answer are one JSON object a line. The worker's own stdout is kept for answers:
whatever a library prints goes to stderr.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any


class Worker:
    """A process that measures; ask it one thing at a time."""

    def __init__(self, module: str, *arguments: str):
        """Start `python -m module arguments`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, task: str, **arguments: Any) -> dict:
        """The answer of the worker. Raises RuntimeError if it has died; its own error is on stderr."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"{self._process.args} ended with status {self._process.wait()} at {task} {arguments}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def answer_requests(tasks: dict[str, Callable[..., dict]]) -> None:
    """Answer requests until the driver closes the pipe."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(tasks[request.pop("task")](**request)) + "\n")
        answers.flush()
