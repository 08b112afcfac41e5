"""Record `make demo` in a terminal and draw it: `python docs/demo_svg.py` writes docs/demo.svg.

The command runs under a pseudo-terminal, and each line appears in the picture when it appeared there. The
invariant: what is drawn is what was printed, and a viewer that shows no animation shows all of it.
"""

import os
import pty
import re
import subprocess
import sys
import time
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
COLUMNS, LINE, CHARACTER, MARGIN, BAR = 100, 20, 8.43, 20, 36
HOLD_SECONDS = 0.6  # the typed command stands alone for this long

# What the command says of itself, on stderr; drawn in grey.
STATUS = re.compile(r"parameters|temperature=|greedy|tokens/s|first token")

# Escape sequences of a terminal: colours, cursor movement, titles.
ESCAPES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\^_])")

STYLE = """
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #d4d4d8; white-space: pre; }
.prompt { fill: #86efac; }
.status { fill: #71717a; }
@keyframes appear { from { opacity: 0; } }
@media (prefers-reduced-motion: no-preference) { .line { animation: appear 0.15s backwards; } }
"""


def record(command: list[str]) -> list[tuple[float, str]]:
    """The lines that a command prints on a terminal, each with the second at which it was begun.

    Raises CalledProcessError if the command fails.
    """
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "dumb", "NO_COLOR": "1", "COLUMNS": str(COLUMNS)}
    began, printed, times = time.monotonic(), b"", []
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        while chunk := read(ours):
            printed += chunk
            num_lines = printed.count(b"\n") + (not printed.endswith(b"\n"))
            times += [time.monotonic() - began] * (num_lines - len(times))
    os.close(ours)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, printed)
    lines = ESCAPES.sub(b"", printed).replace(b"\r\n", b"\n").decode().rstrip("\n").split("\n")
    return [(second, line.rpartition("\r")[2]) for second, line in zip(times, lines, strict=False)]


def read(terminal: int) -> bytes:
    """What has been printed, b"" at the end, which Linux reports as an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def draw(lines: list[tuple[float, str]]) -> str:
    """An SVG of a terminal in which `make demo` was typed and printed these lines."""
    rows = [(0.0, "prompt", "$ make demo")]
    for second, line in lines:
        kind = "status" if STATUS.search(line) else "output"
        pieces = [line[i : i + COLUMNS] for i in range(0, len(line), COLUMNS)] or [""]
        rows += [(second + HOLD_SECONDS, kind, piece) for piece in pieces]
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), BAR + len(rows) * LINE + MARGIN
    texts = [
        f'<text class="line {kind}" x="{MARGIN}" y="{BAR + (i + 1) * LINE}" xml:space="preserve"'
        f' style="animation-delay: {second:.2f}s">{escape(text)}</text>'
        for i, (second, kind, text) in enumerate(rows)
    ]
    lights = [f'<circle cx="{MARGIN + 18 * i}" cy="18" r="6" fill="#3f3f46"/>' for i in range(3)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" role="img" aria-label="A terminal: make demo writes a Python function">',
            f"<style>{STYLE}</style>",
            f'<rect width="{width}" height="{height}" rx="10" fill="#18181b"/>',
            *lights,
            *texts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    # The recipe as it stands, with this Python and without installing anything.
    picture = draw(record(["make", "-o", ".venv/core", "demo", f"RUN={sys.executable} -m"]))
    (ROOT / "docs" / "demo.svg").write_text(picture, encoding="ascii", errors="xmlcharrefreplace")
