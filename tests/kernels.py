"""What tests of GPU kernels need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import elegans as el
from elegans import Attention, LayerNorm
from elegans.models import fused
from elegans.models.base import Context, Sizes
from elegans.models.fused_tokens import Formula

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


# ---- x + attention(norm(x)); a case is a norm, a scale, positions, heads, d_model, d_head, whether there are biases, and a length


def made(case, *lead):
    """Random weights of a block, stacked over `lead`; none is zero or one."""
    norm, _, _, heads, d, e, bias, _ = case
    sizes = Sizes(2, 2, d, heads, e, bias, None)
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda key: (norm.init(key, sizes), Attention().init(key, sizes)), jax.random.key(0)))
    keys = jax.random.split(jax.random.key(d), len(leaves))
    return jax.tree.unflatten(treedef, [jax.random.normal(k, (*lead, *a.shape)) * 0.3 + 0.1 for k, a in zip(keys, leaves, strict=True)])


def drawn(*shape):
    return jax.random.normal(jax.random.key(9), shape, jnp.bfloat16)


def plain(case, weights, x):
    """The components' own formula, in float32."""
    norm, scale, positions, *_ = case
    x, context = x.astype(jnp.float32), Context(jnp.arange(2), lambda name, y: y, positions)
    return x + Attention(scale=scale).apply(weights[1], norm.apply(weights[0], x, context), context)


def by(kernel, case, weights, x, interpret=True, **more):
    """The same by a module's kernels."""
    norm, scale, positions, _, _, e, _, length = case
    formula = Formula(isinstance(norm, LayerNorm), norm.eps, "")
    return kernel.block(formula, weights, x, scale, positions.angles(length, e), interpret, **more)


def gradients(block, weights, x):
    """Of a loss of rows that share weights: no outputs weigh alike; and what the block gives."""

    def loss(weights, x):
        y = jax.vmap(block, (None, 0))(weights, x)
        return (y.astype(jnp.float32) * (2 + jnp.sin(jnp.arange(y.size)).reshape(y.shape))).sum() / len(x), y

    return jax.grad(loss, (0, 1), has_aux=True)(weights, x)


@el.spec
class Louder(Attention):
    """A component of a user's own, which no kernel can know."""

    def apply(self, params, x, context):
        return 2 * super().apply(params, x, context)
