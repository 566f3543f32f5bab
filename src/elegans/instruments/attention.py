"""Attention maps: every head's mean attention, as rows that figures draw."""

from __future__ import annotations

import functools
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from elegans.errors import Invalid
from elegans.instruments.base import Blocks, Layout, ReplicaInstrument
from elegans.instruments.patterns import by_length, heads_of, iteration, lengths_of, maps_of
from elegans.specs import field, spec
from elegans.tasks.sampling import TaskData, draw_set
from elegans.training.run import Run

LABELLED = 64  # rows looked at to tell which tokens are the same in all


@spec
class AttentionMaps(ReplicaInstrument):
    """Every head's attention [layer, head, query, key], the mean over rows of one length.

    `attention` is a share of the query's attention: the keys of one query add up to 1; a uniform head gives each of
    query + 1 visible ones 1 / (query + 1). Queries beyond the last that predicts a scored token are left out, and so is
    everything where no row has the length. `query` and `key` are positions; `query_label` and `key_label` their tokens:
    the symbol where it is the same in all rows, x1, x2, ... and s1, s2, ... for inputs and states of an iterative task,
    else the position after a `#`.
    """

    kind: ClassVar[str] = "attention"
    length: int | None = field(None, "inputs of the rows, for tasks with rows of several lengths; none: the most", ge=1)
    part: Literal["train", "validation", "test"] = field("test", "part of the split that rows are from")
    examples: int = field(512, "rows to draw, of all lengths together", ge=1, le=1_000_000)

    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array) -> Blocks:
        rows = draw_set(run.task, self.part, key, self.examples, data)
        there = rows.scored.any(1) & by_length(run, rows)[self._group(run)]
        last = (jnp.arange(rows.scored.shape[1] - 1) * rows.scored[:, 1:]).max(1)  # the last query that matters
        maps = maps_of(run, params, rows.tokens)
        q = jnp.arange(maps.shape[-1])
        total = jnp.einsum("n,nlhqk->lhqk", there.astype(jnp.float32), maps, precision="highest")
        mean = total / jnp.where(there.any(), there.sum(), jnp.nan)
        seen = (q[None] <= q[:, None]) & (q[:, None] <= jnp.where(there, last, 0).max())
        return {"attention": {"attention": jnp.where(seen, mean, jnp.nan)}}

    def layouts(self, run: Run) -> dict[str, Layout]:
        labels = labels_of(Run(run.task, run.model, steps=1), self._group(run))  # the same for all such runs, and drawn once
        axes = [[{name: p, f"{name}_label": label} for p, label in enumerate(labels)] for name in ("query", "key")]
        lengths = lengths_of(run)
        return {"attention": Layout({"length": lengths[self._group(run)] if lengths else None}, [*heads_of(run), *axes])}

    def _group(self, run: Run) -> int:
        """Which of the task's lengths. Raises `Invalid`."""
        lengths = lengths_of(run)
        if self.length is not None and self.length not in lengths:
            raise Invalid("length", self.length, f"allowed for {run.task.kind}: none{f' or 1..{lengths[-1]}' if lengths else ''}")
        return lengths.index(self.length) if self.length is not None else max(len(lengths) - 1, 0)


@functools.lru_cache
def labels_of(run: Run, group: int) -> list[str]:
    """A name for each token of rows of one length that predicts another."""
    count = LABELLED * max(1, len(lengths_of(run)))

    def draw(keys: jax.Array) -> Any:
        rows = jax.vmap(lambda k: run.task.sample(k, run.task.prepare()))(keys)
        return rows, by_length(run, rows)[group]

    rows, there = jax.device_get(jax.jit(draw)(jax.random.split(jax.random.key(0), count)))
    tokens = rows.tokens[there][:, :-1]
    if not len(tokens):
        return [f"#{p}" for p in range(rows.tokens.shape[1] - 1)]
    labels = [run.task.symbols[column[0]] if (column == column[0]).all() else f"#{p}" for p, column in enumerate(tokens.T)]
    where = iteration(run.task, rows.truth)
    if where is not None:
        chosen = np.flatnonzero(there)[0]
        for t, (q, x) in enumerate(zip(*(np.asarray(a)[chosen].tolist() for a in where), strict=True), 1):
            places = {x: f"x{t}", q + 1: f"s{t}"} if q >= 0 else {}
            labels = [places.get(p, label) for p, label in enumerate(labels)]
    return labels
