"""elegans: a laboratory for the smallest language models. The public API, flat; imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "elegans.errors": ("Invalid", "StoreError"),
    "elegans.models": (
        "MLP", "Attention", "Component", "Context", "LayerNorm", "Learned", "Model", "Norm", "Positions", "RMSNorm", "Rotary", "SwiGLU", "Transformer",
    ),
    "elegans.spec": ("Spec", "field", "fields", "grid", "identity", "note", "replace", "spec", "structure", "varies"),
    "elegans.tasks": ("Addition", "Parity", "Split", "Task"),
    "elegans.training": (
        "AdamW", "At", "Constant", "Cosine", "Every", "Linear", "LogSpaced", "Optimizer", "Record", "Run", "Schedule", "State", "Update", "WSD", "When",
    ),
    "elegans.types": ("Example", "Trace", "Truth"),
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__version__ = "0.1.0"
__all__ = sorted(_WHERE)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `elegans --help` never waits for JAX."""
    if name not in _WHERE:
        raise AttributeError(f"elegans has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
