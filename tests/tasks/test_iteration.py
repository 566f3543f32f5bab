"""Iterative tasks against plain Python: tokens, scores, states, contents, and what their losses are worth."""

import functools
import itertools
import math
from collections import Counter
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles_iteration import EOI, EOS, row
from scipy.stats import chi2

from elegans import BinaryCopy, Invalid, Parity, Polynomial, Split, spec
from elegans.tasks.counting import plateau as counted_plateau
from elegans.tasks.iteration import IterativeTask
from elegans.tasks.sampling import draw_set, prepare
from elegans.types import Example

TASKS = {
    "copy, no cot, paper": BinaryCopy(length=4, cot=False, compat="paper"),
    "polynomial from 0": Polynomial(length=6, shortest=1, start="zero", final_weight=3.0),
    "polynomial mod 7, no cot, paper": Polynomial(length=4, shortest=1, modulus=7, start="zero", cot=False, compat="paper"),
    "polynomial, paper": Polynomial(length=5, shortest=1, compat="paper"),
}
MORE = {
    "copy": BinaryCopy(length=5, shortest=2),
    "polynomial": Polynomial(length=16, shortest=1),
    "polynomial, no cot": Polynomial(length=5, shortest=2, cot=False),
    "parity": Parity(length=6, shortest=1),
    "parity, no cot, paper": Parity(length=5, shortest=2, cot=False, compat="paper"),
}
SMALL = {
    "copy": BinaryCopy(length=4, shortest=2),
    "mod 4": Polynomial(length=3, shortest=1, modulus=4),
    "mod 5 from 0, no cot": Polynomial(length=3, shortest=2, modulus=5, start="zero", cot=False),
    "mod 3, no cot, paper": Polynomial(length=4, shortest=1, modulus=3, cot=False, compat="paper"),
    "mod 6, paper": Polynomial(length=3, modulus=6, start="zero", compat="paper"),
}


def oracle(task: IterativeTask, x: list[int]) -> Any:
    polynomial = {"start": task.start, "modulus": task.modulus} if isinstance(task, Polynomial) else {}
    return row(task.kind, x, task.length, task.cot, task.compat == "paper", **polynomial)


def drawn(task: IterativeTask, rows: int, seed: int = 0) -> Example:
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda key: task.sample(key, ())))(jax.random.split(jax.random.key(seed), rows)))


def inputs_of(symbols: list[str]) -> list[int]:
    return [int(s) for s in symbols[1 : symbols.index(EOI)]]


def check(task: IterativeTask, rows: int) -> None:
    examples = drawn(task, rows)
    truth, lengths = examples.truth, task.length - (task.shortest or task.length) + 1
    kind, classes = ("categorical", task.modulus) if isinstance(task, Polynomial) else ("binary", None)
    assert {(truth[name].kind, truth[name].classes) for name in ("input", "state")} == {(kind, classes)}
    for i in range(rows):
        symbols = [task.symbols[t] for t in examples.tokens[i]]
        x = inputs_of(symbols)
        expected = oracle(task, x)
        assert symbols == expected.symbols
        assert examples.scored[i].tolist() == expected.scored
        for name, values in (("input", x), ("state", expected.states)):
            there = truth[name].positions[i] >= 0
            assert truth[name].positions[i][there].tolist() == expected.reads
            assert truth[name].values[i][there].tolist() == values
        if task.cot:
            assert expected.reads[int(truth["step"].values[i, 0])] == truth["step"].positions[i, 0]
        if task.final_weight is not None:
            last = symbols.index(EOS) - 1
            assert examples.weights[i].tolist() == [task.final_weight if p == last else 1 for p in range(task.positions)]
    assert ("step" in truth) == task.cot and (examples.weights is None) == (task.final_weight is None)
    counts = np.bincount([len(inputs_of([task.symbols[t] for t in r])) for r in examples.tokens])[-lengths:]
    assert len(counts) == lengths and (lengths == 1 or even(counts))
    if isinstance(task, Polynomial):  # inputs: units alone, each as often
        values = np.bincount(truth["input"].values[truth["input"].positions >= 0], minlength=task.modulus)
        assert values[0] == 0 and even(values[1:])


def even(counts: np.ndarray) -> bool:
    """Whether counts may be those of equally likely values."""
    return chi2.sf(((counts - counts.mean()) ** 2).sum() / counts.mean(), len(counts) - 1) > 1e-4


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_rows_scores_and_truth_are_those_of_plain_python(task) -> None:
    check(task, 200)


@pytest.mark.slow
@pytest.mark.parametrize("task", [*TASKS.values(), *MORE.values()], ids=[*TASKS, *MORE])
def test_ten_thousand_rows_are_those_of_plain_python(task) -> None:
    check(task, 10_000)


def test_the_rows_that_the_docstrings_draw() -> None:
    assert row("polynomial", [3, 10, 7, 2], 4).symbols == ["F", "3", "10", "7", "2", ":", "3", "9", "9", "8", "$"]
    assert row("binary_copy", [1, 0, 1, 1], 4, cot=False).symbols == ["C", "1", "0", "1", "1", ":", "1", "$", "$", "$", "$"]


@spec
class RunningMax(IterativeTask):
    """The largest of inputs in 1 .. 4: a task of one's own that leaves the draw of inputs to its base."""

    low: ClassVar[int] = 1

    @property
    def opening(self):
        return "M"

    @property
    def size(self):
        return 5

    def update(self, state, x):
        return np.maximum(state, x) if isinstance(x, np.ndarray) else jnp.maximum(state, x)


def test_inputs_of_a_task_of_more_than_bits_are_uniform_from_low_on() -> None:
    task = RunningMax(length=8)
    rows = [[task.symbols[t] for t in tokens] for tokens in drawn(task, 1000).tokens]
    counts = Counter(x for row in rows for x in inputs_of(row))
    assert set(counts) == {1, 2, 3, 4} and chi2.sf(sum((n - 2000) ** 2 / 2000 for n in counts.values()), 3) > 1e-4
    states = np.array([[int(s) for s in row[row.index(EOI) + 1 : row.index(EOS)]] for row in rows])
    assert np.array_equal(states, np.maximum.accumulate([inputs_of(row) for row in rows], 1))
    laws = np.stack([(states == s).mean(0) for s in range(5)], 1)
    assert np.abs(laws - task.laws()).max() < 0.06


# ---- by enumeration


@functools.cache
def every_row(task: IterativeTask) -> list[tuple[float, Any]]:
    """Every row with its probability: lengths uniform, inputs uniform and independent."""
    values = range(1, task.modulus) if isinstance(task, Polynomial) else range(2)
    lengths = range(task.shortest or task.length, task.length + 1)
    return [(1 / len(lengths) / len(values) ** n, oracle(task, list(x))) for n in lengths for x in itertools.product(values, repeat=n)]


@pytest.mark.parametrize("task", SMALL.values(), ids=SMALL.keys())
def test_contents_are_ranks_of_inputs(task) -> None:
    rows = jnp.array([[task.symbols.index(s) for s in made.symbols] for _, made in every_row(task)])
    ranks = jax.jit(jax.vmap(lambda tokens: task.content(Example(tokens, jnp.ones(tokens.shape, bool)))))(rows)
    assert ranks.shape == (len(rows), 1) and sorted(ranks[:, 0].tolist()) == list(range(len(rows)))
    assert task.contents == len(rows)


def test_contents_of_a_large_space_tell_inputs_apart() -> None:
    task = Polynomial(length=9, shortest=7)
    rng = np.random.default_rng(0)
    inputs = {tuple(rng.integers(1, 11, n).tolist()) for n in rng.integers(7, 10, 300)}
    inputs |= {tuple(1 if i != j else v for i in range(n)) for n in (7, 8, 9) for j in range(n) for v in (1, 2, 10)}
    rows = jnp.array([[task.symbols.index(s) for s in oracle(task, list(x)).symbols] for x in sorted(inputs)])
    content = jax.jit(jax.vmap(lambda tokens: task.content(Example(tokens, jnp.ones(tokens.shape, bool)))))(rows)
    assert task.contents is None and len({tuple(c) for c in content.tolist()}) == len(inputs)


@pytest.mark.parametrize("task", SMALL.values(), ids=SMALL.keys())
def test_means_and_plateau_are_those_of_all_rows(task) -> None:
    """The plateau is the entropy of scored tokens at a distance behind `:`, over all rows."""
    seen: dict[int, Counter] = {}
    scored = ends = 0.0
    for weight, made in every_row(task):
        scored += weight * sum(made.scored)
        ends += weight * (made.symbols.index(EOS) + 1)
        for p in np.flatnonzero(made.scored).tolist():
            seen.setdefault(p - made.symbols.index(EOI), Counter())[made.symbols[p]] += weight
    nats = sum(-w * math.log(w / sum(c.values())) for c in seen.values() for w in c.values())
    assert math.isclose(task.scored_tokens(), scored) and math.isclose(task.mean_positions(), ends)
    assert math.isclose(task.plateau(), nats / scored, rel_tol=1e-9) and task.floor() == 0


@pytest.mark.slow
def test_the_plateau_of_a_long_polynomial_is_what_counting_rows_gives() -> None:
    task = Polynomial(length=8, shortest=1)
    assert abs(task.plateau() - counted_plateau(task)) < 5e-3


def test_laws_become_uniform_on_what_a_state_can_be() -> None:
    """Mod 11 a product with a unit spreads evenly over all but the sum's 1: s_(t+1) = 1 only after s_t = 0."""
    law = Polynomial(length=64).laws()
    assert np.allclose(law.sum(1), 1) and law[0].tolist() == [0, *[0.1] * 10]
    assert math.isclose(law[1, 1], 0.0) and np.allclose(law[2:, 1], law[1:-1, 0])


# ---- sets and errors


def test_balanced_sets_hold_every_length_equally_often_and_differ_in_nothing_else() -> None:
    task = Polynomial(length=6, shortest=3, lengths="balanced", split=Split(0.5, 0.25))
    data = prepare(task)
    both = jax.jit(lambda key: [draw_set(task, part, key, 40, data) for part in ("train", "test")])(jax.random.key(0))
    for rows, number in zip(both, (0, 2), strict=True):
        lengths = [tokens.index(task.symbols.index(EOI)) - 1 for tokens in rows.tokens.tolist()]
        assert lengths == [3, 4, 5, 6] * 10 and rows.scored.any(1).all()
        assert len({tuple(tokens) for tokens in rows.tokens.tolist()}) > 35
        assert (jax.jit(jax.vmap(lambda e: task.part(e, data.table)))(rows) == number).all()


def test_a_length_of_which_a_part_has_nothing_gives_way_to_another() -> None:
    task = Parity(length=10, shortest=1, lengths="balanced")  # two contents of one bit, for three parts
    rows = jax.jit(lambda key: draw_set(task, "test", key, 20, prepare(task)))(jax.random.key(0))
    lengths = [tokens.index(3) - 1 for tokens in rows.tokens.tolist()]
    assert rows.scored.any(1).all() and lengths[6:10] == [7, 8, 9, 10]


def test_a_modulus_without_choice_is_refused() -> None:
    with pytest.raises(Invalid, match=r"^modulus: 2 is not allowed"):
        Polynomial(modulus=2)
