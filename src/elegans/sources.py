"""Fingerprints of custom code: what a stored run was trained with, so that an edited class is noticed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elegans.files import file_digest
from elegans.specs import Spec

NUMERICS = 5  # raised by every change of elegans that changes the numbers of an unchanged run


def within(spec: Spec) -> Iterator[Spec]:
    """A spec and every spec inside it."""
    yield spec
    for info in spec.infos.values():
        inner = getattr(spec, info.name)
        for item in inner if isinstance(inner, tuple) else (inner,):
            if isinstance(item, Spec):
                yield from within(item)


def classes(spec: Spec) -> Iterator[type]:
    """The class of a spec and of every spec inside it, with their bases."""
    return (cls for inner in within(spec) for cls in type(inner).__mro__)


def is_custom(thing: Any) -> bool:
    """Whether a class or function is the user's: in no installed package, and not elegans' own."""
    module = getattr(thing, "__module__", "builtins")
    return module.split(".")[0] not in ("builtins", "abc", "typing", "elegans")


def fingerprints(spec: Spec) -> dict[str, str]:
    """Class name to digest of its source, for every custom class that a run is made of.

    Comments, docstrings and layout do not count. Functions, classes and constants of the same module
    that the class uses do, however deep.
    """
    return {cls.__qualname__: _fingerprint(cls) for cls in classes(spec) if is_custom(cls)}


def custom_files(spec: Spec) -> list[Path]:
    """The user's files that define custom classes of a run."""
    found = {inspect.getsourcefile(cls) for cls in classes(spec) if is_custom(cls)}
    return sorted(Path(f) for f in found if f)


def _fingerprint(cls: type) -> str:
    texts: dict[str, str] = {}
    _collect(cls, vars(inspect.getmodule(cls) or types), texts)
    return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]


def _collect(thing: Any, namespace: dict[str, Any], texts: dict[str, str]) -> None:
    """Add the normalised source of a class or function, and of what it uses from its own module."""
    name = thing.__qualname__
    if name in texts:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    texts[name] = ast.unparse(_without_docstrings(tree))
    for node in ast.walk(tree):
        used = namespace.get(node.id) if isinstance(node, ast.Name) else None
        if isinstance(used, (type, types.FunctionType)) and used.__module__ == thing.__module__:
            _collect(used, namespace, texts)
        elif isinstance(used, (int, float, str, tuple, bool)):
            texts[node.id] = repr(used)  # type: ignore[attr-defined]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A stored run whose code is not today's."""

    run: str
    what: str

    def __str__(self) -> str:
        return f"run {self.run} was trained with another {self.what}: undo the change, use another --store, or retrain with --again"


def compare(run: str, stored: dict[str, Any], today: dict[str, Any]) -> Mismatch | None:
    """The first difference between stored and today's fingerprints (`numerics`, `classes` and `files`), if any."""
    what = "elegans' numerics version" if stored["numerics"] != today["numerics"] else edited(stored, today)
    return Mismatch(run, what) if what else None


def edited(stored: dict[str, Any], today: dict[str, Any]) -> str | None:
    """The first class or file, in words, whose stored fingerprint is not today's, if any."""
    for kind, name in (("classes", "class"), ("files", "file")):
        for which, digest in today.get(kind, {}).items():
            if stored.get(kind, {}).get(which) != digest:
                return f"{name} {which}"
    return None


def code_of(spec: Spec) -> dict[str, Any]:
    """What to store of the code behind a run, and of the files that it reads."""
    files = {name: _digest(name, Path(name).stat().st_mtime_ns) for inner in within(spec) for name in inner.files() if Path(name).is_file()}
    return {"numerics": NUMERICS, "classes": fingerprints(spec), **({"files": files} if files else {})}


@functools.lru_cache
def _digest(name: str, changed: int) -> str:
    del changed  # a file that was written again is read again
    return file_digest(Path(name))
