"""Runs that go on from others: which weights they start from, in which order they train, and what a kill leaves."""

import json
import math
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans import (
    AdamW,
    BinaryCopy,
    Every,
    Invalid,
    Learned,
    Parity,
    Record,
    Run,
    Store,
    StoreError,
    SwiGLU,
    Transformer,
    driver,
    follow,
    grid,
    load,
    replace,
    spec,
    train,
)
from elegans.driver import prepare
from elegans.sources import code_of
from elegans.specs import from_dict, to_dict
from elegans.study import Study
from elegans.tasks.sampling import prepare as prepare_task
from elegans.training.cohort import group, resolve
from elegans.training.convoy import divide
from elegans.training.cost import parameters
from elegans.training.step import draw_data, initial, params_of, start
from elegans.training.train import Checkpoint
from elegans.training.transfer import depth, inherited, lineage
from elegans.training.vectors import ravel
from helpers import advance, as_arrays
from running import elegans

MODEL = Transformer(layers=1, d_model=8, heads=2, position=Learned())
RECORD = Record(weights=Every(3), evaluate=Every(3), examples=8)
PARENT = Run(BinaryCopy(length=3, split=None), MODEL, AdamW(lr=0.02), batch=4, steps=6, record=RECORD)
CHILD = Run(Parity(length=4, split=None), MODEL, AdamW(lr=0.02), batch=4, steps=6, record=RECORD)
PARENTS = grid(PARENT, {"seed": [0, 1]}) + grid(PARENT, {"optim.lr": [1e38]})  # the last one diverges
TRANSFERS = follow(PARENTS, CHILD)
CONTINUED = [replace(replace(parent, "after", parent), "after_step", 3) for parent in PARENTS]  # one program with the parents
GOES_ON = CONTINUED[1]
SHARED = ["0", "1", ":", "$"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Only the children were asked for."""
    return train([*TRANSFERS, *CONTINUED], tmp_path_factory.mktemp("after") / "store")


def begun(run):
    """Its own initial weights."""
    return jax.tree.map(np.asarray, jax.jit(initial)(as_arrays(run)))


def weights(store, run, step=None):
    return jax.tree.map(np.asarray, load(store, run.id, step).params)


def files(folder: Path):
    kinds = (".safetensors", ".parquet")
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix in kinds or p.name == "status.json"}


# ---- what they start from


def test_shared_symbols_and_positions_are_the_parents_and_the_rest_is_new(store):
    for parent, child in zip(PARENTS[:2], TRANSFERS[:2], strict=True):
        old, new, own = weights(store, parent), weights(store, child, 0), begun(child)
        assert np.array_equal(new["pos_embed"]["W_pos"][:9], old["pos_embed"]["W_pos"])
        assert np.array_equal(new["pos_embed"]["W_pos"][9:], own["pos_embed"]["W_pos"][9:])
        for symbol in CHILD.task.symbols:
            i = CHILD.task.symbols.index(symbol)
            from_parent = symbol in SHARED
            there, j = (old, PARENT.task.symbols.index(symbol)) if from_parent else (own, i)
            assert np.array_equal(new["embed"]["W_E"][i], there["embed"]["W_E"][j])
            assert np.array_equal(new["unembed"]["W_U"][:, i], there["unembed"]["W_U"][:, j])
        for a, b in zip(jax.tree.leaves((new["blocks"], new["ln_final"])), jax.tree.leaves((old["blocks"], old["ln_final"])), strict=True):
            assert np.array_equal(a, b)


def test_fewer_positions_are_the_first_ones():
    long, short = PARENT, replace(PARENT, "task.length", 2)
    theirs, own = (np.arange(parameters(run), dtype=np.float32) for run in (long, short))
    made = params_of(resolve(short), inherited(replace(short, "after", long), -own, theirs))
    old = params_of(resolve(long), theirs)
    assert np.array_equal(made["pos_embed"]["W_pos"], old["pos_embed"]["W_pos"][:7])
    assert np.array_equal(made["embed"]["W_E"], old["embed"]["W_E"])


def test_on_the_parents_task_the_child_starts_with_the_parents_loss(store):
    query = "select run, step, loss, exact_match from metrics where split = 'validation' order by run, step"
    found = {(r["run"], r["step"]): (r["loss"], r["exact_match"]) for r in store.sql(query).to_pylist()}
    assert found[GOES_ON.id, 0] == pytest.approx(found[PARENTS[1].id, 3], rel=1e-6)
    assert found[GOES_ON.id, 0] != pytest.approx(found[PARENTS[1].id, 0], rel=1e-3)


def test_going_on_is_a_new_optimiser_from_old_weights(store):
    """By hand: the child's steps from the parent's vector, with moments of zero and a schedule from its start."""
    run, task = as_arrays(GOES_ON), prepare_task(GOES_ON.task)
    state = start(run, ravel(weights(store, PARENTS[1], 3)))
    assert not any(np.any(m) for m in jax.tree.leaves(state.opt))
    step = jax.jit(lambda run, state, i: advance(run, state, i, draw_data(run, task))[0])
    for i in range(GOES_ON.length):
        state = step(run, state, jnp.int32(i))
    expected = jax.tree.leaves(params_of(run, state.params))
    for a, b in zip(jax.tree.leaves(weights(store, GOES_ON)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_after_a_parent_that_diverged_a_run_has_diverged_at_step_0(store):
    assert PARENTS[2].id in {i for c in store.cohorts() for i in c.status()["diverged"]}
    state = {r["run"]: (r["state"], r["diverged_at"]) for r in store.runs().to_pylist()}
    assert state[TRANSFERS[2].id] == ("diverged", 0)
    assert state[TRANSFERS[0].id] == ("finished", None) == state[TRANSFERS[1].id]
    assert store.sql(f"select * from metrics where run = '{TRANSFERS[2].id}'").num_rows == 0


# ---- parents, their order, and names


def test_parents_are_trained_too_and_stand_before_their_children(store):
    assert {line["run"] for line in store.lines()} == {run.id for run in [*PARENTS, *TRANSFERS, *CONTINUED]}
    assert lineage([*TRANSFERS, *PARENTS]) == [p for pair in zip(PARENTS, TRANSFERS, strict=True) for p in pair]
    assert [depth(run) for run in (PARENT, GOES_ON, replace(CHILD, "after", GOES_ON))] == [0, 1, 2]
    assert [len(members) for members in group([PARENTS[1], GOES_ON, *TRANSFERS])] == [1, 1, 3]  # of two structures


def test_a_share_of_a_study_has_every_structure_with_its_parents():
    alone = replace(PARENT, "model.d_model", 4)
    (first, second) = divide([*TRANSFERS, GOES_ON, alone], 2)
    assert {run.id for run in first} == {run.id for run in lineage([*TRANSFERS, GOES_ON])} and second == [alone]


def test_a_costly_structure_is_divided_and_children_stay_with_their_parents():
    large = replace(replace(PARENT, "model.d_model", 64), "steps", 90_000)  # long enough, of enough replicas, for arithmetic to cost
    parents = grid(replace(large, "batch", 512), {"seed": range(40)})
    runs = [*parents, *follow(parents, replace(large, "batch", 512))]
    halves = divide(runs, 2)
    assert [len(half) for half in halves] == [40, 40] and {run.id for half in halves for run in half} == {run.id for run in runs}
    assert all(run.after is None or run.after in half for half in halves for run in half)
    few = grid(replace(PARENT, "steps", 90_000), {"seed": range(4)})
    assert divide(few, 2) == [few, []]  # half of a small cohort takes as long


def test_names_hang_on_the_parent_only_where_there_is_one():
    assert len({r.id for r in [CHILD, *TRANSFERS, replace(TRANSFERS[0], "after_step", 3)]}) == 5
    assert not {"after", "after_step", "trained"} & to_dict(CHILD).keys()
    assert from_dict(Run, json.loads(json.dumps(to_dict(GOES_ON)))) == GOES_ON
    assert jax.tree.structure(resolve(TRANSFERS[0])) == jax.tree.structure(resolve(CHILD))


def test_seeds_of_parent_and_child_are_swept_together_or_apart():
    child = replace(CHILD, "after", PARENT)
    assert [(r.seed, r.after.seed) for r in grid(child, {"seed+after.seed": [0, 1]})] == [(0, 0), (1, 1)]
    assert [(r.seed, r.after.seed) for r in grid(child, {"seed": [0, 1]})] == [(0, 0), (1, 0)]
    assert grid(child, {"seed+after.seed": [0, 1]}) == TRANSFERS[:2]


def test_overrides_of_a_study_reach_the_parents() -> None:
    """Children keep the parents of their own seed, and no run of the old length is left to stand beside the new ones."""
    study = Study([*PARENTS[:2], *TRANSFERS[:2]]).override({"seed": [0, 1], "steps": [3]})
    assert len(study.runs) == len(lineage(study.runs)) == 4 and {run.length for run in study.runs} == {3}
    assert [(run.seed, run.after.seed) for run in study.runs if run.after] == [(0, 0), (1, 1)]
    alone = Study(TRANSFERS[:1]).override({"steps": [3]}).runs[0]
    assert (alone.steps, alone.after) == (3, PARENTS[0])  # a parent that the study does not ask for stays
    later = Study(TRANSFERS[:1]).override({"after_step": [3]}).runs[0]
    assert (later.after_step, later.after) == (3, PARENTS[0])


def test_an_edited_component_of_the_parent_is_noticed():
    @spec
    class Wide(SwiGLU):
        gain: float = 1.0

    parent = replace(PARENT, "model.mlp", Wide())
    assert set(code_of(replace(CHILD, "after", parent))["classes"]) == {Wide.__qualname__}


# ---- kills


def test_a_child_that_was_killed_goes_on_with_the_same_bits(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "store")
    copy, before = Store(tmp_path / "store"), files(store.path)
    child, line = copy.find(TRANSFERS[0].id)
    assert line["slot"] == child.lines().index(next(at for at in child.lines() if at["run"] == TRANSFERS[0].id))
    for path in [p for p in child.path.iterdir() if p.suffix in (".parquet", ".safetensors") or p.name == "status.json"]:
        path.unlink()  # killed before its first checkpoint
    train(TRANSFERS, copy.path)
    assert files(copy.path) == before


def test_a_child_past_its_first_checkpoint_does_not_need_its_parent(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "store")
    copy, before = Store(tmp_path / "store"), files(store.path)
    child, parent = (copy.find(run.id)[0] for run in (TRANSFERS[0], PARENTS[0]))
    stop_after_a_checkpoint(copy, child)
    for path in parent.path.glob("*.safetensors"):
        path.unlink()
    train(TRANSFERS, copy.path)
    assert {n: b for n, b in files(copy.path).items() if child.id in n} == {n: b for n, b in before.items() if child.id in n}


def test_a_diverged_run_has_no_final_weights_to_load_or_export(store, tmp_path):
    diverged = PARENTS[2].id
    assert store.find(diverged)[0].status()["diverged"][diverged] > 0
    with pytest.raises(Invalid, match="diverged"):
        load(store, diverged)
    assert load(store.path, diverged, 0).step == 0  # recorded before it diverged; a store may be named by its folder
    refused = elegans("export", store.path, diverged, tmp_path / "out")
    assert refused.status == 2 and "diverged" in refused.err and not (tmp_path / "out").exists()
    assert elegans("export", store.path, PARENTS[0].id, tmp_path / "out").status == 0


def stop_after_a_checkpoint(store, cohort):
    """Train a cohort anew, and end at a checkpoint half-way."""

    def listener(stage, event):
        if stage == "event" and isinstance(event, Checkpoint) and event.step == 3:
            raise KeyboardInterrupt

    for path in [p for p in cohort.path.iterdir() if p.suffix in (".parquet", ".safetensors") or p.name == "status.json"]:
        path.unlink()
    with pytest.raises(KeyboardInterrupt), mock.patch.object(driver, "CHECKPOINT_SHARE", math.inf):  # every checkpoint is written
        train(TRANSFERS, store.path, listener=listener)
    assert cohort.status()["step"] == 3


# ---- what is refused


MISFITS = {
    "a width": ({"model.d_model": 4}, ["blocks.0.attn.W_K [2, 4, 2]", "[2, 8, 4]"]),
    "fewer layers here": ({"model.layers": 2}, ["blocks.1.attn.W_K [2, 8, 4]", "this run's is none"]),
    "positions of another kind": ({"model.position": "rotary"}, ["pos_embed.W_pos none", "[11, 8]"]),
    "something tied": ({"model.tied": True}, ["unembed.W_U none"]),
}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(name, tmp_path):
    changes, said = MISFITS[name]
    (parent,) = grid(PARENT, {path: [value] for path, value in changes.items()})
    with pytest.raises(Invalid, match="after") as found:
        prepare([replace(CHILD, "after", parent)], tmp_path / "store")
    assert all(word in str(found.value) for word in said), str(found.value)
    assert not (tmp_path / "store").exists()


def test_steps_that_the_parent_does_not_keep():
    with pytest.raises(Invalid, match=r"after_step: 4 .* 0, 3, 6"):
        replace(TRANSFERS[0], "after_step", 4)
    with pytest.raises(Invalid, match="give its parent"):
        replace(CHILD, "after_step", 0)


def test_weights_that_the_store_lacks(store, tmp_path):
    shutil.copytree(store.path, tmp_path / "store")
    for path in (tmp_path / "store").rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(StoreError, match=r"merge an archive made with --weights"):
        prepare([replace(TRANSFERS[0], "steps", 5)], tmp_path / "store")


def test_parents_in_yaml_are_planned_too(tmp_path):
    (tmp_path / "pair.yaml").write_text(
        """
run:
  task: {kind: parity, length: 4}
  model: &model {kind: transformer, layers: 1, d_model: 8, heads: 2}
  batch: 4
  steps: 5
  after: {task: {kind: binary_copy, length: 4}, model: *model, batch: 4, steps: 7}
sweep:
  seed+after.seed: [0, 1]
"""
    )
    answer = elegans("run", tmp_path / "pair.yaml", "--plan", "--json", "--store", tmp_path / "store")
    assert answer.status == 0, answer.err
    rows = json.loads(answer.out)
    assert [(row["runs"], row["steps"]) for row in rows] == [(2, 7), (2, 5), (4, 12)]
