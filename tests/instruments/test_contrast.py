"""Contrasts of groups: the interval is the Mann-Whitney test's, late runs are late and not missing, and pairs differ in one field."""

import numpy as np
import pytest
from scipy import stats

import elegans as el
import synthetic
from elegans.figures import Tables, paper
from elegans.figures.contrasts import contrasts_of
from elegans.instruments.contrast import WORDS, Seen, contrasts, neighbours
from elegans.instruments.crossings import EXACT, beyond, shift, verdict
from elegans.instruments.transition import NEVER_READ, Course, Transition


def exact(values) -> list[tuple[float, float]]:
    return [(float(v), float(v)) for v in values]


@pytest.mark.parametrize("sizes", [(3, 3), (4, 4), (4, 7), (9, 5), (12, 12)])
def test_the_interval_holds_the_shifts_that_a_mann_whitney_test_does_not_refuse(sizes) -> None:
    first, second = np.split(np.random.default_rng(sum(sizes)).normal(size=sum(sizes)), [sizes[0]])
    middle, low, high = shift(exact(first), exact(second), 0.95)
    assert middle == pytest.approx(np.median(first[:, None] - second[None]))

    def p(by: float) -> float:
        return float(stats.mannwhitneyu(first - by, second, method="exact").pvalue)

    if sizes == (3, 3):
        assert (low, high) == (None, None) and p(100.0) > 0.05  # no order of six values is that rare
        return
    assert low is not None and high is not None and low < middle < high
    assert min(p(low + 1e-9), p(high - 1e-9)) > 0.05 >= max(p(low - 1e-9), p(high + 1e-9))


def test_wherever_values_lie_in_their_brackets_the_interval_holds_theirs() -> None:
    draw = np.random.default_rng(0)
    first, second = (np.sort(draw.normal(size=(8, 2)) * 0.3 + at, 1) for at in (1.0, 0.0))
    _, low, high = shift([tuple(b) for b in first.tolist()], [tuple(b) for b in second.tolist()], 0.95)
    for _ in range(20):
        _, inner_low, inner_high = shift(*(exact(draw.uniform(*each.T)) for each in (first, second)), 0.95)
        assert low <= inner_low and inner_high <= high


def test_runs_that_never_get_there_are_late() -> None:
    early, late = exact([1.0, 1.1, 1.2, 1.3, 1.4]), [*exact([2.0, 2.1, 2.2]), (3.0, np.inf), (3.0, np.inf)]
    middle, low, high = shift(late, early, 0.95)
    assert 0.6 < low < middle and high is None  # all that is known of the end is that it is late
    middle, low, high = shift([(3.0, np.inf)] * 5, early, 0.95)
    assert middle is None and low == pytest.approx(3.0 - 1.4) and high is None
    assert shift([(3.0, np.inf)] * 5, [(3.0, np.inf)] * 5, 0.95) == (None, None, None)


@pytest.mark.parametrize(
    ("ends", "said"),
    [((0.2, 0.4), "later"), ((0.1, None), "later"), ((None, -0.01), "earlier"), ((-0.05, 0.09), "no shift"), ((-0.1, 0.5), "undecided"),
     ((-0.05, None), "undecided"), ((None, None), "undecided")],
)  # fmt: skip
def test_what_an_interval_says(ends, said) -> None:
    assert verdict(*ends, 0.1, WORDS) == said


@pytest.mark.parametrize("sizes", [(50, 50), (20, 125)])
def test_of_many_runs_the_normal_limit_is_the_exact_interval(sizes) -> None:
    """Where one takes over from the other both ends are at the same difference, give or take one thousandth of them."""
    first, second = sizes
    limit = first * second / 2 - stats.norm.ppf(0.975) * np.sqrt(first * second * (first + second + 1) / 12)
    assert beyond(first, second, 0.95) == pytest.approx(limit, abs=first * second / 1000)
    assert first * second == EXACT and 0 < beyond(first + 1, second, 0.95) - beyond(first, second, 0.95) < second


def test_groups_of_too_few_runs_have_no_row() -> None:
    """A sweep of many values with a seed each would have a row for every pair, and none of them an interval."""
    seen = {(g, "loss"): [Seen((2.0, 2.0), (1.9, 2.1))] * n for g, n in (("a", 1), ("b", 3), ("c", 4), ("d", 5))}
    made = contrasts(seen, {g: {"lr": i} for i, g in enumerate("abcd")}, 0.95, 0.1)
    assert [(r["group"], r["other"]) for r in made.to_pylist()] == [("d", "b"), ("d", "c")]


def test_pairs_differ_in_one_field_and_what_follows_from_its_kind() -> None:
    groups = {
        "a": {"position": "learned", "lr": 1},
        "b": {"position": "rotary", "position.theta": 1e4, "lr": 1},
        "c": {"position": "rotary", "position.theta": 1e2, "lr": 1},
        "d": {"position": "rotary", "position.theta": 1e4, "lr": 2},
        "e": {"position": None, "lr": 1},
    }
    found = {(other, one): field for one, other, field in neighbours(groups)}
    position = dict.fromkeys((("a", "b"), ("a", "c"), ("a", "e"), ("b", "e"), ("c", "e")), "position")
    assert found == position | {("b", "c"): "position.theta", ("b", "d"): "lr"}


def test_groups_are_compared_curve_by_curve() -> None:
    def seen(at: float) -> Seen:
        return Seen((at, at), (at - 0.02, at + 0.02))

    never, first, second = Seen(*[(3.0, np.inf)] * 2), [seen(2 + k / 50) for k in range(5)], [seen(2.5 + k / 50) for k in range(5)]
    curves = {("x", "loss"): [*first, None], ("y", "loss"): [*second[:4], never], ("x", "carry"): first}
    (row,) = contrasts(curves, {"x": {"lr": 1}, "y": {"lr": 2}}, 0.95, 0.1).to_pylist()
    assert (row["curve"], row["field"], row["group"], row["other"], row["verdict"]) == ("loss", "lr", "y", "x", "later")
    assert [row[n] for n in ("runs", "of", "other_runs", "other_of")] == [4, 5, 5, 5]
    assert row["half"] == pytest.approx(0.5, abs=0.03) and row["change_low"] > 0 and row["change_high"] is None


def test_what_is_seen_of_a_curve() -> None:
    rise = Transition()._feature({"resid.0": [(0, 0.5), (1, 0.5), (10, 0.5), (100, 0.9), (1000, 1.0)]})
    assert rise.seen.change == (1.0, 2.0) and 1 < rise.seen.half[0] < 2 and rise.seen.reached
    never = Transition()._feature({"resid.0": [(0, 0.5), (1000, 0.51)]}, {"resid.0": 0.5})
    assert never.missing == NEVER_READ and never.seen == Seen((3.0, np.inf), (3.0, np.inf)) and not never.seen.reached
    known = Transition()._feature({"embed": [(0, 0.99), (10, 1.0)]})
    assert known.seen.half[0] == -np.inf
    assert Course((1, 10), (-1.0, -0.9), None, None, "floor or plateau unknown").seen is None


def test_the_contrast_of_a_store_is_that_of_when_its_networks_learn(tmp_path) -> None:
    """A third never do, and the last diverged before it could: they are late, and counted; the figure says what the row says."""
    runs = synthetic.runs_of({"optim.lr": [1e-3, 1e-2], "seed": range(12)})
    store = synthetic.make(tmp_path / "store", runs, tables=("metrics", "probe"), probes=30)
    el.measure(Transition(), store)
    (row,) = rows = store.sql("select * from contrast where curve = 'loss'").to_pylist()
    truths = [synthetic._truth(i, run, len(runs)) for i, run in enumerate(runs)]
    groups: dict[float, list[tuple[float, float]]] = {1e-3: [], 1e-2: []}
    for truth in truths:
        ended, learned = np.log10(truth["diverged"] or synthetic.STEPS), np.log10(truth["when"])
        groups[truth["lr"]].append((learned, learned) if truth["learns"] else (ended, np.inf))
    expected = shift(groups[1e-2], groups[1e-3], 0.95)
    for name, value in zip(("half", "half_low", "half_high"), expected, strict=True):
        assert row[name] == (None if value is None else pytest.approx(value, abs=0.03))
    assert (row["group"], row["other"], row["field"]) == ("lr=0.01", "lr=0.001", "optim.lr")
    counts = [sum(np.isfinite(late) for _, late in groups[lr]) for lr in (1e-2, 1e-3)]
    assert [row[n] for n in ("runs", "of", "other_runs", "other_of")] == [counts[0], 12, counts[1], 12]
    for shown, drawn in ((runs, ["carry", "first_operand", "loss"]), ([run for run in runs if run.optim.lr == 1e-2], [])):
        tables = Tables(store.only(shown))  # of a study of one rate alone, in a store that it shares
        assert [r["curve"] for r in contrasts_of(tables)] == drawn
        tables.close()
    figure = paper.contrast_forest(rows)
    assert f"{row['verdict']}, {counts[0]}/12 and {counts[1]}/12" in [text.get_text() for text in figure.axes[0].texts]
