"""x + attention(norm(x)) in one GPU kernel forward and one backward, for rows of one block, written in Pallas for Triton.

Around the kernels of `fused_attention.py` the formula still writes normed rows, projections and what the heads mix, and reads them again.
Here a program takes a whole row through everything, a tile of heads after the other. Backward it makes all of it anew, and writes
the gradient of the row, and what the gradients of the weights are products of: those are one product each over all tokens of all
rows (`fused.rows_as_one`), which needs no kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from elegans.models import fused
from elegans.models.fused import dot
from elegans.models.fused_heads import TABLES, Blocks, Plan, Program, diagonal
from elegans.models.fused_tokens import Formula, norm, padded, through_norm

LONGEST, WIDEST_HEAD = 64, 32  # positions and d_head above which registers do not hold a row
NARROWEST, WIDEST = 33, 64  # d_model: narrower models are quicker in `fused_projections.py`, and above 64 registers do not hold a row
BLOCKS = Blocks(rows=64, warps=4)  # eight warps or one stage take 1.1 to 3 times as long


def fits(length: int, d: int, d_head: int) -> bool:
    """Whether the kernel gains for rows of this size."""
    return length <= LONGEST and NARROWEST <= d <= WIDEST and d_head <= WIDEST_HEAD


@dataclasses.dataclass(frozen=True)
class _Plan(Plan):
    """Everything static about a call."""

    d: int  # d_model
    formula: Formula  # its activation is nobody's
    names: tuple[str, ...]  # of the operands

    @property
    def width(self) -> int:
        """d_model, padded: a power of two, and no less than a product can take."""
        return padded(self.d)

    @property
    def blocks(self) -> Blocks:
        return dataclasses.replace(BLOCKS, rows=min(BLOCKS.rows, padded(self.length)))

    def named(self, operands: tuple[Array, ...]) -> dict[str, Array]:
        return dict(zip(self.names, operands, strict=True))

    def pack(self, attn: dict[str, Array]) -> dict[str, Array]:
        """Attention's weights by tile of heads, zeros where a tile has no head: queries | keys | values, and what goes out."""
        spare = self.tiles * self.together - self.heads

        def tiled(w: Array) -> Array:  # [head, d_head, ...] to [tile, column, ...]
            w = jnp.pad(w, [(0, spare)] + [(0, 0)] * (w.ndim - 1))
            w = w.reshape(self.tiles, self.together * self.d_head, *w.shape[2:])
            return jnp.pad(w, [(0, 0), (0, self.tile - w.shape[1])] + [(0, self.width - self.d)] * (w.ndim - 2))

        made = {"W_in": jnp.stack([tiled(attn[f"W_{n}"].swapaxes(1, 2)).swapaxes(1, 2) for n in "QKV"]), "W_out": tiled(attn["W_O"])}
        made = {name: w.astype(jnp.bfloat16) for name, w in made.items()}
        if "b_O" in attn:
            made |= {"b_in": jnp.stack([tiled(attn[f"b_{n}"]) for n in "QKV"]), "b_out": jnp.pad(attn["b_O"], (0, self.width - self.d))}
        return made


# ---- inside the kernels: `row` and `out` are references by name


class _Program(Program):
    """One program: the arrays of its row by name."""

    @property
    def factor(self) -> Array:
        """What makes scores of products."""
        return self.row["scale"][0] * self.plan.d_head**-0.5

    def exponents(self, q: Array, k: Array) -> Array:
        """Scores as exponents of 2."""
        return dot(q, k, trans_b=True) * (self.factor * math.log2(math.e))


def _place(plan: _Plan) -> tuple[Any, Array, Array]:
    """Where a row lies in what the program sees, which of its elements there are, and which of its positions."""
    from jax.experimental import pallas as pl

    positions = (jnp.arange(plan.blocks.rows) < plan.length)[:, None]
    return (pl.ds(0, plan.blocks.rows), pl.ds(0, plan.width)), positions & (jnp.arange(plan.width) < plan.d)[None, :], positions


def _read(plan: _Plan, ref: Any) -> Array:
    from jax.experimental.pallas import triton as plgpu

    at, there, _ = _place(plan)
    return plgpu.load(ref.at[at], mask=there, other=0.0)


def _program(plan: _Plan, row: Any) -> _Program:
    return _Program(plan, row | {"tables": tuple(row[name] for name in TABLES if name in row)}, 0)


def _projected(program: _Program, normed: Array, i: Array | int) -> tuple[list[Array], Array, Array]:
    """Each head's queries of a tile, and keys and values of all of them."""
    made = [dot(normed, program.row["W_in"][part, i]) for part in range(3)]
    if "b_in" in program.row:
        made = [a + program.row["b_in"][part, i][None, :] for part, a in enumerate(made)]
    q, k, v = program.turn(0, made[0]), program.turn(0, made[1]), made[2]
    q, k, v = (a.astype(jnp.bfloat16) for a in (q, k, v))
    return program.heads(q), k, v


def _pattern(program: _Program, q: Array, k: Array) -> Array:
    exponents = jnp.where(diagonal(program.plan), program.exponents(q, k), -jnp.inf)
    weights = jnp.exp2(exponents - exponents.max(1)[:, None])
    return weights * (1 / weights.sum(1))[:, None]


def _over_tiles(plan: _Plan, step: Any, start: Array) -> Array:
    return jax.lax.fori_loop(0, plan.tiles, step, start) if plan.tiles > 1 else step(0, start)


def _forward_kernel(plan: _Plan, row: Any, out: Any) -> None:
    from jax.experimental.pallas import triton as plgpu

    program, x = _program(plan, row), _read(plan, row["x"])
    normed, _, _ = norm(plan, row, x)

    def add(i: Array | int, y: Array) -> Array:
        q, k, v = _projected(program, normed, i)
        z = program.joined([dot(_pattern(program, a, k).astype(jnp.bfloat16), v) for a in q])
        return y + dot(z.astype(jnp.bfloat16), row["W_out"][i])

    y = _over_tiles(plan, add, x.astype(jnp.float32))
    y = y + row["b_out"][...][None, :] if "b_out" in row else y
    at, there, _ = _place(plan)
    plgpu.store(out["x"].at[at], y.astype(x.dtype), mask=there)


def _through_tile(program: _Program, projected: tuple[list[Array], Array, Array], dz: Array) -> tuple[Array, tuple[Array, ...]]:
    """What the heads of a tile mix, and the gradients of their projections."""
    q, k, v = projected
    z, dq, dk, dv = (jnp.zeros(v.shape) for _ in range(4))
    for h, a in enumerate(q):
        pattern, dzh = _pattern(program, a, k), program.of_head(h, dz)
        rounded = pattern.astype(jnp.bfloat16)
        zh = program.of_head(h, dot(rounded, v))
        ds = (pattern * (dot(dzh, v, trans_b=True) - (zh * dzh).sum(1)[:, None])).astype(jnp.bfloat16)
        z, dv = z + zh, dv + dot(rounded, dzh, trans_a=True)
        dq, dk = dq + dot(ds, program.of_head(h, k)), dk + dot(ds, a, trans_a=True)
    dq, dk = (program.turn(0, g * program.factor, back=True) for g in (dq, dk))
    return z.astype(jnp.bfloat16), tuple(g.astype(jnp.bfloat16) for g in (dq, dk, dv))


def _backward_kernel(plan: _Plan, row: Any, out: Any) -> None:
    """The gradient of a row; its part of the sums of width d_model; and what the weights' gradients are products of."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    program, dy = _program(plan, row), _read(plan, row["dy"])
    normed, _, _ = norm(plan, row, _read(plan, row["x"]))
    at, there, positions = _place(plan)
    plgpu.store(out["normed"].at[at], normed, mask=there)

    def add(i: Array | int, dn: Array) -> Array:
        dz = dot(dy, row["W_out"][i], trans_b=True).astype(jnp.bfloat16)
        z, made = _through_tile(program, _projected(program, normed, i), dz)
        plgpu.store(out["z"].at[at[0], pl.ds(i * plan.tile, plan.tile)], z, mask=positions)
        for part, g in enumerate(made):
            plgpu.store(out["projected"].at[at[0], pl.ds((part * plan.tiles + i) * plan.tile, plan.tile)], g, mask=positions)
            dn = dn + dot(g, row["W_in"][part, i], trans_b=True)
        return dn

    dn = _over_tiles(plan, add, jnp.zeros(normed.shape))
    _, hat, factor = norm(plan, row, _read(plan, row["x"]))  # once more: it need not be kept in the meantime
    dx, sums = through_norm(plan, row, dn, dy, hat, factor)
    plgpu.store(out["x"].at[at], dx.astype(dy.dtype), mask=there)
    for name, a in sums.items():
        out[name][...] = a


# ---- calling them


def _call(plan: _Plan, kernel: Any, tall: dict[str, Array], shared: dict[str, Array], out: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """A kernel on a grid of rows: of `tall` arrays and of `out` those of theirs, and all that they share. `out` has shapes."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plgpu

    rows = tall["x"].shape[0] // plan.length
    sums = {"w", "b", "b_out"}

    def of_row(shape: tuple[int, ...], lead: int | None) -> Any:
        return pl.BlockSpec((lead, *shape), lambda r: (r, *(0 for _ in shape)))

    def whole(a: Array) -> Any:
        return pl.BlockSpec(a.shape, lambda _: (0,) * a.ndim)

    made = pl.pallas_call(
        functools.partial(kernel, plan),
        grid=(rows,),
        in_specs=[{n: of_row(a.shape[1:], plan.length) for n, a in tall.items()} | {n: whole(a) for n, a in shared.items()}],
        out_specs={n: of_row(shape, None if n in sums else plan.length) for n, shape in out.items()},
        out_shape={
            n: jax.ShapeDtypeStruct(
                (rows, *shape) if n in sums else (rows * plan.length, *shape), jnp.float32 if n in sums else jnp.bfloat16
            )
            for n, shape in out.items()
        },
        compiler_params=plgpu.CompilerParams(num_warps=plan.blocks.warps, num_stages=plan.blocks.stages),
        interpret=plan.interpret,
    )(tall | shared)
    return {n: a.sum(0) if n in sums else a for n, a in made.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one(plan: _Plan, x: Array, *operands: Array) -> Array:
    """The block for some rows, one after the other."""
    return _call(plan, _forward_kernel, {"x": x}, plan.named(operands), {"x": (plan.d,)})["x"]


def _one_forward(plan: _Plan, x: Array, *operands: Array) -> tuple[Array, tuple[Array, ...]]:
    return _one(plan, x, *operands), (x, *operands)


def _one_backward(plan: _Plan, kept: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    x, shared = kept[0], plan.named(kept[1:])
    columns = plan.tiles * plan.tile
    out: dict[str, tuple[int, ...]] = {"x": (plan.d,), "normed": (plan.d,), "z": (columns,), "projected": (3 * columns,)}
    out |= {n: (plan.width,) for n in ("w", "b", "b_out") if n in shared}
    made = _call(plan, _backward_kernel, {"x": x, "dy": dy}, shared, out)
    w_in, w_out = (
        jnp.einsum("ta,tb->ab", a, b, preferred_element_type=jnp.float32) for a, b in ((made["normed"], made["projected"]), (made["z"], dy))
    )
    w_in, w_out = (
        jnp.pad(w, axes) for w, axes in ((w_in, ((0, plan.width - plan.d), (0, 0))), (w_out, ((0, 0), (0, plan.width - plan.d))))
    )
    made["W_in"] = w_in.reshape(plan.width, 3, plan.tiles, plan.tile).transpose(1, 2, 0, 3)
    made["W_out"] = w_out.reshape(plan.tiles, plan.tile, plan.width)
    made["b_in"] = made["projected"].astype(jnp.float32).sum(0).reshape(3, plan.tiles, plan.tile)
    return made["x"], *(made[n].astype(a.dtype) if n in made else None for n, a in shared.items())


_one.defvjp(_one_forward, _one_backward)
_rows = fused.rows_as_one(_one, "attention_block")


def block(
    formula: Formula,
    weights: tuple[dict[str, Array], dict[str, Array]],
    x: Float[Array, "position d_model"],
    scale: float | Array,
    angles: Float[np.ndarray, "position pair"] | None,
    interpret: bool = False,
    upto: Int[Array, ""] | None = None,
) -> Float[Array, "position d_model"]:
    """x + attention(norm(x)) with the weights of both, x in bfloat16; `scale` and `angles` as in `fused_attention.attention`.

    Rows are of one block: all of it is made, also where only the first `upto` positions are read.
    """
    del upto
    norms, attn = weights
    heads, d, d_head = attn["W_Q"].shape
    plan = _Plan(x.shape[0], heads, d_head, interpret, d, formula, ())
    operands = {n: jnp.pad(w.astype(jnp.float32), (0, plan.width - d)) for n, w in norms.items()} | plan.pack(attn)
    operands |= {"scale": jnp.asarray(scale, jnp.float32).reshape(1), **dict(zip(TABLES, plan.tables(angles), strict=False))}
    return _rows(dataclasses.replace(plan, names=tuple(operands)), x, *operands.values())
