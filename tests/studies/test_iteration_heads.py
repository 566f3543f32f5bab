"""The study of iteration heads: its runs are those of the page, chain of thought emerges against its controls, figures draw the rows."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from elegans import replace
from elegans.driver import train
from elegans.errors import Invalid, StoreError
from elegans.figures.catalogue import natural
from elegans.figures.iteration import fit_law, forgetting, half_ways, joint, law, table
from elegans.figures.lines import Lines
from elegans.figures.transfer import mean, passed, said, speed_ups
from elegans.instruments import Circuit, measure
from elegans.instruments.crossings import interval
from elegans.loading import load_study, study_of
from elegans.store import Store
from elegans.studies import iteration_heads as ih
from elegans.study import Study, draw_study, run_study
from elegans.tasks import BinaryCopy, Split
from elegans.training import At
from elegans.training.cohort import group
from elegans.training.cost import parameters
from elegans.training.transfer import lineage
from running import elegans

STRUCTURES = {  # and runs, parents included: counted from the page and the docstrings
    "emergence": (3, 60), "width": (35, 700), "transfer": (2, 80), "finetune": (4, 100), "patching": (1, 20), "law": (20, 200),
    "freezing": (11, 110), "forgetting": (3, 80), "sharpening": (1, 40), "subtraction": (1, 20), "excess": (9, 90),
    "positions": (12, 120), "optimiser": (6, 400), "generalisation": (5, 120), "curricula": (4, 240), "joint": (2, 120), "mixing": (1, 120),
}  # fmt: skip


def test_the_papers_model_has_its_parameters() -> None:
    """414,720 at 16 inputs, d 128 and a vocabulary of 64; ours has the 14 symbols of polynomial iteration."""
    run = ih.setting(ih.FULL, "", ih.polynomial(ih.FULL, 16), ih.model(128))
    assert parameters(run) == 414_720 - 2 * (64 - 14) * 128
    assert (run.batch, run.optim.lr, run.optim.b1, run.optim.b2, run.optim.weight_decay, run.optim.clip) == (256, 3e-4, 0.9, 0.999, 0, None)


def test_an_epoch_is_1024_rows_of_each_length() -> None:
    run = ih.setting(ih.FULL, "", ih.polynomial(ih.FULL, 16))
    assert run.train_set == 16 * 1024 and run.epochs == 1000 and run.length == 64_000
    goes_on = ih.PARTS["curricula"](False).runs[0]
    assert goes_on.train_set is None and goes_on.length == 32_000


@pytest.mark.parametrize("name", STRUCTURES)
def test_runs_and_structures_of_parts(name) -> None:
    study, small = (load_study(f"iteration_heads.{name}", s) for s in (False, True))
    assert (len(group(study.runs)), len(lineage(study.runs))) == STRUCTURES[name] and len(lineage(study.runs)) == len(study.runs)
    assert study.name == f"iteration_heads.{name}" and study.question.endswith("?") and small.name.endswith("_small")
    assert sum(r.length * r.batch for r in small.runs) < 0.01 * sum(r.length * r.batch for r in study.runs)
    assert all(len({r.seed for r in study.runs if r.label == label}) >= 10 for label in {r.label for r in study.runs})
    assert all(r.after is None or r.after.seed == r.seed for r in study.runs)
    assert all(r.label for r in study.runs) and ih.PARTS[name].__doc__.count("Cost:") == ih.PARTS[name].__doc__.count("Expect") == 1


def test_every_length_has_contents_of_every_part() -> None:
    """Of either scale; only of the two rows of one bit none is to select on."""
    for at in (ih.FULL, ih.SMALL):
        for task in (ih.polynomial(at, min(at.lengths)), ih.parity(at, min(at.lengths)), ih.parity(at, 4, kind=BinaryCopy)):
            rows = task.part_sizes()
            assert [row["length"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 4
            assert all(row["train"] and row["test"] and (row["validation"] or (task.size, row["length"]) == (2, 1)) for row in rows)


def test_children_of_transfer_start_after_200_epochs_of_their_own_seed() -> None:
    runs = ih.PARTS["transfer"](False).runs
    parents, children = [r for r in runs if r.after is None], [r for r in runs if r.after is not None]
    assert {r.after_step * r.batch / r.train_set for r in children} == {200} and {r.after.id for r in children} == {r.id for r in parents}
    assert {r.task.weights for r in children if r.label == "parity after polynomial"} == {(0.0, 1.0)}
    assert {(r.model.d_model, r.task.tasks[0].length, len(r.task.symbols)) for r in runs} == {(128, 16, 15)}


def test_every_part_is_counted_and_an_unknown_one_is_refused() -> None:
    assert set(STRUCTURES) == set(ih.PARTS) and all(ih.PARTS[name](True).figures for name in STRUCTURES)
    assert load_study("iteration_heads").name == "iteration_heads" and load_study("iteration_heads", True).name == "iteration_heads_small"
    for name in ("iteration_heads.nothing", "carry.width"):
        with pytest.raises(Invalid, match="allowed"):
            load_study(name)


def test_the_published_table_is_that_of_the_parts_cells() -> None:
    cells = {(run.label, run.task.length) for run in ih.PARTS["width"](False).runs}
    assert cells == {(label, length) for label, row in ih.PUBLISHED.items() for length in row}


# ---- emergence


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Four seeds with and four without chain of thought, 320 steps of 32 rows of up to 4 inputs modulo 5.

    51 of the 340 contents are tested on.
    Both are in one store, each seen without the other.
    """
    at = dataclasses.replace(ih.SMALL, length=4, batch=32, rows=256, epochs=10, every=10, lr=5e-3)
    folder, stores = tmp_path_factory.mktemp("tiny"), {}
    for label, cot in (("CoT", True), ("no CoT", False)):
        task = dataclasses.replace(ih.polynomial(at, cot=cot), split=Split(train=0.7, validation=0.15))
        runs = ih.seeded(at, replace(ih.setting(at, label, task), "record.weights", At()))
        stores[label] = train(runs, folder / "store").only(runs)
    return stores


def specs_of(store):
    return [run for cohort in store.cohorts() for run in cohort.specs()]


def final(store):
    return store.sql("select exact_match as y from metrics where split = 'test'")["y"].to_pylist()


def test_chain_of_thought_learns_what_is_not_learned_without_it(tiny) -> None:
    """Every seed with it is above every seed without, 1 in 70 by chance; and by 0.3 in the mean, four times the sd over 51 contents."""
    with_it, without = final(tiny["CoT"]), final(tiny["no CoT"])
    assert len(with_it) == len(without) == 4 and min(with_it) > max(without)
    assert np.mean(with_it) > np.mean(without) + 0.3


def test_runs_that_share_a_store_are_seen_alone_and_under_new_names(tiny) -> None:
    store = tiny["CoT"]
    assert [len(each.cohorts()) for each in (Store(store.path), store)] == [2, 1]
    assert [each.runs().num_rows for each in (Store(store.path), store)] == [8, 4]
    specs = sorted(store.cohorts()[0].specs(), key=lambda run: run.seed)
    runs = [dataclasses.replace(run, label="seed {seed}") for run in specs[1:3]]
    few = store.only(runs)
    assert few.sql("select run, label from runs order by label").to_pylist() == [{"run": r.id, "label": f"seed {r.seed}"} for r in runs]
    assert {row["run"] for row in few.sql("select distinct run from metrics").to_pylist()} == {run.id for run in runs}
    assert {line["run"]: line["label"] for line in few.lines()} == {run.id: f"seed {run.seed}" for run in runs}
    with pytest.raises(StoreError, match="no run"):
        few.find(specs[0].id)
    assert not store.only([]).cohorts() and not store.only([]).has("metrics")


def test_an_iteration_head_emerges_with_it(tiny) -> None:
    """Layer 2 looks at x_t: nowhere untrained, in the mean over seeds for a quarter of all states at least after training."""
    measure(Circuit(patterns=("iteration_2",), examples=128, by_length=False), tiny["CoT"])
    rows = tiny["CoT"].sql("select step, peakiness from circuit where layer = 1 order by step")
    first, last = np.split(np.array(rows["peakiness"].to_pylist()), 2)
    assert first.max() < 0.02 and last.mean() > 0.25 and last.min() > first.max()


def test_a_figure_draws_the_rows_of_its_own_runs_with_any_seeds(tiny, tmp_path) -> None:
    files = draw_study(Study(specs_of(tiny["CoT"])[:1], figures=ih.PARTS["positions"](True).figures), tiny["CoT"].path, tmp_path)
    assert [f.name for f in files] == ["positions.png", "positions.pdf", "positions.csv"] and all(f.stat().st_size for f in files)
    (row,) = [r for r in pyarrow.csv.read_csv(files[-1]).to_pylist() if r["quantity"] == "test_exact_match"]
    mean, low, high = interval(final(tiny["CoT"]), 0.95)
    assert (row["label"], row["x"], row["runs"]) == ("CoT", 10, 4)
    np.testing.assert_allclose((row["mean"], row["low"], row["high"]), (mean, low, high), rtol=1e-5)


@pytest.mark.slow
def test_the_small_study_shows_emergence_and_draws_it(tmp_path) -> None:
    """4 seeds each. With CoT, exact match and layer-2 peakiness rise within a tenth of the run of each other in most seeds; without CoT
    exact match stays, and with one layer peakiness does: every seed with CoT is above every seed of a control (1 in 70 by chance)."""
    run_study(load_study("iteration_heads", True), tmp_path / "store")
    answer = elegans("draw", tmp_path / "store", tmp_path / "figures")
    files = [Path(line) for line in answer.out.split()]
    assert [f.name for f in files] == ["emergence.png", "emergence.pdf", "emergence.csv"]
    store = Store(tmp_path / "store")
    last = "select label, max_by(y, step) as y from runs r join ({}) m using (run) group by label, run"
    exact = last.format("select run, step, avg(exact_match) as y from evaluate where length >= 4 group by all")
    peaked = last.format(
        "select run, step, avg(peakiness) as y from circuit c where pattern = 'iteration_2' and length >= 4 "
        "and layer = (select max(layer) from circuit d where c.run = d.run) group by all"
    )
    of = lambda query, label: [r["y"] for r in store.sql(query).to_pylist() if r["label"] == label]  # noqa: E731
    assert min(of(exact, "CoT")) > 0.9 > 0.8 > max(of(exact, "one layer")) and max(of(exact, "no CoT")) < 0.3
    assert min(of(peaked, "CoT")) > 0.6 > 0.5 > max(of(peaked, "one layer")) and not of(peaked, "no CoT")
    drawn = pyarrow.csv.read_csv(tmp_path / "figures" / "emergence.csv").to_pylist()
    arms = {"CoT", "no CoT", "one layer"}
    assert {r["label"] for r in drawn if r["quantity"] == "exact_match"} == arms
    assert {r["label"] for r in drawn if r["quantity"] == "peakiness"} == arms - {"no CoT"}


# ---- figures


def test_the_law_is_found_again_where_it_holds() -> None:
    d, n = (a.ravel().astype(float) for a in np.meshgrid([12, 16, 20, 24, 32], [5, 10, 16, 20]))
    share = 1 / (1 + (7 * n**0.35 / d) ** 6)  # d_half = 7 n^0.35, k = 6
    found = fit_law(d, n, share)
    np.testing.assert_allclose((found.c, found.b, found.k), (7, 0.35, 6), rtol=1e-3)
    assert math.isclose(float(found.share(found.half(9), 9)), 0.5)


def test_lines_cross_a_level_where_they_pass_it_for_good_and_what_is_missing_counts_nowhere() -> None:
    x, nan = np.array([0.0, 10.0, 20.0, 40.0]), np.nan
    found = Lines(x, np.array([[0, 1, 0, 1], [0, 0, 1, 1], [0, 0.5, nan, 0.5], [1, 1, 1, 1]]), tuple("abcd"))
    assert found.first(0.5) == [10, 20, 10, 0] and found.first(0.75) == [10, 20, None, 0]
    assert found.brackets(0.75) == [(20, 40), (10, 20), (40, math.inf), (-math.inf, 0)]
    mean, _, high = interval([0, 1, 1], 0.95)
    np.testing.assert_allclose((found.mean[2], found.half[2]), (mean, (high or 0) - mean))
    assert np.isnan(dataclasses.replace(found, values=found.values[:2]).half).all()


def test_half_ways_are_of_runs_in_which_both_get_there() -> None:
    x = np.array([0.0, 10.0, 20.0])
    exact = {"CoT": Lines(x, np.array([[0, 0, 1], [0, 0, 1], [0, 0, 0]]), tuple("abc")), "no CoT": Lines(x, np.zeros((1, 3)), ("d",))}
    peaked = {"CoT": Lines(x, np.array([[0, 1, 1], [0, 0, 0], [0, 1, 1]]), tuple("abc"))}
    assert half_ways(exact, peaked) == {"CoT": [((10, 20), (0, 10))]}


def test_the_store_says_which_study_to_draw_and_small_ones_are_told_apart(tmp_path) -> None:
    store = Store.create(tmp_path / "store")
    for name in ("iteration_heads", "iteration_heads_small", "iteration_heads.law_small", "quiet_features_small", "carry"):
        (store.path / "study.json").write_text(json.dumps({"name": name}))
        assert study_of(store).name == name and study_of(store, "iteration_heads.width").name == "iteration_heads.width"


def test_a_store_in_which_no_study_ended_or_none_that_ships_asks_for_one(tmp_path) -> None:
    store = Store.create(tmp_path / "store")
    with pytest.raises(StoreError, match="no study ended here; say which to draw with --study"):
        study_of(store)
    (store.path / "study.json").write_text(json.dumps({"name": "mine"}))
    with pytest.raises(StoreError, match="'mine' is none that ships; give its file with --study"):
        study_of(store)
    (store.path / "study.json").write_text(json.dumps({"name": "mine", "own_figures": False}))
    assert study_of(store) == Study([], name="mine")


def test_speed_ups_are_of_seeds_that_get_there_both_ways_and_bounded_by_the_recordings() -> None:
    inf = math.inf
    found = speed_ups({0: (500, 600), 1: (700, 800), 2: None, 3: (1, 2)}, {0: (0, 20), 1: (20, 40), 2: (0, 10), 3: None}, 180)
    assert list(found) == ["its own epochs alone", "with the 180 before"]
    np.testing.assert_allclose(10 ** np.array(found["its own epochs alone"]), [(500 / 20, inf), (700 / 40, 800 / 20)])
    np.testing.assert_allclose(10 ** np.array(found["with the 180 before"]), [(500 / 200, 600 / 180), (700 / 220, 800 / 200)])
    lines = Lines(np.array([0.0, 2.0, 4.0]), np.array([[0, 0.5, 1], [0, 1, 1], [1, 1, 1], [0, 1, 0.5]]), tuple("abcd"))
    assert passed(lines) == [(2, 4), (0, 2), (0, 2), None]


def test_a_mean_ratio_with_seeds_known_from_one_side_is_a_bound() -> None:
    """Whatever the seeds' ratios are within their brackets, the mean is in what is said."""
    inf, known = math.inf, [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    middle, least, most = mean(known), mean([*known[:2], (2.0, inf)]), mean([*known[:2], (-inf, 3.0)])
    assert middle["bound"] is None and math.isclose(middle["mean"], 10**1.5)
    assert least["bound"] == "at least" and math.isclose(least["mean"], 10**1.0) and least["high"] is None
    assert most["bound"] == "at most" and math.isclose(most["mean"], 10**2.0) and most["low"] is None
    assert math.isclose(least["low"], middle["low"]) and math.isclose(most["high"], middle["high"])
    assert mean([(0.0, inf), (-inf, 1.0)])["mean"] is None and mean(known[:2])["low"] is None
    assert (
        said(**least).startswith("at least 10 x [") and said(**least).endswith("\u221e)") and said(**mean([(0.0, inf)])) == "at least 1 x"
    )


class Given(Store):
    """A store of given tables, rows by name."""

    def __init__(self, **tables):
        self.given = {name: pa.Table.from_pylist(rows) for name, rows in tables.items()}

    def has(self, name):
        return name in self.given

    def table(self, name):
        return self.given[name]

    def _names(self):
        return list(self.given)


def at_end(runs, **values):
    """Rows of an instrument at the only recorded step, of inputs of 4: one for every run."""
    return [{"run": run["run"], "step": 1, "length": 4} | {name: v[i] for name, v in values.items()} for i, run in enumerate(runs)]


def test_the_table_keeps_the_rows_of_settings_that_are_not_measured_and_counts_seeds() -> None:
    runs = [{"run": f"r{i}", "label": "polynomial, d 20", "task.length": 5} for i in range(3)]
    runs += [{"run": f"s{i}", "label": "parity, no CoT", "task.length": 10} for i in range(2)]
    store = Given(runs=runs, evaluate=at_end(runs, exact_match=(0.5, 0.7, 0.9, 1.0, 1.0)))
    measured, published = table(ih.PUBLISHED)(store)[0].axes
    assert [t.get_text() for t in measured.get_yticklabels()] == list(ih.PUBLISHED)
    _, low, high = interval([0.5, 0.7, 0.9], 0.95)
    assert high > 1
    assert {t.get_position(): t.get_text() for t in measured.texts} == {(0, 1): f"0.70\n{low:.2f}–1.00", (1, 6): "1.00\n2 seeds"}
    assert measured.get_title() == "measured, 95 % interval, 2 or 3 seeds"
    assert len(published.texts) == 2 * len(ih.PUBLISHED)


@pytest.mark.parametrize(("c", "b"), [(16, 0.002), (2, 1.2), (80, 0.3)])
def test_the_ticks_of_the_law_differ_and_its_axis_holds_the_widths_of_the_runs(c, b) -> None:
    widths = (12, 16, 20, 24, 32)
    cells = [(d, n, seed) for d in widths for n in (5, 10, 20) for seed in (0, 1)]
    fixed = {"task": "polynomial", "task.cot": True, "model.layers": 2}
    runs = [{"run": f"{d} {n} {seed}", "model.d_model": d, "task.length": n} | fixed for d, n, seed in cells]
    shares = [1 / (1 + (c * n**b / d) ** 8) for d, n, _ in cells]
    _, axes = law(Given(runs=runs, evaluate=at_end(runs, exact_match=shares)), draws=2)[0].axes
    ticks = [t.get_text() for t in axes.get_yticklabels()]
    assert len(set(ticks)) == len(ticks) and {str(d) for d in widths} <= set(ticks) and axes.get_ylim() == (6, 64)


def test_forgetting_draws_each_task_by_itself() -> None:
    runs = [{"run": f"r{i}", "label": "all weights", "batch": 64, "train_set": 128} for i in range(2)]
    rows = at_end(runs, task=("parity",) * 2, exact_match=(0.8, 1.0)) + at_end(runs, task=("polynomial",) * 2, exact_match=(0.1, 0.3))
    rows += [row | {"length": length, "exact_match": 0.0} for row in rows for length in (3, None)]
    drawn = forgetting(Given(runs=runs, evaluate=rows))[1].to_pylist()
    assert [(row["quantity"], row["x"], round(row["mean"], 6)) for row in drawn] == [("new", 0.5, 0.9), ("old", 0.5, 0.2)]


def test_one_head_for_both_tasks_is_told_from_a_head_for_each() -> None:
    """Run a: head 0 is peaked on both tasks. b: head 0 on one and head 1 on the other. c has rows of one task alone."""
    peaks = {"a": {"polynomial": (0.9, 0.1), "parity": (0.8, 0.2)}, "b": {"polynomial": (0.9, 0.1), "parity": (0.2, 1.0)}}
    peaks["c"] = {"polynomial": (0.1, 0.7)}
    rows = [
        {"run": run, "step": 1, "length": 4, "layer": 1, "head": head, "pattern": f"{task}.iteration_2", "peakiness": y}
        for run, tasks in peaks.items() for task, of in tasks.items() for head, y in enumerate(of)
    ]  # fmt: skip
    rows += [row | {"pattern": "iteration_2", "peakiness": 0.5} for row in rows]
    drawn = joint(Given(runs=[{"run": run, "label": run} for run in peaks], circuit=rows))[1].to_pylist()
    found = {(row["quantity"], row["label"]): row["mean"] for row in drawn}
    polynomial, parity, either = dict.fromkeys(row["quantity"] for row in drawn)
    assert {run: found[polynomial, run] for run in "abc"} == {"a": 0.9, "b": 0.9, "c": 0.7}
    assert {run: found.get((parity, run)) for run in "abc"} == {"a": 0.8, "b": 1.0, "c": None}
    assert {run: found.get((either, run)) for run in "abc"} == {"a": 0.8, "b": 0.2, "c": None}


def test_labels_are_sorted_by_their_numbers() -> None:
    assert sorted(["batch 1024, lr 0.001", "batch 64, lr 0.01", "batch 64, lr 1e-4"], key=natural) == [
        "batch 64, lr 1e-4", "batch 64, lr 0.01", "batch 1024, lr 0.001"
    ]  # fmt: skip
