"""Where kernels stand in for formulas."""

import jax
import jax.numpy as jnp

from elegans.models import fused
from elegans.types import no_edit
from kernels import steps_of


def test_only_unedited_bfloat16_rows_on_a_gpu_are_served(monkeypatch):
    """An edit may want to see what kernels skip, and float32 promises more than their products keep."""

    class Gpu:
        platform = "gpu"

    assert not fused.serves("bfloat16", no_edit)  # here is no GPU
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    assert fused.serves("bfloat16", no_edit)
    assert not fused.serves("float32", no_edit)
    assert not fused.serves("bfloat16", lambda site, x: x)


def weight_gradient(product):
    """Of a loss of rows that share weights: no outputs weigh alike."""

    def loss(w, x):
        y = jax.vmap(product, (0, None))(x, w)
        return (y * (2 + jnp.sin(jnp.arange(y.size)).reshape(y.shape))).sum()

    return jax.grad(loss)


def test_a_product_beside_kernels_is_a_product_however_it_is_batched():
    """Rows, replicas of rows, rows with weights of their own, weights that meet one row, and gradients of each row."""
    x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 3, 5, 4), (2, 4, 6)]))
    ways = {
        "rows": lambda product: jax.vmap(product, (0, None))(x[0], w[0]),
        "replicas of rows": lambda product: jax.vmap(jax.vmap(product, (0, None)))(x, w),
        "weights of a row's own": lambda product: jax.vmap(product)(x[0, :2], w),
        "one row": lambda product: jax.vmap(product, (None, 0))(x[0, 0], w),
        "gradients of each row": lambda product: jax.vmap(jax.grad(lambda w, x: (product(x, w) ** 2).sum()), (None, 0))(w[0], x[0]),
        "gradients of replicas": lambda product: jax.vmap(weight_gradient(product))(w, x),
    }
    for way, made in ways.items():
        assert jnp.allclose(made(fused.product), made(jnp.matmul), rtol=1e-5, atol=1e-5), way


def test_a_weight_s_gradient_beside_kernels_is_a_product_over_one_axis():
    x, w = jnp.ones((3, 5, 4)), jnp.ones((4, 6))
    axes = {}
    for product in (fused.product, jnp.matmul):
        jaxpr = jax.make_jaxpr(weight_gradient(product))(w, x).jaxpr
        axes[product] = {len(e.params["dimension_numbers"][0][0]) for e in steps_of(jaxpr) if e.primitive.name == "dot_general"}
    assert axes[fused.product] == {1} and 2 in axes[jnp.matmul]
