"""Runs that go on from another's weights: their ancestors, and which of a parent's numbers stand where in the child's."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from elegans.errors import Invalid
from elegans.models import Model
from elegans.tasks import Task
from elegans.training.run import Run
from elegans.training.vectors import path_name


def follow(parents: Sequence[Run], child: Run) -> list[Run]:
    """The child after each of the parents, with the parent's seed."""
    return [dataclasses.replace(child, after=parent, seed=parent.seed) for parent in parents]


def depth(run: Run) -> int:
    """How many runs stand before this one."""
    return 0 if run.after is None else 1 + depth(run.after)


def lineage(runs: Sequence[Run]) -> list[Run]:
    """The runs and all that they go on from, each once, parents before their children."""
    found: dict[str, Run] = {}
    for run in runs:
        for parent in _ancestors(run):
            found.setdefault(parent.id, parent)
        found[run.id] = run
    return list(found.values())


def _ancestors(run: Run) -> list[Run]:
    return [] if run.after is None else [*_ancestors(run.after), run.after]


# ---- weights

KINDS = ("size", "symbols", "positions")  # what an axis of a weight counts


class Shape(NamedTuple):
    """The axes of one weight: how long each is, and what it counts."""

    sizes: tuple[int, ...]
    kinds: tuple[str, ...]


def shapes(task: Task, model: Model) -> dict[str, Shape]:
    """Every weight of a model on a task, by name, in tree order. An axis that one more symbol would lengthen counts symbols, and so on."""

    def sizes(symbols: int, positions: int) -> dict[str, tuple[int, ...]]:
        made = jax.eval_shape(lambda: model.init(jax.random.key(0), symbols, positions))
        return {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(made)[0]}

    n, p = task.vocab_size, task.positions
    plain, symbols, positions = sizes(n, p), sizes(n + 1, p), sizes(n, p + 1)

    def kinds(name: str) -> tuple[str, ...]:
        axes = zip(plain[name], symbols[name], positions[name], strict=True)
        return tuple(KINDS[1] if s != size else KINDS[2] if q != size else KINDS[0] for size, s, q in axes)

    return {name: Shape(size, kinds(name)) for name, size in plain.items()}


def origin(run: Run) -> Int[np.ndarray, " parameter"]:
    """For each parameter of a run, in tree order, the place of the parent's that it starts as; -1: its own initial value.

    Symbols of one text are one, whatever their ids; of positions the first ones are shared. Raises `Invalid` where weights
    differ in anything else.
    """
    assert run.after is not None
    return _origin(run.task, run.model, run.after.task, run.after.model)


@functools.lru_cache(64)
def _origin(task: Task, model: Model, old_task: Task, old_model: Model) -> Int[np.ndarray, " parameter"]:
    new, old = shapes(task, model), shapes(old_task, old_model)
    for name in [*new, *(name for name in old if name not in new)]:
        _check(name, old.get(name), new.get(name))
    known = {symbol: i for i, symbol in enumerate(old_task.symbols)}
    pairs = [(i, known[symbol]) for i, symbol in enumerate(task.symbols) if symbol in known]
    made, first = {}, 0
    for name, was in old.items():
        axes = zip(new[name].sizes, was.sizes, was.kinds, strict=True)
        places = [_shared(size, old_size, kind, pairs) for size, old_size, kind in axes]
        numbers = first + np.arange(np.prod(was.sizes, dtype=int)).reshape(was.sizes)
        made[name] = np.full(new[name].sizes, -1)
        made[name][np.ix_(*(here for here, _ in places))] = numbers[np.ix_(*(there for _, there in places))]
        first += numbers.size
    return np.concatenate([made[name].reshape(-1) for name in new])


def _shared(size: int, old_size: int, kind: str, pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The places of an axis that both have, in the child and in the parent."""
    both = list(range(min(size, old_size)))
    return ([i for i, _ in pairs], [j for _, j in pairs]) if kind == "symbols" else (both, both)


def _check(name: str, old: Shape | None, new: Shape | None) -> None:
    """Raises `Invalid` where a weight of the parent cannot become the child's."""

    def said(shape: Shape | None) -> str:
        return "none" if shape is None else str(list(shape.sizes))

    def fixed(shape: Shape | None) -> Any:
        return shape and (shape.kinds, [n for n, kind in zip(*shape, strict=True) if kind == "size"])

    if fixed(old) != fixed(new):
        raise Invalid("after", f"{name} {said(old)}", f"this run's is {said(new)}; only symbols and positions may differ from the parent")


def inherited(
    run: Run, own: Float[np.ndarray, " parameter"], parent: Float[np.ndarray, " old_parameter"]
) -> Float[np.ndarray, " parameter"]:
    """What a run starts from: the parent's weights where it has them, its own initial ones elsewhere. Raises `Invalid`."""
    source = origin(run)
    return np.where(source >= 0, parent[np.maximum(source, 0)], own)
