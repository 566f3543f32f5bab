"""Several tasks in one: mixed all along, or one after another."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from elegans.errors import Invalid
from elegans.specs import field, spec
from elegans.tasks.base import PATIENCE, Split, Task
from elegans.tasks.iteration import BinaryCopy, Polynomial
from elegans.tasks.parity import Parity
from elegans.types import Example, Truth

Chances = Sequence[Any]  # one for each task, up to a factor; floats, traced or not; None: never drawn


@spec
class Several(Task):
    """Tasks over the union of their symbols. A subclass says with which chances each is drawn.

    A row is that of one task, its ids those of the union (symbols of the same text are one), filled up with its last token.
    Truth is the union of the tasks' truths: those of one name and kind are one feature (what a row does not have is
    read nowhere); a name of several kinds is written `task.name`. `task`, the number of the row's task, is read where the first
    scored token is predicted.

    A row is for training, validation or test as its own task says; where tasks have contents in common (`Task.judge`), one cut
    decides. Chances hold in every part; only where a small space is cut exactly, fresh training rows may deviate from them by what
    the cut leaves of each task.
    """

    abstract: ClassVar[bool] = True
    tasks: tuple[Task, ...] = field((BinaryCopy(), Parity()), "the tasks")
    tag: bool = field(False, "rows begin with a token that names their task; needless where their first symbol does")
    split: Split | None = field(None, "how the contents of every task are divided; none: as each task says")

    def check(self) -> None:
        if not self.tasks:
            raise Invalid("tasks", [], "allowed: one task or more")
        for i, task in enumerate(self.tasks):
            if type(task).batch is not Task.batch:
                raise Invalid(f"tasks[{i}]", task.kind, "allowed: tasks whose rows are drawn one by one")
        _ = self._judges

    @abc.abstractmethod
    def chances(self, progress: Any) -> Chances:
        """Of each task at a moment of the run, up to a common factor."""

    @abc.abstractmethod
    def held_out(self) -> Chances:
        """Of each task in held-out and finite sets, up to a common factor."""

    # ---- the union

    @cached_property
    def parts(self) -> tuple[Task, ...]:
        """The tasks, with the split that holds."""
        return self.tasks if self.split is None else tuple(dataclasses.replace(task, split=self.split) for task in self.tasks)

    @cached_property
    def _judges(self) -> tuple[Task, ...]:
        return tuple(task.judge(self.parts) for task in self.parts)

    @property
    def names(self) -> tuple[str, ...]:
        """Kinds of the tasks, numbered where one occurs twice."""
        kinds = [task.kind for task in self.tasks]
        return tuple(k if kinds.count(k) == 1 else f"{k}{kinds[:i].count(k) + 1}" for i, k in enumerate(kinds))

    def alone(self, i: int) -> Mixture:
        """The rows of one of the tasks, in the same symbols and with its tag."""
        return Mixture(tasks=self.tasks, tag=self.tag, split=self.split, weights=tuple(float(i == j) for j in range(len(self.tasks))))

    @property
    def symbols(self) -> tuple[str, ...]:
        tags = [f"<{name}>" for name in self.names] if self.tag else []
        return tuple(dict.fromkeys([*itertools.chain(*(task.symbols for task in self.tasks)), *tags]))

    @property
    def positions(self) -> int:
        return self.tag + max(task.positions for task in self.tasks)

    @cached_property
    def _shares(self) -> tuple[float | None, ...]:
        return tuple(judge.share_of(task) for judge, task in zip(self._judges, self.parts, strict=True))

    @cached_property
    def train_share(self) -> float | None:
        return min((s for s in self._shares if s is not None), default=None)

    def prepare(self) -> Any:
        return tuple(task.prepare() for task in self.parts)

    # ---- rows

    def sample(self, key: jax.Array, data: Any) -> Example:
        return self._drawn(key, self.held_out(), lambda task, key, d: task.sample(key, d), data)

    def draw(self, key: jax.Array, row: Int[Array, ""], tries: Int[Array, ""], data: Any) -> Example:
        """A row that was refused gives way to one of the same task, unless that has nothing in the part."""
        lasting = jax.random.fold_in(key, jnp.maximum(tries - PATIENCE, 0))
        return self._drawn(lasting, self.held_out(), lambda task, key, d: task.draw(key, row, tries, d), data)

    def batch(self, keys: jax.Array, step: Any, progress: Any, data: Any) -> Example:
        """Fresh rows, before the split takes its share: what it leaves then has the chances asked for."""
        del step
        chances = [c / (s or 1.0) for c, s in zip(self.chances(progress), self._shares, strict=True)]
        return jax.vmap(lambda key: self._drawn(key, chances, lambda task, key, d: task.sample(key, d), data))(keys)

    def _drawn(self, key: jax.Array, chances: Chances, draw: Callable[[Task, jax.Array, Any], Example], data: Any) -> Example:
        """The row of one task; those of the others are computed and dropped, since on the device a choice costs both sides."""
        of_task, of_row = jax.random.split(key)
        drawn = [i for i, chance in enumerate(chances) if chance is not None]
        which = _choice(of_task, [chances[i] for i in drawn])
        made = [self._translated(i, draw(self.parts[i], of_row, data[i])) for i in drawn]
        weighted = any(row.weights is not None for row in made)
        made = [dataclasses.replace(r, weights=jnp.ones(self.positions) if weighted and r.weights is None else r.weights) for r in made]
        plain = [dataclasses.replace(row, truth={}) for row in made]
        chosen: Example = jax.tree.map(lambda *values: jnp.stack(values)[which], *plain)
        answer = jnp.argmax(chosen.scored)[None] - 1
        truth = {name: _joined(truths, which) for name, truths in _truths(made, [self.names[i] for i in drawn]).items()}
        truth["task"] = Truth(jnp.asarray(drawn)[which][None], answer, "categorical", len(self.tasks))
        return dataclasses.replace(chosen, truth=truth)

    def _translated(self, i: int, row: Example) -> Example:
        """The row of task i in the symbols of the union, with its tag, as long as the longest."""
        ids = jnp.asarray([self.symbols.index(s) for s in self.tasks[i].symbols])
        fill = self.positions - self.tag - row.tokens.shape[0]
        tokens = jnp.pad(ids[row.tokens], (0, fill), mode="edge")
        if self.tag:
            tokens = jnp.append(self.symbols.index(f"<{self.names[i]}>"), tokens)
        truth = {
            name: dataclasses.replace(
                t,
                positions=jnp.where(t.positions < 0, -1, t.positions + self.tag),
                classes=t.classes or (self.tasks[i].vocab_size if t.kind == "categorical" else None),
            )
            for name, t in row.truth.items()
        }
        weights = None if row.weights is None else jnp.pad(row.weights, (int(self.tag), fill), constant_values=1)
        return Example(tokens, jnp.pad(row.scored, (int(self.tag), fill)), truth, weights)

    # ---- splits

    def split_table(self) -> Any:
        return tuple(judge.split_table() for judge in self._judges)

    def part_sizes(self) -> list[dict[str, Any]]:
        """Of every `task`; where tasks of one kind are cut together, of all their lengths."""
        return [{"task": name} | row for name, judge in zip(self.names, self._judges, strict=True) for row in judge.part_sizes()]

    def part(self, example: Example, table: Any) -> Int[Array, ""]:
        """What the row's task says, of the row in its own symbols."""
        found = []
        for judge, own in zip(self._judges, table, strict=True):
            ids = jnp.asarray([judge.symbols.index(s) if s in judge.symbols else 0 for s in self.symbols])
            mine = slice(self.tag, self.tag + judge.positions)
            row = Example(ids[example.tokens[mine]], example.scored[mine])
            found.append(jnp.zeros((), jnp.int32) if judge.split is None else judge.part(row, own))
        return jnp.stack(found)[example.truth["task"].values[0]]

    # ---- losses and lengths, of plain numbers

    def _mean(self, values: Sequence[float], chances: Chances) -> float:
        weights = [c or 0.0 for c in chances]
        return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)

    def scored_tokens(self) -> float:
        """Of held-out rows."""
        return self._mean([task.scored_tokens() for task in self.tasks], self.held_out())

    def floor(self) -> float | None:
        """Of held-out rows: the mean over tokens of the tasks' own floors; None where a row may not tell its task."""
        return self._over_tokens(lambda task: task.floor())

    def plateau(self) -> float | None:
        """Of held-out rows, of a predictor that sees the output position and the task; None where a row may not tell its task."""
        return self._over_tokens(lambda task: task.plateau())

    def _over_tokens(self, nats: Callable[[Task], float | None]) -> float | None:
        drawn = [(task, chance) for task, chance in zip(self.tasks, self.held_out(), strict=True) if chance]
        openings = {task.opening for task, _ in drawn}
        told = self.tag or len(drawn) == 1 or (len(openings) == len(drawn) and None not in openings)
        found = [nats(task) for task, _ in drawn]
        known = [n for n in found if n is not None]
        if not told or len(known) < len(found):
            return None
        tokens = [task.scored_tokens() * chance for task, chance in drawn]
        return self._mean(known, tokens)


def _choice(key: jax.Array, chances: Chances) -> Int[Array, ""]:
    """A task's number. Sums are made one after another, so that a chance of 0 adds exactly nothing and is never drawn."""
    sums = list(itertools.accumulate(chances))
    below = jnp.stack([jnp.asarray(s, jnp.float32) for s in sums])
    return (jax.random.uniform(key) >= below[:-1] / below[-1]).sum().astype(jnp.int32)


def _truths(rows: list[Example], names: list[str]) -> dict[str, list[Truth | None]]:
    """By name, the truth of every task that has it."""
    found: dict[str, list[Truth | None]] = {}
    for name in dict.fromkeys(itertools.chain(*(row.truth for row in rows))):
        truths = [row.truth.get(name) for row in rows]
        if len({(t.kind, t.values.shape[1:]) for t in truths if t is not None}) == 1:
            found[name] = truths
        else:
            own = {f"{names[i]}.{name}": i for i, t in enumerate(truths) if t is not None}
            found |= {named: [t if j == i else None for j, t in enumerate(truths)] for named, i in own.items()}
    return found


def _joined(truths: list[Truth | None], which: Int[Array, ""]) -> Truth:
    """One feature of several tasks: as many reads as the longest, at none where the row has none."""
    known = [t for t in truths if t is not None]
    reads = max(t.positions.shape[0] for t in known)
    rest = known[0].values.shape[1:]
    nothing = Truth(jnp.zeros((0, *rest), known[0].values.dtype), jnp.zeros(0, jnp.int32))
    filled = [t or nothing for t in truths]
    values = [jnp.pad(t.values, [(0, reads - t.values.shape[0]), *[(0, 0)] * len(rest)]) for t in filled]
    positions = [jnp.pad(t.positions, (0, reads - t.positions.shape[0]), constant_values=-1) for t in filled]
    classes = max(t.classes or 0 for t in known) or None
    return Truth(jnp.stack(values)[which], jnp.stack(positions)[which], known[0].kind, classes)


@spec
class Mixture(Several):
    """Every row is of one of several tasks, drawn with chances in proportion to `weights`.

    tasks=[binary_copy length=4, parity length=4]:     C 1 0 1 1 : 1 0 1 1 $     or     P 1 0 1 1 : 1 1 0 1 $
    with tag:     <binary_copy> C 1 0 1 1 : 1 0 1 1 $

    Weights are leaves: runs of other weights are one cohort. A task of weight 0 lends its symbols alone.
    """

    weights: tuple[float, ...] = field((0.5, 0.5), "chances of the tasks, up to a common factor", ge=0)

    def check(self) -> None:
        super().check()
        if len(self.weights) != len(self.tasks):
            raise Invalid("weights", list(self.weights), f"allowed: one for each of {len(self.tasks)} tasks")
        if not any(self.weights):
            raise Invalid("weights", list(self.weights), "allowed: at least one above 0")

    def chances(self, progress: Any) -> Chances:
        del progress
        return self.weights

    def held_out(self) -> Chances:
        return self.weights

    def mean_positions(self) -> float:
        return self.tag + self._mean([task.mean_positions() for task in self.tasks], self.weights)


@spec
class Curriculum(Several):
    """One task after another: task i is trained on until the share `ends[i]` of the run is over, the last one to the end.

    tasks=[parity length=4, parity length=8, parity length=16], ends=[0.2, 0.5]
    progress of the run    0 .. 0.2    0.2 .. 0.5    0.5 .. 1
    length of a row        4           8             16            (keep: 4; 4 or 8; 4, 8 or 16, equally often)

    Held-out rows, and with them floor, plateau and what instruments read, are those of the last task, the goal. `ends` are
    leaves. A stage that ends where it begins is left out.
    """

    scheduled: ClassVar[bool] = True
    tasks: tuple[Task, ...] = field((Polynomial(), Parity()), "the tasks, in order")
    ends: tuple[float, ...] = field((0.5,), "where in the run each task but the last one ends, from 0 to 1", ge=0, le=1)
    keep: bool = field(False, "earlier tasks stay in the mix, all equally often")

    def check(self) -> None:
        super().check()
        if len(self.ends) != len(self.tasks) - 1:
            raise Invalid("ends", list(self.ends), f"allowed: one for each of {len(self.tasks)} tasks but the last")
        if list(self.ends) != sorted(self.ends):
            raise Invalid("ends", list(self.ends), "allowed: in ascending order")

    def chances(self, progress: Any) -> Chances:
        stage = sum((jnp.asarray(progress >= end, jnp.int32) for end in self.ends), start=jnp.int32(0))
        return [jnp.where((stage >= i) if self.keep else (stage == i), 1.0, 0.0) for i in range(len(self.tasks))]

    def held_out(self) -> Chances:
        return [None] * (len(self.tasks) - 1) + [1.0]

    def mean_positions(self) -> float:
        """Over the run."""
        means = [task.mean_positions() for task in self.tasks]
        bounds = [0.0, *self.ends, 1.0]
        stages = [sum(means[: i + 1]) / (i + 1) if self.keep else mean for i, mean in enumerate(means)]
        return self.tag + sum(m * (stop - start) for m, start, stop in zip(stages, bounds[:-1], bounds[1:], strict=True))
