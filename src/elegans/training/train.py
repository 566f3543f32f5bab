"""Training one convoy: a generator of everything worth keeping. It writes nothing and knows no store."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import numpy as np

from elegans.training.ahead import Ahead
from elegans.training.cohort import CHUNK, Programs
from elegans.training.convoy import Convoy
from elegans.training.cost import Leg
from elegans.training.run import Run, When
from elegans.training.step import State

CHUNK_SECONDS = 0.5  # aim of one call to the device, so that progress moves and a stop is obeyed


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a table (`metrics`, `positions`): equally long columns, `run` holding ids."""

    table: str
    columns: dict[str, np.ndarray]
    members: np.ndarray  # of which of the convoy's cohorts each row is


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of some runs of a cohort after `step` updates."""

    step: int
    runs: list[str]
    vectors: np.ndarray  # [replica, parameter]
    member: int  # which of the convoy's cohorts


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The states of some cohorts' first replicas after `step` updates: all that resuming needs. They can be had until the next event."""

    step: int
    members: list[int]  # which of the convoy's cohorts
    diverged: list[np.ndarray]  # of each, by replica, as in `State`
    split: Callable[[], list[State]]  # their states; those of wide models take seconds to leave a device


@dataclasses.dataclass(frozen=True)
class Compiling:
    """A program for `size` replicas is about to be compiled."""

    step: int
    size: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """It is ready. Some of it was compiled (`fresh`), or all came from the persistent cache."""

    step: int
    size: int
    seconds: float  # that training waited for it
    ahead: float  # that it took, beside other cohorts' training where threads compile ahead
    fresh: bool


@dataclasses.dataclass(frozen=True)
class Progress:
    """`steps` more steps of `size` replicas were done, up to `step`."""

    step: int
    size: int
    seconds: float
    steps: int
    loss: float | None  # median over live replicas


Event = Rows | Weights | Checkpoint | Compiling | Compiled | Progress


Inherit = Callable[[np.ndarray], np.ndarray]  # what runs start from, of their own initial parameters [replica, parameter]


def train_convoy(
    convoy: Convoy, ahead: Ahead, step: int = 0, states: Mapping[int, State] | None = None, inherit: Inherit | None = None
) -> Iterator[Event]:
    """Train cohorts together from `step` (with the states of that step, by cohort, or untrained) to their end, with programs from `ahead`.

    Untrained runs start from initial weights, or from what `inherit` makes of them. A cohort that has no states ended before the others
    went back: it trains anew beside them, since their bits depend on how many train, and nobody keeps it.
    """
    before: tuple[Programs, State, np.ndarray] | None = None  # what has trained so far, and the replicas of it that go on
    for leg in convoy.legs:
        if leg.stop <= step:
            continue
        yield Compiling(step, sum(leg.sizes))
        began = time.perf_counter()
        ready = ahead.take(convoy, leg)
        programs, members = ready.programs, convoy.members(leg)
        yield Compiled(step, sum(leg.sizes), time.perf_counter() - began, ready.seconds, ready.fresh)
        if before is not None:
            joint = programs.go_on(*before)
        elif states is None:
            joint = programs.start()
            joint = programs.begin(inherit(np.asarray(joint.params))) if inherit else joint
        else:
            fresh = {} if states.keys() >= set(members) else dict(zip(members, programs.split(programs.start()), strict=True))
            joint = programs.join([states[i] if i in states else fresh[i] for i in members])
        before = states = None  # their memory is free for training
        joint = yield from _Leg(convoy, leg, programs).train(step, joint)
        step = leg.stop
        if step < convoy.steps:
            before = programs, joint, _going_on(leg.sizes, next(after.sizes for after in convoy.legs if after.start == step))


def _going_on(sizes: Sequence[int], smaller: Sequence[int]) -> np.ndarray:
    """Where the first runs of every cohort, so many of each, are among more of them."""
    return np.concatenate([end - size + np.arange(n) for end, size, n in zip(np.cumsum(sizes), sizes, smaller, strict=True)])


class _Schedule:
    """When each run of a cohort does something that a `When` asks for."""

    def __init__(self, runs: Sequence[Run], when: When, shift_last: int = 0):
        lengths = sorted({run.length for run in runs})
        marks = [np.unique([*steps[:-1], *(last - shift_last for last in steps[-1:])]).astype(int) for steps in map(when.upto, lengths)]
        self._at = np.unique(np.concatenate(marks))
        self._marked = np.stack([np.isin(self._at, each) for each in marks], 1)  # [of `_at`, length]
        self._length = np.searchsorted(lengths, [run.length for run in runs])
        self.steps = self._at.tolist()

    def due(self, steps: np.ndarray) -> np.ndarray:
        """Which run does it at which step: [step, run]. Asked for every call to the device, which waits meanwhile."""
        if not self.steps:
            return np.zeros((len(steps), len(self._length)), bool)
        place = np.searchsorted(self._at, steps).clip(max=len(self._at) - 1)
        return (self._at[place] == steps)[:, None] & self._marked[place][:, self._length]


class _Leg:
    """The training of one leg of a convoy."""

    def __init__(self, convoy: Convoy, leg: Leg, programs: Programs):
        self.leg, self.programs, self.members = leg, programs, convoy.members(leg)
        self.runs = [run for members in convoy.groups(leg) for run in members]
        self.ids = np.array([run.id for run in self.runs])
        self.homes = np.repeat(self.members, [leg.sizes[i] for i in self.members])
        self.lengths = np.array([run.length for run in self.runs])
        self.checkpoint_every = convoy.plans[0].checkpoint_every
        record = self.runs[0].record
        self.record = record
        self.train_marks = _Schedule(self.runs, record.train, shift_last=1)
        self.evaluate_marks = _Schedule(self.runs, record.evaluate)
        self.weight_marks = _Schedule(self.runs, record.weights) if record.weights else None
        self.chunk = 1

    def train(self, step: int, states: State) -> Generator[Event, None, State]:
        """Yield events from `step` to the leg's end; return the states there."""
        if step == 0:
            yield from self._boundary(0, states)
        for stop in self._stops(step):
            while step < stop:
                states, step = yield from self._advance(step, stop, states)
            yield from self._boundary(stop, states)
        return states

    def _stops(self, step: int) -> list[int]:
        every = range(0, self.leg.stop, self.checkpoint_every)
        weights = self.weight_marks.steps if self.weight_marks else []
        marks = {*every, *self.evaluate_marks.steps, *weights, *self.lengths.tolist(), self.leg.stop}
        return sorted(s for s in marks if step < s <= self.leg.stop)

    def _advance(self, step: int, stop: int, states: State) -> Generator[Event, None, tuple[State, int]]:
        n = min(self.chunk, stop - step, CHUNK)
        began = time.perf_counter()
        states, metrics = self.programs.chunk(states, step, n)
        seconds = time.perf_counter() - began
        self.chunk = max(1, min(CHUNK, 2 * self.chunk, int(CHUNK_SECONDS / max(seconds / n, 1e-9))))
        yield from self._train_rows(np.arange(step, step + n), metrics)
        last = metrics["loss"][-1]
        yield Progress(step + n, len(self.runs), seconds, n, float(np.nanmedian(last)) if np.isfinite(last).any() else None)
        return states, step + n

    def _train_rows(self, steps: np.ndarray, metrics: dict[str, np.ndarray]) -> Iterator[Rows]:
        at, run = np.nonzero(self.train_marks.due(steps) & (steps[:, None] < self.lengths) & ~np.isnan(metrics["loss"]))
        if len(at):
            columns = {name: values[at, run] for name, values in metrics.items()}
            yield Rows("metrics", {"run": self.ids[run], "step": steps[at], "split": np.full(len(at), "train"), **columns}, self.homes[run])

    # ---- boundaries

    def _boundary(self, step: int, states: State) -> Iterator[Event]:
        sound = np.asarray(states.diverged) < 0
        due = self.evaluate_marks.due(np.array([step]))[0] & sound
        if due.any():
            yield from self._evaluation(step, states, "validation", np.nonzero(due)[0])
        ended = np.nonzero((self.lengths == step) & sound)[0]
        if len(ended):
            yield from self._evaluation(step, states, "test", ended)
        kept = np.nonzero(self.weight_marks.due(np.array([step]))[0] & sound)[0] if self.weight_marks else np.empty(0, int)
        if len(kept):
            for slots, vectors in self.programs.vectors(states.params, kept):
                yield Weights(step, self.ids[slots].tolist(), vectors, int(self.homes[slots[0]]))
        last = step == self.leg.stop
        if last or (step > 0 and step % self.checkpoint_every == 0):
            diverged = np.split(np.asarray(states.diverged), np.cumsum([self.leg.sizes[i] for i in self.members])[:-1])
            yield Checkpoint(step, self.members, diverged, functools.cache(lambda: self.programs.split(states)))

    def _evaluation(self, step: int, states: State, part: str, slots: np.ndarray) -> Iterator[Rows]:
        scores = self.programs.evaluate(states.params, part, slots)
        where = {"run": self.ids[slots], "step": np.full(len(slots), step), "split": np.full(len(slots), part)}
        yield Rows(
            "metrics", {**where, **{n: np.asarray(getattr(scores, n)) for n in ("loss", "accuracy", "exact_match")}}, self.homes[slots]
        )
        if not self.record.by_position:
            return
        loss = np.asarray(scores.position_loss)
        slot, place = np.nonzero(~np.isnan(loss))
        columns = {name: values[slot] for name, values in where.items()}
        yield Rows("positions", {**columns, "position": place + 1, "loss": loss[slot, place]}, self.homes[slots][slot])
