"""Across compute: what one architecture knows after ever larger training budgets, and whether it knew before its loss moved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from elegans.errors import Invalid
from elegans.instruments.base import StoreInstrument
from elegans.instruments.crossings import SHARE, Bracket, bracket, crossing, interval, lead_of
from elegans.instruments.frontier import FEWEST, Ended, by_budget, chosen, ended_runs
from elegans.instruments.scaling import bounds
from elegans.instruments.transition import NEVER_FELL, NEVER_READ, PROBES, SCORE
from elegans.specs import field, spec
from elegans.store import Store
from elegans.tasks import Task

MEANS = {"score": SCORE, "probe_loss": "coalesce(log_loss, mse)"} | {n: n for n in ("untrained", "control", "chance")}
ENDS = f"""with ends as (select * from {PROBES} where coalesce(accuracy, r2) is not null
qualify step = max(step) over (partition by run, feature))
select run, feature, site, {", ".join(f'list_avg(list({of}::double order by "index", label)) as {n}' for n, of in MEANS.items())}
from ends group by run, feature, site order by run, feature, site"""
Values = dict[float, list[float]]  # budget to a value for each seed
Scores = dict[str, dict[str, float | None]]  # run to the means of its probes


@dataclasses.dataclass(frozen=True)
class Point:
    """The runs that were chosen at one budget, and what their probes of one feature say."""

    flops: float
    runs: list[Ended]
    scores: list[dict[str, float | None]]  # of those runs that were probed

    def known(self, name: str) -> list[float]:
        """What was measured."""
        return [v for s in self.scores if (v := s[name]) is not None]

    def mean(self, name: str) -> float | None:
        """Its mean."""
        known = self.known(name)
        return float(np.mean(known)) if known else None


@spec
class AcrossCompute(StoreInstrument):
    """Probes and loss of one architecture over training budgets: is a feature readable at a budget at which the loss has not moved?

    Of every task the model (depth, width and all else) that is best at the `target` budget is followed: at each budget the
    configuration of this model with the lowest mean validation loss, learning rate and batch free. Needs probes of
    finished networks (`elegans measure probe STORE at=final` is enough).

    Table `across_compute`, a row per task, feature and budget: the configuration, its TEST `loss` (nats per scored token)
    and `exact_match`, and of its probes at the end of training, at the site that is best at the largest budget, averaged
    over the reads and labels that `transition` takes: `score` (accuracy, or r2 of a number; ceiling 1), `probe_loss` (log loss in
    nats, or mse), `untrained`, `control` and `chance`. Means over seeds with t intervals from three on; what was not probed is null.

    Table `across_compute_lead`, a row per task and feature: FLOPs at which loss and score are half-way for good (the loss from
    plateau to floor, the score from untrained, or else the smallest budget, to the largest budget), and `lead`, log10 of
    their quotient. `low` and `high` bound the lead (`loss_low`, `feature_low` and so on the crossings) by bootstrap over
    seeds, each crossing known only to lie between two budgets; null where it lies beyond them. Missing, with the reason, where the
    loss never fell or the score never rose by `least`. `loudness` is decided at the last budget at which the loss has not
    moved (by `share` of its way): quiet where the score is already past half-way there, loud where it is not, undecided where
    fewer bootstrap draws than `confidence` agree, or some budget has fewer than three seeds (`seeds`). Loud
    therefore means: not before, as far as budgets this far apart can tell.
    """

    target: float | None = field(None, "FLOPs at which the model is chosen; none: the largest budget of each task", gt=0)
    confidence: float = field(0.95, "coverage of the intervals", gt=0, lt=1)
    least: float = field(0.05, "smallest rise of a probe's mean score that counts as learned", gt=0, lt=1)
    share: float = field(0.1, "part of the way from plateau to floor that counts as having moved", gt=0, lt=1)
    draws: int = field(200, "bootstrap draws", ge=10, le=100_000)

    def tables(self, store: Store) -> dict[str, pa.Table]:
        if not store.has("probe"):
            raise Invalid("store", str(store.path), "across_compute needs probes: run `elegans measure probe` first")
        ended, tasks = ended_runs(store)
        probes = _scores(store)
        rows: list[dict[str, Any]] = []
        leads: list[dict[str, Any]] = []
        for name, task in tasks.items():
            followed = self._followed([e for e in ended if e.task == name])
            runs = {r.run for point in followed.values() for r in point}
            for feature in sorted({f for f, sites in probes.items() if any(runs & s.keys() for s in sites.values())}):
                site, scores = _best_site(followed, probes[feature])
                points = [Point(c, r, [scores[x.run] for x in r if x.run in scores]) for c, r in followed.items()]
                head = {"task": name, "feature": feature, "site": site}
                rows += [head | self._row(point, task) for point in points]
                leads.append(head | self._lead(points, task))
        if not rows:
            raise Invalid("target", self.target, "allowed: FLOPs that a task's finished, probed runs reach")
        return {"across_compute": pa.Table.from_pylist(rows, _ROW), "across_compute_lead": pa.Table.from_pylist(leads, _LEAD)}

    def _followed(self, ended: list[Ended]) -> dict[float, list[Ended]]:
        """Budget to the seeds of the best configuration of the model that is best at the target."""
        budgets = by_budget(ended)
        reached = [flops for flops in budgets if self.target is None or flops <= self.target]
        if not reached:
            return {}
        model = chosen(budgets[max(reached)]).compared[0].model
        of_model = {flops: [c for c in found if c.compared[0].model == model] for flops, found in budgets.items()}
        return {flops: chosen(found).reported for flops, found in of_model.items() if found}

    def _row(self, point: Point, task: Task) -> dict[str, Any]:
        measured = {"loss": [r.test for r in point.runs], "exact": [r.exact_match for r in point.runs]}
        measured |= {name: point.known(name) for name in ("score", "probe_loss")}
        row: dict[str, Any] = {"flops": point.flops, "configuration": point.runs[0].configuration, "seeds": len(point.runs)}
        for name, values in measured.items():
            ends = SHARE if name in ("score", "exact") else (0, math.inf)
            found = interval(values, self.confidence, within=ends) if values else (None, None, None)
            row |= dict(zip(("exact_match" if name == "exact" else name, f"{name}_low", f"{name}_high"), found, strict=True))
        controls = {name: point.mean(name) for name in ("untrained", "control", "chance")}
        return row | controls | {"probed": len(point.scores), "floor": task.floor(), "plateau": task.plateau()}

    def _lead(self, points: list[Point], task: Task) -> dict[str, Any]:
        floor, plateau = task.floor(), task.plateau()
        if floor is None or plateau is None:
            return {"missing": "floor or plateau unknown"}
        probed = {p.flops: p.known("score") for p in points if p.known("score")}
        means = [float(np.mean(scores)) for scores in probed.values()]
        untrained = next((u for p in points if (u := p.mean("untrained")) is not None), means[0])
        levels = Levels(-(floor + plateau) / 2, -(plateau - self.share * (plateau - floor)), (untrained + means[-1]) / 2)
        losses = {p.flops: [-r.test for r in p.runs] for p in points}
        loss, score = _curve(losses, levels.half), _curve(probed, levels.score)
        seeds = min(map(len, [*losses.values(), *probed.values()]))
        row = {"loss_flops": loss.at, "feature_flops": score.at, "seeds": seeds}
        never = NEVER_FELL if math.isinf(loss.between[1]) else NEVER_READ if means[-1] - untrained < self.least else None
        if never:
            return row | {"missing": never}
        lead = math.log10(loss.at / score.at) if loss.at and score.at else None
        return row | {"lead": lead} | self._drawn(losses, probed, levels, seeds >= FEWEST)

    def _drawn(self, losses: Values, scores: Values, levels: Levels, enough: bool) -> dict[str, Any]:
        """Bounds of both crossings and of the lead, and the verdict: seeds drawn again at every budget."""
        rng = np.random.default_rng(0)
        found: dict[str, list[Bracket]] = {"": [], "loss_": [], "feature_": []}
        before, after = 0, 0
        for _ in range(self.draws):
            loss, score = ({c: _redrawn(v, rng) for c, v in values.items()} for values in (losses, scores))
            falls, rises = _curve(loss, levels.half).between, _curve(score, levels.score).between
            unmoved = _curve(loss, levels.leaves).between[0]  # the last budget before the loss moves
            before, after = before + (rises[1] <= unmoved), after + (rises[0] >= unmoved > 0)
            for name, between in (("", lead_of(falls, rises)), ("loss_", falls), ("feature_", rises)):
                found[name].append(between)
        sure = self.confidence * self.draws
        said = "undecided" if not enough else "quiet" if before >= sure else "loud" if after >= sure else "undecided"
        ends = {f"{k}{end}": v for k, b in found.items() for end, v in zip(("low", "high"), bounds(b, self.confidence), strict=True)}
        return ends | {"loudness": said}


def _redrawn(values: Sequence[float], rng: np.random.Generator) -> list[float]:
    """A bootstrap draw whose mean varies as the mean of so many values does, and not less by (n - 1) / n, which of few seeds is much.

    (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 5.3: the divisor of the plug-in estimate.)
    """
    mean, wider = float(np.mean(values)), math.sqrt(len(values) / max(1, len(values) - 1))
    return (mean + wider * (rng.choice(values, len(values)) - mean)).tolist()


class Levels(NamedTuple):
    """Levels of curves that rise: the negated loss half-way and having moved, the score half-way."""

    half: float
    leaves: float
    score: float


@dataclasses.dataclass(frozen=True)
class Crossed:
    """Where a curve over budgets is half-way for good: interpolated, and the budgets between which it is."""

    at: float | None
    between: Bracket


def _curve(values: Values, level: float) -> Crossed:
    flops, means = list(values), [float(np.mean(v)) for v in values.values()]
    return Crossed(crossing(flops, means, level), bracket(flops, means, level))


def _scores(store: Store) -> dict[str, dict[str, Scores]]:
    """Feature to site to run to the means of its last probes."""
    found: dict[str, dict[str, Scores]] = {}
    for row in store.sql(ENDS).to_pylist():
        found.setdefault(row["feature"], {}).setdefault(row["site"], {})[row["run"]] = {name: row[name] for name in MEANS}
    return found


def _best_site(followed: dict[float, list[Ended]], sites: dict[str, Scores]) -> tuple[str, Scores]:
    """The site with the highest mean score at the largest budget that was probed; of equal ones the first by name."""
    last = max(c for c, runs in followed.items() if any(r.run in scores for r in runs for scores in sites.values()))

    def mean(site: str) -> float:
        known = [v for r in followed[last] if r.run in sites[site] and (v := sites[site][r.run]["score"]) is not None]
        return float(np.mean(known)) if known else -math.inf

    best = max(sorted(sites), key=mean)
    return best, sites[best]


_BOUNDED = ("loss", "score", "probe_loss")
_ROW = pa.schema(
    [(n, pa.string()) for n in ("task", "feature", "site", "configuration")]
    + [("flops", pa.float64()), ("seeds", pa.int64()), ("probed", pa.int64())]
    + [(f"{n}{bound}", pa.float64()) for n in _BOUNDED for bound in ("", "_low", "_high")]
    + [(n, pa.float64()) for n in ("exact_match", "exact_low", "exact_high", "untrained", "control", "chance", "floor", "plateau")]
)
_LEAD = pa.schema(
    [(n, pa.string()) for n in ("task", "feature", "site")]
    + [(n, pa.float64()) for n in ("loss_flops", "loss_low", "loss_high", "feature_flops", "feature_low", "feature_high")]
    + [(n, pa.float64()) for n in ("lead", "low", "high")]
    + [("seeds", pa.int64()), ("loudness", pa.string()), ("missing", pa.string())]
)
