"""Fingerprints of custom code: what a stored run was trained with, so that an edited class is noticed."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import symtable
import sys
import sysconfig
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elegans.files import file_digest
from elegans.specs import Spec, to_dict

NUMERICS = 6  # raised by every change of elegans that changes the numbers of an unchanged run
INSTALLED = {"site-packages", "dist-packages"}  # folders of what pip and distributions install
STANDARD = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}


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

    Comments, docstrings and layout do not count. Functions, classes and constants that the class uses do, however deep, as far as they are
    of its own module or of another file of the user's. Of a class typed into a session that keeps no source its compiled methods count.
    """
    return {cls.__qualname__: _fingerprint(cls) for cls in classes(spec) if is_custom(cls)}


def custom_files(specs: Iterable[Spec]) -> list[Path]:
    """The user's files that define custom classes of some runs, and those that these import, however deep."""
    found: set[Path] = set()
    waiting = [cls.__module__ for cls in {cls for spec in specs for cls in classes(spec)} if is_custom(cls)]
    while waiting:
        module = sys.modules.get(waiting.pop())
        path = _file(module)
        if module is not None and path is not None and path not in found:
            found.add(path)
            waiting += _imported(ast.parse(path.read_text(encoding="utf-8")), module.__package__ or "")
    return sorted(found)


@functools.cache
def _file(module: types.ModuleType | None) -> Path | None:
    """The user's file that a module is from; None for elegans, Python and what is installed."""
    name, file = getattr(module, "__name__", "elegans"), getattr(module, "__file__", None)
    if name.split(".")[0] == "elegans" or file is None or not file.endswith(".py"):
        return None
    path = Path(file).resolve()
    return None if INSTALLED & set(path.parts) or any(path.is_relative_to(home) for home in STANDARD) else path


def _imported(tree: ast.Module, package: str) -> Iterator[str]:
    """Names of modules that a file may import: of `from a import b` both a and a.b, of `import a.b` both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield from (".".join(parts[: i + 1]) for i in range(len(parts)))
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def _fingerprint(cls: type) -> str:
    texts: dict[str, str] = {}
    _collect(cls, cls.__qualname__, cls.__module__, texts)
    return hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]


def _collect(thing: Any, name: str, home: str, texts: dict[str, str]) -> None:
    """Add the normalised source of a class or function, and of what it uses, by names as they are seen from the module `home`."""
    name = name if "<" in thing.__qualname__ else _seen(thing.__qualname__, thing, home)  # a lambda has no name of its own
    if name in texts:
        return
    try:
        source = textwrap.dedent(inspect.getsource(thing))
        tree = _without_docstrings(ast.parse(source))
    except (OSError, TypeError, SyntaxError):  # none is kept, or it is a lambda amid other lines
        texts[name], used = _compiled(thing)
    else:
        texts[name] = ast.unparse(tree)
        used = _used(source, tree, vars(sys.modules.get(thing.__module__, types)))
    for label, value in used:
        _note(_seen(label, thing, home), value, thing, home, texts)


def _seen(name: str, thing: Any, home: str) -> str:
    return name if thing.__module__ == home else f"{thing.__module__}.{name}"


def _used(source: str, tree: ast.Module, namespace: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a class or function names of its module, and of modules of the user's that are imported there: `shift`, `helpers.shift`."""
    known = _global_names(symtable.symtable(source, "source", "exec")) & namespace.keys()
    yield from ((name, namespace[name]) for name in known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in known:
            owner = namespace[node.value.id]
            if isinstance(owner, types.ModuleType) and _file(owner) is not None and hasattr(owner, node.attr):
                yield f"{owner.__name__}.{node.attr}", getattr(owner, node.attr)


def _global_names(table: symtable.SymbolTable) -> set[str]:
    """Names of a module that a piece of it uses: an argument or variable of such a name is another thing."""
    own = {s.get_name() for s in table.get_symbols() if s.is_referenced() and (table.get_type() == "module" or s.is_global())}
    return own.union(*map(_global_names, table.get_children()))


def _note(name: str, value: Any, user: Any, home: str, texts: dict[str, str]) -> None:
    """Add what a class or function uses: code of the same module or of a file of the user's, constants, and containers of these."""
    value = inspect.unwrap(value) if callable(value) else value  # a function may be jitted, or cached
    if isinstance(value, functools.partial):
        value = [value.func, value.args, value.keywords]
    if isinstance(value, (type, types.FunctionType)):
        if value.__module__ == user.__module__ or _file(sys.modules.get(value.__module__)) is not None:
            _collect(value, name, home, texts)
    elif isinstance(value, (np.ndarray, jax.Array)):
        if not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) and value.dtype != object:
            texts[name] = f"{value.dtype}{value.shape} {hashlib.sha256(np.asarray(value).tobytes()).hexdigest()}"
    elif (text := _plain(value)) is not None:
        texts[name] = text
    elif isinstance(value, (list, tuple, dict)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _note(f"{name}[{_plain(key)}]", inner, user, home, texts)


def _plain(value: Any) -> str | None:
    """A constant as text that is the same in every process; None for what has none."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return repr(value)
    if isinstance(value, Spec):
        return json.dumps(to_dict(value), sort_keys=True)
    if not isinstance(value, (tuple, list, set, frozenset, dict)):
        return None
    parts = [_plain(inner) for inner in (itertools.chain(*value.items()) if isinstance(value, dict) else value)]
    if None in parts:
        return None
    ordered = sorted(map(str, parts)) if isinstance(value, (set, frozenset)) else parts
    return repr(value) if isinstance(value, (tuple, list)) else f"{type(value).__name__} {ordered}"


def _compiled(thing: Any) -> tuple[str, Iterator[tuple[str, Any]]]:
    """What tells a class or function without source from another, and what it uses: a class' own attributes, a function's code."""
    if isinstance(thing, types.FunctionType):
        codes = list(_codes(thing.__code__))
        used = ((n, thing.__globals__[n]) for code in codes for n in code.co_names if n in thing.__globals__)
        return repr([(c.co_code.hex(), c.co_names, [_plain(v) for v in c.co_consts]) for c in codes]), used
    own = {n: getattr(v, "fget", None) or getattr(v, "func", None) or getattr(v, "__func__", v) for n, v in vars(thing).items()}
    own = {n: v for n, v in own.items() if not n.startswith("__")}  # the others are made by `dataclasses`
    types_of = sorted((n, str(t)) for n, t in inspect.get_annotations(thing).items())
    return repr((types_of, [base.__qualname__ for base in thing.__bases__])), ((f"{thing.__qualname__}.{n}", v) for n, v in own.items())


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


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
