"""docs/tour.md holds what it says: links point at the lines that they name, code prints what stands beneath it.

After code has moved, `python -m tests.test_tour` sets the line numbers anew.
"""

import ast
import contextlib
import functools
import io
import re
from pathlib import Path

import pytest

import llama_jax

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "docs" / "tour.md"

# [`Llama.embed`](../llama_jax/model.py#L249)
LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)#L(\d+)\)")
# Python, and the output if text follows it.
SNIPPET = re.compile(r"^```python\n(.*?)^```$(?:\n\n^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


@functools.cache
def definitions(path: Path) -> dict[str, int]:
    """The lines where a module defines its functions, classes, methods and values."""
    lines = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines[node.name] = node.lineno
        if isinstance(node, ast.ClassDef):
            methods = (child for child in node.body if isinstance(child, ast.FunctionDef))
            lines |= {f"{node.name}.{method.name}": method.lineno for method in methods}
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            lines |= {target.id: node.lineno for target in targets if isinstance(target, ast.Name)}
    return lines


def renumbered(text: str) -> str:
    """The text with every link at the line of what it names. Raises KeyError for what is not defined there."""

    def link(match: re.Match) -> str:
        name, path, _ = match.groups()
        return f"[`{name}`](../{path}#L{definitions(ROOT / path)[name]})"

    return LINK.sub(link, text)


def test_links_of_the_tour_point_at_the_lines_that_they_name():
    text = TOUR.read_text(encoding="utf-8")
    assert len(LINK.findall(text)) == text.count(".py#L") > 20
    assert text == renumbered(text), "code has moved; run python -m tests.test_tour"


def test_a_link_to_another_line_or_to_nothing_is_seen():
    assert renumbered("[`rotate`](../llama_jax/rope.py#L1)") != "[`rotate`](../llama_jax/rope.py#L1)"
    with pytest.raises(KeyError, match="turn"):
        renumbered("[`turn`](../llama_jax/rope.py#L1)")


def test_code_of_the_tour_prints_what_stands_beneath_it(monkeypatch):
    text = TOUR.read_text(encoding="utf-8")
    monkeypatch.chdir(ROOT)
    shown, printed, names = [], [], {}
    with llama_jax.use_mesh("data=1"):  # restores the mesh that the tour sets
        for match in SNIPPET.finditer(text):
            first_line = text.count("\n", 0, match.start(1))
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile("\n" * first_line + match[1], TOUR, "exec"), names)
            shown.append((first_line, match[2] or ""))
            printed.append((first_line, output.getvalue()))
    assert printed == shown
    assert text.count("```text") == sum(bool(output) for _, output in shown) > 10


if __name__ == "__main__":
    TOUR.write_text(renumbered(TOUR.read_text(encoding="utf-8")), encoding="utf-8")
