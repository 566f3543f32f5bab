"""The frontier: which configurations are compared, by which seeds, and which runs say how good the chosen one is."""

import dataclasses

import numpy as np
import pytest

import synthetic
from elegans import Invalid, Record, Study, grid
from elegans.errors import StoreError
from elegans.instruments.crossings import interval
from elegans.instruments.frontier import Ended, by_budget, chosen, ranked
from elegans.store import Store


def ended(name: str, seed: int, validation: float, test: float | None = None) -> Ended:
    return Ended("toy", 1e9, name, f"{name}{seed}", validation, validation if test is None else test, 0.5, str(seed))


def names(candidates) -> dict[str, tuple[list[str], list[str]]]:
    return {c.compared[0].configuration: tuple([r.seeds for r in runs] for runs in (c.compared, c.others)) for c in candidates}


def test_configurations_are_compared_by_the_seeds_that_all_have() -> None:
    """b has two more, d has not the seed that most have; a lucky third seed of one of them changes nobody's place."""
    runs = (
        [ended("a", s, 0.5) for s in (0, 1)] + [ended("b", s, 0.6 - 0.3 * (s > 1)) for s in range(4)] + [ended("c", s, 0.7) for s in (0, 1)]
    )
    (found,) = by_budget([*runs, ended("d", 7, 0.1)]).values()
    assert names(found) == {"a": (["0", "1"], []), "b": (["0", "1"], ["2", "3"]), "c": (["0", "1"], [])}
    assert chosen(found).compared[0].configuration == "a"
    assert [r.run for r in chosen(found).reported] == ["a0", "a1"]


def test_seeds_that_chose_are_not_reported_where_three_others_are() -> None:
    alone = [ended("a", 0, 0.1), *(ended("a", s, 0.4) for s in (1, 2))]
    for more, reported in (([], 3), ([ended("a", 3, 0.4)], 3), ([ended("a", s, 0.4) for s in (3, 4)], 4)):
        (found,) = by_budget([*alone, *more, ended("b", 0, 0.2)]).values()
        runs = chosen(found).reported
        assert len(runs) == reported and ("0" in {r.seeds for r in runs}) == (not more)


def test_of_the_first_few_with_more_seeds_these_choose() -> None:
    """a was lucky with seed 0, b is better by the others; c would be, but d before it has no other seeds, so nobody knows."""
    first = [ended(name, 0, loss) for name, loss in (("a", 0.1), ("b", 0.2), ("d", 0.3), ("c", 0.4))]
    more = [ended(name, s, loss) for name, loss in (("a", 0.5), ("b", 0.3), ("c", 0.05)) for s in (1, 2, 3)]
    (found,) = by_budget(first + more).values()
    assert [r.run for r in chosen(found).reported] == ["b1", "b2", "b3"]


def test_intervals_of_seeds_that_had_no_part_in_the_choice_hold_the_truth() -> None:
    """Ten configurations that are alike but for luck: intervals of three other seeds cover 95 %, those of three that chose do not."""
    rng, inside = np.random.default_rng(0), {1: 0, 3: 0}
    for _ in range(1500):
        for first, other in ((1, 3), (3, 0)):
            losses = rng.normal(1.0, 0.1, (10, first + other))
            runs = [ended(str(c), s, losses[c, s]) for c in range(10) for s in range(first)]
            best = str(int(losses[:, :first].mean(1).argmin()))
            runs += [ended(best, s, losses[int(best), s]) for s in range(first, first + other)]
            (found,) = by_budget(runs).values()
            _, low, high = interval([r.test for r in chosen(found).reported], 0.95)
            inside[first] += low <= 1.0 <= high
    assert inside[1] / 1500 == pytest.approx(0.95, abs=0.02) and inside[3] / 1500 < 0.90


@pytest.fixture
def store(tmp_path) -> Store:
    """Two widths at two budgets, three seeds; the wide one is better at the larger one."""
    return synthetic.grid_store(tmp_path / "s", [1e9, 1e10], lambda flops, width, seed: 0.5 if (width == 16) == (flops > 5e9) else 0.9, {})


def test_a_study_is_cut_to_the_best_of_a_store(store) -> None:
    """With other seeds and records; a budget that the store does not have is not among them."""
    runs = [run for cohort in store.cohorts() for run in cohort.specs()]
    budgets = grid(dataclasses.replace(runs[0], record=Record(examples=7)), {"flops": [1e9, 1e10, 1e11], "model.d_model": [8, 16]})
    more = Study(runs=budgets).override({"seed": [5, 6]})
    best = {(8, 1e9), (16, 1e10)}
    assert {(r.model.d_model, r.flops, r.seed) for r in more.best(store.path, 1).runs} == {(*one, seed) for one in best for seed in (5, 6)}
    assert len(more.best(store.path, 2).runs) == len(more.best(store.path, 9).runs) == 8
    with pytest.raises(Invalid, match="best"):
        Study(runs=grid(runs[0], {"optim.lr": [0.5]})).best(store.path, 1)
    with pytest.raises(StoreError):
        more.best(store.path / "none", 1)


def test_what_is_asked_of_a_study_is_as_if_it_were_overridden_first(store) -> None:
    """The same runs in the same order, with repetitions, with seeds that do not belong, and where a parent is too costly to stay."""
    run = store.cohorts()[0].specs()[0]
    runs = grid(run, {"seed": [0, 7, 0], "flops": [1e9, 1e10], "model.d_model": [8, 16]})
    parents = grid(run, {"flops": [1e10], "seed": [0, 1], "record.weights": [None]})
    heirs = [dataclasses.replace(run, flops=1e9, after=parent) for parent in parents]
    for study, most in ((Study(runs=runs, keep=lambda run: run.seed != 6), 1), (Study(runs=parents + heirs), None)):
        for axes in ({}, {"seed": [5, 6]}, {"data_seed": [3, 4], "seed": [7, 7]}, {"seed": [5, 6], "record.examples": [7, 9]}):
            for budget in (5e9, None):
                found, plain = study.asked(axes, budget, store.path, most), study.override(axes).within(budget).best(store.path, most)
                assert [run.id for run in found.runs] == [run.id for run in plain.runs]


def test_more_seeds_of_the_best_leave_it_where_it_was() -> None:
    """The seeds by which they were compared go on to decide who comes first."""
    three = [ended(name, s, loss) for name, loss in (("a", 0.5), ("b", 0.6)) for s in range(3)]
    before, after = (names(ranked(*by_budget(three + more).values())) for more in ([], [ended("a", s, 0.7) for s in range(3, 9)]))
    assert list(before) == list(after) == ["a", "b"] and before["a"][0] == after["a"][0] == ["0", "1", "2"]
