"""docs/quickstart.ipynb runs from top to bottom on the demo model; its %pip line alone is left to notebooks."""

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Iterator[dict]:
    """What the notebook leaves defined, run with no mesh set, so that it loads onto all eight devices."""
    import matplotlib.pyplot as plt

    matplotlib.use("agg")
    names = {}
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(None):
        patch.setattr(plt, "show", lambda: None)
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        for number, cell in enumerate(CELLS):
            source = "".join(line for line in cell["source"] if not line.startswith("%"))
            exec(compile(source, f"quickstart.ipynb, code cell {number}", "exec"), names)
    yield names
    plt.close("all")


def test_the_notebook_is_stored_without_outputs():
    assert [(cell["outputs"], cell["execution_count"]) for cell in CELLS] == [([], None)] * len(CELLS)


def test_pip_is_held_to_the_jax_that_is_there():
    assert [line for cell in CELLS for line in cell["source"] if line.startswith(("%", "!"))] == [
        "%pip install --quiet -c present.txt {SOURCE}"
    ]
    names = {}
    source = "".join(CELLS[0]["source"]).partition("Path(")[0]
    exec(source, names)
    assert {f"{name}=={version(name)}" for name in ("jax", "jaxlib")} <= {*names["present"]}


def test_the_notebook_generates_text(names):
    assert names["engine"].throughput.decode_tokens > 10


def test_each_token_reads_shares_of_itself_and_those_before(names):
    weights = names["weights"]
    assert weights.shape == (8, 18, 18)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, atol=1e-6)
    assert not np.triu(weights, k=1).any()


def test_the_head_shown_reads_what_followed_an_earlier_occurrence(names):
    tokens = [names["tokenizer"].decode([i]) for i in names["ids"]]
    head = names["weights"][names["HEAD"]]
    second_def = len(tokens) - 1 - tokens[::-1].index("def")
    assert tokens[head[second_def].argmax()] == " read"


def test_the_last_figure_shows_the_cache_in_gib(names):
    curves = {line.get_label(): line.get_ydata()[-1] for line in names["axes"].get_lines()}
    assert curves["llama3.1-8b, 8 KV heads"] == 16.0
    assert curves["llama3.1-405b, 128 KV heads"] == 1008.0
