"""Networks on other tasks: a hand-made one has countable scores, whatever the ids and the place of a symbol."""

import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest

from elegans.errors import Invalid
from elegans.instruments import Evaluate
from elegans.models.transformer import Transformer
from elegans.randomness import Purpose, key_for
from elegans.specs import spec
from elegans.tasks import Addition, BinaryCopy, Mixture, Parity
from elegans.tasks.sampling import draw_set, prepare
from elegans.training import Run, follow
from elegans.training.vectors import ravel
from iterating import MODEL, PERFECT, RUNS, TASK, measured

ROWS = 64


@spec
class Renamed(Parity):
    """Parity whose ids run the other way."""

    @property
    def symbols(self):
        return super().symbols[::-1]

    def sample(self, key, data):
        row = super().sample(key, data)
        return dataclasses.replace(row, tokens=len(self.symbols) - 1 - row.tokens)


@spec
class Latch(Renamed):
    """Once 1, always 1: a task on which a network that computes parity is often wrong."""

    def update(self, state, x):
        return state | x


def on(kind, **changes):
    return kind(**{"length": 4, "shortest": 1, "split": None} | changes)


def texts(task, rows=ROWS):
    """The rows that `measured` measures on."""
    draw = jax.jit(lambda: draw_set(task, "test", key_for(0, Purpose.INSTRUMENT), rows, prepare(task)))
    return [task.text(row) for row in np.asarray(draw().tokens)]


def parity_on(text):
    """Of a network that adds each input to the state written before it: which of the answers of a row it has right."""
    asked, answer = ([int(c) for c in part] for part in text.split("$")[0][1:].split(":"))
    return [(s + x) % 2 == a for s, x, a in zip([0, *answer], asked, answer, strict=False)] + [True]  # and the end


def test_another_order_of_symbols_and_shorter_rows_are_the_same_language():
    for task in (on(Renamed), on(Renamed, length=3)):
        made = measured(Evaluate(task=task, examples=ROWS)).set_index(["run", "length"])
        perfect = made.loc["perfect"]
        assert (perfect[["accuracy", "exact_match"]] == 1).all(axis=None) and perfect["loss"].max() < 1e-3
        assert made.loc["untrained", "accuracy"].max() < 0.9
        assert set(perfect.index.dropna()) == set(range(1, task.length + 1)) and perfect.index.isna().sum() == 1


def test_scores_on_another_task_are_counted_row_by_row():
    made = measured(Evaluate(task=on(Latch), examples=ROWS))
    made = made[made["run"] == "perfect"].set_index("length")
    found = pd.DataFrame({"hits": list(map(parity_on, texts(on(Latch))))})
    found["length"] = found["hits"].map(len) - 1
    for length, mine in [*found.groupby("length"), (np.nan, found)]:
        row = made[made.index.isna()].iloc[0] if np.isnan(length) else made.loc[length]
        assert row["accuracy"] == pytest.approx(np.mean([h for hits in mine["hits"] for h in hits]))
        assert row["exact_match"] == pytest.approx(mine["hits"].map(all).mean())
    assert 0.1 < made[made.index.isna()]["exact_match"].iloc[0] < 0.9


def test_a_task_without_lengths_has_one_row_a_network():
    lent = dataclasses.replace(RUNS["perfect"], task=Mixture(tasks=(TASK, Addition(length=2, split=None)), weights=(1, 0)))
    layouts = Evaluate(task=Addition(length=2, split=None)).layouts(lent)
    assert {name: len(layout.columns()["task"]) for name, layout in layouts.items()} == {"addition": 1}


def test_what_a_network_cannot_read_is_refused():
    with pytest.raises(Invalid, match=r"task: 'binary_copy' .* C are not among the network's, 0 1 P : \$"):
        Evaluate(task=BinaryCopy(length=3)).layouts(RUNS["perfect"])
    with pytest.raises(Invalid, match=r"13 tokens.*positions for 11"):
        Evaluate(task=on(Parity, length=5)).layouts(RUNS["perfect"])
    rotary = dataclasses.replace(RUNS["perfect"], model=Transformer(layers=1, d_model=8, heads=2))
    assert Evaluate(task=on(Parity, length=5)).layouts(rotary)


def test_without_a_task_it_is_the_parents_and_runs_without_parents_are_left_out():
    """One cohort, whose runs go on from different tasks."""
    parents = [Run(task, MODEL, steps=2, data_seed=0) for task in (on(Renamed), on(Latch))]
    plain = Run(TASK, MODEL, steps=2, data_seed=0)
    runs = {run.id: run for run in [plain, *follow(parents, plain)]}
    networks = [(i, 2, np.asarray(ravel(PERFECT))) for i in runs]
    made = pd.concat([t.to_pandas() for t in Evaluate(examples=ROWS)._over(runs, networks, lambda *_: None)])
    made = made[made["length"].isna()].set_index("run")
    assert made["task"].to_dict() == {i: run.after.task.kind for i, run in runs.items() if run.after}
    assert made.loc[[i for i, run in runs.items() if run.after and run.after.task.kind == "renamed"], "exact_match"].tolist() == [1]
    latch = np.mean([all(parity_on(text)) for text in texts(on(Latch))])
    assert made["exact_match"].min() == pytest.approx(latch)


def test_of_a_mixture_each_task_apart_also_of_weight_0():
    """The hand-made network on parity as it is, and on a language that it has often wrong."""
    mixed = Mixture(tasks=(on(Parity, length=3), on(Latch)), weights=(1, 0))
    run = dataclasses.replace(RUNS["perfect"], task=mixed)
    networks = [(run.id, 2, np.asarray(ravel(PERFECT)))]
    made = pd.concat([t.to_pandas() for t in Evaluate(own=True, apart="tasks", examples=ROWS)._over({run.id: run}, networks, print)])
    whole = made[made["length"].isna()].set_index("task")["exact_match"]
    latch = np.mean([all(parity_on(text)) for text in texts(mixed.alone(1))])
    assert whole.to_dict() == {"parity": 1, "latch": pytest.approx(latch)} and 0.1 < latch < 0.9
    assert set(made.loc[made["task"] == "parity", "length"].dropna()) == {1, 2, 3}
    assert all(text.startswith("<latch> ") for text in texts(dataclasses.replace(mixed, tag=True).alone(1), 8))


def test_its_own_task_is_that_of_each_run():
    own = measured(Evaluate(own=True, examples=ROWS))
    pd.testing.assert_frame_equal(own, measured(Evaluate(task=TASK, examples=ROWS)))
    with pytest.raises(Invalid, match="own: True"):
        Evaluate(own=True, task=TASK)
