"""Parity with and without chain of thought: the simplest iterative task."""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from elegans.errors import Invalid
from elegans.specs import field, spec
from elegans.tasks.base import SMALL_SPACE, Split, Task
from elegans.tasks.bits import coin_entropy, pack, random_bits
from elegans.types import Example, Truth

TASK, EOI, EOS = 2, 3, 4


@spec
class Parity(Task):
    """Running parity s_t = s_(t-1) xor x_t of fair bits, with the states written out or only the last one.

    length=4, cot:      P 1 0 1 1 : 1 1 0 1 $      truth: input 1 0 1 1 and state 1 1 0 1,
    scored:                         . . . . .      read at :, s_1, s_2, s_3 (where s_t is predicted)
    length=4, no cot:   P 1 0 1 1 : 1 $ $ $ $      truth: input and state, read at x_1 .. x_4
    scored:                         . .            (paper: everything after `:`)

    With `shortest`, a row's length is uniform in shortest..length; rows are padded with `$`.
    """

    length: int = field(16, "bits of the longest row", ge=1, le=4096)
    shortest: int | None = field(None, "bits of the shortest row; none: every row has `length` bits", ge=1)
    cot: bool = field(True, "write every state, not only the last")
    compat: Literal["paper"] | None = field(None, "paper: score the padding as well")
    split: Split | None = field(Split(), "how contents are divided")

    def check(self) -> None:
        if self.shortest is not None and self.shortest > self.length:
            raise Invalid("shortest", self.shortest, f"allowed: at most length={self.length}")

    @property
    def symbols(self) -> tuple[str, ...]:
        return ("0", "1", "P", ":", "$")

    @property
    def positions(self) -> int:
        return 2 * self.length + 3

    @property
    def _lengths(self) -> range:
        return range(self.shortest or self.length, self.length + 1)

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        key_length, key_bits = jax.random.split(key)
        n = jax.random.randint(key_length, (), self._lengths.start, self._lengths.stop)
        t = jnp.arange(self.length)
        x = jnp.where(t < n, random_bits(key_bits, self.length), 0)
        state = jnp.cumsum(x) % 2
        p = jnp.arange(self.positions)
        answers = n if self.cot else 1  # states written after `:`
        shown = state[(p - n - 2) % self.length] if self.cot else state[-1]
        tokens = jnp.select([p == 0, p <= n, p == n + 1, p < n + 2 + answers], [TASK, x[(p - 1) % self.length], EOI, shown], EOS)
        scored = (p > n + 1) & ((p <= n + 2 + answers) | (self.compat == "paper"))
        reads = jnp.where(t < n, t + n + 1 if self.cot else t + 1, -1)
        return Example(tokens, scored, {"input": Truth(x, reads), "state": Truth(state, reads)})

    def content(self, example: Example) -> Int[Array, " words"]:
        n = jnp.argmax(example.tokens == EOI) - 1
        t = jnp.arange(self.length)
        words = pack(jnp.where(t < n, example.tokens[1 : self.length + 1], 0))
        if self.contents is None:
            return jnp.append(words, n)
        return (1 << n) - (1 << self._lengths.start) + words  # shorter rows first

    @property
    def contents(self) -> int | None:
        rows = 2 ** (self.length + 1) - 2**self._lengths.start
        return rows if rows < SMALL_SPACE else None

    def scored_tokens(self) -> float:
        return self._mean(self._scored)

    def mean_positions(self) -> float:
        return self._mean(lambda n: n + 3 + (n if self.cot else 1))

    def _scored(self, n: int) -> int:
        return self.positions - n - 2 if self.compat == "paper" else (n if self.cot else 1) + 1

    def _mean(self, of: Any) -> float:
        return sum(map(of, self._lengths)) / len(self._lengths)

    def floor(self) -> float | None:
        """0: the states, and where they end, follow from the prompt."""
        return 0.0

    def plateau(self) -> float | None:
        """A predictor that knows only how far behind `:` it stands: a fair bit, or the end where the row may end.

        With n uniform in a..b, the token t places behind `:`, where it is scored at all, is `$` in the share
        of rows with n < t, and else a fair bit.
        """
        if not self.cot:
            return math.log(2) / self.scored_tokens()
        nats = 0.0
        for t in range(1, self.positions):
            rows = [n for n in self._lengths if self._scored(n) >= t]  # those with a scored token there
            ended = sum(n < t for n in rows) / max(1, len(rows))
            nats += len(rows) / len(self._lengths) * (coin_entropy(ended) + (1 - ended) * math.log(2))
        return nats / self.scored_tokens()
