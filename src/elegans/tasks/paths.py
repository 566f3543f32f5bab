"""Shortest paths between two vertices of a graph."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from elegans.specs import spec
from elegans.tasks import counting
from elegans.tasks.graphs import BASE, GraphTask, Search, Solution, bit, inverse, pairs, rows_of, search, square_of


@spec
class ShortestPath(GraphTask):
    """`source target edges = path`: one shortest path, both ends included.

    vertices=4, 2 to 3:  2 3  0 1  0 3  1 2 = 2 1 0 3 $ $ $ $ $ $ $
    scored:                                   . . . . .               (paper: `=` too)
    adjacency            the neighbours of each vertex of the path, read at that vertex

    Source and target are uniform over pairs of two vertices. Of several shortest paths, the one that a
    search from both ends finds: whole levels in turn, the source's side first, each vertex's neighbours in
    ascending order, ended by the first vertex that both sides know. Graph and split are those of
    breadth_first_search.
    """

    starts: ClassVar[int] = 2
    paper_context: ClassVar[float] = 61.91

    @property
    def answer_length(self) -> int:
        return self.vertices

    def solve(self, key: jax.Array, edges: Bool[Array, " edge"]) -> Solution:
        n = self.vertices
        drawn = jax.random.randint(key, (2,), 0, np.array([n, n - 1]))
        ends = drawn.at[1].add(drawn[1] >= drawn[0])  # two vertices, never one twice
        square = square_of(edges, n)
        firsts = (jnp.arange(n) == ends[:, None]).astype(jnp.int32)
        sides = jax.vmap(lambda first: search(rows_of(square), first, deep=False))(firsts)
        source, target = (jax.tree.map(lambda x, i=i: x[i], sides) for i in (0, 1))
        place = _path(square, source, target, ends)
        path = inverse(place)
        count = (place < n).sum()
        return Solution(ends, pairs(n), path, count, at_answer={"adjacency": square[path]})

    def scored_tokens(self) -> float:
        return counting.means(self)[0]


def _path(square: Array, source: Search, target: Search, ends: Array) -> Int[Array, " vertex"]:
    """Each vertex's place on the path; the number of vertices for those that are not on it.

    The sides meet on an edge from x, `distance // 2` away from the source, to y on the target's side. At
    odd distances the source's side finds it, going through its last level in the order of discovery and
    taking the smallest neighbour that the target's side knows; at even distances the target's side does.
    """
    n = square.shape[0]
    j = jnp.arange(n)
    distance = source.depth[ends[1]]
    meeting = square & (source.depth == distance // 2)[:, None] & (target.depth == (distance - 1) // 2)
    odd = source.rank[:, None] * BASE + j
    even = target.rank * BASE + j[:, None]
    best = jnp.argmin(jnp.where(meeting, jnp.where(distance % 2 == 1, odd, even), BASE * BASE))
    x, y = best // n, best % n
    on = bit(source.above[x] | target.above[y], j) | (j == x) | (j == y)
    return jnp.where(on, source.depth, n)
