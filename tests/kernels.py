"""What tests of GPU kernels need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from elegans.models import fused

BF16 = 2.0**-8  # relative step of bfloat16


def close(got, want, steps=2):
    """Whether all arrays are their oracle's, up to some steps of bfloat16 of its length."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) < steps * BF16 * np.linalg.norm(b)


def steps_of(jaxpr):
    """Every step of a program, those inside others too, but for what kernels do inside."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params) if eqn.primitive.name != "pallas_call" else ():
            yield from steps_of(inner)


def kernels_in(jaxpr):
    """The shapes that every call of a kernel in a program returns, without the replicas' axis."""
    return [[v.aval.shape for v in eqn.outvars] for eqn in steps_of(jaxpr) if eqn.primitive.name == "pallas_call"]


def kernels_lowered(program, *args):
    """How many kernels a program calls on a GPU; every operation in them is one that Triton knows. Needs none."""
    try:
        text = program.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:  # later versions of JAX compile kernels as they lower them, with CUDA's plugin
        pytest.skip(str(error))
    return text.count("stablehlo.custom_call @__gpu$xla.gpu.triton")


def with_and_without(model, params, monkeypatch):
    """A row's logits and trace through kernels, which a fixture serves, and by the formula."""
    tokens = jnp.arange(9) % 5
    served = jax.jit(lambda p, t: model.apply(p, t))(params, tokens)
    monkeypatch.setattr(fused, "serves", lambda dtype, edit: False)
    return served, jax.jit(lambda p, t: model.apply(p, t))(params, tokens)
