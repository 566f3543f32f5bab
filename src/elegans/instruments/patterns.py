"""Named ideal patterns: where a head of a known circuit looks, query by query.

A pattern says for every query the position of the key that should get all of the attention; `NOWHERE`: the pattern says
nothing of this query, which then counts nowhere; `EVERYWHERE`: every visible key the same. The queries are those up to
the last that predicts a scored token, without the first, which sees only itself.

  previous     the token before                 first        the row's first token
  self         the token itself                 uniform      all tokens that it sees
  induction    the token after the last earlier occurrence of the query's own token (Olsson et al. 2022)
  iteration_1  with chain of thought: s_1 .. s_L look at EoI                        (Cabannes et al. 2024)
  iteration_2  with chain of thought: EoI, s_1 .. s_(L-1) look at x_1, x_2 .. x_L

The queries of iteration_1 are all states: that EoI looks at itself would say nothing, and from s_L the row's end is predicted.
Where nothing scored is predicted from s_L, it is no query. Both are for tasks whose rows are
`[task] x_1 .. x_L [EoI] s_1 .. s_L [EoS]`, with the truth `input` read where s_t is predicted. What a task's own circuit is,
its method `attends` says.

Of a mixture the patterns of iteration are also there for the rows of each task apart, as `task.iteration_2`: whether one head serves
several tasks is read off them. They say nothing of the rows of other tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from elegans.errors import Invalid
from elegans.instruments.base import those
from elegans.instruments.probe import truth_of
from elegans.tasks import Several, Task
from elegans.training.run import Run
from elegans.types import Example, Truth

NOWHERE, EVERYWHERE = -1, -2
Targets = Int[Array, " query"]


def _induction(tokens: Int[Array, " query"]) -> Targets:
    q = jnp.arange(tokens.shape[0])
    earlier = (tokens[:, None] == tokens[None]) & (q[None] < q[:, None])
    last = jnp.where(earlier, q[None], -1).max(1)
    return jnp.where(last >= 0, last + 1, NOWHERE)


GENERAL: dict[str, Callable[[Int[Array, " query"]], Targets]] = {
    "previous": lambda tokens: jnp.arange(tokens.shape[0]) - 1,
    "induction": _induction,
    "first": jnp.zeros_like,
    "self": lambda tokens: jnp.arange(tokens.shape[0]),
    "uniform": lambda tokens: jnp.full_like(tokens, EVERYWHERE),
}


class Iteration(NamedTuple):
    """Where an iteration with chain of thought is in a row."""

    queries: Int[Array, "*row reads"]  # the tokens before s_1, s_2, ...: EoI, s_1, ...; -1 beyond the last
    inputs: Int[Array, "*row reads"]  # x_1, x_2, ...; -1 beyond the last


def iteration(task: Task, truth: dict[str, Truth]) -> Iteration | None:
    """Where the iteration is in rows with this truth (one, or many stacked); None for tasks that write no states.

    Of a mixture's tasks, which may name their truths `task.input`, each row has the reads of its own.
    """
    writes = any(getattr(part, "cot", True) for part in getattr(task, "tasks", (task,)))
    queries = _inputs(truth)
    if queries is None or not writes:
        return None
    length = (queries >= 0).sum(-1, keepdims=True)
    there = (queries >= 0) & (queries[..., :1] > length)  # EoI stands behind all inputs; else the reads are at the inputs
    return Iteration(jnp.where(there, queries, -1), jnp.where(there, queries - length, -1))


def _inputs(truth: dict[str, Truth]) -> Int[Array, "*row reads"] | None:
    """Reads of the inputs."""
    found = [t.positions for name, t in truth.items() if name.rpartition(".")[2] == "input"]
    most = max((p.shape[-1] for p in found), default=0)
    padded = [jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, most - p.shape[-1])], constant_values=-1) for p in found]
    return jnp.stack(padded).max(0) if found else None


def _iteration_targets(where: Iteration, last: Int[Array, ""], queries: int) -> dict[str, Targets]:
    """The circuit of chain of thought, of as many queries as a row has, up to the last that predicts a scored token."""

    def at(place: Int[Array, " reads"], target: Int[Array, " reads"]) -> Targets:
        there = (where.queries >= 0) & (place <= last)
        return jnp.full(queries, NOWHERE).at[jnp.where(there, place, queries)].set(target, mode="drop")  # beyond: dropped

    start = jnp.broadcast_to(where.queries[:1], where.queries.shape)  # EoI; one behind each query stands its state
    return {"iteration_1": at(where.queries + 1, start), "iteration_2": at(where.queries, where.inputs)}


def _of_each_task(task: Task, example: Example, found: dict[str, Targets]) -> dict[str, Targets]:
    """Patterns, and of a mixture of several tasks also those of rows of each task that is drawn from."""
    if not isinstance(task, Several):
        return found
    drawn = [i for i, chance in enumerate(task.held_out()) if chance is not None]
    if len(drawn) < 2:
        return found
    which = example.truth["task"].values[0]
    apart = [(f"{task.names[i]}.{name}", jnp.where(which == i, t, NOWHERE)) for i in drawn for name, t in found.items()]
    return found | dict(apart)


def targets(task: Task, example: Example) -> dict[str, Targets]:
    """Every named pattern that one row of a task has: the task's own and those of iteration first."""
    tokens, n = example.tokens[:-1], example.tokens.shape[0] - 1
    found: dict[str, Targets] = {name: t[:n] for name, t in task.attends(example).items()}
    q = jnp.arange(n)
    last = jnp.where(example.scored[1:], q, 0).max()
    where = iteration(task, example.truth)
    found |= {} if where is None else _of_each_task(task, example, _iteration_targets(where, last, n))
    seen = (q >= 1) & (q <= last)
    return found | {name: jnp.where(seen, of(tokens), NOWHERE) for name, of in GENERAL.items() if name not in found}


def names_of(run: Run, asked: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The patterns that the run's task has: of those asked for, or all."""

    def made(key: jax.Array) -> dict[str, Targets]:
        return targets(run.task, run.task.sample(key, run.task.prepare()))

    known = tuple(jax.eval_shape(made, jax.random.key(0)))
    return those(asked, sorted(known, key=lambda name: name in GENERAL))  # tracing sorts names; the task's own stand first


def ideals(run: Run, rows: Example, names: tuple[str, ...]) -> Int[Array, "row pattern query"]:
    """Targets of some patterns for every row."""

    def one(example: Example) -> Int[Array, "pattern query"]:
        found = targets(run.task, example)
        return jnp.stack([found[name] for name in names])

    return jax.vmap(one)(rows)


def as_map(target: Targets) -> Float[Array, "query key"]:
    """The attention that a pattern asks for; a row of zeros where it says nothing."""
    n = target.shape[0]
    uniform = jnp.tri(n) / jnp.arange(1, n + 1)[:, None]
    return jnp.where((target == EVERYWHERE)[:, None], uniform, jax.nn.one_hot(target, n))


# ---- maps of a network, and rows of one length


def maps_of(run: Run, params: Any, tokens: Int[Array, "row position"]) -> Float[Array, "row layer head query key"]:
    """The attention of every head, at every token that predicts one. Rows are the batch."""

    def one(tokens: Int[Array, " position"]) -> Float[Array, "layer head query key"]:
        trace = run.model.apply(params, tokens[:-1])[1]
        return jnp.stack([trace[f"pattern.{i}"].astype(jnp.float32) for i in layers_of(trace.sites)])

    return jax.vmap(one, axis_name="batch")(tokens)


def layers_of(sites: Any) -> list[int]:
    """Layers whose attention a trace has."""
    return sorted(int(s.split(".")[1]) for s in sites if s.startswith("pattern."))


def heads_of(run: Run) -> list[list[dict[str, Any]]]:
    """Layers and heads, as axes of a layout. Raises `Invalid` for a model without attention."""

    def sites() -> dict[str, Array]:
        params = run.model.init(jax.random.key(0), run.task.vocab_size, run.task.positions)
        return run.model.apply(params, jnp.zeros(run.task.positions - 1, jnp.int32))[1].sites

    shapes = jax.eval_shape(jax.vmap(sites, axis_name="batch", axis_size=1))
    layers = layers_of(shapes)
    if not layers:
        raise Invalid("model", run.model.kind, "it has no attention to look at")
    return [[{"layer": i} for i in layers], [{"head": h} for h in range(shapes[f"pattern.{layers[0]}"].shape[1])]]


def lengths_of(run: Run) -> list[int]:
    """How many inputs rows of an iterative task can have; empty for other tasks, whose rows are of one kind."""
    truth = truth_of(run)
    shape = jax.eval_shape(_inputs, truth)
    return [] if shape is None else list(range(1, shape.shape[-1] + 1))


def by_length(run: Run, rows: Example) -> Bool[Array, "length row"]:
    """Which rows have each of the task's lengths; one group of all rows where it has none."""
    reads = _inputs(rows.truth)
    if reads is None:
        return jnp.ones((1, rows.tokens.shape[0]), bool)
    return (reads >= 0).sum(1) == jnp.asarray(lengths_of(run))[:, None]


def length_axis(run: Run) -> list[dict[str, Any]]:
    """The entries of `by_length`."""
    return [{"length": n} for n in lengths_of(run)] or [{"length": None}]
