"""elegans: a laboratory for the smallest language models. The public API, flat; imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "driver": "train",
    "errors": "Invalid StoreError",
    "figures": "drawing",
    "instruments": "Ablate AcrossCompute AttentionMaps Circuit Dynamics Evaluate Instrument Layout Patch Probe ReplicaInstrument Scaling "
    "StoreInstrument Transition graft measure ov qk step_table",
    "models": "ALiBi Attention Component Context FeedForward FixedAttention GivenAttention LayerNorm Learned MLP Mixer Model Norm "
    "Positions RMSNorm Rotary Sinusoidal Sizes SwiGLU Transformer",
    "network": "Network load",
    "specs": "Spec field identity note spec structure varies",
    "store": "Store",
    "study": "Study draw_study run_study",
    "sweeps": "grid replace",
    "tasks": "ActivitySelection Addition BinaryCopy BitParity BreadthFirstSearch Curriculum DepthFirstSearch GraphTask InnerProduct "
    "IterativeTask LongestCommonSubsequence Majority MajorityOfMajority MaximumSubarray MinimumSpanningTree Mixture "
    "Multiplication Parity Polynomial Several ShortestPath Sorting Split Task TopologicalSort check_task",
    "training": "AdamW At Constant Cosine Every Linear Lion LogSpaced Never Optimizer Record Run SGD Schedule State Update WSD When follow",
    "types": "Example Trace Truth",
}
_WHERE = {name: f"elegans.{module}" for module, names in _HOME.items() for name in names.split()}
_WHERE["open"] = "elegans.network"
_RENAMED = {"open": "open_store"}  # a module should not shadow the builtin that it may need
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use, so that `elegans --help` never waits for JAX."""
    if name not in _WHERE:
        raise AttributeError(f"elegans has no {name!r}; it has {', '.join(sorted(_WHERE))}")
    return getattr(importlib.import_module(_WHERE[name]), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted(_WHERE)
