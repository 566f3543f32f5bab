"""Studies that ship: one file per question, named after it. `elegans run NAME` runs one."""

from __future__ import annotations

import importlib
import pkgutil


def names() -> list[str]:
    """Names of the studies that ship."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def docs() -> dict[str, str]:
    """First line of each study's docstring, by name."""
    return {name: (importlib.import_module(f"{__name__}.{name}").__doc__ or "").strip().splitlines()[0] for name in names()}
