"""Spanning trees of a graph."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from elegans.specs import spec
from elegans.tasks.graphs import GraphTask, Solution, pairs, places, square_of


@spec
class MinimumSpanningTree(GraphTask):
    """`edges = tree`: Kruskal's tree of edges that all weigh the same, taken greedily as they are listed.

    vertices=4:  0 1  0 3  1 2  1 3 = 0 1 0 3 1 2 $ $ $ $ $ $
    scored:                           . . . . . . .           (paper: `=` too)
    component    0, 0, 0, 1: whether an edge's ends are connected by those before it, read at its second token

    Graph and split are those of breadth_first_search.
    """

    paper_context: ClassVar[float] = 77.36

    @property
    def answer_length(self) -> int:
        return 2 * (self.vertices - 1)

    def solve(self, key: jax.Array, edges: Bool[Array, " edge"]) -> Solution:
        del key
        listed = pairs(self.vertices)
        component = closing(square_of(edges, self.vertices))[listed[:, 0], listed[:, 1]]
        kept = places(edges & ~component, self.vertices - 1)
        tree = jnp.asarray(listed)[kept].reshape(-1)
        return Solution(jnp.zeros(0, jnp.int32), listed, tree, self.answer_length, at_edges={"component": component})


def closing(square: Bool[Array, "vertex vertex"]) -> Bool[Array, "vertex vertex"]:
    """For u < v: whether u and v are connected by the edges that stand before (u, v) in lexicographic order."""
    j = jnp.arange(square.shape[0])

    def add_edges_of(same: Array, u: Array) -> tuple[Array, Array]:
        """`same` says which vertices are connected already."""
        joins = (square[u] & (j > u))[:, None] & same  # [w, v]: the edge (u, w) connects u with v
        before = same[u] | (joins & (j[:, None] < j)).any(0)
        after = same[u] | joins.any(0)
        return same | (after[:, None] & after), before

    return jax.lax.scan(add_edges_of, jnp.eye(square.shape[0], dtype=bool), j)[1]
