"""How well networks do on another task than the one they train on: what is forgotten, and what carries over."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import pyarrow as pa
from jaxtyping import Array, Bool, Float

from elegans.errors import Invalid
from elegans.instruments.base import Blocks, Layout, ReplicaInstrument
from elegans.instruments.patterns import by_length, lengths_of
from elegans.specs import field, spec
from elegans.store import Store
from elegans.tasks import Several, Task
from elegans.tasks.sampling import TaskData, draw_set, prepare
from elegans.training.run import Run
from elegans.training.step import logits_of, scores
from elegans.training.transfer import shapes
from elegans.types import Example


@spec
class Evaluate(ReplicaInstrument):
    """Scores on held-out rows of another task, in the network's own symbols of the same text.

    Without a `task` it is that of the run which each run goes on from, so that rows over steps are curves of forgetting; runs that
    go on from none are left out. With `own` it is the one that each run trains on, length by length. Of a mixture, `apart` makes it each of
    its tasks, also of weight 0, as the mixture has its rows; the column `task` names it. Rows are drawn for the run, the same
    at every step. `length` is null for all of them
    together; where the task has lengths there are further rows for each number of inputs:
      loss          nats per scored token, over the network's whole vocabulary. The task's floor at best
      accuracy      share of scored tokens, 0 to 1. Chance: 1 / vocabulary for a network that knows nothing
      exact_match   share of rows that are right at every scored token, 0 to 1
    """

    task: Task | None = field(None, "the task; none: that of each run's parent")
    own: bool = field(False, "the task that each run trains on, instead of another")
    apart: Literal["tasks"] | None = field(None, "of a mixture each task by itself; none: its rows together")
    part: Literal["train", "validation", "test"] = field("test", "part of that task's split that rows are from")
    examples: int = field(512, "rows, of all lengths together", ge=1, le=1_000_000)

    def check(self) -> None:
        if self.own and self.task is not None:
            raise Invalid("own", True, "allowed: without a task")

    def rows(self, store: Store, listener: Callable[[str, Any], None], again: bool = False) -> Iterator[tuple[str, str, pa.Table]]:
        if self.task is None and not self.own and not any(line["spec"].get("after") for line in store.lines()):
            raise Invalid("task", None, "allowed: a task, such as task=parity; no run goes on from another, whose task it would be")
        yield from super().rows(store, listener, again)

    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array) -> Blocks:
        del data  # the run's own task's
        made = {}
        for name, other in self._others(run).items():
            rows = draw_set(other.task, self.part, key, self.examples, prepare(other.task))
            ids = jnp.asarray([run.task.symbols.index(symbol) for symbol in other.task.symbols])
            rows = dataclasses.replace(rows, tokens=ids[rows.tokens], weights=None)
            logits = logits_of(run, params, rows.tokens)
            groups = jnp.ones((1, self.examples), bool)
            if lengths_of(other):
                groups = jnp.concatenate([groups, by_length(other, rows)])
            made[name] = jax.lax.map(functools.partial(graded, logits, rows), groups)
        return made

    def layouts(self, run: Run) -> dict[str, Layout]:
        others = self._others(run)
        for other in others.values():
            _check(run, other.task)
        return {name: Layout({"task": name}, [[{"length": n} for n in (None, *lengths_of(other))]]) for name, other in others.items()}

    def _others(self, run: Run) -> dict[str, Run]:
        """A run of every task that this one is measured on, by the task's name."""
        task = run.task if self.own else self.task or (run.after.task if run.after else None)
        assert task is not None
        each = {task.kind: task}
        if self.apart == "tasks" and isinstance(task, Several):
            each = {name: task.alone(i) for i, name in enumerate(task.names)}
        return {name: Run(one, run.model, steps=1) for name, one in each.items()}

    def split(self, runs: dict[str, Run]) -> list[tuple[ReplicaInstrument, dict[str, Run]]]:
        """Runs by the task that they are measured on, which is the same for those of one program."""
        if self.own or self.task is not None:
            return super().split(runs)
        tasks = {i: run.after.task for i, run in runs.items() if run.after is not None}
        return [
            (dataclasses.replace(self, task=task), {i: runs[i] for i, own in tasks.items() if own == task})
            for task in dict.fromkeys(tasks.values())
        ]

    def finish(self, table: pa.Table) -> pa.Table:
        """Lengths as whole numbers, also where every one is null."""
        return table.set_column(table.column_names.index("length"), "length", table["length"].cast(pa.int32()))


def graded(logits: Float[Array, "row position vocab"], rows: Example, group: Bool[Array, " row"]) -> dict[str, Float[Array, ""]]:
    """Loss, accuracy and exact match of the rows of a group; NaN where it has nothing that is scored."""
    mine = dataclasses.replace(rows, scored=rows.scored & group[:, None])
    loss, metrics = scores(logits, mine)
    return {name: jnp.where(mine.scored.any(), value, jnp.nan) for name, value in {"loss": loss, **metrics}.items()}


def _check(run: Run, task: Task) -> None:
    """Raises `Invalid` for a task that the network cannot read."""
    unknown = [symbol for symbol in task.symbols if symbol not in run.task.symbols]
    if unknown:
        raise Invalid("task", task.kind, f"its symbols {' '.join(unknown)} are not among the network's, {' '.join(run.task.symbols)}")
    bound = any("positions" in shape.kinds for shape in shapes(run.task, run.model).values())
    if bound and task.positions > run.task.positions:
        raise Invalid("task", task.kind, f"its rows have {task.positions} tokens, and the network has positions for {run.task.positions}")
