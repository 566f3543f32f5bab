"""The graph languages in plain Python, their tie rules written out; see `oracles`.

`=` is scored only with `compat="paper"`: where the edge list ends is random, so nobody can predict it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from oracles_sequences import Reads, Row, numbers, row

Edges = list[tuple[int, int]]


def edges_of(prompt: Sequence[str], vertices: int | None, directed: bool = False) -> tuple[Edges, int]:
    """The edges as shown and how many vertices there are (all of them have an edge, the graph being connected)."""
    shown = numbers(prompt, 0, 25)
    assert len(shown) % 2 == 0 and shown, prompt
    edges = list(zip(shown[::2], shown[1::2], strict=True))
    undirected = [(min(e), max(e)) for e in edges]
    assert undirected == sorted(set(undirected)) and all(u < v for u, v in undirected), "the edges are in order, each once"
    assert directed or edges == undirected, "each edge is shown smaller end first"
    count = max(shown) + 1 if vertices is None else vertices
    component = list(range(count))
    for u, v in undirected:
        component = merged(component, u, v)
    assert len(set(component)) == 1, "the graph is connected"
    return edges, count


def merged(component: list[int], u: int, v: int) -> list[int]:
    """`component[w]` names the part that w lies in; the parts of u and v become one."""
    return [component[u] if c == component[v] else c for c in component]


def neighbours(edges: Edges, vertices: int, directed: bool = False) -> list[list[int]]:
    """The (out-)neighbours of each vertex, ascending."""
    found: list[list[int]] = [[] for _ in range(vertices)]
    for u, v in edges:
        found[u].append(v)
        if not directed:
            found[v].append(u)
    return [sorted(ns) for ns in found]


def members(group: Container[int], vertices: int) -> tuple[int, ...]:
    return tuple(int(v in group) for v in range(vertices))


def adjacency(near: list[list[int]], order: list[int], start: int) -> Reads:
    """The adjacency row of each token of the answer, read at that token."""
    return [(start + r, members(near[v], len(near))) for r, v in enumerate(order)]


def breadth_first_search(prompt: list[str], vertices: int | None = None, compat: str | None = None) -> Row:
    edges, n = edges_of(prompt[1:], vertices)
    near, start = neighbours(edges, n), int(prompt[0])
    queue, marked = [start], {start}
    order: list[int] = []
    waiting: Reads = []
    while queue:
        v = queue.pop(0)
        for w in near[v]:
            if w not in marked:
                marked.add(w)
                queue.append(w)
        waiting.append((len(prompt) + len(order), members(queue, n)))
        order.append(v)
    truth = {"queue": waiting, "adjacency": adjacency(near, order, len(prompt))}
    return row(prompt, order, truth, compat == "paper")


def depth_first_search(prompt: list[str], vertices: int | None = None, compat: str | None = None) -> Row:
    """The stack's truth is not read at the last vertex, after which nothing waits."""
    edges, n = edges_of(prompt[1:], vertices)
    near, stack = neighbours(edges, n), [int(prompt[0])]
    order: list[int] = []
    waiting: Reads = []
    while stack:
        v = stack.pop()
        if v in order:
            continue
        order.append(v)
        stack += [w for w in near[v] if w not in order]  # ascending: the largest is popped first
        waiting.append((len(prompt) + len(order) - 1, members(set(stack) - set(order), n)))
    truth = {"stack": waiting[:-1], "adjacency": adjacency(near, order, len(prompt))}
    return row(prompt, order, truth, compat == "paper")


def walk(parent: dict[int, int], v: int) -> list[int]:
    """From v to the root that is its own parent."""
    path = [v]
    while parent[path[-1]] != path[-1]:
        path.append(parent[path[-1]])
    return path


def two_sided(near: list[list[int]], source: int, target: int) -> list[int]:
    """Whole levels by turns, the source first; the first vertex that both sides know ends it."""
    parents: list[dict[int, int]] = [{source: source}, {target: target}]
    levels, side = [[source], [target]], 0
    if source == target:
        return [source]
    while levels[side]:
        found = []
        for v in levels[side]:
            for w in near[v]:
                if w not in parents[side]:
                    parents[side][w] = v
                    found.append(w)
                if w in parents[1 - side]:
                    return walk(parents[0], w)[::-1] + walk(parents[1], w)[1:]
        levels[side], side = found, 1 - side
    raise AssertionError("no path")


def shortest_path(prompt: list[str], vertices: int | None = None, compat: str | None = None) -> Row:
    edges, n = edges_of(prompt[2:], vertices)
    source, target = int(prompt[0]), int(prompt[1])
    assert source != target, prompt
    near = neighbours(edges, n)
    path = two_sided(near, source, target)
    return row(prompt, path, {"adjacency": adjacency(near, path, len(prompt))}, compat == "paper")


def topological_sort(prompt: list[str], vertices: int | None = None, compat: str | None = None) -> Row:
    """Reversed post-order; roots ascending, the largest out-neighbour first."""
    edges, n = edges_of(prompt, vertices, directed=True)
    near = neighbours(edges, n, directed=True)
    done: list[int] = []
    open_: set[int] = set()

    def visit(v: int) -> None:
        assert v not in open_, "the edges have no cycle"
        open_.add(v)
        for w in reversed(near[v]):
            if w not in done:
                visit(w)
        open_.remove(v)
        done.append(v)

    for root in range(n):
        if root not in done:
            visit(root)
    order = done[::-1]
    return row(prompt, order, {"adjacency": adjacency(near, order, len(prompt))}, compat == "paper")


def minimum_spanning_tree(prompt: list[str], vertices: int | None = None, compat: str | None = None) -> Row:
    """Each edge in turn; its truth, read at its second token, says whether those before it already join its ends."""
    edges, n = edges_of(prompt, vertices)
    component, tree = list(range(n)), []
    joined: Reads = []
    for e, (u, v) in enumerate(edges):
        together = component[u] == component[v]
        joined.append((2 * e + 1, int(together)))
        if not together:
            tree += [u, v]
            component = merged(component, u, v)
    return row(prompt, tree, {"component": joined}, compat == "paper")


GRAPH_ORACLES: dict[str, Callable[..., Row]] = {
    "breadth_first_search": breadth_first_search,
    "depth_first_search": depth_first_search,
    "shortest_path": shortest_path,
    "topological_sort": topological_sort,
    "minimum_spanning_tree": minimum_spanning_tree,
}
