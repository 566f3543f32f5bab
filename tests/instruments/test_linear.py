"""What linear readers ask of LAPACK."""

import re

import jax
import jax.numpy as jnp
import pytest

from elegans.instruments.ablate import orthonormal
from elegans.instruments.linear import fit_logistic, fit_squares


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, y: fit_logistic(x, y, jnp.ones(8), 100.0), [(3, 5, 8, 2), (3, 5, 8)]),
        (lambda x, y: fit_squares(x, y, jnp.ones(8), 100.0), [(3, 5, 8, 2), (3, 5, 8)]),
        (orthonormal, [(3, 5, 4, 6, 2), (3, 5, 4, 2)]),
    ],
)
def test_a_cpu_factors_one_matrix_after_the_other(function, shapes):
    """Given batches, as many calls as there are threads stop a program of jaxlib 0.10 for good: so none may have more than two axes."""
    program = jax.jit(jax.vmap(jax.vmap(function))).lower(*map(jnp.ones, shapes)).compile().as_text()
    calls = [line for line in program.splitlines() if 'custom_call_target="lapack' in line]
    assert calls and not [line for line in calls if re.search(r"\[\d+,\d+,\d", line)]
