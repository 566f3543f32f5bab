"""x + mlp(norm(x)) in one GPU kernel forward and one or two backward, written in Pallas for Triton.

The plain formula writes every step of the block to memory: normed rows, hidden units before and after their
activation, and the gradients of all of them. Here a program takes some tokens through the whole block in registers, a
tile of hidden units after the other, and the backward pass computes them anew. Products take bfloat16 and add
in float32. Sums over tokens are made in parts that are added up in one order: the same bits every time.

Rows are just more tokens (`fused.rows_as_one`), so that a weight's gradient is summed in the kernel and not row by row;
`vmap` over replicas adds an axis to the kernel's grid.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elegans.models import fused
from elegans.models.fused import dot
from elegans.models.fused_tokens import Blocks, Formula, Plan, Tall, backward, call, norm, padded

# by padded d_model, the quickest of those tried on an H100 (docs/speed.md)
BLOCKS = {
    16: Blocks(32, 32, span=256, warps=2, summing_warps=2),
    32: Blocks(64, 32, span=512, summing_warps=2, kept=0),
    64: Blocks(64, 64),
    128: Blocks(64, 32),
}
WIDEST = max(BLOCKS)  # d_model above which a program's registers do not hold its tokens


# ---- activations: most of a program's instructions, hence exp2 and rsqrt, which are one each, for exp and division


def _inverse(x: Array) -> Array:
    """1 / x of positive numbers."""
    root = jax.lax.rsqrt(x)
    return root * root


def _silu(x: Array) -> Array:
    return x * _inverse(1 + jnp.exp2(-math.log2(math.e) * x))


def _silu_slope(x: Array) -> Array:
    share = _inverse(1 + jnp.exp2(-math.log2(math.e) * x))
    return share * (1 + x * (1 - share))


def _phi(x: Array) -> tuple[Array, Array]:
    """The normal distribution's share below x, to 1e-7, and its density (Abramowitz and Stegun 7.1.26; Triton knows no erf)."""
    e = jnp.exp2(-0.5 * math.log2(math.e) * x * x)
    t = _inverse(1 + 0.3275911 * math.sqrt(0.5) * jnp.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    beyond = 0.5 * series * e
    return jnp.where(x < 0, beyond, 1 - beyond), e * (1 / math.sqrt(2 * math.pi))


def _gelu_slope(x: Array) -> Array:
    below, density = _phi(x)
    return below + x * density


def _sloped(function: Callable[[Array], Array], slope: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function with a derivative written by hand."""
    made = jax.custom_jvp(function)
    made.defjvp(lambda x, t: (function(x[0]), t[0] * slope(x[0])))
    return made


silu = _sloped(_silu, _silu_slope)
ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "swiglu": lambda gate, value: silu(gate) * value,
    "gelu": _sloped(lambda x: x * _phi(x)[0], _gelu_slope),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": silu,
}


# ---- the kernels


@dataclasses.dataclass(frozen=True)
class _Plan(Plan):
    """Everything static about a call."""

    axes: ClassVar = {"w": "d", "b": "d", "W_gate": "df", "W_in": "df", "W_out": "fd", "b_gate": "f", "b_in": "f", "b_out": "d"}
    first: ClassVar = ("W_gate", "W_in")  # in the order of the activation's arguments

    def hidden(self, w: Any, at: Any, normed: Array) -> tuple[Array, ...]:
        """The hidden units `at`, before their activation."""
        biases = {name: w[name.replace("W", "b")][at][None, :] for name in self.made} if "b_in" in w else {}
        made = {name: dot(normed, w[name][:, at]) for name in self.made}
        return tuple(made[name] + biases[name] if biases else made[name] for name in self.made)

    def pulled(self, w: Any, at: Any, normed: Array, dy: Array, block: Tall) -> tuple[dict[str, Array], tuple[Array, ...]]:
        del block
        hidden, pull = jax.vjp(ACTIVATIONS[self.formula.activation], *self.hidden(w, at, normed))
        made = pull(dot(dy, w["W_out"][at, :], trans_b=True))
        return {"W_out": dot(hidden.astype(jnp.bfloat16), dy, trans_a=True)}, tuple(g.astype(jnp.bfloat16) for g in made)


def _forward_kernel(plan: _Plan, tall: Any, w: Any, out: Any) -> None:
    from jax.experimental import pallas as pl

    block = Tall(plan, tall | out, pl.program_id(1) * plan.blocks.rows, plan.blocks.rows)
    x = block.read("x")

    def added() -> Array:
        normed, _, _ = norm(plan, w, x)

        def add(i: Array, y: Array) -> Array:
            at = pl.ds(i * plan.blocks.tile, plan.blocks.tile)
            hidden = ACTIVATIONS[plan.formula.activation](*plan.hidden(w, at, normed))
            return y + dot(hidden.astype(jnp.bfloat16), w["W_out"][at, :])

        y = jax.lax.fori_loop(0, plan.tiles, add, jnp.zeros(x.shape, jnp.float32))
        y = y + w["b_out"][...][None, :] if "b_out" in w else y
        return x.astype(jnp.float32) + y

    block.write("y", block.if_read(w, added, lambda: x.astype(jnp.float32)))


# ---- calling them


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one(plan: _Plan, x: Array, upto: Array, *weights: Array) -> Array:
    """The block for some rows, one after the other."""
    plan = plan.of(x, upto)
    return call(plan, _forward_kernel, {"x": x}, plan.pad(weights) | {"read": plan.tokens_read(upto)}, ["y"], plan.blocks.rows)["y"]


def _one_forward(plan: _Plan, x: Array, upto: Array, *weights: Array) -> tuple[Array, tuple[Array, ...]]:
    return _one(plan, x, upto, *weights), (x, upto, *weights)


def _one_backward(plan: _Plan, kept: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    x, upto, *weights = kept
    dx, *made = backward(plan.of(x, upto), {"x": x, "dy": dy}, upto, tuple(weights))
    return dx, None, *made


_one.defvjp(_one_forward, _one_backward)
_rows = fused.rows_as_one(_one, "mlp_block", own=1)


def block(
    formula: Formula,
    norm: dict[str, Array],
    mlp: dict[str, Array],
    x: Float[Array, "position d_model"],
    interpret: bool = False,
    upto: Int[Array, ""] | None = None,
) -> Float[Array, "position d_model"]:
    """x + mlp(norm(x)), x in bfloat16; `interpret` and `upto` as in `fused_attention.attention`."""
    weights = norm | mlp
    names = tuple(name for name in _Plan.axes if name in weights)
    d, f = weights["W_in"].shape
    plan = _Plan(formula, names, d, f, BLOCKS[padded(d)], interpret)
    return _rows(plan, x, fused.positions_read(len(x), upto), *(weights[name] for name in names))
