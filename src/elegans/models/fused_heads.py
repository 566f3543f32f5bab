"""What attention's kernels share: sizes, and a program's view of its row and heads, written in Pallas for Triton."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from elegans.models.fused import dot

LEAST_TILE = 16  # the least inner dimension of a product
TABLES = "cos", "sin", "swap"
WIDEST = 128  # d_head above which a program's registers do not hold its block


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program takes."""

    rows: int  # queries, and keys, at a time: a power of two, of 16 and more
    warps: int
    stages: int = 2  # loads under way ahead of the products


# by the width of a head, the quickest on an H100 of those tried (docs/speed.md): where a program is one warp nothing waits for another
BLOCKS = {8: Blocks(16, 1), 16: Blocks(32, 1), 32: Blocks(32, 2), 64: Blocks(64, 4, stages=1), 128: Blocks(64, 4, stages=1)}
LARGEST = max(blocks.rows for blocks in BLOCKS.values())


def entry(d_head: int) -> int:
    """The entry of the table that heads of a width have."""
    return next(widest for widest in BLOCKS if d_head <= widest)


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
        return BLOCKS[entry(self.d_head)]

    @property
    def count(self) -> int:
        """Blocks of positions."""
        return -(-self.length // self.blocks.rows)

    def like(self, parts: int) -> jax.ShapeDtypeStruct:
        """Of a row of so many parts as wide as the queries."""
        return jax.ShapeDtypeStruct((self.length, parts * self.all_columns), jnp.bfloat16)

    @property
    def like_numbers(self) -> jax.ShapeDtypeStruct:
        """Of a number for each head, in whole tiles, and position."""
        return jax.ShapeDtypeStruct((self.tiles * self.together, self.length), jnp.float32)

    def until(self, upto: Array) -> Array:
        """Blocks of which something is read, of the number of positions that are, [1]."""
        return (upto.astype(jnp.int32) + self.blocks.rows - 1) // self.blocks.rows

    def factor(self, scale: float | Array) -> Array:
        """What makes queries such that their products with keys are exponents of 2."""
        return jnp.asarray(scale, jnp.float32).reshape(1) * (self.d_head**-0.5 * math.log2(math.e))

    def tables(self, angles: np.ndarray | None) -> tuple[Array, ...]:
        """What turns the columns of a tile, if anything does: cosines and sines at the positions, and (a, b) -> (-b, a)."""
        if angles is None:
            return ()
        turns = np.tile(angles, 2 * self.together)
        turns = np.pad(turns, ((0, -self.length % LARGEST), (0, self.tile - turns.shape[1])))
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

    def spot(self, block: Array, h: int) -> tuple[Any, Array | None]:
        """Where what a head has one of for each position of a block is; and which of it there is, if not all."""
        rows = self.plan.blocks.rows
        there = block * rows + jnp.arange(rows) < self.plan.length if self.plan.length % rows else None
        return (self.index * self.plan.together + h, self.positions(block)), there

    def numbers(self, name: str, block: Array, h: int) -> Array:
        """A head's numbers of a block."""
        from jax.experimental.pallas import triton as plgpu

        at, there = self.spot(block, h)
        return plgpu.load(self.row[name].at[at], mask=there, other=None if there is None else 0.0)

    def note(self, ref: Any, block: Array, h: int, x: Array) -> None:
        from jax.experimental.pallas import triton as plgpu

        at, there = self.spot(block, h)
        plgpu.store(ref.at[at], x, mask=there)

    def of_head(self, h: int, x: Array) -> Array:
        """Zero in the columns of the tile's other heads."""
        if self.plan.together == 1:
            return x
        columns, width = jnp.arange(self.plan.tile), self.plan.d_head
        return jnp.where(((columns >= h * width) & (columns < (h + 1) * width))[None, :], x, jnp.zeros_like(x))

    def heads(self, x: Array) -> list[Array]:
        """A block once for each head of the tile, zero in the columns of the others."""
        return [self.of_head(h, x) for h in range(self.plan.together)]

    def joined(self, parts: Sequence[Array]) -> Array:
        """Each head's columns out of its own part."""
        return functools.reduce(jnp.add, [self.of_head(h, x) for h, x in enumerate(parts)])

    def if_read(self, block: Array, made: Callable[[], None], *zero: tuple[Any, int]) -> None:
        """What is made of a block, if anybody reads it, and else zeros in these parts of arrays."""

        def nothing() -> None:
            for ref, part in zero:
                self.write(ref, block, jnp.zeros((self.plan.blocks.rows, self.plan.tile)), part)

        if self.plan.count > 1:
            jax.lax.cond(block < self.row["until"][0], made, nothing)
        else:
            made()

    def turn(self, block: Array | int, x: Array, back: bool = False) -> Array:
        """Every head (a, b) of a block as (a cos - b sin, a sin + b cos), or `back`; as it is without rotary positions."""
        if not self.row["tables"]:
            return x.astype(jnp.float32)
        cos, sin, swap = self.row["tables"]
        cos, sin = cos[self.positions(block), :], sin[self.positions(block), :]
        turned = dot(x.astype(jnp.bfloat16), swap[...]) * sin  # (-b, a) sin
        return x * cos - turned if back else x * cos + turned


def diagonal(plan: Plan) -> Array:
    """Which keys of its own block a query sees."""
    place = jnp.arange(plan.blocks.rows)
    return place[:, None] >= place[None, :]
