"""Across compute: one architecture is followed over budgets, and what was not probed or never happened is missing."""

import numpy as np
import pytest

import synthetic
from elegans.errors import Invalid
from elegans.instruments import AcrossCompute, Transition
from elegans.instruments.transition import NEVER_FELL, NEVER_READ

BUDGETS = [10.0**k for k in range(9, 14)]
PLATEAU = synthetic.PLATEAU


def falls(at: float):
    return lambda flops, width, seed: (PLATEAU if flops < at or width == 8 else 0.001) * (1 + 0.01 * seed)


def rises(at: float):
    return lambda flops, width, seed: (0.51 if flops < at else 0.98) + 0.005 * seed


def measured(path, loss, scores, **fields) -> dict[str, list[dict]]:
    store = synthetic.grid_store(path, BUDGETS, loss, scores)
    return {name: table.to_pylist() for name, table in AcrossCompute(draws=50, **fields).tables(store).items()}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    scores = {"early": rises(3e9), "with": rises(3e12), "late": rises(3e13), "always": rises(1.0), "never": lambda f, w, s: 0.51}
    scores["sometimes"] = lambda f, w, s: None if f == 1e10 else rises(3e10)(f, w, s)
    return measured(tmp_path_factory.mktemp("compute"), falls(3e12), scores)


def test_the_architecture_that_is_best_at_the_target_is_followed_to_every_budget(tables, tmp_path) -> None:
    for row in tables["across_compute"]:
        assert row["configuration"].startswith("d_model=16") and row["seeds"] == 3
        plain = PLATEAU if row["flops"] < 3e12 else 0.001
        assert row["loss"] == pytest.approx(1.01 * plain) and row["loss_low"] < row["loss"] < row["loss_high"]
    early = [row for row in tables["across_compute"] if row["feature"] == "early"]
    assert [row["flops"] for row in early] == BUDGETS
    assert [row["score"] for row in early] == pytest.approx([0.515] + [0.985] * 4, abs=1e-6)
    assert [row["probe_loss"] for row in early] == pytest.approx([1 - row["score"] for row in early], abs=1e-6)
    wide_late = lambda flops, width, seed: PLATEAU * (0.9 if width == 8 else 1.0 if flops < 3e12 else 0.0)  # noqa: E731
    chosen = measured(tmp_path, wide_late, {"early": rises(3e9)}, target=2e11)["across_compute"]
    assert all(row["configuration"].startswith("d_model=8") for row in chosen)


def test_a_budget_without_probes_is_null_and_keeps_its_loss(tables) -> None:
    (row,) = [r for r in tables["across_compute"] if r["feature"] == "sometimes" and r["flops"] == 1e10]
    assert row["score"] is None and row["probe_loss"] is None and row["probed"] == 0 and row["loss"] > 0


def test_quiet_and_loud_at_the_last_budget_before_the_loss_moves(tables) -> None:
    rows = {row["feature"]: row for row in tables["across_compute_lead"]}
    assert rows["early"]["loudness"] == "quiet" and rows["early"]["seeds"] == 3
    assert rows["early"]["low"] == pytest.approx(2) and rows["early"]["high"] == pytest.approx(4)
    assert [rows["early"][f"{name}_{end}"] for name in ("loss", "feature") for end in ("low", "high")] == [1e12, 1e13, 1e9, 1e10]
    assert rows["with"]["loudness"] == "loud"  # between the same two budgets: the interval of its lead has both signs
    assert rows["with"]["low"] == pytest.approx(-1) and rows["with"]["high"] == pytest.approx(1)
    assert rows["always"]["loudness"] == "quiet" and rows["always"]["high"] is None and rows["always"]["lead"] is None
    for name in ("never", "late"):
        assert rows[name]["missing"] == NEVER_READ and rows[name]["loudness"] is None and rows[name]["low"] is None


def test_a_feature_that_is_there_one_budget_before_is_quiet_unless_the_loss_has_moved_or_seeds_are_few(tmp_path) -> None:
    def verdict(name: str, early: float, seeds: int = 3) -> str:
        """The loss falls at 3e11, and has moved to `early` of its plateau at 1e11, where the feature is already there."""
        loss = lambda f, w, s: PLATEAU * (1 if f < 1e11 else early if f < 3e11 else 0.001) * (1 + 0.001 * s)  # noqa: E731
        store = synthetic.grid_store(tmp_path / name, BUDGETS, loss, {"early": rises(3e10)}, seeds=seeds)
        return AcrossCompute(draws=50).tables(store)["across_compute_lead"].to_pylist()[0]["loudness"]

    assert verdict("still", 0.97) == "quiet" and verdict("moved", 0.8) == "loud" and verdict("few", 0.97, 2) == "undecided"


def test_seeds_that_disagree_leave_it_undecided(tmp_path) -> None:
    score = lambda f, w, s: 0.98 if f > 3e11 or (f > 3e10 and s != 0) else 0.51  # noqa: E731
    row = measured(tmp_path, falls(3e11), {"early": score})["across_compute_lead"][0]
    assert row["loudness"] == "undecided" and (row["feature_low"], row["feature_high"]) == (1e10, 1e12)


def test_a_feature_that_follows_is_loud_and_a_loss_that_never_falls_is_missing(tmp_path) -> None:
    row = measured(tmp_path / "a", falls(3e10), {"after": rises(3e11)})["across_compute_lead"][0]
    assert row["loudness"] == "loud" and row["low"] == pytest.approx(-2) and row["high"] == pytest.approx(0)
    row = measured(tmp_path / "b", falls(np.inf), {"early": rises(3e9)})["across_compute_lead"][0]
    assert row["missing"] == NEVER_FELL and row["lead"] is None and row["loudness"] is None


def test_a_target_below_every_budget_is_refused(tmp_path) -> None:
    with pytest.raises(Invalid, match="target"):
        measured(tmp_path, falls(3e12), {"early": rises(3e9)}, target=1e3)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A feature that one draw of seeds in 27 knows a budget earlier, and another width that is the better one at the largest budget."""

    def score(flops: float, width: int, seed: int) -> float:
        return 0.98 if flops > 3e10 else 0.8 if seed == 0 and flops > 3e9 else 0.51

    def loss(flops: float, width: int, seed: int) -> float:
        moved = 0.8 if flops > 3e9 else 1  # from the second budget on
        return moved * PLATEAU * (1 + 0.01 * seed) if flops < 3e12 else 0.01 * (1 + seed) * (1 + (width == 16))

    return synthetic.grid_store(tmp_path_factory.mktemp("uneven"), BUDGETS, loss, {"early": score})


@pytest.mark.parametrize(("name", "value"), [("confidence", 0.5), ("least", 0.6), ("share", 0.4), ("draws", 1000), ("target", 1e9)])
def test_every_field_changes_the_tables(uneven, name, value) -> None:
    before, after = (AcrossCompute(**{"draws": 10} | fields).tables(uneven) for fields in ({}, {name: value}))
    assert any(not before[table].equals(after[table]) for table in before)


@pytest.mark.parametrize(("name", "value"), [("confidence", 0.5), ("least", 0.6), ("same", 2.5)])
def test_every_field_of_transition_changes_its_tables(tmp_path, name, value) -> None:
    store = synthetic.make(tmp_path, synthetic.small(), tables=("metrics", "probe"), probes=8)
    before, after = Transition().tables(store), Transition(**{name: value}).tables(store)
    assert any(not before[table].equals(after[table]) for table in before)
