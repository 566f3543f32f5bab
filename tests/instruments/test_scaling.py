"""Scaling: fits recover the laws that made the points, and what chooses is not what is reported."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

import synthetic
from elegans import At, Record
from elegans.files import write_json, write_table
from elegans.instruments.frontier import Ended, by_budget, ended_runs
from elegans.instruments.scaling import Scaling, broken_power_law, power_law
from elegans.sweeps import grid

BUDGETS = [10.0**k for k in range(9, 16)]


def ended(budget: float, name: str, seed: int, validation: float, test: float) -> Ended:
    return Ended("toy", budget, name, f"{name}{seed}", validation, test, 0.5, str(seed))


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
    assert 1e11 < half["value"] < 1e12 and (half["low"], half["high"]) == (1e11, 1e12)
    flat = [ended(c, "a", s, 1.0, 1.0) for c in BUDGETS for s in range(3)]
    rows = {r["quantity"]: r for r in Scaling(draws=50)._fits(by_budget(flat), 0.0, 1.0)}
    assert rows["half"]["value"] is None and rows["leaves"]["low"] is None
    unknown = {r["quantity"]: r for r in Scaling(draws=50)._fits(by_budget(flat), None, None)}
    assert all(r["value"] is None for r in unknown.values())


def test_the_interval_of_a_crossing_holds_it_wherever_between_two_budgets_it_is() -> None:
    """Curves that drop sharply at a known place: interpolation puts all of them at nearly the same one."""
    rng = np.random.default_rng(0)
    for _ in range(6):
        truth = 10 ** rng.uniform(9.1, 14.9)
        drop = [ended(c, "a", s, loss := max(0.0, float(c < truth) + rng.normal(0, 0.02)), loss) for c in BUDGETS for s in range(3)]
        half = next(r for r in Scaling(draws=20)._fits(by_budget(drop), 0.0, 1.0) if r["quantity"] == "half")
        assert half["low"] <= truth <= half["high"] and half["low"] <= half["value"] <= half["high"]
        assert half["high"] / half["low"] == pytest.approx(10)


def test_a_crossing_that_some_seeds_reach_at_the_last_budget_has_no_upper_bound() -> None:
    drop = [ended(c, "a", s, loss := (1.0 if c < 1e15 else 0.1 + 0.6 * (s == 0)), loss) for c in BUDGETS for s in range(3)]
    half = next(r for r in Scaling(draws=100)._fits(by_budget(drop), 0.0, 1.0) if r["quantity"] == "half")
    assert half["low"] == 1e14 and half["value"] < 1e15 and half["high"] is None


def test_a_store_gives_the_best_of_each_budget_and_where_it_falls(tmp_path) -> None:
    """The wider network falls a decade earlier: it is chosen from there on; seeds differ a little."""
    plateau = synthetic.PLATEAU

    def loss(flops: float, width: int, seed: int) -> float:
        return (plateau if flops < (3e11 if width == 16 else 3e12) else 0.001) * (1 + 0.01 * seed) + 0.001 * (width == 16)

    store = synthetic.grid_store(tmp_path, BUDGETS[:5], loss, {})
    tables = {name: table.to_pylist() for name, table in Scaling(draws=20).tables(store).items()}
    assert [row["flops"] for row in tables["scaling"]] == BUDGETS[:5] and {row["seeds"] for row in tables["scaling"]} == {3}
    assert ["d_model=16" in row["configuration"] for row in tables["scaling"]] == [False, False, False, True, False]
    assert [row["loss"] for row in tables["scaling"]][:3] == [pytest.approx(1.01 * plateau)] * 3
    half = next(row for row in tables["scaling_fit"] if row["quantity"] == "half")
    assert (half["low"], half["high"]) == (1e11, 1e12)


def test_a_configuration_that_diverged_at_a_budget_is_not_chosen_there(tmp_path) -> None:
    """Its surviving seeds are the best, and say nothing of the one that was lost."""
    store = synthetic.grid_store(tmp_path, BUDGETS[:2], lambda flops, width, seed: 0.5 if width == 16 else 0.9, {})
    (cohort,) = [c for c in store.cohorts() if c.first().model.d_model == 16]
    lost = next(run for run in cohort.specs() if run.flops == BUDGETS[1])
    write_json(cohort.path / "status.json", cohort.status() | {"diverged": {lost.id: 3}})
    rows = Scaling(draws=10).tables(store)["scaling"].to_pylist()
    assert [(r["flops"], r["loss"], r["configurations"]) for r in rows] == [(BUDGETS[0], 0.5, 2), (BUDGETS[1], 0.9, 1)]


def test_a_task_without_a_finished_run_has_no_curve(tmp_path) -> None:
    """The other task is planned and not yet trained."""
    store = synthetic.grid_store(tmp_path, BUDGETS[:2], lambda *at: 0.5, {})
    waiting = synthetic.grid_store(tmp_path / "waiting", BUDGETS[:2], lambda *at: 0.5, {}, task=synthetic.Addition(length=4))
    for cohort in waiting.cohorts():
        (cohort.path / "metrics.parquet").unlink()
        cohort.path.rename(store.path / "cohorts" / f"f{cohort.id[1:]}")
    assert len({line["spec"]["task"]["length"] for line in store.lines()}) == 2
    for name, rows in Scaling(draws=10).tables(store).items():
        assert {row["task"] for row in rows.to_pylist()} == {"addition"}, name


def test_intervals_stay_where_losses_and_shares_can_be_and_fits_need_three_seeds() -> None:
    runs = [
        Ended("toy", 1e9, "a", f"a{s}", 0.1, test, exact, str(s)) for s, (test, exact) in enumerate(((0.0, 1.0), (0.3, 0.6), (0.0, 1.0)))
    ]
    best = Scaling()._best(by_budget(runs)[1e9])
    assert best["low"] == 0 < best["loss"] and best["exact_high"] == 1 and 0 <= best["exact_low"] < best["exact_match"] < 1
    falls = [ended(c, "a", s, loss := 3e4 * c**-0.3 * (1 + s / 100), loss) for c in BUDGETS for s in range(3)]
    for left_out, known in ((None, True), (falls[-1], False)):
        found = Scaling(draws=20)._fits(by_budget([e for e in falls if e is not left_out]), 0.0, 61.0)
        slope = next(r for r in found if r["quantity"] == "slope")
        assert slope["value"] == pytest.approx(0.3, rel=0.05) and (slope["low"] is not None) == known


def test_runs_are_pooled_as_seeds_only_where_every_field_is_the_same(tmp_path) -> None:
    """These training sets share the four digits that tables show, and these learning rates those that are printed."""
    base = synthetic.small()[0]
    alike = [{"train_set": [125, 176], "seed": [0, 1]}, {"optim.lr": [0.0123456, 0.01234561], "seed": [0, 1]}]
    runs = [run for axes in alike for run in grid(base, axes)]
    store = synthetic.make(tmp_path, [*runs, base], tables=())  # the last one diverges
    ends = [{"run": r.id, "split": s, "step": 1, "loss": 0.5, "exact_match": 0.5} for r in runs for s in ("validation", "test")]
    write_table(store.cohorts()[0].path / "metrics.parquet", pa.Table.from_pylist(ends))
    ended, _ = ended_runs(store)
    (found,) = by_budget(ended).values()
    assert len({run.configuration for run in ended}) == 2 and [len(candidate.compared) for candidate in found] == [2] * 4


def test_a_training_that_is_there_twice_with_other_records_is_one_seed(tmp_path) -> None:
    """The one that kept weights counts: only its networks can be probed."""
    base = dataclasses.replace(synthetic.small()[0], record=Record(weights=None))
    kept = dataclasses.replace(base, record=Record(weights=At((1,))))
    runs = [dataclasses.replace(run, seed=seed) for run in (base, kept) for seed in (0, 1)] + [dataclasses.replace(base, seed=2)]
    store = synthetic.make(tmp_path, [*runs, synthetic.small()[-1]], tables=())  # the last one diverges
    ends = [{"run": r.id, "split": s, "step": 1, "loss": 0.5, "exact_match": 0.5} for r in runs for s in ("validation", "test")]
    write_table(store.cohorts()[0].path / "metrics.parquet", pa.Table.from_pylist(ends))
    ended, _ = ended_runs(store)
    assert {run.run for run in ended} == {runs[2].id, runs[3].id, runs[4].id}


def test_a_break_at_the_edge_of_the_budgets_is_none() -> None:
    assert broken_power_law(BUDGETS, [1.0] * 2 + [10.0**-k for k in range(1, 6)]) is None
