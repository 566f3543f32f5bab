"""Microseconds of the GPU kernels of a layer, by what one program takes (`Blocks`): how those in the sources were chosen.

    python benchmarks/blocks.py attention --sizes 4,132,1920 16,66,1280        # d_head, positions, rows; four heads
    python benchmarks/blocks.py around --sizes 16,132,30,64 128,132,30,8       # d_model, positions, replicas, rows of each
    python benchmarks/blocks.py mlp --sizes 16,132,30,64

`attention` times its own kernels, `around` x + attention(norm(x)) and `mlp` x + mlp(norm(x)), each forward and backward. Of all
tilings that compile the quickest are shown, then those in the sources.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from traces import kernel_times

from elegans.models import Attention, SwiGLU, fused_attention, fused_heads, fused_mlp, fused_projections
from elegans.models.base import Sizes
from elegans.models.fused_tokens import Formula, padded
from elegans.models.positions import Rotary

HEADS, SHOWN = 4, 5
TRACING = threading.Lock()  # tilings are looked up in the sources' tables while a program is traced
SIZES = {
    "attention": ["4,132,1920", "16,132,1920", "128,132,192"],
    "around": ["16,132,30,64", "64,132,30,64"],
    "mlp": ["16,132,30,64", "64,132,30,64"],
}


def weights_of(d: int, replicas: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A norm's weights, and those of attention and of an MLP."""
    sizes = Sizes(2, 2, d, HEADS, d // HEADS, False, None)
    shapes = jax.eval_shape(lambda key: Attention().init(key, sizes) | SwiGLU().init(key, sizes), jax.random.key(0))
    draw = functools.partial(jax.random.normal, jax.random.key(1))
    return {"w": jnp.ones((replicas, d))}, {name: 0.1 * draw((replicas, *a.shape)) for name, a in shapes.items()}


def attention(sizes: list[int], blocks: Any) -> tuple[Callable, tuple[Any, ...]]:
    """Rows' attention and its gradient."""
    e, length, rows = sizes
    drawn = functools.partial(jax.random.normal, jax.random.key(2), dtype=jnp.bfloat16)
    angles = Rotary().angles(length, e)
    if blocks:
        fused_heads.BLOCKS[fused_heads.entry(e)] = blocks

    def both(qkv: Any, dz: Any) -> Any:
        z, pull = jax.vjp(lambda x: fused_attention.attention(x, HEADS, 1.0, angles), qkv)
        return z, pull(dz)

    return jax.vmap(both), (drawn((rows, length, 3 * HEADS * e)), drawn((rows, length, HEADS * e)))


def tokens(part: str, sizes: list[int], blocks: Any) -> tuple[Callable, tuple[Any, ...]]:
    """Replicas' blocks around attention, or of the MLP, and their gradients."""
    d, length, replicas, rows = sizes
    module = fused_projections if part == "around" else fused_mlp
    if blocks:
        module.BLOCKS[padded(d)] = blocks
    norm, w = weights_of(d, replicas)
    x, dy = (jax.random.normal(jax.random.key(n), (replicas, rows, length, d), jnp.bfloat16) for n in (3, 4))

    def one(weights: Any, x: Any) -> Any:
        norm, w = weights
        if part == "mlp":
            return fused_mlp.block(Formula(False, 1e-5, "swiglu"), norm, {n: w[n] for n in ("W_gate", "W_in", "W_out")}, x)
        attn = {n: w[n] for n in ("W_Q", "W_K", "W_V", "W_O")}
        return fused_projections.block(Formula(False, 1e-5, ""), (norm, attn), x, 1.0, Rotary().angles(length, d // HEADS))

    def both(weights: Any, x: Any, dy: Any) -> Any:
        y, pull = jax.vjp(jax.vmap(one, (None, 0)), weights, x)
        return y, pull(dy)

    return jax.vmap(both), ((norm, w), x, dy)


def tilings(part: str) -> Iterator[Any]:
    """What is tried; first what the sources have (none)."""
    yield None
    if part == "attention":
        for rows, warps, stages in itertools.product((16, 32, 64), (1, 2, 4, 8), (1, 2)):
            yield fused_heads.Blocks(rows, warps, stages)
        return
    for rows, tile, warps, span, kept in itertools.product((32, 64, 128), (16, 32, 64), (1, 2, 4), (256, 512, 1024), (0, 12_288)):
        yield fused_mlp.Blocks(rows, tile, span, warps, warps, kept=kept)


def build(part: str, sizes: list[int], blocks: Any) -> Callable[[], Any] | None:
    """A compiled program; none where a tiling does not fit the device."""
    tables = fused_heads.BLOCKS, fused_mlp.BLOCKS, fused_projections.BLOCKS
    with TRACING:
        before = [dict(table) for table in tables]
        function, args = attention(sizes, blocks) if part == "attention" else tokens(part, sizes, blocks)
        try:
            lowered = jax.jit(function).lower(*args)
        finally:
            for table, was in zip(tables, before, strict=True):
                table.update(was)
    try:
        return functools.partial(lowered.compile(), *args)
    except jax.errors.JaxRuntimeError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=SIZES)
    parser.add_argument("--sizes", nargs="+", help="see above")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--most", type=int, help="tilings that are tried")
    asked = parser.parse_args()
    print(jax.devices()[0].device_kind)
    for text in asked.sizes or SIZES[asked.part]:
        sizes = [int(n) for n in text.split(",")]
        tried = list(itertools.islice(tilings(asked.part), asked.most))
        with ThreadPoolExecutor(asked.threads) as pool:
            programs = list(pool.map(functools.partial(build, asked.part, sizes), tried))
        fits = [(blocks, program) for blocks, program in zip(tried, programs, strict=True) if program]
        times = [micros for micros, _ in kernel_times([program for _, program in fits])]
        rows = sorted(zip((sum(t.values()) for t in times), times, (b for b, _ in fits), strict=True), key=lambda row: row[0])
        print(f"{asked.part} {text}: {len(rows)} of {len(tried)} tilings fit")
        for total, each, blocks in [*rows[:SHOWN], *(row for row in rows if row[2] is None)]:
            ours = {name: round(t, 1) for name, t in each.items() if name.startswith("_")}
            print(f"  {total:8.1f} us  {blocks or 'as in the sources'}  {ours}")


if __name__ == "__main__":
    main()
