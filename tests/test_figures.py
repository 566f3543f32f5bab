"""Figures draw what is in the rows: levels at their heights, gaps where nothing was measured, quantiles of many."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

import synthetic
from elegans.figures import (
    Catalogue,
    Facts,
    Tables,
    ablation,
    caption,
    catalogue,
    curves,
    lead_forest,
    leads,
    paper,
    position_map,
    probe_map,
    queries,
    save_paper_figures,
    strips,
    style,
    timeline,
)
from elegans.figures.catalogue import columns
from elegans.figures.curves import series
from elegans.figures.effects import leads_of
from elegans.figures.maps import probe_maps
from elegans.instruments import Transition, measure
from elegans.instruments.crossings import interval


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return synthetic.make(tmp_path_factory.mktemp("figures"), synthetic.small())


@pytest.fixture(scope="module")
def tables(store):
    opened = Tables(store)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def runs(store, tables):
    return catalogue(store, tables)


def fake(fields: list[dict], **facts) -> Catalogue:
    """A catalogue of runs that exist nowhere else."""
    given = {"floor": None, "plateau": None, "loss": None, "exact_match": None, "test_loss": None, "test_exact_match": None} | facts
    made = [Facts(f"r{i}", {"run": f"r{i}", "state": "finished", "label": None}, f, **given) for i, f in enumerate(fields)]
    return Catalogue({f.id: f for f in made})


def lines(figure):
    return [trace for trace in figure.data if trace.mode == "lines" and trace.hoverinfo != "skip"]


# ---- what is known of the runs


def test_null_numbers_are_nan_and_never_zero():
    data = columns(pa.table({"loss": pa.array([1.0, None], pa.float32()), "step": pa.array([1, None]), "none": pa.nulls(2)}))
    assert np.isnan(data["loss"][1]) and np.isnan(data["step"][1]) and np.isnan(data["none"]).all()


def test_learned_is_half_way_from_plateau_to_floor(runs):
    expected = [run.id for i, run in enumerate(synthetic.small()) if i % 3 != 2 and i != 11]
    assert sorted(runs.learned) == sorted(expected)
    facts = next(f for f in runs.facts.values() if f.state == "finished")
    assert (facts.floor, facts.plateau) == (0.0, pytest.approx(synthetic.PLATEAU))


def test_learned_is_unknown_without_measurements():
    facts = fake([{}]).facts["r0"]
    assert facts.learned is None
    assert fake([{}], exact_match=0.6).facts["r0"].learned is True


def test_a_diverged_run_has_no_final_loss(runs):
    diverged = next(f for f in runs.facts.values() if f.state == "diverged")
    assert diverged.loss is None and diverged.exact_match is None and diverged.learned is False


def test_differing_fields_leave_out_seeds_and_copies():
    runs = fake([{"optim.lr": lr, "twice": 2 * lr, "seed": s, "batch": 64} for lr in (0.1, 0.2) for s in (0, 1)])
    assert runs.differing == ["optim.lr"]
    assert runs.short("optim.lr") == "lr"
    assert runs.describe("r1") == "lr=0.1, seed=1"


def test_many_numbers_are_binned_into_groups_of_equal_size():
    grouping = fake([{"lr": float(i)} for i in range(100)]).grouping("lr")
    assert len(grouping.labels) == 5 and grouping.ordered
    assert {sum(label == of for of in grouping.of.values()) for label in grouping.labels} == {20}


def test_many_names_end_in_others():
    grouping = fake([{"kind": f"k{i % 12:02}"} for i in range(100)]).grouping("kind")
    assert len(grouping.labels) == len(style.NAMED) and grouping.labels[-1] == "others"
    assert set(style.palette(grouping)) == set(grouping.labels)


# ---- curves


def test_floor_and_plateau_stand_at_their_heights(tables, runs):
    figure = curves(tables.ask(queries.curves("validation")), runs)
    assert sorted(shape.y0 for shape in figure.layout.shapes) == [0.0, pytest.approx(synthetic.PLATEAU, abs=1e-6)]
    assert all(shape.y0 == shape.y1 for shape in figure.layout.shapes)
    labels = {note.text: note.y for note in figure.layout.annotations}
    assert labels == {"floor 0": 0.0, "plateau 0.567": pytest.approx(synthetic.PLATEAU, abs=1e-6)}


def test_an_unknown_plateau_is_not_drawn_and_the_caption_says_so():
    rows = pa.table({"run": ["r0"] * 2, "step": [0, 1], "loss": [2.0, 1.0]})
    figure = curves(rows, fake([{}]))
    assert not figure.layout.shapes and "plateau (best loss that sees only the output position) is not known" in caption(figure)


def test_missing_values_are_gaps():
    rows = pa.table({"run": ["r0"] * 3 + ["r1"] * 3, "step": [0, 1, 2] * 2, "loss": [2.0, None, 1.0, None, None, None]})
    figure = curves(rows, fake([{}, {}]))
    assert len(lines(figure)) == 1
    np.testing.assert_array_equal(lines(figure)[0].y, [2.0, np.nan, 1.0])
    assert not lines(figure)[0].connectgaps and "1 runs have no such value" in caption(figure)


def test_every_run_is_a_line_coloured_by_the_field_that_differs(tables, runs):
    figure = curves(tables.ask(queries.curves("validation")), runs, by="optim.lr")
    assert len(lines(figure)) == 12 and len({line.line.color for line in lines(figure)}) == 3
    assert [line.name for line in lines(figure) if line.showlegend] == ["0.0003", "0.001", "0.003"]
    cross = next(trace for trace in figure.data if trace.meta == "diverged")
    assert cross.x[0] < 1234


def test_step_zero_stands_left_of_the_first_step_under_its_own_label(tables, runs):
    figure = curves(tables.ask(queries.curves("validation")), runs)
    assert (figure.layout.xaxis.tickvals[0], figure.layout.xaxis.ticktext[0]) == (0.5, "0")
    assert lines(figure)[0].x[0] == 0.5 and lines(figure)[0].customdata[0] == 0


def test_many_runs_become_medians_and_bands():
    values = np.arange(61.0)
    rows = pa.table({"run": [f"r{i}" for i in range(61)], "step": [1] * 61, "exact_match": values / 60})
    figure = curves(rows, fake([{} for _ in values]), "exact_match")
    (line,) = lines(figure)
    assert line.y[0] == 0.5
    np.testing.assert_allclose(line.customdata[0], [1, 0.1, 0.9, 61])
    assert "too many for single curves" in caption(figure)


def test_bands_leave_out_steps_that_few_runs_reach():
    rows = pa.table({"run": [f"r{i}" for i in range(61)] + ["r0"], "step": [1] * 61 + [2], "loss": [1.0] * 61 + [9.0]})
    (line,) = lines(curves(rows, fake([{} for _ in range(61)])))
    assert list(line.x) == [1]


def test_timeline_draws_chance_and_the_site_of_each_feature(tables, runs):
    sites = {row["feature"]: row["site"] for row in tables.ask(queries.SITES).to_pylist()}
    assert all(site.endswith(".1") for site in sites.values())
    figure = timeline(tables.ask(queries.probe_curves(sites, "true")), tables.ask(queries.loss_curves("true")), runs, sites, "all")
    heights = {round(shape.y0, 3) for shape in figure.layout.shapes if shape.yref == "y"}
    assert heights == {round(float(c.mean()), 3) for c in synthetic.CHANCE.values()}
    assert {shape.y0 for shape in figure.layout.shapes if shape.yref == "y2"} >= {0.0}


# ---- maps


def test_positions_that_were_never_measured_stay_empty():
    rows = pa.table({"step": [0, 0, 1], "position": [3, 4, 3], "loss": [1.0, None, 0.5], "runs": [2, 2, 2]})
    z = position_map(rows, "all").data[0].z
    np.testing.assert_array_equal(z, [[1.0, 0.5]])
    rows = pa.table({"step": [0, 0, 1], "position": [3, 4, 4], "loss": [1.0, 0.7, 0.5], "runs": [2, 2, 2]})
    np.testing.assert_array_equal(position_map(rows, "all").data[0].z, [[1.0, np.nan], [0.7, 0.5]])


def test_probe_panels_share_one_scale_and_end_with_the_comparisons(tables, runs):
    figure = probe_map(tables.ask(queries.probe_map("carry", queries.among(runs.learned, 12))), "carry", "all")
    names = [trace.name for trace in figure.data]
    assert names[-3:] == ["untrained", "random labels", "chance"] and names[-4] == "step 20k" and len(names) == 8
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0.5, 1)
    np.testing.assert_allclose(figure.data[-1].z[0], synthetic.CHANCE["carry"], atol=1e-6)
    assert list(figure.data[0].y) == ["embed", "attn_out.0", "mlp_out.0", "resid.0", "attn_out.1", "mlp_out.1", "resid.1"]


def probe_rows(**change):
    row = {"step": 5, "site": "embed", "family": "embed", "layer": -1, "index": 0, "accuracy": 0.9, "control": 0.5, "chance": 0.5}
    return pa.Table.from_pylist([row | {"untrained": None, "runs": 1} | change])


def test_an_unmeasured_untrained_network_is_said_to_be_so():
    figure = probe_map(probe_rows(), "carry", "all")
    untrained = next(trace for trace in figure.data if trace.name == "untrained")
    assert np.isnan(untrained.z).all()
    assert "not<br>measured" in [note.text for note in figure.layout.annotations]


def test_step_zero_stands_in_for_the_untrained_network():
    rows = pa.concat_tables([probe_rows(), probe_rows(step=0, accuracy=0.6)], promote_options="permissive")
    assert dict(probe_maps(rows).panels)["untrained"][0, 0] == pytest.approx(0.6)


# ---- effects


def test_lead_draws_means_intervals_and_every_run(tables, runs):
    found = leads_of(tables)
    figure = lead_forest(found)
    rows = tables.ask(queries.LEAD).to_pylist()
    means = [trace for trace in figure.data if trace.name == "mean"]
    assert [m.x[0] for m in means] == [row["mean"] for row in rows]
    assert [m.x[0] - m.error_x.arrayminus[0] for m in means] == pytest.approx([row["low"] for row in rows])
    assert [len(t.x) for t in figure.data if t.name == "runs"] == [row["runs"] for row in rows]
    assert figure.layout.shapes[0].x0 == figure.layout.shapes[0].x1 == 0


def test_the_dots_of_a_row_are_the_runs_of_its_group(tmp_path):
    """Every run is evaluated every 100 steps: `steps=100`, the name of a group, is also in the fields of runs of 400."""
    axes = {"record.evaluate": [{"kind": "every", "steps": 100}], "steps": [100, 400], "seed": range(4)}
    store = synthetic.make(tmp_path, synthetic.runs_of(axes), tables=("metrics", "probe"))
    measure(Transition(), store)
    found = leads_of(Tables(store))
    assert {lead.group for lead in found} == {"steps=100", "steps=400"}
    assert [len(lead.each) for lead in found] == [lead.runs for lead in found]
    store.add_rows("transition", "store", store.table("transition").drop_columns(["group"]))  # as earlier versions wrote it
    assert all(len(lead.each) == 0 and lead.mean is not None for lead in leads_of(Tables(store)))


def test_a_group_without_a_lead_has_no_mark():
    rows = pa.Table.from_pylist(
        [{"group": "", "feature": "f", "runs": 0, "of": 3, "mean": None, "low": None, "high": None, "verdict": "undecided"}]
    )
    none = pa.table({"group": [""], "feature": ["f"], "lead": pa.array([None], pa.float64())})
    figure = lead_forest(leads(rows, none))
    assert len(figure.data) == 0 and figure.layout.annotations[0].text == "not measured, n = 0 of 3"


def test_ablation_averages_draws_within_runs_and_keeps_their_spread(tables):
    rows = tables.ask(queries.ablation())
    made = {strip.name: strip for strip in strips(rows)}
    assert next(iter(made)) == "nothing removed" and len(made) == 5
    random = made["carry: random direction removed"]
    assert len(random.each) == 8 and len(random.draws) == 160
    assert random.mean == pytest.approx(random.draws.mean())
    assert 0 <= random.low < random.mean < random.high <= 1
    mine = rows.to_pandas().query("feature == 'carry' and direction == 'random'").groupby("run").exact_match
    assert random.spread == (pytest.approx(mine.quantile(0.025).mean()), pytest.approx(mine.quantile(0.975).mean()))
    assert made["carry removed"].mean < 0.2
    assert [t.x[0] for t in ablation(rows).data if t.name == "mean"] == [strip.mean for strip in made.values()]


def test_an_ablation_is_of_test_rows_and_says_so(tables):
    """Validation rows fit the probes whose directions are removed; see `Ablate`."""
    rows = tables.ask(queries.ablation())
    figure = ablation(rows, "loss")
    assert figure.layout.xaxis.title.text == "test loss (nats per scored token)" and caption(figure).startswith("Test loss, ")
    assert caption(ablation(rows)).startswith("Exact match on test rows ")


def test_intervals_cover_the_mean_in_95_of_100_cases():
    draw = np.random.default_rng(0)
    held = [low < 0 < high for _, low, high in (interval(draw.normal(size=5), 0.95, fewest=2) for _ in range(2000))]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)
    assert interval(np.array([1.0]), 0.95, fewest=2) == (1.0, None, None)


def test_users_text_is_no_markup():
    assert style.text("<b>x</b>") == "&lt;b&gt;x&lt;/b&gt;" and len(style.text("x" * 99, 20)) == 20


# ---- for papers


@pytest.fixture(scope="module")
def papers(store, tmp_path_factory):
    return save_paper_figures(store, tmp_path_factory.mktemp("papers"))


def test_paper_figures_come_as_png_and_pdf(papers):
    stems = {"loss", "exact-match", "probe-carry", "probe-first_operand", "lead", "ablation"}
    *drawn, captions = papers
    assert {p.name for p in drawn} == {f"{stem}.{kind}" for stem in stems for kind in ("png", "pdf")}
    assert all(p.read_bytes()[:4] in (b"\x89PNG", b"%PDF") for p in drawn)
    assert {line.split(".")[0].removeprefix("**") for line in captions.read_text().splitlines() if line} == stems


def test_a_line_for_each_group_of_runs_that_differ_by_seed_alone(tables, runs):
    """Medians of four seeds at each of three rates, not of all twelve runs; a run that diverged is one of them."""
    data = series(tables.ask(queries.curves("validation")), "loss")
    figure, text = paper.curves(data, runs, "loss", runs.groups)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["0.0003 (4)", "0.001 (4)", "0.003 (4)"]
    assert "n = 12 of 12 runs" in text and "pool" not in text
    for label, line in zip(runs.groups.labels, [x for x in figure.axes[0].lines if "(" in str(x.get_label())], strict=True):
        ends = [y[-1] for run, (step, y) in data.items() if runs.groups.of[run] == label and step[-1] == synthetic.STEPS]
        assert line.get_ydata()[-1] == pytest.approx(np.nanmedian(ends))


def test_groups_differ_in_every_field_but_seeds(tables):
    several = fake([{"lr": lr, "layers": n, "seed": seed} for n in (10, 2) for lr in (0.01, 0.001) for seed in range(3)])
    assert several.groups.labels == ("lr=0.001, layers=2", "lr=0.001, layers=10", "lr=0.01, layers=2", "lr=0.01, layers=10")
    assert sorted(several.groups.of.values()).count("lr=0.01, layers=2") == 3
    many = fake([{"lr": 10.0**-i, "layers": n} for i in range(5) for n in range(2)])
    shown = paper._groups(tables, many)  # ten of them: more than colours
    assert shown.title == "lr" and len(shown.labels) == 5 and "by lr, and pool" in paper._pooled(many, shown)


def test_the_same_store_gives_the_same_paper_figures(store, papers, tmp_path):
    again = save_paper_figures(store, tmp_path)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in papers]


def test_a_figure_of_probes_has_a_row_for_every_group_of_runs(store, tables, runs):
    """Means of the runs of one group that learned, said as such: groups are never averaged together."""
    by = runs.differing[0]
    found = paper._maps(tables, runs, "carry", runs.groups)
    values = sorted({f.fields[by] for f in runs.facts.values()})
    assert len(values) > 1
    for value, (name, maps) in zip(values, found.items(), strict=True):
        members = [run for run, f in runs.facts.items() if f.fields[by] == value]
        chosen = sorted(set(members) & set(runs.learned)) or members
        assert name == f"{runs.short(by)} {value:g}\n{len(chosen)} of {len(members)} runs"
        alone = store.sql(f"""select avg(accuracy) as y from probe where feature = 'carry' and site = '{maps.sites[-1]}' and "index" = 0
        and run in ({", ".join(map(repr, chosen))}) and step = (select max(step) from probe)""")["y"][0].as_py()
        last = [z for title, z in maps.panels if title.startswith("step")][-1]
        np.testing.assert_allclose(last[-1, 0], alone, rtol=1e-6)


def test_probes_of_a_group_in_which_none_learned_say_so(tables, runs):
    none = Catalogue({run: dataclasses.replace(f, loss=f.plateau, exact_match=0.0) for run, f in runs.facts.items()})
    assert list(paper._maps(tables, none, "carry", none.grouping(None))) == [f"all runs\n{len(runs.facts)} runs, none learned"]


def test_leads_of_groups_without_runs_that_are_shown_are_left_out(tables):
    rows = tables.ask(queries.LEAD)
    other = rows.set_column(rows.column_names.index("group"), "group", pa.array(["steps=400"] * rows.num_rows))
    found = [[lead.name for lead in leads(some, tables.ask(queries.TRANSITION))] for some in (rows, pa.concat_tables([other, rows]))]
    assert found[0] == found[1] and len(found[0]) == rows.num_rows


def test_controls_that_were_not_measured_leave_their_panels_empty(tmp_path):
    made = synthetic.make(tmp_path, synthetic.small(), tables=("metrics",))
    rows = synthetic._probe([synthetic._truth(0, synthetic.small()[0], 12)], 4).drop_columns(["control", "untrained"])
    made.add_rows("probe", "c0ffee000000", rows)
    tables = Tables(made)
    panels = dict(probe_maps(tables.ask(queries.probe_map("carry", "true", tables.left_out))).panels)
    tables.close()
    assert np.isnan(panels["random labels"]).all() and not np.isnan(panels["untrained"]).any()  # step 0 stands in
