"""The program of several cohorts whose runs differ in their task: each draws its own rows, and one model step serves all.

Rows are padded to the longest, after their end, where nothing is scored and attention, being causal, brings nothing back. Parameters are
padded to the largest vocabulary and row, with zeros that nothing reads and no gradient reaches; the symbols that a task lacks are no
candidates of its predictions. So a run is the same in any company, but for rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from elegans.specs import spec, structure, varies
from elegans.tasks import Task
from elegans.training.cohort import Programs, evaluated, over, resolve, share, stack, taken
from elegans.training.evaluation import HeldOut, draw_held_out, evaluate
from elegans.training.run import Run
from elegans.training.spread import Spread, devices_for
from elegans.training.step import RunData, State, draw_batch, initial, shapes_of, start, take
from elegans.training.vectors import ravel, refitted, resized
from elegans.types import AnyArray, Example


@spec
class Shared(Task):
    """What stands for a run's task in a program of several: the largest vocabulary, the longest row. It draws nothing."""

    abstract: ClassVar[bool] = True
    vocab: int = structure(1, "symbols of the largest vocabulary", ge=1)
    longest: int = structure(1, "tokens of the longest row", ge=1)
    own: int = varies(1, "symbols of the run's own task, the first ones", ge=1)

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.vocab)))

    @property
    def positions(self) -> int:
        return self.longest

    @property
    def candidates(self) -> Bool[Array, " vocab"]:
        return jnp.arange(self.vocab) < self.own

    def sample(self, key: jax.Array, data: Any) -> Example:
        raise NotImplementedError("the tasks that it stands for draw their own rows")


@dataclasses.dataclass(frozen=True, eq=False)
class _Groups:
    """What the program does for each group of runs. It refers to no `Joint`: its memory would wait for Python's search for cycles."""

    sizes: list[int]  # runs of each
    axes: list[Any]  # of each one's task data: shared, or of every run
    longest: int  # tokens of a row

    def started(self, runs: Run, parts: Any) -> State:
        """Weights of a shape that all tasks share are drawn for all at once, the same as for each: that is most of the program."""
        wide, treedef = jax.tree.flatten(over(initial, 0)(runs))
        own = [jax.tree.leaves(over(initial, 0)(members)) for members, _ in parts]
        ends = np.cumsum(self.sizes)
        leaves = []
        for shared, *each in zip(wide, *own, strict=True):
            drawn = [shared[end - len(w) : end] if w.shape[1:] == shared.shape[1:] else w for w, end in zip(each, ends, strict=True)]
            leaves.append(jnp.concatenate([resized(w, shared.shape[1:]) for w in drawn]))
        return over(start, 0, 0)(runs, jax.vmap(ravel)(jax.tree.unflatten(treedef, leaves)))

    def held_out(self, runs: Run, parts: Any) -> HeldOut:
        del runs
        drawn = [over(draw_held_out, 0, axes)(own, data) for (own, data), axes in zip(parts, self.axes, strict=True)]
        return HeldOut(*(_joined([self.padded(example) for example in examples]) for examples in zip(*drawn, strict=True)))

    def drawn(self, runs: Run, step: Int[Array, ""], data: RunData) -> Example:
        del runs
        drawn = []
        for (own, arrays), axes in zip(data.task, self.axes, strict=True):
            draw = over(lambda run, arrays: draw_batch(run, step, RunData(arrays)), 0, axes)
            drawn.append(draw(own, arrays))
        if any(example.weights is not None for example in drawn):
            drawn = [e if e.weights is not None else dataclasses.replace(e, weights=jnp.ones(e.tokens.shape)) for e in drawn]
        return _joined([self.padded(example) for example in drawn])

    def padded(self, rows: Example) -> Example:
        """Rows [..., position] as long as the longest of any task, unscored there."""
        beyond = [(0, 0)] * (rows.tokens.ndim - 1) + [(0, self.longest - rows.tokens.shape[-1])]
        weights = None if rows.weights is None else jnp.pad(rows.weights, beyond)
        return Example(jnp.pad(rows.tokens, beyond, mode="edge"), jnp.pad(rows.scored, beyond), weights=weights)


class Joint(Programs):
    """The programs of several groups of runs, each group of one structure, that differ from each other in their task alone."""

    def __init__(self, groups: Sequence[Sequence[Run]], device: jax.Device, few: int | None = None):
        tasks = [members[0].task for members in groups]
        vocab, longest = max(task.vocab_size for task in tasks), max(task.positions for task in tasks)
        shared = [
            dataclasses.replace(resolve(run), task=Shared(vocab=vocab, longest=longest, own=run.task.vocab_size))
            for members in groups
            for run in members
        ]
        self.sizes = list(map(len, groups))
        self.shapes, self._own = shapes_of(shared[0]), [shapes_of(resolve(members[0])) for members in groups]
        few = evaluated(device, len(shared), few)
        self.spread, self.few = Spread([device], len(shared), whole=True), Spread(devices_for(device, few, 1), few)
        made = [share(members) for members in groups]
        self._groups = _Groups(self.sizes, [axes for _, axes in made], longest)
        self.runs = self.spread.place(stack(shared))
        self.task = self.spread.place(tuple((stack(members), data) for members, (data, _) in zip(groups, made, strict=True)))
        self._draw, self._take = jax.jit(self._groups.drawn, inline=True), jax.jit(over(take, 0, 0, None, 0), inline=True)
        self._functions = {
            "start": jax.jit(self._groups.started),
            "held_out": jax.jit(self._groups.held_out),
            "evaluate": self.few.jit(over(evaluate, 0, 0, 0), (0, 0, 0), 0),
            "few": jax.jit(taken),
            "chunk": jax.jit(self._chunk, donate_argnums=(1,)),
        }

    # ---- states of each cohort's own, and of all

    def join(self, parts: Sequence[State]) -> State:
        cut = [jax.tree.map(lambda a, n=n: np.asarray(a)[:n], part) for part, n in zip(parts, self.sizes, strict=True)]
        return self.spread.place(_joined([refitted(part, own, self.shapes) for part, own in zip(cut, self._own, strict=True)], np))

    def split(self, states: State) -> list[State]:
        host = jax.tree.map(np.asarray, states)
        ends = np.cumsum(self.sizes)
        parts = [jax.tree.map(lambda a, end=end, size=size: a[end - size : end], host) for end, size in zip(ends, self.sizes, strict=True)]
        return [refitted(part, self.shapes, own) for part, own in zip(parts, self._own, strict=True)]

    def vectors(self, params: Float[AnyArray, "replica parameter"], slots: Int[np.ndarray, " slot"]) -> list[tuple[np.ndarray, np.ndarray]]:
        host, home = np.asarray(params), np.repeat(np.arange(len(self.sizes)), self.sizes)[slots]
        here = [(slots[home == i], own) for i, own in enumerate(self._own) if (home == i).any()]
        return [(found, refitted(host[found], self.shapes, own)) for found, own in here]

    @property
    def _of_start(self) -> tuple[Any, ...]:
        return self.runs, self.task


def _joined(trees: Sequence[Any], module: Any = jnp) -> Any:
    """Trees of arrays [replica, ...], one after the other."""
    return jax.tree.map(lambda *arrays: module.concatenate(arrays), *trees)
