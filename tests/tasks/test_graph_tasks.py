"""Tasks on graphs: the law of the graphs, the shape of the rows, answers and truth by networkx, files of graphs."""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
from scipy.stats import chi2

from elegans import (
    BreadthFirstSearch,
    DepthFirstSearch,
    GraphTask,
    Invalid,
    MinimumSpanningTree,
    ShortestPath,
    TopologicalSort,
)
from elegans.randomness import keyed_hash
from elegans.tasks import counting, graph6, graphs
from elegans.tasks.base import Split
from elegans.types import Example

EQUALS, END = 26, 27
TASKS = [BreadthFirstSearch, DepthFirstSearch, ShortestPath, TopologicalSort, MinimumSpanningTree]
STARTS = {ShortestPath: 2, BreadthFirstSearch: 1, DepthFirstSearch: 1}
every_task = pytest.mark.parametrize("kind", TASKS, ids=lambda c: c.kind)
ROWS = 2000


@functools.cache
def drawn_with_content(task: GraphTask) -> tuple[Example, np.ndarray]:
    def one(key: jax.Array, data: Any) -> tuple[Example, jax.Array]:
        example = task.sample(key, data)
        return example, task.content(example)

    keys = jax.random.split(jax.random.key(0), ROWS)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(one, (0, None)))(keys, task.prepare()))


def draw(task: GraphTask) -> Example:
    return drawn_with_content(task)[0]


@pytest.fixture
def counted(monkeypatch) -> None:
    """Counting reads the rows that these tests have drawn: no second program for each task."""

    def rows(task: GraphTask, count: int) -> tuple[np.ndarray, np.ndarray]:
        return draw(task).tokens, draw(task).scored

    monkeypatch.setattr(counting, "rows", rows)
    for name in ("means", "plateau"):
        monkeypatch.setattr(counting, name, getattr(counting, name).__wrapped__)


def parts(task: GraphTask, tokens: list[int]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """What is asked about, the listed edges, and the answer."""
    equals, starts = tokens.index(EQUALS), STARTS.get(type(task), 0)
    listed = tokens[starts:equals]
    return tokens[:starts], list(zip(listed[::2], listed[1::2], strict=True)), tokens[equals + 1 : tokens.index(END)]


def undirected(edges: list[tuple[int, int]]) -> frozenset:
    return frozenset(map(frozenset, edges))


def truth_of(drawn: Example, name: str, row: int) -> dict[int, list[int]]:
    """Position -> label, or the set of the labels that are 1."""
    truth = drawn.truth[name]
    pairs = zip(truth.positions[row].tolist(), truth.values[row], strict=True)
    return {p: np.flatnonzero(v).tolist() if v.ndim else int(v) for p, v in pairs if p >= 0}


# ---- the law of the graphs


def all_connected(vertices: int) -> list[tuple[tuple[int, int], ...]]:
    pairs = list(itertools.combinations(range(vertices), 2))
    found = []
    for bits in itertools.product((0, 1), repeat=len(pairs)):
        edges = [e for e, b in zip(pairs, bits, strict=True) if b]
        graph = nx.Graph(edges)
        if len(graph) == vertices and nx.is_connected(graph):
            found.append(tuple(edges))
    return found


@pytest.mark.parametrize("vertices", [2, 3, 4, 5])
def test_connected_graphs_and_their_edges_are_counted_exactly(vertices) -> None:
    found = all_connected(vertices)
    assert graphs.connected_graphs(vertices) == (len(found), sum(map(len, found)))


def test_so_many_candidates_that_none_is_connected_once_in_a_billion() -> None:
    for n in range(2, 27):
        lost = 1 - graphs.connected_graphs(n)[0] / 2 ** math.comb(n, 2)
        assert lost ** graphs.candidates(n) < 1e-9
    assert graphs.candidates(11) == 5


def test_labelled_connected_graphs_are_uniform() -> None:
    found = all_connected(4)
    assert len(found) == 38
    draws = jax.jit(jax.vmap(lambda key: graphs.random_graph(key, 4)))(jax.random.split(jax.random.key(1), 20_000))
    pairs = list(itertools.combinations(range(4), 2))
    seen = Counter(tuple(e for e, b in zip(pairs, bits, strict=True) if b) for bits in np.asarray(draws).tolist())
    assert set(seen) == set(found)
    expected = 20_000 / 38
    statistic = sum((seen[g] - expected) ** 2 / expected for g in found)
    assert 1e-3 < chi2.sf(statistic, 37) < 1 - 1e-3


def test_eleven_vertices_have_the_edges_of_the_requirement_table() -> None:
    total, edges = graphs.connected_graphs(11)
    assert round(edges / total, 1) == 27.6
    draws = np.asarray(jax.jit(jax.vmap(lambda key: graphs.random_graph(key, 11)))(jax.random.split(jax.random.key(2), 20_000)))
    assert abs(draws.sum(1).mean() - edges / total) < 5 * math.sqrt(55 / 4 / 20_000)
    assert np.abs(draws.mean(0) - edges / total / 55).max() < 5 * math.sqrt(0.25 / 20_000)


@pytest.mark.parametrize("vertices", [4, 11])
@every_task
def test_every_row_is_a_connected_graph_with_sorted_edges_and_scores_from_behind_the_prompt(kind, vertices) -> None:
    task = kind(vertices=vertices)
    drawn = draw(task)
    for tokens, scored in zip(drawn.tokens.tolist(), drawn.scored.tolist(), strict=True):
        asked, edges, answer = parts(task, tokens)
        equals, end = tokens.index(EQUALS), tokens.index(END)
        listed = [tuple(sorted(e)) for e in edges]
        assert listed == sorted(set(listed)) and all(u < v < vertices for u, v in listed)
        assert kind is TopologicalSort or listed == edges
        assert len(nx.Graph(listed)) == vertices and nx.is_connected(nx.Graph(listed))
        assert len(set(asked)) == len(asked) and all(0 <= v < vertices for v in asked)
        assert len(answer) <= task.answer_length and set(tokens[end:]) == {END} and tokens.count(EQUALS) == 1
        assert scored == [equals < p <= end for p in range(task.positions)]


def test_blocks_vocabulary_and_lengths_are_those_of_the_requirement_table() -> None:
    assert [kind().positions for kind in TASKS] == [124, 124, 125, 124, 133]
    for kind in TASKS:
        assert kind().vocab_size == kind(vertices=5).vocab_size == 28
        assert kind().symbols[EQUALS] == "=" and kind().symbols[END] == "$"
    assert [kind(compat="paper").mean_positions() for kind in TASKS] == [69.36, 69.36, 61.91, 69.36, 77.36]
    assert [kind(compat="paper").scored_tokens() for kind in TASKS if kind is not ShortestPath] == [13, 13, 13, 22]


@every_task
def test_mean_lengths_are_those_of_counted_rows(kind, counted) -> None:
    task = kind()
    scored, positions = counting.means(task)
    assert abs(task.scored_tokens() - scored) < 1e-6
    assert abs(task.mean_positions() - positions) < 5 * math.sqrt(4 * 55 / 4 / ROWS)
    assert kind is not ShortestPath or abs(task.scored_tokens() - 3.54) < 0.05  # 4.5 with `=`


def test_the_paper_scores_the_same_rows_from_the_equals_sign(counted) -> None:
    task, theirs = ShortestPath(vertices=4), ShortestPath(vertices=4, compat="paper")
    ours, paper = draw(task), draw(theirs)
    assert np.array_equal(ours.tokens, paper.tokens)
    assert math.isclose(theirs.scored_tokens(), task.scored_tokens() + 1, rel_tol=1e-6)
    assert math.isclose(theirs.mean_positions(), task.mean_positions(), rel_tol=1e-6)
    assert math.isclose(theirs.plateau() * theirs.scored_tokens(), task.plateau() * task.scored_tokens(), rel_tol=1e-6)
    assert theirs.floor() == task.floor() == 0
    assert np.array_equal(paper.scored, ours.scored | (paper.tokens == EQUALS))


# ---- answers and truth


def graph_of(edges: list[tuple[int, int]], directed: bool = False) -> nx.Graph:
    return (nx.DiGraph if directed else nx.Graph)(edges)


@pytest.mark.parametrize(("kind", "waits"), [(BreadthFirstSearch, "queue"), (DepthFirstSearch, "stack")])
def test_searches_visit_all_vertices_and_what_waits_are_unvisited_neighbours(kind, waits) -> None:
    task, drawn = kind(vertices=11), draw(kind(vertices=11))
    for row, tokens in enumerate(drawn.tokens[:500].tolist()):
        (start,), edges, answer = parts(task, tokens)
        graph, equals = graph_of(edges), tokens.index(EQUALS)
        assert answer[0] == start and sorted(answer) == list(range(11))
        reads = {}
        for r in range(11 if waits == "queue" else 10):
            visited = set(answer[: r + 1])
            reads[equals + 1 + r] = sorted(set().union(*(graph[v] for v in visited)) - visited)
        assert truth_of(drawn, waits, row) == reads
        assert truth_of(drawn, "adjacency", row) == {equals + 1 + r: sorted(graph[v]) for r, v in enumerate(answer)}
        if waits == "queue":
            far = nx.single_source_shortest_path_length(graph, start)
            assert [far[v] for v in answer] == sorted(far.values())
    assert drawn.truth[waits].kind == drawn.truth["adjacency"].kind == "multilabel"


def test_depth_first_orders_are_those_of_networkx_with_neighbours_descending() -> None:
    task = DepthFirstSearch(vertices=11)
    for tokens in draw(task).tokens[:500].tolist():
        (start,), edges, answer = parts(task, tokens)
        assert answer == list(nx.dfs_preorder_nodes(graph_of(edges), start, sort_neighbors=lambda v: sorted(v, reverse=True)))


def test_breadth_first_orders_are_those_of_networkx_with_neighbours_ascending() -> None:
    task = BreadthFirstSearch(vertices=11)
    for tokens in draw(task).tokens[:500].tolist():
        (start,), edges, answer = parts(task, tokens)
        found = [start, *(v for _, v in nx.bfs_edges(graph_of(edges), start, sort_neighbors=sorted))]
        assert answer == found


@pytest.mark.parametrize("vertices", [4, 11])
def test_paths_are_shortest_and_ends_uniform(vertices) -> None:
    task, drawn = ShortestPath(vertices=vertices), draw(ShortestPath(vertices=vertices))
    ends = Counter()
    for row, tokens in enumerate(drawn.tokens.tolist()):
        (source, target), edges, answer = parts(task, tokens)
        ends[source, target] += 1
        graph, equals = graph_of(edges), tokens.index(EQUALS)
        assert (answer[0], answer[-1]) == (source, target) and nx.is_path(graph, answer)
        assert len(answer) == nx.shortest_path_length(graph, source, target) + 1
        if len(answer) == 3:
            assert answer[1] == min(set(graph[source]) & set(graph[target]))
        if row < 300:
            assert truth_of(drawn, "adjacency", row) == {equals + 1 + r: sorted(graph[v]) for r, v in enumerate(answer)}
    pairs = vertices * (vertices - 1)
    statistic = sum((ends[p] - ROWS / pairs) ** 2 * pairs / ROWS for p in itertools.permutations(range(vertices), 2))
    assert 1e-3 < chi2.sf(statistic, pairs - 1) < 1 - 1e-3


def test_long_paths_are_found_too() -> None:
    """Along a line, in both directions and with a shortcut: every distance up to ten."""
    task = ShortestPath()
    line = [(i, i + 1) for i in range(10)]
    listed = graph6.pairs(11).tolist()
    edges = jnp.array([tuple(e) in line for e in listed])
    solved = jax.jit(jax.vmap(lambda key: (lambda s: (s.starts, s.answer, s.length))(task.solve(key, edges))))
    starts, answers, lengths = map(np.asarray, solved(jax.random.split(jax.random.key(0), 400)))
    assert set(lengths.tolist()) == set(range(2, 12))
    for (a, b), answer, length in zip(starts.tolist(), answers.tolist(), lengths.tolist(), strict=True):
        assert answer[:length] == list(range(a, b + 1) if a < b else range(a, b - 1, -1))


@pytest.mark.parametrize("vertices", [4, 11])
def test_orders_have_every_tail_before_its_head(vertices) -> None:
    task, drawn = TopologicalSort(vertices=vertices), draw(TopologicalSort(vertices=vertices))
    for row, tokens in enumerate(drawn.tokens.tolist()):
        _, edges, answer = parts(task, tokens)
        place = {v: i for i, v in enumerate(answer)}
        assert sorted(answer) == list(range(vertices)) and all(place[u] < place[v] for u, v in edges)
        if row < 300:
            graph, equals = graph_of(edges, directed=True), tokens.index(EQUALS)
            assert truth_of(drawn, "adjacency", row) == {equals + 1 + r: sorted(graph[v]) for r, v in enumerate(answer)}


def test_orientations_are_those_of_uniform_permutations() -> None:
    heights = jax.jit(jax.vmap(lambda key: graphs.random_heights(key, 3)))(jax.random.split(jax.random.key(3), 6000))
    found = Counter(map(tuple, np.argsort(np.asarray(heights), 1).tolist()))
    assert len(found) == 6 and chi2.sf(sum((c - 1000) ** 2 / 1000 for c in found.values()), 5) > 1e-3


@pytest.mark.parametrize("vertices", [4, 11])
def test_trees_span_and_are_the_first_ones(vertices) -> None:
    task, drawn = MinimumSpanningTree(vertices=vertices), draw(MinimumSpanningTree(vertices=vertices))
    for row, tokens in enumerate(drawn.tokens[:500].tolist()):
        _, edges, answer = parts(task, tokens)
        graph = nx.Graph([(u, v, {"weight": i}) for i, (u, v) in enumerate(edges)])  # weights that make Kruskal's tree the only one
        tree = sorted(tuple(sorted(e)) for e in nx.minimum_spanning_tree(graph).edges)
        assert list(zip(answer[::2], answer[1::2], strict=True)) == tree
        assert truth_of(drawn, "component", row) == {2 * i + 1: int(e not in tree) for i, e in enumerate(edges)}
    assert drawn.truth["component"].kind == "binary"


EXAMPLES = {
    BreadthFirstSearch: ("2 0 1 0 3 1 2 = 2 1 0 3", {"queue": [[1], [0], [3], []]}),
    DepthFirstSearch: ("0 0 1 0 3 1 2 = 0 3 1 2", {"stack": [[1, 3], [1], [2]]}),
    ShortestPath: ("2 3 0 1 0 3 1 2 = 2 1 0 3", {"adjacency": [[1], [0, 2], [1, 3], [0]]}),
    TopologicalSort: ("0 1 3 0 2 1 = 3 2 0 1", {"adjacency": [[0], [1], [1], []]}),
    MinimumSpanningTree: ("0 1 0 3 1 2 1 3 = 0 1 0 3 1 2", {"component": [0, 0, 0, 1]}),
}


@every_task
def test_the_rows_that_the_docstrings_draw(kind) -> None:
    text, truth = EXAMPLES[kind]
    task, drawn = kind(vertices=4), draw(kind(vertices=4))
    prompt = text.split("=")[0] + "="
    row = next(i for i, tokens in enumerate(drawn.tokens) if task.text(tokens).startswith(prompt))
    assert task.text(drawn.tokens[row]).split(" $")[0] == text
    padding = task.positions - len(text.split())
    drawn_text = " ".join(kind.__doc__.split("\n")[2].split(":", 1)[1].split())
    assert drawn_text == text + " $" * padding
    for name, labels in truth.items():
        assert list(truth_of(drawn, name, row).values()) == labels


# ---- contents


@every_task
def test_the_content_is_the_graph_alone(kind) -> None:
    """Small graphs have ranks; the same edges have one rank, whatever is asked about them."""
    task = kind(vertices=4)
    drawn, content = drawn_with_content(task)
    by_graph: dict = {}
    for tokens, rank in zip(drawn.tokens.tolist(), content[:, 0].tolist(), strict=True):
        by_graph.setdefault(undirected(parts(task, tokens)[1]), set()).add(rank)
    assert all(len(ranks) == 1 for ranks in by_graph.values())
    assert sorted(next(iter(ranks)) for ranks in by_graph.values()) == list(range(38)) and task.contents == 38


def test_contents_of_large_graphs_tell_them_apart_and_are_the_same_in_every_task() -> None:
    """The same keys draw the same graphs."""
    found, contents = [], []
    for kind in TASKS:
        drawn, content = drawn_with_content(kind())
        found.append([undirected(parts(kind(), t)[1]) for t in drawn.tokens.tolist()])
        contents.append(content.tolist())
    assert all(f == found[0] for f in found) and all(c == contents[0] for c in contents)
    assert len(set(found[0])) == len(set(map(tuple, contents[0]))) > ROWS - 10
    assert [kind(vertices=n).contents for n in (5, 6, 7)] == [728, 26704, None]


# ---- losses


@every_task
def test_the_plateau_is_counted_from_the_equals_sign(kind, counted) -> None:
    """Every scored token is counted by its distance from `=`, over all rows that have one there."""
    task = kind(vertices=4)
    drawn, seen = draw(task), {}
    for tokens in drawn.tokens.tolist():
        for r, token in enumerate([*parts(task, tokens)[2], END]):
            seen.setdefault(r, Counter())[token] += 1
    nats = -sum(c * math.log(c / sum(by.values())) for by in seen.values() for c in by.values())
    correction = sum(len(by) - 1 for by in seen.values()) / 2
    assert math.isclose(task.plateau(), (nats + correction) / drawn.scored.sum(), rel_tol=1e-9)


# ---- graphs from a file


def write(folder: Path, *found: nx.Graph, header: bool = False) -> str:
    path = folder / "graphs.g6"
    path.write_bytes(b"".join(nx.to_graph6_bytes(g, header=header and g is found[0]) for g in found))
    return str(path)


@pytest.mark.parametrize("vertices", [2, 5, 11, 26])
def test_graph6_is_read_as_networkx_reads_it(vertices, tmp_path) -> None:
    found = [g for g in (nx.gnp_random_graph(vertices, 0.5 + i % 2 * 0.4, seed=i) for i in range(40)) if nx.is_connected(g)]
    bits = graph6.read(write(tmp_path, *found, header=vertices == 5), vertices)
    pairs = list(itertools.combinations(range(vertices), 2))
    lines = (tmp_path / "graphs.g6").read_bytes().removeprefix(b">>graph6<<").split()
    for row, line in zip(bits.tolist(), lines, strict=True):
        edges = {e for e, b in zip(pairs, row, strict=True) if b}
        assert edges == {tuple(sorted(e)) for e in nx.from_graph6_bytes(line).edges}


def test_graphs_of_a_file_are_drawn_evenly_under_random_names() -> None:
    """A star and a line of four vertices have four and twelve labelled graphs."""
    task = BreadthFirstSearch(vertices=4, graphs=str(Path(__file__).parents[1] / "data" / "four.g6"))
    found = Counter(tuple(parts(task, t)[1]) for t in draw(task).tokens.tolist())
    star = {g: c for g, c in found.items() if max(dict(nx.Graph(g).degree).values()) == 3}
    assert len(star) == 4 and len(found) == 16
    expected = {g: ROWS / 2 / (4 if g in star else 12) for g in found}
    assert 1e-3 < chi2.sf(sum((found[g] - e) ** 2 / e for g, e in expected.items()), 15) < 1 - 1e-3
    assert task.mean_positions() == 1 + 2 * 3 + 1 + 4 + 1


def test_unusable_files_of_graphs_are_refused_in_one_line(tmp_path) -> None:
    def refused(content: bytes, message: str) -> None:
        path = tmp_path / "bad.g6"
        path.write_bytes(content)
        with pytest.raises(Invalid, match=message) as caught:
            BreadthFirstSearch(vertices=5, graphs=str(path)).prepare()
        assert str(caught.value).startswith("graphs: ") and "\n" not in str(caught.value)

    good = nx.to_graph6_bytes(nx.path_graph(5), header=False)
    refused(b"", "the file is empty")
    refused(good + nx.to_graph6_bytes(nx.path_graph(6), header=False), "line 2 has 6 vertices; allowed: vertices=5")
    refused(good + nx.to_graph6_bytes(nx.path_graph(70), header=False), "line 2 has 63 or more vertices")
    refused(good + nx.to_graph6_bytes(nx.empty_graph(5), header=False), "line 2 is not connected")
    refused(good + good.strip() + b"?\n", "line 2 is no graph6")
    refused(good + good[:2] + b"\n", "line 2 is no graph6")
    refused(good.strip()[:-1] + b"\x20x\n", "line 1 is no graph6")
    refused(good.strip()[:-1] + bytes([good[-2] + 1]), "line 1 is no graph6")  # a bit behind the last edge
    refused(b":Fa@x^\n", "line 1 is no graph6")  # sparse6
    with pytest.raises(Invalid, match=r"^graphs: .* is not allowed; No such file or directory"):
        BreadthFirstSearch(vertices=5, graphs=str(tmp_path / "nowhere.g6")).prepare()


def test_more_vertices_than_symbols_are_refused() -> None:
    for vertices in (1, 27):
        with pytest.raises(Invalid, match=r"^vertices: "):
            BreadthFirstSearch(vertices=vertices)


def test_every_renaming_of_a_file_is_found_once() -> None:
    """By the orbit's size, n! over the number of automorphisms."""
    for graph, count in ((nx.complete_graph(6), 1), (nx.star_graph(5), 6), (nx.cycle_graph(6), 60), (nx.path_graph(6), 360)):
        bits = graph6.decode([nx.to_graph6_bytes(graph, header=False).strip()], 6)
        found = np.concatenate(list(graph6.renamed(np.repeat(bits, 2, 0), 6)))
        assert len(found) == len({row.tobytes() for row in found}) == count


@pytest.mark.parametrize("vertices", [5, 11])
def test_a_file_that_leaves_a_part_empty_is_refused(vertices, tmp_path) -> None:
    """All names of a complete graph give one graph. A star has one for each vertex: refused where no drawn row is of some part."""
    alone = BreadthFirstSearch(vertices=vertices, graphs=write(tmp_path, nx.complete_graph(vertices)))
    with pytest.raises(Invalid, match=r"^split: '1 labelled graphs.*would be empty"):
        alone.split_table()
    assert dataclasses.replace(alone, split=None).split_table() == ()
    star = BreadthFirstSearch(vertices=vertices, graphs=write(tmp_path, nx.star_graph(vertices - 1)))
    contents = drawn_with_content(star)[1]
    refused = []
    for key in range(12):
        split = Split(0.4, 0.3, key)
        task = dataclasses.replace(star, split=split)
        drawn = split.table(task.contents)[contents[:, 0]] if task.contents else split.cut(keyed_hash(contents, key))
        try:
            task.split_table()
        except Invalid:
            refused.append(key)
        assert (key in refused) == (len(set(drawn.tolist())) < 3)
    assert vertices == 11 or 0 < len(refused) < 12
