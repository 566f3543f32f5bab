"""Stores whose cohorts differ: what only some of them have is missing in the others, and an error comes before any row is written."""

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elegans.errors import Invalid
from elegans.folder import Cohort
from elegans.instruments import Ablate, AttentionMaps, Circuit, Evaluate, Patch, Probe, measure
from elegans.models.transformer import Transformer
from elegans.store import Store
from elegans.tasks import Addition, Parity
from elegans.training import Run
from elegans.training.cohort import resolve
from elegans.training.vectors import ravel

MODEL = Transformer(layers=2, d_model=8, heads=1)
WITH = Run(Parity(length=3, shortest=1, split=None), MODEL, steps=1)
WITHOUT = Run(Parity(length=3, shortest=1, split=None, cot=False), MODEL, steps=1)
DIGITS = Run(Addition(length=2, split=None), MODEL, steps=1)
BARE = Run(Parity(length=3, shortest=1, split=None), Transformer(layers=1, d_model=8, heads=1, attention=None), steps=1)


class Untrained(Cohort):
    """Stands for a cohort of one run, named after its place in the store."""

    def __init__(self, place, run, finished):
        self.name, self.run, self.finished = f"c0ffee{place:06}", run, finished

    id = property(lambda self: self.name)

    def specs(self):
        return [self.run]

    def first(self):
        return resolve(self.run)

    def status(self):
        return {"finished": self.finished, "diverged": {}}

    def has_weights(self):
        return True

    def check_code(self, slot=0):
        """The library's code alone."""

    def weight_steps(self):
        return []

    def final(self):
        params = self.run.model.init(jax.random.key(0), self.run.task.vocab_size, self.run.task.positions)
        return [self.run.id], np.asarray(ravel(params))[None]


class Mixed(Store):
    """A store of such cohorts, whose rows are on disk as ever."""

    def __init__(self, path, *runs, unfinished=()):
        self.path, self.runs, self.unfinished = path, runs, unfinished

    def cohorts(self):
        return [Untrained(i, run, run not in self.unfinished) for i, run in enumerate(self.runs)]

    def written(self, table):
        """What a table's parts hold, by place of the cohort."""
        return {int(f.stem[-6:]): pq.read_table(f) for f in sorted(self.path.glob(f"rows/{table}/*.parquet"))}


WRONG = [
    Circuit(patterns=("nowhere",), examples=4), Circuit(patterns=("first", "circuit"), examples=4),
    Patch(patterns=("nowhere",), examples=4),
    Probe(features=("carry",)), Probe(features=("step",), families=("nowhere",)), Ablate(features=("carry",)), Ablate(family="nowhere"),
    AttentionMaps(length=4, examples=4), Evaluate(task=Addition(length=2), examples=4),
]  # fmt: skip
ONLY_THE_FIRST = [
    (Circuit(examples=4), BARE), (AttentionMaps(length=3, examples=4), DIGITS), (Evaluate(task=WITH.task, examples=4), DIGITS),
]  # fmt: skip


@pytest.mark.parametrize(
    ("instrument", "runs"), [(i, (WITH, WITHOUT)) for i in WRONG] + [(i, (WITH, second)) for i, second in ONLY_THE_FIRST]
)
def test_an_error_comes_before_any_row_is_measured_or_written(tmp_path, monkeypatch, instrument, runs):
    store, before = Mixed(tmp_path, *runs), pa.table({"of": ["another instrument"]})
    for cohort in store.cohorts():
        store.add_rows(instrument.kind, cohort.id, before)
    monkeypatch.setattr(type(instrument), "_steps", lambda *_: pytest.fail("measured"))
    with pytest.raises(Invalid):
        measure(instrument, store)
    assert store.written(instrument.kind) == {0: before, 1: before}


@pytest.mark.parametrize("instrument", [
    Circuit(patterns=("iteration_2",), examples=4), Patch(patterns=("iteration_2", "circuit"), examples=4),
    Probe(features=("step",), fit=8, test=4, families=("embed",)), Ablate(features=("step",), fit=8, test=4, draws=1),
], ids=lambda i: i.kind)  # fmt: skip
@pytest.mark.parametrize("runs", [(WITH, WITHOUT), (WITHOUT, WITH)], ids=["first", "last"])
def test_what_one_cohort_has_is_missing_in_the_others(tmp_path, monkeypatch, instrument, runs):
    """No rows and no error; nor where the cohort that has it was measured before."""
    store, seen = Mixed(tmp_path, *runs), []
    monkeypatch.setattr(
        type(instrument), "_alike", lambda self, runs, *_: seen.extend(runs) or iter([pa.table({"run": [*runs], "step": [1]})])
    )
    monkeypatch.setattr(type(instrument), "finish", lambda self, table: table)
    measure(instrument, store)
    measure(instrument, store)
    assert seen == [WITH.id] and set(store.written(instrument.kind)) == {runs.index(WITH)}


def test_of_several_names_each_cohort_has_its_own():
    several = Circuit(patterns=("iteration_2", "first"))
    names = [several.layouts(run)["circuit"].columns()["pattern"] for run in (WITH, WITHOUT)]
    assert [set(each) for each in names] == [{"iteration_2", "first"}, {"first"}]


def test_where_no_pattern_is_left_another_networks_maps_are(tmp_path):
    """Measured, beside a cohort that still trains."""
    store = Mixed(tmp_path, WITH, WITHOUT, unfinished=(WITH,))
    measure(Patch(patterns=("iteration_2",), other="final", examples=4), store)
    rows = store.written("patch")
    assert set(rows) == {1} and set(rows[1]["source"].to_pylist()) == {"final"}
    assert rows[1]["loss"].to_pylist() == pytest.approx(rows[1]["base_loss"].to_pylist(), rel=1e-6)  # its own end
