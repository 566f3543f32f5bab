"""The driver: trains runs into a store, and goes on where it stopped.

check -> plan -> store -> train, convoy by convoy
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elegans import specs
from elegans.errors import Invalid, StoreError
from elegans.folder import Cohort, inherit_from, parent_of, resumed
from elegans.instruments.base import silent
from elegans.sources import code_of, compare
from elegans.store import Store, label_of
from elegans.tasks.checks import check_custom
from elegans.training.ahead import Ahead, workers_for
from elegans.training.cohort import Programs
from elegans.training.convoy import Convoy, form, gather, in_turn
from elegans.training.cost import parameters, rates_of
from elegans.training.device import choose, memory_budget, provenance, within_memory
from elegans.training.planner import CohortPlan, plan
from elegans.training.run import Run
from elegans.training.train import Checkpoint, Compiled, Progress, train_convoy
from elegans.training.transfer import depth, lineage

Listener = Callable[[str, Any], None]  # (stage, detail)
CHECKPOINT_SHARE = 0.05  # of the time may go into writing states to resume from
WRITING = 5e8  # bytes of states a second, until the first were written


def train(
    runs: Sequence[Run],
    store: str | Path,
    *,
    device: str | None = None,
    memory: str | None = None,
    again: bool = False,
    resume: bool = False,
    minutes: float | None = None,
    listener: Listener = silent,
    ended: Callable[[], None] = lambda: None,
    last: Callable[[Store], None] = lambda _: None,
) -> Store:
    """Train runs, and all that they go on from, into a store: finished ones are skipped, unfinished ones resume, `again` starts them anew.

    `resume` insists that there is something to resume. `ended` is called whenever a cohort has ended, `last` with the store when
    training stops; both while this process alone writes. After so many `minutes` training stops at a checkpoint. Raises `Invalid` or
    `StoreError` before anything is compiled or written.
    """
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    work = prepare(runs, store, device=device, memory=memory, again=again, resume=resume)
    listener("plan", work)
    opened = Store.create(store)
    with opened.lock():
        opened.remove(work.discarded)
        for planned in work.new:
            opened.add(planned, provenance(work.device, work.memory))
        unfinished = _unfinished(opened, work, minutes)
        wanted = [(convoy, leg) for cohorts, convoy in unfinished for step in [_step(cohorts)] for leg in convoy.legs if leg.stop > step]
        with Ahead(wanted, work.device) as ahead:
            for cohorts, convoy in unfinished:
                if time.monotonic() < until:
                    with within_memory(sum(planned.bytes for planned in convoy.plans)):
                        _train(opened, cohorts, convoy, ahead, until, listener)
                    if any(cohort.status()["finished"] for cohort in cohorts):
                        ended()
        last(opened)
    return opened


@dataclasses.dataclass(frozen=True)
class Work:
    """What `train` is about to do."""

    runs: list[Run]
    device: jax.Device
    memory: int
    stored: list[Cohort]  # cohorts of the store that hold runs of the study, finished or not
    new: list[CohortPlan]
    discarded: list[Cohort]  # by `again`, or planned for another memory and not begun


def prepare(
    runs: Sequence[Run],
    store: str | Path,
    *,
    device: str | None = None,
    memory: str | None = None,
    again: bool = False,
    resume: bool = False,
    compile_to_measure: bool = True,
) -> Work:
    """Check everything and plan what is missing. Writes nothing; compiles only where a structure may not fit."""
    _check_runs(runs)
    runs = lineage(runs)
    _check_labels(runs)
    Store.check(store)
    chosen = choose(device)
    budget = memory_budget(chosen, memory)
    stored = _holding(store, runs)
    if resume and not any(c.status()["step"] for c in stored if not c.status()["finished"]):
        raise StoreError(f"{store}: nothing to resume, no checkpoint of these runs; leave out --resume to train those that have not ended")
    replanned = [c for c in stored if memory is not None and not c.status()["step"] and c.plan().memory != budget]
    discarded = _discard(store, stored, runs) if again else replanned
    if not again:
        _check_code(stored, runs)
    kept = [c for c in stored if c not in discarded]
    present = {run for c in kept for run in c.ids()}
    missing = [run for run in runs if run.id not in present]
    _check_parents(kept, missing)
    check_custom(run.task for run in missing)
    measured = (lambda members: Programs(members, chosen).bytes()) if compile_to_measure else None
    devices = len(jax.devices("cpu")) if chosen.platform == "cpu" else 1
    new = plan(missing, budget, measured, devices, chosen.platform) if missing else []
    new = new if chosen.platform == "cpu" else form(new, rates_of(chosen.platform), budget)
    return Work(runs, chosen, budget, kept, new, discarded)


def _holding(store: str | Path, runs: Sequence[Run]) -> list[Cohort]:
    """Cohorts of a store that hold some of the runs."""
    if not (Path(store) / "format.json").exists():
        return []
    wanted = {run.id for run in runs}
    return [c for c in Store(store).cohorts() if wanted & c.ids()]


def _discard(store: str | Path, stored: Sequence[Cohort], runs: Sequence[Run]) -> list[Cohort]:
    wanted = {run.id for run in runs}
    others = [run for c in stored for run in c.ids() if run not in wanted]
    if others:
        raise StoreError(f"{store}: --again would also discard {len(others)} runs that are not in this study; use another --store")
    return list(stored)


def _check_runs(runs: Sequence[Run]) -> None:
    """Raises `Invalid` where there are none, and where one could not be read back, since another class bears its component's name."""
    if isinstance(runs, Run) or not runs or not all(isinstance(run, Run) for run in runs):
        raise Invalid("runs", runs, "allowed: a list of elegans.Run, one at least")
    for run in {jax.tree.structure(run): run for run in runs}.values():
        specs.from_dict(Run, specs.to_dict(run))


def _check_labels(runs: Sequence[Run]) -> None:
    for run in runs:
        try:
            label_of(run)
        except Invalid as error:
            raise error.inside("label") from None


def _check_code(stored: Sequence[Cohort], runs: Sequence[Run]) -> None:
    wanted = {run.id: run for run in runs}
    for line in (line for cohort in stored for line in cohort.lines() if line["run"] in wanted):
        mismatch = compare(line["run"], line["code"], code_of(wanted[line["run"]]))
        if mismatch:
            raise StoreError(str(mismatch))


def _check_parents(stored: Sequence[Cohort], runs: Sequence[Run]) -> None:
    """Raises `StoreError` where runs go on from finished ones of which the store keeps no weights."""
    homes = {run: cohort for cohort in stored if cohort.status()["finished"] for run in cohort.ids()}
    read: dict[Any, dict[str, np.ndarray]] = {}
    for run in runs:
        if run.after is not None and run.after.id in homes:
            parent_of(homes[run.after.id], run, read)


def _unfinished(store: Store, work: Work, minutes: float | None) -> list[tuple[list[Cohort], Convoy]]:
    """What trains together, in the order in which it trains. A convoy has its cohorts that ended, too: its legs are theirs."""
    for cohort in store.cohorts():
        if cohort.status()["finished"]:
            cohort.tidy()
    held = _holding(store.path, work.runs)
    together = [[held[i] for i in members] for members in gather([c.convoy() for c in held])]
    unfinished = [cohorts for cohorts in together if not all(c.status()["finished"] for c in cohorts)]
    left = [(cohorts, Convoy(tuple(c.plan() for c in cohorts))) for cohorts in unfinished]
    steps, rates = [(convoy, _step(cohorts)) for cohorts, convoy in left], rates_of(work.device.platform)
    return [left[i] for i in in_turn(steps, rates, workers_for(work.device) > 0, minutes)]


def _step(cohorts: Sequence[Cohort]) -> int:
    """How far those that have not ended have come."""
    states = [cohort.status() for cohort in cohorts]
    return min((state["step"] for state in states if not state["finished"]), default=0)


def _train(store: Store, cohorts: Sequence[Cohort], convoy: Convoy, ahead: Ahead, until: float, listener: Listener) -> None:
    """Train a convoy from its newest checkpoint, or from the start; stop at a checkpoint once it is late."""
    step, states = resumed(cohorts, convoy, ahead.device)
    writers = {i: cohort.writer(step) for i, cohort in enumerate(cohorts) if not cohort.status()["finished"]}
    for i, state in (states or {}).items():
        writers[i].close(state.diverged)
    for writer in () if convoy.whole else writers.values():
        writer.rebuilt()
    listener("convoy", (convoy, step))
    size = sum(12 * parameters(plan.runs[0]) * len(plan.runs) for plan in convoy.plans)  # bytes of weights and moments
    rest = time.monotonic() + size / WRITING / CHECKPOINT_SHARE  # no checkpoint before, but of those cohorts that must have one:
    kept = bool(convoy.runs[0].kept_steps)
    ends = [{s.stop for s in plan.segments} if kept else {plan.steps} for plan in convoy.plans]
    began, spent = time.perf_counter(), dict.fromkeys(("training", "compiling", "ahead"), 0.0)
    homes = {run: cohort for cohort in store.cohorts() for run in cohort.ids()} if depth(convoy.runs[0]) else {}
    inherit = functools.partial(inherit_from, homes, convoy.runs) if homes else None
    for event in train_convoy(convoy, ahead, step, states, inherit):
        late, now = time.monotonic() > until, time.monotonic()
        every = late or now > rest
        writing = [i for i in writers if every or not isinstance(event, Checkpoint) or event.step in ends[i]]
        for i in writing:
            writers[i].write(event, i)
        if not writing:
            continue
        if isinstance(event, Checkpoint) and every:
            rest = time.monotonic() + (time.monotonic() - now) / CHECKPOINT_SHARE
        elif isinstance(event, Progress):
            spent["training"] += event.seconds
        elif isinstance(event, Compiled):
            spent["compiling"] += event.seconds
            spent["ahead"] += event.ahead
        listener("event", event)
        if isinstance(event, Checkpoint) and late:
            break
    spent["seconds"] = time.perf_counter() - began
    for i in writers:
        record = {"from_step": step, "steps": cohorts[i].status()["step"] - step, **{k: v / len(writers) for k, v in spent.items()}}
        with (cohorts[i].path / "timings.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
