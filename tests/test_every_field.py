"""No option is accepted and ignored: changing any field of any spec that a run is made of changes what the run does.

A field of structure must change the traced program (its text, its constants, the arrays that its task prepares) or what
training yields. A leaf must reach the results: the program that is left when everything unused is cut away still reads it.
A new spec or a new field fails here until CASES says how it shows.
"""

import dataclasses
import functools
import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

import elegans
from elegans import (
    Every,
    Record,
    Run,
    Spec,
)
from elegans.folder import Cohort, parent_of
from elegans.specs import _KINDS, is_abstract
from elegans.tasks.sampling import prepare
from elegans.training import ahead, train
from elegans.training.cohort import resolve, stack
from elegans.training.convoy import Convoy
from elegans.training.evaluation import Evaluation, draw_held_out, evaluate
from elegans.training.planner import plan
from elegans.training.run import fill
from elegans.training.step import State, draw_batch, draw_data, start
from elegans.types import Example
from field_cases import APART, BASE, CASES, LISTED, based
from helpers import advance, as_arrays, leaves

for found in pkgutil.walk_packages(elegans.__path__, "elegans."):
    importlib.import_module(found.name)


PAIRS = [pytest.param(*pair, id=name) for name, pair in LISTED]


# ---- every field is listed


def reachable(base: type[Spec]) -> Iterator[type[Spec]]:
    """Every concrete spec of elegans that can stand for `base`, and what those hold."""
    own = {
        c
        for classes in _KINDS.values()
        for c in classes
        if issubclass(c, base) and not is_abstract(c) and c.__module__.startswith("elegans.")
    }
    for cls in own:
        yield cls
        for info in cls.infos.values():
            if info.base is not None and info.base is not base:
                yield from reachable(info.base)


def test_every_field_of_every_spec_is_listed() -> None:
    for cls in set(reachable(Run)):
        assert cls in CASES, f"say in CASES what the fields of {cls.__name__} change"
        missing = set(cls.infos) - set(CASES[cls])
        assert not missing, f"say in CASES what {sorted(missing)} of {cls.__name__} change"
        assert all(pairs or name in APART for name, pairs in CASES[cls].items())


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_the_pairs_differ_and_have_other_ids(before, after) -> None:
    assert before != after and before.id != after.id


# ---- what a run does, as far as it can be known without running it


def constants(jaxpr: Any) -> Iterator[bytes]:
    """Every array that is written into a program, however deep."""
    yield from (np.asarray(c).tobytes() for c in jaxpr.consts)
    for eqn in jaxpr.jaxpr.eqns:
        inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "consts"))
        for part in inner:
            if hasattr(part, "consts") and hasattr(part, "jaxpr"):
                yield from constants(part)


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def text_of(function: Any, *args: Any) -> str:
    made = jax.make_jaxpr(function)(*args)
    return digest(str(made).encode(), *constants(made))


@functools.cache
def prepared(task: Any) -> str:
    """The arrays that a task prepares."""
    return digest(*(np.asarray(a).tobytes() for a in jax.tree.leaves(prepare(task))))


@functools.cache
def training_program(task: Any, batch: int, train_set: int | None, order: Any) -> str:
    """The training batches that are drawn."""
    run = based(task=task, batch=batch, train_set=train_set, order=order)
    return text_of(lambda run, data: draw_batch(run, jnp.int32(2), draw_data(run, data)), as_arrays(run), prepare(task))


@functools.cache
def held_out_program(task: Any, examples: int) -> str:
    """The held-out sets that are drawn."""
    return text_of(draw_held_out, as_arrays(based(task=task, record=Record(examples=examples))), prepare(task))


def once_for_each_structure(function: Callable[[Run], Any]) -> Callable[[Run], Any]:
    """Tracing does not see the values of leaves, and need not be repeated for them."""
    made: dict[Any, Any] = {}

    def cached(run: Run) -> Any:
        key = jax.tree.structure(run)
        if key not in made:
            made[key] = function(run)
        return made[key]

    return cached


@once_for_each_structure
def net_program(run: Run) -> str:
    """What is computed on a batch: initial weights, one step, one evaluation."""
    shape = (run.batch, run.task.positions)
    batch = Example(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))

    def step(run: Run, batch: Example) -> Any:
        state = start(run)
        made = run.update.apply(run, state, batch, jnp.int32(2), jax.random.key(0))
        return made, evaluate(run, state.params, batch)

    return text_of(step, as_arrays(run), batch)


class Still:
    """Programs that compute nothing, so that only what training yields is seen."""

    metrics = ("loss", "accuracy", "exact_match", "grad_norm")

    def __init__(self, runs: Any, *where: Any):
        self.size = len(runs)

    def compile_all(self, without: Any = ()) -> None:
        pass

    def held(self, slots: np.ndarray) -> None:
        pass

    def start(self) -> State:
        return State(jnp.zeros((self.size, 3)), (), jnp.full(self.size, -1))

    def join(self, parts: list[State]) -> State:
        return parts[0]

    def split(self, states: State) -> list[State]:
        return [states]

    def vectors(self, params: Any, slots: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(slots, np.asarray(params)[slots])]

    def chunk(self, states: State, step: int, steps: int) -> tuple[State, dict[str, np.ndarray]]:
        return states, {name: np.zeros((steps, self.size)) for name in self.metrics}

    def evaluate(self, params: Any, part: str, slots: np.ndarray) -> Evaluation:
        return Evaluation(*(np.zeros(len(slots)) for _ in range(3)), np.zeros((len(slots), 4)))


@functools.cache
def one_plan() -> Any:
    return plan([BASE], 2**30)[0]


def yielded(run: Run) -> list[tuple]:
    """What training hands on to be stored, and when."""
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "Programs", Still)
        for event in train.train_convoy(Convoy((dataclasses.replace(one_plan(), runs=(run,)),)), ahead.Ahead([], jax.devices()[0])):
            if isinstance(event, train.Rows):
                kept.append((event.table, *(tuple(np.asarray(event.columns[c]).tolist()) for c in ("split", "step"))))
            elif isinstance(event, train.Weights):
                kept.append(("weights", event.step))
    return kept


def does(run: Run) -> Iterator[Any]:
    """All of it, part by part, what is quickly known first."""
    yield run.length
    yield yielded(run) if run.length == BASE.length else ()
    yield prepared(run.task)
    yield training_program(run.task, run.batch, run.train_set, run.order)
    yield held_out_program(run.task, run.record.examples)
    yield net_program(dataclasses.replace(run, record=BASE.record, train_set=None, order=None, count="kaplan"))


@once_for_each_structure
def live(run: Run) -> frozenset[str]:
    """The leaves that the results of a training depend on."""
    task = prepare(run.task)

    def whole(run: Run) -> Any:
        data = draw_data(run, task)
        two = jnp.array([2, 3])  # steps: what the first one leaves in the optimiser's state shows in the second
        state, metrics = jax.lax.scan(lambda state, step: advance(run, state, step, data), start(run), two)
        return state.params, metrics["loss"], draw_held_out(run, task).validation.tokens

    closed = jax.make_jaxpr(whole)(as_arrays(run))
    used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[1]
    return frozenset(name for name, u in zip(leaves(resolve(run)), used, strict=True) if u)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_every_field_changes_what_a_run_does(before, after) -> None:
    a, b = resolve(before), resolve(after)
    if jax.tree.structure(a) != jax.tree.structure(b):
        assert any(x != y for x, y in zip(does(a), does(b), strict=True))  # the rest is not traced once a part differs
        return
    changed = {name for name, value in leaves(a).items() if leaves(b)[name] != value}
    assert changed and changed <= live(a)


def test_every_leaf_of_one_run_changes_its_results_in_numbers() -> None:
    """All changed runs train as one cohort, next to the unchanged one."""
    structure, task = jax.tree.structure(resolve(BASE)), prepare(BASE.task)
    runs = [BASE, *(b for _, (a, b) in LISTED if a == BASE and jax.tree.structure(resolve(b)) == structure)]

    def whole(run: Run) -> Any:
        data = draw_data(run, task)

        state = jax.lax.fori_loop(0, 7, lambda step, state: advance(run, state, step, data)[0], start(run))
        return state.params

    params = np.asarray(jax.jit(jax.vmap(whole))(stack(runs)))
    assert np.isfinite(params).all() and len(runs) > 12
    for changed, run in zip(params[1:], runs[1:], strict=True):
        assert not np.array_equal(changed, params[0]), run


def test_a_label_changes_what_is_shown_and_nothing_else() -> None:
    named = based(label="lr={optim.lr}, {model.mlp}")
    assert fill(named.label, named) == "lr=0.1, swiglu"
    assert named.id == BASE.id and resolve(named) == resolve(BASE)
    assert jax.tree.structure(named) == jax.tree.structure(BASE)


PARENTS = [based(record=Record(weights=Every(3)), seed=seed) for seed in (0, 1)]


class Kept(Cohort):
    """Stands for the parents' cohort: instead of weights it keeps whose they are, and of which step."""

    id = "kept"

    def __init__(self):
        pass

    def vectors(self, step):
        return {parent.id: np.array([parent.seed, step or -1]) for parent in PARENTS}


def test_a_parent_and_its_step_decide_the_weights_that_a_run_starts_from() -> None:
    """The engine knows neither: it is given the weights. What is in them, `tests/training/test_after.py` tests."""
    children = [based(after=parent, after_step=step) for parent in PARENTS for step in (None, 3)]
    assert len({run.id for run in [BASE, *children]}) == 5 and {resolve(run) for run in children} == {resolve(BASE)}
    assert [parent_of(Kept(), run, {}).tolist() for run in children] == [[0, -1], [0, 3], [1, -1], [1, 3]]
