"""Causal attention in one GPU kernel forward and one backward, written in Pallas for Triton.

The plain formula writes rotated queries and keys, scores and patterns to memory. Here a program reads its part of the projected row,
[position, queries | keys | values of all heads], as the product left it, turns it in registers and writes what the heads mix: nothing is
padded, split or transposed on the way. Rows and heads of any size are masked loads. No product has an inner dimension below 16, so
narrower heads share a tile, and masks over its columns tell them apart. Products take bfloat16 and add in float32.

A program has one block of positions of a row, and the heads of one tile. Forward, its queries see a block of keys after the other,
keeping a running maximum and sum (Milakov and Gimelshein 2018; Dao et al. 2022). Backward, scores are computed anew: its queries
meet all earlier blocks of keys, and its keys all later blocks of queries, so that it has whole gradients and writes each once. Sums
are made in one order: the same bits every time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from elegans.models.fused import dot
from elegans.models.positions import Positions

LEAST_ROW = 16  # positions from which the kernel is known to gain: shorter rows fill less than half of its least tile
LEAST_TILE = 16  # the least inner dimension of a product
WIDEST = 128  # d_head above which a program's registers do not hold its block


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program takes."""

    rows: int  # queries, and keys, at a time: a power of two, of 16 and more
    warps: int
    stages: int = 2  # loads under way ahead of the products


# by columns of a tile, then the longest row. None spills registers, but for 8 bytes of four heads of 4 in long rows; others were not timed
NARROW = {32: Blocks(rows=32, warps=2), 64: Blocks(rows=64, warps=4), math.inf: Blocks(rows=32, warps=2)}
BLOCKS = {16: NARROW, 32: NARROW, 64: {math.inf: Blocks(rows=32, warps=8)}, 128: {math.inf: Blocks(rows=16, warps=8)}}


# ---- sizes


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call."""

    length: int  # positions
    heads: int
    d_head: int
    interpret: bool

    @property
    def together(self) -> int:
        """Heads that share a tile."""
        return min(self.heads, max(1, LEAST_TILE // self.d_head))

    @property
    def tile(self) -> int:
        """Columns of a tile: a power of two."""
        return max(LEAST_TILE, 1 << (self.together * self.d_head - 1).bit_length())

    @property
    def tiles(self) -> int:
        return -(-self.heads // self.together)

    @property
    def all_columns(self) -> int:
        """Of the queries of all heads."""
        return self.heads * self.d_head

    @property
    def blocks(self) -> Blocks:
        return next(blocks for longest, blocks in BLOCKS[self.tile].items() if self.length <= longest)

    @property
    def count(self) -> int:
        """Blocks of positions."""
        return -(-self.length // self.blocks.rows)

    def tables(self, angles: np.ndarray | None) -> tuple[Array, ...]:
        """What turns the columns of a tile, if anything does: cosines and sines at the positions of whole blocks, and (a, b) -> (-b, a)."""
        if angles is None:
            return ()
        turns = np.tile(angles, 2 * self.together)
        turns = np.pad(turns, ((0, self.count * self.blocks.rows - self.length), (0, self.tile - turns.shape[1])))
        swap = np.kron(np.eye(self.together), np.kron([[0, 1], [-1, 0]], np.eye(self.d_head // 2)))
        swap = np.pad(swap, (0, self.tile - len(swap)))
        return jnp.asarray(np.cos(turns), jnp.float32), jnp.asarray(np.sin(turns), jnp.float32), jnp.asarray(swap, jnp.bfloat16)


# ---- inside the kernels: blocks of [position, column of the tile], float32 unless they enter a product


@dataclasses.dataclass(frozen=True)
class Program:
    """One program: the arrays of its row by name, and its tile of heads."""

    plan: Plan
    row: dict[str, Any]  # references
    index: Array | int  # of the tile

    @property
    def factor(self) -> Array:
        """What makes scores of products."""
        return self.row["scale"][0] * self.plan.d_head**-0.5

    def exponents(self, q: Array, k: Array) -> Array:
        """Scores as exponents of 2."""
        return dot(q, k, trans_b=True) * (self.factor * math.log2(math.e))

    def positions(self, block: Array | int) -> Any:
        from jax.experimental import pallas as pl

        return pl.ds(block * self.plan.blocks.rows, self.plan.blocks.rows)

    def place(self, block: Array, part: int) -> tuple[Any, Array | None]:
        """Where the tile lies in a block's queries (`part` 0), keys (1) or values (2); and which elements there are, if not all."""
        from jax.experimental import pallas as pl

        plan, rows, columns = self.plan, self.plan.blocks.rows, self.plan.together * self.plan.d_head
        there = (block * rows + jnp.arange(rows) < plan.length)[:, None] if plan.length % rows else None
        if columns < plan.tile or plan.heads % plan.together:
            # a number where it can be: the compiler then sees how wide loads may be
            end = jnp.minimum(columns, plan.all_columns - self.index * columns) if plan.heads % plan.together else columns
            inside = (jnp.arange(plan.tile) < end)[None, :]
            there = inside if there is None else there & inside
        return (self.positions(block), pl.ds(part * plan.all_columns + self.index * columns, plan.tile)), there

    def read(self, name: str, block: Array, part: int = 0) -> Array:
        from jax.experimental.pallas import triton as plgpu

        at, there = self.place(block, part)
        return plgpu.load(self.row[name].at[at], mask=there, other=None if there is None else 0.0)

    def write(self, ref: Any, block: Array, x: Array, part: int = 0) -> None:
        from jax.experimental.pallas import triton as plgpu

        at, there = self.place(block, part)
        plgpu.store(ref.at[at], x.astype(ref.dtype), mask=there)

    def sums(self, block: Array, h: int) -> Any:
        """Where a head's sums of weights are."""
        return self.index * self.plan.together + h, self.positions(block)

    def of_head(self, h: int, x: Array) -> Array:
        """Zero in the columns of the tile's other heads."""
        if self.plan.together == 1:
            return x
        columns, width = jnp.arange(self.plan.tile), self.plan.d_head
        return jnp.where(((columns >= h * width) & (columns < (h + 1) * width))[None, :], x, jnp.zeros_like(x))

    def turn(self, block: Array | int, x: Array, back: bool = False) -> Array:
        """Every head (a, b) of a block as (a cos - b sin, a sin + b cos), or `back`; as it is without rotary positions."""
        if not self.row["tables"]:
            return x.astype(jnp.float32)
        cos, sin, swap = self.row["tables"]
        cos, sin = cos[self.positions(block), :], sin[self.positions(block), :]
        turned = dot(x.astype(jnp.bfloat16), swap[...]) * sin  # (-b, a) sin
        return x * cos - turned if back else x * cos + turned

    def queries(self, block: Array) -> list[Array]:
        """Each head's queries."""
        q = self.turn(block, self.read("qkv", block)).astype(jnp.bfloat16)
        return [self.of_head(h, q) for h in range(self.plan.together)]

    def keys(self, block: Array) -> tuple[Array, Array]:
        """Keys and values of all heads of the tile."""
        return self.turn(block, self.read("qkv", block, 1)).astype(jnp.bfloat16), self.read("qkv", block, 2)

    def askers(self, block: Array) -> list[tuple[Array, ...]]:
        """Of each head: queries, gradients of what they mixed, the logarithm of their sum of weights, and their pattern's mean gradient."""
        dz = self.read("dz", block)
        shares = dz.astype(jnp.float32) * self.read("z", block).astype(jnp.float32)
        return [
            (q, self.of_head(h, dz), self.row["sums"][self.sums(block, h)], self.of_head(h, shares).sum(1))
            for h, q in enumerate(self.queries(block))
        ]


def diagonal(plan: Plan) -> Array:
    """Which keys of its own block a query sees."""
    place = jnp.arange(plan.blocks.rows)
    return place[:, None] >= place[None, :]


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
    q, (k, v), causal = program.queries(block), program.keys(block), diagonal(plan)
    none = jnp.full(plan.blocks.rows, -jnp.inf), jnp.zeros(plan.blocks.rows), jnp.zeros((plan.blocks.rows, plan.tile))
    # its own block first: every query has a key there, so that its greatest exponent is finite
    seen = [_see(jnp.where(causal, program.exponents(a, k), -jnp.inf), v, none) for a in q]

    def earlier(j: Array, seen: Any) -> Any:
        k, v = program.keys(j)
        return [_see(program.exponents(a, k), v, s) for a, s in zip(q, seen, strict=True)]

    seen = jax.lax.fori_loop(0, block, earlier, seen) if plan.count > 1 else seen
    parts = [program.of_head(h, mixed * (1 / total)[:, None]) for h, (_, total, mixed) in enumerate(seen)]
    program.write(out["z"], block, functools.reduce(jnp.add, parts))
    for h, (top, total, _) in enumerate(seen):
        out["sums"][program.sums(block, h)] = top + jnp.log2(total)


# ---- backward


def _meet(program: Program, asker: tuple[Array, ...], keys: tuple[Array, Array], causal: Array | None = None) -> tuple[Array, Array]:
    """Some queries' pattern on some keys, and the gradient of its scores."""
    (q, dz, sums, mean), (k, v) = asker, keys
    pattern = jnp.exp2(program.exponents(q, k) - sums[:, None])
    pattern = pattern if causal is None else jnp.where(causal, pattern, 0.0)
    ds = pattern * (dot(dz, v, trans_b=True) - mean[:, None])
    return pattern.astype(jnp.bfloat16), ds.astype(jnp.bfloat16)


def _to_keys(asker: tuple[Array, ...], pattern: Array, ds: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
    """The gradients of keys and values, with what these queries add to them."""
    q, dz, *_ = asker
    return sums[0] + dot(ds, q, trans_a=True), sums[1] + dot(pattern, dz, trans_a=True)


def _backward_kernel(plan: Plan, row: Any, out: Any) -> None:
    """The gradients of queries, keys and values of a block and the heads of a tile."""
    from jax.experimental import pallas as pl

    program, block = Program(plan, row, pl.program_id(0)), pl.program_id(1)
    askers, keys, causal = program.askers(block), program.keys(block), diagonal(plan)
    dq = jnp.zeros((plan.blocks.rows, plan.tile))
    sums = dq, dq
    for h, asker in enumerate(askers):
        pattern, ds = _meet(program, asker, keys, causal)
        dq = dq + dot(ds, program.of_head(h, keys[0]))
        sums = _to_keys(asker, pattern, ds, sums)

    def earlier(j: Array, dq: Array) -> Array:
        keys = program.keys(j)
        for h, asker in enumerate(askers):
            dq = dq + dot(_meet(program, asker, keys)[1], program.of_head(h, keys[0]))
        return dq

    def later(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        for asker in program.askers(i):
            sums = _to_keys(asker, *_meet(program, asker, keys), sums)
        return sums

    if plan.count > 1:
        dq, sums = jax.lax.fori_loop(0, block, earlier, dq), jax.lax.fori_loop(block + 1, plan.count, later, sums)
    dq, dk, dv = dq * program.factor, sums[0] * program.factor, sums[1]
    for part, x in enumerate((program.turn(block, dq, back=True), program.turn(block, dk, back=True), dv)):
        program.write(out["dqkv"], block, x, part)


# ---- calling them


def _call(plan: Plan, kernel: Any, row: dict[str, Any], out: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
    """A kernel on a grid of [tile of heads, block of positions]; each program may look at the whole row."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    def whole(a: Any) -> Any:
        return pl.BlockSpec(a.shape, lambda *_: (0,) * len(a.shape))

    return pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(plan.tiles, plan.count),
        in_specs=[jax.tree.map(whole, row)],
        out_specs=jax.tree.map(whole, out),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=plan.blocks.warps, num_stages=plan.blocks.stages),
        interpret=plan.interpret,
    )(row)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one(plan: Plan, qkv: Array, scale: Array, tables: tuple[Array, ...]) -> Array:
    return _one_forward(plan, qkv, scale, tables)[0]


def _one_forward(plan: Plan, qkv: Array, scale: Array, tables: tuple[Array, ...]) -> tuple[Array, dict[str, Any]]:
    row = {"qkv": qkv, "scale": scale, "tables": tables}
    like = {"z": jax.ShapeDtypeStruct((plan.length, plan.all_columns), qkv.dtype)}
    like["sums"] = jax.ShapeDtypeStruct((plan.tiles * plan.together, plan.count * plan.blocks.rows), jnp.float32)
    made = _call(plan, _forward_kernel, row, like)
    return made["z"], row | made


def _one_backward(plan: Plan, row: dict[str, Any], dz: Array) -> tuple[Array, None, None]:
    out = {"dqkv": jax.ShapeDtypeStruct(row["qkv"].shape, row["qkv"].dtype)}
    return _call(plan, _backward_kernel, row | {"dz": dz}, out)["dqkv"], None, None


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
) -> Float[Array, "position d"]:
    """softmax(scale q k / sqrt(d_head)) v of every head, causal, from queries | keys | values of all heads side by side.

    Queries and keys are turned by `angles`, [position, d_head / 2] radians, in the half-split layout of `positions.Rotary`. `scale` is a
    constant: it has no gradient. `interpret` runs the kernel's meaning without a GPU.
    """
    plan = Plan(qkv.shape[0], heads, qkv.shape[1] // (3 * heads), interpret)
    return _one(plan, qkv, jnp.asarray(scale, jnp.float32).reshape(1), plan.tables(angles))
