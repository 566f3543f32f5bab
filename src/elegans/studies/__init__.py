"""Studies that ship: one file per question, named after it. `elegans run NAME` runs one."""

from __future__ import annotations

import pkgutil


def names() -> list[str]:
    """Names of the studies that ship."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))
