"""What several tests need."""

from typing import Any

import jax
import jax.numpy as jnp

from elegans import Run, Spec
from elegans.training.cohort import stack
from elegans.training.step import draw_batch, take
from elegans.training.vectors import path_name


def as_arrays(run: Run) -> Run:
    """The run as a compiled program gets it: every leaf an array on the device."""
    return jax.tree.map(lambda column: jnp.asarray(column[0]), stack([run]))


def leaves(value: Spec) -> dict[str, Any]:
    """Dotted path to value of every leaf, in tree order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(value)}


def advance(run: Run, state: Any, step: Any, data: Any) -> Any:
    """A step of training on the batch of that step."""
    return take(run, state, step, draw_batch(run, step, data))
