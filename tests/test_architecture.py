"""The shape of the code: imports point upstream only, functions and files stay small, the public API is whole."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import elegans

ROOT = Path(elegans.__file__).parent
LAYERS = (
    *("errors", "files", "classes", "specs", "sweeps", "sources", "types", "randomness"),
    *("tasks", "models", "training", "folder", "store", "network"),
    *("instruments", "driver", "figures", "report", "study", "archive", "studies", "loading", "progress", "describe", "cli"),
)  # a module or a folder each, upstream first
FRONT = "study"  # `import elegans as el` reaches up to here
FUNCTION_LINES, FILE_LINES = 40, 400
MODULES = sorted(ROOT.rglob("*.py"))


def layer_of(path: Path) -> str:
    """The layer that a file belongs to; the package's own front and entry point are in none."""
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    return "" if part in ("__init__", "__main__") else part


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of elegans that a file imports, wherever in it: dotted below the package (the front is ""), and the line."""
    package = ("elegans", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, [start, node.module]))
            names = [f"elegans.{alias.name}" for alias in node.names] if base == "elegans" else [base]
        else:
            continue
        yield from ((name.removeprefix("elegans").lstrip("."), node.lineno) for name in names if name.split(".")[0] == "elegans")


def only_for_types(path: Path) -> set[int]:
    """Lines under `if TYPE_CHECKING:`, which never run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {line for b in blocks for line in range(b.lineno, b.end_lineno + 1)}


def test_every_file_belongs_to_a_layer() -> None:
    strangers = {str(p.relative_to(ROOT)) for p in MODULES if layer_of(p) and layer_of(p) not in LAYERS}
    assert not strangers, f"{sorted(strangers)} are in no layer: say in tests/test_architecture.py where they stand"


@pytest.mark.parametrize("path", [p for p in MODULES if layer_of(p) in LAYERS], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_upstream(path) -> None:
    here = LAYERS.index(layer_of(path))
    never_run = only_for_types(path)
    for name, line in imported(path):
        layer = name.split(".")[0] or FRONT
        assert layer in LAYERS, f"{path.name}:{line} imports {name}: import it from the module that defines it"
        where = f"{path.relative_to(ROOT)}:{line} ({LAYERS[here]}) imports {name or 'the front'}, which is downstream of it"
        assert LAYERS.index(layer) <= here or line in never_run, where


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= FILE_LINES
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(ast.parse(text)) if f.end_lineno - f.lineno + 1 > FUNCTION_LINES}
    assert not long


def test_models_and_tasks_know_nothing_of_cohorts() -> None:
    """The replica axis is a transform: no code that a user copies names it."""
    for path in [*(ROOT / "tasks").glob("*.py"), *(ROOT / "models").glob("*.py")]:
        names = {n.id for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Name)}
        assert not names & {"replica", "replicas", "cohort"}, path


def test_nothing_unpickles_and_nothing_draws_from_hidden_state() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        modules |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "random", "torch"}, path
        drawn = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n).startswith("np.random.")}
        assert drawn <= {"np.random.default_rng", "np.random.Generator"}, path


def test_every_public_name_is_there_and_documented() -> None:
    names = [name for name in dir(elegans) if not name.startswith("_")]
    assert {"Run", "Study", "grid", "train", "open"} <= set(names)
    for name in names:
        assert getattr(elegans, name).__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = elegans.no_such_name


def test_importing_the_package_does_not_wait_for_jax() -> None:
    program = "import sys, elegans; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
