"""From what a user names to a study: a Python file, a YAML file, or a study that ships."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from elegans import specs, studies
from elegans.errors import Invalid, StoreError
from elegans.files import read_json
from elegans.store import Store
from elegans.study import Study
from elegans.sweeps import grid
from elegans.training.device import keep_programs, use_cores
from elegans.training.run import LENGTHS, Run

RANGE_LIMIT = 1_000_000  # values of one a..b


def load_study(name: str, small: bool = False) -> Study:
    """The study of a `.py` file that defines `study`, a `.yaml` file, or a name that ships; NAME.PART for a part of one. Raises `Invalid`.

    `small` asks for what the file defines as `small`, a version of the study for two CPU cores.
    """
    keep_programs()  # a task's rows may be counted, by a program, to know how long a run is: that starts JAX
    use_cores()
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if small:
            raise Invalid("small", name, "a YAML file has no small version; leave out --small")
        return from_yaml(path)
    if path.suffix == ".py":
        return _checked(load_module(path), str(path), path.stem, small)
    stem, _, part = name.partition(".")
    if stem not in studies.names():
        raise Invalid("study", name, f"allowed: a .py or .yaml file, or one of {', '.join(studies.names())}")
    module = importlib.import_module(f"elegans.studies.{stem}")
    return _part(module, name, part, small) if part else _checked(module, name, name, small)


def _part(module: Any, name: str, part: str, small: bool) -> Study:
    """A part of a study that ships: its module's `PARTS` maps names to functions that make it, whole or small."""
    parts: Mapping[str, Callable[[bool], Study]] = getattr(module, "PARTS", {})
    if part not in parts:
        raise Invalid("study", name, f"allowed: {', '.join(parts) or 'the study alone, which has no parts'}")
    return parts[part](small)


def study_of(store: Store, name: str | None = None) -> Study:
    """The study that a store says it is from, or the one that is named, as for `load_study`; NAME_small is its small version.

    One of a user's own without figures of its own is no more than a name here, since nothing in a store says where its file is.
    Raises `Invalid`, or `StoreError` where the store's has figures and does not ship.
    """
    noted = store.path / "study.json"
    if name is None and not noted.exists():
        raise StoreError(f"{store.path}: no study ended here; say which to draw with --study")
    found = {"name": name} if name is not None else read_json(noted, "name")
    said = str(found["name"])
    if name is None and said.removesuffix("_small").partition(".")[0] not in studies.names():
        if found.get("own_figures", True):  # stores of before do not say
            raise StoreError(f"{store.path}: its study {said!r} is none that ships; give its file with --study")
        return Study([], name=said)
    return load_study(said.removesuffix("_small"), said.endswith("_small"))


def load_module(path: Path) -> Any:
    """Import a user's file under its own name, so that its components can be named. Raises `Invalid`."""
    if not path.is_file() or path.suffix != ".py":
        raise Invalid("file", str(path), "allowed: a Python file (.py) that exists")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path.resolve()):
        return loaded
    if loaded is not None or path.stem in sys.stdlib_module_names:
        raise Invalid("file", str(path), f"a module named {path.stem} exists already: rename the file")
    module_spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.resolve().parent))  # a study may import its neighbours
    try:
        module_spec.loader.exec_module(module)
    except (Invalid, StoreError):
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[path.stem]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path.resolve())]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise Invalid("file", str(path), f"{type(error).__name__}{f' in line {line}' * (line is not None)}: {error}") from error
    return module


def _checked(module: Any, name: str, stem: str, small: bool) -> Study:
    found = getattr(module, "small" if small else "study", None)
    if small and found is None:
        raise Invalid("small", name, "the file defines no `small`; leave out --small")
    name_of_file = f"{stem}_small" if small else stem
    if isinstance(found, Study):
        return dataclasses.replace(found, name=name_of_file) if found.name == Study.name else found
    if isinstance(found, Sequence) and all(isinstance(run, Run) for run in found):
        return Study(list(found), name=name_of_file)
    raise Invalid("study", name, "the file must define `study`: an elegans.Study or a list of elegans.Run")


# ---- YAML


def from_yaml(path: Path) -> Study:
    """A study from YAML: `run` is one run, `sweep` maps dotted fields to lists, `instruments` lists instruments.

    YAML 1.2: 1e-3 is a number, duplicate keys are errors. Raises `Invalid`.
    """
    data = read_yaml(path)
    allowed = ("run", "sweep", "instruments", "question")
    if not isinstance(data, Mapping) or "run" not in data:
        raise Invalid("run", None, f"{path} must map `run` to a run; allowed keys: {', '.join(allowed)}")
    for key in data:
        if key not in allowed:
            raise Invalid(str(key), data[key], f"unknown key; allowed: {', '.join(allowed)}")
    sweep = data.get("sweep") or {}
    if not isinstance(sweep, Mapping) or not all(isinstance(field, str) for field in sweep):
        raise Invalid("sweep", sweep, "allowed: dotted fields, each with a list of values")
    for field, values in sweep.items():
        if not isinstance(values, list):
            raise Invalid(f"sweep.{field}", values, "allowed: a list of values")
    runs = sweep_runs(data["run"], sweep)
    return Study(runs, _instruments(data.get("instruments") or []), path.stem, data.get("question") or "")


def sweep_runs(run: Any, sweep: Mapping[str, Sequence[Any]]) -> list[Run]:
    """Runs of plain data and axes. A field may be given by the axes alone, such as `steps` swept and not set."""
    if not isinstance(run, Mapping):
        raise Invalid("run", run, f"allowed: a mapping with {', '.join(Run.infos)}")
    swept = [n for n in LENGTHS if sweep.get(n)]
    start = dict(run) if any(n in run for n in LENGTHS) or not swept else {**run, swept[0]: sweep[swept[0]][0]}
    return grid(specs.from_dict(Run, start), sweep)


def read_yaml(path: Path) -> Any:
    """Plain data of a YAML 1.2 file. Raises `Invalid` for what YAML refuses, duplicate keys included."""
    if not path.is_file():
        raise Invalid("file", str(path), "allowed: a YAML file that exists")
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except DuplicateKeyError as error:
        raise Invalid("file", str(path), str(error.problem) + f" (line {error.problem_mark.line + 1})") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise Invalid("file", str(path), f"no YAML: {' '.join(str(error).split())[:200]}") from None


def _instruments(data: Any) -> tuple[Any, ...]:
    from elegans.instruments import Instrument

    if not isinstance(data, list):
        raise Invalid("instruments", data, "allowed: a list of instruments")
    return tuple(specs.from_dict(Instrument, item, f"instruments[{i}]") for i, item in enumerate(data))


# ---- dotted overrides


def parse_overrides(words: Sequence[str]) -> dict[str, list[Any]]:
    """`optim.lr=1e-3,3e-4` and `seed=0..4` (both ends included) as axes. Raises `Invalid`."""
    axes: dict[str, list[Any]] = {}
    for word in words:
        name, sign, text = word.partition("=")
        if not sign or not name:
            raise Invalid("override", word, "allowed: field=value, field=value,value or field=first..last")
        if name in axes:
            raise Invalid(name, text, "given twice")
        axes[name] = [value for part in _split(text) for value in _values(name, part)]
        if text == "":
            raise Invalid(name, text, "an empty sweep makes no runs; give at least one value")
    return axes


def _split(text: str) -> list[str]:
    """Parts between commas that stand outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _values(name: str, text: str) -> list[Any]:
    if ends := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text):  # anything else may be a path
        first, last = map(int, ends.groups())
        if not 0 <= last - first < RANGE_LIMIT:
            raise Invalid(name, text, f"allowed: first..last, ascending, of at most {RANGE_LIMIT:,} numbers")
        return list(range(first, last + 1))
    try:
        return [YAML(typ="safe", pure=True).load(text)]
    except YAMLError:
        raise Invalid(name, text, "no value that YAML reads") from None


def parse_share(text: str) -> tuple[int, int]:
    """`2/4` as (2, 4). Raises `Invalid`."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal()):
        raise Invalid("share", text, "allowed: I/N with I from 1 to N, such as 2/4")
    return int(part), int(parts)
