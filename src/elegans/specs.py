"""Specs: frozen dataclasses that are pytrees, and the identity of a run.

A spec says what an experiment is. Its float fields, and those marked `varies()`, are *leaves*:
numbers that may differ between the runs of one compiled program. Every other field is *structure*.
`None` means off, and off is structure too: it flattens to a tree without that leaf.

    @el.spec
    class Scaled(el.Attention):
        gain: float = 1.0          # a leaf: sweeping it needs no recompilation
        window: int = 8            # structure: every value is a program of its own

Nested specs are subtrees. Two runs whose trees have the same structure form a cohort.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, dataclass_transform

import jax
import numpy as np

from elegans.classes import check_names
from elegans.errors import Invalid

T = TypeVar("T")
INT_LIMIT = 2**31  # leaves travel to the device as int32
FLOAT_LIMITS = (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max))  # or as float32
_KINDS: dict[str, list[type[Spec]]] = {}


# ---- declaring fields


def field(
    default: Any = dataclasses.MISSING,
    doc: str = "",
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    role: Literal["auto", "leaf", "structure", "note"] = "auto",
) -> Any:
    """A spec's field with a one-line description and bounds. Floats are leaves unless `role` says otherwise."""
    bounds = {k: v for k, v in {"gt": gt, "ge": ge, "lt": lt, "le": le}.items() if v is not None}
    return dataclasses.field(default=default, metadata={"doc": doc, "bounds": bounds, "role": role})


def varies(default: Any = dataclasses.MISSING, doc: str = "", **bounds: float) -> Any:
    """A field that may differ inside a cohort although it is no float: `seed`, `steps`."""
    return field(default, doc, role="leaf", **bounds)


def structure(default: Any = dataclasses.MISSING, doc: str = "", **bounds: float) -> Any:
    """A float that shapes the program (an MLP ratio, a split's share) and so separates cohorts."""
    return field(default, doc, role="structure", **bounds)


def note(default: Any = None, doc: str = "") -> Any:
    """A field that means nothing to what is computed, given by its name only: it is neither structure nor part of an identity."""
    return dataclasses.field(default=default, metadata={"doc": doc, "bounds": {}, "role": "note"}, kw_only=True)


# ---- the decorator


@dataclasses.dataclass(frozen=True, eq=False)
class FieldInfo:
    """What elegans knows of one field of a spec."""

    name: str
    types: tuple[Any, ...]  # alternatives of the annotation, without None
    optional: bool
    role: str  # leaf | spec | structure | note
    bounds: Mapping[str, float]
    doc: str
    default: Any

    @property
    def base(self) -> type[Spec] | None:
        """The spec class that this field holds (directly or in a tuple), if it holds one."""
        inner = [typing.get_args(t)[0] if typing.get_origin(t) is tuple else t for t in self.types]
        return next((t for t in inner if isinstance(t, type) and issubclass(t, Spec)), None)

    @functools.cached_property
    def specs(self) -> tuple[type[Spec], ...]:
        """The spec classes of which it may be one."""
        return tuple(t for t in self.types if isinstance(t, type) and issubclass(t, Spec))

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        words = " or ".join(_type_words(t) for t in self.types) + (" or none" if self.optional else "")
        signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
        return "allowed: " + " and ".join([words, *(f"{signs[k]} {v:g}" for k, v in self.bounds.items())])


def _type_words(t: Any) -> str:
    if typing.get_origin(t) is Literal:
        return " | ".join(map(str, typing.get_args(t)))
    if typing.get_origin(t) is tuple:
        return f"a list of {_type_words(typing.get_args(t)[0])}"
    if isinstance(t, type) and issubclass(t, Spec):
        return f"a {t.__name__} ({', '.join(kinds(t))})"
    return {int: "a whole number", float: "a finite number", str: "a word", bool: "true or false"}.get(t, str(t))


def _storable(t: Any) -> bool:
    """Whether JSON can say a type's values: numbers, words, choices of them, specs, and tuples of these."""
    if typing.get_origin(t) is tuple:
        return typing.get_args(t)[1:] == (...,) and _storable(typing.get_args(t)[0])
    return typing.get_origin(t) is Literal or (isinstance(t, type) and issubclass(t, (int, float, str, Spec)))


def _info(cls: type) -> dict[str, FieldInfo]:
    hints = typing.get_type_hints(cls, localns={cls.__name__: cls})  # a run may hold another
    infos = {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        union = typing.get_origin(hint) in (Union, types.UnionType)
        options = typing.get_args(hint) if union else (hint,)
        kept = tuple(t for t in options if t is not type(None))
        if not all(map(_storable, kept)):
            allowed = "allowed: int, float, bool, str, Literal, a spec, tuple[..., ...] of one of these, or any of them | None"
            raise Invalid(f"{cls.__name__}.{f.name}", getattr(hint, "__name__", str(hint)), allowed)
        asked = f.metadata.get("role", "auto")
        info = FieldInfo(f.name, kept, len(kept) < len(options), asked, f.metadata.get("bounds", {}), f.metadata.get("doc", ""), f.default)
        if asked == "auto":
            role = "leaf" if any(t in (float, tuple[float, ...]) for t in kept) else "spec" if info.base else "structure"
            info = dataclasses.replace(info, role=role)
        infos[f.name] = info
    return infos


class Spec:
    """Base of every spec. Subclass it with `@spec`; override `check` to refuse contradictions, `files` to name what it reads."""

    kind: typing.ClassVar[str]
    infos: typing.ClassVar[dict[str, FieldInfo]]
    _plain: typing.ClassVar[bool] = False  # of an instance: whether all of it was checked; not of one that a tree is put together to

    def __new__(cls, *_: Any, **given: Any) -> Any:
        if "infos" not in cls.__dict__:
            raise Invalid(cls.__name__, "undecorated class", "write @el.spec above every subclass of a spec")
        _check_names(cls, given)  # before Python's own words, which name neither the kind nor what is allowed
        return super().__new__(cls)

    def __post_init__(self) -> None:
        plain = True
        for info in self.infos.values():
            value = _coerce(info, getattr(self, info.name))
            object.__setattr__(self, info.name, value)
            plain = plain and all(map(_is_plain, value if type(value) is tuple else (value,)))
        object.__setattr__(self, "_plain", plain)
        if plain:
            self.check()

    def check(self) -> None:
        """Raise `Invalid` where fields contradict each other. Sees plain Python values only."""

    def files(self) -> tuple[str, ...]:
        return ()


@dataclass_transform(frozen_default=True, field_specifiers=(field, varies, structure, note))
def spec(cls: type[T]) -> type[T]:
    """Make a class a spec: a frozen dataclass, a pytree, and a `kind` that YAML and stores can name."""
    check_names(cls)
    frozen: Any = dataclasses.dataclass(frozen=True, repr=False)(cls)
    frozen.infos = _info(frozen)
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()
    frozen.kind = cls.__dict__.get("kind", snake)
    frozen.__repr__ = lambda self: f"{type(self).__name__}({', '.join(_changed(self))})"
    inner = [i.name for i in frozen.infos.values() if i.role in ("leaf", "spec")]
    outer = [i.name for i in frozen.infos.values() if i.role == "structure"]
    notes = [(i.name, None) for i in frozen.infos.values() if i.role == "note"]

    def flatten(self: Any) -> tuple[tuple, tuple]:
        return tuple((jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in inner), tuple(getattr(self, n) for n in outer)

    def unflatten(aux: tuple, children: Iterable) -> Any:
        self = object.__new__(frozen)  # no validation: leaves may be tracers or placeholders here
        for n, v in itertools.chain(zip(outer, aux, strict=True), zip(inner, children, strict=True), notes):
            object.__setattr__(self, n, v)
        return self

    jax.tree_util.register_pytree_with_keys(frozen, flatten, unflatten)
    _KINDS.setdefault(frozen.kind, []).append(frozen)
    return frozen


def _changed(self: Any) -> Iterable[str]:
    return (f"{i.name}={getattr(self, i.name)!r}" for i in self.infos.values() if getattr(self, i.name) is not i.default)


# ---- checking values


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_plain(value: Any) -> bool:
    if isinstance(value, Spec):
        return value._plain or not any(map(_is_array, jax.tree.leaves(value)))  # of one from a tree nobody knows it yet
    return not _is_array(value)


def _coerce(info: FieldInfo, value: Any) -> Any:
    if value is None and info.optional:
        return None
    if isinstance(value, info.specs):
        return value
    if type(value) in (int, float, str) and value:  # a grid gives the same ones ten thousand times; -0.0 is another 0.0
        return _known(info, value)
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and not value.shape):  # a sweep over numpy's numbers
        value = value.item()
    inside = value if isinstance(value, tuple) else (value,)
    if any(_is_array(v) or type(v) is object for v in inside):  # inside a transformation: nothing to check
        return value
    return _allowed(info, value)


def _allowed(info: FieldInfo, value: Any) -> Any:
    for t in info.types:
        accepted = _accept(t, value)
        if accepted is not None:
            _check_bounds(info, accepted)
            return accepted
    raise Invalid(info.name, value, info.allowed)


_known = functools.lru_cache(4096, typed=True)(_allowed)


def _accept(t: Any, value: Any) -> Any:
    """`value` as type `t`, or None where it is not one."""
    if typing.get_origin(t) is Literal:
        return value if value in typing.get_args(t) else None
    if typing.get_origin(t) is tuple:
        if not isinstance(value, (list, tuple, range)):
            return None
        items = tuple(_accept(typing.get_args(t)[0], v) for v in value)
        return None if any(v is None for v in items) else items
    if isinstance(value, bool) or t is bool:
        return value if isinstance(value, bool) and t is bool else None
    if t is float:
        number = float(value) if isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023) else math.nan
        return number if math.isfinite(number) else None
    return value if isinstance(value, t) else None


def _check_bounds(info: FieldInfo, value: Any) -> None:
    if isinstance(value, (Spec, str)):
        return
    bounds = dict(info.bounds)
    if info.role == "leaf" and isinstance(value, int):
        bounds.setdefault("lt", INT_LIMIT)
    for v in value if isinstance(value, tuple) else (value,):
        if info.role == "leaf" and isinstance(v, float) and v and not FLOAT_LIMITS[0] <= abs(v) <= FLOAT_LIMITS[1]:
            raise Invalid(info.name, value, f"{info.allowed}, of the size that float32 holds")
        if isinstance(v, (int, float)) and not all(getattr(operator, k)(v, b) for k, b in bounds.items()):
            raise Invalid(info.name, value, dataclasses.replace(info, bounds=bounds).allowed)


# ---- kinds: how YAML, the command line and stores name classes


def kinds(base: type[Spec]) -> list[str]:
    """Names of the concrete specs that can stand where a `base` is expected."""
    return sorted(k for k, classes in _KINDS.items() if any(issubclass(c, base) and not is_abstract(c) for c in classes))


def is_abstract(cls: type[Spec]) -> bool:
    """Whether a class only declares an interface (`abstract = True` in its own body)."""
    return bool(cls.__dict__.get("abstract", False))


def find_kind(base: type[Spec], kind: Any) -> type[Spec]:
    """The class that `kind` names among those that can stand for `base`; the newest definition of a file wins."""
    found = [c for c in (_KINDS.get(kind, []) if isinstance(kind, str) else []) if issubclass(c, base) and not is_abstract(c)]
    homes = {(c.__module__, c.__qualname__) for c in found}
    if not found:
        raise Invalid("kind", kind, f"allowed: {', '.join(kinds(base))} (custom ones: name their file with --with)")
    if len(homes) > 1:
        where = " and ".join(sorted(f"{m}.{q}" for m, q in homes))
        raise Invalid("kind", kind, f"the name is taken twice, by {where}: rename one class")
    return found[-1]


# ---- specs as plain data, and identity


def to_dict(value: Any) -> Any:
    """Plain JSON data of a spec. Options that are off as they are by default are left out, so new ones keep old ids."""
    if not isinstance(value, Spec):
        return [to_dict(v) for v in value] if isinstance(value, tuple) else value
    data: dict[str, Any] = {"kind": value.kind}
    for info in value.infos.values():
        inner = getattr(value, info.name)
        if info.role != "note" and not (inner is None and info.default is None):
            data[info.name] = to_dict(inner)
    return data


def flat(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted columns of a spec's plain data; a nested spec's own column holds its kind."""
    columns: dict[str, Any] = {}
    for name, value in spec.items():
        if isinstance(value, dict):
            columns[prefix + name] = value["kind"]
            columns |= flat(value, f"{prefix}{name}.")
        elif name != "kind":
            columns[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return columns


def from_dict(base: type[T], data: Any, path: str = "") -> T:
    """A spec from a mapping with an optional `kind`, or just the name of a kind. Raises `Invalid` with the dotted path of what offends."""
    try:
        return _from_dict(base, data)
    except Invalid as error:
        raise (error.inside(path) if path else error) from None


def _from_dict(base: Any, data: Any) -> Any:
    if isinstance(data, base):
        return data
    data = {"kind": data} if isinstance(data, str) else data
    if not isinstance(data, Mapping):
        raise Invalid("", data, f"allowed: a {base.__name__}, as a mapping or one of {', '.join(kinds(base))}")
    rest = {k: v for k, v in data.items() if k != "kind"}
    cls = find_kind(base, data["kind"]) if "kind" in data else base
    if is_abstract(cls):
        raise Invalid("kind", None, f"allowed: {', '.join(kinds(base))}")
    _check_names(cls, rest)
    missing = [i.name for i in cls.infos.values() if i.default is dataclasses.MISSING and i.name not in rest]
    if missing:
        raise Invalid(missing[0], None, f"{cls.kind} needs it; {cls.infos[missing[0]].allowed}")
    return cls(**{k: field_from_dict(cls.infos[k], v) for k, v in rest.items()})


def _check_names(cls: Any, given: Mapping[str, Any]) -> None:
    """Raises `Invalid` for a field that a class does not have."""
    for name in given:
        if name not in cls.infos:
            raise Invalid(str(name), given[name], f"unknown field of {cls.kind}; allowed: {', '.join(cls.infos)}")


def field_from_dict(info: FieldInfo, value: Any) -> Any:
    """What plain data says of a field, where it says a spec; else the value as it is."""
    if info.optional and value == "none":  # as tables and messages say it
        return None
    if info.base is None or value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(from_dict(info.base, v, f"{info.name}[{i}]") for i, v in enumerate(value))
    return from_dict(info.base, value, info.name)


def identity(value: Spec) -> str:
    """Twelve hexadecimal digits that name a spec: the same in every process, on every machine and Python."""
    text = json.dumps(to_dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# ---- fields by their paths


def get(value: Any, path: str) -> Any:
    """The value at a dotted path. Raises `Invalid` with the fields there are."""
    for name in path.split("."):
        if not isinstance(value, Spec) or name not in value.infos:
            names = ", ".join(value.infos) if isinstance(value, Spec) else "none: it is off or no spec"
            raise Invalid(path, name, f"unknown field; fields here: {names}")
        value = getattr(value, name)
    return value
