"""Topological sorting of a directed graph without cycles."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from elegans.specs import spec
from elegans.tasks.graphs import GraphTask, Solution, bit, inverse, pairs, random_heights, rows_of, search, square_of


@spec
class TopologicalSort(GraphTask):
    """`edges = order`: every edge is written tail first, and the order has each tail before its head.

    vertices=4:  0 1  3 0  2 1 = 3 2 0 1 $ $ $ $ $ $ $ $
    scored:                      . . . . .               (paper: `=` too)
    adjacency    where the edges out of each output vertex lead, read at that vertex

    A random permutation orients the edges; they are listed as if they had no direction. The order is that
    of a depth-first search, roots ascending, the LARGEST head first, its vertices in the reverse order of
    their ends. Graph and split are those of breadth_first_search: the orientation is no part of the content.
    """

    paper_context: ClassVar[float] = 69.36

    @property
    def answer_length(self) -> int:
        return self.vertices

    def solve(self, key: jax.Array, edges: Bool[Array, " edge"]) -> Solution:
        n = self.vertices
        j = jnp.arange(n)
        height = random_heights(key, n)
        out = square_of(edges, n) & (height[:, None] < height)
        went = search(rows_of(out), n - j, deep=True)
        below = bit(went.above[:, None], j).sum(0)
        ended = went.rank - went.depth + below  # those that end before: visited before and no ancestor, or below
        order = inverse(n - 1 - ended)
        listed = pairs(n)
        turned = height[listed[:, 0]] > height[listed[:, 1]]
        written = jnp.where(turned[:, None], listed[:, ::-1], listed)
        return Solution(jnp.zeros(0, jnp.int32), written, order, n, at_answer={"adjacency": out[order]})
