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
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elegans.models import fused
from elegans.models.fused import dot


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What one program takes. `rows` and `tile` are powers of two, of 16 and more."""

    rows: int = 64  # tokens at a time
    tile: int = 64  # hidden units at a time
    span: int = 1024  # tokens that one program sums a weight's gradient over, about
    warps: int = 4
    summing_warps: int = 4  # of a program that sums weights' gradients
    stages: int = 2  # loads under way ahead of the products
    kept: int = 12_288  # float32 sums in a program's registers, up to which one kernel makes all gradients


# by padded d_model, the quickest of those tried on an H100 (docs/speed.md)
BLOCKS = {16: Blocks(rows=32), 32: Blocks(warps=8), 64: Blocks(), 128: Blocks(tile=32)}
WIDEST = max(BLOCKS)  # d_model above which a program's registers do not hold its tokens


@dataclasses.dataclass(frozen=True)
class Formula:
    """What the block computes: the norm centres or not, and `activation` is one of the MLP's or "swiglu"."""

    centred: bool
    eps: float
    activation: str


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


# ---- sizes

AXES = {"w": "d", "b": "d", "W_gate": "df", "W_in": "df", "W_out": "fd", "b_gate": "f", "b_in": "f", "b_out": "d"}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Everything static about a call."""

    formula: Formula
    names: tuple[str, ...]  # of the weights, in the order in which they are passed
    d: int  # d_model
    width: int  # d_model, padded: a power of two, and no less than a product can take
    f: int  # hidden units
    blocks: Blocks
    interpret: bool
    tokens: int = 0  # of the long row

    def of(self, x: Array) -> _Plan:
        """The same for a row of this length."""
        return dataclasses.replace(self, tokens=x.shape[0])

    @property
    def tiles(self) -> int:
        return -(-self.f // self.blocks.tile)

    @property
    def first(self) -> tuple[str, ...]:
        """The weights that make hidden units, in the order of the activation's arguments."""
        return tuple(name for name in ("W_gate", "W_in") if name in self.names)

    @property
    def at_once(self) -> bool:
        """Whether one program keeps the sums of all weights' gradients."""
        return (len(self.first) + 1) * self.width * self.blocks.tile * self.tiles <= self.blocks.kept

    @property
    def span(self) -> int:
        """Tokens that a program sums over: whole blocks of rows, alike for all programs."""
        parts = -(-self.tokens // self.blocks.span)
        return -(-self.tokens // (parts * self.blocks.rows)) * self.blocks.rows

    def shape(self, name: str) -> tuple[int, ...]:
        """A weight's shape within the kernel."""
        sizes = {"d": self.width, "f": self.blocks.tile * self.tiles}
        return tuple(sizes[axis] for axis in AXES[name])

    def pad(self, weights: tuple[Array, ...]) -> dict[str, Array]:
        """The weights by name as the kernel takes them: matrices in bfloat16, zeros up to whole tiles."""
        named = dict(zip(self.names, weights, strict=True))
        cast = {name: a.astype(jnp.bfloat16 if name.startswith("W_") else jnp.float32) for name, a in named.items()}
        return {n: jnp.pad(a, [(0, to - size) for size, to in zip(a.shape, self.shape(n), strict=True)]) for n, a in cast.items()}


# ---- inside the kernels: arrays of [row, d_model] and [row, hidden], float32 unless they enter a product


def _mask(plan: _Plan, start: Array, span: int) -> Array | None:
    """Which elements of a block of tokens there are, of programs that each take a span of them; none where all are."""
    rows = (start + jnp.arange(plan.blocks.rows) < plan.tokens)[:, None] if plan.tokens % span else None
    columns = (jnp.arange(plan.width) < plan.d)[None, :] if plan.d < plan.width else None
    return columns if rows is None else rows if columns is None else rows & columns


def _read(ref: Any, at: Any, mask: Array | None) -> Array:
    from jax.experimental.pallas import triton as plgpu

    return plgpu.load(ref.at[at, :], mask=mask, other=None if mask is None else 0.0)


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


def _first(plan: _Plan, w: Any, at: Any, normed: Array) -> tuple[Array, ...]:
    """The hidden units `at`, before their activation."""
    biases = {name: w[name.replace("W", "b")][at][None, :] for name in plan.first} if "b_in" in w else {}
    made = {name: dot(normed, w[name][:, at]) for name in plan.first}
    return tuple(made[name] + biases[name] if biases else made[name] for name in plan.first)


def _pulled(plan: _Plan, w: Any, at: Any, normed: Array, dy: Array) -> tuple[Array, tuple[Array, ...]]:
    """The hidden units `at`, and the gradients with respect to what they are made from."""
    hidden, pull = jax.vjp(ACTIVATIONS[plan.formula.activation], *_first(plan, w, at, normed))
    made = pull(dot(dy, w["W_out"][at, :], trans_b=True))
    return hidden.astype(jnp.bfloat16), tuple(g.astype(jnp.bfloat16) for g in made)


def _to_normed(plan: _Plan, w: Any, at: Any, pulled: tuple[Array, ...]) -> Array:
    """What the hidden units `at` add to the gradient of what the MLP reads."""
    parts = [dot(g, w[name][:, at], trans_b=True) for name, g in zip(plan.first, pulled, strict=True)]
    return functools.reduce(jnp.add, parts)


def _of_weights(plan: _Plan, normed: Array, dy: Array, hidden: Array, pulled: tuple[Array, ...]) -> dict[str, Array]:
    """Gradients of a tile of the MLP's weights, summed over these tokens."""
    made = {name: dot(normed, g, trans_a=True) for name, g in zip(plan.first, pulled, strict=True)}
    made["W_out"] = dot(hidden, dy, trans_a=True)
    if "b_in" in plan.names:
        made |= {name.replace("W", "b"): g.astype(jnp.float32).sum(0) for name, g in zip(plan.first, pulled, strict=True)}
    return made


def through_norm(plan: Any, w: Any, dn: Array, dy: Array, hat: Array, factor: Array) -> tuple[Array, dict[str, Array]]:
    """The gradient of x, and those of the weights of width d_model, summed over these tokens."""
    g, dy = dn * w["w"][...][None, :], dy.astype(jnp.float32)
    inner = g - hat * ((g * hat).sum(-1)[:, None] / plan.d)
    inner = inner - g.sum(-1)[:, None] / plan.d if plan.formula.centred else inner
    made = {"w": (dn * hat).sum(0), "b": dn.sum(0) if "b" in w else None, "b_out": dy.sum(0) if "b_out" in w else None}
    return dy + factor * inner, {name: a for name, a in made.items() if a is not None}


# ---- the kernels: `w` and `out` are references by name


def _forward_kernel(plan: _Plan, x_ref: Any, w: Any, out: Any) -> None:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    rows = pl.ds(0, plan.blocks.rows)
    mask = _mask(plan, pl.program_id(1) * plan.blocks.rows, plan.blocks.rows)
    x = _read(x_ref, rows, mask)
    normed, _, _ = norm(plan, w, x)

    def add(i: Array, y: Array) -> Array:
        at = pl.ds(i * plan.blocks.tile, plan.blocks.tile)
        hidden = ACTIVATIONS[plan.formula.activation](*_first(plan, w, at, normed))
        return y + dot(hidden.astype(jnp.bfloat16), w["W_out"][at, :])

    y = jax.lax.fori_loop(0, plan.tiles, add, jnp.zeros(x.shape, jnp.float32))
    y = y + w["b_out"][...][None, :] if "b_out" in w else y
    plgpu.store(out["x"].at[rows, :], (x.astype(jnp.float32) + y).astype(x.dtype), mask=mask)


def _input_kernel(plan: _Plan, x_ref: Any, dy_ref: Any, w: Any, out: Any) -> None:
    """The gradient of a block of tokens, and its part of the sums of width d_model."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    rows = pl.ds(0, plan.blocks.rows)
    mask = _mask(plan, pl.program_id(1) * plan.blocks.rows, plan.blocks.rows)
    dy = _read(dy_ref, rows, mask)
    normed, hat, factor = norm(plan, w, _read(x_ref, rows, mask))

    def add(i: Array, dn: Array) -> Array:
        at = pl.ds(i * plan.blocks.tile, plan.blocks.tile)
        return dn + _to_normed(plan, w, at, _pulled(plan, w, at, normed, dy)[1])

    dn = jax.lax.fori_loop(0, plan.tiles, add, jnp.zeros(hat.shape, jnp.float32))
    dx, sums = through_norm(plan, w, dn, dy, hat, factor)
    plgpu.store(out["x"].at[rows, :], dx.astype(out["x"].dtype), mask=mask)
    for name, a in sums.items():
        out[name][...] = a


def _weights_kernel(plan: _Plan, x_ref: Any, dy_ref: Any, w: Any, out: Any) -> None:
    """Gradients of weights, summed over a span of tokens: one tile's, or all and the tokens' gradients with them."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    count = plan.tiles if plan.at_once else 1
    tiles = [pl.ds((i if plan.at_once else pl.program_id(0)) * plan.blocks.tile, plan.blocks.tile) for i in range(count)]
    start = pl.program_id(1) * plan.span

    def step(j: Array, sums: Any) -> Any:
        rows = pl.ds(j * plan.blocks.rows, plan.blocks.rows)
        mask = _mask(plan, start + j * plan.blocks.rows, plan.span)
        dy = _read(dy_ref, rows, mask)
        normed, hat, factor = norm(plan, w, _read(x_ref, rows, mask))
        made, dn = [], jnp.zeros(hat.shape, jnp.float32)
        for at in tiles:
            hidden, pulled = _pulled(plan, w, at, normed, dy)
            made.append(_of_weights(plan, normed, dy, hidden, pulled))
            dn = dn + _to_normed(plan, w, at, pulled) if plan.at_once else dn
        if plan.at_once:
            dx, narrow = through_norm(plan, w, dn, dy, hat, factor)
            plgpu.store(out["x"].at[rows, :], dx.astype(out["x"].dtype), mask=mask)
            made.append(narrow)
        return jax.tree.map(jnp.add, sums, made)

    zeros = [_zeros(plan, wide=True) for _ in tiles] + ([_zeros(plan, wide=False)] if plan.at_once else [])
    sums = jax.lax.fori_loop(0, plan.span // plan.blocks.rows, step, zeros)
    for at, tile in zip(tiles, sums, strict=False):
        for name, a in tile.items():
            out[name][{"df": (slice(None), at), "fd": (at, slice(None)), "f": (at,)}[AXES[name]]] = a
    for name, a in sums[-1].items() if plan.at_once else ():
        out[name][...] = a


def _zeros(plan: _Plan, wide: bool) -> dict[str, Array]:
    """Where the sums of weights along one tile start (`wide`), or of those of width d_model only."""
    sizes = {"d": plan.width, "f": plan.blocks.tile}
    shapes = {name: tuple(sizes[axis] for axis in AXES[name]) for name in plan.names if ("f" in AXES[name]) == wide}
    return {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}


# ---- calling them


def _call(plan: _Plan, kernel: Any, tall: tuple[Array, ...], weights: dict[str, Array], span: int, outs: tuple[str, ...]) -> Any:
    """A kernel on a grid of [tile, span of tokens]: `tall` arrays by span, all weights, and of `outs` "x" and the sums of each span."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    parts = -(-plan.tokens // span)
    tokens = pl.BlockSpec((span, plan.width), lambda _, part: (part, 0))
    whole = {n: pl.BlockSpec(a.shape, lambda *_, axes=AXES[n]: tuple(0 for _ in axes)) for n, a in weights.items()}
    sums = [n for n in outs if n != "x"]
    specs = {n: pl.BlockSpec((None, *plan.shape(n)), lambda _, part, axes=AXES[n]: (part, *(0 for _ in axes))) for n in sums}
    shapes = {n: jax.ShapeDtypeStruct((parts, *plan.shape(n)), jnp.float32) for n in sums}
    warps = plan.blocks.summing_warps if kernel is _weights_kernel else plan.blocks.warps
    made = pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(1 if "x" in outs else plan.tiles, parts),
        in_specs=[*[tokens] * len(tall), whole],
        out_specs=specs | ({"x": tokens} if "x" in outs else {}),
        out_shape=shapes | ({"x": jax.ShapeDtypeStruct(tall[0].shape, tall[0].dtype)} if "x" in outs else {}),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=plan.blocks.stages),
        interpret=plan.interpret,
    )(*tall, weights)
    return {n: a if n == "x" else a.sum(0) for n, a in made.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one(plan: _Plan, x: Array, *weights: Array) -> Array:
    """The block for one long row."""
    plan = plan.of(x)
    return _call(plan, _forward_kernel, (x,), plan.pad(weights), plan.blocks.rows, ("x",))["x"]


def _one_forward(plan: _Plan, x: Array, *weights: Array) -> tuple[Array, tuple[Array, ...]]:
    return _one(plan, x, *weights), (x, *weights)


def _one_backward(plan: _Plan, kept: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    x, weights = kept[0], kept[1:]
    plan = plan.of(x)
    inside = plan.pad(weights)
    narrow = ("x", *(n for n in plan.names if AXES[n] == "d"))
    wide = tuple(n for n in plan.names if AXES[n] != "d")
    if plan.at_once:
        made = _call(plan, _weights_kernel, (x, dy), inside, plan.span, narrow + wide)
    else:
        made = _call(plan, _input_kernel, (x, dy), inside, plan.blocks.rows, narrow)
        made |= _call(plan, _weights_kernel, (x, dy), inside, plan.span, wide)
    return made["x"], *(made[n][tuple(map(slice, a.shape))].astype(a.dtype) for n, a in zip(plan.names, weights, strict=True))


_one.defvjp(_one_forward, _one_backward)
_rows = fused.rows_as_one(_one, "mlp_block")


def block(
    formula: Formula, norm: dict[str, Array], mlp: dict[str, Array], x: Float[Array, "position d_model"], interpret: bool = False
) -> Float[Array, "position d_model"]:
    """x + mlp(norm(x)), x in bfloat16. `interpret` runs the kernel's meaning without a GPU."""
    weights = norm | mlp
    names = tuple(name for name in AXES if name in weights)
    d, f = weights["W_in"].shape
    width = max(16, 1 << (d - 1).bit_length())
    plan = _Plan(formula, names, d, width, f, BLOCKS[width], interpret)
    return _rows(plan, x, *(weights[name] for name in names))
