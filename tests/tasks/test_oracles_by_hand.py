"""The oracles against rows worked out on paper, brute force and networkx."""

import itertools
import random

import networkx as nx
import pytest
from oracles import ORACLES, Row

ROWS = [
    ("addition", "0 1 1 0 + 1 1 1 0 =", "1 0 1 1 0"),  # 6 + 7 = 13
    ("multiplication", "1 1 0 + 1 1 0 =", "1 0 0 1 0 0"),  # 3 * 3 = 9
    ("multiplication", "1 1 1 + 1 1 1 =", "1 0 0 0 1 1"),  # 7 * 7 = 49
    ("majority_of_majority", "1 1 1 0 1 1 1 1 =", "1"),
    ("majority_of_majority", "1 1 1 0 0 1 1 1 =", "0"),  # groups 1 0 0 1 tie
    ("majority", "1 1 0 0 =", "0"),
    ("majority", "1 1 0 1 =", "1"),
    ("bit_parity", "1 0 1 1 =", "1"),
    ("inner_product", "1 1 0 + 0 1 1 =", "1"),
    ("inner_product", "1 1 1 + 1 0 1 =", "0"),
    ("maximum_subarray", "11 6 12 8 9 10 4 12 =", "12"),  # 2 -3 3 -1 0 1 -5 3: 3, though 3 -1 0 1 is as good
    ("maximum_subarray", "4 7 7 =", "7"),  # -5 -2 -2: never empty
    ("maximum_subarray", "10 8 13 =", "10 8 13"),  # 1 -1 4: a sum of 0 goes on
    ("activity_selection", "1 3 3 5 4 4 5 6 =", "1 4 5 6"),
    ("activity_selection", "3 1 4 4 =", "3 4"),  # both end at 4: the first shown
    ("activity_selection", "1 2 2 3 =", "1 2 2 3"),  # one may start when another ends
    ("sorting", "10 2 0 15 2 =", "0 2 2 10 15"),
    ("longest_common_subsequence", "1 2 3 2 1 3 =", "1 3"),  # not 2 3
    ("longest_common_subsequence", "1 2 3 4 =", ""),
    ("breadth_first_search", "2 0 1 0 2 1 3 2 3 3 4 =", "2 0 3 1 4"),
    ("depth_first_search", "2 0 1 0 2 1 3 2 3 3 4 =", "2 3 4 1 0"),
    ("depth_first_search", "0 0 2 0 3 1 3 2 3 =", "0 3 2 1"),  # marking on push would give 0 3 1 2
    ("shortest_path", "0 1 0 1 0 2 1 3 2 3 3 4 =", "0 1"),
    ("shortest_path", "3 0 0 1 0 2 1 3 2 3 3 4 =", "3 1 0"),
    ("shortest_path", "0 4 0 1 0 2 1 3 2 3 3 4 =", "0 1 3 4"),
    ("shortest_path", "4 0 0 1 0 2 1 3 2 3 3 4 =", "4 3 1 0"),
    ("shortest_path", "0 7 0 1 0 2 1 3 2 4 3 6 4 5 5 7 6 7 =", "0 2 4 5 7"),  # 5 is the target's smallest neighbour
    ("topological_sort", "1 0 2 0 1 2 =", "1 2 0"),
    ("topological_sort", "0 1 0 2 3 2 =", "3 0 1 2"),
    ("minimum_spanning_tree", "0 1 0 2 1 2 2 3 =", "0 1 0 2 2 3"),
]
CARRIES = {  # of 7 * 7 of three bits, = at token 7: 7 + 14, then 21 + 28
    "first_operand": [(7, 1), (8, 1), (9, 1)],
    "carry_2": [(9, 1), (10, 1), (11, 1)],
    "carry_3": [(10, 1), (11, 1), (12, 1)],
}
CARRIES_OF_THREE = {  # of 3 * 3: 3 + 6, then nothing is added
    "first_operand": [(7, 1), (8, 1), (9, 0)],
    "carry_2": [(9, 1), (10, 1), (11, 0)],
    "carry_3": [(10, 0), (11, 0), (12, 0)],
}
ROWS_OF_SEARCH = [(0, 1, 1, 0, 0), (1, 0, 0, 1, 0), (1, 0, 0, 1, 0), (0, 1, 1, 0, 1), (0, 0, 0, 1, 0)]
TRUTHS = [
    (
        "addition",
        "0 1 1 0 + 1 1 1 0 =",
        {"first_operand": [(9, 0), (10, 1), (11, 1), (12, 0)], "carry": [(10, 0), (11, 1), (12, 1), (13, 0)]},
    ),
    ("multiplication", "1 1 1 + 1 1 1 =", CARRIES),
    ("multiplication", "1 1 0 + 1 1 0 =", CARRIES_OF_THREE),
    (
        "majority_of_majority",
        "1 1 1 0 1 1 1 1 =",
        {
            "group_sum": [(8, (2, 1, 2, 2))],
            "group_bit": [(8, (1, 0, 1, 1))],
            "running_count": [(0, 1), (1, 2), (2, 1), (3, 1), (4, 1), (5, 2), (6, 1), (7, 2)],
        },
    ),
    ("majority", "0 1 0 1 =", {"running_count": [(0, 0), (1, 1), (2, 1), (3, 2)]}),
    (
        "maximum_subarray",
        "11 6 12 8 9 10 4 12 =",
        {
            "previous_negative": list(enumerate([0, 1, 0, 1, 0, 0, 1, 0], 1)),
            "max_ending_here": list(enumerate([2, -1, 3, 2, 2, 3, -2, 3], 1)),
        },
    ),
    ("activity_selection", "1 3 3 5 4 4 5 6 =", {"start_time": [(4, 1), (5, 3), (6, 3), (7, 5)]}),
    (
        "breadth_first_search",
        "2 0 1 0 2 1 3 2 3 3 4 =",
        {
            "queue": list(enumerate([(1, 0, 0, 1, 0), (0, 1, 0, 1, 0), (0, 1, 0, 0, 1), (0, 0, 0, 0, 1), (0, 0, 0, 0, 0)], 12)),
            "adjacency": [(12 + r, ROWS_OF_SEARCH[v]) for r, v in enumerate([2, 0, 3, 1, 4])],
        },
    ),
    (
        "depth_first_search",
        "2 0 1 0 2 1 3 2 3 3 4 =",
        {
            "stack": list(enumerate([(1, 0, 0, 1, 0), (1, 1, 0, 0, 1), (1, 1, 0, 0, 0), (1, 0, 0, 0, 0)], 12)),
            "adjacency": [(12 + r, ROWS_OF_SEARCH[v]) for r, v in enumerate([2, 3, 4, 1, 0])],
        },
    ),
    (
        "shortest_path",
        "3 0 0 1 0 2 1 3 2 3 3 4 =",
        {"adjacency": [(13, ROWS_OF_SEARCH[3]), (14, ROWS_OF_SEARCH[1]), (15, ROWS_OF_SEARCH[0])]},
    ),
    (
        "topological_sort",
        "0 1 0 2 3 2 =",
        {"adjacency": [(7, (0, 0, 1, 0)), (8, (0, 1, 1, 0)), (9, (0, 0, 0, 0)), (10, (0, 0, 0, 0))]},
    ),
    ("minimum_spanning_tree", "0 1 0 2 1 2 2 3 =", {"component": [(1, 0), (3, 0), (5, 1), (7, 0)]}),
]
UNTRUE = [
    ("addition", "0 1 + 1 ="),
    ("activity_selection", "1 1 11 2 ="),  # it would last ten
    ("sorting", "16 ="),
    ("breadth_first_search", "0 0 2 0 1 ="),  # out of order
    ("breadth_first_search", "0 0 1 2 3 ="),  # in two parts
    ("minimum_spanning_tree", "1 0 ="),
    ("topological_sort", "0 1 2 0 1 2 ="),  # a cycle
]


@pytest.mark.parametrize(("kind", "prompt", "answer"), ROWS, ids=lambda v: v.replace(" ", ""))
def test_answers_worked_out_on_paper(kind, prompt, answer) -> None:
    found = ORACLES[kind](prompt.split())
    assert found.symbols == [*prompt.split(), *answer.split(), "$"]


@pytest.mark.parametrize(("kind", "prompt", "truth"), TRUTHS, ids=[t[0] for t in TRUTHS])
def test_truth_worked_out_on_paper(kind, prompt, truth) -> None:
    assert ORACLES[kind](prompt.split()).truth == truth


@pytest.mark.parametrize(("kind", "prompt"), UNTRUE)
def test_prompts_that_no_task_draws_are_refused(kind, prompt) -> None:
    with pytest.raises(AssertionError):
        ORACLES[kind](prompt.split())


def test_every_oracle_has_a_row_on_paper() -> None:
    assert {r[0] for r in ROWS} == set(ORACLES) and len(ORACLES) == 15


def test_the_equals_sign_of_a_graph_is_scored_on_request_only() -> None:
    prompt = list("001=")
    assert ORACLES["breadth_first_search"](prompt).scored == [False] * 4 + [True] * 3
    assert ORACLES["breadth_first_search"](prompt, compat="paper").scored == [False] * 3 + [True] * 4
    assert ORACLES["bit_parity"](["1", "="]).scored == [False, True, True, True]


# ---- bits and sequences


def test_products_and_sums_are_those_of_integers() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        n = rng.choice([1, 5, 16])
        x, y = rng.getrandbits(n), rng.getrandbits(n)
        prompt = [*f"{x:0{n}b}"[::-1], "+", *f"{y:0{n}b}"[::-1], "="]
        assert "".join(ORACLES["multiplication"](prompt).symbols[2 * n + 2 : -1])[::-1] == f"{x * y:0{2 * n}b}"
        assert "".join(ORACLES["addition"](prompt).symbols[2 * n + 2 : -1])[::-1] == f"{x + y:0{n + 1}b}"


def test_the_carries_of_a_product_are_those_of_a_written_addition() -> None:
    """Column by column: a bit of the sum so far, a bit of the partial product, the carry."""
    rng = random.Random(1)
    n = 7
    for _ in range(200):
        x, y = rng.getrandbits(n), rng.getrandbits(n)
        truth = ORACLES["multiplication"]([*f"{x:0{n}b}"[::-1], "+", *f"{y:0{n}b}"[::-1], "="]).truth
        total = [x >> c & y & 1 for c in range(2 * n)]
        for k in range(2, n + 1):
            partial = [(x << k - 1) >> c & 1 & y >> (k - 1) for c in range(2 * n)]
            carry, into = 0, {}
            for c in range(2 * n):
                into[c] = carry
                total[c], carry = (total[c] + partial[c] + carry) % 2, (total[c] + partial[c] + carry) // 2
            assert truth[f"carry_{k}"] == [(2 * n + 1 + k + r, into[k + r]) for r in range(n)]


def test_the_subarray_is_the_best_that_ends_first_and_then_starts_first() -> None:
    rng = random.Random(2)
    for _ in range(300):
        values = [rng.randint(-3, 3) for _ in range(rng.randint(1, 9))]
        spans = itertools.combinations(range(len(values) + 1), 2)
        first, last = max(spans, key=lambda s: (sum(values[s[0] : s[1]]), -s[1], -s[0]))
        shown = [str(v + 9) for v in values]
        assert ORACLES["maximum_subarray"]([*shown, "="]).symbols == [*shown, "=", *shown[first:last], "$"]


def compatible(activities) -> bool:
    ordered = sorted(activities)
    return all(a[1] <= b[0] for a, b in itertools.pairwise(ordered))


def test_no_choice_has_more_activities() -> None:
    rng = random.Random(3)
    for _ in range(100):
        times = [(s := rng.randint(1, 9), s + rng.randint(1, 9)) for _ in range(6)]
        prompt = [str(t[i]) for i in (0, 1) for t in times]
        answer = list(map(int, ORACLES["activity_selection"]([*prompt, "="]).symbols[13:-1]))
        chosen = list(zip(answer[::2], answer[1::2], strict=True))
        assert compatible(chosen) and set(chosen) <= set(times)
        assert not any(compatible(c) for c in itertools.combinations(times, len(chosen) + 1))


def test_no_common_subsequence_is_longer() -> None:
    rng = random.Random(4)
    for _ in range(100):
        x, y = ([rng.choice("123") for _ in range(5)] for _ in range(2))
        answer = ORACLES["longest_common_subsequence"]([*x, *y, "="]).symbols[11:-1]
        parts = [{c for k in range(6) for c in itertools.combinations(s, k)} for s in (x, y)]
        assert tuple(answer) in parts[0] & parts[1]
        assert len(answer) == max(map(len, parts[0] & parts[1]))


# ---- graphs


def graphs(count: int, vertices: int = 9, seed: int = 5):
    """Connected graphs, sparse and dense, with their edges as a prompt shows them."""
    rng = random.Random(seed)
    while count:
        share = rng.choice([0.2, 0.3, 0.5, 0.9])
        edges = [e for e in itertools.combinations(range(vertices), 2) if rng.random() < share]
        graph = nx.Graph()
        graph.add_nodes_from(range(vertices))
        graph.add_edges_from(edges)
        if nx.is_connected(graph):
            count -= 1
            yield graph, edges, rng


def asked(kind: str, start: list[int], edges) -> tuple[Row, list[int]]:
    """The oracle's row, and the numbers of its answer."""
    prompt = [*map(str, start), *(str(v) for e in edges for v in e), "="]
    found = ORACLES[kind](prompt)
    return found, [int(s) for s in found.symbols[len(prompt) : -1]]


def frontiers(graph: nx.Graph, order: list[int]) -> list[tuple[int, ...]]:
    """Unvisited neighbours of the visited set, after each vertex."""
    seen = [set(order[: r + 1]) for r in range(len(order))]
    return [tuple(int(v not in s and any(u in s for u in graph[v])) for v in sorted(graph)) for s in seen]


def test_breadth_first_orders_are_those_of_networkx() -> None:
    for graph, edges, rng in graphs(100):
        start = rng.randrange(9)
        found, order = asked("breadth_first_search", [start], edges)
        assert order == [start, *(v for _, v in nx.bfs_edges(graph, start, sort_neighbors=sorted))]
        depth = nx.single_source_shortest_path_length(graph, start)
        assert [depth[v] for v in order] == sorted(depth.values())
        assert [v for _, v in found.truth["queue"]] == frontiers(graph, order)


def test_depth_first_orders_are_those_of_networkx() -> None:
    for graph, edges, rng in graphs(100):
        start = rng.randrange(9)
        found, order = asked("depth_first_search", [start], edges)
        assert order == list(nx.dfs_preorder_nodes(graph, start, sort_neighbors=lambda ns: sorted(ns, reverse=True)))
        assert [v for _, v in found.truth["stack"]] == frontiers(graph, order)[:-1]


def test_paths_are_shortest_and_the_first_by_the_rule_of_their_length() -> None:
    orders = {
        2: lambda p: p[1],
        3: lambda p: p,
        4: lambda p: (p[3], p[2], p[1]),
        5: lambda p: p,
    }
    lengths = set()
    for graph, edges, rng in graphs(600):
        source, target = rng.sample(range(9), 2)
        _, path = asked("shortest_path", [source, target], edges)
        length = nx.shortest_path_length(graph, source, target)
        assert len(path) == length + 1 and nx.is_path(graph, path) and (path[0], path[-1]) == (source, target)
        if length in orders:
            lengths.add(length)
            assert path == min(nx.all_shortest_paths(graph, source, target), key=orders[length])
    assert lengths == set(orders)


def test_topological_orders_are_valid_and_those_of_networkx() -> None:
    for _, edges, rng in graphs(100):
        rank = rng.sample(range(9), 9)
        shown = [(u, v) if rank[u] < rank[v] else (v, u) for u, v in edges]
        found, order = asked("topological_sort", [], shown)
        assert sorted(order) == list(range(9)) and all(order.index(u) < order.index(v) for u, v in shown)
        graph = nx.DiGraph()
        graph.add_nodes_from(range(9))
        graph.add_edges_from(shown)
        assert order == list(nx.dfs_postorder_nodes(graph, sort_neighbors=lambda ns: sorted(ns, reverse=True)))[::-1]
        assert [v for _, v in found.truth["adjacency"]] == [tuple(int(graph.has_edge(u, v)) for v in range(9)) for u in order]


def test_trees_span_and_are_the_first() -> None:
    for graph, edges, _ in graphs(100):
        found, answer = asked("minimum_spanning_tree", [], edges)
        tree = list(zip(answer[::2], answer[1::2], strict=True))
        assert nx.is_tree(nx.Graph(tree)) and len(tree) == 8 and set(tree) <= set(edges)
        for weight, (u, v) in enumerate(edges):
            graph[u][v]["weight"] = weight
        assert tree == sorted(tuple(sorted(e)) for e in nx.minimum_spanning_edges(graph, data=False))
        joined = [nx.has_path(nx.Graph([*((v, v) for v in range(9)), *edges[:e]]), u, v) for e, (u, v) in enumerate(edges)]
        assert found.truth["component"] == [(2 * e + 1, int(j)) for e, j in enumerate(joined)]
