"""The convoy: cohorts whose runs differ in their task alone, trained by one program.

A small step takes a device as long as it has kernels, however few replicas it is of, so that ten tasks together take little longer
than one. Each cohort keeps its own folder, plan and checkpoints. A cohort that trains by itself is a convoy of one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import scipy.sparse

from elegans.models import Transformer
from elegans.sources import classes, is_custom
from elegans.training.cohort import EVALUATIONS, group, resolve
from elegans.training.cost import Leg, Rates, layers_of, rates_of, seconds, shrink, training
from elegans.training.joint import Shared
from elegans.training.planner import CohortPlan, Segment
from elegans.training.run import Run
from elegans.training.step import Update
from elegans.training.transfer import depth, lineage

CALL = 2  # replicas that could be evaluated in the time that a call takes besides
COMPILING = 4.0, 4.5, 0.6  # rough seconds of a program, of each of its tasks and of each layer, on the cores beside an H100
HALVED = 0.75  # of a family's time, at most: what half of its runs must take for them to be divided


@dataclasses.dataclass(frozen=True, eq=False)
class Convoy:
    """Cohorts that train together, and the legs on which they do: each cohort's own segments, side by side."""

    plans: tuple[CohortPlan, ...]

    @functools.cached_property
    def legs(self) -> list[Leg]:
        """Steps between which no cohort changes its size; 0 is the size of one that is left."""
        bounds = sorted({step for plan in self.plans for s in plan.segments for step in (s.start, s.stop)})
        sizes = [[next((s.size for s in plan.segments if s.start <= step < s.stop), 0) for plan in self.plans] for step in bounds[:-1]]
        return [Leg(a, b, tuple(n)) for a, b, n in zip(bounds, bounds[1:], sizes, strict=False)]

    @property
    def whole(self) -> bool:
        """Whether every cohort is there with which they were planned: else the program is another."""
        return len(self.plans) == max(1, len(self.plans[0].convoy))

    @property
    def steps(self) -> int:
        """Steps until the last of its runs has ended."""
        return self.legs[-1].stop

    @property
    def runs(self) -> list[Run]:
        """All runs, cohort by cohort."""
        return [run for plan in self.plans for run in plan.runs]

    @functools.cached_property
    def evaluated(self) -> int:
        """How many runs a device evaluates at a time: what takes least for those that are due together, up to a part of all."""
        ending, validated = collections.Counter(run.length for run in self.runs), collections.Counter[int]()  # runs, by step
        for length, runs in ending.items():
            validated.update(dict.fromkeys(self.runs[0].record.evaluate.upto(length), runs))
        times = collections.Counter([*ending.values(), *validated.values()])  # how often so many are due together
        sizes = range(1, -(-sum(self.legs[0].sizes) // EVALUATIONS) + 1)
        return min(sizes, key=lambda size: sum(-(-n // size) * often for n, often in times.items()) * (size + CALL))

    def members(self, leg: Leg) -> list[int]:
        """The cohorts that a leg trains."""
        return [i for i, size in enumerate(leg.sizes) if size]

    def groups(self, leg: Leg) -> list[Sequence[Run]]:
        """The runs that a leg trains, by cohort."""
        return [self.plans[i].runs[: leg.sizes[i]] for i in self.members(leg)]

    def seconds(self, rates: Rates, since: int = 0) -> float:
        """Rough seconds that it takes from a step on."""
        return seconds([plan.runs[0] for plan in self.plans], self.legs, rates, since)

    @property
    def compiling(self) -> float:
        """Rough seconds that one of its programs takes to compile: each task adds a sampler, and held-out examples."""
        whole, task, layer = COMPILING
        return whole + task * len(self.plans) + layer * layers_of(self.plans[0].runs[0])


def gather(convoys: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Which of some cohorts train together, of the convoy that each says, in the order of the first of each; by place in the sequence."""
    return _by(lambda i: convoys[i] or None, range(len(convoys)))


# ---- who may train together, and who does


def alike(run: Run) -> Hashable:
    """What runs have in common that one program can train; none: only its own cohort.

    Nothing of the user's own, which may depend on the vocabulary in ways that nobody knows here; nothing that changes from run to run
    but the task.
    """
    own = type(run.model) is Transformer and type(run.update) is Update and not any(map(is_custom, classes(run)))
    plain = run.train_set is None and run.trained is None and run.after is None
    if not (own and plain):
        return None
    return jax.tree.structure(dataclasses.replace(resolve(run), task=Shared()))


def form(plans: Sequence[CohortPlan], rates: Rates, memory: int) -> list[CohortPlan]:
    """Plans, in their order, with the segments of the convoys that take least time, within `memory` bytes each."""
    # two cohorts of one structure gain nothing from each other: the first go with other tasks' first
    place = {plan.runs[0].id: i for i, plan in enumerate(plans)}
    ranks = {run.id: rank for members in group([plan.runs[0] for plan in plans]) for rank, run in enumerate(members)}

    def kind(plan: CohortPlan) -> Hashable:
        key = alike(plan.runs[0])
        return key and (key, ranks[plan.runs[0].id])

    def fits(part: list[Sequence[Run]]) -> bool:
        longest = part[-1][0].task.positions
        return sum(plans[place[runs[0].id]].bytes * longest / runs[0].task.positions for runs in part) <= memory

    made = list(plans)
    for members in _by(kind, plans):
        for part in _parts([plan.runs for plan in members], rates, fits):
            where = [place[runs[0].id] for runs in part]
            for i, plan in zip(where, _together([plans[i] for i in where], rates), strict=True):
                made[i] = plan
    return made


def _legs(groups: Sequence[Sequence[Run]], rates: Rates) -> list[Leg]:
    return shrink([[run.length for run in runs] for runs in groups], [runs[0] for runs in groups], rates)


def _spent(groups: Sequence[Sequence[Run]], rates: Rates) -> float:
    """Rough seconds of groups of runs, each of one structure and the longest first, in one program."""
    return seconds([runs[0] for runs in groups], _legs(groups, rates), rates)


def _parts(
    groups: Sequence[Sequence[Run]], rates: Rates, fits: Callable[[list[Sequence[Run]]], bool] = lambda _: True
) -> list[list[Sequence[Run]]]:
    """The division of alike groups, by length of row, that takes least time: every part costs a program and its padding."""
    ordered = sorted(groups, key=lambda runs: runs[0].task.positions)
    return _divided(ordered, lambda part: _spent(part, rates) if len(part) == 1 or fits(part) else float("inf"))


def _divided(ordered: list[Any], cost: Callable[[list[Any]], float]) -> list[list[Any]]:
    """The division of a sequence into consecutive parts of least cost in all."""
    best: list[tuple[float, list[list[Any]]]] = [(0.0, [])]
    for end in range(1, len(ordered) + 1):
        options = [(best[i][0] + cost(ordered[i:end]), i) for i in range(end)]
        least, begin = min(options)
        best.append((least, [*best[begin][1], ordered[begin:end]]))
    return best[-1][1]


def _together(plans: list[CohortPlan], rates: Rates) -> list[CohortPlan]:
    """Plans of cohorts that train together."""
    if len(plans) == 1:
        return plans
    legs = _legs([plan.runs for plan in plans], rates)
    convoy = tuple(plan.runs[0].id for plan in plans)
    every = max(plan.checkpoint_every for plan in plans)
    made = []
    for i, plan in enumerate(plans):
        segments = tuple(Segment(leg.start, leg.stop, leg.sizes[i]) for leg in legs if leg.sizes[i])
        made.append(dataclasses.replace(plan, segments=segments, checkpoint_every=every, convoy=convoy))
    return made


def _idle(convoy: Convoy, step: int, rates: Rates, others: float) -> float:
    """Rough seconds for which a device waits for programs where a convoy is the first: for its own two, and for those of `others`."""
    first, *rest = training([plan.runs[0] for plan in convoy.plans], convoy.legs, rates, step)
    second = max(0.0, convoy.compiling - first) if rest else 0.0
    return convoy.compiling + second + max(0.0, others - first - sum(rest))


# ---- sharing work out


def divide(runs: Sequence[Run], parts: int) -> list[list[Run]]:
    """Runs, and all that they go on from, in parts that take about equally long on GPUs.

    The costliest first, each to the part that has least. Runs that may train together stay whole, with their parents, unless they take
    more than a fair part and their halves are quicker: a small cohort takes as long as a large one, up to a size.
    """
    whole = [(_time(family), family) for family in families(lineage(runs), together=True)]
    fair = sum(spent for spent, _ in whole) / parts

    def pieces(spent: float, family: list[Run]) -> list[tuple[float, list[Run]]]:
        lines = families(family) if spent > fair else [family]
        if len(lines) == 1:
            return [(spent, family)]
        halves = [[run for line in half for run in line] for half in (lines[::2], lines[1::2])]
        costs = [_time(half) for half in halves]
        if max(costs) > HALVED * spent:
            return [(spent, family)]
        return [piece for each in zip(costs, halves, strict=True) for piece in pieces(*each)]

    made: list[list[Run]] = [[] for _ in range(parts)]
    taken = [0.0] * parts
    for spent, piece in sorted((piece for each in whole for piece in pieces(*each)), key=lambda found: -found[0]):
        least = taken.index(min(taken))
        made[least] += piece
        taken[least] += spent
    return made


def _time(runs: Sequence[Run]) -> float:
    """Rough seconds of runs on a GPU without end of memory, those together that are alike."""
    rates = rates_of("gpu")
    groups = [sorted(members, key=lambda run: -run.length) for members in group(runs)]
    return sum(_spent(part, rates) for kind in _by(lambda members: alike(members[0]), groups) for part in _parts(kind, rates))


def _by(key: Callable[[Any], Hashable], items: Iterable[Any]) -> list[list[Any]]:
    """Items of equal key together; those without a key (none) each alone."""
    found: dict[Hashable, list[Any]] = {}
    for i, item in enumerate(items):
        name = key(item)
        found.setdefault((i,) if name is None else name, []).append(item)
    return list(found.values())


def families(runs: Sequence[Run], together: bool = False) -> list[list[Run]]:
    """Runs, those together of which one goes on from another, and also, if asked, those of one structure or that may train together."""
    home = {run.id: i for i, run in enumerate(runs)}
    tied = [(run.id, run.after.id) for run in runs if run.after is not None]
    if together:
        groups = group(runs)
        tied += [(run.id, members[0].id) for members in groups for run in members]
        tied += [(members[0].id, kind[0][0].id) for kind in _by(lambda members: alike(members[0]), groups) for members in kind]
    ends = np.array([[home[a], home[b]] for a, b in tied]).reshape(-1, 2)
    graph = scipy.sparse.coo_array((np.ones(len(ends)), ends.T), (len(runs), len(runs)))
    _, family = scipy.sparse.csgraph.connected_components(graph, directed=False)
    found: dict[int, list[Run]] = {}
    for run, which in zip(runs, family, strict=True):
        found.setdefault(which, []).append(run)
    return list(found.values())


def in_turn(left: Sequence[tuple[Convoy, int]], rates: Rates, ahead: bool, minutes: float | None = None) -> list[int]:
    """The order in which to train convoys that have come so many steps far; parents first.

    Where programs are compiled `ahead`, a long one and a short one in turn: while the one trains, the programs of the next are compiled;
    nothing trains before the first, so that this is one that is soon compiled and trains for as long as others take to compile. What does
    not end within so many `minutes` comes last. Elsewhere the longest first, or the shortest where time is short, so that most finish.
    """
    within = float("inf") if minutes is None else 60 * minutes
    spent = [convoy.seconds(rates, step) for convoy, step in left]
    order = sorted(range(len(left)), key=lambda i: -spent[i])
    late = [i for i in reversed(order) if spent[i] > within]
    if ahead:
        fits = [i for i in order if spent[i] <= within]
        others = max((left[i][0].compiling for i in fits), default=0.0)
        first = min(fits, key=lambda i: _idle(*left[i], rates, others), default=None)
        fits.sort(key=lambda i: i != first)
        order = [fits.pop(-1 if n % 2 else 0) for n in range(len(fits))] + late
    elif minutes is not None:
        order.reverse()
    return sorted(order, key=lambda i: depth(left[i][0].plans[0].runs[0]))
