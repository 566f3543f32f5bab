"""Transitions: when a run leaves its plateau, and whether a feature was there before."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from elegans import specs
from elegans.errors import Invalid
from elegans.instruments.base import StoreInstrument
from elegans.instruments.contrast import Seen, contrasts
from elegans.instruments.crossings import (
    EARLIEST,
    SHARE,
    Bracket,
    among,
    bracket,
    change_point,
    crossing,
    decades,
    interval,
    loudness,
    spanning,
    verdict,
)
from elegans.specs import field, spec
from elegans.store import Store
from elegans.tasks import Task
from elegans.training.run import differing, holder, is_seed

RARE = 0.99  # share of guesses that are right from which on there is nothing left to be read: many such reads would hide the rest
# columns that earlier versions of the probe did not write are null
PROBES = f"""(select * from (from probe union all by name
select null::integer as label, null::float as r2, null::float as mse, null::float as control, null::float as untrained,
  null::float as chance where false)
qualify chance is null or chance <= {RARE} or min(chance) over (partition by run, feature) > {RARE})"""
# in an order of its own, sums included: rows that arrive in another order must give the same bits, and ties the same site
SCORE = "coalesce(accuracy, case when r2 < 0 then 0 else r2 end)"  # worse than the mean is as good as nothing, however much worse
READABLE = f"""select run, feature, site, step, list_avg(list({SCORE}::double order by "index", label)) as score,
  list_avg(list(chance::double order by "index", label)) as chance
from {PROBES} where coalesce(accuracy, r2) is not null group by run, feature, site, step order by run, feature, step, site"""
LOSSES = "select run, step, loss from metrics where split = 'validation' and loss is not null order by step"
NEAR = 0.02  # of the way from plateau to floor: so near it a loss is at its plateau
NEVER_FELL, NEVER_READ, NO_START = "loss never fell", "never readable", "untrained network not probed"
BySite = dict[str, list[tuple[int, float]]]  # site to steps and what was found there
EARLY, GUESSED = "readable untrained", "too rare to tell from a guess"


@dataclasses.dataclass(frozen=True)
class Course:
    """A curve that should rise from one level to another; `step` is where it is half-way for good, null where it never is."""

    steps: Sequence[int]
    values: Sequence[float]
    level: float | None  # half-way
    step: float | None
    missing: str = ""  # why there is no step
    least: float = -math.inf  # what is lower counts as this: a loss above its plateau
    until: int | None = None  # so many points count, all if none: what has risen may fall again

    @property
    def change(self) -> Bracket | None:
        """The recorded steps between which it changes."""
        rising = [max(v, self.least) for v in self.values[: self.until]]
        return None if self.step is None else change_point(self.steps[: self.until], rising)

    @property
    def blur(self) -> float:
        """How far from the truth the half-way point may be, in decades: half of the recorded steps' distance there."""
        known = self.steps[: self.until], self.values[: self.until]
        low, high = decades(bracket(*known, self.level)) if self.level is not None else (0.0, 0.0)
        return (high - low) / 2

    def at(self, step: float) -> float:
        """The curve between two recorded steps, by their logarithms."""
        return float(np.interp(math.log(max(step, EARLIEST)), np.log(np.maximum(self.steps, EARLIEST)), self.values))

    @property
    def seen(self) -> Seen | None:
        """Where it is half-way and where it changes, as far as the record goes; None where that is not known."""
        if self.change is not None and self.step is not None:
            return Seen((math.log10(self.step),) * 2, decades(self.change))
        if self.missing == EARLY or (self.level is not None and bracket(self.steps, self.values, self.level)[0] == -math.inf):
            return Seen(*[(-math.inf, math.log10(EARLIEST))] * 2)
        never = self.missing in (NEVER_FELL, NEVER_READ) and len(self.steps)
        return Seen(*[decades((self.steps[-1], math.inf))] * 2) if never else None


@spec
class Transition(StoreInstrument):
    """When the loss falls, when a feature becomes readable, and which came first.

    Per run, table `transition`: `loss_step`, the step at which validation loss has fallen half-way from the plateau to the floor for
    good; `feature_step`, the step at which the probes' score (accuracy; r2 of a number), averaged over reads and labels (r2 below 0 as 0;
    those left out, unless all are such, of which a guess is right in more than 99 of 100 cases) at the site that is best at the end, has
    risen half-way from untrained to its end; `lead` = log10(loss_step / feature_step), in decades of training steps (the same as decades
    of FLOPs), positive where the feature came first. What is forgotten was readable all the same: where three recordings in a row were
    all better than the end by more than `least`, half-way is to the worst of the best three, at the site where it is best, and what comes
    after them does not count. Missing where the run never learned, the probe never rose by `least`, or step 0 was not probed. Steps lie
    between recorded ones, so a lead is no finer than the spacing of evaluations and recorded weights. A run without probes has one row,
    without a feature; and where none has any, this instrument asks of the loss alone.

    Per group of runs that differ by seed alone, table `lead`: mean, interval over seeds, and the verdict: leads,
    lags (the whole interval farther from zero than half of the distance between the recorded steps, which all seeds share, may move it),
    no lead (all of it within `same` of zero, wherever these steps move it), undecided. Chance level 0; no ceiling. `change` is the
    mean lead of the change points, and its interval `change_low`, `change_high` holds wherever between two recorded steps each of
    them was. `loudness`: quiet (readable before the loss moves: all of both intervals beyond `same`), loud (with the loss, or after:
    nothing of either beyond), else undecided. A feature of which part becomes readable while the loss falls to its plateau, and the
    rest with the transition, has an early change point and a late half: `done` is the share of its rise that is done when the loss first
    comes within 2 % of its plateau, and `rest` the mean lead of the point at which what is missing then is half-way for good, with its
    interval, over the `rests` runs in which that is more than `least`. Change points of what is recorded ten times a decade are known
    to 0.1 decades, so that a feature that comes with the loss is undecided there. Null where `missing` says why: never readable, loss
    never fell, untrained network not probed, readable untrained, too rare to tell from a guess.

    Means are of those runs in which both came (`runs` of `of`). Of others one only is known: `behind` counts runs whose loss fell while the
    feature never became readable, `ahead` those whose feature was readable while the loss never fell, or before training. The mean's
    lower bound says nothing of the former, its upper one nothing of the latter: a verdict takes that bound from the median run
    instead, where these count (`median_low`, `median_high`; of change points `median_change_low`, `median_change_high`: the
    interval of the sign test, which needs six runs at 95 %).

    Per group and curve (`loss`, or a feature), table `change`: the change point, as `change_point` of instruments/crossings.py, in
    steps and in FLOPs; t interval over seeds of its logarithm, widened by the recorded steps that it lies between. The loss
    is cut at its plateau, since the fall to it is not the transition. And table `course`: the mean curves themselves, with t intervals.

    Per curve and pair of groups that differ in one field, table `contrast`: by how many decades of steps the transition comes later in
    `group` than in `other`, half-way points (`half`) and change points (`change`), each the Hodges-Lehmann estimate with its interval, see
    `shift` of instruments/crossings.py. A run that did not get there counts as later than the end of its record (`runs` of `of` got
    there), where `lead` and `change` leave it out: groups of which few runs learned are compared without choosing those. A null end is one
    that the data do not bound. Groups are independent samples: seeds that they share are not paired, which widens the interval
    where these share their luck. `verdict`: later, earlier, no shift (within `same`) where both intervals say so, else undecided.
    Pairs of too few runs for an interval (at 95 % below 4 and 4, or 3 and 5) have no row. Each interval is of one comparison.
    """

    confidence: float = field(0.95, "coverage of the intervals", gt=0, lt=1)
    least: float = field(0.05, "smallest rise of a probe's mean score that counts as learned", gt=0, lt=1)
    same: float = field(0.1, "decades within which two transitions are the same", gt=0)

    def tables(self, store: Store) -> dict[str, pa.Table]:
        losses = _losses(store)
        features = self._features(store) if store.has("probe") else {}
        if not features and not any(loss.steps for loss in losses.values()):
            raise Invalid("store", str(store.path), "transition needs validation losses, or probes: run `elegans measure probe` first")
        groups, probed = _groups(store), {run for run, _ in features}
        rows = [_transition(run, None, losses[run], None) for run in losses if run not in probed]
        rows += [_transition(run, name, losses[run], seen) for (run, name), seen in features.items()]
        curves = _grouped(groups, {(run, "loss"): course for run, course in losses.items()} | features)
        leads = _grouped(groups, {(run, feature): (losses[run], seen) for (run, feature), seen in features.items()})
        seen = {(g.name, name): [course.seen for course in members] for (g, name), members in curves.items()}
        return {
            "transition": pa.Table.from_pylist([{"group": groups[row["run"]].name} | row for row in rows], _TRANSITION),
            "lead": pa.Table.from_pylist([{"group": g.name, "feature": f} | self._lead(pairs) for (g, f), pairs in leads.items()], _LEAD),
            "change": pa.Table.from_pylist([self._change(g, name, members) for (g, name), members in curves.items()], _CHANGE),
            "contrast": contrasts(seen, {_name(fields): fields for fields in _told(store).values()}, self.confidence, self.same),
            "course": pa.Table.from_pylist([r for (g, name), members in curves.items() for r in self._course(g, name, members)], _COURSE),
        }

    def _features(self, store: Store) -> dict[tuple[str, str], Course]:
        table = store.sql(READABLE)
        guesses = {key: {site: points[0][1] for site, points in sites.items()} for key, sites in _nested(table, "chance").items()}
        return {key: self._feature(by_site, guesses.get(key, {})) for key, by_site in _nested(table).items()}

    def _feature(self, by_site: BySite, guesses: Mapping[str, float] | None = None) -> Course:
        at_end = {name: points[-1][1] for name, points in by_site.items()}
        at_best = {name: held([score for _, score in points]) for name, points in by_site.items()}
        forgotten = max(at_best.values()) - max(at_end.values()) > self.least
        found = at_best if forgotten else at_end
        site = max(found, key=lambda name: found[name])
        steps, score = zip(*by_site[site], strict=True)
        if steps[0] > 0:
            return Course(steps, score, None, None, NO_START)
        if found[site] - score[0] < self.least:
            guess = (guesses or {}).get(site, 0.0)
            early = score[0] - guess >= (1 - guess) / 2  # of what a guess leaves the untrained one reads half
            return Course(steps, score, None, None, EARLY if early else NEVER_READ if score[0] < 1 - self.least else GUESSED)
        level = (score[0] + found[site]) / 2
        until = max(i for i, s in enumerate(score) if s >= found[site]) + 1 if forgotten else len(score)
        step = crossing(steps[:until], score[:until], level)
        return Course(steps, score, level, step, "" if step else NEVER_READ, until=until)

    def _lead(self, pairs: list[tuple[Course, Course]]) -> dict[str, Any]:
        every = [(a, b, x.before(y)) for a, b in pairs if (y := a.seen) and (x := b.seen)]
        known = [(math.log10(a.step / b.step), lead.change, a.blur + b.blur) for a, b, lead in every if lead.reached and a.step and b.step]
        row: dict[str, Any] = {"runs": len(known), "of": len(pairs), "verdict": "undecided"}
        if not known:
            return row | {"missing": "; ".join(sorted({a.missing or b.missing for a, b in pairs}))}
        leads, brackets, blurs = zip(*known, strict=True)
        (mean, *ends), (change, *spans) = interval(leads, self.confidence), spanning(brackets, self.confidence)
        row |= dict(zip(("mean", "low", "high", "change", "change_low", "change_high"), (mean, *ends, change, *spans), strict=True))
        told = [lead for *_, lead in every if lead.told]
        ahead, behind = (sum(math.isinf(lead.change[end]) for lead in told) for end in (1, 0))
        medians = [among([getattr(lead, name) for lead in told], self.confidence) for name in ("half", "change")]
        row |= dict(zip(("median_low", "median_high", "median_change_low", "median_change_high"), sum(medians, ()), strict=True))
        row |= {"ahead": ahead, "behind": behind} | self._rest(pairs)
        half, changed = ((m[0] if behind else low, m[1] if ahead else high) for m, (low, high) in zip(medians, (ends, spans), strict=True))
        row["verdict"] = verdict(*half, self.same, ("leads", "lags", "no lead"), float(np.mean(blurs)))
        said = {loudness(*ends, self.same) for ends in (half, changed)}
        return row | {"loudness": said.pop() if len(said) == 1 else "undecided"}

    def _rest(self, pairs: list[tuple[Course, Course]]) -> dict[str, Any]:
        """Of a feature's rise the part that is done when the loss comes to its plateau, and by how much the rest leads."""
        found = [rest for loss, seen in pairs if (rest := _rest_of(loss, seen, self.least))]
        leads = [lead for _, lead in found if lead is not None]
        row = {"done": float(np.mean([share for share, _ in found])) if found else None, "rests": len(leads)}
        return row | (dict(zip(("rest", "rest_low", "rest_high"), interval(leads, self.confidence), strict=True)) if leads else {})

    def _change(self, group: Group, name: str, members: list[Course]) -> dict[str, Any]:
        known = [decades(c.change) for c in members if c.change]
        row: dict[str, Any] = {"group": group.name, "task": group.task, "curve": name, "runs": len(known), "of": len(members)}
        if not known:
            return row | {"missing": "; ".join(sorted({c.missing for c in members}))}
        for bound, value in zip(("", "_low", "_high"), spanning(known, self.confidence), strict=True):
            step = None if value is None else 10**value
            row |= {f"step{bound}": step, f"flops{bound}": None if step is None else step * group.flops_per_step}
        return row

    def _course(self, group: Group, name: str, members: list[Course]) -> list[dict[str, Any]]:
        found: dict[int, list[float]] = {}
        for course in members:
            for step, value in zip(course.steps, course.values, strict=True):
                found.setdefault(step, []).append(-value if name == "loss" else value)
        head = {"group": group.name, "task": group.task, "curve": name}
        ends = (0, math.inf) if name == "loss" else SHARE
        bounds = {s: dict(zip(("mean", "low", "high"), interval(v, self.confidence, within=ends), strict=True)) for s, v in found.items()}
        return [head | {"step": s, "flops": s * group.flops_per_step, "runs": len(found[s])} | bounds[s] for s in sorted(found)]


_TRANSITION = pa.schema(
    [(n, pa.string()) for n in ("run", "group", "feature")]
    + [(n, pa.float64()) for n in ("level", "loss_step", "feature_step", "lead", "loss_change", "feature_change")]
)
_LEAD = pa.schema(
    [("group", pa.string()), ("feature", pa.string())]
    + [(n, pa.int64()) for n in ("runs", "of", "ahead", "behind")]
    + [(n, pa.float64()) for n in ("mean", "low", "high")]
    + [("verdict", pa.string())]
    + [(n, pa.float64()) for n in ("change", "change_low", "change_high")]
    + [(n, pa.float64()) for n in ("median_low", "median_high", "median_change_low", "median_change_high")]
    + [("loudness", pa.string()), ("done", pa.float64()), ("rests", pa.int64())]
    + [(n, pa.float64()) for n in ("rest", "rest_low", "rest_high")]
    + [("missing", pa.string())]
)
_CHANGE = pa.schema(
    [(n, pa.string()) for n in ("group", "task", "curve")]
    + [("runs", pa.int64()), ("of", pa.int64())]
    + [(n, pa.float64()) for n in ("step", "step_low", "step_high", "flops", "flops_low", "flops_high")]
    + [("missing", pa.string())]
)
_COURSE = pa.schema(
    [(n, pa.string()) for n in ("group", "task", "curve")]
    + [("step", pa.int64()), ("flops", pa.float64()), ("runs", pa.int64())]
    + [(n, pa.float64()) for n in ("mean", "low", "high")]
)


def held(score: Sequence[float], recordings: int = 3) -> float:
    """The highest level that so many recordings in a row reach, or that the last one does: one alone may be high by luck."""
    windows = [min(score[i : i + recordings]) for i in range(len(score) - recordings + 1)]
    return max([score[-1], *windows])


def _losses(store: Store) -> dict[str, Course]:
    """Every run's validation loss, negated so that it rises."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in store.sql(LOSSES).to_pylist() if store.has("metrics") else []:
        curves.setdefault(row["run"], []).append((row["step"], row["loss"]))
    return {line["run"]: _loss(specs.from_dict(Task, line["spec"]["task"]), curves.get(line["run"], [])) for line in store.lines()}


def _loss(task: Task, points: list[tuple[int, float]]) -> Course:
    floor, plateau = task.floor(), task.plateau()
    steps, losses = zip(*points, strict=True) if points else ((), ())
    rising = [-x for x in losses]
    if floor is None or plateau is None:
        return Course(steps, rising, None, None, "floor or plateau unknown")
    level = -(floor + plateau) / 2
    step = crossing(steps, rising, level) if points else None
    return Course(steps, rising, level, step, "" if step else NEVER_FELL, -plateau)


def _transition(run: str, feature: str | None, loss: Course, seen: Course | None) -> dict[str, Any]:
    level = None if loss.level is None else -loss.level
    row = {"run": run, "feature": feature, "level": level, "loss_step": loss.step, "loss_change": _middle(loss)}
    if seen is None:
        return row
    lead = math.log10(loss.step / seen.step) if loss.step and seen.step else None
    return row | {"feature_step": seen.step, "feature_change": _middle(seen), "lead": lead}


def _middle(course: Course) -> float | None:
    """The middle of the recorded steps between which a curve changes."""
    return None if course.change is None else float(10 ** np.mean(decades(course.change)))


def _rest_of(loss: Course, seen: Course, least: float) -> tuple[float, float | None] | None:
    """The share of a feature's rise that is done when the loss comes to its plateau, and the lead of half of the rest, if that is much."""
    if loss.step is None or loss.level is None or seen.step is None or seen.level is None:
        return None
    near = loss.least - NEAR * 2 * (loss.level - loss.least)  # half-way is the middle of plateau and floor
    reached = next(step for step, value in zip(loss.steps, loss.values, strict=True) if value >= near)
    start, now = seen.values[0], seen.at(reached)
    top = 2 * seen.level - start
    step = crossing(seen.steps[: seen.until], seen.values[: seen.until], (now + top) / 2) if top - now > least else None
    return (now - start) / (top - start), math.log10(loss.step / step) if step else None


def _nested(table: pa.Table, value: str = "score") -> dict[tuple[str, str], BySite]:
    """(run, feature) to site to [(step, value)], where there is one."""
    made: dict[tuple[str, str], BySite] = {}
    for row in (row for row in table.to_pylist() if row[value] is not None):
        made.setdefault((row["run"], row["feature"]), {}).setdefault(row["site"], []).append((row["step"], row[value]))
    return made


@dataclasses.dataclass(frozen=True, order=True)
class Group:
    """Runs that differ by seed alone."""

    name: str
    task: str
    flops_per_step: float


def _groups(store: Store) -> dict[str, Group]:
    """Run id to its group."""
    names = group_names(store)
    return {line["run"]: Group(names[line["run"]], line["spec"]["task"]["kind"], line["flops_per_step"]) for line in store.lines()}


def _grouped(groups: dict[str, Group], values: dict[tuple[str, str], Any]) -> dict[tuple[Group, str], list[Any]]:
    """(group, name) to the values of its runs, sorted."""
    found: dict[tuple[Group, str], list[Any]] = {}
    for (run, name), value in values.items():
        found.setdefault((groups[run], name), []).append(value)
    return dict(sorted(found.items()))


def _told(store: Store) -> dict[str, dict[str, Any]]:
    return told_apart({line["run"]: specs.flat(line["spec"]) for line in store.lines()})


def group_names(store: Store) -> dict[str, str]:
    """Run id to the name of its group: the fields in which runs of the store differ, seeds aside."""
    return {run: _name(fields) for run, fields in _told(store).items()}


def names_of_groups(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`group_names` of some runs alone, group by group; of each run what `specs.flat` gives."""
    return {run: _name(fields) for run, fields in told_apart(runs).items()}


def told_apart(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run id to the fields by which its group is told from others: those that specs of its kinds have, None where one is off.

    In the order of these fields, numbers by size.
    """
    differ = [n for n in differing(list(runs.values())) if not is_seed(n)]
    known = {(n, holder(f, n)) for n in differ for f in runs.values() if f.get(n) is not None}
    told = {run: {n: f.get(n) for n in differ if (n, holder(f, n)) in known} for run, f in runs.items()}
    return {run: told[run] for run in sorted(told, key=lambda run: [(n, *_place(v)) for n, v in told[run].items()])}


def _place(value: Any) -> tuple[bool, Any]:
    """A key that sorts numbers by size and all else by name."""
    return (True, value) if isinstance(value, (int, float)) else (False, shown(value))


def _name(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{n.rpartition('.')[2]}={shown(v)}" for n, v in fields.items()) or "all runs"


def shown(value: Any) -> str:
    """A field's value as text."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
