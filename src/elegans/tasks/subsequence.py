"""Longest common subsequence of two sequences: a language whose truth is a table of dynamic programming."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from elegans.specs import field, spec
from elegans.tasks.sequences import SequenceTask, answered, sequence_content, sequence_contents, shuffled_multiset
from elegans.types import AnyArray, Example, Truth

LARGEST = 9  # numbers are 1 .. 9
WORD = 32  # bits
ALL, PLACES = np.uint32(2**WORD - 1), np.arange(WORD, dtype=np.uint32)
UNROLL = 16  # rows of the table written out in the program; a GPU starts a loop's every step anew


@spec
class LongestCommonSubsequence(SequenceTask):
    """The longest sequence that two sequences have in common, x and then y, each `length` long.

    length=4, x=1 5 2 6, y=5 6 2 2:   1 5 2 6 5 6 2 2 = 5 2 $ $ $      (5 6 is as long)
    scored:                                           . . . .
    common_length  1 2 2 2, the longest that x and y up to here have in common, read at y_0 .. y_3
    grows          1 1 0 0, whether this number of y made it longer, read there as well

    Of several the one is written that walking back from both ends finds: it takes equal ends, else drops
    the end whose loss shortens the rest less, and that of x where neither does. All numbers
    are one multiset, uniform over multisets of 1 .. 9, in random order. Rows are padded with `$`.
    """

    length: int = field(16, "numbers in each sequence", ge=1, le=256)

    @property
    def positions(self) -> int:
        return 3 * self.length + 2

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        n = self.length
        shown = 1 + shuffled_multiset(key, 2 * n, LARGEST)
        x, y = shown[:n], shown[n:]
        equal = x[:, None] == y
        table = lengths(equal)
        taken = walk(equal, table)
        rank = jnp.cumsum(taken) - taken  # how many taken numbers of x stand before each
        answer = (x * taken * (rank == jnp.arange(n)[:, None])).sum(1)
        tokens, scored = answered(shown, answer, table[n, n])
        reads = n + jnp.arange(n)
        grows = Truth(jnp.diff(table[n]), reads)
        return Example(tokens, scored, {"common_length": Truth(table[n, 1:], reads, "number"), "grows": grows})

    def content(self, example: Example) -> Int[Array, " words"]:
        return sequence_content(example.tokens[: 2 * self.length] - 1, LARGEST)

    @property
    def contents(self) -> int | None:
        return sequence_contents(2 * self.length, LARGEST)


def lengths(equal: Bool[Array, "x y"]) -> Int[Array, "x1 y1"]:
    """The table [i, j]: length of the longest common subsequence of the first i numbers of x and the first j of y.

    A row is kept as bits, set where y_j makes nothing longer. One sum takes it to the next row: each place of growth moves to the first
    match since the one before (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"). Counting bits gives lengths.
    """
    matches = packed(equal)

    def row(same: Array, match: Array) -> tuple[Array, Array]:
        same = sum_of_words(same, same & match) | same & ~match
        return same, same

    first = jnp.full(matches.shape[1:], ALL)
    longer = ~jnp.concatenate([first[None], jax.lax.scan(row, first, matches, unroll=min(UNROLL, len(equal)))[1]])
    before = jnp.cumsum(counts := jax.lax.population_count(longer), 1) - counts
    inside = jax.lax.population_count(longer[..., None] & (ALL >> (WORD - 1 - PLACES)))
    table = (before[..., None] + inside).astype(jnp.int32).reshape(len(equal) + 1, -1)
    return jnp.pad(table[:, : equal.shape[1]], ((0, 0), (1, 0)))


def packed(flags: Bool[AnyArray, "row place"]) -> UInt32[Array, "row word"]:
    """Flags as bits, 32 a word, the first the lowest."""
    parts = jnp.pad(flags, ((0, 0), (0, -flags.shape[1] % WORD))).reshape(len(flags), -1, WORD)
    return (parts.astype(jnp.uint32) << PLACES).sum(-1, dtype=jnp.uint32)


def sum_of_words(a: UInt32[Array, " word"], b: UInt32[Array, " word"]) -> UInt32[Array, " word"]:
    """The sum of two long numbers, each in words of 32 bits, the lowest first; what leaves the last is lost."""
    sums = a + b
    words, carry = [], jnp.uint32(0)
    for word, over in zip(sums, sums < a, strict=True):
        words.append(word + carry)
        carry = (over | (words[-1] < word)).astype(jnp.uint32)
    return jnp.stack(words)


def walk(equal: Bool[Array, "x y"], table: Int[Array, "x1 y1"]) -> Int[Array, " x"]:
    """Which numbers of x the walk back from both ends takes, as 0 and 1.

    In row i it goes left, dropping y's end, until the ends are equal or dropping x's end costs nothing.
    """
    same = jnp.pad(equal, ((0, 0), (1, 0)))
    stops = packed(equal | (table[:-1, 1:] == table[1:, 1:]))
    upto = packed(np.tri(equal.shape[1] + 1, equal.shape[1], -1, dtype=bool))  # [j]: the first j
    ends = WORD * (1 + jnp.arange(stops.shape[1]))

    def row(j: Array, line: tuple[Array, Array]) -> tuple[Array, Array]:
        stop, match = line
        stop &= upto[j]
        j = jnp.where(stop > 0, ends - jax.lax.clz(stop).astype(jnp.int32), 0).max()  # the last of them
        taken = match[j].astype(jnp.int32)
        return j - taken, taken

    start = jnp.int32(equal.shape[1])
    return jax.lax.scan(row, start, (stops, same), reverse=True, unroll=min(UNROLL, len(equal)))[1]
