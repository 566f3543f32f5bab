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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

import elegans
from elegans import (
    MLP,
    WSD,
    ActivitySelection,
    AdamW,
    Addition,
    ALiBi,
    At,
    Attention,
    BinaryCopy,
    BitParity,
    BreadthFirstSearch,
    Constant,
    Cosine,
    Curriculum,
    DepthFirstSearch,
    Every,
    FixedAttention,
    InnerProduct,
    IterativeTask,
    LayerNorm,
    Learned,
    Linear,
    LogSpaced,
    LongestCommonSubsequence,
    Majority,
    MajorityOfMajority,
    MaximumSubarray,
    MinimumSpanningTree,
    Mixture,
    Multiplication,
    Parity,
    Polynomial,
    Record,
    RMSNorm,
    Rotary,
    Run,
    ShortestPath,
    Sinusoidal,
    Sorting,
    Spec,
    Split,
    SwiGLU,
    TopologicalSort,
    Transformer,
    Update,
    replace,
    spec,
)
from elegans.folder import Cohort
from elegans.specs import _KINDS, fill, is_abstract, leaves
from elegans.study import _parent
from elegans.tasks.sampling import prepare
from elegans.training import ahead, train
from elegans.training.cohort import Evaluation, draw_held_out, evaluate, resolve, stack
from elegans.training.planner import plan
from elegans.training.step import State, advance, draw_batch, draw_data, start
from elegans.types import Example
from helpers import as_arrays

for found in pkgutil.walk_packages(elegans.__path__, "elegans."):
    importlib.import_module(found.name)


@spec
class Doubled(Update):
    """A training loop of the user's."""

    def loss(self, run, params, batch, key):
        loss, metrics = super().loss(run, params, batch, key)
        return 2 * loss, metrics


BASE = Run(
    Addition(length=3),
    Transformer(layers=1, d_model=4, heads=2, dropout=0.3, init_std=0.5),
    AdamW(lr=0.1, eps=1e-2, schedule=Cosine(warmup=0.4, start=0.1)),
    batch=4,
    steps=6,
    record=Record(examples=4, train=Every(2), evaluate=Every(3), weights=Every(3)),
)
Pair = tuple[Run, Run]
FOUR = str(Path(__file__).parent / "data" / "four.g6")  # a star and a line of four vertices


def based(**changes: Any) -> Run:
    return dataclasses.replace(BASE, **changes)


def at(path: str, alternatives: dict[str, list], *bases: Run) -> dict[str, list[Pair]]:
    """Pairs of runs that differ in one field of the spec at `path`."""

    def pairs(name: str, values: list) -> list[Pair]:
        return [(run, replace(run, f"{path}.{name}", value)) for run in bases or (BASE,) for value in values]

    return {name: pairs(name, values) for name, values in alternatives.items()}


def scheduled(kind: type[Spec], alternatives: dict[str, list], **fields: float) -> dict[str, list[Pair]]:
    share, steps = (replace(BASE, "optim.schedule", kind(start=0.1, **warm, **fields)) for warm in ({"warmup": 0.4}, {"warmup_steps": 2}))
    path = "optim.schedule"
    return at(path, {"warmup": [0.2], "start": [0.3], **alternatives}, share) | at(path, {"warmup_steps": [3, None]}, steps)


def on(path: str, value: Spec) -> Run:
    return replace(BASE, path, value)


def iterative(task: IterativeTask) -> dict[str, list[Pair]]:
    fields = {
        "length": [task.length + 2],
        "shortest": [3, None],
        "cot": [False],
        "compat": ["paper"],
        "split": [None],
        "lengths": ["balanced"],
    }
    weighted = at("task", {"final_weight": [2.0, None]}, on("task", dataclasses.replace(task, final_weight=3.0)))
    return at("task", fields, on("task", task)) | weighted


SIZED = (ActivitySelection, BitParity, InnerProduct, LongestCommonSubsequence, Majority, MajorityOfMajority, MaximumSubarray, Sorting)
SHORT = (BinaryCopy(length=4, split=Split(0.5, 0.25)), Parity(length=5, split=Split(0.5, 0.25)))
ANY_MIX = {"tag": [True], "split": [Split(0.6, 0.2)]}
APART = ("label", "after", "after_step")  # a note, and what decides the weights that the engine is given: see the end
CASES: dict[type[Spec], dict[str, list[Pair]]] = {
    Addition: at("task", {"length": [4], "cot": [True], "inputs": ["msb"], "outputs": ["msb"], "split": [None, Split(0.8, 0.1)]}),
    **{kind: iterative(kind(length=5, shortest=2)) for kind in (Parity, BinaryCopy)},
    Polynomial: iterative(Polynomial(length=3, shortest=1)) | at("task", {"modulus": [7], "start": ["zero"]}, on("task", Polynomial())),
    Mixture: at("task", {"tasks": [SHORT[::-1]], "weights": [(0.2, 0.5)], **ANY_MIX}, on("task", Mixture(tasks=SHORT))),
    Curriculum: at("task", {"tasks": [SHORT[::-1]], "ends": [(0.2,)], "keep": [True], **ANY_MIX}, on("task", Curriculum(tasks=SHORT))),
    Multiplication: at(
        "task",
        {"length": [4], "inputs": ["msb"], "outputs": ["msb"], "split": [None, Split(0.8, 0.1)]},
        on("task", Multiplication(length=3)),
    ),
    **{kind: at("task", {"length": [6], "split": [None, Split(0.8, 0.1)]}, on("task", kind(length=4))) for kind in SIZED},
    **{
        kind: at(
            "task",
            {"vertices": [5], "graphs": [FOUR], "compat": ["paper"], "split": [None]},
            on("task", kind(vertices=4, split=Split(0.5, 0.25))),
        )
        for kind in (BreadthFirstSearch, DepthFirstSearch, ShortestPath, TopologicalSort, MinimumSpanningTree)
    },
    Split: at("task.split", {"train": [0.7], "validation": [0.09], "key": [1]}, BASE, on("task", Addition(length=9)))
    | at("task.split", {"by": ["length"]}, on("task", Parity(length=5, shortest=2)), on("task", Parity(length=17, shortest=14))),
    Transformer: at(
        "model",
        {
            **{"layers": [2], "d_model": [8], "heads": [1], "d_head": [4], "attention": [None, (FixedAttention(),)], "mlp": [None, MLP()]},
            **{"norm": [None, LayerNorm()], "position": [None, Learned()], "tied": [True], "bias": [True]},
            **{"skip": ["normed"], "embed_dropout": [0.2]},
            **{"dropout": [0.2, None], "init_std": [0.3, None], "dtype": ["bfloat16", "tensorfloat32"]},
        },
    ),
    Attention: at("model.attention", {"scale": [0.5]}),
    FixedAttention: at("model.attention", {"maps": [("self",), ("uniform", "first")]}, on("model.attention", FixedAttention())),
    MLP: at("model.mlp", {"ratio": [2.0], "activation": ["gelu_tanh", "relu", "silu"]}, on("model.mlp", MLP())),
    SwiGLU: at("model.mlp", {"ratio": [2.0]}),
    RMSNorm: at("model.norm", {"eps": [1e-3]}),
    LayerNorm: at("model.norm", {"eps": [1e-3]}, on("model.norm", LayerNorm())),
    Rotary: at("model.position", {"theta": [100.0]}, on("model", Transformer(layers=1, d_model=4, heads=1))),  # two wavelengths
    Learned: at("model.position", {"dims": [2], "std": [0.3]}, on("model.position", Learned())),
    Sinusoidal: at("model.position", {"theta": [100.0]}, on("model.position", Sinusoidal())),
    ALiBi: at("model.position", {"span": [4.0]}, on("model.position", ALiBi())),
    AdamW: at(
        "optim",
        {
            **{"lr": [0.2], "clip": [0.01, None], "schedule": [Constant(), Linear(), WSD()], "weight_decay": [0.2]},
            **{"b1": [0.5], "b2": [0.5], "eps": [0.1], "decay": ["matrices"]},
        },
    ),
    Constant: scheduled(Constant, {}),
    Cosine: scheduled(Cosine, {"end": [0.5]}),
    Linear: scheduled(Linear, {"end": [0.5]}),
    WSD: scheduled(WSD, {"end": [0.5], "decay": [0.9]}, decay=0.5),
    Update: {},
    LogSpaced: at("record.evaluate", {"per_decade": [1]}, on("record.evaluate", LogSpaced(5))),
    Every: at("record.evaluate", {"steps": [2]}),
    At: at("record.evaluate", {"steps": [(2, 4)]}, on("record.evaluate", At((1,)))),
    Record: at(
        "record", {"train": [Every(1)], "evaluate": [Every(2)], "weights": [Every(2), None], "examples": [5], "by_position": [False]}
    ),
    Run: {
        "task": [(BASE, on("task", Parity(length=5)))],
        "model": [(BASE, on("model", Transformer(layers=1, d_model=4, heads=1)))],
        "optim": [(BASE, on("optim", AdamW()))],
        "batch": [(BASE, based(batch=5))],
        "steps": [(BASE, based(steps=7))],
        "examples": [(based(steps=None, examples=24), based(steps=None, examples=29))],
        "epochs": [(based(steps=None, train_set=12, epochs=2), based(steps=None, train_set=12, epochs=2.5))],
        "flops": [(based(steps=None, flops=1e6), based(steps=None, flops=2e6))],
        "count": [(based(steps=None, flops=1e6), based(steps=None, flops=1e6, count="matmul"))],
        "order": [(based(train_set=12), based(train_set=12, order=order)) for order in ("listed", "short_to_long")],
        "train_set": [(BASE, based(train_set=12)), (based(train_set=12), based(train_set=13))],
        "seed": [(BASE, based(seed=1)), (based(data_seed=0, init_seed=0), based(seed=1, data_seed=0, init_seed=0))],
        "data_seed": [(BASE, based(data_seed=1))],
        "init_seed": [(BASE, based(init_seed=1))],
        "trained": [(BASE, based(trained=globs)) for globs in (("blocks.*",), ("!blocks.*",))],
        "update": [(BASE, based(update=Doubled()))],
        "record": [(BASE, based(record=Record()))],
        **{name: [] for name in APART},
    },
}
LISTED = [(f"{cls.kind}.{name}", pair) for cls, by in CASES.items() for name, pairs in by.items() for pair in pairs]
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

    def compile_all(self) -> None:
        pass

    def start(self) -> State:
        return State(jnp.zeros((self.size, 3)), (), jnp.full(self.size, -1))

    def place(self, states: State) -> State:
        return states

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
        for event in train.train_cohort(dataclasses.replace(one_plan(), runs=(run,)), ahead.Ahead([], jax.devices()[0])):
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
        state, metrics = advance(run, start(run), jnp.int32(2), data)
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
    assert [_parent(Kept(), run, {}).tolist() for run in children] == [[0, -1], [0, 3], [1, -1], [1, 3]]
