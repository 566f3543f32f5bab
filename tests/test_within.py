"""What removing a feature does is judged within each run that learned, with known answers both ways."""

import numpy as np
import pyarrow as pa
import pytest

from elegans.figures import Catalogue, Facts
from elegans.figures.within import UNDECIDED, UNUSED, USED, Effect, markdown, table, within


def runs(learned: list[bool]) -> Catalogue:
    known = {"floor": 0.0, "plateau": 1.0, "exact_match": None, "test_loss": None, "test_exact_match": None}
    made = [
        Facts(f"r{i}", {"run": f"r{i}", "state": "finished", "label": None}, {"task": "addition"}, loss=0.1 if ok else 0.9, **known)
        for i, ok in enumerate(learned)
    ]
    return Catalogue({f.id: f for f in made})


def rows(bases: list[float], taken: list[float], control: list[float], draws: int = 8, seed: int = 0) -> pa.Table:
    """Runs with these exact matches, of which the feature takes some and random directions, a little different each, some."""
    rng, made = np.random.default_rng(seed), []
    for i, (base, own, chance) in enumerate(zip(bases, taken, control, strict=True)):
        head = {"run": f"r{i}", "feature": "carry", "method": "projection", "base_exact_match": base}
        made.append(head | {"direction": "feature", "draw": 0, "exact_match": base - own})
        made += [head | {"direction": "random", "draw": d, "exact_match": base - chance + rng.uniform(-0.01, 0.01)} for d in range(draws)]
    return pa.Table.from_pylist(made)


def one(bases, taken, control, learned=None) -> Effect:
    (effect,) = within(rows(bases, taken, control), runs(learned or [True] * len(bases)))
    return effect


def test_an_effect_in_every_run_is_found_where_pooled_runs_differ_more_than_it() -> None:
    """Pooled, what random directions leave (0.3 to 1) covers what the feature leaves: it was said to be no more than chance."""
    effect = one([1.0, 0.8, 0.6, 0.35], [0.3, 0.28, 0.32, 0.3], [0.02] * 4)
    (random,) = effect.against
    assert random.mean == pytest.approx(0.28, abs=0.01) and random.low > 0.2 and random.beyond == 4
    assert effect.verdict == USED and (effect.runs, effect.of) == (4, 4)


def test_no_effect_is_none_and_a_few_different_runs_decide_nothing() -> None:
    none = one([1.0, 0.98, 0.99, 1.0], [0.02] * 4, [0.02] * 4)
    assert none.verdict == UNUSED and none.against[0].high < 0.05
    assert one([1.0, 1.0, 1.0], [0.6, 0.0, 0.1], [0.0] * 3).verdict == UNDECIDED
    assert one([1.0], [0.9], [0.0]).verdict == UNDECIDED and one([1.0], [0.9], [0.0]).low is None


def test_where_nothing_is_left_to_take_nothing_is_said() -> None:
    """Controls that destroy it too, and networks that have nothing to lose, do not show that a feature is not used."""
    assert one([0.98] * 8, [0.979] * 8, [0.98] * 8).verdict == UNDECIDED
    assert one([0.03] * 8, [0.0] * 8, [0.0] * 8).verdict == UNDECIDED


def test_runs_that_did_not_learn_are_left_out_and_counted() -> None:
    effect = one([1.0, 1.0, 1.0, 0.05, 0.0], [0.5, 0.5, 0.52, 0.0, 0.0], [0.0] * 5, [True, True, True, False, False])
    assert (effect.runs, effect.of, effect.base) == (3, 5, 1.0) and effect.left == pytest.approx(1 - 1.52 / 3)
    effect = one([0.1, 0.1], [0.0, 0.1], [0.0, 0.0], [False, False])
    assert effect.base is None and effect.left is None and effect.against == () and (effect.runs, effect.of) == (0, 2)


def test_every_control_that_was_drawn_must_leave_more() -> None:
    """Steps of equal length take as much, random directions do not: which of the two the feature is like is not decided."""
    made = rows([1.0] * 3, [0.5, 0.5, 0.51], [0.0] * 3).to_pylist()
    matched = [row | {"direction": "matched", "exact_match": 0.5} for row in made if row["direction"] == "random"]
    (effect,) = within(pa.Table.from_pylist(made + matched), runs([True] * 3))
    assert [a.control for a in effect.against] == ["random", "matched"] and effect.verdict == UNDECIDED
    assert {a.verdict for a in effect.against} == {USED, UNUSED}


def test_intervals_over_runs_hold_the_true_difference() -> None:
    rng = np.random.default_rng(1)
    held = []
    for _ in range(60):
        taken = rng.normal(0.3, 0.1, 5).tolist()
        random = one([1.0] * 5, taken, [0.0] * 5).against[0]
        held.append(random.low < 0.3 < random.high)
    assert np.mean(held) > 0.85


def test_the_table_has_every_control_and_says_what_was_not_measured() -> None:
    found = [one([1.0] * 3, [0.5, 0.5, 0.51], [0.0] * 3), one([0.1], [0.0], [0.0], [False])]
    made = table(found).to_pylist()
    assert made[0]["random_more"] == pytest.approx(0.503, abs=0.01) and made[0]["verdict"] == USED
    assert made[1]["exact_match"] is None and made[1]["random"] is None and made[1]["verdict"] == "not compared"
    lines = markdown(found).splitlines()
    assert len(lines) == 4 and "| 3 of 3 | 1.00 | 0.50 [" in lines[2] and "| 0 of 1 | – | – | – | – | not compared |" in lines[3]
