"""Runs that keep no weights: the rows of those that do, and no file as large as a model."""

import dataclasses

import pytest

import elegans as el
from elegans.driver import train
from elegans.errors import Invalid
from elegans.instruments import Probe
from elegans.store import Store
from elegans.study import Study, check_study
from elegans.training.ahead import Ahead
from elegans.training.convoy import Convoy
from elegans.training.device import choose
from elegans.training.train import Checkpoint, train_convoy
from running import elegans

RECORD = el.Record(evaluate=el.At(), examples=16)
RUN = el.Run(el.Addition(length=3), el.Transformer(layers=1, d_model=8, heads=2), el.AdamW(lr=3e-3), batch=4, steps=40, record=RECORD)
KEEPING = [dataclasses.replace(RUN, seed=seed, steps=steps) for steps in (40, 20) for seed in (0, 1)]  # two end before the others
FORGETTING = [el.replace(run, "record.weights", el.Never()) for run in KEEPING]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return train(KEEPING, tmp_path_factory.mktemp("kept") / "store")


@pytest.fixture(scope="module")
def forgot(tmp_path_factory):
    return train(FORGETTING, tmp_path_factory.mktemp("forgot") / "store")


def content(store):
    """Metrics of a store, in the order of what tells its runs apart besides what they record."""
    return store.sql("select seed, steps, m.* exclude (run) from metrics m join runs r using (run) order by all").to_pylist()


def test_rows_are_those_of_runs_that_keep_their_weights(kept, forgot):
    assert content(forgot) == content(kept) != []
    assert any(kept.path.rglob("*.safetensors"))
    assert not any(forgot.path.rglob("*.safetensors"))


def test_stopped_anywhere_it_goes_on_to_the_same_bits(forgot, tmp_path):
    """A checkpoint before the end is there to go on from, those where runs end too, and none once all have ended."""
    (done,) = forgot.cohorts()
    steps = [event.step for event in train_convoy(Convoy((done.plan(),)), Ahead([], choose())) if isinstance(event, Checkpoint)]
    for stop in (steps[0], 20):
        store = Store.create(tmp_path / str(stop))
        cohort = store.add(done.plan(), {})
        writer = cohort.writer(0)
        for event in train_convoy(Convoy((done.plan(),)), Ahead([], choose())):
            writer.write(event)
            if isinstance(event, Checkpoint) and event.step == stop:
                break
        assert cohort.newest_state()[0] == stop
        train(FORGETTING, store.path)
        assert (cohort.path / "metrics.parquet").read_bytes() == (done.path / "metrics.parquet").read_bytes()
        assert not any(store.path.rglob("*.safetensors"))


def test_nothing_goes_on_from_them_and_nothing_measures_them(forgot):
    with pytest.raises(Invalid, match=r"record\.weights is never"):
        dataclasses.replace(RUN, after=FORGETTING[0])
    with pytest.raises(Invalid, match=r"^record\.weights: .*never.*probe"):
        check_study(Study(FORGETTING, (Probe(),)))
    check_study(Study(FORGETTING + KEEPING, (Probe(),)))
    assert "no weights" in elegans("measure", "probe", forgot.path).err
