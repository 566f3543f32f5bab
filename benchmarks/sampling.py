"""What drawing examples costs beside training on them, for every task that ships.

    python benchmarks/sampling.py                                # a GPU: d 64, 4 layers, batch 64, 64 replicas
    python benchmarks/sampling.py --replicas 2 --d-model 16 --batch 8 --dtype float32 --tasks addition,parity

Both are timed in one process: whole training steps (drawing included), and the drawing alone as a loop of the same length, of as many
steps at once as training draws.
Programs compile in threads beforehand. Prints a Markdown table; the best of three timings each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import elegans as el
from elegans.specs import find_kind, kinds
from elegans.tasks import Task
from elegans.training.cohort import Programs
from elegans.training.device import choose
from elegans.training.step import RunData, draw_batch


def drawing(programs: Programs) -> Any:
    """A program that draws the batches of some steps for every replica, and returns a sum that hangs on all of them."""
    runs, data, ahead = programs.runs, RunData(programs.task), programs.ahead

    def body(i: jax.Array, total: jax.Array) -> jax.Array:
        rows = jax.vmap(lambda step: jax.vmap(lambda run: draw_batch(run, step, data))(runs))(i * ahead + jnp.arange(ahead))
        return total + rows.tokens.sum((0, 2, 3)) + rows.scored.sum((0, 2, 3))

    zero = jnp.zeros(len(jax.tree.leaves(runs)[0]), jnp.int32)
    return jax.jit(lambda n: jax.lax.fori_loop(0, n // ahead, body, zero)).lower(np.int32(1)).compile()


def best(function: Callable[[], Any]) -> float:
    """Seconds of the fastest of three calls, after one that is not counted."""
    jax.block_until_ready(function())
    taken = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(function())
        taken.append(time.perf_counter() - began)
    return min(taken)


def programs_of(task: Task, asked: argparse.Namespace) -> tuple[Programs, Any]:
    """The training and the drawing program of a cohort on a task."""
    model = el.Transformer(layers=asked.layers, d_model=asked.d_model, heads=4, dtype=asked.dtype)
    runs = el.grid(el.Run(task=task, model=model, batch=asked.batch, steps=10**6), {"seed": range(asked.replicas)})
    programs = Programs(runs, choose(asked.device), 1)
    programs.compile_all()
    return programs, drawing(programs)


def main() -> None:
    """Parse, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-model", 64), ("layers", 4), ("batch", 64), ("replicas", 64), ("steps", 24), ("threads", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default=None)
    parser.add_argument("--tasks", default=",".join(kinds(Task)))
    asked = parser.parse_args()
    names = asked.tasks.split(",")
    print(f"{choose(asked.device).device_kind}: d {asked.d_model}, {asked.layers} layers, batch {asked.batch}, {asked.replicas} replicas\n")
    print("| task | tokens | step, ms | drawing alone, ms | share |\n|---|---|---|---|---|")
    with ThreadPoolExecutor(asked.threads) as pool:
        waiting = {name: pool.submit(programs_of, find_kind(Task, name)(), asked) for name in names}
        made = {name: future.result() for name, future in waiting.items()}
    for name, (programs, drawn) in made.items():
        states = programs.start()

        def train(programs: Programs = programs, states: Any = states) -> Any:
            return programs.chunk(jax.tree.map(jnp.copy, states), 0, asked.steps)

        step = best(train) / asked.steps
        alone = best(lambda drawn=drawn: drawn(np.int32(asked.steps))) / asked.steps
        print(f"| {name} | {programs.runs.task.positions} | {1e3 * step:.2f} | {1e3 * alone:.3f} | {alone / step:.1%} |", flush=True)


if __name__ == "__main__":
    main()
