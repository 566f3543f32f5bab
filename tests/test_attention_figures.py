"""Figures of attention draw every map in its place under its tokens, and scores of the lengths that count."""

import numpy as np
import pyarrow as pa
import pytest

import synthetic
from elegans import report
from elegans.figures import Tables, attention_map, circuit_curves, queries
from elegans.figures.attention import attention_grid
from elegans.figures.paper import save_paper_figures
from test_report import figures, sections

TOKENS = ["P", "x1", "x2", ":", "s1", "s2"]
STEPS = [0, 1, 10, 100, 1000, 10_000, 20_000]


def share(step, layer, head, query, key):
    """A number that tells where it belongs."""
    return (1 + step % 7 + 2 * layer + head) / (20 * (query + 1)) + key / 100


def map_rows(run="r0", layers=2, heads=1, steps=STEPS):
    rows = [
        {"run": run, "step": s, "layer": i, "head": h, "query": q, "key": k, "query_label": TOKENS[q], "key_label": TOKENS[k]}
        | {"attention": share(s, i, h, q, k), "length": 2}
        for s in steps for i in range(layers) for h in range(heads) for q in range(6) for k in range(q + 1)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def score_rows(run="r0", steps=STEPS):
    """Peakiness 0.25 for rows of three inputs, 0.5 for four, 1 for six."""
    length = {3: 0.25, 4: 0.5, 6: 1.0}
    rows = [
        {"run": run, "step": s, "pattern": p, "layer": i, "head": 0, "length": n, "attention": v, "chance": 0.1, "peakiness": v * i}
        | {"invariance": 1.0}
        for s in steps for p in ("self", "iteration_1") for i in (0, 1) for n, v in length.items()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def test_a_few_heads_are_a_strip_over_steps_with_the_untrained_and_the_last():
    made = attention_grid(map_rows())
    assert made.rows == ["layer 0, head 0", "layer 1, head 0"] and made.labels == TOKENS
    assert made.columns[0] == "step 0" and made.columns[-1] == "step 20k" and len(made.columns) == 5
    assert made.maps[1][-1][4, 2] == pytest.approx(share(20_000, 1, 0, 4, 2))
    unseen = np.triu_indices(6, 1)
    assert all(np.isnan(z[unseen]).all() and not np.isnan(np.tril(z)[np.tril_indices(6)]).any() for row in made.maps for z in row)
    assert made.ticks(6) == [0, 1, 2, 3, 4, 5] and made.ticks(5) == [0, 2, 4]


def test_many_heads_are_shown_at_the_last_step():
    for rows in (map_rows(layers=2, heads=4, steps=[0, 10]), map_rows(layers=2, heads=2, steps=[10])):
        made = attention_grid(rows)
        assert made.rows == ["layer 0", "layer 1"] and made.columns[:2] == ["head 0", "head 1"]
        assert made.maps[1][1][5, 3] == pytest.approx(share(10, 1, 1, 5, 3))


def test_the_figure_names_tokens_and_says_what_it_shows():
    figure = attention_map(map_rows(), "only r0")
    assert len(figure.data) == 10 and list(figure.layout.yaxis.ticktext) == TOKENS and figure.layout.yaxis.autorange == "reversed"
    last = next(t for t in figure.data if t.name == "layer 1, head 0, step 20k")
    assert last.z[5, 5] == pytest.approx(share(20_000, 1, 0, 5, 5)) and np.isnan(last.z[2, 3])
    assert "rows with 2 inputs" in figure.layout.meta["caption"]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two runs, one of which has rows of three inputs at most."""
    runs = synthetic.small()
    made = synthetic.make(tmp_path_factory.mktemp("attention"), runs, tables=("metrics",))
    made.add_rows("attention", "c0ffee000000", map_rows(runs[0].id))
    short = score_rows(runs[1].id)
    short = short.filter(pa.array(np.array(short["length"]) == 3))
    made.add_rows("circuit", "c0ffee000000", pa.concat_tables([score_rows(runs[0].id), short]))
    return made, runs


def test_scores_are_means_over_lengths_of_four_and_more(store):
    made, runs = store
    tables = Tables(made)
    rows = tables.ask(queries.circuit("self", "true"))
    tables.close()
    found = {(row["run"], row["layer"]): row["peakiness"] for row in rows.to_pylist() if row["step"] == 100}
    assert found == {(runs[0].id, 0): 0, (runs[0].id, 1): 0.75, (runs[1].id, 0): 0, (runs[1].id, 1): 0.25}
    drawn = {t.name: t for t in circuit_curves(rows, "self", "peakiness", "all").data if t.name}
    assert set(drawn) == {"layer 0, head 0", "layer 1, head 0"}
    np.testing.assert_allclose(drawn["layer 1, head 0"].y, 0.5)  # the median of two runs


def test_scores_at_one_step_are_points():
    rows = score_rows(steps=[20_000]).group_by(["run", "step", "layer", "head"]).aggregate([("chance", "mean"), ("attention", "mean")])
    rows = rows.rename_columns({"chance_mean": "chance", "attention_mean": "attention"})
    figure = circuit_curves(rows, "self", "attention", "all")
    assert {t.mode for t in figure.data} == {"markers"} and figure.layout.xaxis.ticktext == ("20k",)
    assert figure.layout.shapes[0].y0 == pytest.approx(0.1)  # what uniform attention gives


def test_the_report_and_the_papers_have_them(store, tmp_path):
    page = report.write(store[0]).read_text(encoding="utf-8")
    assert "attention" in sections(page)
    kinds = [f["data"][0].get("type") for f in figures(page)]
    assert kinds.count("heatmap") == 1
    assert {"attention.png", "attention.pdf"} <= {p.name for p in save_paper_figures(store[0], tmp_path)}
