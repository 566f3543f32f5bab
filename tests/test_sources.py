"""What a stored run was made with, and that a change is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import elegans as el
from elegans.loading import load_module
from elegans.sources import code_of, compare, custom_files
from elegans.store import Store
from elegans.tasks import BreadthFirstSearch
from elegans.training.planner import plan

FOUR = Path(__file__).parent / "data" / "four.g6"


def test_a_file_that_a_task_reads_is_part_of_a_run(tmp_path):
    path = tmp_path / "graphs.g6"
    path.write_bytes(FOUR.read_bytes())
    run = el.Run(task=BreadthFirstSearch(vertices=4, graphs=str(path)), model=el.Transformer(layers=1, d_model=8, heads=2), steps=1)
    before = code_of(run)
    assert compare(run.id, before, code_of(run)) is None
    path.write_bytes(FOUR.read_bytes().splitlines(keepends=True)[0])
    found = compare(run.id, before, code_of(run))
    assert found is not None and f"file {path}" in str(found) and run.id in str(found)


def test_runs_that_read_no_file_name_none():
    run = el.Run(task=el.Addition(length=4), model=el.Transformer(layers=1, d_model=8, heads=2), steps=1)
    assert set(code_of(run)) == {"numerics", "classes"}


# ---- what counts as the code of a class

MINE = """
import functools
import jax
import elegans as el
import tools
from tools import deeper, TABLE

size = 3
steps = 100
PAIR = (
    deeper,
    lambda x: x,
    lambda x: x + 0,
)

def near(x):
    return x * size

@el.spec
class Mine(el.Update):
    '''Words do not count.'''
    def logits(self, run, params, batch, key, steps=0):
        made = super().logits(run, params, batch, key)
        return near(tools.shift(PAIR[0](made))) + sum(TABLE["a"]) + tools.faster(steps)

run = el.Run(el.Addition(length=3), el.Transformer(layers=1, d_model=8, heads=2), batch=2, steps=steps, update=Mine())
"""
TOOLS = """
import jax
import numpy as np
from pack import inner

TABLE = {"a": [1, 2], "b": {"x", "y", "z"}}
NUMBERS = np.arange(3)
unused = 1

def shift(x):
    return x + 1

def deeper(x):
    return inner.deepest(x) * NUMBERS[0]

@jax.jit
def faster(x):
    return x
"""
INNER = "def deepest(x):\n    return -x\n"


def loaded(folder, monkeypatch, mine=MINE, tools=TOOLS, inner=INNER):
    """The run of a file that imports a neighbour, which imports from a package."""
    for name, text in {"mine.py": mine, "tools.py": tools, "pack/__init__.py": "", "pack/inner.py": inner}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    for name in ("mine", "tools", "pack", "pack.inner"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return load_module(folder / "mine.py").run


@pytest.mark.parametrize(
    ("name", "old", "new", "counts"),
    [
        ("mine", "x * size", "x * size * 1", True),
        ("mine", "size = 3", "size = 4", True),
        ("mine", "lambda x: x,", "lambda x: -x,", True),
        ("mine", "lambda x: x + 0", "lambda x: x + 1", True),
        ("mine", "Words do not", "Comments do not", False),
        ("mine", "steps = 100", "steps = 99", False),  # it has an argument of that name
        ("tools", "x + 1", "x + 2", True),
        ("tools", "return x\n", "return x * 2\n", True),
        ("tools", "[1, 2]", "[1, 3]", True),
        ("tools", "arange(3)", "arange(3) + 1", True),
        ("tools", "unused = 1", "unused = 2", False),
        ("inner", "-x", "-2 * x", True),
    ],
)
def test_an_edit_counts_where_the_class_can_see_it(tmp_path, monkeypatch, name, old, new, counts):
    texts = {"mine": MINE, "tools": TOOLS, "inner": INNER}
    assert old in texts[name]
    before = code_of(loaded(tmp_path / "before", monkeypatch))
    run = loaded(tmp_path / "after", monkeypatch, **texts | {name: texts[name].replace(old, new)})
    found = compare(run.id, before, code_of(run))
    assert (found is not None) == counts and (not counts or "class Mine" in str(found))


def test_files_that_a_file_imports_are_kept_beside_it(tmp_path, monkeypatch):
    run = loaded(tmp_path / "there", monkeypatch)
    assert [str(f.relative_to(tmp_path / "there")) for f in custom_files([run])] == [
        "mine.py",
        "pack/__init__.py",
        "pack/inner.py",
        "tools.py",
    ]
    assert custom_files([el.Run(el.Addition(length=3), el.Transformer(layers=1, d_model=8, heads=2), steps=1)]) == []
    store = Store.create(tmp_path / "store")
    folder = store.add(plan([run], 2**30)[0], {}).path / "source"
    assert {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*.py")} == {
        "mine.py": MINE, "tools.py": TOOLS, "pack/__init__.py": "", "pack/inner.py": INNER,
    }  # fmt: skip


TYPED = """
import elegans as el
from elegans.sources import code_of
STEP = {step}
HOOKS = (print, {{"twice": lambda x: 2 * x}})
@el.spec
class Typed(el.AdamW):
    more: float = el.varies({default})
    @property
    def doubled(self): return HOOKS[1]["twice"](self.lr)
    def update(self, grads, state, params, step, steps):
        return helper(super().update(grads, state, params, step, steps))
def helper(x):
    return x, STEP, {{"a", "b", "c"}}
print(code_of(el.Run(el.Addition(length=3), el.Transformer(layers=1, d_model=8, heads=2), steps=1, optim=Typed()))["classes"]["Typed"])
"""


def test_a_class_typed_into_a_session_has_a_fingerprint_too():
    """Python keeps no source of it; another process, with another order of sets and other addresses, says the same."""

    texts = [TYPED.format(**{"step": 1, "default": 0.5} | change) for change in ({}, {"step": 2}, {"default": 0.6})]
    script = f"for text in {texts!r}:\n    exec(text, {{'__name__': '__main__'}})\n"

    def typed(seed: str) -> list[str]:
        environment = os.environ | {"PYTHONHASHSEED": seed}
        said = subprocess.run([sys.executable, "-"], input=script, text=True, capture_output=True, check=True, env=environment).stdout
        return said.split()

    first = typed("0")
    assert typed("1") == first and len(set(first)) == 3 and {len(digest) for digest in first} == {16}
