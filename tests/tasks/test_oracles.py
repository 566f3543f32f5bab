"""Every row that a task draws, byte for byte, against the oracle in plain Python that knows only the task's rules."""

from typing import Any

import jax
import numpy as np
import pytest
from oracles import END, EQUALS, ORACLES, Row

import elegans

CLASSES = {kind: "".join(word.capitalize() for word in kind.split("_")) for kind in ORACLES}
GRAPHS = ["breadth_first_search", "depth_first_search", "shortest_path", "topological_sort", "minimum_spanning_tree"]
BLOCKS = {  # tokens of a row of the published size, padding included
    "addition": 52,
    "multiplication": 67,
    "majority_of_majority": 67,
    "maximum_subarray": 130,
    "activity_selection": 66,
    "breadth_first_search": 124,
    "depth_first_search": 124,
    "shortest_path": 125,
    "topological_sort": 124,
    "minimum_spanning_tree": 133,
    "majority": 67,
    "bit_parity": 67,
    "inner_product": 36,
    "sorting": 34,
    "longest_common_subsequence": 50,
}
TRUTH_KINDS = {  # of every other feature: binary
    **dict.fromkeys(["max_ending_here", "start_time", "group_sum", "running_count"], ("number",)),
    **dict.fromkeys(["queue", "stack", "adjacency"], ("multilabel",)),
    "group_bit": ("binary", "multilabel"),  # four reads at one token, or one of four labels
}
PUBLISHED_MEANS = {"maximum_subarray": 31.0, "activity_selection": 8.2, "shortest_path": 4.5}  # scored tokens, `=` among them


def cases(small: bool) -> list[tuple[str, dict[str, Any]]]:
    """Each task at a small or at its published size; the graph tasks with and without their `=` scored."""
    lengths = dict.fromkeys(ORACLES, 8 if small else 16)
    lengths |= {"addition": 6, "multiplication": 6, "maximum_subarray": 12, "longest_common_subsequence": 6} if small else {}
    lengths |= {} if small else {"maximum_subarray": 64, "majority_of_majority": 32, "majority": 32, "bit_parity": 32}
    plain = [(kind, {"length": lengths[kind]}) for kind in BLOCKS if kind not in GRAPHS]
    vertices = {"vertices": 6 if small else 11}
    return plain + [(kind, vertices | compat) for kind in GRAPHS for compat in ({}, {"compat": "paper"})]


def name(value: object) -> str:
    return " ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def made(kind: str, fields: dict[str, Any]) -> Any:
    return getattr(elegans, CLASSES[kind])(**fields)


def drawn(task: Any, rows: int, seed: int) -> Any:
    keys = jax.random.split(jax.random.key(seed), rows)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(task.sample, (0, None)))(keys, task.prepare()))


def flat(value: Any) -> list[int]:
    """A value, a vector of labels or several of either, as one list."""
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else [value]


def by_position(reads: Any) -> dict[int, list[int]]:
    """What is read at each position; at -1 nothing is."""
    found: dict[int, list[int]] = {}
    for position, value in reads:
        if position != -1:
            found.setdefault(position, []).extend(flat(value))
    return found


def answered(kind: str, fields: dict[str, Any], symbols: list[str]) -> Row:
    prompt = symbols[: symbols.index(EQUALS) + 1]
    return ORACLES[kind](prompt, **{k: v for k, v in fields.items() if k != "length"})


def check(kind: str, fields: dict[str, Any], task: Any, examples: Any) -> None:
    """Each row drawn, its scores and its truth are the oracle's."""
    truths = {n: (t.positions.tolist(), t.values.tolist()) for n, t in examples.truth.items()}
    for i, (tokens, scored) in enumerate(zip(examples.tokens.tolist(), examples.scored.tolist(), strict=True)):
        symbols = [task.symbols[t] for t in tokens]
        expected = answered(kind, fields, symbols)
        padding = task.positions - len(expected.symbols)
        assert symbols == expected.symbols + [END] * padding
        assert scored == expected.scored + [False] * padding, symbols
        for feature, reads in expected.truth.items():
            positions, values = truths[feature]
            assert by_position(zip(positions[i], values[i], strict=True)) == by_position(reads), (feature, symbols)
        assert not expected.truth or set(truths) == set(expected.truth)  # where no feature is published, any will do
    for feature in expected.truth:
        assert examples.truth[feature].kind in TRUTH_KINDS.get(feature, ("binary",)), feature


@pytest.mark.parametrize(("kind", "fields"), cases(small=True), ids=name)
def test_rows_scores_and_truth_are_the_oracles(kind, fields) -> None:
    task = made(kind, fields)
    check(kind, fields, task, drawn(task, rows=200, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "fields"), cases(small=False), ids=name)
def test_ten_thousand_rows_of_the_published_size_are_the_oracles(kind, fields) -> None:
    task = made(kind, fields)
    examples = elegans.check_task(task, rows=10_000, seed=1).rows  # what the task promises besides
    check(kind, fields, task, examples)
    if kind in PUBLISHED_MEANS and (kind != "shortest_path" or "compat" in fields):
        lengths = examples.scored.sum(1)
        assert abs(lengths.mean() - PUBLISHED_MEANS[kind]) < 0.05 + 4 * lengths.std() / 100


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_of_the_published_size_have_the_published_length(kind) -> None:
    fields = dict(cases(small=False))[kind]
    assert made(kind, fields).positions == BLOCKS[kind]


def test_every_task_that_an_oracle_knows_is_compared() -> None:
    assert set(BLOCKS) == set(ORACLES)
