"""The cohort: runs of one structure, stacked, and the programs that train and evaluate them together.

Everything here is `jax.vmap` of what `step.py` says of one run. The step count is the cohort's own, so
that a schedule of the step never becomes a branch for every replica.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from elegans.errors import Invalid
from elegans.models.base import once
from elegans.sources import classes, is_custom
from elegans.tasks.sampling import TaskData, prepare
from elegans.training.device import cache_misses, compiler_options
from elegans.training.evaluation import Evaluation, HeldOut, check_scored, draw_held_out, evaluate
from elegans.training.run import Run
from elegans.training.spread import Spread, devices_for
from elegans.training.step import RunData, State, draw_batch, draw_data, shapes_of, start, take
from elegans.training.transfer import depth
from elegans.training.vectors import refitted
from elegans.types import AnyArray, Example

CHUNK = 256  # steps whose metrics are kept on the device before they travel to the host
AHEAD = 8  # steps whose batches a device draws at once: its kernels wait for each other, and hardly for their work
EVALUATIONS = 8  # parts of a cohort that are evaluated apart: where one run of many ends, the others need not be

_TRACING = threading.Lock()  # tracing holds Python's own lock: in turns the first is ready first, all at once all are ready last

# ---- grouping and stacking


def resolve(run: Run) -> Run:
    """The run as the engine sees it: its length in steps, every seed explicit, no label and no parent, whose weights it is given."""
    return dataclasses.replace(
        run,
        steps=run.length,
        examples=None,
        epochs=None,
        flops=None,
        label=None,
        after=None,
        after_step=None,
        data_seed=run.seed if run.data_seed is None else run.data_seed,
        init_seed=run.seed if run.init_seed is None else run.init_seed,
    )


def group(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs by structure, in the order in which structures first appear; parents apart from their children."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault((depth(run), jax.tree.structure(resolve(run))), []).append(run)
    return list(groups.values())


def stack(runs: Sequence[Run]) -> Run:
    """One Run whose leaves have a leading replica axis: int32 or float32."""

    def column(*values: Any) -> np.ndarray:
        return np.asarray(values, np.int32 if isinstance(values[0], int) else np.float32)

    return jax.tree.map(column, *[resolve(run) for run in runs])


def share(runs: Sequence[Run]) -> tuple[TaskData, Any]:
    """The runs' task data, and for every array whether it is shared (None) or stacked over replicas (0)."""
    made = {run.task: prepare(run.task) for run in runs}
    columns = [made[run.task] for run in runs]
    flat = [jax.tree.flatten(data) for data in columns]
    arrays, axes = [], []
    for values in zip(*(leaves for leaves, _ in flat), strict=True):
        equal = all(v is values[0] or np.array_equal(v, values[0]) for v in values)
        arrays.append(np.asarray(values[0]) if equal else np.stack(values))
        axes.append(None if equal else 0)
    return jax.tree.unflatten(flat[0][1], arrays), jax.tree.unflatten(flat[0][1], axes)


# ---- the compiled cohort


class Programs:
    """The compiled programs of one structure at one size. Compilation happens on first use of each."""

    _inherits = False  # whether runs start from their parents' weights

    def __init__(self, runs: Sequence[Run], device: jax.Device, devices: int | None = None, few: int | None = None):
        """Programs for runs of one structure on a device; a CPU's cores share them, at most `devices` of them.

        `few`: replicas that a device evaluates at a time, the same in all programs of a convoy.
        """
        task, axes = share(runs)
        self.shapes = shapes_of(resolve(runs[0]))  # of one replica's weights, as the programs have them
        self.spread = spread = Spread(devices_for(device, len(runs), devices), len(runs))
        few = evaluated(device, len(runs), few)
        self.few = Spread(devices_for(device, few, devices), few)
        self.runs, self.task = spread.place(stack(runs)), spread.place(task, axes)
        pair: Any = RunData  # of axes, in the shape of the data
        data = pair(axes, 0)
        self._draw = jax.jit(over(draw_batch, 0, None, data), inline=True)  # so that it is traced once
        self._take = jax.jit(over(take, 0, 0, None, 0), inline=True)  # as this is
        self._functions = {
            "start": spread.jit(over(start, 0), (0,), 0),
            "begin": spread.jit(over(start, 0, 0), (0, 0), 0),
            "data": spread.jit(over(_finite_set, 0, axes), (0, axes), 0),
            "held_out": spread.jit(over(draw_held_out, 0, axes), (0, axes), 0),
            "evaluate": self.few.jit(over(evaluate, 0, 0, 0), (0, 0, 0), 0),
            "few": jax.jit(taken),
            "chunk": spread.jit(self._chunk, (0, 0, data, None, None), (0, 2), donate=(1,)),
        }
        self._inherits = depth(runs[0]) > 0

    @functools.cached_property
    def _compiled(self) -> dict[str, Any]:
        """Compiled programs by name."""
        return {}

    def _program(self, name: str, *args: Any) -> Any:
        """A compiled program, for arguments of these shapes."""
        if name not in self._compiled:
            self._compiled[name], _ = self._build(self._lower(name, *args))
        return self._compiled[name]

    def _lower(self, name: str, *args: Any) -> Any:
        """A function's program, not yet compiled, for which layers that are alike are traced once.

        Not for a CPU, where it would round otherwise, nor with components of the user's, which may do something else in every layer.
        """
        with contextlib.nullcontext() if self._on_cpu or any(map(is_custom, classes(self.runs.model))) else once():
            return self._functions[name].lower(*args)

    def _build(self, lowered: Any) -> tuple[Any, bool]:
        """A compiled program, and whether the persistent cache lacked it (which is counted by thread)."""
        misses = cache_misses()
        options = compiler_options(self.spread.devices[0].platform, self.runs.model)
        return lowered.compile(compiler_options=options), cache_misses() > misses

    def _arguments(self) -> dict[str, tuple[Any, ...]]:
        """Shapes of the arguments of everything that training and evaluating needs, the largest program first."""
        rows = jax.eval_shape(self._functions["held_out"], self.runs, self.task)
        evaluated = self.runs, self.states_like.params, rows.validation
        return {
            "chunk": (*self._step_like, np.int32(1)),
            "evaluate": jax.tree.map(self._few_of, evaluated),
            **({} if self._on_cpu else {"few": (evaluated, np.zeros(self.few.replicas, np.int32))}),
            "held_out": (self.runs, self.task),
            "start": self._of_start,
            **({"begin": (self.runs, self.states_like.params)} if self._inherits else {}),
            **({"data": (self.runs, self.task)} if self.runs.train_set else {}),
        }

    @property
    def _on_cpu(self) -> bool:
        return self.spread.devices[0].platform == "cpu"

    def _few_of(self, a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.few.replicas, *a.shape[1:]), a.dtype)

    @functools.cached_property
    def states_like(self) -> State:
        """Shapes of the states."""
        return jax.eval_shape(self._functions["start"], *self._of_start)

    @functools.cached_property
    def _data_like(self) -> RunData:
        return RunData(self.task, jax.eval_shape(self._functions["data"], self.runs, self.task) if self.runs.train_set else None)

    @functools.cached_property
    def _step_like(self) -> tuple[Any, ...]:
        """Arguments of a training step."""
        return self.runs, self.states_like, self._data_like, np.int32(0)

    def start(self) -> State:
        """Untrained states, stacked."""
        return self._program("start", *self._of_start)(*self._of_start)

    def begin(self, vectors: Float[np.ndarray, "replica parameter"]) -> State:
        """States that start from given parameters, stacked."""
        given = self.runs, self.spread.place(vectors)
        return self._program("begin", *given)(*given)

    @property
    def _of_start(self) -> tuple[Any, ...]:
        """Arguments of what makes untrained states."""
        return (self.runs,)

    def join(self, parts: Sequence[State]) -> State:
        """The states of the first replicas of every cohort in the program, from those of as many or more of each."""
        return self.place(*parts)

    def go_on(self, before: Programs, states: State, slots: Int[np.ndarray, " slot"]) -> State:
        """The states of some replicas of a larger program, which do not leave the device, and their held-out examples."""
        self.hold(before.held(slots))
        return jax.tree.map(lambda a: refitted(self.spread.take(a, slots), before.shapes, self.shapes), states)  # in turn: less memory

    def split(self, states: State) -> list[State]:
        """The states of every cohort in the program, each with its own model's parameters."""
        return [states]

    def vectors(self, params: Float[AnyArray, "replica parameter"], slots: Int[np.ndarray, " slot"]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of every cohort with some of the slots: these, and their parameters [slot, parameter] of its own model."""
        return [(slots, np.asarray(params)[slots])]

    def place(self, states: State) -> State:
        """The first replicas' states, from the host or of a larger cohort, where the programs want them."""
        return self.spread.take(states, np.arange(self.spread.replicas))

    @functools.cached_property
    def data(self) -> RunData:
        """What the runs draw from, on the device."""
        return RunData(self.task, self._program("data", self.runs, self.task)(self.runs, self.task) if self.runs.train_set else None)

    @functools.cached_property
    def _rows(self) -> HeldOut:
        """The runs' held-out examples, on the device. Raises `Invalid` where a set could not be drawn."""
        rows = self._program("held_out", self.runs, self.task)(self.runs, self.task)
        check_scored(rows)
        return rows

    def held(self, slots: Int[np.ndarray, " slot"]) -> HeldOut:
        """The held-out examples of some replicas, on the host."""
        return jax.tree.map(lambda a: np.asarray(a)[slots], self._rows)

    def hold(self, rows: HeldOut) -> None:
        """Take the runs' held-out examples from another program, whose rows may be longer; they need not be drawn then."""
        positions = self.runs.task.positions
        self._rows = self.spread.place(jax.tree.map(lambda a: a[..., :positions], rows))

    def compile(self) -> Any:
        """The training program. Raises `Invalid` where custom code branches on a leaf."""
        return self._program("chunk", *self._step_like, np.int32(1))

    def compile_all(self, without: Container[str] = ()) -> bool:
        """Everything that training and evaluating needs, side by side; whether the persistent cache lacked any of it."""
        with _TRACING:
            lowered = {name: self._lower(name, *args) for name, args in self._arguments().items() if name not in without}
        with ThreadPoolExecutor(len(lowered)) as pool:
            made = dict(zip(lowered, pool.map(self._build, lowered.values()), strict=True))
        self._compiled = {name: program for name, (program, _) in made.items()}
        return any(fresh for _, fresh in made.values())

    @functools.cached_property
    def metrics(self) -> tuple[str, ...]:
        """Names of what a training step records, in the order of the program's results."""
        return metrics_of(self._draw, self._take, *self._step_like)

    @property
    def ahead(self) -> int:
        """Steps whose batches are drawn at once."""
        return 1 if self._on_cpu else AHEAD

    @property
    def _chunk(self) -> Callable:
        return functools.partial(chunk_of, self._draw, self._take, self.ahead)

    def chunk(self, states: State, step: int, steps: int) -> tuple[State, dict[str, Float[np.ndarray, "step replica"]]]:
        """`steps` optimiser steps (at most CHUNK) from `step`: new states, and the metrics of every step."""
        states, buffer = self.compile()(self.runs, states, self.data, np.int32(step), np.int32(steps))
        return states, dict(zip(self.metrics, np.asarray(buffer)[:, :steps], strict=True))

    def evaluate(self, params: Any, part: str, slots: Int[np.ndarray, " slot"]) -> Evaluation:
        """Scores of some replicas, each on its own held-out examples of a part. Raises `Invalid` where a set could not be drawn."""
        size, made = self.few.replicas, []
        for first in range(0, len(slots), size):
            here = slots[first : first + size]
            taken = self._few((self.runs, params, getattr(self._rows, part)), np.append(here, np.repeat(here[:1], size - len(here))))
            made.append(jax.tree.map(np.asarray, self._program("evaluate", *taken)(*taken)))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(slots)], *made)

    def _few(self, tree: Any, index: Int[np.ndarray, " slot"]) -> Any:
        """Some replicas' arrays, where `evaluate` wants them: in one program on a device, array by array on cores."""
        index = index.astype(np.int32)
        return self.few.take(tree, index) if self._on_cpu else self._program("few", tree, index)(tree, index)

    def bytes(self) -> int:
        """Memory of the training program: arguments, results and temporaries, as compiled."""
        m = self.compile().memory_analysis()
        each = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
        return each * len(self.spread.devices)  # they are cores of one CPU, or one device


def evaluated(device: jax.Device, replicas: int, few: int | None = None) -> int:
    """Replicas of a program that are evaluated at a time."""
    return -(-replicas // EVALUATIONS) if device.platform == "cpu" or few is None else few


def taken(tree: Any, index: Int[Array, " replica"]) -> Any:
    """Some replicas out of all."""
    return jax.tree.map(lambda a: a[index], tree)


def over(function: Callable, *axes: Any) -> Callable:
    """A function of one replica, of many."""
    return jax.vmap(function, axes, axis_name="replica")


def _finite_set(run: Run, task: TaskData) -> Example | None:
    return draw_data(run, task).finite


def metrics_of(draw: Any, take: Any, runs: Run, states: State, data: RunData, step: Any) -> tuple[str, ...]:
    """Names of what a training step records, in the order of the program's results."""
    return tuple(jax.eval_shape(lambda *args: take(runs, states, args[1], draw(runs, args[1], args[0])), data, step)[1])


def chunk_of(
    draw: Any, take: Any, ahead: int, runs: Run, states: State, data: RunData, first: Int[Array, ""], steps: Int[Array, ""]
) -> tuple[State, Array]:
    """Steps first..first+steps of every replica: new states, and metrics [metric, step, replica].

    Batches are drawn for so many steps `ahead`. The trip count is data, so that a chunk of any length is the same program, with the
    same bits.
    """
    names, replicas = metrics_of(draw, take, runs, states, data, first), states.diverged.shape[0]

    def group(g: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
        begin = g * ahead
        drawn = jax.vmap(lambda i: draw(runs, first + begin + i, data))(jnp.arange(ahead))

        def body(i: Array, carry: tuple[State, Array]) -> tuple[State, Array]:
            states, metrics = take(runs, carry[0], first + begin + i, jax.tree.map(lambda a: a[i], drawn))
            return states, carry[1].at[:, begin + i].set(jnp.stack([metrics[name].astype(jnp.float32) for name in names]))

        return jax.lax.fori_loop(0, jnp.minimum(ahead, steps - begin), body, carry)

    metrics = jnp.full((len(names), CHUNK, replicas), jnp.nan, jnp.float32)
    return jax.lax.fori_loop(0, (steps + ahead - 1) // ahead, group, (states, metrics))


# ---- errors of custom code


def traced(run: Run, trace: Callable[[Run], Any]) -> Any:
    """Trace something of a run, compiling nothing. Raises `Invalid` naming the leaf that custom code branches on."""
    try:
        return trace(jax.tree.map(np.asarray, resolve(run)))
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError, jax.errors.TracerArrayConversionError) as error:
        allowed = "a leaf differs inside a cohort and cannot be branched on: use jnp.where, or mark the field structure()"
        raise Invalid(_leaf_in(str(error), run), "a traced number", allowed) from error


def _leaf_in(message: str, run: Run) -> str:
    """The dotted path of the leaf that JAX's message names, as `run.optim.lr`."""
    found = re.search(r"\brun\.([\w.]+)", message)
    return found.group(1).rstrip(".") if found else type(run).__name__
