"""What the kernels share in which a program takes some tokens through part of a block, written in Pallas for Triton.

Rows are just more tokens (`fused.rows_as_one`), so that a weight's gradient is summed in the kernel and not row by row;
`vmap` over replicas adds an axis to the kernel's grid. Where tokens are wide enough, programs take them position by position, the first of
every row first, so that those that nobody reads, which stand at rows' ends, come last and are passed on as they are, their gradients too.
Products take bfloat16 and add in float32. Sums over tokens are made in parts that are added up in one order: the same bits every time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from elegans.models.fused import dot


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program takes. `rows` and `tile` are powers of two, of 16 and more."""

    rows: int  # tokens at a time
    tile: int  # columns at a time of what the first weights make
    span: int = 1024  # tokens that one program sums a weight's gradient over, about
    warps: int = 4
    summing_warps: int = 4  # of a program that sums weights' gradients
    stages: int = 2  # loads under way ahead of the products
    kept: int = 12_288  # float32 sums in a program's registers, up to which one kernel makes all gradients


SPARED = 32  # d_model, padded, from which on tokens that nobody reads are spared (docs/speed.md has the measurements)
STREAM = "x", "dx", "y", "dy"  # arrays of width d_model; others have the columns that the first weights make


@dataclasses.dataclass(frozen=True)
class Formula:
    """What the block computes: the norm centres or not, and `activation` is one of the MLP's or "swiglu"; "": attention's part."""

    centred: bool
    eps: float
    activation: str


# ---- sizes


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about a call."""

    axes: ClassVar[dict[str, str]]  # of each weight: "d" d_model, "f" what the first weights make
    first: ClassVar[tuple[str, ...]]  # the weights that are multiplied with normed tokens, where there are any

    formula: Formula
    names: tuple[str, ...]  # of the weights, in the order in which they are passed
    d: int  # d_model
    f: int  # columns that the first weights make
    blocks: Blocks
    interpret: bool
    tokens: int = 0  # of the long row
    rows: int = 1  # that stand in it, one after the other, as far as programs know

    def of(self, x: Array, upto: Array) -> Any:
        """The same for a long row, of rows of which so many positions are read each."""
        return dataclasses.replace(self, tokens=x.shape[0], rows=upto.shape[0] if self.spares else 1)

    @property
    def spares(self) -> bool:
        """Whether tokens come position by position; of narrow ones, memory reads several at once, and they must be neighbours."""
        return self.width >= SPARED

    def tokens_read(self, upto: Array) -> Array:
        """How many tokens are read, [1], in the order in which programs take them; all, if need be."""
        return self.rows * jnp.ceil(upto.max()).astype(jnp.int32)[None] if self.spares else jnp.full(1, self.tokens, jnp.int32)

    @property
    def width(self) -> int:
        """d_model, padded."""
        return padded(self.d)

    @property
    def tiles(self) -> int:
        return -(-self.f // self.blocks.tile)

    @property
    def made(self) -> tuple[str, ...]:
        """The first weights that there are."""
        return tuple(name for name in self.first if name in self.names)

    @property
    def wide(self) -> tuple[str, ...]:
        """The weights that have columns of what the first weights make."""
        return tuple(name for name in self.names if "f" in self.axes[name])

    @property
    def narrow(self) -> tuple[str, ...]:
        """The others, of width d_model."""
        return tuple(name for name in self.names if "f" not in self.axes[name])

    @property
    def at_once(self) -> bool:
        """Whether one program keeps the sums of all weights' gradients."""
        return sum(math.prod(self.shape(name)) for name in self.wide if name.startswith("W")) <= self.blocks.kept

    @property
    def span(self) -> int:
        """Tokens that a program sums over: whole blocks of rows, alike for all programs."""
        parts = -(-self.tokens // self.blocks.span)
        return -(-self.tokens // (parts * self.blocks.rows)) * self.blocks.rows

    def shape(self, name: str, tiles: int | None = None) -> tuple[int, ...]:
        """A weight's shape within the kernel, of all its tiles or of some."""
        sizes = {"d": self.width, "f": self.blocks.tile * (self.tiles if tiles is None else tiles)}
        return tuple(sizes[axis] for axis in self.axes[name])

    def columns(self, name: str) -> int:
        """Columns of an array of all tokens."""
        return self.d if name in STREAM else self.f

    def pad(self, weights: tuple[Array, ...]) -> dict[str, Array]:
        """The weights by name as the kernel takes them: matrices in bfloat16, zeros up to whole tiles."""
        named = dict(zip(self.names, weights, strict=True))
        cast = {name: a.astype(jnp.bfloat16 if name.startswith("W_") else jnp.float32) for name, a in named.items()}
        return {n: jnp.pad(a, [(0, to - size) for size, to in zip(a.shape, self.shape(n), strict=True)]) for n, a in cast.items()}

    def pulled(self, w: Any, at: Any, normed: Array, dy: Array, block: Tall) -> tuple[dict[str, Array], tuple[Array, ...]]:
        """Of some columns: gradients of weights that come after the first, summed over these tokens; and those of what each of the
        first weights makes."""
        raise NotImplementedError


def padded(d: int) -> int:
    """A power of two, and no less than a product can take."""
    return max(16, 1 << (d - 1).bit_length())


# ---- inside the kernels: arrays of [row, d_model] and [row, column], float32 unless they enter a product


@dataclasses.dataclass(frozen=True)
class Tall:
    """A block of tokens, of programs that each take a span of them."""

    plan: Plan
    refs: dict[str, Any]  # arrays of all tokens by name
    first: Array  # token of the block, as they are counted: position by position
    span: int

    @property
    def tokens(self) -> Array:
        """Of the block, as they are counted."""
        return self.first + jnp.arange(self.plan.blocks.rows)

    @property
    def positions(self) -> Array:
        """Of the tokens in their rows."""
        return self.tokens // self.plan.rows

    def mask(self, at: Any, size: int) -> Array | None:
        """Which elements there are in columns `at` of so many; none where all are."""
        rows = (self.tokens < self.plan.tokens)[:, None] if self.plan.tokens % self.span else None
        columns = (at.start + jnp.arange(at.size) < size)[None, :] if size % at.size else None
        return columns if rows is None else rows if columns is None else rows & columns

    def place(self, name: str, at: Any = None) -> tuple[Any, Array | None]:
        from jax.experimental import pallas as pl

        plan, at = self.plan, pl.ds(0, self.plan.width) if at is None else at
        there, line = self.mask(at, plan.columns(name)), self.tokens
        line = line if plan.rows == 1 else (line % plan.rows) * (plan.tokens // plan.rows) + self.positions
        line = jnp.where(self.tokens < plan.tokens, line, plan.tokens) if plan.tokens % self.span else line
        lines, columns = (jnp.broadcast_to(a, (plan.blocks.rows, at.size)) for a in (line[:, None], (at.start + jnp.arange(at.size))[None]))
        return self.refs[name].at[lines, columns], there

    def if_read(self, w: Any, made: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
        """What is made of the block, if anybody reads some of it."""
        return jax.lax.cond(self.first < w["read"][0], made, otherwise)

    def read(self, name: str, at: Any = None) -> Array:
        from jax.experimental.pallas import triton as plgpu

        ref, there = self.place(name, at)
        return plgpu.load(ref, mask=there, other=None if there is None else 0.0)

    def write(self, name: str, x: Array, at: Any = None) -> None:
        from jax.experimental.pallas import triton as plgpu

        ref, there = self.place(name, at)
        plgpu.store(ref, x.astype(jnp.bfloat16), mask=there)


def norm(plan: Any, w: Any, x: Array) -> tuple[Array, Array, Array]:
    """What the block reads; the same before the norm's weights; and the factor that normed it."""
    f = x.astype(jnp.float32)
    if plan.formula.centred:
        f = f - f.sum(-1)[:, None] / plan.d
        f = f if plan.d == plan.width else jnp.where((jnp.arange(plan.width) < plan.d)[None, :], f, 0.0)
    factor = jax.lax.rsqrt((f * f).sum(-1)[:, None] / plan.d + plan.formula.eps)
    hat = f * factor
    normed = hat * w["w"][...][None, :]
    normed = normed + w["b"][...][None, :] if "b" in w else normed
    return normed.astype(jnp.bfloat16), hat, factor


def through_norm(plan: Any, w: Any, dn: Array, dy: Array, hat: Array, factor: Array) -> tuple[Array, dict[str, Array]]:
    """The gradient of x, and those of the weights of width d_model, summed over these tokens."""
    g, dy = dn * w["w"][...][None, :], dy.astype(jnp.float32)
    inner = g - hat * ((g * hat).sum(-1)[:, None] / plan.d)
    inner = inner - g.sum(-1)[:, None] / plan.d if plan.formula.centred else inner
    made = {"w": (dn * hat).sum(0), "b": dn.sum(0) if "b" in w else None, "b_out": dy.sum(0) if "b_out" in w else None}
    return dy + factor * inner, {name: a for name, a in made.items() if a is not None}


def _to_normed(plan: Plan, w: Any, at: Any, pulled: tuple[Array, ...]) -> Array:
    """What some columns add to the gradient of normed tokens."""
    return functools.reduce(jnp.add, [dot(g, w[name][:, at], trans_b=True) for name, g in zip(plan.made, pulled, strict=True)])


def _of_first(plan: Plan, normed: Array, pulled: tuple[Array, ...]) -> dict[str, Array]:
    """Gradients of some columns of the first weights and their biases, summed over these tokens."""
    made = {name: dot(normed, g, trans_a=True) for name, g in zip(plan.made, pulled, strict=True)}
    biases = {name.replace("W", "b"): g for name, g in zip(plan.made, pulled, strict=True) if name.replace("W", "b") in plan.names}
    return made | {name: g.astype(jnp.float32).sum(0) for name, g in biases.items()}


# ---- the backward kernels: `tall`, `w` and `out` are references by name


def _input_kernel(plan: Plan, tall: Any, w: Any, out: Any) -> None:
    """The gradient of a block of tokens, and its part of the sums of width d_model."""
    from jax.experimental import pallas as pl

    block = Tall(plan, tall | out, pl.program_id(1) * plan.blocks.rows, plan.blocks.rows)
    dy = block.read("dy")

    def through() -> tuple[Array, dict[str, Array]]:
        normed, hat, factor = norm(plan, w, block.read("x"))

        def add(i: Array, dn: Array) -> Array:
            at = pl.ds(i * plan.blocks.tile, plan.blocks.tile)
            return dn + _to_normed(plan, w, at, plan.pulled(w, at, normed, dy, block)[1])

        dn = jax.lax.fori_loop(0, plan.tiles, add, jnp.zeros(hat.shape, jnp.float32))
        return through_norm(plan, w, dn, dy, hat, factor)

    dx, sums = block.if_read(w, through, lambda: (dy.astype(jnp.float32), {name: jnp.zeros(plan.width) for name in plan.narrow}))
    block.write("dx", dx)
    for name, a in sums.items():
        out[name][...] = a


def _weights_kernel(plan: Plan, tall: Any, w: Any, out: Any) -> None:
    """Gradients of weights, summed over a span of tokens: one tile's, or all and the tokens' gradients with them."""
    from jax.experimental import pallas as pl

    tiles = range(plan.tiles) if plan.at_once else [pl.program_id(0)]
    columns = [pl.ds(i * plan.blocks.tile, plan.blocks.tile) for i in tiles]
    start, steps = pl.program_id(1) * plan.span, plan.span // plan.blocks.rows
    read = jnp.clip((w["read"][0] - start + plan.blocks.rows - 1) // plan.blocks.rows, 0, steps)

    def block_of(j: Array) -> Tall:
        return Tall(plan, tall | out, start + j * plan.blocks.rows, plan.span)

    def step(j: Array, sums: Any) -> Any:
        block = block_of(j)
        dy = block.read("dy")
        normed, hat, factor = norm(plan, w, block.read("x"))
        made, dn = [], jnp.zeros(hat.shape, jnp.float32)
        for at in columns:
            later, pulled = plan.pulled(w, at, normed, dy, block)
            made.append(_of_first(plan, normed, pulled) | later)
            dn = dn + _to_normed(plan, w, at, pulled) if plan.at_once else dn
        if plan.at_once:
            dx, narrow = through_norm(plan, w, dn, dy, hat, factor)
            block.write("dx", dx)
            made.append(narrow)
        return jax.tree.map(jnp.add, sums, made)

    zeros = [
        {name: jnp.zeros(plan.shape(name, 1)) for name in names} for names in [plan.wide for _ in tiles] + [plan.narrow] * plan.at_once
    ]
    sums = jax.lax.fori_loop(0, read, step, zeros)
    if plan.at_once:
        jax.lax.fori_loop(read, steps, lambda j, _: block_of(j).write("dx", block_of(j).read("dy")), None)
    for at, tile in zip(columns, sums, strict=False):
        for name, a in tile.items():
            out[name][{"df": (slice(None), at), "fd": (at, slice(None)), "f": (at,)}[plan.axes[name]]] = a
    for name, a in sums[-1].items() if plan.at_once else ():
        out[name][...] = a


# ---- calling them


def call(
    plan: Plan, kernel: Any, tall: dict[str, Array], w: dict[str, Array], made: Sequence[str], span: int, sums: Any = (), tiles: int = 1
) -> Any:
    """A kernel on a grid of [tile, span of tokens].

    `tall` arrays, and those that are `made`, are of all tokens; of weights there are all, and how many tokens are `read`, and of `sums`
    those of each span.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    parts = -(-plan.tokens // span)
    whole = {n: pl.BlockSpec(a.shape, lambda *_, lead=(0,) * a.ndim: lead) for n, a in w.items()}

    def tokens(name: str) -> Any:
        return pl.BlockSpec((plan.tokens, plan.width if name in STREAM else plan.tiles * plan.blocks.tile), lambda *_: (0, 0))

    def of_span(name: str) -> Any:
        return pl.BlockSpec((None, *plan.shape(name)), lambda _, part: (part, *(0 for _ in plan.axes[name])))

    got = pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(tiles, parts),
        in_specs=[{n: tokens(n) for n in tall}, whole],
        out_specs={n: tokens(n) for n in made} | {n: of_span(n) for n in sums},
        out_shape={n: jax.ShapeDtypeStruct((plan.tokens, plan.columns(n)), jnp.bfloat16) for n in made}
        | {n: jax.ShapeDtypeStruct((parts, *plan.shape(n)), jnp.float32) for n in sums},
        compiler_params=plgpu.CompilerParams(
            num_warps=plan.blocks.summing_warps if kernel is _weights_kernel else plan.blocks.warps, num_stages=plan.blocks.stages
        ),
        interpret=plan.interpret,
    )(tall, w)
    return {n: a.sum(0) if n in sums else a for n, a in got.items()}


def backward(plan: Plan, tall: dict[str, Array], upto: Array, weights: tuple[Array, ...]) -> tuple[Array, ...]:
    """The gradients of x, and of the weights in their order. `tall` has x, the block's gradient dy, and what the plan reads besides."""
    w = plan.pad(weights) | {"read": plan.tokens_read(upto)}
    if plan.at_once:
        made = call(plan, _weights_kernel, tall, w, ["dx"], plan.span, plan.narrow + plan.wide)
    else:
        made = call(plan, _input_kernel, tall, w, ["dx"], plan.blocks.rows, plan.narrow)
        made |= call(plan, _weights_kernel, tall, w, [], plan.span, plan.wide, plan.tiles)
    return made["dx"], *(made[n][tuple(map(slice, a.shape))].astype(a.dtype) for n, a in zip(plan.names, weights, strict=True))
