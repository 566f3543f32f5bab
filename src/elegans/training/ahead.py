"""Compiling ahead: the programs of coming cohorts are built in threads while one trains.

XLA compiles outside Python's lock, and a grid of many small structures would otherwise wait longer for its
compiler than for its training.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from elegans.training.cohort import Programs
from elegans.training.cost import rates_of
from elegans.training.planner import CohortPlan, Segment, seconds
from elegans.training.run import Run
from elegans.training.transfer import depth

SPARE = 2  # programs that may lie ready besides those being compiled
SWITCH = 5e-4  # seconds for which a thread keeps Python's lock while another wants it: training asks for it often and briefly


@dataclasses.dataclass(frozen=True)
class Ready:
    """Compiled programs, how long that took, and whether the persistent cache lacked any of them."""

    programs: Programs
    seconds: float
    fresh: bool


def build(runs: Sequence[Run], device: jax.Device, devices: int) -> Ready:
    """Compile everything that training some runs of one structure needs."""
    began = time.perf_counter()
    programs = Programs(runs, device, devices)
    fresh = programs.compile_all()
    return Ready(programs, time.perf_counter() - began, fresh)


def workers_for(device: jax.Device) -> int:
    """Threads to compile with: half of the cores; none where training itself needs the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if device.platform == "cpu" else max(1, cores // 2)


def in_turn(left: Sequence[tuple[CohortPlan, int]], device: jax.Device, minutes: float | None = None) -> list[int]:
    """The order in which to train cohorts that have come so many steps far; parents first.

    Where programs are compiled ahead, a long one and a short one in turn: while the one trains, the programs of the next are compiled. What
    does not end within so many `minutes` comes last. Elsewhere the longest first, or the shortest where time is short, so that most finish.
    """
    rates, within = rates_of(device.platform), math.inf if minutes is None else 60 * minutes
    spent = [seconds(plan.runs[0], plan.segments, rates, since=step) for plan, step in left]
    order = sorted(range(len(left)), key=lambda i: -spent[i])
    late = [i for i in reversed(order) if spent[i] > within]
    if workers_for(device):
        fits = collections.deque(i for i in order if spent[i] <= within)
        order = [fits.pop() if n % 2 else fits.popleft() for n in range(len(fits))] + late
    elif minutes is not None:
        order.reverse()
    return sorted(order, key=lambda i: depth(left[i][0].runs[0]))


class Ahead:
    """Programs of the segments of cohorts, in the order in which they will be asked for. Use it as a context."""

    def __init__(self, wanted: Sequence[tuple[CohortPlan, Segment]], device: jax.Device, workers: int | None = None):
        self.device = device
        self.workers = workers_for(device) if workers is None else workers
        self.wanted = collections.deque(wanted)
        self.started = collections.deque[tuple[tuple[CohortPlan, Segment], Future[Ready]]]()
        self.pool = ThreadPoolExecutor(self.workers) if self.workers else None

    def __enter__(self) -> Ahead:
        self.switch = sys.getswitchinterval()
        if self.pool:
            sys.setswitchinterval(min(SWITCH, self.switch))
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        sys.setswitchinterval(self.switch)
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def take(self, plan: CohortPlan, segment: Segment) -> Ready:
        """The programs of a segment, as soon as they are compiled."""
        if all(key != (plan, segment) for key, _ in self.started):
            return build(plan.runs[: segment.size], self.device, plan.devices)
        while (found := self.started.popleft())[0] != (plan, segment):
            pass  # a segment that was not needed
        ready = found[1].result()
        self._start()
        return ready

    def _start(self) -> None:
        while self.pool and self.wanted and len(self.started) < self.workers + SPARE:
            plan, segment = self.wanted.popleft()
            self.started.append(((plan, segment), self.pool.submit(build, plan.runs[: segment.size], self.device, plan.devices)))
