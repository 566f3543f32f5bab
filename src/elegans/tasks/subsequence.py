"""Longest common subsequence of two sequences: a language whose truth is a table of dynamic programming."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from elegans.specs import field, spec
from elegans.tasks.sequences import SequenceTask, answered, sequence_content, sequence_contents, shuffled_multiset
from elegans.types import Example, Truth

LARGEST = 9  # numbers are 1 .. 9
FEW = 64  # numbers of which all pairs are compared
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
    """The table [i, j]: length of the longest common subsequence of the first i numbers of x and the first j of y."""

    def row(above: Array, same: Array) -> tuple[Array, Array]:
        row = running_maximum(jnp.append(0, jnp.maximum(above[1:], above[:-1] + same)))  # what ends at y_j, or is found without x_i
        return row, row

    first = jnp.zeros(equal.shape[1] + 1, jnp.int32)
    return jnp.concatenate([first[None], jax.lax.scan(row, first, equal, unroll=min(UNROLL, len(equal)))[1]])


def running_maximum(counts: Int[Array, " y"]) -> Int[Array, " y"]:
    """Of numbers from 0 on: in one kernel where they are few, which a GPU prefers to fewer operations."""
    if len(counts) > FEW:
        return jax.lax.cummax(counts)
    return jnp.where(jnp.tri(len(counts), dtype=bool), counts, 0).max(1)


def walk(equal: Bool[Array, "x y"], table: Int[Array, "x1 y1"]) -> Int[Array, " x"]:
    """Which numbers of x the walk back from both ends takes, as 0 and 1.

    In row i it goes left, dropping y's end, until the ends are equal or dropping x's end costs nothing.
    """
    columns = jnp.arange(table.shape[1])
    same = jnp.pad(equal, ((0, 0), (1, 0)))
    stops = same | (table[:-1] == table[1:])

    def row(j: Array, line: tuple[Array, Array]) -> tuple[Array, Array]:
        stop, match = line
        j = jnp.max(jnp.where(stop & (columns <= j), columns, 0))
        taken = match[j].astype(jnp.int32)
        return j - taken, taken

    start = jnp.int32(len(columns) - 1)
    return jax.lax.scan(row, start, (stops, same), reverse=True, unroll=min(UNROLL, len(equal)))[1]
