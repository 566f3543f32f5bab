"""The plan: which runs train together, in which order, and when their cohort shrinks.

A pure function of the runs and a stated memory budget. It is written to the store before training and
obeyed on resume, because kernels, and so bits, depend on a cohort's size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from elegans.errors import Invalid
from elegans.models import Transformer
from elegans.models.base import once
from elegans.sources import code_of
from elegans.tasks.sampling import TaskData, prepare
from elegans.training.cohort import AHEAD, group, resolve, traced
from elegans.training.cost import Rates, flops_per_step, parameters, rates_of, shrink
from elegans.training.optimisers import AdamW
from elegans.training.run import Record, Run
from elegans.training.step import Update, draw_batch, draw_data, start, take, trained_of
from elegans.training.transfer import origin
from elegans.types import Example

LARGEST = 1024  # replicas of a cohort; throughput saturates far below
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
    convoy: tuple[str, ...] = ()  # the first runs of the cohorts that train in one program; none: it trains by itself

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits from the content: members, sizes and code."""
        data = self.to_dict() | {"code": [code_of(run) for run in self.runs]}
        data.pop("memory"), data.pop("devices"), data.pop("bytes")
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def steps(self) -> int:
        """Steps of the longest run; of a convoy's cohorts those until its program leaves it."""
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
            **({"convoy": list(self.convoy)} if self.convoy else {}),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], runs: dict[str, Run]) -> CohortPlan:
        """The plan in a store, with the runs by id."""
        segments = tuple(Segment(*s) for s in data["segments"])
        names = ("checkpoint_every", "memory", "devices", "bytes")
        return cls(tuple(runs[i] for i in data["runs"]), segments, *(data[name] for name in names), tuple(data.get("convoy", ())))


def plan(
    runs: Sequence[Run],
    memory: int,
    measure: Callable[[Sequence[Run]], int] | None = None,
    devices: int = 1,
    platform: str = "cpu",
) -> list[CohortPlan]:
    """Cohorts of runs, each within `memory` bytes. Traces every structure once, and so finds errors in custom code.

    `measure` compiles some runs and returns the bytes they need. Without it, or where a bound from the trace is already within the
    budget, nothing is compiled; on a device only where not even one run is within it. Raises `Invalid` where one run alone does not fit.
    """
    for run in runs:
        if run.after is not None:
            origin(run)
    rates = rates_of(platform)
    with uncollected():
        sized = [found for members in group(runs) for found in _sized(members, memory, measure, platform)]
    _peak.cache_clear()  # half of the objects that a process would have from now on
    return [_cohort(members, rates, memory, devices, needed) for members, needed in sized]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's search for cycles: traces leave millions of objects in caches, which took 2/5 of the time to look through.

    So do a grid's runs and a store's lines, which took 1/6.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cohort(members: list[Run], rates: Rates, memory: int, devices: int, needed: int) -> CohortPlan:
    lengths = [run.length for run in members]
    every = max(1, -(-lengths[0] // CHECKPOINTS))
    segments = tuple(Segment(leg.start, leg.stop, *leg.sizes) for leg in shrink([lengths], members[:1], rates))
    return CohortPlan(tuple(members), segments, every, memory, devices, needed)


def _sized(members: list[Run], memory: int, measure: Callable[[Sequence[Run]], int] | None, platform: str) -> list[tuple[list[Run], int]]:
    """Runs of one structure in cohorts that fit, longest first, each with the bytes that it needs.

    A CPU's cores have few replicas in hand at a time, so that the bound is far above what they need, and a larger size is measured. On
    a device the bound decides where it leaves one run: a cohort half as large is about as quick, and a program takes long to compile.
    """
    members = sorted(members, key=lambda run: (-run.length, run.id))
    bound = check(members[0], memory)
    size = min(len(members), LARGEST)
    if platform != "cpu":
        size = max(1, min(size, memory // bound))
    needed = size * bound
    while measure is not None and needed > memory:
        needed = measure(members[:size])
        if needed <= memory:
            break
        if size == 1:
            raise Invalid("memory", f"{memory:,} bytes", f"one run of this structure needs {needed:,}; {SMALLER}")
        size = max(1, min(size - 1, int(size * memory / needed)))
        needed = size * bound
    return [(c, int(needed * len(c) / size)) for c in evenly(members, size)]


def evenly(members: list[Run], most: int) -> list[list[Run]]:
    """As few parts as can be of at most so many, in order and of equal size, or of two that differ by one, the larger first.

    Each size is a program; and what is left of runs is divided alike whether or not their first parts are already stored.
    """
    parts = -(-len(members) // most)
    size, larger = divmod(len(members), parts)
    ends = [size * i + min(i, larger) for i in range(parts + 1)]
    return [members[a:b] for a, b in itertools.pairwise(ends)]


# ---- checks before anything is compiled or written


def check(run: Run, memory: int) -> int:
    """Bytes that a replica of this structure needs at most. Raises `Invalid` for code or sizes that cannot work."""
    weights = parameters(run)
    least = 4 * 4 * weights + run.batch * run.task.positions * 4  # weights, gradients, two moments; the batch
    if least > memory:
        raise Invalid("memory", f"{memory:,} bytes", f"one run needs at least {least:,} for its {weights:,} parameters; {SMALLER}")
    trained_of(resolve(run))
    return traced_bytes(run)


def traced_bytes(run: Run) -> int:
    """Most bytes that a replica has at a time in one training step, unfused: an upper bound on its memory.

    Layers that are alike are traced once, as are the batches of structures that differ in the model; both make it a few per cent looser.
    """
    try:
        with once():
            return _traced_bytes(run)
    except Exception:  # a component that cannot be traced so; or a mistake, which the plain trace names as a field of the run
        return _traced_bytes(run)


def _traced_bytes(run: Run) -> int:
    task, weights = prepare(run.task), parameters(run)

    def step(run: Run) -> Any:
        state, batches = start(run, jnp.zeros(weights)), _first_batches(_drawing(run), task)
        return take(run, state, jnp.int32(0), jax.tree.map(lambda a: a[0], batches)), batches  # the others wait while a step is taken

    peak = _peak(traced(run, lambda r: jax.make_jaxpr(step)(r)).jaxpr)
    data = jax.eval_shape(draw_data, _drawing(resolve(run)), task)  # an argument of every step
    return peak + sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(data))


def _drawing(run: Run) -> Run:
    """The run with nothing of its own but what its batches depend on."""
    return dataclasses.replace(run, model=Transformer(), optim=AdamW(), update=Update(), record=Record(), trained=None)


@jax.jit
def _first_batches(run: Run, task: TaskData) -> Example:
    """As many as a device draws at once; traced once for all runs that draw alike."""
    data = draw_data(run, task)
    return jax.vmap(lambda step: draw_batch(run, step, data))(jnp.arange(AHEAD))


@functools.lru_cache(1024)
def _peak(jaxpr: Any) -> int:
    """Most bytes alive at a time where every array is made in order and freed after its last use; inner programs on top."""
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, jex.Literal)}
    last |= dict.fromkeys((v for v in jaxpr.outvars if not isinstance(v, jex.Literal)), len(jaxpr.eqns))
    ends: dict[int, int] = {}  # bytes that an equation is the last to use
    alive = peak = 0
    for i, eqn in enumerate(jaxpr.eqns):
        made = [(v, v.aval.size * v.aval.dtype.itemsize) for v in eqn.outvars if hasattr(v.aval, "dtype")]
        within = max(map(_peak, jex.jaxprs_in_params(eqn.params)), default=0)
        results = sum(size for _, size in made)
        again = results if eqn.primitive.name == "jit" else 0  # a function makes its results itself: they are in its peak already
        peak = max(peak, alive + results + max(0, within - again))
        alive += results
        for v, size in made:
            ends[last.get(v, i)] = ends.get(last.get(v, i), 0) + size
        alive -= ends.pop(i, 0)
    return peak
