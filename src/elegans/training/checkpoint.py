"""States of a cohort as named arrays, and back. Weights carry TransformerLens names and a leading replica axis."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from elegans.training.run import Run
from elegans.training.step import State, params_of, shapes_of
from elegans.training.vectors import path_name
from elegans.types import AnyArray

WEIGHTS, OPTIM, DIVERGED = "weights.", "optim.", "diverged"


def _named(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    return {prefix + path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def weights_to_arrays(run: Run, vectors: AnyArray) -> dict[str, np.ndarray]:
    """Stacked parameter vectors [replica, parameter] as arrays by name; `run` is any run of the cohort, resolved."""
    return _named(params_of(run, np.asarray(vectors)), WEIGHTS)


def state_to_arrays(run: Run, states: State) -> dict[str, np.ndarray]:
    """A stacked state as arrays by name. The optimiser's vectors are in the order of the weights' names in the tree."""
    return weights_to_arrays(run, states.params) | _named(states.opt, OPTIM) | {DIVERGED: np.asarray(states.diverged)}


def arrays_to_vectors(run: Run, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Stacked parameter vectors [replica, parameter] of named arrays."""
    paths = [path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(shapes_of(run))[0]]
    parts = [arrays[WEIGHTS + name] for name in paths]
    return np.concatenate([a.reshape(len(a), -1) for a in parts], 1)


def arrays_to_state(run: Run, arrays: dict[str, np.ndarray], like: State) -> State:
    """The stacked state of named arrays; `like` has the optimiser's tree (arrays or shapes)."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(like.opt)
    opt = jax.tree.unflatten(treedef, [arrays[OPTIM + path_name(path)] for path, _ in paths])
    return State(arrays_to_vectors(run, arrays), opt, arrays[DIVERGED])
