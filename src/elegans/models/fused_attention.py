"""Causal attention in one GPU kernel forward and two backward, written in Pallas for Triton.

The plain formula writes scores and patterns to memory. Here a program reads its part of a projected row, [position, queries | keys |
values of all heads], and writes what the heads mix: nothing is padded, split or transposed on the way. Rows and heads of any size are
masked loads. No product has an inner dimension below 16, so narrower heads share a tile, and masks over its columns tell them apart.
Products take bfloat16 and add in float32.

A program has one block of positions of a row, and the heads of one tile. Forward, its queries see a block of keys after the other,
keeping a running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022). Backward, scores are computed anew, twice: queries
meet all earlier blocks of keys, and in a kernel of their own keys all later blocks of queries, so that each has whole gradients and
writes them once. Sums are made in one order: the same bits every time. Blocks of positions that nobody reads, which stand at a row's
end, are zeros, and so are their gradients; nothing else looks at them.

Queries and keys come turned (rotary positions), and queries such that products are exponents of 2: that is done once for a row, before
(`_turned`, or `fused_projections.py`), and not once for each pair of blocks. Gradients are turned back where they are written.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from elegans.models import fused
from elegans.models.fused import dot
from elegans.models.fused_heads import WIDEST, Plan, Program, diagonal
from elegans.models.positions import Positions

LEAST_ROW = 16  # positions from which the kernel is known to gain: shorter rows fill less than half of its least tile


# ---- forward


def _see(exponents: Array, v: Array, seen: tuple[Array, ...]) -> tuple[Array, ...]:
    """A head's greatest exponent, sum of weights, and weighted sum of values, after some more keys."""
    top, total, mixed = seen
    higher = jnp.maximum(top, exponents.max(1))
    fade, weights = jnp.exp2(top - higher), jnp.exp2(exponents - higher[:, None])
    return higher, total * fade + weights.sum(1), mixed * fade[:, None] + dot(weights.astype(jnp.bfloat16), v)


def _forward_kernel(plan: Plan, row: Any, out: Any) -> None:
    """What a tile's heads mix for a block of queries, and the logarithm of the sum that each head's weights were divided by."""
    from jax.experimental import pallas as pl

    program, block = Program(plan, row, pl.program_id(0)), pl.program_id(1)

    def made() -> None:
        q, k, v = program.heads(program.read("qkv", block)), program.read("qkv", block, 1), program.read("qkv", block, 2)
        none = jnp.full(plan.blocks.rows, -jnp.inf), jnp.zeros(plan.blocks.rows), jnp.zeros((plan.blocks.rows, plan.tile))
        # its own block first: every query has a key there, so that its greatest exponent is finite
        seen = [_see(jnp.where(diagonal(plan), dot(a, k, trans_b=True), -jnp.inf), v, none) for a in q]

        def earlier(j: Array, seen: Any) -> Any:
            k, v = program.read("qkv", j, 1), program.read("qkv", j, 2)
            return [_see(dot(a, k, trans_b=True), v, s) for a, s in zip(q, seen, strict=True)]

        seen = jax.lax.fori_loop(0, block, earlier, seen) if plan.count > 1 else seen
        program.write(out["z"], block, program.joined([mixed * (1 / total)[:, None] for _, total, mixed in seen]))
        for h, (top, total, _) in enumerate(seen):
            program.note(out["sums"], block, h, top + jnp.log2(total))

    program.if_read(block, made, (out["z"], 0))


# ---- backward: a kernel of queries, and one of keys, in which every block of scores lies on its side, so that no product turns one


def _to_queries(asker: tuple[Array, ...], k: Array, v: Array, dq: Array, causal: Array | None = None) -> Array:
    """The gradient of a head's queries, with what some keys add to it."""
    q, dz, sums, mean = asker
    pattern = jnp.exp2(dot(q, k, trans_b=True) - sums[:, None])
    pattern = pattern if causal is None else jnp.where(causal, pattern, 0.0)
    ds = pattern * (dot(dz, v, trans_b=True) - mean[:, None])
    return dq + dot(ds.astype(jnp.bfloat16), k)


def _queries_kernel(plan: Plan, row: Any, out: Any) -> None:
    """The gradient of a block of queries and the heads of a tile, and the mean gradient of each query's pattern."""
    from jax.experimental import pallas as pl

    program, block = Program(plan, row, pl.program_id(0)), pl.program_id(1)

    def made() -> None:
        dz = program.read("dz", block)
        shares = dz.astype(jnp.float32) * program.read("z", block).astype(jnp.float32)
        askers = [
            (q, dzh, program.numbers("sums", block, h), share.sum(1))
            for h, (q, dzh, share) in enumerate(zip(*map(program.heads, (program.read("qkv", block), dz, shares)), strict=True))
        ]
        for h, (*_, mean) in enumerate(askers):
            program.note(out["means"], block, h, mean)
        k, v = program.read("qkv", block, 1), program.read("qkv", block, 2)
        dq = [_to_queries(asker, k, v, jnp.zeros((plan.blocks.rows, plan.tile)), diagonal(plan)) for asker in askers]

        def earlier(j: Array, dq: list[Array]) -> list[Array]:
            k, v = program.read("qkv", j, 1), program.read("qkv", j, 2)
            return [_to_queries(asker, k, v, d) for asker, d in zip(askers, dq, strict=True)]

        dq = jax.lax.fori_loop(0, block, earlier, dq) if plan.count > 1 else dq
        program.write(out["dqkv"], block, program.turn(block, program.joined(dq) * (row["factor"][0] * math.log(2)), back=True))

    program.if_read(block, made, (out["dqkv"], 0))


def _keys_kernel(plan: Plan, row: Any, out: Any) -> None:
    """The gradients of a block of keys and values and the heads of a tile."""
    from jax.experimental import pallas as pl

    program, block = Program(plan, row, pl.program_id(0)), pl.program_id(1)

    def made() -> None:
        keys = [program.heads(program.read("qkv", block, part)) for part in (1, 2)]

        def add(i: Array, sums: Any, causal: Array | None = None) -> Any:
            """The sums with what a block of queries adds to them; scores are [key, query]."""
            q, dz, made = program.read("qkv", i), program.read("dz", i), []
            for h, (k, v, dk, dv) in enumerate(zip(*keys, *sums, strict=True)):
                sums_of, means = program.numbers("sums", i, h), program.numbers("means", i, h)
                pattern = jnp.exp2(dot(k, q, trans_b=True) - sums_of[None, :])
                pattern = pattern if causal is None else jnp.where(causal, pattern, 0.0)
                ds = pattern * (dot(v, dz, trans_b=True) - means[None, :])
                made.append((dk + dot(ds.astype(jnp.bfloat16), q), dv + dot(pattern.astype(jnp.bfloat16), dz)))
            return tuple(map(list, zip(*made, strict=True)))

        zeros = [jnp.zeros((plan.blocks.rows, plan.tile)) for _ in range(plan.together)]
        sums = add(block, (zeros, zeros), diagonal(plan).T)
        dk, dv = jax.lax.fori_loop(block + 1, row["until"][0], add, sums) if plan.count > 1 else sums
        program.write(out["dqkv"], block, program.turn(block, program.joined(dk) * math.log(2), back=True), 1)
        program.write(out["dqkv"], block, program.joined(dv), 2)

    program.if_read(block, made, (out["dqkv"], 1), (out["dqkv"], 2))


# ---- calling them


def _call(plan: Plan, kernel: Any, row: dict[str, Any], out: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """A kernel on a grid of [tile of heads, block of positions]; each may look at the whole row, and go on with what `row` has of `out`."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    places = {id(a): i for i, a in enumerate(jax.tree.leaves(row))}
    goes_on = {places[id(row[name])]: i for i, name in enumerate(sorted(out)) if name in row}

    def whole(a: Any) -> Any:
        return pl.BlockSpec(a.shape, lambda *_: (0,) * len(a.shape))

    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(plan.tiles, plan.count),
        in_specs=[jax.tree.map(whole, row)],
        out_specs=jax.tree.map(whole, out),
        out_shape=out,
        input_output_aliases=goes_on,
        compiler_params=plgpu.CompilerParams(num_warps=plan.blocks.warps, num_stages=plan.blocks.stages),
        interpret=plan.interpret,
    )(row)


def swapped(a: Array, d_head: int) -> Array:
    """Columns of heads side by side, each head's (a, b) as (-b, a)."""
    pairs = a.reshape(*a.shape[:-1], -1, 2, d_head // 2)
    return (jnp.flip(pairs, -2) * jnp.array([[-1.0], [1.0]])).reshape(a.shape)


def _turned(plan: Plan, qkv: Array, factor: Array, tables: tuple[Array, ...]) -> Array:
    """A row with its queries and keys turned, and queries such that products with keys are exponents of 2."""
    x = qkv.reshape(plan.length, 3, plan.heads, plan.d_head).astype(jnp.float32)
    if tables:
        cos, sin = (a[: plan.length, None, None, : plan.d_head] for a in tables[:2])
        kept = jnp.array([False, False, True])[:, None, None]
        x = jnp.where(kept, x, x * cos + swapped(x, plan.d_head) * sin)
    return (x * jnp.stack([factor[0], *jnp.ones(2)])[:, None, None]).astype(qkv.dtype).reshape(qkv.shape)


def forward(plan: Plan, qkv: Array, upto: Array) -> dict[str, Array]:
    """A row with what its heads mix and the sums of their weights, from turned queries, keys and values; [1] positions are read."""
    row = {"qkv": qkv, "until": plan.until(upto)}
    return row | _call(plan, _forward_kernel, row, {"z": plan.like(1), "sums": plan.like_numbers})


def backward(plan: Plan, row: dict[str, Array], shared: dict[str, Any], dz: Array) -> Array:
    """The gradient of queries | keys | values as they were before anything turned them; `shared` has what did."""
    row = row | {"dz": dz}
    made = _call(plan, _queries_kernel, row | shared, {"dqkv": plan.like(3), "means": plan.like_numbers})
    del row["z"]
    return _call(plan, _keys_kernel, row | shared | made, {"dqkv": plan.like(3)})["dqkv"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one(plan: Plan, qkv: Array, upto: Array, factor: Array, tables: tuple[Array, ...]) -> Array:
    return _one_forward(plan, qkv, upto, factor, tables)[0]


def _one_forward(plan: Plan, qkv: Array, upto: Array, factor: Array, tables: tuple[Array, ...]) -> tuple[Array, Any]:
    row = forward(plan, _turned(plan, qkv, factor, tables), upto)
    return row["z"], (row, {"factor": factor, "tables": tables})


def _one_backward(plan: Plan, kept: Any, dz: Array) -> tuple[Array, None, None, None]:
    return backward(plan, *kept, dz), None, None, None


_one.defvjp(_one_forward, _one_backward)


def knows(positions: Positions | None, row: Array, d_head: int) -> bool:
    """Whether the kernel is right and quick for a row and this way to turn it: a subclass's `rotate` may do anything."""
    turns = positions is None or type(positions).rotate is Positions.rotate
    return turns and row.dtype == jnp.bfloat16 and row.shape[0] >= LEAST_ROW and d_head <= WIDEST


def attention(
    qkv: Float[Array, "position projected"],
    heads: int,
    scale: float | Array,
    angles: Float[np.ndarray, "position pair"] | None = None,
    interpret: bool = False,
    upto: Int[Array, ""] | None = None,
) -> Float[Array, "position d"]:
    """softmax(scale q k / sqrt(d_head)) v of every head, causal, from queries | keys | values of all heads side by side.

    Queries and keys are turned by `angles`, [position, d_head / 2] radians, in the half-split layout of `positions.Rotary`. `scale` is a
    constant: it has no gradient. `interpret` runs the kernel's meaning without a GPU. Where only the first `upto` positions are read, and
    so have a gradient, the others' are anything finite, and their own gradients zero or what they would be.
    """
    plan = Plan(qkv.shape[0], heads, qkv.shape[1] // (3 * heads), interpret)
    return _one(plan, qkv, fused.positions_read(plan.length, upto), plan.factor(scale), plan.tables(angles))
