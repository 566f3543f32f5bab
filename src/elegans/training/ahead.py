"""Compiling ahead: the programs of coming convoys are built in threads while one trains.

XLA compiles outside Python's lock, and a grid of many small structures would otherwise wait longer for its
compiler than for its training.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from elegans.training.cohort import Programs
from elegans.training.convoy import Convoy
from elegans.training.cost import Leg
from elegans.training.joint import Joint

MOST_WORKERS = 4  # programs compiled at a time, of four parts each: beside more, those that are needed first would be ready last
NICE = 10  # of the threads that compile
SPARE = 24  # programs that may lie ready besides those being compiled: what long convoys leave time for, short ones ask for at once
NEVER = 2**31 - 1  # is the whole heap looked through for cycles: traces leave millions of objects, it takes seconds, and all threads wait
SWITCH = 5e-4  # seconds for which a thread keeps Python's lock while another wants it: training asks for it often and briefly


@dataclasses.dataclass(frozen=True)
class Ready:
    """Compiled programs, how long that took, and whether the persistent cache lacked any of them."""

    programs: Programs
    seconds: float
    fresh: bool


def build(convoy: Convoy, leg: Leg, device: jax.Device, first: bool = True) -> Ready:
    """Compile everything that a leg of a convoy needs; where it is not the `first` one, held-out examples come from the one before."""
    began = time.perf_counter()
    groups, few = convoy.groups(leg), convoy.evaluated
    programs = Programs(groups[0], device, convoy.plans[0].devices, few) if len(groups) == 1 else Joint(groups, device, few)
    fresh = programs.compile_all((() if first else ("held_out",)) + (("start", "begin") if leg.start else ()))
    return Ready(programs, time.perf_counter() - began, fresh)


def workers_for(device: jax.Device) -> int:
    """Threads to compile with: up to half of the cores; none where training itself needs the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if device.platform == "cpu" else max(1, min(MOST_WORKERS, cores // 2))


def stand_back() -> None:
    """Let this thread have what cores the others leave: the one that trains launches hundreds of kernels a step."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # of the thread alone, on Linux


class Ahead:
    """Programs of the legs of convoys, in the order in which they will be asked for. Use it as a context."""

    def __init__(self, wanted: Sequence[tuple[Convoy, Leg]], device: jax.Device, workers: int | None = None):
        self.device = device
        self.workers = workers_for(device) if workers is None else workers
        self.wanted = collections.deque(wanted)
        self.last: Convoy | None = None  # whose legs were asked for last
        self.alone = True  # the first program compiles, for which training waits: the others would take it the cores
        self.started = collections.deque[tuple[tuple[Convoy, Leg], Future[Ready]]]()
        self.pool = ThreadPoolExecutor(self.workers, initializer=stand_back) if self.workers else None

    def __enter__(self) -> Ahead:
        self.switch, self.collecting = sys.getswitchinterval(), gc.get_threshold()
        if self.pool:
            sys.setswitchinterval(min(SWITCH, self.switch))
            gc.set_threshold(*self.collecting[:2], NEVER)
        self._start()
        return self

    def __exit__(self, *error: object) -> None:
        sys.setswitchinterval(self.switch)
        if self.pool:
            self.pool.shutdown(wait=False, cancel_futures=True)
            gc.set_threshold(*self.collecting)

    def take(self, convoy: Convoy, leg: Leg) -> Ready:
        """The programs of a leg, as soon as they are compiled."""
        this = convoy, leg
        coming = [key for key, _ in self.started] + list(self.wanted)
        for _ in range(coming.index(this) if this in coming else 0):  # legs that were not needed
            (self.started or self.wanted).popleft()
        if self.started and self.started[0][0] == this:
            ready = self.started.popleft()[1].result()
        else:
            ready = build(convoy, leg, self.device)
            if self.wanted and self.wanted[0] == this:
                self.wanted.popleft()
        self.alone = False
        self._start()
        return ready

    def _start(self) -> None:
        while self.pool and self.wanted and len(self.started) < (1 if self.alone else self.workers + SPARE):
            convoy, leg = self.wanted.popleft()
            first = convoy is not self.last
            self.last = convoy
            self.started.append(((convoy, leg), self.pool.submit(build, convoy, leg, self.device, first)))
