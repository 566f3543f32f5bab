"""What a task's loss is worth, by counting rows: for tasks whose law has no short closed form, and to check those that have one."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from elegans.randomness import Purpose, key_for
from elegans.types import Example

if TYPE_CHECKING:
    from elegans.tasks.base import Task

AT_ONCE = 2**10  # rows drawn side by side
ROWS = 2**16  # a plateau of 20 positions is then known to about 1e-3 nats


def rows(task: Task, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and scored marks of rows of the unsplit law, [row, position]."""
    keys = jax.random.split(key_for(seed, Purpose.INSTRUMENT), count)

    @jax.jit
    def draw(keys: jax.Array, data: Any) -> Example:  # not all at once: the longest rows take a megabyte each
        return jax.lax.map(lambda key: task.sample(key, data), keys, batch_size=AT_ONCE)

    drawn = draw(keys, task.prepare())
    return np.asarray(drawn.tokens), np.asarray(drawn.scored)


def aligned(tokens: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same rows, turned so that each begins with its first scored token: where outputs begin differs in some tasks."""
    turn = (np.arange(scored.shape[1]) + scored.argmax(1)[:, None]) % scored.shape[1]
    return np.take_along_axis(tokens, turn, 1), np.take_along_axis(scored, turn, 1)


class Counted(NamedTuple):
    """What counting rows says of a task."""

    scored: float  # mean number of scored tokens
    end: float  # mean number of tokens up to the last scored one
    plateau: float  # nats per scored token


@functools.cache
def counted(task: Task, count: int = ROWS) -> Counted:
    """Means and plateau from one draw of rows."""
    return of_rows(*rows(task, count), task.vocab_size)


def of_rows(tokens: Int[np.ndarray, "row position"], scored: Bool[np.ndarray, "row position"], vocab: int) -> Counted:
    """Means and plateau of rows.

    The plateau is the best loss that sees only the output position, from counts of tokens at every position. Positions are
    counted from the first scored token. The entropy of counted shares is too small by about (symbols - 1) / (2 rows)
    a position; that much is added (Miller 1955, "Note on the bias of information estimates").
    """
    ends = scored.shape[1] - scored[:, ::-1].argmax(1)
    means = float(scored.sum(1).mean()), float(ends.mean())
    tokens, scored = aligned(tokens, scored)
    counts = np.stack([((tokens == v) & scored).sum(0) for v in range(vocab)])  # [vocab, position]
    total = counts.sum(0)
    nats = total * np.log(np.maximum(total, 1)) - (counts * np.log(np.maximum(counts, 1))).sum(0)
    bias = np.maximum((counts > 0).sum(0) - 1, 0) / 2
    return Counted(*means, float((nats + bias).sum() / total.sum()))


def plateau(task: Task, count: int = ROWS) -> float:
    """Best loss that sees only the output position, nats per scored token."""
    return counted(task, count).plateau


def means(task: Task, count: int = ROWS) -> tuple[float, float]:
    """Mean number of scored tokens of a row, and mean number of tokens up to the last scored one."""
    return counted(task, count)[:2]
