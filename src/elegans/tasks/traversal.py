"""Breadth-first and depth-first search of a graph: the languages whose quiet features are the queue and the stack."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from elegans.specs import spec
from elegans.tasks.graphs import GraphTask, Solution, inverse, pairs, rows_of, search, square_of


@spec
class BreadthFirstSearch(GraphTask):
    """`start edges = order`: breadth first, neighbours in ascending order, marked when they are enqueued.

    vertices=4, start 2:  2  0 1  0 3  1 2 = 2 1 0 3 $ $ $ $ $ $ $
    scored:                                  . . . . .               (paper: `=` too)
    queue                 1, 0, 3, none: what waits once output vertex r is processed, read at that vertex
    adjacency             the neighbours of output vertex r, read at that vertex

    The start is uniform; the graph is uniform over connected graphs whose vertices have names, or drawn
    from a file and renamed. A labelled graph never straddles the split, whatever the start; its isomorphism
    class may.
    """

    starts: ClassVar[int] = 1
    paper_context: ClassVar[float] = 69.36

    @property
    def answer_length(self) -> int:
        return self.vertices

    def solve(self, key: jax.Array, edges: Bool[Array, " edge"]) -> Solution:
        start, rank, square = _visits(key, edges, self.vertices, deep=False)
        order = inverse(rank)
        truth = {"queue": waiting(square, rank), "adjacency": square[order]}
        return Solution(start, pairs(self.vertices), order, self.vertices, at_answer=truth)


@spec
class DepthFirstSearch(GraphTask):
    """`start edges = order`: depth first, the LARGEST neighbour first, vertices marked when they are popped.

    vertices=4, start 0:  0  0 1  0 3  1 2 = 0 3 1 2 $ $ $ $ $ $ $
    scored:                                  . . . . .               (paper: `=` too)
    stack                 1 3, 1, 2: unvisited neighbours of the visited, after output vertex r, read at that
                          vertex, the last one excepted
    adjacency             the neighbours of output vertex r, read at that vertex

    Start, graph and split are those of breadth_first_search.
    """

    starts: ClassVar[int] = 1
    paper_context: ClassVar[float] = 69.36

    @property
    def answer_length(self) -> int:
        return self.vertices

    def solve(self, key: jax.Array, edges: Bool[Array, " edge"]) -> Solution:
        start, rank, square = _visits(key, edges, self.vertices, deep=True)
        order = inverse(rank)
        truth = {"stack": waiting(square, rank)[:-1], "adjacency": square[order]}
        return Solution(start, pairs(self.vertices), order, self.vertices, at_answer=truth)


def _visits(key: jax.Array, edges: Array, vertices: int, deep: bool) -> tuple[Array, Array, Array]:
    """A uniform start, the step at which each vertex is visited from it, and the adjacency matrix."""
    start = jax.random.randint(key, (1,), 0, vertices)
    square = square_of(edges, vertices)
    first = (jnp.arange(vertices) == start).astype(jnp.int32)
    return start, search(rows_of(square), first, deep).rank, square


def waiting(square: Bool[Array, "vertex vertex"], rank: Int[Array, " vertex"]) -> Bool[Array, "step vertex"]:
    """The unvisited neighbours of the visited vertices after every step: the queue, or what matters of the stack."""
    known = jnp.where(square, rank, rank.shape[0]).min(1)  # when the first neighbour was visited
    step = jnp.arange(rank.shape[0])[:, None]
    return (known <= step) & (step < rank)
