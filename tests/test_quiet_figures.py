"""The figures of the quiet-features page draw the rows, mark what changed where, and say plainly what was not measured."""

import dataclasses

import numpy as np
import pyarrow.csv
import pytest

import synthetic
from elegans.figures import Tables, ablation_figure, features_figure, quiet, scaled, scaling, scaling_figure
from elegans.figures.quiet import beside
from elegans.instruments import AcrossCompute, Scaling, Transition, measure
from elegans.studies.quiet_features import LOUD, PUBLISHED, QUIET, TASKS, draw

BUDGETS = [1e9, 1e10, 1e11, 1e12, 1e13]
NOTHING = "not measured\nin this store"


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    store = synthetic.grid_store(
        tmp_path_factory.mktemp("grid"),
        BUDGETS,
        lambda f, w, s: (0.6 if f < 3e12 else 0.001) * (1 + 0.01 * s),
        {"carry": lambda f, w, s: (0.51 if f < 3e10 else 0.98) + 0.005 * s},
    )
    measure(Scaling(draws=20), store)
    measure(AcrossCompute(draws=20), store)
    return store


@pytest.fixture(scope="module")
def within(tmp_path_factory):
    store = synthetic.make(tmp_path_factory.mktemp("within"), synthetic.small(), tables=("metrics", "probe", "ablate"), probes=40)
    measure(Transition(), store)
    return store


def opened(store):
    tables = Tables(store)
    assert not tables.lacking
    return tables


def texts(axes) -> list[str]:
    return [t.get_text() for t in axes.texts]


def test_the_features_and_tasks_of_the_study_exist() -> None:
    import jax

    truths = {t.kind: set(jax.eval_shape(lambda k, t=t: t.sample(k, t.prepare()).truth, jax.random.key(0))) for t in TASKS}
    assert len(QUIET) == 6 and len(LOUD) == 4 and len(TASKS) == 10
    assert all(feature in truths[task] for task, feature in (*QUIET, *LOUD)) and set(PUBLISHED) <= set(truths)


def test_scaling_draws_means_whiskers_levels_and_the_published_range(grid) -> None:
    tasks = ["addition", "multiplication"]
    figure = scaling_figure(opened(grid), tasks, {"addition": (1e11, 1e12)}, 2)
    panel, empty, exact = figure.axes
    rows = grid.table("scaling").to_pylist()
    np.testing.assert_allclose(panel.lines[0].get_ydata(), [row["loss"] for row in rows])
    np.testing.assert_allclose(exact.lines[0].get_ydata(), [row["exact_match"] for row in rows])
    (whiskers,) = panel.collections
    np.testing.assert_allclose([s[:, 1] for s in whiskers.get_segments()], [[row["low"], row["high"]] for row in rows])
    heights = [line.get_ydata()[0] for line in panel.lines]
    assert 0.0 in heights and pytest.approx(synthetic.PLATEAU) in heights
    assert [1e12, 1e13] in [list(line.get_xdata()) for line in panel.lines]  # where the loss is half-way
    shaded = [(p.get_x(), p.get_x() + p.get_width()) for p in panel.patches]
    assert shaded == [(1e11, 1e12)] and texts(empty) == [NOTHING] and not empty.lines


def test_scaling_of_the_report_has_a_panel_for_each_task_that_do_not_overlap(grid) -> None:
    (one,) = scaled(grid.table("scaling"), grid.table("scaling_fit"))
    for count in (1, 2, 3, 4, 10):
        layout = scaling([one] * count).layout
        axes = [(layout[f"xaxis{i or ''}"].domain, layout[f"yaxis{i or ''}"].domain) for i in [0, *range(2, count + 1)]]
        assert all(0 <= low < high <= 1.001 for pair in axes for low, high in pair)
        boxes = [(x[0], y[0], x[1], y[1]) for x, y in axes]
        apart = lambda a, b: a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]  # noqa: E731
        assert all(apart(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_feature_across_compute_is_drawn_from_its_rows(grid) -> None:
    found = beside(opened(grid), "addition", "carry")
    np.testing.assert_allclose(found.score.flops, BUDGETS)
    np.testing.assert_allclose(found.score.mean, [0.515, 0.515, 0.985, 0.985, 0.985], atol=1e-6)
    assert found.loss_change == (1e12, 1e13) and found.feature_change == (1e10, 1e11) and found.said == "quiet"
    assert found.untrained == pytest.approx(0.5)
    panel, empty, score = features_figure(opened(grid), [("addition", "carry"), ("addition", "first_operand")], 2).axes
    assert panel.get_title().startswith("addition: carry\nquiet (across compute, n = 3)") and texts(empty) == [NOTHING]
    bars = [list(line.get_xdata()) for line in panel.lines]
    assert [1e12, 1e13] in bars and [1e10, 1e11] in bars
    np.testing.assert_allclose(score.lines[0].get_ydata(), found.score.mean)
    for untrained in (0.5, None):  # a key is of what is drawn
        drawn = quiet._features_figure({("addition", "carry"): dataclasses.replace(found, untrained=untrained)}, 1)
        keys = [text.get_text() for text in drawn.legends[0].get_texts()]
        assert ("untrained" in keys) == (untrained is not None) and "task loss" in keys


def test_a_feature_within_runs_is_drawn_against_the_flops_of_its_steps(within) -> None:
    found = beside(opened(within), "addition", "first_operand")
    rows = [r for r in within.table("course").to_pylist() if r["curve"] == "first_operand" and r["step"] > 0]
    of = [r for r in rows if r["group"] == found.note.split(", ")[1]]
    np.testing.assert_allclose(found.score.flops, [8.9e7 * r["step"] for r in of])
    np.testing.assert_allclose(found.score.mean, [r["mean"] for r in of])
    assert found.said == "quiet" and found.feature_change[0] < 30 * 8.9e7 < found.feature_change[1]
    assert beside(opened(within), "addition", "nothing") is None and beside(opened(within), "multiplication", "carry_16") is None


def test_an_ablation_figure_without_rows_says_so() -> None:
    assert "no ablation was measured in this store" in texts(ablation_figure([]).axes[0])


def test_the_study_draws_what_was_measured_and_the_ablation_table(within, grid, tmp_path) -> None:
    """The loud features are all of other tasks; a grid has no ablations, a few runs no scaling."""
    files = draw(within, tmp_path)
    names = {f"{n}.{k}" for n in ("quiet", "ablation") for k in ("png", "pdf")} | {"ablation.csv", "ablation.md"}
    assert {f.name for f in files} == names == {f.name for f in tmp_path.iterdir()}
    files = draw(grid, tmp_path / "grid")
    assert {f.name for f in files} == {f"{n}.{k}" for n in ("scaling", "quiet") for k in ("png", "pdf")}
    rows = pyarrow.csv.read_csv(tmp_path / "ablation.csv").to_pylist()
    assert {(r["feature"], r["runs"], r["verdict"]) for r in rows} == {(f, 8, "the network uses it") for f in ("carry", "first_operand")}
    assert (tmp_path / "ablation.md").read_text().count("the network uses it") == 2


def test_tasks_of_which_a_store_has_no_run_have_no_panel(within, tmp_path, monkeypatch) -> None:
    drawn = {}
    monkeypatch.setattr(quiet, "save", lambda figure, path: drawn.setdefault(path.name, figure) and [])
    draw(within, tmp_path)
    titles = {name: [axes.get_title().split(":")[0] for axes in figure.axes if axes.get_title()] for name, figure in drawn.items()}
    assert titles == {"quiet": ["addition"] * 2, "ablation": []}
