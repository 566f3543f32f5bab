"""What several tests need."""

import jax
import jax.numpy as jnp

from elegans import Run
from elegans.training.cohort import stack


def as_arrays(run: Run) -> Run:
    """The run as a compiled program gets it: every leaf an array on the device."""
    return jax.tree.map(lambda column: jnp.asarray(column[0]), stack([run]))
