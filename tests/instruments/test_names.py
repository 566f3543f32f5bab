"""Rows of an instrument: a table of their own by its name, measured with one setting and with today's code, or it is said."""

import json
import shutil
import sys

import jax
import pyarrow.parquet as pq
import pytest

import elegans as el
from elegans.errors import Invalid, StoreError
from elegans.files import write_table
from elegans.instruments.noted import Noted
from elegans.loading import load_module
from elegans.store import Store
from running import elegans

NAME = "named_instruments"
FILE = """
import jax
import elegans as el

FACTOR = 2.0


@el.spec
class Twofold(el.MLP):
    def apply(self, *args, **given):
        return FACTOR * super().apply(*args, **given)


@el.spec
class Total(el.ReplicaInstrument):
    power: int = el.field(1, "of each weight")

    def apply(self, run, params, data, key):
        return {"all": {"value": sum((w**self.power).sum() for w in jax.tree.leaves(params))}}

    def layouts(self, run):
        return {"all": el.Layout({}, [])}


model = el.Transformer(layers=1, d_model=4, heads=2, mlp=Twofold())
run = el.Run(el.Addition(length=3), model, batch=2, steps=2, record=el.Record(examples=4))
study = el.Study([run], [Total(), Total(power=2, name="squares")])
"""


def written(folder, text=FILE):
    """The user's file, as a process that starts now would read it."""
    sys.modules.pop(NAME, None)
    (folder / f"{NAME}.py").write_text(text)
    return folder / f"{NAME}.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    answer = elegans("run", written(folder), "--store", folder / "store")
    assert answer.status == 0, answer.err
    yield folder
    sys.modules.pop(NAME, None)


@pytest.fixture
def store(trained, tmp_path):
    shutil.copytree(trained / "store", tmp_path / "store")
    written(tmp_path)
    return tmp_path / "store"


@pytest.fixture
def bare(store):
    """The same cohort as an archive without weights brings it."""
    elegans("archive", store, store.parent / "rows.tar.xz")
    elegans("merge", store.parent / "bare", store.parent / "rows.tar.xz")
    return store.parent / "bare"


def run(store, text=FILE):
    return elegans("run", written(store.parent, text), "--store", store)


def measure(store, *words, text=FILE):
    answer = elegans("measure", "total", store, *words, "--with", written(store.parent, text), "--json")
    return answer, json.loads(answer.out)[0]["measured_now"] if answer.status == 0 else None


def values(store):
    """The only value of every table of the instrument."""
    return {p.parent.name: pq.read_table(p)["value"].to_pylist() for p in store.glob("rows/*/*.parquet")}


def weights_of(store, text=FILE):
    """The arrays of the only run."""
    load_module(written(store.parent, text))
    opened = el.open(store)
    return jax.tree.leaves(el.load(opened, opened.lines()[0]["run"]).params)


def totals(store, *powers):
    """The same from the weights, in plain Python."""
    weights = weights_of(store)
    return [pytest.approx(sum(float(x) ** power for w in weights for x in w.ravel()), rel=1e-4) for power in powers]


def refused(answer, *words):
    assert answer.status == 2 and answer.err.count("\n") == 1, answer.err
    assert all(word in answer.err for word in words), answer.err


# ---- several of a kind


def test_two_of_a_kind_are_kept_side_by_side_and_measured_once(store):
    first, second = totals(store, 1, 2)
    assert values(store) == {"total": [first], "squares": [second]}
    again = run(store)
    assert again.status == 0 and "measuring" not in again.err and "rows of" not in again.err
    assert json.loads(elegans("sql", store, "select value from squares", "--json").out) == [{"value": second}]


@pytest.mark.parametrize("two", [(el.Probe(), el.Probe(fit=64)), (el.Probe(name="x"), el.Circuit(name="X")), (el.Transition(),) * 2])
def test_two_of_one_name_are_refused_at_once(two):
    with pytest.raises(Invalid, match="give one a name of its own"):
        el.Study([], two)


def test_a_name_keeps_the_rows_that_are_there_and_without_one_it_is_said_that_they_go(store):
    before = values(store)
    third, fourth = totals(store, 3, 4)
    answer, now = measure(store, "power=3", "name=cubes")
    assert now and "rows of" not in answer.err and values(store) == before | {"cubes": [third]}
    answer, now = measure(store, "power=4")
    assert now and "rows of total (1 cohorts) were measured with other settings, and are replaced; another name" in answer.err
    assert values(store) == before | {"cubes": [third], "total": [fourth]}


def test_a_name_is_no_setting_and_tables_of_rows_from_rows_begin_with_it(store):
    assert Noted.now(el.Probe(name="x")) == Noted.now(el.Probe()) != Noted.now(el.Probe(fit=64))
    assert el.measure(el.Scaling(draws=10, name="few"), el.open(store)) == [f"few_{t}" for t in el.measure(el.Scaling(), el.open(store))]


@pytest.mark.parametrize("name", ["runs", "metrics", "positions", "timings", "Runs", "a b", "../up", "", "probe"])
def test_names_that_are_taken_or_no_words_are_refused(name):
    with pytest.raises(Invalid, match="name: "):
        el.Circuit(name=name)


def test_a_class_named_as_a_table_of_the_store_is_refused(store):
    renamed = FILE.replace("Total", "Metrics")
    refused(elegans("run", written(store.parent, renamed), "--store", store), "metrics", "none of runs, metrics")
    with pytest.raises(Invalid, match="no other instrument's table"):
        el.open(store).add_rows("total", "store", pq.read_table(next(store.glob("rows/total/*"))))


# ---- edited instruments


SHIFTED = FILE.replace(").sum() for", ").sum() + 1000 for")


def test_an_edited_instrument_is_measured_again(store):
    parts, before = len(weights_of(store)), values(store)
    assert "measuring" not in run(store, FILE.replace("    power:", "    # a comment\n    power:")).err
    answer = run(store, SHIFTED)
    assert answer.status == 0 and "rows of total (1 cohorts) were measured with another class Total, and are replaced" in answer.err
    assert values(store) == {name: [pytest.approx(value + 1000 * parts)] for name, (value,) in before.items()}


def test_rows_of_an_edited_instrument_stay_where_no_weights_are_and_that_is_said(bare):
    before = values(bare)
    answer, now = measure(bare, text=SHIFTED)
    assert now is False and "rows of total (1 cohorts) stay as they were measured, with another class Total" in answer.err
    assert values(bare) == before and "stay" in run(bare, SHIFTED).err and values(bare) == before


def test_rows_of_an_edited_instrument_are_left_out_of_a_merge(store, bare):
    before = values(bare)
    assert run(store, SHIFTED).status == 0 and values(store) != before
    elegans("archive", store, store.parent / "edited.tar.xz")
    answer = elegans("merge", bare, store.parent / "edited.tar.xz")
    assert "rows of squares, total are left out" in answer.err and values(bare) == before


def test_again_measures_again_where_weights_are(store, bare):
    before, (path,) = values(store), store.glob("rows/total/*.parquet")
    table = pq.read_table(path)
    write_table(path, table.set_column(2, "value", table["step"]).replace_schema_metadata(table.schema.metadata))
    assert measure(store)[1] is False and values(store) != before
    assert measure(store, "--again")[1] is True and values(store) == before
    refused(measure(bare, "--again")[0], "no weights of a finished run")


def test_rows_without_a_fingerprint_are_taken_as_they_are(store):
    for path in store.glob("rows/*/*.parquet"):
        write_table(path, pq.read_table(path).replace_schema_metadata({"instrument": Noted.read(path).settings}))
    before = {path: path.read_bytes() for path in store.glob("rows/*/*.parquet")}
    assert "measuring" not in run(store, SHIFTED).err and {path: path.read_bytes() for path in before} == before


# ---- one setting in a table


def test_other_settings_are_refused_beside_rows_that_cannot_be_measured_again(store):
    """As where an archive without weights was merged: here a copy of the cohort, under another id."""
    (cohort,) = Store(store).cohorts()
    shutil.copytree(cohort.path, store / "cohorts" / ("f" * 12), ignore=shutil.ignore_patterns("*.safetensors"))
    for rows in store.glob("rows/*/*.parquet"):
        shutil.copy(rows, rows.with_stem("f" * 12))
    before = values(store)
    refused(measure(store, "power=5")[0], "rows of total (1 cohorts) were measured with other settings", "another name")
    refused(measure(store, text=SHIFTED)[0], "rows of total (1 cohorts) were measured with another class Total")
    more = FILE.replace("[run]", "[run, el.replace(run, 'seed', 2)]").replace("[Total()", "[Total(power=7)")
    refused(run(store, more), "were measured with other settings")  # before the new run trains
    assert values(store) == before and len(Store(store).lines()) == 1
    assert measure(store, "power=5", "name=fifth")[1] and [p.stem for p in store.glob("rows/fifth/*")] == [cohort.id]


# ---- edited components


def test_networks_of_an_edited_class_are_not_loaded_or_measured(store):
    found = el.open(store).lines()[0]["run"]
    edited = FILE.replace("FACTOR = 2.0", "FACTOR = 3.0")
    said = f"run {found} was trained with another class Twofold: undo the change"
    refused(measure(store, "power=2", text=edited)[0], said)
    with pytest.raises(StoreError, match=said):
        weights_of(store, edited)
    assert measure(store, "power=2")[1] and weights_of(store)


# ---- mistakes in an instrument


@pytest.mark.parametrize(("before", "after", "said"), [
    ('return {"all": {"value": ', 'return {"every": {"value": ', "total.apply: 'every' is not allowed; allowed: the blocks"),
    ("Layout({}, [])", "Layout({}, [[{'part': 0}, {'part': 1}]])", "total.all.value: () is not allowed; allowed: an array of shape (2,)"),
    ('{"all": {"value": ', '{"all": {"step": ', "total.all: 'step' is not allowed"),
    ("el.Layout({}, [])", "el.Layout({'step': 0}, [])", "total.all: 'step' is not allowed"),
    ('return {"all": {"value": ', 'return {"value": {**{}, "all": {} and ', "total.apply: "),
    ("[Total(), ", "['total', ", "instruments: ['total'"),
    ("[Total(), Total(power=2, name=\"squares\")]", "Total()", "instruments: Total() is not allowed; allowed: a list"),
    ("Study([run]", "Study(run", "allowed: a list of elegans.Run"),
])  # fmt: skip
def test_mistakes_are_one_line_that_names_the_instrument(store, before, after, said):
    assert before in FILE
    answer = run(store, FILE.replace(before, after))
    assert answer.status == 2 and said in answer.err.splitlines()[-1] and "Traceback" not in answer.err, answer.err
