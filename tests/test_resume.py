"""Stores that were interrupted, damaged, or whose custom components were edited."""

import importlib
import json
import shutil
import sys
import warnings

import jax
import numpy as np
import pytest

import elegans as el
from elegans.sources import NUMERICS
from elegans.store import Store
from elegans.training import planner
from elegans.training.cohort import Programs
from elegans.training.device import choose, within_memory
from elegans.training.train import Checkpoint, Compiled
from running import elegans

STUDY = """
import elegans as el

@el.spec
class Scaled(el.SwiGLU):
    gain: float = 1.0

    def apply(self, params, x, context):
        return self.gain * super().apply(params, x, context)

run = el.Run(
    el.Addition(length=3), el.Transformer(layers=1, d_model=8, heads=2, mlp=Scaled()), el.AdamW(lr=3e-3), batch=4, steps=40,
    record=el.Record(evaluate=el.At(), weights=el.At(), examples=16),
)
study = el.Study(el.grid(run, {"seed": [0, 1]}), name="scaled")
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished store and the study's file; copy before changing."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "scaled_study.py").write_text(STUDY)
    answer = elegans("run", folder / "scaled_study.py", "--store", folder / "store")
    assert answer.status == 0, answer.err
    return folder


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    yield tmp_path / "copy"
    forget()


def forget():
    """A new process would import the user's file anew."""
    sys.modules.pop("scaled_study", None)
    importlib.invalidate_caches()


def unfinish(store):
    """Make a finished store look as if it had been stopped after its last checkpoint but one."""
    from elegans.training.ahead import Ahead
    from elegans.training.convoy import Convoy
    from elegans.training.train import train_convoy

    cohort = Store(store).cohorts()[0]
    plan = cohort.plan()
    for pattern in ("*.parquet", "state-*", "status.json"):
        for path in cohort.path.glob(pattern):
            path.unlink()
    writer = cohort.writer(0)
    for event in train_convoy(Convoy((plan,)), Ahead([], choose())):
        writer.write(event)
        if isinstance(event, Checkpoint) and event.step == plan.steps - plan.checkpoint_every:
            return cohort
    raise AssertionError("no such checkpoint")


def files(store):
    return {
        p.name: p.read_bytes() for p in sorted((store / "cohorts").rglob("*")) if p.is_file() and p.suffix in (".parquet", ".safetensors")
    }


def test_running_again_does_nothing(copy):
    before = files(copy / "store")
    forget()
    answer = elegans("run", copy / "scaled_study.py", "--store", copy / "store")
    assert answer.status == 0 and "2 already finished" in answer.err
    assert files(copy / "store") == before


def test_weights_are_read_by_whom_rows_are(trained):
    assert len({path.stat().st_mode for path in (trained / "store").rglob("*") if path.is_file()}) == 1


def test_an_answer_written_by_hand_stays(copy):
    noted = copy / "store" / "study.json"
    noted.write_text(json.dumps(json.loads(noted.read_text()) | {"answer": "It does."}))
    forget()
    assert elegans("run", copy / "scaled_study.py", "--store", copy / "store").status == 0
    assert json.loads(noted.read_text())["answer"] == "It does."


def test_more_runs_form_a_new_cohort(copy):
    forget()
    assert elegans("run", copy / "scaled_study.py", "seed=0..2", "--store", copy / "store").status == 0
    rows = json.loads(elegans("sql", copy / "store", "select cohort, count(*) as n from runs group by cohort", "--json").out)
    assert sorted(row["n"] for row in rows) == [1, 2]


def test_only_a_program_rebuilt_amid_what_it_trains_counts_as_recompiled(tmp_path):
    """A cohort that shrinks has a fresh program then, and so has one that goes on from there: no other trained that part."""
    run = el.Run(el.Addition(length=3), el.Transformer(layers=1, d_model=4, heads=1), steps=100_000)
    made = planner.plan([el.replace(run, "seed", i) for i in range(3)] + [el.replace(run, "steps", 10**6)], 2**30)
    assert len(made) == 1 and len(made[0].segments) == 2
    cohort = Store.create(tmp_path / "store").add(made[0], {})
    first, last = made[0].segments
    nothing = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), Programs(made[0].runs, choose()).states_like)

    def recompiled(step, *events):
        writer = cohort.writer(step)
        for event in events:
            writer.write(event)
        return cohort.status()["recompiled"]

    saved = Checkpoint(first.stop, [0], [nothing.diverged], lambda: [nothing])
    assert not recompiled(0, Compiled(0, first.size, 1, 0, True), saved, Compiled(first.stop, 1, 1, 0, True))
    assert not recompiled(first.stop, Compiled(first.stop, last.size, 1, 0, True))
    assert not recompiled(first.stop + 1, Compiled(first.stop + 1, last.size, 1, 0, False))
    assert not recompiled(first.stop - 1, Compiled(first.stop, last.size, 1, 0, True))  # after a cached one of the first segment
    assert recompiled(first.stop + 1, Compiled(first.stop + 1, last.size, 1, 0, True))


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "bit flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "bit flipped"])
@pytest.mark.parametrize("what", ["state", "metrics"])
def test_a_damaged_newest_checkpoint(copy, how, what):
    before = files(copy / "store")
    cohort = unfinish(copy / "store")
    damage(max(cohort.path.glob(f"{what}-*")), how)
    forget()
    with pytest.warns(UserWarning, match="the checkpoint before it is used"):
        assert elegans("run", copy / "scaled_study.py", "--store", copy / "store", "--resume").status == 0
    assert files(copy / "store") == before


def test_every_checkpoint_gone(copy):
    cohort = unfinish(copy / "store")
    for path in cohort.path.glob("state-*"):
        damage(path, "gone")
    forget()
    answer = elegans("run", copy / "scaled_study.py", "--store", copy / "store")
    assert answer.status == 2 and "--again" in answer.err.strip().splitlines()[-1]
    forget()
    assert elegans("run", copy / "scaled_study.py", "--store", copy / "store", "--again").status == 0


def test_resume_where_there_is_nothing(copy):
    forget()
    answer = elegans("run", copy / "scaled_study.py", "--store", copy / "fresh", "--resume")
    assert answer.status == 2 and "nothing to resume" in answer.err and len(answer.err.strip().splitlines()) == 1
    assert not (copy / "fresh").exists()


def test_an_edited_component(copy):
    before = files(copy / "store")
    file = copy / "scaled_study.py"
    forget()
    file.write_text(STUDY.replace("return self.gain", "# only a comment\n        return self.gain"))
    assert elegans("run", file, "--store", copy / "store").status == 0
    file.write_text(STUDY.replace("return self.gain", "return 2 * self.gain"))
    forget()
    answer = elegans("run", file, "--store", copy / "store")
    assert answer.status == 2 and "class Scaled" in answer.err and len(answer.err.strip().splitlines()) == 1
    assert files(copy / "store") == before
    forget()
    assert elegans("run", file, "--store", copy / "store", "--again").status == 0
    assert files(copy / "store") != before


def test_again_never_discards_other_runs(copy):
    forget()
    answer = elegans("run", copy / "scaled_study.py", "seed=0", "--store", copy / "store", "--again")
    assert answer.status == 2 and "1 runs that are not in this study" in answer.err


def test_numerics_version(copy):
    spec = next((copy / "store" / "cohorts").glob("*/spec.json"))
    spec.write_text(spec.read_text().replace(f'"numerics": {NUMERICS}', '"numerics": 0'))
    forget()
    answer = elegans("run", copy / "scaled_study.py", "--store", copy / "store")
    assert answer.status == 2 and "numerics version" in answer.err


def test_a_store_in_use(copy):
    forget()
    with Store(copy / "store").lock():
        answer = elegans("run", copy / "scaled_study.py", "--store", copy / "store")
    assert answer.status == 2 and "another process" in answer.err


def test_loading_runs_no_code_of_the_store(copy):
    cohort = next((copy / "store" / "cohorts").iterdir())
    (cohort / "source" / "scaled_study.py").write_text("raise SystemExit('executed')")
    assert elegans("ls", copy / "store").status == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert elegans("sql", copy / "store", "select * from runs").status == 0


def test_a_device_too_full_is_one_line_and_what_had_not_begun_is_planned_anew(trained, tmp_path, monkeypatch):
    """With another memory; what had begun keeps its plan."""
    asked = "run", trained / "scaled_study.py", "--store", tmp_path / "store"

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.41GiB")

    with monkeypatch.context() as patch:
        patch.setattr(Programs, "chunk", full)
        forget()
        answer = elegans(*asked, "--memory", "2GiB")
    assert answer.status == 2 and "smaller --memory" in answer.err.strip().splitlines()[-1] and "Traceback" not in answer.err
    memory = [cohort.plan().memory for cohort in Store(tmp_path / "store").cohorts()]
    forget()
    assert elegans(*asked, "--memory", "1GiB").status == 0
    (cohort,) = Store(tmp_path / "store").cohorts()
    assert (memory, cohort.plan().memory, cohort.status()["finished"]) == ([2 * 2**30], 2**30, True)
    unfinish(tmp_path / "store")
    forget()
    assert elegans(*asked, "--memory", "2GiB").status == 0
    assert [c.plan().memory for c in Store(tmp_path / "store").cohorts()] == [2**30]


def test_no_other_error_of_a_device_is_called_a_lack_of_memory():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), within_memory(10):
        raise jax.errors.JaxRuntimeError("INTERNAL: a broken program")
