"""Drawing batches and held-out sets that respect a task's split. Nothing here ever lets a content leak."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from scipy.stats import binom

from elegans.tasks.base import PARTS, Task
from elegans.types import Example

SHORTFALL = 1e-6  # accepted chance that a batch has to leave a row unscored
TRIES = 2**16  # redraws of one held-out example before it is given up (left unscored)


class TaskData(NamedTuple):
    """What a run's task prepared on the host: its own arrays and the table of a split of a small space."""

    prepared: Any
    table: Any


def prepare(task: Task) -> TaskData:
    """Everything that drawing examples needs, as arrays. Raises `Invalid` where a part of the split is empty."""
    return TaskData(task.prepare(), task.split_table())


def candidates(task: Task, rows: int) -> int:
    """How many candidates give `rows` training rows with probability 1 - SHORTFALL."""
    share = task.train_share
    if share is None:
        return rows
    low = high = rows
    while binom.cdf(rows - 1, high, share) > SHORTFALL:
        high *= 2
    while low < high:  # bisection: the shortfall falls as candidates are added
        middle = (low + high) // 2
        enough = binom.cdf(rows - 1, middle, share) <= SHORTFALL
        low, high = (low, middle) if enough else (middle + 1, high)
    return low


def train_batch(task: Task, key: jax.Array, rows: int, step: Any, progress: Any, data: TaskData) -> Example:
    """A batch of training rows: the first `rows` admissible ones of slightly more candidates.

    One fixed-size draw, no loop: a loop whose length depends on data would stop a GPU at every step.
    Where fewer candidates are admissible, the missing rows are left unscored.
    """
    keys = jax.random.split(key, candidates(task, rows))
    drawn = task.batch(keys, step, progress, data.prepared)
    if task.train_share is None:
        return drawn
    admitted = jax.vmap(lambda e: task.part(e, data.table))(drawn) == 0
    order = jnp.argsort(~admitted, stable=True)[:rows]
    kept = jax.tree.map(lambda a: a[order], drawn)
    return dataclasses.replace(kept, scored=kept.scored & admitted[order][:, None])


def draw_set(task: Task, part: str | Int[Array, ""], key: jax.Array, rows: int, data: TaskData) -> Example:
    """`rows` independent examples of one part of the split (its name, or its place in `PARTS`), each redrawn until it belongs to it."""
    wanted = PARTS.index(part) if isinstance(part, str) else part

    def one(key: jax.Array, row: Int[Array, ""]) -> Example:
        def sample(tries: Int[Array, ""]) -> Example:
            return task.draw(key, row, tries, data.prepared)

        if task.train_share is None:
            return sample(jnp.int32(0))

        def again(carry: tuple[Array, Array, Example]) -> tuple[Array, Array, Example]:
            example = sample(carry[0])
            return carry[0] + 1, task.part(example, data.table) == wanted, example

        none = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(sample, jnp.int32(0)))
        _, found, example = jax.lax.while_loop(lambda c: ~c[1] & (c[0] <= TRIES), again, (jnp.int32(0), jnp.bool_(False), none))
        return dataclasses.replace(example, scored=example.scored & found)

    return jax.vmap(one)(jax.random.split(key, rows), jnp.arange(rows))


def compact(tokens: Array, vocab: int) -> Array:
    """Tokens in the smallest integer type that holds them, for keeping sets on the device."""
    return tokens.astype(np.uint8 if vocab <= 256 else np.uint16 if vocab <= 2**16 else np.int32)
