"""x + attention(norm(x)) for rows of any length in five GPU kernels, written in Pallas for Triton.

Around the kernels of `fused_attention.py` the formula writes normed rows and projections, turns them, and reads all of it again. Here a
program takes some tokens from the stream to turned queries, keys and values, and backward from the gradients of these to that of
the stream, and to the weights', which it sums over many tokens. What the heads mix goes out by a plain product.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from elegans.models import fused, fused_attention, fused_heads, fused_tokens
from elegans.models.fused import dot
from elegans.models.fused_tokens import Blocks, Formula, Tall, norm, padded

# by padded d_model, the quickest of those tried on an H100 (docs/speed.md)
BLOCKS = {
    16: Blocks(64, 16, span=512, warps=2, summing_warps=2),
    32: Blocks(64, 32, span=512, warps=2, summing_warps=2),
    64: Blocks(64, 64, kept=0),
    128: Blocks(32, 64, warps=2, summing_warps=2, kept=0),
}
WIDEST = max(BLOCKS)  # d_model above which a program's registers do not hold its tokens


@dataclasses.dataclass(frozen=True)
class _Plan(fused_tokens.Plan):
    """Everything static about a call."""

    axes: ClassVar = {"w": "d", "b": "d", "W_in": "df", "b_in": "f"}
    first: ClassVar = ("W_in",)
    heads: Any = None  # attention's plan

    def pulled(self, w: Any, at: Any, normed: Array, dy: Array, block: Tall) -> tuple[dict[str, Array], tuple[Array, ...]]:
        del w, normed, dy
        return {}, (block.read("dqkv", at),)


def fits(length: int, d: int, d_head: int) -> bool:
    """Whether the kernels serve models of this size, with rows of any length."""
    del length
    return d <= WIDEST and BLOCKS[padded(d)].tile % d_head == 0


def side_by_side(attn: dict[str, Array]) -> tuple[Array, Array | None]:
    """Weights of queries | keys | values of all heads, [d_model, column], and their biases, if there are any."""
    w = jnp.concatenate([attn[f"W_{n}"].swapaxes(0, 1).reshape(attn["W_Q"].shape[1], -1) for n in "QKV"], 1)
    return w, jnp.concatenate([attn[f"b_{n}"].reshape(-1) for n in "QKV"]) if "b_Q" in attn else None


def _project_kernel(plan: _Plan, tall: Any, w: Any, out: Any) -> None:
    """Queries | keys | values of a block of tokens: normed, projected, and turned where there is something that turns."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    block = Tall(plan, tall | out, pl.program_id(1) * plan.blocks.rows, plan.blocks.rows)
    tile, turned = plan.blocks.tile, 2 * plan.f // 3  # columns that are turned
    mixed = -(-turned // tile) if "cos" in w else 0
    place, column = block.positions % plan.heads.length, jnp.arange(tile)  # what is beyond the last row has a place, too
    places = tuple(jnp.broadcast_to(a, (plan.blocks.rows, tile)) for a in (place[:, None], column[None, :]))

    def projected() -> None:
        normed, _, _ = norm(plan, w, block.read("x"))

        def made(name: str, at: Any) -> Array:
            y = dot(normed, w["W_" + name][:, at])
            return y + w["b_" + name][at][None, :] if "b_" + name in w else y

        def straight(i: Array, _: None) -> None:
            at = pl.ds(i * tile, tile)
            block.write("qkv", made("in", at), at)

        def aslant(i: Array, _: None) -> None:
            at = pl.ds(i * tile, tile)
            cos, sin = (plgpu.load(w[name].at[places]) for name in ("cos", "sin"))
            y = made("in", at)
            y = jnp.where((i * tile + column < turned)[None, :], y * cos + made("swapped", at) * sin, y)
            block.write("qkv", y, at)

        for begin, end, make in ((0, mixed, aslant), (mixed, plan.tiles, straight)):
            if end > begin:
                jax.lax.fori_loop(begin, end, make, None)

    def nothing() -> None:
        zeros = jnp.zeros((plan.blocks.rows, tile))
        jax.lax.fori_loop(0, plan.tiles, lambda i, _: block.write("qkv", zeros, pl.ds(i * tile, tile)), None)

    block.if_read(w, projected, nothing)


# ---- calling them


def _weights(plan: _Plan, named: dict[str, Array]) -> dict[str, Array]:
    """What projects: weights for queries whose products with keys are exponents of 2, and those of turned rows."""
    factors = jnp.repeat(jnp.stack([named["factor"][0], *jnp.ones(2)]), plan.f // 3)
    scaled = {n: a * factors if n in ("W_in", "b_in") else a for n, a in named.items() if n in plan.names}
    w = plan.pad(tuple(scaled[n] for n in plan.names))
    if "cos" in named:
        swapped = plan.pad(tuple(fused_attention.swapped(a, plan.heads.d_head) if n in ("W_in", "b_in") else a for n, a in scaled.items()))
        w |= {n.replace("in", "swapped"): a for n, a in swapped.items() if n in ("W_in", "b_in")}
        width, tile = plan.heads.d_head, plan.blocks.tile
        w |= {n: jnp.tile(named[n][: plan.heads.length, :width], (1, tile // width)) for n in ("cos", "sin")}
    return w


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _one(plan: _Plan, names: tuple[str, ...], x: Array, upto: Array, *operands: Array) -> Array:
    """The block for some rows, one after the other."""
    return _one_forward(plan, names, x, upto, *operands)[0]


def _one_forward(plan: _Plan, names: tuple[str, ...], x: Array, upto: Array, *operands: Array) -> tuple[Array, Any]:
    plan, named = plan.of(x, upto), dict(zip(names, operands, strict=True))
    w = _weights(plan, named) | {"read": plan.tokens_read(upto)}
    qkv = fused_tokens.call(plan, _project_kernel, {"x": x}, w, ["qkv"], plan.blocks.rows)["qkv"]
    row = jax.vmap(functools.partial(fused_attention.forward, plan.heads))(qkv.reshape(-1, plan.heads.length, plan.f), upto[:, None])
    y = x + row["z"].reshape(plan.tokens, -1) @ named["W_out"].astype(x.dtype)
    return y + named["b_out"].astype(x.dtype) if "b_out" in named else y, (x, upto, row, named)


def _one_backward(plan: _Plan, names: tuple[str, ...], kept: Any, dy: Array) -> tuple[Array | None, ...]:
    (x, upto, row, named), plan = kept, plan.of(*kept[:2])
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    z = row["z"].reshape(plan.tokens, -1)
    dz = product("td,ed->te", dy, named["W_out"].astype(dy.dtype)).astype(dy.dtype)
    shared = {"factor": named["factor"], "tables": tuple(named[n] for n in fused_heads.TABLES if n in named)}
    through = functools.partial(fused_attention.backward, plan.heads)
    dqkv = jax.vmap(through, (0, None, 0))(row, shared, dz.reshape(row["z"].shape)).reshape(plan.tokens, -1)
    dx, *made = fused_tokens.backward(plan, {"x": x, "dy": dy, "dqkv": dqkv}, upto, tuple(named[n] for n in plan.names))
    grads = dict(zip(plan.names, made, strict=True)) | {"W_out": product("te,td->ed", z, dy), "b_out": dy.astype(jnp.float32).sum(0)}
    return dx, None, *(grads.get(n) for n in names)


_one.defvjp(_one_forward, _one_backward)
_rows = fused.rows_as_one(lambda static, *operands: _one(*static, *operands), "attention_rows", own=1)


def block(
    formula: Formula,
    weights: tuple[dict[str, Array], dict[str, Array]],
    x: Float[Array, "position d_model"],
    scale: float | Array,
    angles: Float[np.ndarray, "position pair"] | None,
    interpret: bool = False,
    upto: Int[Array, ""] | None = None,
) -> Float[Array, "position d_model"]:
    """x + attention(norm(x)) with the weights of both, x in bfloat16; `scale`, `angles` and `upto` as in `fused_attention.attention`."""
    norms, attn = weights
    h, d, e = attn["W_Q"].shape
    w, b = side_by_side(attn)
    operands = norms | {"W_in": w, **({} if b is None else {"b_in": b})}
    names = tuple(name for name in _Plan.axes if name in operands)
    heads = fused_heads.Plan(x.shape[0], h, e, interpret)
    operands |= {"W_out": attn["W_O"].reshape(h * e, d), **({"b_out": attn["b_O"]} if "b_O" in attn else {})}
    operands |= {"factor": heads.factor(scale), **dict(zip(fused_heads.TABLES, heads.tables(angles), strict=False))}
    plan = _Plan(formula, names, d, 3 * h * e, BLOCKS[padded(d)], interpret, heads=heads)
    return _rows((plan, tuple(operands)), x, fused.positions_read(len(x), upto), *operands.values())
