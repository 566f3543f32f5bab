"""Scaling: the best loss of a grid at every training budget, where it leaves its plateau, and how it falls."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from scipy import optimize

from elegans import specs
from elegans.errors import Invalid
from elegans.instruments.base import StoreInstrument
from elegans.instruments.crossings import SHARE, Bracket, bracket, crossing, interval
from elegans.randomness import stable_hash
from elegans.specs import field, identity, spec
from elegans.store import Store
from elegans.tasks import Task
from elegans.training.run import LENGTHS, is_seed, unseeded

FINAL = """select run, split, arg_max(loss, step) as loss, arg_max(exact_match, step) as exact_match
from metrics group by run, split order by run, split"""  # the last scores that are not null
FEWEST = 3  # seeds at every budget, below which nothing is called sure


@dataclasses.dataclass(frozen=True)
class Ended:
    """One finished run: its budget in FLOPs, its last scores, its model and all its fields but seeds and lengths (JSON)."""

    task: str
    flops: float
    configuration: str  # what tables show of the fields
    run: str
    validation: float
    test: float
    exact_match: float
    model: str = ""
    fields: str = ""


def power_law(flops: Sequence[float], loss: Sequence[float]) -> tuple[float, float] | None:
    """(a, b) of loss = a * flops^-b by least squares of logarithms; None below three points."""
    if len(flops) < 3 or min(loss) <= 0:
        return None
    slope, offset = np.polyfit(np.log(flops), np.log(loss), 1)
    return float(math.exp(offset)), float(-slope)


def broken_power_law(flops: Sequence[float], loss: Sequence[float]) -> tuple[float, float, float] | None:
    """(b1, break, b2): two power laws that meet, slopes before and after, the break in FLOPs.

    None below five points, and where the break would be the second or the last but one of them, or beyond.

    log loss is piecewise linear in log flops; the break is the one with the least squared error.
    """
    if len(flops) < 5 or min(loss) <= 0:
        return None
    x, y = np.log(flops), np.log(loss)

    def fitted(at: float) -> tuple[np.ndarray, float]:
        design = np.stack([np.ones_like(x), np.minimum(x - at, 0), np.maximum(x - at, 0)], 1)
        beta, *_ = np.linalg.lstsq(design, y, rcond=None)
        return beta, float(((design @ beta - y) ** 2).sum())

    tried = np.linspace(x[1], x[-2], 101)
    start = tried[int(np.argmin([fitted(at)[1] for at in tried]))]
    near = optimize.minimize_scalar(lambda at: fitted(at)[1], bounds=(max(x[1], start - 0.5), min(x[-2], start + 0.5)), method="bounded")
    if min(near.x - x[1], x[-2] - near.x) < 1e-3:
        return None  # at the edge of what was tried: it may as well lie beyond
    beta = fitted(near.x)[0]
    return float(-beta[1]), float(math.exp(near.x)), float(-beta[2])


@spec
class Scaling(StoreInstrument):
    """The best loss of a grid over training FLOPs, one curve a task.

    Table `scaling`, a row per task and budget: at each budget the configuration (everything but seed and budget) with the
    lowest mean validation loss, and its `loss` (nats per scored token) and `exact_match` on TEST rows, which
    chose nothing; `low` and `high` are t intervals over its seeds, null for fewer than three (`exact_low`, `exact_high`: those of
    the exact match). The chance level of the loss is `plateau`, its best `floor`.

    Table `scaling_fit`, a row per task and quantity, with bootstrap intervals over seeds (every configuration's seeds drawn
    again, the best one chosen again): `leaves`, FLOPs at which the curve has fallen by `share` of the way from plateau to
    floor for good; `half`, the same half-way; `solved`, FLOPs at which exact match passes one half for good; `slope`, b of
    loss - floor = a * FLOPs^-b beyond `leaves`; `break`, FLOPs at the break of a broken power law, `slope_before` and
    `slope_after` it. Missing where the budgets do not reach it.

    The value of these three crossings is interpolated between two budgets on a logarithmic axis, but the curve may fall anywhere
    between them: their interval goes from the bootstrap quantile of the budget before the crossing to that of the
    budget after it, so that it always includes the bracket. A bound is null where it lies beyond the budgets. Slopes and breaks have
    an interval only where every budget has three seeds; of so few seeds a bootstrap covers less than it says, and of one seed bounds are
    the bracket alone, and know nothing of other seeds. A configuration one of whose runs diverged is not chosen at that budget. Rows that
    choose and rows that are reported differ, networks do not: among configurations that are alike but for their seeds' luck the lucky one
    is chosen, and its t interval covers less (simulated, three seeds: of 4 alike 93 %, of 10 alike 86 %).
    """

    share: float = field(0.1, "part of the way from plateau to floor that counts as having left the plateau", gt=0, lt=1)
    draws: int = field(200, "bootstrap draws", ge=10, le=100_000)
    confidence: float = field(0.95, "coverage of the intervals", gt=0, lt=1)

    def tables(self, store: Store) -> dict[str, pa.Table]:
        ended, tasks = ended_runs(store)
        if not ended:
            raise Invalid("store", str(store.path), "scaling needs finished runs with test losses")
        best, fits = [], []
        for name, task in tasks.items():
            mine = by_budget([e for e in ended if e.task == name])
            bounds = {"floor": task.floor(), "plateau": task.plateau()}
            best += [{"task": name, "flops": flops, **self._best(runs), **bounds} for flops, runs in mine.items()]
            fits += [{"task": name, **row} for row in self._fits(mine, **bounds)]
        return {"scaling": pa.Table.from_pylist(best), "scaling_fit": pa.Table.from_pylist(fits, schema=_FIT)}

    def _best(self, configurations: dict[str, list[Ended]]) -> dict[str, Any]:
        runs = chosen(configurations)
        mean, low, high = interval([r.test for r in runs], self.confidence, within=(0, math.inf))
        of_rows = interval([r.exact_match for r in runs], self.confidence, within=SHARE)
        exact = dict(zip(("exact_match", "exact_low", "exact_high"), of_rows, strict=True))
        count = {"seeds": len(runs), "configurations": len(configurations)}
        return {"configuration": runs[0].configuration, **count, "loss": mean, "low": low, "high": high, **exact}

    def _fits(self, mine: dict[float, dict[str, list[Ended]]], floor: float | None, plateau: float | None) -> list[dict[str, Any]]:
        rng, flops = np.random.default_rng(0), list(mine)

        def curve(again: bool) -> _Curve:
            runs = [chosen(resampled(c, rng) if again else c) for c in mine.values()]
            means = [(float(np.mean([r.test for r in rs])), float(np.mean([r.exact_match for r in rs]))) for rs in runs]
            return _Curve(*(list(values) for values in zip(*means, strict=True)))

        enough = min(len(chosen(c)) for c in mine.values()) >= FEWEST
        curves = [curve(False), *(curve(True) for _ in range(self.draws))]
        found, *drawn = [self._facts(flops, one, floor, plateau) for one in curves]
        rising = [self._rising(one, floor, plateau) for one in curves[1:]]
        rows = []
        for name, value in found.items():
            low = high = None
            if value is not None and name in rising[0]:
                low, high = bounds([bracket(flops, *one[name]) for one in rising], self.confidence)
            elif value is not None and enough and all(d[name] is not None for d in drawn):
                tails = (0.5 - self.confidence / 2, 0.5 + self.confidence / 2)
                low, high = np.quantile([d[name] for d in drawn], tails)
            rows.append({"quantity": name, "value": value, "low": low, "high": high, "budgets": len(flops)})
        return rows

    def _rising(self, curve: _Curve, floor: float | None, plateau: float | None) -> dict[str, tuple[list[float], float]]:
        """What rises through which level at each crossing."""
        solved = {"solved": (curve.exact_match, 0.5)}
        if floor is None or plateau is None:
            return solved
        fallen = [(plateau - x) / (plateau - floor) for x in curve.loss]
        return {"leaves": (fallen, self.share), "half": (fallen, 0.5), **solved}

    def _facts(self, flops: list[float], curve: _Curve, floor: float | None, plateau: float | None) -> dict[str, float | None]:
        names = ("leaves", "half", "solved", "slope", "break", "slope_before", "slope_after")
        facts: dict[str, float | None] = dict.fromkeys(names)
        facts |= {name: crossing(flops, *at) for name, at in self._rising(curve, floor, plateau).items()}
        if floor is None:
            return facts
        above = [x - floor for x in curve.loss]
        left = facts["leaves"]
        beyond = [(c, x) for c, x in zip(flops, above, strict=True) if left is not None and c >= left]
        law = power_law(*zip(*beyond, strict=True)) if beyond else None
        facts["slope"] = law[1] if law else None
        broken = broken_power_law(flops, above)
        if broken:
            facts |= dict(zip(("slope_before", "break", "slope_after"), broken, strict=True))
        return facts


class _Curve(NamedTuple):
    """What the chosen configurations reach on test rows, by budget."""

    loss: list[float]
    exact_match: list[float]


_FIT = pa.schema(
    [("task", pa.string()), ("quantity", pa.string())] + [(n, pa.float64()) for n in ("value", "low", "high")] + [("budgets", pa.int64())]
)


def bounds(found: Sequence[Bracket], confidence: float) -> tuple[float | None, float | None]:
    """The interval of a crossing that each bootstrap draw knows to its bracket only; null where it is not finite.

    From the lower quantile of the lower ends to the upper quantile of the upper ones, both taken outwards.
    """
    lows, highs = zip(*found, strict=True)
    low = float(np.quantile(lows, 0.5 - confidence / 2, method="lower"))
    high = float(np.quantile(highs, 0.5 + confidence / 2, method="higher"))
    return low if math.isfinite(low) else None, high if math.isfinite(high) else None


def ended_runs(store: Store) -> tuple[list[Ended], dict[str, Task]]:
    """Finished runs with their last scores, and their tasks by name.

    One of those that differ in nothing but what they record: they are one training, not two seeds. It is one that kept weights, if there
    is such a one, since only these can be probed.
    """
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    for row in store.sql(FINAL).to_pylist() if store.has("metrics") else []:
        if row["loss"] is not None:
            scores.setdefault(row["run"], {})[row["split"]] = (row["loss"], row["exact_match"])
    ended: dict[tuple[str, float, str, str], tuple[bool, Ended]] = {}  # by all that a training is; whether weights are missing
    tasks: dict[str, Task] = {}
    diverged = {run for cohort in store.cohorts() for run in cohort.status()["diverged"]}
    lost: set[tuple[str, float, str]] = set()  # configurations that diverged
    for line in store.lines():
        found = scores.get(line["run"], {})
        task = specs.from_dict(Task, line["spec"]["task"])
        name = task.kind if tasks.setdefault(task.kind, task) == task else f"{task.kind} {identity(task)}"
        tasks[name] = task
        budget = line["spec"].get("flops") or line["length"] * line["flops_per_step"]
        fields = _fields(line["spec"])
        every = json.dumps(fields, sort_keys=True)
        if line["run"] in diverged:
            lost.add((name, budget, every))
        elif {"validation", "test"} <= set(found):
            scored = (found["validation"][0], *found["test"])
            model = json.dumps(line["spec"]["model"], sort_keys=True)
            run = line["spec"]["record"].get("weights") is None, Ended(name, budget, _shown(fields), line["run"], *scored, model, every)
            seeds = json.dumps({k: v for k, v in specs.flat(line["spec"]).items() if is_seed(k)}, sort_keys=True)
            ended[name, budget, every, seeds] = min(run, ended.get((name, budget, every, seeds), run), key=lambda r: (r[0], r[1].run))
    kept = [e for _, e in ended.values() if (e.task, e.flops, e.fields) not in lost]
    return kept, {name: task for name, task in tasks.items() if any(e.task == name for e in kept)}


def _fields(spec: dict[str, Any]) -> dict[str, Any]:
    """What is chosen at a budget: every field but seeds, lengths and what is recorded."""
    return {k: v for k, v in unseeded(spec).items() if not k.startswith("record") and k not in LENGTHS}


def _shown(fields: dict[str, Any]) -> str:
    """A configuration in short, for people: others may be shown alike."""
    named = ("model.d_model", "model.layers", "batch", "optim.lr")
    label = " ".join(f"{k.rpartition('.')[2]}={fields[k]:g}" for k in named if isinstance(fields.get(k), (int, float)))
    other = json.dumps({k: v for k, v in fields.items() if k not in named}, sort_keys=True)
    return f"{label} {stable_hash(other) % 16**4:04x}"


def by_budget(ended: list[Ended]) -> dict[float, dict[str, list[Ended]]]:
    """Budget to configuration to its seeds, ascending."""
    found: dict[float, dict[str, list[Ended]]] = {}
    for run in sorted(ended, key=lambda e: (e.flops, e.configuration, e.run)):
        found.setdefault(run.flops, {}).setdefault(run.configuration + run.fields, []).append(run)
    return found


def chosen(configurations: dict[str, list[Ended]]) -> list[Ended]:
    """The runs of the configuration with the lowest mean validation loss."""
    return min(configurations.values(), key=lambda runs: float(np.mean([r.validation for r in runs])))


def resampled(configurations: dict[str, list[Ended]], rng: np.random.Generator) -> dict[str, list[Ended]]:
    """Every configuration with its seeds drawn again, with replacement."""
    return {name: [runs[i] for i in rng.integers(len(runs), size=len(runs))] for name, runs in configurations.items()}
