"""Compiling ahead: the programs of coming cohorts are built in threads while one trains.

XLA compiles outside Python's lock, and a grid of many small structures would otherwise wait longer for its
compiler than for its training.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from elegans.training.cohort import Programs
from elegans.training.planner import CohortPlan, Segment
from elegans.training.run import Run

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
    """Threads to compile with: half of the cores, less one; none where training itself needs the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if device.platform == "cpu" else max(1, cores // 2 - 1)


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
