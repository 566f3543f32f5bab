"""Finished cohorts leave a store as a file and come back bit for bit."""

import contextlib
import dataclasses
import math
import shutil
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import elegans as el
from elegans import driver
from elegans.errors import Invalid, StoreError
from elegans.files import write_table
from elegans.loading import load_study
from elegans.store import Store
from elegans.study import run_study
from elegans.training.train import Checkpoint
from running import elegans

STUDY = """
import elegans as el

record = el.Record(examples=4, weights=el.At())
run = el.Run(el.Addition(length=3), el.Transformer(layers=1, d_model=4, heads=2), batch=2, steps=4, record=record)
study = el.Study(el.grid(run, {"model.d_model": [4, 8], "seed": [0, 1]}), (el.Probe(fit=8, test=8, at="final"),))
small = el.Study(study.runs[:1], name="less")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    (folder / "archived_study.py").write_text(STUDY)
    assert elegans("run", folder / "archived_study.py", "--store", folder / "store").status == 0
    return folder


def files(store, weights):
    """Every file of the cohorts and rows, by name; parameters only if asked for."""
    found = [p for part in ("cohorts", "rows") for p in (store / part).rglob("*") if p.is_file()]
    return {p.relative_to(store): p.read_bytes() for p in found if weights or not p.name.startswith(("state-", "weights-"))}


@pytest.mark.parametrize("weights", [False, True])
def test_an_archive_brings_back_every_bit(trained, tmp_path, weights):
    flags = ["--weights"] if weights else []
    assert "2 cohorts" in elegans("archive", trained / "store", tmp_path / "a.tar.xz", *flags).out
    elegans("archive", trained / "store", tmp_path / "b.tar.xz", *flags)
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()
    assert "2 new cohorts" in elegans("merge", tmp_path / "other", tmp_path / "a.tar.xz").out
    assert files(tmp_path / "other", weights=True) == files(trained / "store", weights)
    assert Store(tmp_path / "other").sql("select * from metrics").equals(Store(trained / "store").sql("select * from metrics"))
    again = elegans("run", trained / "archived_study.py", "--store", tmp_path / "other")
    assert "0 runs in 0 cohorts to train, 4 already finished" in again.err


def test_pieces_merge_and_repeat_nothing(trained, tmp_path):
    store, pieces = Store(trained / "store"), []
    for i, cohort in enumerate(store.cohorts()):
        part = tmp_path / f"part{i}"
        shutil.copytree(store.path, part)
        Store(part).remove([c for c in Store(part).cohorts() if c.id != cohort.id])
        elegans("archive", part, tmp_path / f"{i}.tar.xz")
        pieces.append(tmp_path / f"{i}.tar.xz")
    assert "2 new" in elegans("merge", tmp_path / "whole", *pieces).out
    assert "0 new" in elegans("merge", tmp_path / "whole", *pieces).out
    assert set(files(tmp_path / "whole", True)) == set(files(store.path, False))


def test_results_are_the_same_whoever_wrote_the_file_and_other_ones_are_refused(trained, tmp_path):
    elegans("archive", trained / "store", tmp_path / "a.tar.xz")
    elegans("merge", tmp_path / "other", tmp_path / "a.tar.xz")
    path = Store(tmp_path / "other").cohorts()[0].path / "metrics.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows, path)  # as another version might
    assert path.read_bytes() != (trained / "store" / path.relative_to(tmp_path / "other")).read_bytes()
    assert "0 new" in elegans("merge", tmp_path / "other", tmp_path / "a.tar.xz").out
    losses = rows["loss"].to_numpy().copy()
    losses[-1] = np.nextafter(losses[-1], np.inf)
    pq.write_table(rows.set_column(rows.column_names.index("loss"), "loss", pa.array(losses, rows.schema.field("loss").type)), path)
    assert "with other results" in elegans("merge", tmp_path / "other", tmp_path / "a.tar.xz").err


def test_rows_measured_with_other_settings_stay_out_and_that_is_said(trained, tmp_path):
    """Both of a cohort that the store has and of one that it has not: its tables hold rows of its own settings alone."""
    first, second = (c.id for c in Store(trained / "store").cohorts())
    shutil.copytree(trained / "store", tmp_path / "otherwise")
    for path in (tmp_path / "otherwise" / "rows" / "probe").iterdir():
        write_table(path, pq.read_table(path).replace_schema_metadata({"instrument": "measured otherwise"}))
    for name, store in (("same", trained / "store"), ("otherwise", tmp_path / "otherwise")):
        elegans("archive", store, tmp_path / f"{name}.tar.xz")
    for missing in ([], [second]):
        whole = tmp_path / f"whole{len(missing)}"
        shutil.copytree(trained / "store", whole)
        Store(whole).remove([c for c in Store(whole).cohorts() if c.id in missing])
        answer = elegans("merge", whole, tmp_path / "otherwise.tar.xz")
        assert answer.status == 0 and f"{len(missing)} new" in answer.out
        assert answer.err.count("\n") == 1 and "rows of probe are left out" in answer.err and "other settings" in answer.err
        assert {c.id for c in Store(whole).cohorts()} == {first, second}
        kept = {p.name: p.read_bytes() for p in (trained / "store" / "rows" / "probe").iterdir() if p.stem not in missing}
        assert {p.name: p.read_bytes() for p in (whole / "rows" / "probe").iterdir()} == kept
        same = elegans("merge", whole, tmp_path / "same.tar.xz")  # brings the rows that are missing
        assert not same.err and Store(whole).table("probe").equals(Store(trained / "store").table("probe"))


def test_refusals_are_one_line(trained, tmp_path):
    elegans("archive", trained / "store", tmp_path / "a.tar.xz")
    (tmp_path / "text.tar.xz").write_text("no archive")
    with tarfile.open(tmp_path / "other.tar.xz", "w:xz") as tar:
        tar.add(trained / "archived_study.py", "archived_study.py")
    shutil.copytree(trained / "store", tmp_path / "changed")
    metrics = sorted((tmp_path / "changed").glob("cohorts/*/metrics.parquet"))
    shutil.copy(metrics[0], metrics[1])
    before = files(tmp_path / "changed", True)
    for name, word in (("text", "no archive"), ("other", "format.json is missing"), ("a", "other results"), ("none", "no such file")):
        answer = elegans("merge", tmp_path / "changed", tmp_path / f"{name}.tar.xz")
        assert answer.status == 2 and word in answer.err and answer.err.count("\n") == 1
    assert files(tmp_path / "changed", True) == before


def test_small_and_budgets_choose_runs(trained, tmp_path):
    few = elegans("run", trained / "archived_study.py", "--small", "--plan", "--store", tmp_path / "s")
    assert few.status == 0 and few.out.count("1 to 4") == 1
    runs = {run.flops_per_step * run.length for run in map(_run, Store(trained / "store").lines())}
    cheap = elegans("run", trained / "archived_study.py", "--max-budget", str(min(runs) * 1.5), "--plan", "--store", tmp_path / "s")
    assert cheap.status == 0 and cheap.out.count("2 to 4") == 1
    none = elegans("run", trained / "archived_study.py", "--max-budget", "1", "--store", tmp_path / "s")
    assert none.status == 2 and "max-budget" in none.err


def test_more_seeds_of_the_best_are_planned(trained):
    """Each of two widths is the best at a budget of its own; an empty store has none."""
    more = elegans("run", trained / "archived_study.py", "seed=5..7", "--best", "1", "--plan", "--store", trained / "store")
    assert more.status == 0 and more.out.count("3 to 4") == 2
    none = elegans("run", trained / "archived_study.py", "--best", "1", "--plan", "--store", trained / "none")
    assert none.status == 2 and "none" in none.err and none.err.count("\n") == 1


def _run(line):
    import elegans as el
    from elegans.specs import from_dict

    return from_dict(el.Run, line["spec"])


def test_minutes_end_training_at_a_checkpoint(trained, tmp_path):
    first = elegans("run", trained / "archived_study.py", "--store", tmp_path / "s", "--minutes", "0")
    assert first.status == 0 and not any(c.status()["finished"] for c in Store(tmp_path / "s").cohorts())
    stages = []

    def listener(stage, _):
        stages.append(stage)
        if stage != "plan":  # until the report is written this process alone writes; anybody may read
            with pytest.raises(StoreError, match="another process"), Store(tmp_path / "s").lock():
                pass
            assert Store(tmp_path / "s").runs().num_rows == 4

    run_study(load_study(str(trained / "archived_study.py")), tmp_path / "s", listener)
    order = [stage for stage in stages if stage in ("convoy", "measure", "report")]
    assert order == ["convoy", "measure", "convoy", "measure", "report"]  # what has ended has its rows, however short the time
    kept = {k: v for k, v in files(trained / "store", True).items() if k.name not in ("timings.jsonl", "provenance.json")}
    assert {k: v for k, v in files(tmp_path / "s", True).items() if k in kept} == kept


def test_what_follows_from_rows_waits_for_the_first_that_has_ended(trained, tmp_path):
    study = load_study(str(trained / "archived_study.py"))
    across = dataclasses.replace(study, runs=study.runs[:1], instruments=(*study.instruments, el.AcrossCompute()))
    run_study(across, tmp_path / "s", minutes=0.0)
    assert not Store(tmp_path / "s").has("across_compute") and (tmp_path / "s" / "report.html").exists()
    with pytest.raises(Invalid, match="needs probes"):  # which nobody is going to measure
        run_study(dataclasses.replace(across, instruments=across.instruments[1:]), tmp_path / "s")
    run_study(across, tmp_path / "s")
    assert Store(tmp_path / "s").has("across_compute")


def train_until(runs, store, step=None):
    """Train runs up to a checkpoint, where the machine's time ends, or to the end; return the step that they went on from."""
    began = []

    def listener(stage, detail):
        if stage == "convoy":
            began.append(detail[1])
        if stage == "event" and isinstance(detail, Checkpoint) and detail.step == step:
            raise KeyboardInterrupt

    written = mock.patch.object(driver, "CHECKPOINT_SHARE", math.inf)  # every checkpoint is
    with written, pytest.raises(KeyboardInterrupt) if step else contextlib.nullcontext():
        driver.train(runs, store, listener=listener)
    return began[0]


def test_an_unfinished_cohort_goes_on_in_another_store_to_the_same_bits(trained, tmp_path):
    runs, here, other = load_study(str(trained / "archived_study.py")).runs[:2], tmp_path / "here", tmp_path / "other"
    for step in (1, 3):
        train_until(runs, here, step)
        assert "1 cohorts" in elegans("archive", here, tmp_path / f"{step}.tar.xz", "--unfinished").out
    refused = elegans("archive", here, tmp_path / "none.tar.xz")
    assert refused.status == 2 and "no finished cohort" in refused.err and not (tmp_path / "none.tar.xz").exists()
    with tarfile.open(tmp_path / "3.tar.xz") as tar:
        names = [Path(name).name for name in tar.getnames()]
    assert [n for n in names if n.startswith("state-")] == ["state-0000000003.safetensors"]
    assert len(list(here.glob("cohorts/*/state-*"))) == 2  # that before it is there for the case of damage, and stays behind

    for step in (1, 3):  # what is further on takes the place of what is there
        assert "1 new cohorts" in elegans("merge", other, tmp_path / f"{step}.tar.xz").out
    before = files(other, True)
    late = elegans("merge", other, tmp_path / "1.tar.xz")
    assert "0 new" in late.out and "at step 1 is left out" in late.err and "has it at step 3" in late.err
    assert not elegans("merge", other, tmp_path / "3.tar.xz").err and files(other, True) == before

    assert train_until(runs, here) == train_until(runs, other) == 3
    (cohort,) = Store(other).cohorts()
    assert cohort.status()["finished"] and cohort.id in {c.id for c in Store(trained / "store").cohorts()}
    apart = ("timings.jsonl", "provenance.json", "status.json")  # the status says that a program was built anew
    never, here, there = (
        {k: v for k, v in files(store, True).items() if cohort.id in k.parts and k.name not in apart}
        for store in (trained / "store", here, other)
    )
    assert never == here == there and any(k.name.startswith("weights-") for k in there)
    kept = elegans("merge", other, tmp_path / "3.tar.xz")
    assert "0 new" in kept.out and "has it at step 4" in kept.err and files(other, True).items() >= there.items()


def test_a_store_in_training_does_not_give_away_what_is_unfinished(trained, tmp_path):
    with Store(trained / "store").lock():
        assert elegans("archive", trained / "store", tmp_path / "a.tar.xz").status == 0
        refused = elegans("archive", trained / "store", tmp_path / "b.tar.xz", "--unfinished")
    assert refused.status == 2 and "another process" in refused.err and not (tmp_path / "b.tar.xz").exists()


def test_a_run_that_came_in_two_cohorts_counts_once(trained, tmp_path):
    """As two archives of differently planned stores bring it: here a copy of a cohort, under another id."""
    before, path = Store(trained / "store"), tmp_path / "store"
    shutil.copytree(before.path, path)
    twin = before.cohorts()[0].id
    shutil.copytree(path / "cohorts" / twin, path / "cohorts" / ("f" * 12))
    shutil.copy(path / "rows" / "probe" / f"{twin}.parquet", path / "rows" / "probe" / f"{'f' * 12}.parquet")
    after = Store(path)
    assert len(after.cohorts()) == 3 and [line["run"] for line in after.lines()] == [line["run"] for line in before.lines()]
    for table in ("runs", "metrics", "probe"):
        assert after.table(table).equals(before.table(table))
    assert after.find(after.lines()[0]["run"])[0].id in {c.id for c in before.cohorts()}


def test_a_store_without_weights_says_that_nothing_can_be_measured(trained, tmp_path):
    elegans("archive", trained / "store", tmp_path / "a.tar.xz")
    elegans("merge", tmp_path / "other", tmp_path / "a.tar.xz")
    refused = elegans("measure", "dynamics", tmp_path / "other")
    assert refused.status == 2 and "no weights of a finished run to measure" in refused.err
    elegans("archive", trained / "store", tmp_path / "whole.tar.xz", "--weights")  # the remedy that it names
    brought = elegans("merge", tmp_path / "other", tmp_path / "whole.tar.xz")
    assert "0 new" in brought.out and "weights of 2 cohorts" in brought.err
    assert files(tmp_path / "other", weights=True) == files(trained / "store", weights=True)
    assert not elegans("merge", tmp_path / "other", tmp_path / "whole.tar.xz").err
