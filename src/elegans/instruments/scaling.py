"""Scaling: the best loss of a grid at every training budget, where it leaves its plateau, and how it falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from scipy import optimize, stats

from elegans.errors import Invalid
from elegans.instruments.base import StoreInstrument
from elegans.instruments.crossings import SHARE, Bracket, bracket, crossing, interval
from elegans.instruments.frontier import FEWEST, Candidate, by_budget, chosen, ended_runs
from elegans.specs import field, spec
from elegans.store import Store


def power_law(flops: Sequence[float], loss: Sequence[float]) -> tuple[float, float] | None:
    """(a, b) of loss = a * flops^-b by least squares of logarithms; None below three points."""
    if len(flops) < 3 or min(loss) <= 0:
        return None
    slope, offset = np.polyfit(np.log(flops), np.log(loss), 1)
    return float(math.exp(offset)), float(-slope)


def broken_power_law(flops: Sequence[float], loss: Sequence[float]) -> tuple[float, float, float] | None:
    """(b1, break, b2): two power laws that meet, slopes before and after, the break in FLOPs.

    None below five points, where the break would be the second or the last but one of them, or beyond, and where one power law does as
    well, by an F test of its residuals at 95 % (of pure power laws at six budgets 2 to 5 % break).

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
    beta, left = fitted(near.x)
    straight = float(((np.polyval(np.polyfit(x, y, 1), x) - y) ** 2).sum())
    if (straight - left) * (len(x) - 4) < left * 2 * stats.f.ppf(0.95, 2, len(x) - 4):
        return None
    return float(-beta[1]), float(math.exp(near.x)), float(-beta[2])


@spec
class Scaling(StoreInstrument):
    """The best loss of a grid over training FLOPs, one curve a task.

    Table `scaling`, a row per task and budget: at each budget the best of so many `configurations` (everything but seed and budget) by
    mean validation loss (`best_run` is one of its runs), and its `loss` (nats per scored token) and `exact_match` on TEST rows, which chose
    nothing; `low` and `high` are t intervals over `seeds`, null for fewer than three (`exact_low`, `exact_high`: those of the exact
    match). The chance level of the loss is `plateau`, its best `floor`.

    Configurations are compared by the seeds that all of them have. Where the first few have three other seeds or more (`elegans run STUDY
    seed=10..13 --best 3` trains them), these choose among the few, and they alone are reported.

    Table `scaling_fit`, a row per task and quantity, with bootstrap intervals over seeds (every configuration's seeds drawn
    again, the best one chosen again): `leaves`, FLOPs at which the curve has fallen by `share` of the way from plateau to
    floor for good; `half`, the same half-way; `solved`, FLOPs at which exact match passes one half for good; `slope`, b of
    loss - floor = a * FLOPs^-b beyond `leaves`; `break`, FLOPs at the break of a broken power law, `slope_before` and
    `slope_after` it. Missing where the budgets do not reach it.

    The value of these three crossings is interpolated between two budgets on a logarithmic axis, but the curve may fall anywhere
    between them: their interval goes from the bootstrap quantile of the budget before the crossing to that of the
    budget after it, so that it always includes the bracket. A bound is null where it lies beyond the budgets. Slopes and breaks have
    an interval only where every budget has three seeds; of so few seeds a bootstrap covers less than it says, and of one seed bounds are
    the bracket alone, and know nothing of other seeds. A configuration one of whose runs diverged is not chosen at that budget. Where the
    networks that choose are reported, too, their t interval covers less: among configurations that are alike but for their seeds' luck
    the lucky one is chosen (simulated, three seeds: of 4 alike 93 %, of 10 alike 86 %; four other seeds of one 95 %, of the
    best three 93 %).
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

    def _best(self, candidates: list[Candidate]) -> dict[str, Any]:
        best = chosen(candidates)
        runs = best.reported
        mean, low, high = interval([r.test for r in runs], self.confidence, within=(0, math.inf))
        of_rows = interval([r.exact_match for r in runs], self.confidence, within=SHARE)
        exact = dict(zip(("exact_match", "exact_low", "exact_high"), of_rows, strict=True))
        count = {"seeds": len(runs), "configurations": len(candidates), "best_run": best.compared[0].run}
        return {"configuration": runs[0].configuration, **count, "loss": mean, "low": low, "high": high, **exact}

    def _fits(self, mine: dict[float, list[Candidate]], floor: float | None, plateau: float | None) -> list[dict[str, Any]]:
        rng, flops = np.random.default_rng(0), list(mine)

        def curve(again: bool) -> _Curve:
            runs = [chosen([c.redrawn(rng) for c in found] if again else found).reported for found in mine.values()]
            means = [(float(np.mean([r.test for r in rs])), float(np.mean([r.exact_match for r in rs]))) for rs in runs]
            return _Curve(*(list(values) for values in zip(*means, strict=True)))

        enough = min(len(chosen(c).reported) for c in mine.values()) >= FEWEST
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
