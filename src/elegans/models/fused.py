"""When GPU kernels stand in for formulas, and how they meet `vmap`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from elegans.types import Edit, no_edit


def serves(dtype: str, edit: Edit) -> bool:
    """Whether kernels may stand in: bfloat16 on a GPU, and nobody edits what they would keep to themselves."""
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    return dtype == "bfloat16" and edit is no_edit and device.platform == "gpu"


def dot(a: Array, b: Array, **transposed: bool) -> Array:
    """A product inside a kernel, added in float32."""
    from jax.experimental.pallas import triton as plgpu

    return plgpu.dot(a, b, **transposed)


def positions_read(length: int, upto: Int[Array, ""] | None) -> Float[Array, " 1"]:
    """Of a row's positions, so many are read; a float, since JAX asks for the gradient of whatever goes into a kernel."""
    return jnp.full(1, length if upto is None else upto, jnp.float32)


def rows_as_one(one: Callable[..., Array], name: str, width: Callable[..., int] | None = None, own: int = 0) -> Callable[..., Array]:
    """`one(static, x, *weights)` of x, [position, width], for a function to which all tokens are alike.

    What it gives is as wide as x, or has the `width` of these weights. The first `own` weights are no weights but a row's own, [1, ...],
    and those of a long row stand one after the other.
    `vmap` over rows that share weights calls it on one long row of all their tokens, so that its gradient of a weight is a sum that it
    makes itself. In `grad(vmap(f))` this comes first, and `grad` meets `one`, which may have a `custom_vjp`, only then; in
    `vmap(grad(f))`, gradients of every row, `grad` does. A primitive, since `custom_vmap` has no gradient where no `vmap` is inside it.
    """
    primitive = Primitive(name)

    def plain(x: Array, *weights: Array, static: Any) -> Array:
        return one(static, x, *weights)

    def batch(args: Any, axes: Any, *, static: Any) -> tuple[Array, int]:
        if any(axis is not None for axis in axes[1 + own :]):
            return jax.vmap(functools.partial(one, static), axes)(*args), 0
        rows = args[0].shape[axes[0]]
        tall = [batching.bdim_at_front(a, axis, rows) for a, axis in zip(args[: 1 + own], axes, strict=False)]
        joined = (a.reshape(-1, *a.shape[2:]) for a in tall)
        return primitive.bind(*joined, *args[1 + own :], static=static).reshape(*tall[0].shape[:2], -1), 0

    def shaped(x: Any, *weights: Any, **_: Any) -> Any:
        return x.update(shape=(x.shape[0], width(*weights[own:]))) if width else x

    def jvp(primals: Any, tangents: Any, *, static: Any) -> tuple[Array, Array]:
        return jax.jvp(functools.partial(one, static), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))

    primitive.def_impl(jax.jit(plain, static_argnames="static"))
    primitive.def_abstract_eval(shaped)
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    return lambda static, x, *weights: primitive.bind(x, *weights, static=static)


_product = rows_as_one(lambda _, x, w: x @ w, "product", lambda w: w.shape[-1])


def product(x: Float[Array, "position a"], w: Float[Array, "a b"]) -> Float[Array, "position b"]:
    """x w, beside kernels. A weight's gradient is then no product over rows and positions, for which XLA writes both factors transposed."""
    return _product(None, x, w)
