"""Files of JSON lines: read with the number of what is wrong, and appended to so that a kill costs at most a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_jax.paths import as_path


def json_lines(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and object of each line that is not empty. Raises ValueError naming one that is no object."""
    with as_path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(item, dict):
                raise ValueError(f"{path}, line {number} is not a JSON object")
            yield number, item


class ResultFile:
    """Lines that are appended whole; `done` are the custom_ids that are there."""

    def __init__(self, path: Path):
        """Goes on with a file; what a kill left of a line is taken away. Raises ValueError if it is not ours."""
        self.path = path
        data = path.read_bytes() if path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            self.done: set[str] = {json.loads(line)["custom_id"] for line in whole.splitlines()}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} has lines that are no results; name another output") from None

    def lines(self) -> Iterator[dict[str, Any]]:
        """What is there."""
        return (line for _, line in json_lines(str(self.path))) if self.path.exists() else iter(())

    def append(self, result: dict[str, Any]) -> None:
        """One more result, on the disk when this returns to the event loop."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        self.done.add(result["custom_id"])
