"""When GPU kernels stand in for formulas, how they meet `vmap`, and attention: JAX's own Pallas kernel, fit to short rows and small heads.

Attention's plain formula writes scores and patterns to memory, forward and backward, and at these sizes that is most of
a training step's traffic. The kernel keeps them in registers. Its products take bfloat16 and add in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from elegans.types import Edit, no_edit

BLOCK = 64  # queries and keys of one tile
LEAST_HEAD = 16  # width of the smallest matrix product that the kernel's compiler knows
LEAST_ROW = 32  # positions from which attention's gains: rows of 18 fill less than a third of a tile, and are 1.2 times as quick without


def serves(dtype: str, edit: Edit) -> bool:
    """Whether kernels may stand in: bfloat16 on a GPU, and nobody edits what they would keep to themselves."""
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    return dtype == "bfloat16" and edit is no_edit and device.platform == "gpu"


def rows_as_one(one: Callable[..., Array], name: str) -> Callable[..., Array]:
    """`one(static, x, *weights)` of the same shape as x, [position, width], for a function to which all tokens are alike.

    `vmap` over rows that share weights calls it on one long row of all their tokens, so that its gradient of a weight is a sum that it
    makes itself. In `grad(vmap(f))` this comes first, and `grad` meets `one`, which may have a `custom_vjp`, only then; in
    `vmap(grad(f))`, gradients of every row, `grad` does. A primitive, since `custom_vmap` has no gradient where no `vmap` is inside it.
    """
    primitive = Primitive(name)

    def plain(x: Array, *weights: Array, static: Any) -> Array:
        return one(static, x, *weights)

    def batch(args: Any, axes: Any, *, static: Any) -> tuple[Array, int]:
        if any(axis is not None for axis in axes[1:]):
            return jax.vmap(functools.partial(one, static), axes)(*args), 0
        x = jnp.moveaxis(args[0], axes[0], 0)
        return primitive.bind(x.reshape(-1, x.shape[-1]), *args[1:], static=static).reshape(x.shape), 0

    def jvp(primals: Any, tangents: Any, *, static: Any) -> tuple[Array, Array]:
        return jax.jvp(functools.partial(one, static), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))

    primitive.def_impl(jax.jit(plain, static_argnames="static"))
    primitive.def_abstract_eval(lambda x, *_, **__: x)
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    return lambda static, x, *weights: primitive.bind(x, *weights, static=static)


def attention(
    q: Float[Array, "position head d_head"],
    k: Float[Array, "position head d_head"],
    v: Float[Array, "position head d_head"],
    interpret: bool = False,
) -> Float[Array, "position head d_head"]:
    """softmax(q k / sqrt(d_head)) v, causal. `interpret` runs the kernel's meaning without a GPU."""
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

    length, _, width = q.shape
    padding = ((0, -length % BLOCK), (0, 0), (0, max(0, LEAST_HEAD - width)))
    q, k, v = (jnp.pad(x, padding)[None] for x in (q, k, v))
    sizes = BlockSizes(**dict.fromkeys(("block_q", "block_k", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), BLOCK))
    z = mha(q, k, v, None, sm_scale=width**-0.5, causal=True, block_sizes=sizes, interpret=interpret)
    return z[0, :length, :, :width]
