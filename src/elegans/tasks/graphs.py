"""Random connected graphs, written as edge lists: shared by the tasks on graphs."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from elegans.errors import Invalid
from elegans.randomness import keyed_hash
from elegans.specs import field, spec
from elegans.tasks import counting, graph6
from elegans.tasks.base import PARTS, SMALL_SPACE, Split, Task
from elegans.tasks.bits import pack
from elegans.tasks.graph6 import pairs
from elegans.types import AnyArray, Example, Truth

NUMBERS = 26  # vertices that have a symbol; the vocabulary is one for all sizes
EQUALS, EOS = NUMBERS, NUMBERS + 1
BASE = 32  # above the number of any vertex
LOST = 1e-9  # accepted chance that no candidate is connected
PAPER_VERTICES = 11


# ---- how many labelled graphs are connected, exactly


@functools.cache
def connected_graphs(vertices: int) -> tuple[int, int]:
    """Labelled connected graphs, and how many edges all of them have together.

    From all graphs those are taken away where vertex 0 sits in a component of k < n vertices
    (Harary and Palmer 1973, "Graphical Enumeration", p. 7).
    """
    n = vertices
    graphs, edges = _all_graphs(n)
    for k in range(1, n):
        ways = math.comb(n - 1, k - 1)
        inside, inner = connected_graphs(k)
        outside, outer = _all_graphs(n - k)
        graphs -= ways * inside * outside
        edges -= ways * (inner * outside + inside * outer)
    return graphs, edges


def _all_graphs(vertices: int) -> tuple[int, int]:
    places = math.comb(vertices, 2)
    return 2**places, places * 2**places // 2


def candidates(vertices: int) -> int:
    """How many fair graphs to draw, so that the chance that none is connected is at most LOST."""
    graphs = _all_graphs(vertices)[0]
    lost = (graphs - connected_graphs(vertices)[0]) / graphs
    return math.ceil(math.log(LOST) / math.log(lost))


@functools.cache
def _ranks(vertices: int) -> np.ndarray:
    """The rank of every small connected graph among those, by its edges as one number."""
    numbers = np.arange(2 ** math.comb(vertices, 2))
    bits = (numbers[:, None] >> np.arange(math.comb(vertices, 2)) & 1).astype(bool)
    return np.cumsum(graph6.reaches_all(graph6.adjacency_rows(bits, vertices))).astype(np.int32) - 1


# ---- graphs as bits: `edges` in lexicographic order, `rows` with bit j of row i for the edge of i and j


def rows_of(square: Bool[Array, "... vertex vertex"]) -> UInt32[Array, "... vertex"]:
    """Rows of a square of booleans as numbers."""
    return (square.astype(jnp.uint32) << jnp.arange(square.shape[-1], dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)


def bit(rows: UInt32[Array, "..."], j: AnyArray) -> Bool[Array, "..."]:
    """Bit j of numbers that were made by `rows_of`."""
    return (rows >> j.astype(np.uint32)) & 1 == 1


def square_of(edges: Bool[Array, "... edge"], vertices: int) -> Bool[Array, "... vertex vertex"]:
    """The symmetric adjacency matrix."""
    place = np.zeros((vertices, vertices), np.int32)
    u, v = pairs(vertices).T
    place[u, v] = place[v, u] = np.arange(len(u))
    return edges[..., place] & ~np.eye(vertices, dtype=bool)


def connected(rows: UInt32[Array, "... vertex"]) -> Bool[Array, "..."]:
    """Whether vertex 0 reaches every vertex: Warshall's closure, all rows at a time."""
    vertices = rows.shape[-1]
    for k in range(vertices):
        rows = rows | jnp.where((rows >> k) & 1 == 1, rows[..., k : k + 1], 0)
    return rows[..., 0] | 1 == 2**vertices - 1


def random_graph(key: jax.Array, vertices: int) -> Bool[Array, " edge"]:
    """Uniform over labelled connected graphs: the first connected one of enough fair graphs."""
    count = math.comb(vertices, 2)
    words = jax.random.bits(key, (candidates(vertices), -(-count // 32)), jnp.uint32)
    place = np.arange(count)
    edges = bit(words[:, place // 32], place % 32)
    return edges[jnp.argmax(connected(rows_of(square_of(edges, vertices))))]


def random_heights(key: jax.Array, vertices: int) -> UInt32[Array, " vertex"]:
    """Numbers, no two alike, in random order: a permutation without the cost of sorting."""
    drawn = jax.random.bits(key, (vertices,), jnp.uint32)
    return drawn // BASE * BASE + jnp.arange(vertices, dtype=jnp.uint32)


def relabelled(key: jax.Array, edges: Bool[Array, " edge"], vertices: int) -> Bool[Array, " edge"]:
    """The same graph with its vertices renamed at random."""
    height = random_heights(key, vertices)
    name = (height[:, None] > height).sum(1)
    u, v = pairs(vertices).T
    return square_of(edges, vertices)[name[u], name[v]]


def places(bits: Bool[Array, " edge"], count: int) -> Int[Array, " count"]:
    """Where the first `count` set bits are; the number of bits where there are fewer."""
    total = bits.shape[0]
    to = jnp.where(bits, jnp.cumsum(bits) - 1, count + jnp.arange(total))  # the unset ones fall off the end
    return jnp.full(count, total).at[to].set(jnp.arange(total), mode="drop", unique_indices=True)


def inverse(rank: Int[Array, " vertex"]) -> Int[Array, " vertex"]:
    """The vertex of every rank."""
    j = jnp.arange(rank.shape[0])
    return jnp.where(rank == j[:, None], j, 0).sum(1)


# ---- one search for breadth first, depth first and post-order


class Search(NamedTuple):
    """How a search went: the step at which each vertex was visited, and its ancestors in the search's tree."""

    rank: Int[Array, " vertex"]
    above: UInt32[Array, " vertex"]

    @property
    def depth(self) -> Int[Array, " vertex"]:
        """The number of ancestors: for breadth first the distance from the start."""
        return jax.lax.population_count(self.above).astype(jnp.int32)


def search(rows: UInt32[Array, " vertex"], first: Int[Array, " vertex"], deep: bool) -> Search:
    """Visit vertices one after another, always the one with the highest score.

    Breadth first with marks on enqueue takes, among the unvisited, the one that the EARLIEST visited
    vertex points to, the smallest of these; depth first with marks on pop takes the one that the LATEST
    visited vertex points to, the largest of these. So a score is (step, tie), one number; `first` gives
    the scores of roots, below BASE, which wait until nothing else can be reached.
    """
    n = rows.shape[0]
    j = jnp.arange(n)
    tie = j if deep else n - j

    def visit(state: tuple[Array, Array, Array], step: Array) -> tuple[tuple[Array, Array, Array], None]:
        score, rank, above = state
        here = score == score.max()
        rank = jnp.where(here, step, rank)
        out, line = (jnp.where(here, x, 0).sum(dtype=jnp.uint32) for x in (rows, above | (jnp.uint32(1) << j.astype(jnp.uint32))))
        fresh = (step + 1 if deep else n - step) * BASE + tie
        better = bit(out, j) & (rank == n) & (fresh > score)
        score = jnp.where(here, -1, jnp.where(better, fresh, score))
        return (score, rank, jnp.where(better, line, above)), None

    begun = (first, jnp.full(n, n), jnp.zeros(n, jnp.uint32))
    (_, rank, above), _ = jax.lax.scan(visit, begun, j)
    return Search(rank, above)


# ---- the tasks


class Solution(NamedTuple):
    """What is asked about a graph, the answer, and the truth behind it."""

    starts: Int[Array, " start"]
    pairs: AnyArray  # [edge, 2]: how each edge is written, whether it is there or not
    answer: Int[Array, " token"]
    length: Int[Array, ""] | int  # tokens of the answer that are there
    at_edges: Mapping[str, Array] = MappingProxyType({})  # binary, read at the second token of each edge
    at_answer: Mapping[str, Array] = MappingProxyType({})  # multilabel, read at each token of the answer


@spec
class GraphTask(Task):
    """A question about a random connected graph: `start edges = answer`, padded with `$`.

    A subclass says how many vertices are named in front (`starts`), how long the longest answer is
    (`answer_length`) and how a graph is answered (`solve`). The split's content is the labelled graph
    alone: whatever is asked about it, a labelled graph never straddles the split. Two graphs that differ
    only in the names of their vertices are two contents, so an isomorphism class may straddle it.
    """

    abstract: ClassVar[bool] = True
    starts: ClassVar[int] = 0
    paper_context: ClassVar[float]  # tokens of a row that the paper's FLOP budgets count

    vertices: int = field(PAPER_VERTICES, "vertices of each graph", ge=2, le=NUMBERS)
    graphs: str | None = field(None, "a graph6 file of connected graphs, drawn and renamed at random; none: all labelled connected graphs")
    compat: Literal["paper"] | None = field(None, "paper: score `=` too, and count its context length in FLOP budgets")
    split: Split | None = field(Split(), "how contents are divided")

    @property
    @abc.abstractmethod
    def answer_length(self) -> int:
        """Tokens of the longest answer."""

    @abc.abstractmethod
    def solve(self, key: jax.Array, edges: Bool[Array, " edge"]) -> Solution:
        """What is asked about a graph, and its answer."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return (*map(str, range(NUMBERS)), "=", "$")

    @property
    def positions(self) -> int:
        """The paper's blocks: they leave room for a start even where none is written."""
        return max(1, self.starts) + 2 * self._pairs + 1 + self.answer_length + 1

    @property
    def _pairs(self) -> int:
        return math.comb(self.vertices, 2)

    def files(self) -> tuple[str, ...]:
        return () if self.graphs is None else (self.graphs,)

    def prepare(self) -> Any:
        return () if self.graphs is None else graph6.read(self.graphs, self.vertices)

    def sample(self, key: jax.Array, data: Any) -> Example:
        key_graph, key_line, key_solve = jax.random.split(key, 3)
        if self.graphs is None:
            edges = random_graph(key_graph, self.vertices)
        else:
            line = jnp.asarray(data)[jax.random.randint(key_line, (), 0, len(data))]
            edges = relabelled(key_graph, line, self.vertices)
        return self._write(edges, self.solve(key_solve, edges))

    def _write(self, edges: Array, solution: Solution) -> Example:
        p = jnp.arange(self.positions)
        order = jnp.minimum(places(edges, self._pairs), self._pairs - 1)  # of the edges that are there, then anything
        prompt = jnp.concatenate([solution.starts, jnp.asarray(solution.pairs)[order].reshape(-1)])
        equals = self.starts + 2 * edges.sum()
        end = equals + solution.length + 1
        asked = jnp.pad(prompt, (0, self.positions - len(prompt)))
        written = solution.answer[jnp.clip(p - equals - 1, 0, self.answer_length - 1)]
        tokens = jnp.select([p < equals, p == equals, p < end], [asked, EQUALS, written], EOS)
        scored = (p >= equals + (0 if self.compat == "paper" else 1)) & (p <= end)
        truth = {name: self._at_edges(values[order], edges) for name, values in solution.at_edges.items()}
        truth |= {name: self._at_answer(values, equals, solution.length) for name, values in solution.at_answer.items()}
        return Example(tokens, scored, truth)

    def _at_edges(self, values: Array, edges: Array) -> Truth:
        k = jnp.arange(self._pairs)
        there = k < edges.sum()
        return Truth((values & there).astype(jnp.int32), jnp.where(there, self.starts + 2 * k + 1, -1))

    def _at_answer(self, values: Array, equals: Array, count: Any) -> Truth:
        r = jnp.arange(values.shape[0])
        there = r < count
        return Truth((values & there[:, None]).astype(jnp.int32), jnp.where(there, equals + 1 + r, -1), "multilabel")

    def content(self, example: Example) -> Int[Array, " words"]:
        n = self.vertices
        k = jnp.arange(self._pairs)
        listed = example.tokens[self.starts : self.starts + 2 * self._pairs].reshape(-1, 2)
        u, v = listed.min(1), listed.max(1)  # an oriented edge is written tail first
        there = self.starts + 2 * k < jnp.argmax(example.tokens == EQUALS)
        place = jnp.where(there, u * (2 * n - u - 1) // 2 + v - u - 1, self._pairs + k)  # where nothing is listed: off the end
        words = pack(jnp.zeros(self._pairs, jnp.int32).at[place].set(1, mode="drop", unique_indices=True))
        return words if self.contents is None else jnp.asarray(_ranks(n))[words]

    def split_table(self) -> Any:
        """Raises `Invalid` where the graphs of a file, however named, leave a part of the split empty.

        Beyond 2**16 labelled graphs nobody looks: a part that has none of so many is asked for nearly nothing.
        """
        table = super().split_table()
        if self.split is None or self.graphs is None:
            return table
        count, found = 0, set[int]()
        for bits in graph6.renamed(self.prepare(), self.vertices):
            count, found = count + len(bits), found | set(self._parts(bits, table).tolist())
            if len(found) == len(PARTS) or count >= SMALL_SPACE:
                return table
        empty = next(part for i, part in enumerate(PARTS) if i not in found)
        raise Invalid("split", f"{count} labelled graphs", f"{empty} would be empty: give a file of more graphs or say split=none")

    def part_sizes(self) -> list[dict[str, Any]]:
        """As of other small spaces; of a file's graphs nothing, since they are only some of the contents that are cut."""
        sizes = super().part_sizes()
        return sizes if self.graphs is None else []

    def _parts(self, bits: np.ndarray, table: Any) -> np.ndarray:
        """The part of every graph, as `part` says of a row, on the host."""
        assert self.split is not None
        padded = np.pad(bits, [(0, 0), (0, -bits.shape[1] % 16)])
        words = np.packbits(padded, axis=1, bitorder="little").view("<u2").astype(np.int32)  # as `pack`
        if self.contents is not None:
            return table[_ranks(self.vertices)[words[:, 0]]]
        return np.asarray(self.split.cut(keyed_hash(words, self.split.key)))

    @property
    def contents(self) -> int | None:
        graphs = connected_graphs(self.vertices)[0]
        return graphs if graphs < SMALL_SPACE else None

    def scored_tokens(self) -> float:
        return float(self.answer_length + 1 + (self.compat == "paper"))

    def mean_positions(self) -> float:
        if self.compat == "paper" and self.vertices == PAPER_VERTICES:
            return self.paper_context
        return self.starts + 2 * self._mean_edges + self.scored_tokens() + (self.compat is None)

    @property
    def _mean_edges(self) -> float:
        if self.graphs is not None:
            return float(self.prepare().sum(1).mean())
        graphs, edges = connected_graphs(self.vertices)
        return edges / graphs

    def floor(self) -> float | None:
        """0: the answer follows from the prompt, and a scored `=` is free for a predictor that expects nothing else in the prompt.

        A predictor that is held to the rest of the prompt as well pays about ln 2 nats at `=`: half of all
        lists stop at the last pair, a quarter one pair earlier, and so on.
        """
        return 0.0

    def plateau(self) -> float | None:
        """Counted over drawn rows, by the distance from `=`."""
        return counting.plateau(self)
