"""Sorting of small numbers, in numeric order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from scipy.special import entr
from scipy.stats import binom

from elegans.specs import field, spec
from elegans.tasks.sequences import SequenceTask, answered, sequence_content, sequence_contents
from elegans.types import Example, Truth

VALUES = 16


@spec
class Sorting(SequenceTask):
    """The numbers of a row again, smallest first; independent and uniform over 0 .. 15.

    length=4:  7 10 2 7 = 2 7 7 10 $
    scored:             . . . . .  .
    rank       0 1 0 2, numbers before it that are at most as large, read at each number (its place in insertion sort)
    repeat     0 1 0, whether the next number equals the one just written, read at every written one but the last
    """

    length: int = field(16, "numbers to sort", ge=1, le=4096)

    @property
    def positions(self) -> int:
        return 2 * self.length + 2

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        n = self.length
        x = jax.random.randint(key, (n,), 0, VALUES)
        place = jnp.arange(n)
        smaller = (x[:, None] < jnp.arange(1, VALUES)).sum(0)  # numbers below 1, 2, ... 15
        ordered = (smaller <= place[:, None]).sum(1)  # place k holds v where at most k numbers are below v, and more below v + 1
        tokens, scored = answered(x, ordered, jnp.int32(n))
        before = (x <= x[:, None]) & (place < place[:, None])
        repeat = (ordered[1:] == ordered[:-1]).astype(jnp.int32)
        truth = {"rank": Truth(before.sum(1), place, "number"), "repeat": Truth(repeat, n + 1 + place[:-1])}
        return Example(tokens, scored, truth)

    def content(self, example: Example) -> Int[Array, " words"]:
        return sequence_content(example.tokens[: self.length], VALUES)

    @property
    def contents(self) -> int | None:
        return sequence_contents(self.length, VALUES)

    def scored_tokens(self) -> float:
        return float(self.length + 2)

    def mean_positions(self) -> float:
        return float(self.positions)

    def plateau(self) -> float | None:
        """Mean entropy of the order statistics: the k-th smallest exceeds v where fewer than k numbers, each with (v + 1) / 16, do not."""
        n = self.length
        exceeds = binom.cdf(np.arange(n)[:, None], n, np.arange(VALUES + 1) / VALUES)  # [k - 1, v + 1]
        return float(entr(-np.diff(exceeds)).sum()) / self.scored_tokens()
