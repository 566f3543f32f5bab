"""What one replica does at an evaluation: its held-out examples, and its scores on them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from elegans.errors import Invalid
from elegans.randomness import Purpose, key_for
from elegans.tasks.base import PARTS
from elegans.tasks.sampling import TaskData, compact, draw_set
from elegans.training.run import Run
from elegans.training.step import logits_of, params_of, tallies
from elegans.types import Example

BLOCK = 64  # rows evaluated at a time, or a batch where that is more: a small batch leaves a device idle


class HeldOut(NamedTuple):
    """A run's validation and test examples."""

    validation: Example
    test: Example


def draw_held_out(run: Run, task: TaskData) -> HeldOut:
    """The run's held-out examples: functions of its data seed alone."""

    parts = {"validation": Purpose.VALIDATION, "test": Purpose.TEST}
    keys = jnp.stack([key_for(run.data_seed, purpose) for purpose in parts.values()])
    index = jnp.array([PARTS.index(part) for part in parts])
    rows = jax.vmap(lambda part, key: draw_set(run.task, part, key, run.record.examples, task))(index, keys)
    both = Example(compact(rows.tokens, run.task.vocab_size), rows.scored)
    return HeldOut(*(jax.tree.map(lambda a, i=i: a[i], both) for i in range(len(parts))))


class Evaluation(NamedTuple):
    """Scores of one replica on a set of examples; NaN where it scores no token."""

    loss: Float[Array, ""]  # nats per scored token
    accuracy: Float[Array, ""]  # per scored token
    exact_match: Float[Array, ""]  # per row
    position_loss: Float[Array, " position"]  # nats, of predicting the token at each position; NaN where none is scored


def evaluate(run: Run, vector: Float[Array, " parameter"], rows: Example) -> Evaluation:
    """Scores on a set, in blocks so that memory does not grow with the set."""
    params = params_of(run, vector)
    total = rows.tokens.shape[0]
    size = min(max(run.batch, BLOCK), total)
    padding = -total % size
    blocks = jax.tree.map(lambda a: jnp.pad(a, [(0, padding), (0, 0)]).reshape(-1, size, a.shape[1]), rows)

    def block(rows: Example) -> tuple[Array, Array, Array, Array]:
        rows = dataclasses.replace(rows, tokens=rows.tokens.astype(jnp.int32))
        nats, right, counted, exact = tallies(logits_of(run, params, rows.tokens, read=rows.scored), rows)
        return (nats * counted).sum(0), right.sum(), exact.sum(), counted.sum(0)

    nats, right, exact, counted = (x.sum(0) for x in jax.lax.map(block, blocks))
    some = counted.sum() > 0
    tokens, whole = (jnp.where(some, jnp.maximum(n, 1), jnp.nan) for n in (counted.sum(), rows.scored.any(1).sum()))
    by_position = jnp.where(counted > 0, nats / jnp.maximum(counted, 1), jnp.nan)
    return Evaluation(nats.sum() / tokens, right / tokens, exact / whole, by_position)


def check_scored(rows: HeldOut) -> None:
    """Raises `Invalid` where some run's set, of arrays [run, row, position], has no scored token."""
    for part, drawn in rows._asdict().items():
        if not np.asarray(drawn.scored).any((1, 2)).all():
            raise Invalid("split", part, "no example of this part was found: lengthen the task, or say split=none")
