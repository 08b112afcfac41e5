"""The rules of the house, read from the files: floors, sizes, ASCII, settings that are read, paths that exist."""

import ast
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("llama_jax", "train", "infer")

# A file imports from lower floors, or from its own without a circle.
FLOORS = (
    tuple(
        "config mesh paths gguf gguf_tokenizer tokenizer template chat progress chips slices program devices peers "
        "entry tree".split()
    ),
    ("rope", "quantize", "outputs_first", "schemes", "rounding", "kernels", "remat"),
    ("attention", "cache"),
    ("model",),
    ("lora",),
    ("memory", "checkpoint", "calibration", "convert", "plan", "attempts"),
    ("train", "infer"),
    ("__main__",),
)
FACE_FLOOR = 5.5  # llama_jax itself shows what is in the package, and train and infer may use it

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> list[Path]:
    """Every Python file in these folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


EVERY_SOURCE = sources(*PACKAGES, "tests", "benchmarks")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """llama_jax/checkpoint/hf.py -> "llama_jax.checkpoint.hf"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources(*PACKAGES)}


def imported(tree: ast.Module, modules=MODULES) -> Iterator[tuple[int, str]]:
    """Line and module of each import, also of those inside functions; `from package import module` is the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for name in dict.fromkeys(
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base for alias in node.names
            ):
                yield node.lineno, name


def floor(module: str) -> float | None:
    """Floor of a module of this project, None if the plan of the house does not show it."""
    package, _, rest = module.partition(".")
    if package == "llama_jax" and not rest:
        return FACE_FLOOR
    room = rest.split(".")[0] if package == "llama_jax" else package
    return next((i for i, rooms in enumerate(FLOORS) if room in rooms), None)


def floor_violations(module: str, tree: ast.Module, modules=MODULES) -> Iterator[str]:
    """What is wrong with the imports of one module."""
    here = floor(module)
    if here is None:
        yield f"{module} is on no floor: add it to FLOORS and to docs/architecture.md"
        return
    for line, name in imported(tree, modules):
        package = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if not package:
            yield f"{where}: write the module's full name"
        elif package in ("torch", "transformers", "tests", "benchmarks"):
            yield f"{where}, which belongs to tests and benchmarks"
        elif package in PACKAGES:
            there = floor(name)
            if there is not None and there > here:
                yield f"{where} from a higher floor ({there} above {here})"
            elif there == here == floor("train") and package != module.split(".")[0]:
                yield f"{where}: train and infer do not import each other"


def circle(graph: dict[str, list[str]]) -> list[str]:
    """The modules of one circle of imports, the first repeated at the end; [] if there is none."""
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module in done:
            return []
        found = next(filter(None, (walk(name, [*trail, module]) for name in graph.get(module, []))), [])
        done.add(module)
        return found

    return next(filter(None, (walk(module, []) for module in graph)), [])


def listed(violations) -> str:
    return "\n".join(violations)


def test_every_import_comes_from_a_lower_floor_or_its_own():
    assert not listed(line for module, path in MODULES.items() for line in floor_violations(module, parsed(path)))


def test_no_imports_form_a_circle():
    graph = {module: [name for _, name in imported(parsed(path))] for module, path in MODULES.items()}
    assert not circle(graph), " -> ".join(circle(graph))


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("llama_jax.rope", "from llama_jax.model import Llama", "higher floor"),
        ("llama_jax.model", "import train.loss", "higher floor"),
        ("llama_jax.config", "import llama_jax", "higher floor"),
        ("train.loop", "def f():\n    from infer.engine import Engine", "each other"),
        ("infer.engine", "import transformers.models", "belongs to tests"),
        ("llama_jax.model", "from .rope import rotate", "full name"),
        ("llama_jax.helpers", "", "on no floor"),
    ],
)
def test_a_broken_floor_is_seen(module, line, complaint):
    (violation,) = floor_violations(module, ast.parse(line))
    assert complaint in violation


def test_a_circle_is_seen_and_a_diamond_is_not():
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["d"], "c": ["d"]}) == []


def test_an_import_from_a_package_is_an_import_of_the_module():
    tree = ast.parse("from llama_jax.checkpoint import hf, load")
    assert [name for _, name in imported(tree, {"llama_jax.checkpoint.hf"})] == [
        "llama_jax.checkpoint.hf",
        "llama_jax.checkpoint",
    ]


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def num_parameters(function: Function) -> int:
    """How many parameters a caller sees."""
    a = function.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def over(limit: int, sizes: Callable[[Path], Iterator[tuple[str, int]]], paths: list[Path]) -> Iterator[str]:
    for path in paths:
        for what, size in sizes(path):
            if size > limit:
                yield f"{path.relative_to(ROOT)}{what}: {size}, at most {limit}"


def test_no_file_is_longer_than_400_lines():
    assert not listed(
        over(400, lambda path: iter([("", len(path.read_text(encoding="utf-8").splitlines()))]), EVERY_SOURCE)
    )


@pytest.mark.parametrize(("limit", "folders"), [(50, (*PACKAGES, "benchmarks")), (60, ("tests",))])
def test_no_function_is_too_long(limit, folders):
    def lengths(path):
        return ((f":{f.lineno} {f.name}", (f.end_lineno or 0) - f.lineno + 1) for f in functions(parsed(path)))

    assert not listed(over(limit, lengths, sources(*folders)))


def test_no_function_has_more_than_8_parameters():
    def counts(path):
        return ((f":{f.lineno} {f.name}", num_parameters(f)) for f in functions(parsed(path)))

    assert not listed(over(8, counts, EVERY_SOURCE))


def test_code_is_ascii():
    assert not listed(
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in EVERY_SOURCE
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if not line.isascii()
    )


def settings(tree: ast.Module) -> Iterator[tuple[ast.ClassDef, str]]:
    """Each dataclass with each of its fields."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    yield node, field.target.id


def reads(tree: ast.AST, apart_from: ast.AST | None = None) -> Iterator[str]:
    """Names of the attributes that the code reads, apart from one part of it."""
    if tree is apart_from:
        return
    if isinstance(tree, ast.Attribute) and isinstance(tree.ctx, ast.Load):
        yield tree.attr
    for child in ast.iter_child_nodes(tree):
        yield from reads(child, apart_from)


@pytest.mark.parametrize("path", ["llama_jax/config.py", "train/config.py"])
def test_every_setting_is_read_outside_its_own_class(path):
    if not (ROOT / path).exists():
        pytest.skip(f"{path} is not there")
    everywhere = {p: set(reads(parsed(p))) for p in sources(*PACKAGES) if p != ROOT / path}
    assert not listed(
        f"{path}: nothing reads {node.name}.{field}"
        for node, field in settings(parsed(ROOT / path))
        if not any(field in names for names in everywhere.values())
        and field not in reads(parsed(ROOT / path), apart_from=node)
    )


def test_a_setting_that_only_its_class_reads_is_seen():
    tree = ast.parse("@dataclass(frozen=True)\nclass C:\n    a: int\n    def f(self):\n        return self.a\n")
    ((node, field),) = settings(tree)
    assert field == "a"
    assert "a" in reads(tree)
    assert "a" not in reads(tree, apart_from=node)


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# In backticks: a path under a folder of the project, or the bare name of a file of a kind that it has.
IN_FOLDER = re.compile(r"`((?:llama_jax|train|infer|tests|configs|benchmarks|docs|constraints|\.ci)/[\w./-]*)`")
BARE_NAME = re.compile(r"`([\w-]+\.(?:py|md|toml))`")
COMMAND = re.compile(r"python -m ((?:llama_jax|train|infer)\.[\w.]+)")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)[^)]*\)")


def missing(text: str, folder: Path) -> Iterator[str]:
    """What a document in this folder mentions and the project does not have."""
    yield from (path for path in IN_FOLDER.findall(text) if not (ROOT / path).exists())
    known = {path.name for path in (*EVERY_SOURCE, *DOCUMENTS, *ROOT.glob("*.toml"), *ROOT.glob("configs/*.toml"))}
    yield from (name for name in BARE_NAME.findall(text) if name not in known)
    yield from (f"python -m {module}" for module in COMMAND.findall(text) if module.rstrip(".") not in MODULES)
    yield from (link for link in LINK.findall(text) if not (folder / link).exists())


def test_documents_mention_files_and_commands_that_exist():
    assert not listed(
        f"{path.relative_to(ROOT)}: there is no {what}"
        for path in DOCUMENTS
        for what in missing(path.read_text(encoding="utf-8"), path.parent)
    )


def test_what_a_document_mentions_wrongly_is_seen():
    text = "`train/nothing.py` `nothing.md` `python -m infer.nothing` [x](nothing/y) `train/loop.py` `config.json`"
    assert list(missing(text, ROOT)) == ["train/nothing.py", "nothing.md", "python -m infer.nothing", "nothing/y"]


MACHINE = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/|pypi\.[o]rg|python[h]osted|download\.[p]ytorch")


def test_no_file_names_a_machine_or_a_package_registry():
    folders = (*PACKAGES, "tests", "benchmarks", "configs", "docs", "constraints", ".ci")
    paths = [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    assert not listed(
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted(paths)
        if path.is_file() and path.suffix in ("", ".md", ".py", ".toml", ".txt")
        if path.name != ".git"  # which of a worktree is a file
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE.search(line)
    )
