"""Editing and sweeping: copies of a spec with fields changed, and every combination of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from elegans.errors import Invalid
from elegans.specs import field_from_dict, get, kinds

T = TypeVar("T")


def replace(value: T, path: str, new: Any) -> T:
    """A copy with the field at a dotted path changed, to plain data too. The name of a kind alone keeps nothing of the spec before."""
    return replace_all(value, {path: new})


def replace_all(value: T, changes: Mapping[str, Any]) -> T:
    """A copy with several fields changed at once, so that those that bind each other can be: of a spec first itself, then fields in it."""
    base: Any = value
    whole: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {}
    for path, new in changes.items():
        name, _, rest = path.partition(".")
        get(value, name)
        if rest:
            inside.setdefault(name, {})[rest] = new
        else:
            whole[name] = field_from_dict(base.infos[name], new)
    for name, parts in inside.items():
        old, kind = whole.get(name, getattr(base, name)), base.infos[name].base
        try:
            if old is None and kind is not None:
                raise Invalid(*next(iter(parts.items())), f"{name} is off; switch it on first, as {name}={kinds(kind)[0]}")
            whole[name] = replace_all(old, parts)
        except Invalid as error:
            raise error.inside(name) from None
    return dataclasses.replace(base, **whole)


def grid(run: T, axes: Mapping[str, Any]) -> list[T]:
    """Every combination of the axes' values, the last axis fastest; + joins fields: `{"optim.lr": [...], "seed+after.seed": range(4)}`."""
    if not isinstance(axes, Mapping):
        raise Invalid("axes", axes, "allowed: a mapping of dotted fields to lists of values")
    values: dict[str, list[Any]] = {}
    for path, options in axes.items():
        if isinstance(options, Mapping) or not isinstance(options, Iterable):
            raise Invalid(path, options, "an axis is a list of values")
        values[path] = [options] if isinstance(options, str) else list(options)
        if not values[path]:
            raise Invalid(path, [], "an empty sweep makes no runs; give at least one value")
    choices = itertools.product(*values.values())
    return [replace_all(run, {path: v for paths, v in zip(values, choice, strict=True) for path in paths.split("+")}) for choice in choices]
