"""The grid of the study: how many runs, how long."""

import numpy as np
import pytest

from elegans import Addition, Invalid, Multiplication, replace
from elegans.loading import load_study
from elegans.store import Store
from elegans.studies import quiet_features
from elegans.study import Study, run_study


def test_configurations_and_steps_of_addition_and_multiplication() -> None:
    """Counted from the published formula: steps = ceil(C / (6 (12 L d^2 + L ctx d) batch ctx)), kept from 1 to 1e5."""

    def counted(context: int, decades: range) -> int:
        sizes = [(d, n, b) for d in (8, 16, 32, 64, 128, 256, 512) for n in (4, 16) for b in (8, 64)]
        cost = {s: 6 * (12 * s[1] * s[0] ** 2 + s[1] * context * s[0]) * s[2] * context for s in sizes}
        return 4 * sum(-(-(10**k) // c) <= 100_000 for c in cost.values() for k in decades)

    for task, context, decades in ((Addition(), 52, range(9, 16)), (Multiplication(), 67, range(9, 17))):
        assert len(list(quiet_features.configurations(task))) == counted(context, decades)
    base = replace(next(quiet_features.configurations(Addition())), "model.d_model", 128)
    assert replace(replace(base, "batch", 64), "flops", 1e15).length == 61_595


@pytest.mark.slow
def test_the_whole_grid() -> None:
    runs = [run for task in quiet_features.TASKS for run in quiet_features.configurations(task)]
    assert len(runs) == 6664 and sum(run.length == 1 for run in runs) == 1376


def test_seeds_end_where_budgets_are_large() -> None:
    cheap = next(quiet_features.configurations(Addition()))
    assert [run.seed for run in quiet_features.seeds(cheap)] == [0, 1, 2]
    assert len(quiet_features.seeds(replace(cheap, "flops", 1e14))) == 1


def test_across_compute_every_budget_has_every_seed_at_both_rates() -> None:
    study = quiet_features.PARTS["across_addition"]()
    assert len(study.runs) == 13 * 2 * 12 and {run.model.d_model for run in study.runs} == {64}
    assert {run.flops for run in study.runs} >= {1e9, 1e10, 1e11, 1e12} and max(run.flops for run in study.runs) == 1e12


@pytest.mark.slow
def test_overriding_the_task_leaves_the_grid_of_that_task() -> None:
    """Multiplication's larger budgets, and steps that only another task's rows allow, do not come along."""

    def some(task):
        return [run for run in quiet_features.configurations(task) if run.optim.lr == 1e-3 and run.model.layers == 4]

    addition = some(Addition(length=16))
    both = Study([*addition, *some(Multiplication(length=16))], keep=quiet_features.belongs)
    assert {run.id for run in both.override({"task": [Addition(length=16)]}).runs} == {run.id for run in addition}
    with pytest.raises(Invalid, match="none of study is left"):
        Study(addition, keep=quiet_features.belongs).override({"flops": [2e15]})


@pytest.mark.slow
def test_the_small_study_shows_its_effects_against_their_controls(tmp_path) -> None:
    """Networks that learn 8-bit addition: the carry's probe beats shuffled labels and the untrained network and is half-way up before
    the loss is half-way down; without its directions more rows are wrong than without random ones or those of shuffled labels."""
    study = load_study("quiet_features", True)
    run_study(study, tmp_path / "store")
    store = Store(tmp_path / "store")
    learned = store.sql("select run from metrics where split = 'test' and exact_match > 0.9")["run"].to_pylist()
    assert len(learned) >= 3
    ours = "run in (" + ", ".join(f"'{run}'" for run in learned) + ")"
    (known,) = store.sql(f"""select min(accuracy) low, max(control) control, max(untrained) untrained from (
select run, avg(accuracy) accuracy, avg(control) control, avg(untrained) untrained from probe p
where feature = 'carry' and {ours} and site = 'resid.1' and step = (select max(step) from probe) group by run)""").to_pylist()
    assert known["low"] > max(known["control"], known["untrained"]) + 0.1
    leads = store.sql(f"select lead from transition where feature = 'carry' and {ours}")["lead"].to_pylist()
    assert len(leads) == len(learned) and np.mean(leads) > 0
    left = {
        row["direction"]: row["y"]
        for row in store.sql(
            f"select direction, avg(exact_match) y from ablate where feature = 'carry' and {ours} group by all"
        ).to_pylist()
    }
    assert left["feature"] < min(left["random"], left["matched"], left["labels"]) - 0.05
