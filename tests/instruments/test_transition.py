"""Transitions: the truth behind made-up curves is found, whatever the order of the rows and whichever version wrote them."""

import duckdb
import numpy as np
import pyarrow as pa
import pytest

import elegans as el
import synthetic
from elegans import specs
from elegans.describe import run_rows
from elegans.errors import Invalid
from elegans.figures import Tables, catalogue
from elegans.instruments.crossings import crossing
from elegans.instruments.transition import (
    EARLY,
    GUESSED,
    NEVER_FELL,
    NEVER_READ,
    NO_START,
    READABLE,
    Course,
    Transition,
    _nested,
    group_names,
    names_of_groups,
)
from elegans.training.run import differing


def test_rows_in_any_order_give_the_same_curves_and_ties_the_same_site() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"run": r, "feature": "carry", "site": s, "step": t, "index": i, "label": None, "r2": None, "accuracy": np.float32(a)}
        for r in ("a", "b")
        for s in ("resid.0", "resid.1")
        for t, a in zip((0, 10, 100), (0.5, rng.uniform(0.6, 0.9), 1.0), strict=True)
        for i in range(7)
    ]
    rows = [row | {"accuracy": np.float32(min(1.0, row["accuracy"] + rng.uniform(0, 0.05) * (row["step"] == 10)))} for row in rows]
    answers = []
    for _ in range(20):
        rng.shuffle(rows)
        probe = pa.Table.from_pylist(rows, schema=_SCHEMA)
        curves = _nested(duckdb.connect().register("probe", probe).sql(READABLE).to_arrow_table())
        answers.append(({k: Transition()._feature(v).step for k, v in curves.items()}, curves))
    assert all(answer == answers[0] for answer in answers)
    steps, curves = answers[0]
    for key, by_site in curves.items():  # both sites end at 1: the first by name counts
        assert steps[key] == Transition()._feature({"resid.0": by_site["resid.0"]}).step
    assert any(steps[k] != Transition()._feature({"resid.1": v["resid.1"]}).step for k, v in curves.items())


_SCHEMA = pa.schema(
    [(n, pa.string()) for n in ("run", "feature", "site")]
    + [("step", pa.int64()), ("index", pa.int64()), ("label", pa.int64()), ("accuracy", pa.float32()), ("r2", pa.float32())]
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Probes without the columns label, r2 and mse, as earlier versions wrote them."""
    return synthetic.make(tmp_path_factory.mktemp("transition"), synthetic.small(), tables=("metrics", "probe"), probes=60)


@pytest.fixture(scope="module")
def tables(store):
    return {name: table.to_pylist() for name, table in Transition().tables(store).items()}


def test_probes_of_an_earlier_version_give_the_transitions_that_made_them(store, tables) -> None:
    assert not {"r2", "label"} & set(store.table("probe").column_names)
    truths = {run.id: synthetic._truth(i, run, 12) for i, run in enumerate(synthetic.small())}
    rows = [row for row in tables["transition"] if row["lead"] is not None]
    assert {row["run"] for row in rows} == {run for run, t in truths.items() if t["learns"]}
    for row in rows:
        truth = truths[row["run"]]
        feature = truth["carry"] if row["feature"] == "carry" else 30.0
        for name, at in (("loss", truth["when"]), ("feature", feature)):
            for kind in ("step", "change"):
                assert abs(np.log10(row[f"{name}_{kind}"] / at)) < 0.12, (row, name, kind)


def test_change_points_have_intervals_in_steps_and_flops_and_miss_where_nothing_changed(tables) -> None:
    truths = [synthetic._truth(i, run, 12) for i, run in enumerate(synthetic.small())]
    for row in tables["change"]:
        group = [t for t in truths if row["group"] == f"lr={t['lr']:g}"]
        learned = [t for t in group if t["learns"]]
        known = group if row["curve"] == "first_operand" else learned
        assert row["runs"] == sum(t["diverged"] is None for t in known)
        at = {"loss": "when", "carry": "carry"}.get(row["curve"])
        truth = 10 ** np.mean([np.log10(t[at] if at else 30.0) for t in known])
        assert abs(np.log10(row["step"] / truth)) < 0.12 and row["flops"] == pytest.approx(8.9e7 * row["step"])
        if row["runs"] >= 3:
            assert row["step_low"] < row["step"] < row["step_high"] and row["step_low"] < truth < row["step_high"]
        else:
            assert row["step_low"] is None


def test_the_lead_of_change_points_has_an_interval_that_holds_the_truth(tables) -> None:
    truths = [t for i, run in enumerate(synthetic.small()) if (t := synthetic._truth(i, run, 12))["learns"]]
    for row in tables["lead"]:
        assert row["missing"] is None
        if row["low"] is None:
            assert row["change_low"] is None and row["loudness"] == "undecided"
            continue
        group = [t for t in truths if row["group"] == f"lr={t['lr']:g}"]
        truth = np.mean([np.log10(t["when"] / (t["carry"] if row["feature"] == "carry" else 30.0)) for t in group])
        assert row["change_low"] < truth < row["change_high"] and row["change_low"] < row["change"] < row["change_high"]
        assert row["loudness"] == ("quiet" if row["change_low"] > 0.1 else "undecided")
    assert {r["loudness"] for r in tables["lead"] if r["feature"] == "first_operand" and r["runs"] >= 3} == {"quiet"}


def course(at: float | None, per_decade: int = 40) -> Course:
    """A rise from 0 to 1 at a step, recorded that often; none: it stays at 0."""
    steps = sorted({0, *(round(10 ** (k / per_decade)) for k in range(4 * per_decade))})
    values = [0.0 if at is None else 1 / (1 + (at / max(s, 0.5)) ** 8) for s in steps]
    return Transition()._feature({"resid.0": list(zip(steps, values, strict=True))})


@pytest.mark.parametrize(
    ("leads", "per_decade", "said"),
    [
        ((0.29, 0.3, 0.31), 40, "quiet"),
        ((-0.01, 0.0, 0.01), 40, "loud"),
        ((-0.31, -0.3, -0.29), 40, "loud"),
        ((0.0, 0.3, 0.6), 40, "undecided"),
        ((-0.01, 0.0, 0.01), 4, "undecided"),  # recorded too coarsely to tell
        ((0.3,), 40, "undecided"),
    ],
)
def test_quiet_and_loud(leads, per_decade, said) -> None:
    row = Transition()._lead([(course(500.0, per_decade), course(500 / 10**lead, per_decade)) for lead in leads])
    assert row["loudness"] == said and row["mean"] == pytest.approx(np.mean(leads), abs=0.05)


NEVER = Course([0, 9000], [-1.0, -1.0], -0.5, None, NEVER_FELL), Course([0, 9000], [0.0, 0.0], None, None, NEVER_READ)  # loss, feature


@pytest.mark.parametrize(
    ("lead", "others", "said", "counts"),
    [
        (0.3, "behind", "undecided", (0, 3)),  # quiet in three, and in three the loss fell without it
        (0.3, "ahead", "quiet", (3, 0)),
        (0.0, "behind", "loud", (0, 3)),
        (0.0, "ahead", "undecided", (3, 0)),
        (0.3, "neither", "quiet", (0, 0)),
    ],
)
def test_runs_in_which_one_alone_came_count_against_a_verdict(lead, others, said, counts) -> None:
    pairs = [(course(500.0), course(500 / 10 ** (lead + e))) for e in (-0.01, 0.0, 0.01)]
    pairs += 3 * [(course(500.0) if others == "behind" else NEVER[0], course(500.0) if others == "ahead" else NEVER[1])]
    row = Transition()._lead(pairs)
    assert row["loudness"] == said and (row["ahead"], row["behind"]) == counts and (row["runs"], row["of"]) == (3, 6)
    assert row["mean"] == pytest.approx(lead, abs=0.05)


def test_the_median_run_decides_where_some_never_come() -> None:
    """Of twelve runs one never reads the feature: the median has its interval, and is ahead."""
    pairs = [(course(500.0), course(250.0))] * 11 + [(course(500.0), NEVER[1])]
    row = Transition()._lead(pairs)
    assert row["behind"] == 1 and row["loudness"] == "quiet" and 0.1 < row["median_change_low"] < np.log10(2) < row["median_change_high"]


def test_what_is_forgotten_later_was_readable() -> None:
    """A probe that rises at step 100 and falls at 3000 to where it began, and one that stays, are readable from the same step on."""
    steps = [0, *(round(10 ** (k / 10)) for k in range(41))]
    stays = [(s, 0.6 + 0.4 * (s > 90)) for s in steps]
    falls = [(s, v - 0.38 * (s > 2900)) for s, v in stays]
    one, other = (Transition()._feature({"resid.0": points}) for points in (stays, falls))
    assert other.step == one.step and other.change == one.change and not other.missing
    assert list(other.values) == [v for _, v in falls]  # the whole curve is kept to be drawn
    later = Transition()._feature({"resid.0": [(s, v - 0.3 * (s in (200, 251))) for s, v in stays]})
    assert later.step > 250  # below half-way once more, from where it comes back: not yet for good


def test_a_feature_in_two_parts_is_not_quiet_by_the_first_of_them() -> None:
    """Two fifths of the rise come with the fall to the plateau, the rest with the loss: the change point is early, half-way is not."""
    pairs = []
    for at in (4800.0, 5000.0, 5200.0):
        loss = course(at)
        first, rest = course(50.0), course(at)
        points = [(s, 0.4 * a + 0.6 * b) for s, a, b in zip(loss.steps, first.values, rest.values, strict=True)]
        pairs.append((loss, Transition()._feature({"resid.0": points})))
    row = Transition()._lead(pairs)
    assert row["change_low"] > 1 and abs(row["mean"]) < 0.1 and row["loudness"] == "undecided"


@pytest.mark.parametrize(("by_then", "ahead"), [(0.4, 0.0), (0.0, 0.3), (0.98, 0.0)])
def test_what_is_done_when_the_loss_reaches_its_plateau_is_told_from_the_rest(by_then, ahead) -> None:
    """A loss falls from 2 to its plateau of 1 around step 50, and on to 0; of a feature's rise a part comes with the first of these."""
    pairs = []
    for at in (4800.0, 5000.0, 5200.0):
        first, last, rest = course(50.0), course(at), course(at / 10**ahead)
        values = [a + b - 2 for a, b in zip(first.values, last.values, strict=True)]
        loss = Course(last.steps, values, -0.5, crossing(last.steps, values, -0.5), "", -1.0)
        points = [(s, by_then * a + (1 - by_then) * b) for s, a, b in zip(loss.steps, first.values, rest.values, strict=True)]
        pairs.append((loss, Transition()._feature({"resid.0": points})))
    row = Transition()._lead(pairs)
    assert row["done"] == pytest.approx(by_then, abs=0.03)
    if by_then < 0.95:
        assert row["rests"] == 3 and row["rest_low"] - 0.02 < ahead < row["rest_high"] + 0.02 and row["rest_high"] - row["rest_low"] < 0.1
    else:
        assert row["rests"] == 0 and "rest" not in row  # what is missing is less than counts as learned


def test_a_probe_that_is_best_once_by_luck_is_not_readable() -> None:
    """Accuracies on 1,024 rows at chance, recorded 45 times at five sites: none is told from a guess, and a single spike is none."""
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        sites = {f"resid.{i}": list(enumerate(rng.binomial(1024, 0.5, 45) / 1024)) for i in range(5)}
        found.append(Transition()._feature(sites, dict.fromkeys(sites, 0.5)).missing)
    assert np.mean([missing == NEVER_READ for missing in found]) > 0.9
    spike = [(s, 0.5 + 0.4 * (s == 20)) for s in range(45)]
    assert Transition()._feature({"embed": spike}, {"embed": 0.5}).missing == NEVER_READ


def recorded(at: float, per_decade: int, steep: float) -> list[tuple[int, float]]:
    """A rise from 0 to 1 around a step, as it is recorded so often."""
    steps = sorted({0, *(round(10 ** (k / per_decade)) for k in range(4 * per_decade))})
    return [(s, 1 / (1 + (at / max(s, 0.25)) ** steep)) for s in steps]


@pytest.mark.parametrize(("losses", "probes", "steep"), [(10, 5, (30, 30)), (10, 10, (4, 30)), (10, 5, (6, 6)), (40, 40, (30, 30))])
def test_seeds_that_share_the_recorded_steps_do_not_lead_by_where_these_lie(losses, probes, steep) -> None:
    """Loss and probe are half-way at the same time, but recorded at other steps, and rise otherwise; all seeds are near one another."""
    draw, said = np.random.default_rng(0), []
    for _ in range(40):
        about = draw.uniform(2, 3.5)
        pairs = []
        for at in 10 ** draw.normal(about, 0.02, 8):
            loss = recorded(at, losses, steep[0])
            course = Course(*zip(*[(s, v - 1) for s, v in loss], strict=True), -0.5, crossing(*zip(*loss, strict=True), 0.5), "", -1.0)
            pairs.append((course, Transition()._feature({"resid.0": recorded(at, probes, steep[1])})))
        said.append(Transition()._lead(pairs)["verdict"])
    assert {"leads", "lags"}.isdisjoint(said) and ("no lead" in said) == (losses == 40)  # where 0.1 decades can be told


def test_a_rare_feature_is_not_readable_because_a_guess_is_right() -> None:
    """Of what a guess leaves the untrained network must read half."""
    rows = {"embed": [(0, 0.96), (10, 1.0)]}
    assert Transition()._feature(rows, {"embed": 0.5}).missing == EARLY
    rare = Transition()._feature(rows, {"embed": 0.955})
    assert rare.missing == GUESSED and rare.seen is None


def test_reads_that_have_nothing_to_be_read_hide_no_others() -> None:
    """Reads of which a guess is right count for nothing, however many; a feature of no other reads is still there, too rare."""

    def rise(reads: list[tuple[float, float]]) -> dict[str, float]:
        """Score by step of reads that rise from a chance to something."""
        head = {"run": "a", "feature": "component", "site": "embed"}
        rows = [
            head | {"step": t, "index": i, "accuracy": a, "chance": c} for i, (c, end) in enumerate(reads) for t, a in ((0, c), (9, end))
        ]
        found = duckdb.connect().register("probe", pa.Table.from_pylist(rows, schema=_SCHEMA.append(pa.field("chance", pa.float32()))))
        return dict(_nested(found.sql(READABLE).to_arrow_table())["a", "component"]["embed"])

    alone = rise([(0.5, 0.75), (0.75, 1.0)])
    assert alone == {0: 0.625, 9: 0.875} == rise([(0.5, 0.75), (0.75, 1.0), *[(1.0, 1.0)] * 50, (0.995, 1.0)])
    assert rise([(1.0, 1.0), (0.9921875, 1.0)]) == {0: 0.99609375, 9: 1.0}


def test_without_probes_it_asks_of_the_loss_alone(tmp_path, tables) -> None:
    """The loss' rows are those that it has beside probes, bit for bit; a store with neither says what is missing."""
    runs = synthetic.small()
    alone = {n: t.to_pylist() for n, t in Transition().tables(synthetic.make(tmp_path / "a", runs, tables=("metrics",))).items()}
    assert [row["run"] for row in alone["transition"]] == [run.id for run in runs] and alone["lead"] == []
    beside = {row["run"]: row for row in tables["transition"]}
    for row in alone["transition"]:
        assert row["feature"] is None and row["feature_step"] is None and row["lead"] is None
        assert [row[n] for n in ("group", "loss_step", "loss_change")] == [
            beside[row["run"]][n] for n in ("group", "loss_step", "loss_change")
        ]
    assert sum(row["loss_step"] is not None for row in alone["transition"]) == 8
    for name in ("change", "contrast", "course"):
        assert alone[name] == [row for row in tables[name] if row["curve"] == "loss"] and (alone[name] or name == "contrast")
    with pytest.raises(Invalid, match="validation losses, or probes"):
        Transition().tables(synthetic.make(tmp_path / "b", runs, tables=()))


def test_what_never_happened_is_missing_and_never_zero() -> None:
    never = Course((1, 10), (0.0, 0.0), 0.5, None, NEVER_FELL)
    row = Transition()._lead([(never, course(5.0))] * 3)
    assert row["missing"] == NEVER_FELL and row["runs"] == 0 and "mean" not in row and "loudness" not in row
    row = Transition()._lead([(course(5.0), course(None))] * 3)
    assert row["missing"] == NEVER_READ and row.get("loudness") is None
    assert Transition()._feature({"embed": [(0, 0.99), (10, 1.0)]}).missing == "readable untrained"
    assert Transition()._feature({"embed": [(700, 0.99)]}).missing == NO_START  # trained: it says nothing of the untrained network
    assert Transition()._feature({"embed": [(1, 0.5), (10, 1.0)]}).step is None


def test_what_is_recorded_tells_no_runs_apart(tmp_path) -> None:
    """Seeds of one group, of which some were evaluated on more rows: the list of runs, the figures and the groups say the same."""
    axes = {"record.examples": [512, 1024], "optim.lr": [1e-3, 2e-3], "seed": range(2)}
    store = synthetic.make(tmp_path, synthetic.runs_of(axes), tables=("metrics",))
    groups = list(group_names(store).values())
    assert {name: groups.count(name) for name in groups} == {"lr=0.001": 4, "lr=0.002": 4}
    shown = run_rows(store)
    assert {"optim.lr", "seed"} <= set(shown.column_names) and "record.examples" not in shown.column_names
    opened = Tables(store)
    runs = catalogue(store, opened)
    opened.close()
    assert runs.differing == ["optim.lr"]
    steps = {r["run"]: r["step"] for r in store.sql("select run, max(step) as step from metrics group by run").to_pylist()}
    for row in shown.to_pylist():  # the last scores of the table are those of the figures
        assert row["step"] == steps[row["run"]] <= row["length"]
        facts = runs.facts[row["run"]]
        if row["state"] == "finished":
            assert (row["validation_loss"], row["test_exact"]) == (facts.loss, facts.test_exact_match)


def test_a_parent_tells_only_runs_that_have_one() -> None:
    fields = [{"lr": 1, "after": None}, {"lr": 1, "after": "run", "after.lr": 2}, {"lr": 1, "after": "run", "after.lr": 2}]
    assert differing(fields) == ["after"] and differing([*fields, fields[1] | {"after.lr": 3, "seed": 1}]) == ["after", "after.lr", "seed"]


def test_a_group_is_told_by_the_fields_that_its_kinds_have() -> None:
    positions = [el.Learned(), el.Rotary(), None]
    run = synthetic.runs_of({})[0]
    told = [specs.flat(specs.to_dict(r)) for r in el.grid(run, {"model.position": positions, "seed": range(2)})]
    names = names_of_groups({str(i): fields for i, fields in enumerate(told)})
    assert [names[i] for i in "012345"] == [f"position={p}" for p in ("learned", "rotary", "none") for _ in range(2)]
    assert list(dict.fromkeys(names.values())) == ["position=learned", "position=none", "position=rotary"]  # group by group
    told += [specs.flat(specs.to_dict(el.replace(run, "model.position", el.Rotary(theta=100.0))))]
    names = names_of_groups({str(i): fields for i, fields in enumerate(told)})
    expected = ["position=learned", "position=rotary, theta=10000", "position=none", "position=rotary, theta=100"]
    assert [names[i] for i in "0246"] == expected
