"""The plan: which runs train together, in which order, and when their cohort shrinks.

A pure function of the runs and a stated memory budget. It is written to the store before training and
obeyed on resume, because kernels, and so bits, depend on a cohort's size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from elegans.errors import Invalid
from elegans.sources import code_of
from elegans.tasks.sampling import prepare
from elegans.training.cohort import group, resolve, traced
from elegans.training.run import Run
from elegans.training.step import advance, draw_data, shapes_of, start

LARGEST = 1024  # replicas of a cohort; throughput saturates far below
SHRINK_FLOPS = 3e12  # a smaller program is compiled where it saves at least this much training
CHECKPOINTS = 20  # of a cohort, evenly spaced
SMALLER = "lower model sizes or batch, or raise --memory"


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps start..stop of a cohort's first `size` runs."""

    start: int
    stop: int
    size: int


@dataclasses.dataclass(frozen=True)
class CohortPlan:
    """One cohort: its runs, longest first, and the sizes at which they train."""

    runs: tuple[Run, ...]
    segments: tuple[Segment, ...]
    checkpoint_every: int  # steps
    memory: int  # bytes, the budget that the size was chosen for
    devices: int  # most devices that share the cohort
    bytes: int  # an upper bound where nothing was compiled, else as compiled

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits from the content: members, sizes and code."""
        data = self.to_dict() | {"code": [code_of(run) for run in self.runs]}
        data.pop("memory"), data.pop("devices"), data.pop("bytes")
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def steps(self) -> int:
        """Steps of the longest run."""
        return self.segments[-1].stop

    @property
    def flops(self) -> float:
        """Training FLOPs of all runs, by their own convention."""
        return sum(run.length * flops_per_step(run) for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for plan.json."""
        return {
            "runs": [run.id for run in self.runs],
            "segments": [[s.start, s.stop, s.size] for s in self.segments],
            "checkpoint_every": self.checkpoint_every,
            "memory": self.memory,
            "devices": self.devices,
            "bytes": self.bytes,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], runs: dict[str, Run]) -> CohortPlan:
        """The plan in a store, with the runs by id."""
        segments = tuple(Segment(*s) for s in data["segments"])
        return cls(tuple(runs[i] for i in data["runs"]), segments, data["checkpoint_every"], data["memory"], data["devices"], data["bytes"])


def plan(runs: Sequence[Run], memory: int, measure: Callable[[Sequence[Run]], int] | None = None, devices: int = 1) -> list[CohortPlan]:
    """Cohorts of runs, each within `memory` bytes. Traces every structure once, and so finds errors in custom code.

    `measure` compiles some runs and returns the bytes they need; without it, or where a bound from
    the trace is already within the budget, nothing is compiled. Raises `Invalid` where one run alone does not fit.
    """
    return [cohort for members in group(runs) for cohort in _plan_group(members, memory, measure, devices)]


def _plan_group(members: list[Run], memory: int, measure: Callable[[Sequence[Run]], int] | None, devices: int) -> list[CohortPlan]:
    members = sorted(members, key=lambda run: (-run.length, run.id))
    bound = check(members[0], memory)
    size = min(len(members), LARGEST)
    needed = size * bound
    while measure is not None and needed > memory:
        needed = measure(members[:size])
        if needed <= memory:
            break
        if size == 1:
            raise Invalid("memory", f"{memory:,} bytes", f"one run of this structure needs {needed:,}; {SMALLER}")
        size = max(1, min(size - 1, int(size * memory / needed)))
        needed = size * bound
    # full cohorts first: what is left of a group is planned alike whether or not its first cohorts are already stored
    cohorts = (members[i : i + size] for i in range(0, len(members), size))
    return [_cohort(c, memory, devices, int(needed * len(c) / size)) for c in cohorts]


def _cohort(members: list[Run], memory: int, devices: int, needed: int) -> CohortPlan:
    lengths = [run.length for run in members]
    every = max(1, -(-lengths[0] // CHECKPOINTS))
    return CohortPlan(tuple(members), tuple(shrink(lengths, flops_per_step(members[0]))), every, memory, devices, needed)


def shrink(lengths: Sequence[int], flops_per_step: float) -> list[Segment]:
    """Segments of a cohort whose runs have these lengths, longest first.

    When at most a quarter of the replicas still train, they move to a program of the next power of two, where
    the idle replicas' steps that this saves are worth compiling it.
    """
    segments, begin, size = [], 0, len(lengths)
    for stop in sorted(set(lengths))[:-1]:
        live = sum(n > stop for n in lengths)
        smaller = 1 << (live - 1).bit_length()
        if live <= size / 4 and (size - smaller) * (lengths[0] - stop) * flops_per_step >= SHRINK_FLOPS:
            segments.append(Segment(begin, stop, size))
            begin, size = stop, smaller
    return [*segments, Segment(begin, lengths[0], size)]


def flops_per_step(run: Run) -> float:
    """FLOPs of a step, or of its parameters alone where a custom model does not count them."""
    try:
        return run.flops_per_step
    except NotImplementedError:
        return 6.0 * parameters(run) * run.batch * run.task.positions


def parameters(run: Run) -> int:
    """Trained numbers of a run."""
    return sum(w.size for w in jax.tree.leaves(shapes_of(resolve(run))))


# ---- checks before anything is compiled or written


def check(run: Run, memory: int) -> int:
    """Bytes that a replica of this structure needs at most. Raises `Invalid` for code or sizes that cannot work."""
    weights = parameters(run)
    least = 4 * 4 * weights + run.batch * run.task.positions * 4  # weights, gradients, two moments; the batch
    if least > memory:
        raise Invalid("memory", f"{memory:,} bytes", f"one run needs at least {least:,} for its {weights:,} parameters; {SMALLER}")
    return traced_bytes(run)


def traced_bytes(run: Run) -> int:
    """Most bytes that one training step keeps at a time, unfused: an upper bound on its memory."""
    task = prepare(run.task)

    def step(run: Run) -> Any:
        return advance(run, start(run), jnp.int32(0), draw_data(run, task))

    return _peak(traced(run, lambda r: jax.make_jaxpr(step)(r)).jaxpr)


def _peak(jaxpr: Any) -> int:
    """Most bytes alive at a time where every array is made in order and freed after its last use; inner programs on top."""
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, jex.Literal)}
    last |= dict.fromkeys((v for v in jaxpr.outvars if not isinstance(v, jex.Literal)), len(jaxpr.eqns))
    ends: dict[int, int] = {}  # bytes that an equation is the last to use
    alive = peak = 0
    for i, eqn in enumerate(jaxpr.eqns):
        inner = [getattr(v, "jaxpr", v) for v in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(v)]
        made = [(v, v.aval.size * v.aval.dtype.itemsize) for v in eqn.outvars if hasattr(v.aval, "dtype")]
        alive += sum(size for _, size in made)
        peak = max(peak, alive + max(map(_peak, inner), default=0))
        for v, size in made:
            ends[last.get(v, i)] = ends.get(last.get(v, i), 0) + size
        alive -= ends.pop(i, 0)
    return peak


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (jex.Jaxpr, jex.ClosedJaxpr))
