"""What a class may make of the names of its bases, asked when it is decorated: what the library calls can still be called."""

from __future__ import annotations

import functools
import inspect
from inspect import Parameter, Signature, signature

from elegans.errors import Invalid

PROPERTY = property, functools.cached_property


def check_names(cls: type) -> None:
    """Raises `Invalid` where a field hides a method of a base, or a method cannot be called as that of its base."""
    fields = inspect.get_annotations(cls)
    for name in [*fields, *(n for n in vars(cls) if n not in fields and not n.startswith("__"))]:
        home = next((base for base in cls.__mro__[1:] if name in vars(base)), None)
        if home is None:
            continue
        field, own, theirs = f"{cls.__name__}.{name}", vars(cls).get(name), vars(home)[name]
        if name in fields and (callable(theirs) or isinstance(theirs, property)):
            raise Invalid(field, "a field", f"allowed: another name; {name} is a method of its base")
        if inspect.isfunction(own) and isinstance(theirs, PROPERTY):
            raise Invalid(field, "a method", f"allowed: a property, as in {home.__name__}")
        if isinstance(own, PROPERTY) and inspect.isfunction(theirs):
            raise Invalid(field, "a property", f"allowed: a method {_words(signature(theirs))}, as in {home.__name__}")
        if inspect.isfunction(own) and inspect.isfunction(theirs) and not _takes(signature(own), signature(theirs)):
            raise Invalid(field, _words(signature(own)), f"allowed: {_words(signature(theirs))}, as in {home.__name__}")


def _takes(own: Signature, theirs: Signature) -> bool:
    """Whether the one can be called with all that the other names, in its order."""
    by_name = {p.name: None for p in theirs.parameters.values() if p.kind is Parameter.KEYWORD_ONLY}
    in_order = [p for p in theirs.parameters.values() if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    try:
        own.bind(*in_order, **by_name)
    except TypeError:
        return False
    return True


def _words(one: Signature) -> str:
    """The names alone: `(self, key, data)`."""
    return str(Signature([p.replace(annotation=Parameter.empty, default=Parameter.empty) for p in one.parameters.values()]))
