"""Scaling: fits recover the laws that made the points, and what chooses is not what is reported."""

import numpy as np
import pytest

from elegans.instruments.scaling import Ended, Scaling, by_budget, broken_power_law, power_law

BUDGETS = [10.0**k for k in range(9, 16)]


def ended(budget: float, name: str, seed: int, validation: float, test: float) -> Ended:
    return Ended("toy", budget, name, f"{name}{seed}", validation, test, 0.5)


def test_a_power_law_is_recovered() -> None:
    a, b = power_law(BUDGETS, [3e4 * c**-0.3 for c in BUDGETS])
    assert (a, b) == (pytest.approx(3e4), pytest.approx(0.3))
    assert power_law(BUDGETS[:2], [1.0, 0.5]) is None and power_law(BUDGETS, [0.0] * 7) is None


def test_a_broken_power_law_is_recovered_where_it_breaks() -> None:
    loss = [np.exp(-0.05 * min(np.log(c / 3e12), 0) - 0.7 * max(np.log(c / 3e12), 0)) for c in BUDGETS]
    before, at, after = broken_power_law(BUDGETS, loss)
    assert before == pytest.approx(0.05, rel=0.05) and after == pytest.approx(0.7, rel=0.05)
    assert np.log10(at) == pytest.approx(np.log10(3e12), abs=0.05)


def test_validation_chooses_and_test_is_reported() -> None:
    """The configuration that is lucky on test rows alone is not chosen."""
    runs = [ended(1e9, "a", s, 0.5, 0.9 + 0.01 * s) for s in range(3)] + [ended(1e9, "b", s, 0.6, 0.1) for s in range(3)]
    best = Scaling()._best(by_budget(runs)[1e9])
    assert best["configuration"] == "a" and best["loss"] == pytest.approx(0.91) and best["low"] < 0.91 < best["high"]
    assert best["configurations"] == 2 and best["seeds"] == 3


def test_transitions_have_intervals_over_seeds_and_are_missing_where_budgets_do_not_reach() -> None:
    """Seeds that drop at 1e11 to 1e12 put the half-way point there; seeds that never drop have none."""
    drop = [ended(c, "a", s, loss := (1.0 if c < 5e11 else 0.01 + 0.1 * s), loss) for c in BUDGETS[:5] for s in range(3)]
    rows = {r["quantity"]: r for r in Scaling(draws=50)._fits(by_budget(drop), 0.0, 1.0)}
    half = rows["half"]
    assert 1e11 < half["low"] <= half["value"] <= half["high"] < 1e12 and half["low"] < half["high"]
    flat = [ended(c, "a", s, 1.0, 1.0) for c in BUDGETS for s in range(3)]
    rows = {r["quantity"]: r for r in Scaling(draws=50)._fits(by_budget(flat), 0.0, 1.0)}
    assert rows["half"]["value"] is None and rows["leaves"]["low"] is None
    unknown = {r["quantity"]: r for r in Scaling(draws=50)._fits(by_budget(flat), None, None)}
    assert all(r["value"] is None for r in unknown.values())
