"""A cohort is nothing but its runs: same data, same starts, no influence on one another, whatever the order or the chunks.

Sizes: six replicas of a one-layer, eight-wide transformer on three-bit addition, so that a program compiles in seconds.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans import (
    AdamW,
    Addition,
    Attention,
    Cosine,
    Curriculum,
    Invalid,
    Parity,
    Run,
    Split,
    Transformer,
    Update,
    field,
    grid,
    replace,
    spec,
    varies,
)
from elegans.tasks.sampling import prepare
from elegans.training.cohort import CHUNK, Programs, group, resolve, share, stack
from elegans.training.evaluation import HeldOut, check_scored, evaluate
from elegans.training.planner import plan
from elegans.training.step import draw_batch, draw_data, start
from elegans.types import Example
from helpers import as_arrays

STEPS = 20
MEMORY = 2**30  # bytes
SOLO_TOLERANCE = 2e-5  # nats, on the losses of the first 20 fp32 steps; measured: 5e-7


def tiny(**changes) -> Run:
    """The run that all cohorts here are made of."""
    model = Transformer(layers=1, d_model=8, heads=2)
    run = Run(Addition(length=3), model, AdamW(lr=1e-2, schedule=Cosine(warmup=0.1, start=0.01)), batch=4, steps=STEPS)
    return dataclasses.replace(run, **changes)


def six() -> list[Run]:
    """Six runs that differ in leaves alone."""
    return [
        replace(replace(tiny(seed=seed), "optim.lr", lr), "optim.weight_decay", decay)
        for seed, lr, decay in [(0, 1e-2, 0.1), (1, 3e-3, 0.1), (2, 1e-2, 0.0), (2, 1e-2, 0.1), (7, 1e-1, 0.1), (11, 1e-4, 0.3)]
    ]


COMPILED: dict[object, Programs] = {}


def programs_for(runs: list[Run]) -> Programs:
    """The programs of a structure at a size, compiled once for this whole file; the runs are their input."""
    key = (jax.tree.structure(resolve(runs[0])), len(runs))
    if key not in COMPILED:
        COMPILED[key] = Programs(runs, jax.devices()[0])
    made = COMPILED[key]
    made.runs = jax.device_put(stack(runs), jax.tree.map(lambda leaf: leaf.sharding, made.runs))
    return made


def train(runs: list[Run], chunks: tuple[int, ...] = (STEPS,)) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Parameters [replica, parameter], steps of divergence [replica] and metrics [step, replica]."""
    return trained(programs_for(runs), chunks)


def trained(programs: Programs, chunks: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """As `train`, by programs at hand."""
    states, step, parts = programs.start(), 0, []
    for steps in chunks:
        states, metrics = programs.chunk(states, step, steps)
        parts.append(metrics)
        step += steps
    metrics = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.asarray(states.params), np.asarray(states.diverged), metrics


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the last bit, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def plain() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    return train(six())


# ---- isolation


def test_a_diverging_run_is_recorded_and_changes_no_bit_of_its_neighbours(plain) -> None:
    runs = six()
    runs[3] = replace(runs[3], "optim.lr", 1e6)  # decay alone multiplies its weights by -1e5 a step
    params, diverged, metrics = train(runs)
    others = [0, 1, 2, 4, 5]
    assert 0 < diverged[3] < STEPS
    assert (diverged[others] == -1).all()
    assert same_bits(params[others], plain[0][others])
    for name, values in metrics.items():
        assert same_bits(values[:, others], plain[2][name][:, others]), name


def test_divergence_is_the_first_step_with_something_not_finite_and_the_run_stops_there() -> None:
    runs = six()
    runs[3] = replace(runs[3], "optim.lr", 1e6)
    _, diverged, metrics = train(runs)
    at = int(diverged[3])
    loss, norm = metrics["loss"][:, 3], metrics["grad_norm"][:, 3]
    assert np.isfinite(loss[:at]).all() and np.isfinite(norm[:at]).all()
    assert np.isnan(loss[at + 1 :]).all() and np.isnan(norm[at + 1 :]).all()
    earlier, earlier_diverged, _ = train(runs, (at + 1,))
    later, _, _ = train(runs, (at + 1, STEPS - at - 1))
    assert earlier_diverged[3] == at
    assert same_bits(earlier[3], later[3])
    before, none_yet, _ = train(runs, (at,))
    assert none_yet[3] == -1 and np.isfinite(before[3]).all()
    assert not (np.isfinite(loss[at]) and np.isfinite(norm[at]) and np.isfinite(later[3]).all())


def test_runs_of_equal_seed_and_data_but_other_weight_decay_draw_alike_and_part_ways(plain) -> None:
    params, _, metrics = plain
    assert metrics["loss"][0, 2] == metrics["loss"][0, 3]  # same seed: same start, same first batch
    assert not np.array_equal(params[2], params[3])


# ---- what a run does not depend on


def test_the_order_of_runs_changes_no_bit(plain) -> None:
    order = [4, 2, 0, 5, 3, 1]
    params, diverged, metrics = train([six()[i] for i in order])
    assert same_bits(params, plain[0][order]) and same_bits(diverged, plain[1][order])
    for name, values in metrics.items():
        assert same_bits(values, np.ascontiguousarray(plain[2][name][:, order])), name


@pytest.mark.parametrize("chunks", [(7, 1, 12), (1,) * STEPS], ids=["7-1-12", "one by one"])
def test_the_length_of_chunks_changes_no_bit(plain, chunks) -> None:
    params, _, metrics = train(six(), chunks)
    assert same_bits(params, plain[0])
    for name, values in metrics.items():
        assert same_bits(values, plain[2][name]), name


@spec
class Noting(Update):
    """Records which step it is, and a number of the batch that it gets."""

    def apply(self, run, state, batch, step, key):
        state, metrics = super().apply(run, state, batch, step, key)
        return state, metrics | {"step": step, "mark": mark(batch)}


def mark(batch: Example) -> jax.Array:
    """A number that other rows, scores or weights would change: exact in float32."""
    places = jnp.arange(1, batch.tokens.size + 1).reshape(batch.tokens.shape)
    return (places * (batch.tokens + 7 * batch.scored + (0 if batch.weights is None else 2 * batch.weights))).sum()


STAGES = (Parity(length=3, shortest=2, final_weight=2.0, split=None), Parity(length=3, final_weight=3.0, split=None))
DRAWS = {
    "fresh rows": {},
    "a finite set": {"train_set": 10},
    "rows and weights by the share of the run": {"task": Curriculum(tasks=STAGES, ends=(0.4,))},
}


@pytest.mark.parametrize("changes", DRAWS.values(), ids=DRAWS)
def test_however_many_batches_are_drawn_at_once_every_step_takes_its_own(changes, monkeypatch) -> None:
    """The rows exactly; the weights to rounding, since another program may add in another order: unoptimised, as here, it does."""
    runs = [dataclasses.replace(run, update=Noting(), **changes) for run in six()]
    one_by_one = trained(Programs(runs, jax.devices()[0]), (STEPS,))
    monkeypatch.setattr(Programs, "ahead", 3)
    programs = Programs(runs, jax.devices()[0])
    params, diverged, metrics = trained(programs, (STEPS,))
    task = prepare(runs[0].task)
    own = jax.jit(lambda run: jax.lax.map(lambda step: mark(draw_batch(run, step, draw_data(run, task))), jnp.arange(STEPS)))
    assert np.array_equal(metrics["mark"], np.stack([own(as_arrays(run)) for run in runs], 1))
    assert np.array_equal(metrics["step"], np.repeat(np.arange(STEPS)[:, None], len(runs), 1))
    assert all(same_bits(metrics[name], one_by_one[2][name]) for name in ("mark", "step"))
    assert len(np.unique(metrics["mark"])) > STEPS
    assert np.allclose(metrics["loss"], one_by_one[2]["loss"], atol=1e-3)  # a learning rate of 0.1 makes 3e-5 of what was 1e-7
    assert np.allclose(params, one_by_one[0], atol=1e-3)
    for chunks in ((7, 1, 12), (1,) * STEPS):
        again = trained(programs, chunks)
        assert same_bits(again[0], params) and same_bits(again[1], diverged)
        assert all(same_bits(again[2][name], values) for name, values in metrics.items())


def test_training_twice_gives_the_same_bits(plain) -> None:
    params, _, metrics = train(six())
    assert same_bits(params, plain[0]) and same_bits(metrics["loss"], plain[2]["loss"])


def test_a_run_draws_the_same_data_alone_and_in_a_cohort() -> None:
    runs = six()
    programs = programs_for(runs)
    together = jax.jit(jax.vmap(draw_batch, (0, None, None)))
    alone = jax.jit(draw_batch)
    for step in (0, 1, 13):
        batches = together(programs.runs, np.int32(step), programs.data)
        for i, run in enumerate(runs):
            one = alone(as_arrays(run), np.int32(step), programs.data)
            assert jax.tree.all(jax.tree.map(lambda a, b, i=i: np.array_equal(a[i], b), batches, one))


def test_a_run_starts_from_the_same_weights_alone_and_in_a_cohort() -> None:
    together = programs_for(six()).start().params
    for i, run in enumerate(six()):
        assert same_bits(np.asarray(together[i]), np.asarray(programs_for([run]).start().params[0]))


def test_losses_of_runs_alone_and_in_a_cohort_agree_to_rounding(plain) -> None:
    for i in (0, 3, 5):
        _, _, metrics = train([six()[i]])
        assert np.abs(metrics["loss"][:, 0] - plain[2]["loss"][:, i]).max() < SOLO_TOLERANCE


# ---- lengths


def test_a_run_past_its_last_step_stands_still(plain) -> None:
    runs = six()
    runs[1] = dataclasses.replace(runs[1], steps=5)
    at_five, _, _ = train(runs, (5,))
    params, diverged, metrics = train(runs)
    assert same_bits(params[1], at_five[1])
    assert (diverged == -1).all()
    assert all(np.isfinite(v[:5, 1]).all() and np.isnan(v[5:, 1]).all() for v in metrics.values())
    others = [0, 2, 3, 4, 5]
    assert same_bits(params[others], plain[0][others])


# ---- grouping and stacking


def test_runs_that_differ_in_leaves_share_a_cohort_and_structure_parts_them() -> None:
    run = tiny()
    leaves = grid(run, {"optim.lr": [1e-3, 1e-2], "optim.schedule.end": [0, 0.1], "seed": range(2), "steps": [5, 20]})
    assert [len(g) for g in group(leaves)] == [16]
    parts = grid(run, {"model.d_model": [8, 16], "batch": [4, 8], "task.length": [3, 4]})
    assert [len(g) for g in group(parts)] == [1] * 8
    mixed = [leaves[0], parts[-1], leaves[1], replace(parts[-1], "seed", 5)]
    assert group(mixed) == [[mixed[0], mixed[2]], [mixed[1], mixed[3]]]


def test_lengths_seeds_and_labels_given_in_other_words_share_a_cohort() -> None:
    by_rows = dataclasses.replace(tiny(), steps=None, examples=4 * STEPS)
    named = dataclasses.replace(tiny(), label="mine", data_seed=3, init_seed=4)
    assert len(group([tiny(), by_rows, named])) == 1
    assert resolve(by_rows).steps == STEPS


def test_stacking_keeps_every_leaf_of_every_run() -> None:
    runs = six()
    stacked = stack(runs)
    assert np.array_equal(stacked.optim.lr, np.float32([r.optim.lr for r in runs]))
    assert np.array_equal(stacked.seed, [r.seed for r in runs])
    assert np.array_equal(stacked.data_seed, stacked.seed)
    assert np.array_equal(stacked.steps, [STEPS] * 6)
    assert stacked.seed.dtype == np.int32 and stacked.optim.weight_decay.dtype == np.float32


def test_tables_are_shared_where_equal_and_stacked_where_not() -> None:
    alike, axes = share(six())
    assert axes.table is None and alike.table.shape == (36,)  # 8 * 9 / 2 unordered pairs
    mixed = [tiny(), dataclasses.replace(tiny(), task=Addition(length=3, split=Split(0.5, 0.25)))]
    tables, axes = share(mixed)
    assert axes.table == 0 and [np.bincount(t).tolist() for t in tables.table] == [[32, 2, 2], [18, 9, 9]]


def test_a_finite_training_set_is_the_runs_own() -> None:
    runs = [dataclasses.replace(tiny(), train_set=6, seed=s) for s in (0, 1)]
    programs = Programs(runs, jax.devices()[0])
    for i, run in enumerate(runs):
        alone = jax.jit(draw_data)(as_arrays(run), programs.task)
        assert np.array_equal(programs.data.finite.tokens[i], alone.finite.tokens)
    assert not np.array_equal(*programs.data.finite.tokens)


# ---- other compute types, and custom code


def test_bfloat16_trains() -> None:
    runs = [replace(tiny(seed=s, steps=CHUNK), "model.dtype", "bfloat16") for s in range(6)]
    _, diverged, metrics = train(runs, (CHUNK,))
    loss = metrics["loss"]
    assert (diverged == -1).all()
    assert (loss[-20:].mean(0) < loss[:20].mean(0) - 0.2).all()


@spec
class Gained(Attention):
    """A user's component with a float of its own."""

    gain: float = field(1.0, "factor on the output")

    def apply(self, params, x, context):
        return self.gain * super().apply(params, x, context)


@spec
class Branching(Attention):
    """A user's mistake: Python cannot decide by a number that varies inside a cohort."""

    gain: float = field(1.0, "factor on the output")
    rounds: int = varies(1, "times")
    way: Literal["if", "float", "range", "numpy"] = field("if", "how the mistake is made")

    def apply(self, params, x, context):
        if self.way == "if":
            return x if self.gain > 0.5 else super().apply(params, x, context)
        if self.way == "range":
            return sum(super(Branching, self).apply(params, x, context) for _ in range(self.rounds))
        return (float if self.way == "float" else np.asarray)(self.gain) * super().apply(params, x, context)


def test_a_users_new_float_can_be_swept_inside_a_cohort() -> None:
    run = replace(tiny(), "model.attention", Gained())
    runs = grid(run, {"model.attention.gain": [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]})
    assert len(group(runs)) == 1
    assert len(plan(runs, MEMORY)) == 1
    first = train(runs, (1,))[2]["loss"][0]
    assert len(set(first.tolist())) == 6


@pytest.mark.parametrize(("way", "leaf"), [("if", "gain"), ("float", "gain"), ("range", "rounds"), ("numpy", "gain")])
def test_deciding_by_a_leaf_is_an_error_of_one_line_that_names_the_field(way, leaf) -> None:
    run = replace(tiny(), "model.attention", Branching(way=way))
    with pytest.raises(Invalid, match=rf"^model\.attention\.{leaf}: .*branched on") as caught:
        plan([run], MEMORY)
    assert "\n" not in str(caught.value)


def test_a_held_out_set_of_nothing_is_refused_and_scores_nothing():
    """No metric is 0 that nobody measured."""
    run = resolve(tiny())
    nothing = Example(np.zeros((4, run.task.positions), np.int32), np.zeros((4, run.task.positions), bool))
    vector = jax.jit(lambda: start(run).params)()
    assert all(np.isnan(scores).all() for scores in jax.jit(lambda: evaluate(run, vector, nothing))())
    some = dataclasses.replace(nothing, scored=~nothing.scored)
    sets = HeldOut(*(jax.tree.map(lambda *a: np.stack(a), some, rows) for rows in (some, nothing)))  # two runs; the second has no test rows
    with pytest.raises(Invalid, match=r"^split: 'test' "):
        check_scored(sets)
    check_scored(sets._replace(test=sets.validation))
