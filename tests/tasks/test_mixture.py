"""Mixtures and curricula: whose rows are drawn, that they stay what their task made them, and that nothing leaks."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles_iteration import EOI, EOS, row
from scipy.stats import chi2

from elegans import (
    AdamW,
    Addition,
    BinaryCopy,
    Curriculum,
    Invalid,
    Mixture,
    Parity,
    Polynomial,
    Record,
    Run,
    ShortestPath,
    Split,
    Transformer,
    grid,
    identity,
    train,
)
from elegans.loading import load_study
from elegans.specs import from_dict, to_dict
from elegans.tasks.base import PARTS
from elegans.tasks.sampling import draw_set, prepare, train_batch
from elegans.training.cohort import group
from elegans.types import Example
from helpers import leaves
from running import elegans

COPY, PARITY, POLYNOMIAL = (
    BinaryCopy(length=4, split=None),
    Parity(length=6, split=None),
    Polynomial(length=3, split=None, final_weight=2.0),
)
THREE = Mixture(tasks=(COPY, PARITY, POLYNOMIAL), weights=(1.0, 0.0, 3.0), tag=True)
ROWS = 2000


@pytest.fixture(scope="module")
def three() -> Example:
    return jax.tree.map(np.asarray, jax.jit(lambda key: train_batch(THREE, key, ROWS, 0, 0.0, prepare(THREE)))(jax.random.key(0)))


def test_symbols_of_one_text_are_one() -> None:
    assert Mixture(tasks=(PARITY, COPY)).symbols == ("0", "1", "P", ":", "$", "C")
    assert set(THREE.symbols) == {*map(str, range(11)), *"CPF:$", "<binary_copy>", "<parity>", "<polynomial>"}
    assert Curriculum(tasks=(Parity(length=4), Parity(length=8)), tag=True).symbols[-2:] == ("<parity1>", "<parity2>")


def test_weights_are_the_tasks_shares_and_a_weight_of_0_is_never_drawn(three) -> None:
    counts = np.bincount(three.truth["task"].values[:, 0], minlength=3)
    assert counts[1] == 0
    assert chi2.sf(((counts[[0, 2]] - [ROWS / 4, 3 * ROWS / 4]) ** 2 / [ROWS / 4, 3 * ROWS / 4]).sum(), 1) > 1e-4


def test_every_row_is_what_its_own_task_makes_of_its_inputs(three) -> None:
    for i in range(200):
        which = int(three.truth["task"].values[i, 0])
        task = THREE.tasks[which]
        symbols = [THREE.symbols[t] for t in three.tokens[i]]
        x = [int(s) for s in symbols[2 : symbols.index(EOI)]]
        expected = row(task.kind, x, task.length)
        rest = THREE.positions - 1 - len(expected.symbols)
        assert symbols == [f"<{task.kind}>", *expected.symbols] + [EOS] * rest
        assert three.scored[i].tolist() == [False, *expected.scored] + [False] * rest
        last = symbols.index(EOS) - 1
        assert three.weights[i].tolist() == [2.0 if which == 2 and p == last else 1.0 for p in range(THREE.positions)]
        assert three.truth["task"].positions[i, 0] == symbols.index(EOI)
        for j, own in enumerate(THREE.tasks):  # binary states here, classes there: a feature each
            found = three.truth[f"{own.kind}.state"]
            there = found.positions[i] >= 0
            assert found.positions[i][there].tolist() == ([p + 1 for p in expected.reads] if j == which else [])
            assert found.values[i][there].tolist() == (expected.states if j == which else [])


def test_truth_of_one_kind_is_one_feature_as_long_as_the_longest() -> None:
    task = Mixture(tasks=(COPY, PARITY))
    truth = jax.eval_shape(lambda key: task.sample(key, prepare(task).prepared).truth, jax.random.key(0))
    assert set(truth) == {"input", "state", "step", "task"}
    assert truth["state"].values.shape == (6,) and (truth["step"].classes, truth["task"].classes) == (6, 2)


@pytest.mark.slow
def test_tasks_of_other_families_mix() -> None:
    task = Mixture(tasks=(Addition(length=3), ShortestPath(vertices=3, split=None)), tag=True)
    rows = jax.jit(lambda key: train_batch(task, key, 32, 0, 0.0, prepare(task)))(jax.random.key(0))
    texts = {task.text(tokens).split()[0] for tokens in rows.tokens}
    assert texts == {"<addition>", "<shortest_path>"} and rows.scored.any(1).all()
    assert {"carry", "first_operand", "task"} < set(rows.truth)


# ---- losses


def test_losses_are_means_over_tokens() -> None:
    copy, parity = BinaryCopy(length=4), Parity(length=6, cot=False)
    for weights in ((1.0, 3.0), (0.0, 1.0), (5.0, 0.0)):
        task = Mixture(tasks=(copy, parity), weights=weights)
        w = np.array(weights) / sum(weights)
        tokens = w @ [5, 2]
        assert math.isclose(task.scored_tokens(), tokens) and math.isclose(task.mean_positions(), w @ [11, 10])
        assert task.floor() == 0 and math.isclose(task.plateau(), w @ [4 * math.log(2), math.log(2)] / tokens)


def test_a_loss_is_unknown_where_a_row_may_not_tell_its_task() -> None:
    same = (Parity(length=6), Parity(length=6, cot=False))
    assert Mixture(tasks=same).floor() is None and Mixture(tasks=same).plateau() is None
    assert Mixture(tasks=same, tag=True).floor() == 0
    assert Mixture(tasks=same, weights=(0.0, 1.0)).floor() == 0


# ---- curricula


@pytest.mark.parametrize("keep", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stages_begin_where_the_one_before_ends(keep) -> None:
    lengths = (2, 4, 6)
    task = Curriculum(tasks=tuple(Parity(length=n, split=None) for n in lengths), ends=(0.25, 0.5), keep=keep)
    draw = jax.jit(jax.vmap(lambda p: train_batch(task, jax.random.key(0), 300, 0, p, prepare(task)), 0))
    moments = [0.0, 0.2499, 0.25, 0.4999, 0.5, 1.0]
    tokens = np.asarray(draw(jnp.array(moments)).tokens)
    for stage, rows in zip((0, 0, 1, 1, 2, 2), tokens, strict=True):
        found = np.bincount([tokens.index(3) - 1 for tokens in rows.tolist()], minlength=7)
        allowed = list(lengths[: stage + 1]) if keep else [lengths[stage]]
        assert found[allowed].sum() == 300 and (np.abs(found[allowed] - 300 / len(allowed)) < 60).all()
    assert math.isclose(task.mean_positions(), sum(w * (2 * n + 3) for w, n in zip(_durations(keep), lengths, strict=True)))


def _durations(keep: bool) -> list[float]:
    """Share of a run's rows that are each task's: a quarter, a quarter and a half of it, or spread over those seen so far."""
    return [1 / 4 + 1 / 8 + 1 / 6, 1 / 8 + 1 / 6, 1 / 6] if keep else [1 / 4, 1 / 4, 1 / 2]


def test_what_is_held_out_is_the_last_task() -> None:
    task = Curriculum(tasks=(Polynomial(length=4), Parity(length=8)), split=Split(0.5, 0.2))
    rows = jax.jit(lambda key: draw_set(task, "test", key, 64, prepare(task)))(jax.random.key(0))
    assert {task.symbols[t] for t in np.asarray(rows.tokens)[:, 0]} == {"P"} and rows.scored.any(1).all()
    assert (task.floor(), task.plateau(), task.scored_tokens()) == (0, Parity(length=8).plateau(), 9)


# ---- splits


def contents(task: Mixture, rows: Example) -> set[tuple[str, ...]]:
    """Prompts as text: two rows of one prompt are one content here."""
    texts = [[task.symbols[t] for t in tokens] for tokens in np.asarray(rows.tokens)]
    return {tuple(t[: t.index(EOI)]) for t in texts}


OVERLAPPING = (Parity(length=5, shortest=1, split=Split(0.5, 0.25)), Parity(length=7, shortest=3, cot=False, split=Split(0.5, 0.25)))


@pytest.mark.parametrize(
    "task",
    [
        Mixture(tasks=(BinaryCopy(length=6, split=Split(0.6, 0.2, key=3)), *OVERLAPPING), weights=(1.0, 1.0, 2.0)),
        pytest.param(Curriculum(tasks=OVERLAPPING, keep=True), marks=pytest.mark.slow),
    ],
    ids=["mixture", "curriculum"],
)
def test_no_content_is_in_two_parts(task) -> None:
    data = prepare(task)

    def draw(key: jax.Array) -> list[Example]:
        return [train_batch(task, key, 1000, 0, 1.0, data), *(draw_set(task, part, key, 400, data) for part in PARTS[1:])]

    sets = jax.jit(draw)(jax.random.key(0))
    found = {part: contents(task, rows) for part, rows in zip(PARTS, sets, strict=True)}
    assert all(rows.scored.any(1).all() for rows in sets) and all(found.values())
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not found[a] & found[b]
    assert len({len(c) for c in found["train"]}) > 1


@pytest.mark.slow
def test_weights_hold_in_held_out_sets_however_much_the_parts_differ() -> None:
    task = Mixture(tasks=(BinaryCopy(length=10, split=Split(0.2, 0.1)), Parity(length=10, split=Split(0.6, 0.2))))
    data = prepare(task)
    test, fresh = jax.jit(lambda key: (draw_set(task, "test", key, 1000, data), train_batch(task, key, 1000, 0, 0.0, data)))(
        jax.random.key(0)
    )
    for rows in (test, fresh):
        assert rows.scored.any(1).all() and abs(np.asarray(rows.truth["task"].values).mean() - 0.5) < 0.06


def test_lengths_in_common_need_one_split() -> None:
    with pytest.raises(Invalid, match=r"^split: .* one for all tasks of kind parity that have lengths in common"):
        Mixture(tasks=(Parity(length=8), Parity(length=8, cot=False, split=Split(key=1))))
    task = Mixture(tasks=(Parity(length=8), Parity(length=8, cot=False, split=Split(key=1))), split=Split(0.7, 0.2))
    assert all(part.split == Split(0.7, 0.2) for part in task.parts)


# ---- errors, YAML, runs


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        (Mixture, {"tasks": ()}, r"^tasks: \[\] is not allowed; allowed: one task or more"),
        (Mixture, {"weights": (1.0,)}, r"^weights: \[1.0\] is not allowed; allowed: one for each of 2 tasks"),
        (Mixture, {"weights": (0.0, 0.0)}, r"^weights: .* at least one above 0"),
        (Mixture, {"weights": (-1.0, 2.0)}, r"^weights: .*>= 0"),
        (Mixture, {"tasks": (Mixture(), Parity())}, r"^tasks\[0\]: .* drawn one by one"),
        (Curriculum, {"ends": ()}, r"^ends: .* one for each of 2 tasks but the last"),
        (Curriculum, {"ends": (1.5,)}, r"^ends: .*<= 1"),
        (Curriculum, {"tasks": (COPY, PARITY, POLYNOMIAL), "ends": (0.5, 0.2)}, r"^ends: .* ascending"),
    ],
)
def test_bad_mixtures_are_refused(kind, fields, said) -> None:
    with pytest.raises(Invalid, match=said):
        kind(**fields)


MODEL = Transformer(layers=1, d_model=8, heads=1)


def test_a_finite_set_cannot_stand_for_a_curriculum() -> None:
    with pytest.raises(Invalid, match=r"^train_set: 64 is not allowed; a curriculum draws other rows as it goes"):
        Run(Curriculum(), MODEL, steps=3, train_set=64)


def test_weights_and_ends_are_leaves_and_survive_plain_data() -> None:
    run = Run(Mixture(tasks=(COPY, PARITY)), MODEL, steps=3)
    runs = grid(run, {"task.weights": [[0.1, 0.9], (0.5, 0.5)], "seed": range(2)})
    assert len(group(runs)) == 1 and len({identity(r) for r in runs}) == 4
    assert leaves(runs[0])["task.weights.0"] == 0.1 and isinstance(leaves(runs[0])["task.weights.1"], float)
    assert all(from_dict(Run, json.loads(json.dumps(to_dict(r)))) == r for r in runs)
    staged = grid(Run(Curriculum(), MODEL, steps=3), {"task.ends": [[0.1], [0.7]]})
    assert len(group(staged)) == 1


def test_a_cohort_of_other_weights_trains_and_its_weights_matter(tmp_path) -> None:
    run = Run(Mixture(tasks=(COPY, PARITY)), MODEL, AdamW(lr=1e-2), batch=16, steps=10, record=Record(examples=16))
    runs = grid(run, {"task.weights": [(0.0, 1.0), (0.9, 0.1)]})
    store = train(runs, tmp_path / "store")
    rows = store.sql("select run, loss from metrics where split = 'train' order by run, step")
    assert len(store.sql("select distinct cohort from runs")) == 1
    losses = [[loss for r, loss in zip(*(rows[c].to_pylist() for c in ("run", "loss")), strict=True) if r == run.id] for run in runs]
    assert len(losses[0]) == len(losses[1]) > 3 and losses[0] != losses[1]
    assert store.sql('select distinct "task.weights" w from runs order by w')["w"].to_pylist() == ["[0.0, 1.0]", "[0.9, 0.1]"]


EXAMPLE = Path(__file__).parents[2] / "examples" / "transfer.yaml"


def test_a_curriculum_in_yaml_is_read_and_a_mixture_shown() -> None:
    runs = load_study(str(EXAMPLE)).runs
    assert {run.task.ends for run in runs} == {(0.0,), (0.2,), (0.5,)} and runs[0].task.tasks[0] == Polynomial(length=6, shortest=1)
    shown = json.loads(elegans("show", "mixture", "weights=0.2,0.8", "--json").out)
    assert shown["vocab"] == ["0", "1", "C", ":", "$", "P"] and shown["floor"] == 0


@pytest.mark.slow
def test_a_curriculum_in_yaml_trains(tmp_path) -> None:
    done = elegans("run", EXAMPLE, "steps=10", "--store", tmp_path / "store", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)[0]["finished"] == 6
