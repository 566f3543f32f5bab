"""Maximum subarray: the language whose features are Kadane's running sum and where it falls below zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from elegans.specs import field, spec
from elegans.tasks.sequences import NUMBERS, SequenceTask, answered, sequence_content, sequence_contents, shuffled_multiset
from elegans.types import Example, Truth

ZERO = NUMBERS // 2  # the token of value 0


@spec
class MaximumSubarray(SequenceTask):
    """The run of numbers with the largest sum, the first of equals, as Kadane's algorithm finds it; value v is token v + 9.

    length=5, values 2 -3 4 -1 2:   11 6 13 8 11 = 13 8 11 $ $ $
    scored:                                      .  . .  . .
    previous_negative  0 1 0 1 0:   whether the value before is below 0, read at tokens 1 .. 5, the last being =
    max_ending_here    2 -1 4 3 5:  Kadane's running sum up to the value before, read there as well

    The running sum restarts at a value where it was below 0, and must exceed the best to replace it. The
    values are a multiset, uniform over multisets of -9 .. 9, in random order. Rows are padded with `$`.
    """

    length: int = field(64, "numbers in the array", ge=1, le=4096)

    @property
    def positions(self) -> int:
        return 2 * self.length + 2

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        n = self.length
        shown = shuffled_multiset(key, n, NUMBERS)
        values = shown - ZERO
        before = jnp.append(0, jnp.cumsum(values))  # sums of the values before each place
        running = before[1:] - jax.lax.cummin(before[:-1])  # the sum since the last restart, where `before` was least
        last = jnp.argmax(running)  # the first of equals
        first = jnp.argmin(jnp.where(jnp.arange(n) <= last, before[:-1], 9 * n + 1))
        answer = shown[(first + jnp.arange(n)) % n]
        tokens, scored = answered(shown, answer, last - first + 1)
        reads = jnp.arange(1, n + 1)
        negative = Truth((values < 0).astype(jnp.int32), reads)
        return Example(tokens, scored, {"previous_negative": negative, "max_ending_here": Truth(running, reads, "number")})

    def content(self, example: Example) -> Int[Array, " words"]:
        return sequence_content(example.tokens[: self.length], NUMBERS)

    @property
    def contents(self) -> int | None:
        return sequence_contents(self.length, NUMBERS)
