"""Transitions: when a run leaves its plateau, and whether a feature was there before."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from elegans import specs
from elegans.errors import Invalid
from elegans.instruments.base import StoreInstrument
from elegans.specs import field, spec
from elegans.store import Store
from elegans.tasks import Task
from elegans.training.run import SEEDS

# in an order of its own, sums included: rows that arrive in another order must give the same bits, and ties the same site
READABLE = """select run, feature, site, step, list_avg(list(coalesce(accuracy, r2)::double order by "index", label)) as score
from probe where coalesce(accuracy, r2) is not null group by run, feature, site, step order by run, feature, step, site"""


def crossing(steps: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The first step at which a rising curve passes a level for good, interpolated on a logarithmic axis of steps.

    None where it starts above the level, or ends below it.
    """
    above = np.asarray(values) >= level
    if above.all() or not above[-1]:
        return None
    last = int(np.nonzero(~above)[0][-1])  # the last point below
    s0, s1 = (math.log(max(s, 0.5)) for s in (steps[last], steps[last + 1]))
    share = (level - values[last]) / (values[last + 1] - values[last])
    return math.exp(s0 + share * (s1 - s0))


def interval(values: Sequence[float], confidence: float) -> tuple[float, float | None, float | None]:
    """Mean and Student t interval over independent runs; no interval for fewer than three."""
    mean = float(np.mean(values))
    if len(values) < 3:
        return mean, None, None
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


@spec
class Transition(StoreInstrument):
    """When the loss falls, when a feature becomes readable, and which came first.

    Per run, table `transition`: `loss_step`, the step at which validation loss has fallen half-way from the
    plateau to the floor for good; `feature_step`, the step at which the probes' score (accuracy; r2 of a number),
    averaged over reads and labels at the site that is best at the end, has risen half-way from untrained to its
    end; `lead` = log10(loss_step /
    feature_step), in decades of training steps (the same as decades of FLOPs), positive where the feature came
    first. Missing where the run never learned, or the probe never rose by `least`. Steps lie between recorded
    ones, so a lead is no finer than the spacing of evaluations and recorded weights.

    Per group of runs that differ by seed alone, table `lead`: mean, interval over seeds, and the verdict: leads,
    lags, no lead (the whole interval within `same` of zero), undecided. Chance level 0; no ceiling.
    """

    confidence: float = field(0.95, "coverage of the intervals", gt=0, lt=1)
    least: float = field(0.05, "smallest rise of a probe's mean score that counts as learned", gt=0, lt=1)
    same: float = field(0.1, "decades within which two transitions are the same", gt=0)

    def tables(self, store: Store) -> dict[str, pa.Table]:
        if not store.has("probe"):
            raise Invalid("store", str(store.path), "transition needs probes: run `elegans measure probe` first")
        probes, curves = _nested(store.sql(READABLE)), self._losses(store)
        rows = []
        for (run, feature), by_site in probes.items():
            learned = curves[run]["cross"]
            seen = self._feature_step(by_site)
            lead = math.log10(learned / seen) if learned and seen else None
            rows.append(
                {"run": run, "feature": feature, "level": curves[run]["level"], "loss_step": learned, "feature_step": seen, "lead": lead}
            )
        return {"transition": pa.Table.from_pylist(rows, schema=_TRANSITION), "lead": self._leads(store, rows)}

    def _losses(self, store: Store) -> dict[str, dict[str, Any]]:
        """For every run, the level half-way between plateau and floor and the step at which its loss passes it."""
        table = store.sql("select run, step, loss from metrics where split = 'validation' and loss is not null order by step")
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in table.to_pylist():
            curves.setdefault(row["run"], []).append((row["step"], row["loss"]))
        made = {}
        for line in store.lines():
            task = specs.from_dict(Task, line["spec"]["task"])
            floor, plateau = task.floor(), task.plateau()
            level = None if floor is None or plateau is None else (floor + plateau) / 2
            steps, losses = zip(*curves.get(line["run"], [(0, math.inf)]), strict=True)
            made[line["run"]] = {"level": level, "cross": None if level is None else crossing(steps, [-x for x in losses], -level)}
        return made

    def _feature_step(self, by_site: dict[str, list[tuple[int, float]]]) -> float | None:
        curve = max(by_site.values(), key=lambda points: points[-1][1])
        steps, score = zip(*curve, strict=True)
        if score[-1] - score[0] < self.least:
            return None
        return crossing(steps, score, (score[0] + score[-1]) / 2)

    def _leads(self, store: Store, rows: list[dict[str, Any]]) -> pa.Table:
        groups = group_names(store)
        found: dict[tuple[str, str], list[float | None]] = {}
        for row in rows:
            found.setdefault((groups[row["run"]], row["feature"]), []).append(row["lead"])
        return pa.Table.from_pylist([self._lead(g, f, leads) for (g, f), leads in sorted(found.items())], schema=_LEAD)

    def _lead(self, group: str, feature: str, leads: list[float | None]) -> dict[str, Any]:
        known = [x for x in leads if x is not None]
        mean, low, high = interval(known, self.confidence) if known else (None, None, None)
        verdict = "undecided"
        if low is not None and high is not None:
            verdict = "leads" if low > 0 else "lags" if high < 0 else "no lead" if -self.same < low and high < self.same else "undecided"
        return {
            "group": group,
            "feature": feature,
            "runs": len(known),
            "of": len(leads),
            "mean": mean,
            "low": low,
            "high": high,
            "verdict": verdict,
        }


_TRANSITION = pa.schema(
    [("run", pa.string()), ("feature", pa.string())] + [(n, pa.float64()) for n in ("level", "loss_step", "feature_step", "lead")]
)
_LEAD = pa.schema(
    [("group", pa.string()), ("feature", pa.string()), ("runs", pa.int64()), ("of", pa.int64())]
    + [(n, pa.float64()) for n in ("mean", "low", "high")]
    + [("verdict", pa.string())]
)


def _nested(table: pa.Table) -> dict[tuple[str, str], dict[str, list[tuple[int, float]]]]:
    """(run, feature) to site to [(step, score)]."""
    made: dict[tuple[str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in table.to_pylist():
        made.setdefault((row["run"], row["feature"]), {}).setdefault(row["site"], []).append((row["step"], row["score"]))
    return made


def group_names(store: Store) -> dict[str, str]:
    """Run id to the name of its group: the fields in which runs of the store differ, seeds aside."""
    lines = store.lines()
    flat = {line["run"]: specs.flat(line["spec"]) for line in lines}
    names = list(dict.fromkeys(name for fields in flat.values() for name in fields))
    differ = [n for n in names if n not in SEEDS and len({json.dumps(f.get(n)) for f in flat.values()}) > 1]
    return {run: ", ".join(f"{n.rpartition('.')[2]}={_show(f.get(n))}" for n in differ) or "all runs" for run, f in flat.items()}


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
