"""Activity selection: the language whose loud feature is the start that belongs to each end."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from elegans.specs import field, spec
from elegans.tasks.sequences import SequenceTask, answered, sequence_content, sequence_contents, shuffled_multiset
from elegans.types import Example, Truth

LATEST = 9  # the last start, and the longest duration; the first and shortest are 1


@spec
class ActivitySelection(SequenceTask):
    """As many activities as fit one after another, greedily by their ends: all starts, all ends, then the chosen pairs.

    length=4:    1 4 2 7 3 8 9 8 = 1 3 4 8 $ $ $ $ $     activities 1-3, 4-8, 2-9, 7-8
    scored:                      . . . . . .
    start_time   1 4 2 7, read at the ends 3 8 9 8

    Of equal ends the first in the row is tried first; an activity may start when the last one ends.
    Starts and durations are one multiset, uniform over multisets of 1 .. 9, in random order. Rows are
    padded with `$`.
    """

    length: int = field(16, "activities offered", ge=1, le=4096)

    @property
    def positions(self) -> int:
        return 4 * self.length + 2

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        n = self.length
        start, duration = 1 + shuffled_multiset(key, 2 * n, LATEST).reshape(2, n)
        end = start + duration
        order = end * n + jnp.arange(n)  # by end, the first of equals first
        never = (2 * LATEST + 1) * n
        last, chosen = jnp.int32(0), []
        for _ in range(min(n, LATEST)):  # starts of chosen activities rise, so there are no more
            chosen.append(jnp.min(jnp.where(start >= last, order, never)))
            last = chosen[-1] // n
        picked = jnp.stack(chosen)
        pairs = jnp.stack([start[picked % n], picked // n], 1).reshape(-1)
        answer = jnp.pad(pairs, (0, 2 * n - pairs.shape[0]))
        tokens, scored = answered(jnp.concatenate([start, end]), answer, 2 * (picked < never).sum())
        return Example(tokens, scored, {"start_time": Truth(start, n + jnp.arange(n), "number")})

    def content(self, example: Example) -> Int[Array, " words"]:
        start, end = example.tokens[: 2 * self.length].reshape(2, self.length)
        return sequence_content(jnp.concatenate([start, end - start]) - 1, LATEST)

    @property
    def contents(self) -> int | None:
        return sequence_contents(2 * self.length, LATEST)
