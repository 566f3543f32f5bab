"""Cohorts that train together: each run is what it is alone, but for rounding, and is stored, stopped and resumed by itself."""

import dataclasses
import functools
import gc
import itertools
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest

import elegans as el
from elegans import driver
from elegans.folder import Writer
from elegans.store import Store
from elegans.training.ahead import Ahead
from elegans.training.cohort import Programs
from elegans.training.convoy import Convoy, alike, divide, form, gather
from elegans.training.cost import RATES, Rates, rates_of, seconds
from elegans.training.joint import Joint
from elegans.training.planner import plan
from elegans.training.train import Rows, train_convoy

GPU, MEMORY = RATES["gpu"], 2**34
EAGER = Rates(GPU.width, GPU.most, GPU.layer, 0.0)  # compiles for nothing: every cohort is left as it ends
RUN = el.Run(
    el.Addition(length=3),
    el.Transformer(layers=1, d_model=8, heads=2, position=el.Learned()),
    el.AdamW(lr=1e-2),
    batch=4,
    steps=24,
    record=el.Record(train=el.Every(4), evaluate=el.At((8,)), weights=el.At((8,)), examples=8),
)
TASKS = (el.Addition(length=3), el.MaximumSubarray(length=4), el.Majority(length=2))  # of 5, 21 and 5 symbols; of 13, 10 and 7 tokens


@functools.cache
def runs() -> list[el.Run]:
    """One long run of addition, and four shorter ones of each of the others, which are left when they end."""
    lengths = {"addition": (24, 1), "maximum_subarray": (12, 4), "majority": (6, 4)}
    made = [el.replace(el.replace(RUN, "task", task), "steps", lengths[task.kind][0]) for task in TASKS]
    return [run for one in made for run in el.grid(one, {"seed": range(lengths[one.task.kind][1])})]


def planned(rates: Rates = GPU) -> list:
    return form(plan(runs(), MEMORY), rates, MEMORY)


def stored(path, monkeypatch, rates: Rates = EAGER, **how) -> Store:
    """The runs, trained together."""
    real = driver.prepare
    gathered = lambda work: dataclasses.replace(work, new=form(work.new, rates, MEMORY))  # noqa: E731
    monkeypatch.setattr(driver, "prepare", lambda *args, **kwargs: gathered(real(*args, **kwargs)))
    try:
        return driver.train(runs(), path, device="cpu", **how)
    finally:
        monkeypatch.setattr(driver, "prepare", real)


def rows(store: Store, table: str = "metrics") -> list[dict]:
    return sorted(
        store.sql(f"select * from {table}").to_pylist(), key=lambda r: [str(v) for k, v in r.items() if k in ("run", "split")] + [r["step"]]
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Store:
    return driver.train(runs(), tmp_path_factory.mktemp("alone"), device="cpu")


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Store:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return stored(tmp_path_factory.mktemp("together"), monkeypatch)


def test_runs_are_what_they_are_alone_but_for_rounding(alone, together):
    plans = [c.plan() for c in together.cohorts()]
    assert len({p.convoy for p in plans}) == 1 and not any(c.plan().convoy for c in alone.cohorts())
    assert set(plans[0].convoy) == {p.runs[0].id for p in planned()}
    for table, numbers in (("metrics", ("loss", "accuracy", "exact_match", "grad_norm")), ("positions", ("loss",))):
        pairs = list(zip(rows(alone, table), rows(together, table), strict=True))
        assert len(pairs) > 50
        for a, b in pairs:
            assert {k: v for k, v in a.items() if k not in numbers} == {k: v for k, v in b.items() if k not in numbers}
            for n in numbers:
                assert (a[n] is None) == (b[n] is None)
                assert a[n] is None or a[n] == pytest.approx(b[n], rel=1e-3, abs=2e-4), (a, b)


def test_weights_are_those_of_each_task_s_own_model(alone, together):
    vectors = [{i: v for c in store.cohorts() for i, v in c.vectors(step).items()} for store in (alone, together) for step in (None, 8)]
    for a, b in zip(vectors[:2], vectors[2:], strict=True):
        assert a.keys() == b.keys() and a
        for run in a:
            assert a[run].shape == b[run].shape
            assert np.allclose(a[run], b[run], rtol=1e-2, atol=2e-3)
    (begin, begun) = ({i: v for c in store.cohorts() for i, v in c.vectors(0).items()} for store in (alone, together))
    assert all(np.array_equal(begin[i], begun[i]) for i in begin)  # nothing of a run's start hangs on its company


def test_what_pads_a_model_is_zero_and_stays_so():
    groups = [[r for r in runs() if r.task == task] for task in TASKS]
    programs = Joint(groups, jax.devices()[0])
    start = programs.start()
    states, metrics = programs.chunk(start, 0, 24)
    assert np.isfinite(metrics["loss"][:3]).all()
    own = [np.asarray(s.params).shape[1] for s in programs.split(states)]
    wide = np.asarray(states.params)
    assert len(set(own)) == 3 and wide.shape[1] >= max(own)
    back = programs.join(programs.split(states))
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(states), strict=True):
        assert np.array_equal(a, b)  # splitting drops what pads, joining puts zeros: nothing else was there


def test_no_program_carries_an_array_as_large_as_a_model():
    """At d_model 512 such constants were gigabytes."""
    programs = Joint([[r for r in runs() if r.task == task] for task in TASKS], jax.devices()[0])
    captured = jax.make_jaxpr(programs._functions["start"].__wrapped__)(programs.runs, programs.task).consts
    least = min(np.asarray(s.params).shape[1] for s in programs.split(programs.start()))
    assert all(np.size(a) < least for a in captured)


@pytest.mark.parametrize("make", [lambda groups: Joint(groups, jax.devices()[0]), lambda groups: Programs(groups[1], jax.devices()[0], 1)])
def test_programs_leave_memory_as_soon_as_nobody_has_them(make):
    programs = make([[r for r in runs() if r.task == task] for task in TASKS])
    states, _ = programs.chunk(programs.start(), 0, 1)
    programs.evaluate(states.params, "test", np.arange(1))
    held = weakref.ref(programs)
    gc.collect()
    gc.disable()
    try:
        del programs
        assert held() is None
    finally:
        gc.enable()


def test_however_many_batches_are_drawn_at_once_runs_are_the_same_but_for_rounding_and_chunks_change_no_bit(monkeypatch):
    groups = [[r for r in runs() if r.task == task] for task in TASKS]

    def trained(programs, *chunks):
        states, step, parts = programs.start(), 0, []
        for steps in chunks:
            states, metrics = programs.chunk(states, step, steps)
            parts, step = [*parts, metrics], step + steps
        return [*jax.tree.leaves(states), *(np.concatenate([part[name] for part in parts]) for name in programs.metrics)]

    one_by_one = trained(Joint(groups, jax.devices()[0]), 11)
    monkeypatch.setattr(Programs, "ahead", 3)
    programs = Joint(groups, jax.devices()[0])
    together = trained(programs, 11)
    for a, b, c in zip(together, one_by_one, trained(programs, 4, 7), strict=True):
        assert np.allclose(a, b, rtol=1e-3, atol=2e-4, equal_nan=True)
        assert np.array_equal(a, c, equal_nan=True)


def test_a_task_s_predictions_are_among_its_symbols(together):
    """A model of 21 symbols knows only two digits where the task has no more: else an untrained loss would be near ln 21."""
    programs = Joint([[r for r in runs() if r.task == task] for task in TASKS], jax.devices()[0])
    states = programs.start()
    slots = np.arange(sum(programs.sizes))
    joint = programs.evaluate(states.params, "test", slots)
    own = [Programs([r for r in runs() if r.task == task], jax.devices()[0], 1) for task in TASKS]
    each = [p.evaluate(p.start().params, "test", np.arange(n)) for p, n in zip(own, programs.sizes, strict=True)]
    assert np.allclose(joint.loss, np.concatenate([e.loss for e in each]), rtol=1e-5)
    assert np.array_equal(joint.exact_match, np.concatenate([e.exact_match for e in each]))


def files(store: Store) -> dict[str, bytes]:
    return {str(p.relative_to(store.path)): p.read_bytes() for p in sorted(store.path.rglob("cohorts/*/*")) if p.name != "timings.jsonl"}


class Stop(Exception):
    pass


SLOW = [(2, 1), (2, 3), (6, 1), (6, 2), (6, 3), (12, 2), (14, 1), (24, 1)]


@pytest.mark.parametrize(("step", "closed"), [(12, 1), *(pytest.param(*at, marks=pytest.mark.slow) for at in SLOW)])
def test_killed_between_any_two_files_it_goes_on_to_the_same_bits(step, closed, together, tmp_path, monkeypatch):
    """After so many cohorts have their checkpoint of a step and the others of the convoy have not; one ends at step 6, one at 12."""
    count, close = itertools.count(1), Writer.close

    def stops(self, diverged):
        close(self, diverged)
        if self.step == step and next(count) == closed:
            raise Stop

    monkeypatch.setattr(Writer, "close", stops)
    monkeypatch.setattr(driver, "CHECKPOINT_SHARE", 1e9)  # every checkpoint is written
    with pytest.raises(Stop):
        stored(tmp_path / "s", monkeypatch)
    monkeypatch.setattr(Writer, "close", close)
    again = stored(tmp_path / "s", monkeypatch)
    assert files(again) == files(together)


def test_cohorts_that_end_are_left():
    legs = Convoy(tuple(planned(EAGER))).legs
    assert [(leg.start, leg.stop, leg.sizes) for leg in legs] == [(0, 6, (1, 4, 4)), (6, 12, (1, 4, 0)), (12, 24, (1, 0, 0))]
    assert [leg.sizes for leg in Convoy(tuple(planned())).legs] == [(1, 4, 4)]  # where a program costs more than that, all stay to the end
    assert [p.steps for p in planned(EAGER)] == [24, 12, 6]


def test_the_cohort_that_stays_may_have_shorter_rows_than_those_that_left():
    """It then trains alone, by a program that pads nothing, on the held-out examples that the joint one had padded."""
    long, short = (el.replace(el.replace(RUN, "task", task), "steps", steps) for task, steps in ((TASKS[0], 6), (TASKS[2], 12)))

    def scores(rates: Rates, *runs: el.Run) -> dict[tuple, float]:
        convoy = Convoy(tuple(form(plan(runs, MEMORY), rates, MEMORY)))
        with Ahead([(convoy, leg) for leg in convoy.legs], jax.devices()[0], 0) as ahead:
            tables = [event.columns for event in train_convoy(convoy, ahead) if isinstance(event, Rows) and event.table == "metrics"]
        return {(r, s, n): x for t in tables for r, s, n, x in zip(t["run"], t["step"], t["split"], t["loss"], strict=True)}

    together, alone = scores(EAGER, long, short), scores(GPU, long) | scores(GPU, short)
    assert {split for _, _, split in together} == {"train", "validation", "test"}
    assert together.keys() == alone.keys() and together == pytest.approx(alone, rel=1e-3)


def test_who_trains_together():
    custom = dataclasses.replace(RUN, model=el.Transformer(layers=1, d_model=8, heads=2, attention=Own()))
    finite, child = el.replace(RUN, "train_set", 64), el.follow([RUN], el.replace(RUN, "seed", 5))[-1]
    assert alike(RUN) == alike(el.replace(RUN, "task", TASKS[1])) == alike(el.replace(RUN, "optim.lr", 1e-3)) is not None
    assert alike(RUN) != alike(el.replace(RUN, "batch", 8)) and alike(RUN) != alike(el.replace(RUN, "model.layers", 2))
    assert alike(custom) is alike(finite) is alike(child) is None
    mixed = [*runs(), custom, finite, *el.grid(el.replace(RUN, "batch", 8), {"seed": [0, 1]})]
    plans = form(plan(mixed, MEMORY), GPU, MEMORY)
    assert [len(g) for g in gather([p.convoy for p in plans])] == [3, 1, 1, 1]
    assert [r.id for p in plans for r in p.runs] == [r.id for p in plan(mixed, MEMORY) for r in p.runs]
    assert len({p.id for p in plans} & {p.id for p in plan(mixed, MEMORY)}) == 3  # a convoy's cohorts are other cohorts: their bits are


@el.spec
class Own(el.Attention):
    """Anything of the user's."""


def test_convoys_fit_and_take_least_time():
    """Against every division of the tasks, by length of row, into parts."""
    tasks = [el.Addition(length=n) for n in (3, 4, 6, 20, 40)]
    apart = plan([el.replace(el.replace(RUN, "task", t), "steps", 20_000 + t.length) for t in tasks], MEMORY)
    needed = sum(p.bytes for p in apart)
    for memory in (MEMORY, needed // 2, 1):
        plans = form(apart, GPU, memory)
        parts = [[plans[i] for i in g] for g in gather([p.convoy for p in plans])]
        for part in parts:
            longest = max(p.runs[0].task.positions for p in part)
            assert len(part) == 1 or sum(p.bytes * longest / p.runs[0].task.positions for p in part) <= memory
        if memory == 1:
            assert len(parts) == len(tasks)
        if memory == MEMORY:
            spent = sum(Convoy(tuple(part)).seconds(GPU) for part in parts)
            assert spent <= min(map(time_of, divisions(apart))) * (1 + 1e-9)


def divisions(plans: list) -> list[list[list]]:
    cuts = itertools.product([False, True], repeat=len(plans) - 1)
    return [[list(part) for part in parts(plans, cut)] for cut in cuts]


def parts(plans: list, cut: tuple[bool, ...]) -> list[list]:
    made = [[plans[0]]]
    for p, new in zip(plans[1:], cut, strict=True):
        made = [*made, [p]] if new else [*made[:-1], [*made[-1], p]]
    return made


def time_of(division: list[list]) -> float:
    from elegans.training.cost import shrink

    firsts = [[p.runs[0] for p in part] for part in division]
    return sum(seconds(runs, shrink([[r.length] for r in runs], runs, GPU), GPU) for runs in firsts)


def test_shares_keep_together_what_trains_together():
    many = [r for b in (4, 8, 16) for r in (el.replace(run, "batch", b) for run in runs())]
    shares = divide(many, 3)
    assert sorted(r.id for s in shares for r in s) == sorted(r.id for r in many)
    assert [len({r.batch for r in s}) for s in shares] == [1, 1, 1]


def test_where_others_must_go_back_further_than_those_that_ended_they_go_on_to_the_same_bits(together, tmp_path, monkeypatch):
    real = driver.train_convoy

    def until_13(*args):
        for event in real(*args):
            if getattr(event, "step", 0) > 12:
                raise Stop
            yield event

    monkeypatch.setattr(driver, "CHECKPOINT_SHARE", 1e9)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(driver, "train_convoy", until_13)
        stored(tmp_path / "s", patch)
    ended = [c for c in Store(tmp_path / "s").cohorts() if c.status()["finished"]]
    left = [c for c in Store(tmp_path / "s").cohorts() if not c.status()["finished"]]
    assert len(ended) == 2 and [c.first().task.kind for c in left] == ["addition"]
    (left[0].path / "state-0000000012.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="the checkpoint before it is used"):
        store = stored(tmp_path / "s", monkeypatch)
    assert files(store) == files(together)


def test_a_cohort_without_its_convoy_goes_on_alone(together, tmp_path, monkeypatch):
    """As when an archive brought only some of them: no claim of equal bits, but the same runs."""
    store = stored(tmp_path / "s", monkeypatch, minutes=0.0)
    left = [c for c in store.cohorts() if not c.status()["finished"]]
    assert len(left) == 3
    store.remove(left[1:])
    driver.train(left[0].specs(), store.path, device="cpu")
    assert left[0].status()["recompiled"] and not any(c.status()["recompiled"] for c in together.cohorts())
    got = {r["run"]: r["loss"] for r in rows(Store(store.path)) if r["split"] == "test"}
    want = {r["run"]: r["loss"] for r in rows(together) if r["split"] == "test"}
    assert got and all(got[i] == pytest.approx(want[i], rel=1e-3) for i in got)


def test_events_of_a_convoy_tell_of_all_its_runs():
    convoy = Convoy(tuple(planned()))
    events = list(train_convoy(convoy, Ahead([], jax.devices()[0])))
    told = {i for e in events if isinstance(e, el.training.train.Rows) for i in e.columns["run"]}
    assert told == {r.id for r in runs()}


def test_as_many_are_evaluated_at_a_time_as_are_due_together():
    """Runs of four learning rates end together, and are not evaluated in the company of many that go on; where all end, many are."""
    base = el.Run(TASKS[0], el.Transformer(layers=1, d_model=8, heads=2), steps=1, record=el.Record(evaluate=el.At()))
    lengths = [10 * n for n in range(1, 21)]
    apart = [el.replace(el.replace(base, "steps", n), "optim.lr", lr) for n in lengths for lr in (1e-1, 1e-2, 1e-3, 1e-4)]
    seeds = [el.replace(el.replace(base, "steps", 200), "seed", seed) for seed in range(80)]
    (few,), (many,) = (plan(runs, 2**34, platform="gpu") for runs in (apart, seeds))
    assert Convoy((few,)).evaluated == 4
    assert Convoy((many,)).evaluated == 10  # an eighth of all, for memory


def test_what_cohorts_cost_that_trained_together_is_counted_once(together, monkeypatch):
    """They end one after the other, and each has its part of the seconds: what the steps should have taken is not theirs as often."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from cost import cost

    cohorts = together.cohorts()
    plans, timings = [c.plan() for c in cohorts], [row for c in cohorts for row in c.timings()]
    assert len({row["steps"] for row in timings}) > 1
    found, rates = cost(cohorts), rates_of("cpu")
    convoy = Convoy(tuple(plans))
    expected = sum((leg.stop - leg.start) * rates.step(zip([p.runs[0] for p in plans], leg.sizes, strict=True)) for leg in convoy.legs)
    assert found["predicted"] == pytest.approx(expected) and found["runs"] == len(convoy.runs) and found["cohorts"] == len(plans)
    assert found["training"] == pytest.approx(sum(row["training"] for row in timings))
