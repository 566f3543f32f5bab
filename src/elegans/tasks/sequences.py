"""Sequences of small numbers: the vocabulary, the draws, the rows and the contents that tasks on them share."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from elegans.specs import field, spec
from elegans.tasks import counting
from elegans.tasks.base import SMALL_SPACE, Split, Task

NUMBERS = 19
SYMBOLS = (*map(str, range(NUMBERS)), "=", "$")
EQUALS, EOS = NUMBERS, NUMBERS + 1


def shuffled_multiset(key: jax.Array, size: int, kinds: int) -> Int[Array, " size"]:
    """A multiset of `size` numbers below `kinds`, uniform over multisets, in uniformly random order.

    Stars and bars: a multiset is a row of stars and kinds - 1 bars, and a star's number is how many bars stand
    before it. Places are random keys, so that stars come shuffled and nothing need be sorted. A star and a
    bar share a key, which favours small numbers, in a share size * kinds / 2^32 of draws.
    """
    places = jax.random.bits(key, (size + kinds - 1,))
    stars, bars = places[:size], places[size:]
    return (bars < stars[:, None]).sum(1)


def answered(
    prompt: Int[Array, " n"], answer: Int[Array, " most"], count: Int[Array, ""]
) -> tuple[Int[Array, " position"], Bool[Array, " position"]]:
    """Tokens and scored marks of a prompt, `=`, the first `count` numbers of an answer, the end, and padding with ends."""
    kept = jnp.where(jnp.arange(answer.shape[0]) < count, answer, EOS)
    tokens = jnp.concatenate([prompt, jnp.array([EQUALS]), kept, jnp.array([EOS])])
    behind = jnp.arange(tokens.shape[0]) - prompt.shape[0]
    return tokens, (behind >= 0) & (behind <= count + 1)


def sequence_contents(length: int, kinds: int) -> int | None:
    """How many sequences of numbers below `kinds` there are, or None where that is 2**16 or more."""
    return kinds**length if kinds**length < SMALL_SPACE else None


def sequence_content(digits: Int[Array, " length"], kinds: int, below: int = 2**31) -> Int[Array, " words"]:
    """A sequence of numbers below `kinds` in as few words below `below` as hold it: its rank, where one word does."""
    size = next(d for d in range(30, 0, -1) if kinds**d <= below)
    padded = jnp.pad(digits, (0, -digits.shape[0] % size)).reshape(-1, size)
    return (padded * jnp.asarray(kinds ** np.arange(size, dtype=np.int32))).sum(1)


@spec
class SequenceTask(Task):
    """Numbers, `=`, an answer and the end, padded with ends. Means and plateau are counted where a subclass knows no form."""

    abstract: ClassVar[bool] = True
    split: Split | None = field(Split(), "how contents are divided")

    @property
    def symbols(self) -> tuple[str, ...]:
        return SYMBOLS

    def scored_tokens(self) -> float:
        return counting.means(self)[0]

    def mean_positions(self) -> float:
        return counting.means(self)[1]

    def floor(self) -> float | None:
        """0: the answer follows from the prompt."""
        return 0.0

    def plateau(self) -> float | None:
        """Counted."""
        return counting.plateau(self)
