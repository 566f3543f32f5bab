"""The report is one file that needs no network, says what the rows say, and says where they say nothing."""

import dataclasses
import json
import re
import time

import numpy as np
import pytest

import synthetic
from elegans import Addition, Sorting, report
from elegans.figures import Catalogue, Lead
from elegans.figures.scaling import Scaled, scaling
from elegans.figures.style import precise
from elegans.figures.within import Against, Effect
from elegans.files import write_json
from elegans.instruments import Scaling, Transition, measure
from elegans.report import words
from elegans.store import Store

NONE = np.array([])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    made = synthetic.make(tmp_path_factory.mktemp("report"), synthetic.small())
    write_json(made.path / "study.json", {"name": "Quiet <carry>", "question": "Does the carry come first?"})
    return made


@pytest.fixture(scope="module")
def page(store):
    return report.write(store).read_text(encoding="utf-8")


def own(page: str) -> str:
    """The page without the library inlined in it."""
    return re.sub(r"<script>/\*\*.*?</script>", "", page, count=1, flags=re.DOTALL)


def text(page: str) -> str:
    """What a reader sees."""
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", " ", page, flags=re.DOTALL)).split())


def sections(page: str) -> list[str]:
    return re.findall(r'<section[^>]* id="([^"]+)"', page)


def figures(page: str) -> list[dict]:
    return [json.loads(part) for part in re.findall(r'class="figure">(.*?)</script>', page, flags=re.DOTALL)]


# ---- one file


def test_nothing_is_loaded_from_anywhere(page):
    assert not re.search(r"<(link|iframe|object|embed|img|base)\b", own(page))
    assert not re.search(r"\b(src|href|action)\s*=\s*[\"'](?!#)", own(page))
    assert not re.search(r"@import|url\(|https?:", own(page))
    assert "default-src 'none'" in page


def test_the_page_offers_no_upload(page):
    assert "showSendToCloud: false" in page and 'plotlyServerURL: ""' in page


def test_the_library_is_inlined_once(page):
    assert page.count("plotly.js v") == 1 and len(own(page)) < 1_500_000


def test_the_same_rows_give_the_same_bytes(store, page):
    assert report.write(store).read_text(encoding="utf-8") == page
    assert not list(store.path.glob(".*.tmp"))


def test_users_text_cannot_become_markup(page):
    assert "<h1>Quiet &lt;carry&gt;</h1>" in page
    assert all("<" not in part for part in re.findall(r'class="figure">(.*?)</script>', page, flags=re.DOTALL))


# ---- what it says


def test_every_section_is_there(page):
    assert sections(page) == ["answer", "lead", "learning", "positions", "probes", "ablation", "runs", "diverged", "provenance", "cite"]


def test_the_answer_has_the_numbers_of_the_rows(store, page):
    rows = [row for row in store.table("lead").to_pylist() if row["feature"] == "carry"]
    for row in rows:
        interval = f"{row['group']}: {row['mean']:.2f} [{row['low']:.2f}, {row['high']:.2f}]".replace("-", "−")
        assert interval in text(page)
    assert "8 of 12 runs learned" in text(page)


def test_key_numbers_come_from_the_runs(page):
    seen = text(page)
    assert "runs 12 11 finished, 1 diverged" in seen
    assert "learned 8 of 12" in seen
    assert f"training FLOPs {12 * 20_000 * 8.9e7:.2g}".replace("e+", "e") in seen
    assert "floor 0, plateau 0.567" in seen


def test_the_table_of_runs_shows_missing_measurements_as_missing(store, page):
    table = page[page.index('<section id="runs">') : page.index('<section id="diverged">')]
    rows = re.findall(r"<tr><td>.*?</tr>", table, flags=re.DOTALL)
    assert len(rows) == 12
    (diverged,) = [row for row in rows if ">diverged<" in row]
    assert diverged.count('class="none">–<') == 4
    assert "1,234" in page[page.index('<section id="diverged">') :]


def test_every_query_gives_rows(store, page):
    commands = re.findall(r"<pre>(.*?)</pre>", page, flags=re.DOTALL)
    assert len(commands) >= 8
    for command in (part for block in commands for part in block.split("\n\nelegans")):
        command = command.replace("&#34;", '"').replace("&#39;", "'").replace("&gt;", ">").replace("&lt;", "<").removeprefix("elegans")
        query = re.fullmatch(r' sql STORE "(.*)"', command, flags=re.DOTALL).group(1)
        assert store.sql(re.sub(r"\\(.)", r"\1", query)).num_rows > 0


def test_figures_parse_and_carry_their_captions(page):
    found = figures(page)
    assert len(found) > 20
    assert all(figure["layout"]["meta"]["caption"] and "template" not in figure["layout"] for figure in found)


def test_a_written_answer_stands_above_the_computed_one(tmp_path):
    store = synthetic.make(tmp_path, synthetic.small())
    write_json(tmp_path / "study.json", {"name": "s", "question": "q", "answer": "Yes, by a hair."})
    seen = text(report.write(store).read_text(encoding="utf-8"))
    assert seen.index("Yes, by a hair.") < seen.index("comes before the loss")


# ---- what is absent


def test_sections_vanish_without_rows(tmp_path):
    page = report.write(synthetic.make(tmp_path, synthetic.small(), tables=("metrics",))).read_text(encoding="utf-8")
    assert sections(page) == ["answer", "learning", "runs", "diverged", "provenance", "cite"]
    assert "No transition and no ablation was measured" in text(page)


def test_an_unmeasured_store_says_so(tmp_path):
    page = report.write(synthetic.make(tmp_path, synthetic.small(), tables=())).read_text(encoding="utf-8")
    assert "learning" not in sections(page)
    assert "learned not measured" in text(page) and "best validation loss not measured" in text(page)


def test_an_empty_store_has_a_report(tmp_path):
    assert "no run is in it" in text(report.write(Store.create(tmp_path / "empty")).read_text(encoding="utf-8"))


def test_a_table_without_the_needed_columns_is_named(tmp_path):
    store = synthetic.make(tmp_path, synthetic.small(), tables=("metrics",))
    store.add_rows("lead", "store", store.table("metrics").select(["run", "loss"]))
    page = report.write(store).read_text(encoding="utf-8")
    assert "The table lead has no column group" in text(page) and "until its instrument has measured it again" in text(page)
    assert "lead" not in sections(page)


def test_groups_are_compared_by_the_loss_alone_where_nothing_was_probed(tmp_path):
    store = synthetic.make(tmp_path, synthetic.runs_of({"optim.lr": [1e-3, 1e-2], "seed": range(12)}), tables=("metrics",))
    measure(Transition(), store)
    page = report.write(store).read_text(encoding="utf-8")
    assert sections(page)[:3] == ["answer", "groups", "learning"]
    (row,) = store.table("contrast").to_pylist()
    assert row["verdict"] == "undecided" and "differ in one field the loss comes later is undecided" in text(page)
    drawn = next(figure for figure in figures(page) if "Hodges" in figure["layout"]["meta"]["caption"])
    middles = {trace["name"]: trace["x"] for trace in drawn["data"] if trace["mode"] == "markers"}
    assert middles == {"half-way point": [row["half"]], "change point": [row["change"]]}
    assert {trace["marker"]["symbol"][1] for trace in drawn["data"] if "line" in trace["mode"]} == {"triangle-right"}  # some never learn


# ---- words


def pair(verdict, half, low, high, group="lr=0.01") -> dict:
    return {"curve": "carry", "group": group, "other": "lr=0.1", "half": half, "half_low": low, "half_high": high, "verdict": verdict}


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([pair("later", 0.3, 0.2, 0.4)], "the carry becomes readable later, half-way point against half-way point: "),
        ([pair("earlier", -0.3, -0.4, -0.2)], "with lr=0.01 than with lr=0.1 −0.30 [−0.40, −0.20], earlier."),
        ([pair("later", None, 0.2, None)], "beyond what was recorded [0.20, ∞], later."),
        ([pair("undecided", 0.5, None, None), pair("later", 0.1, 0.05, None)], "0.10 [0.05, ∞], later; undecided in 1 other pair."),
        ([pair("later", i / 10, 0.1, None) for i in range(8)], "; and 2 pairs more."),
        (
            [pair("undecided", 0.5, None, None), pair("undecided", 0.5, None, None) | {"curve": "loss"}],
            "In which of the groups that differ in one field the loss and the carry come later is undecided.",
        ),
    ],
)
def test_a_contrast_in_words(pairs, said):
    (sentence,) = words.answer([], pairs, [], Catalogue({}))
    assert said in sentence


def lead(mean, low, high, verdict, **change) -> Lead:
    return Lead(
        **({"group": "all runs", "feature": "carry", "runs": 8, "of": 12} | change),
        mean=mean,
        low=low,
        high=high,
        verdict=verdict,
        each=NONE,
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            lead(0.21, 0.08, 0.35, "leads"),
            "In 8 of 12 runs, the carry is decodable 0.21 [0.08, 0.35] decades of steps before the loss falls (a factor of 1.6)",
        ),
        (
            lead(-0.3, -0.4, -0.2, "lags"),
            "0.30 [0.20, 0.40] decades of steps after the loss falls (a factor of 2): the feature lags behind.",
        ),
        (lead(0.05, -0.1, 0.2, "undecided"), "0.05 [−0.10, 0.20] decades of steps before the loss falls (a factor of 1.1): undecided"),
        (lead(0.0, -0.02, 0.02, "no lead"), "no lead."),
        (
            lead(0.2, 0.1, 0.3, "undecided", ahead=1, behind=3),
            "1 run where it was readable before training, or while the loss never fell, and 3 runs where the loss fell and it never was",
        ),
        (
            lead(None, None, None, "undecided", runs=0, missing="loss never fell"),
            "No run reached both the step of the carry and that of the loss (loss never fell): their order is undecided.",
        ),
    ],
)
def test_a_lead_in_words(row, said):
    (sentence,) = words.answer([row], [], [], Catalogue({}))
    assert said in sentence


@pytest.mark.parametrize(
    ("loudness", "said"),
    [
        (("quiet",), "it is quiet: readable before the loss moves."),
        (("quiet", "quiet"), "it is quiet in 2 of 2 groups: readable before the loss moves."),
        (("undecided", "loud", ""), "it is loud in 1 of 3 groups, undecided in 1 of 3 groups."),
    ],
)
def test_loudness_in_words(loudness, said):
    rows = [lead(0.4, 0.2, 0.6, "leads", group=f"lr={i}", loudness=name) for i, name in enumerate(loudness)]
    (sentence,) = words.answer(rows, [], [], Catalogue({}))
    assert sentence.endswith(f" By half-way points and change points alike, wherever between two recorded steps these were, {said}")


def scaled_task(loss: list[float], half=(None, None, None)) -> Scaled:
    flops = 10.0 ** np.arange(9, 9 + len(loss))
    means = np.array(loss)
    return Scaled("addition", flops, {"loss": [means] * 3, "exact_match": [means] * 3}, np.full(len(loss), 3), means, 0.0, 1.0, half)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (scaled_task([1.0, 0.1], (3e9, 1e9, 1e10)), "passes half-way from plateau to floor between 1e09 and 1e10 training FLOPs."),
        (scaled_task([1.0, 0.4], (9e9, 1e9, None)), "beyond 1e09 training FLOPs; some draws of its seeds do not pass within 1e10."),
        (scaled_task([0.6, 0.1, 0.0], (3e9, None, 1e10)), "at 1e10 or fewer training FLOPs; some draws of its seeds are past it at 1e09."),
        (
            scaled_task([0.6, 0.4], (3e9, None, None)),
            "near 3e09 training FLOPs; some draws of its seeds are past it at 1e09; some draws of its seeds do not pass within 1e10.",
        ),
        (scaled_task([1.0, 0.9]), "is not half-way from plateau to floor at 1e10 training FLOPs, the most that was run."),
        (scaled_task([0.1, 0.0]), "is past half-way from plateau to floor at 1e09 training FLOPs, the least that was run."),
    ],
)
def test_scaling_in_words(task, said):
    sentence, *_ = words.answer([], [], [], Catalogue({}), [task])
    assert sentence.startswith("The best loss of addition ") and sentence.endswith(said)


def test_a_half_way_point_that_is_known_on_one_side_is_shaded_to_the_end_of_the_budgets():
    for half, ends in (((3e9, None, 1e10), (1e9, 1e10)), ((3e10, 1e10, None), (1e10, 1e11)), ((3e9, 2e9, 1e10), (2e9, 1e10))):
        shapes = scaling([scaled_task([0.6, 0.4, 0.0], half)]).layout.shapes
        assert [(s.x0, s.x1) for s in shapes if s.type == "rect"] == [ends]
    assert not [s for s in scaling([scaled_task([0.1, 0.0])]).layout.shapes if s.type == "rect"]


def test_a_grid_shows_its_scaling(tmp_path):
    """A panel with an error bar at every budget, and the budgets around the fall shaded, in each of two choices."""
    budgets = [1e9, 1e10, 1e11, 1e12]
    store = synthetic.grid_store(tmp_path, budgets, lambda f, w, s: (0.6 if f < 3e11 else 0.001) * (1 + 0.01 * s), {})
    measure(Scaling(draws=20), store)
    page = report.write(store).read_text(encoding="utf-8")
    assert "scaling" in sections(page) and "between 1e11 and 1e12 training FLOPs" in text(page)
    loss, exact = (f for f in figures(page) if f["layout"]["meta"]["caption"].startswith("Test "))
    (curve,) = loss["data"]
    assert curve["type"] == "scatter" and [shape["x0"] for shape in loss["layout"]["shapes"] if shape["type"] == "rect"] == [1e11]
    assert sum(shape["type"] == "line" for shape in loss["layout"]["shapes"]) == 2  # floor and plateau
    assert not any(shape["type"] == "line" for shape in exact["layout"]["shapes"])


def test_an_ablation_is_judged_within_the_runs_that_learned(store, page):
    """In the store the carry's direction costs nearly all exact match, and random directions a few hundredths."""
    rows = store.table("ablate").to_pandas()
    here = rows[rows.feature == "carry"]
    left = here[here.direction == "feature"].set_index("run").exact_match
    difference = (here[here.direction == "random"].groupby("run").exact_match.mean() - left).mean()
    said = f"In the 8 of 8 runs that learned, removing the direction of the carry takes exact match from 0.99 to {left.mean():.2f} ["
    assert said in text(page)
    assert f"within a run that is {difference:.2f} [" in text(page)
    assert "more than random directions take (in 8 of 8 runs more than every draw)" in text(page) and "the network uses it." in text(page)


@pytest.mark.parametrize(
    ("against", "end"),
    [
        ((Against("random", 0.9, NONE, 3, 0.5, 0.4, 0.6),), "(in 3 of 3 runs more than every draw): the network uses it."),
        ((Against("random", 0.9, NONE, 0, 0.0, -0.01, 0.01),), "more than every draw): no more than chance directions do."),
        ((Against("random", 0.9, NONE, 3, 0.5, -0.4, 1.4),), "more than every draw): undecided."),
        (
            (Against("random", 0.9, NONE, 3, 0.5, 0.4, 0.6), Against("labels", 0.42, NONE, 2, 0.02, -0.01, 0.04)),
            "and 0.02 [−0.01, 0.04] more than directions fitted to random labels take: undecided.",
        ),
        ((), "no random direction was removed for comparison."),
    ],
)
def test_an_ablation_in_words(against, end):
    effect = Effect("addition", "carry", "projection", 3, 5, 0.9, 0.4, 0.2, 0.6, against)
    (sentence,) = words.answer([], [], [effect], Catalogue({}))
    assert sentence.startswith("In the 3 of 5 runs that learned, removing the direction of the carry takes exact match from 0.90 to 0.40 [")
    assert sentence.endswith(end)


def test_an_ablation_of_runs_that_never_learned_says_so():
    (sentence,) = words.answer([], [], [Effect("addition", "carry", "projection", 0, 5, None, None, None, None, ())], Catalogue({}))
    assert sentence == "Whether the network uses the carry is not measured: none of the 5 ablated runs learned."


# ---- many runs


def test_a_thousand_runs_stay_usable(tmp_path):
    axes = {"optim.lr": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2], "model.d_model": [8, 16, 32, 64], "seed": range(50)}
    store = synthetic.make(tmp_path, synthetic.runs_of(axes), probes=6)
    began = time.process_time()
    path = report.write(store)
    assert time.process_time() - began < 20  # some 7 s of one idle core, type checks apart
    assert path.stat().st_size < 15e6
    page = path.read_text(encoding="utf-8")
    assert "1000 runs are too many for single curves" in page and "1,000" in text(page)
    assert page.count("<tr><td>") > 1000


def test_a_small_loss_is_not_shown_as_zero():
    assert [precise(v) for v in (0.0, 0.5671, 0.00012, 0.001)] == ["0", "0.5671", "1.2e-04", "0.0010"]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Addition(length=3), "addition has 2 to validate on and 2 to test on"),
        (Sorting(length=2), "sorting has"),
        (Addition(length=8), ""),  # 3,277 of each
        (Addition(), ""),
    ],
)
def test_the_report_says_where_few_contents_are_held_out(task, said, tmp_path) -> None:
    """As many rows as are asked for are drawn of them, so that nothing else tells."""
    sentence = words.few_held_out([task, task])
    assert sentence.count(said or "addition") == bool(said) and bool(sentence) == bool(said)
    store = synthetic.make(tmp_path, [dataclasses.replace(run, task=task) for run in synthetic.small()], tables=("metrics",))
    page = own(report.write(store).read_text(encoding="utf-8"))
    assert sentence in page and ("Few contents" in page) == bool(said)
