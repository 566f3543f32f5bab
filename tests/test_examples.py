"""Every example runs, and what it edits changes what is measured."""

import json
import runpy
import sys
from pathlib import Path
from unittest import mock

import pyarrow.csv
import pytest

from elegans import Invalid
from running import elegans

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def fresh_modules():
    yield
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def losses(store):
    """Last training loss of every run, by the run's plain fields."""
    last = "select run, arg_max(loss, step) as loss from metrics where split = 'train' group by run"
    query = f"select r.*, m.loss from runs r join ({last}) m using (run)"
    return json.loads(elegans("sql", store, query, "--json").out)


def run(name, store, *words):
    answer = elegans("run", EXAMPLES / name, "steps=6", *words, "--store", store)
    assert answer.status == 0, answer.err
    return losses(store)


def test_new_task(tmp_path):
    shown = json.loads(elegans("show", "copy_word", "length=4", "--with", EXAMPLES / "new_task.py", "--json").out)
    assert shown["length"] == 9 and shown["scored_tokens"] == 4 and shown["truth"] == ["late"]
    for example in shown["examples"]:
        assert example["tokens"][:4] == example["tokens"][5:]
    assert len(run("new_task.py", tmp_path / "store")) == 3


def test_the_oracle_of_the_guide_answers_as_the_new_task_does(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    guide = (EXAMPLES.parent / "docs" / "extending.md").read_text()
    code = guide.split("```python\n")[1].split("```")[0]
    exec(code, {})
    assert "'check': 'oracle', 'found': 1024.0, 'promised': 1024.0" in capsys.readouterr().out
    with pytest.raises(Invalid, match=r"^copy_word\.oracle: "):
        exec(code.replace("prompt[:-1]", "prompt[1:]"), {})


def test_new_component(tmp_path):
    rows = run("new_component.py", tmp_path / "store", "seed=0")
    assert len({row["loss"] for row in rows}) == 3  # plain, gained, squared


def test_new_update(tmp_path):
    rows = run("new_update.py", tmp_path / "store", "seed=0")
    assert len({row["loss"] for row in rows}) == 2
    logged = json.loads(elegans("sql", tmp_path / "store", "select largest_weight from metrics where split = 'train'", "--json").out)
    assert all(row["largest_weight"] > 0 for row in logged)


def test_new_optimizer(tmp_path):
    rows = run("new_optimizer.py", tmp_path / "store", "seed=0")
    assert {row["optim"] for row in rows} == {"ada_belief"} and len({row["loss"] for row in rows}) == 2


def test_new_instrument(tmp_path):
    run("new_instrument.py", tmp_path / "store", "seed=0")
    rows = json.loads(elegans("sql", tmp_path / "store", "select * from stream_length", "--json").out)
    assert {row["site"] for row in rows} == {"resid.0", "resid.1"} and all(row["length"] > 0 for row in rows)


def test_new_figure(tmp_path):
    """Its own figure and its numbers; without the file the store's study is unknown; with another's, what any store has is drawn."""
    rows = run("new_figure.py", tmp_path / "store", "seed=0")
    answer = elegans("draw", tmp_path / "store", tmp_path / "figures", "--study", EXAMPLES / "new_figure.py")
    assert answer.out.split() == [str(tmp_path / "figures" / f"rates.{end}") for end in ("png", "pdf", "csv")], answer.err
    table = pyarrow.csv.read_csv(tmp_path / "figures" / "rates.csv")
    assert sorted(table["lr"].to_pylist()) == sorted(row["optim.lr"] for row in rows) and table.column_names == ["lr", "seed", "loss"]
    assert "'new_figure' is none that ships" in elegans("draw", tmp_path / "store").err
    general = elegans("draw", tmp_path / "store", "--study", "carry").out.split()
    assert str(tmp_path / "store" / "figures" / "loss.png") in general and all(Path(file).stat().st_size for file in general)


def test_yaml_and_look_inside(tmp_path, capsys):
    rows = run("sweep.yaml", tmp_path / "store", "seed=0", "model.d_model=16", "model.layers=2")
    assert {row["label"] for row in rows} == {"d=16 lr=0.001 seed=0", "d=16 lr=0.003 seed=0"}
    drawn = elegans("draw", tmp_path / "store")  # what any store has: the study has no figures of its own
    assert str(tmp_path / "store" / "figures" / "loss.png") in drawn.out.split(), drawn.err
    with mock.patch.object(sys, "argv", ["look_inside.py", str(tmp_path / "store")]):
        runpy.run_path(str(EXAMPLES / "look_inside.py"))
    assert "without attention 1" in capsys.readouterr().out


@pytest.mark.slow
def test_forgetting(tmp_path):
    rows = run("forgetting.py", tmp_path / "store", "seed=0")
    children = {row["trained"] for row in rows if row["after.seed"] is not None}
    assert children == {None, '["blocks.*.mlp.*"]'}
    query = 'select "after.seed" as parent, e.step from evaluate e join runs using (run) where e.length is null order by all'
    measured = json.loads(elegans("sql", tmp_path / "store", query, "--json").out)
    assert {row["parent"] for row in measured} == {0, 1} and {0, 6} <= {row["step"] for row in measured}


def test_continue(tmp_path):
    """The parent is there without having been asked for, and what its children make of its task is measured."""
    rows = run("continue.yaml", tmp_path / "store", "seed+after.seed=0")
    assert {row["label"]: row["steps"] for row in rows} == {"after 100, seed 0": 6, "after 200, seed 0": 6, None: 200}
    query = "select label, e.task, exact_match from evaluate e join runs using (run)"
    measured = json.loads(elegans("sql", tmp_path / "store", query, "--json").out)
    assert {row["label"] for row in measured} == {"after 100, seed 0", "after 200, seed 0"}
    assert all(row["task"] == "addition" and row["exact_match"] is not None for row in measured)
