"""What removing a feature does, run by run: against that same run's random directions, then averaged over the runs that learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from elegans.figures.catalogue import COVERAGE, Catalogue, natural
from elegans.instruments.crossings import SHARE, interval

Draws = dict[str, dict[str, list[float]]]  # direction (or base) to run to exact matches
LITTLE = 0.05  # of exact match: an effect that is surely smaller is called none
USED, UNUSED, UNDECIDED = "the network uses it", "no more than chance directions do", "undecided"


@dataclasses.dataclass(frozen=True)
class Against:
    """A control of an ablation, in the same runs. Exact match, a share of rows."""

    control: str
    left: float  # mean over runs, draws averaged within each
    each: np.ndarray  # for each run, what the control leaves less what the feature leaves
    beyond: int  # runs in which the feature leaves less than every single draw
    mean: float  # of `each`, with its 95 % t interval over runs; none for a single run
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        if self.low is not None and self.low > 0:
            return USED
        return UNUSED if self.high is not None and self.high < LITTLE < self.left else UNDECIDED  # of nothing left nothing can be taken


@dataclasses.dataclass(frozen=True)
class Effect:
    """One feature taken out of the runs that learned its task."""

    task: str
    feature: str
    method: str
    runs: int
    of: int  # runs that were ablated, learned or not
    base: float | None  # exact match with nothing removed; null where no run learned
    left: float | None
    low: float | None  # 95 % t interval of `left` over runs, cut at 0 and 1
    high: float | None
    against: tuple[Against, ...]

    @property
    def verdict(self) -> str:
        """Used where every control leaves surely more, unused where none does; undecided where they disagree."""
        found = {a.verdict for a in self.against}
        return found.pop() if len(found) == 1 else UNDECIDED if found else "not compared"


def within(rows: pa.Table, runs: Catalogue) -> list[Effect]:
    """An effect for every task, feature and method, from: run, feature, method, direction, draw, exact_match, base_exact_match."""
    found: dict[tuple[str, str, str], Draws] = {}
    for row in rows.to_pylist():
        if row["exact_match"] is not None:
            task = str(runs.facts[row["run"]].fields.get("task", ""))
            drawn = found.setdefault((task, row["feature"], row["method"]), {}).setdefault(row["direction"], {})
            drawn.setdefault(row["run"], []).append(row["exact_match"])
            bases = found[task, row["feature"], row["method"]].setdefault("base", {})
            bases[row["run"]] = [row["base_exact_match"]]
    learned = set(runs.learned)
    return [_effect(name, drawn, learned) for name, drawn in sorted(found.items(), key=lambda item: [natural(part) for part in item[0]])]


def _effect(name: tuple[str, str, str], drawn: Draws, learned: set[str]) -> Effect:
    own = drawn.get("feature", {})
    chosen = sorted(learned & own.keys())
    if not chosen:
        return Effect(*name, 0, len(own), None, None, None, None, ())
    left = np.array([np.mean(own[run]) for run in chosen])
    controls = [c for c in ("random", "matched", "labels") if set(chosen) <= drawn.get(c, {}).keys()]
    against = [_against(c, left, [np.array(drawn[c][run]) for run in chosen]) for c in controls]
    base = float(np.mean([drawn["base"][run] for run in chosen]))
    return Effect(*name, len(chosen), len(own), base, *interval(left, COVERAGE, fewest=2, within=SHARE), tuple(against))


def _against(control: str, left: np.ndarray, draws: Sequence[np.ndarray]) -> Against:
    kept = np.array([d.mean() for d in draws])
    beyond = sum(float(own) < d.min() for own, d in zip(left, draws, strict=True))
    return Against(control, float(kept.mean()), kept - left, int(beyond), *interval(kept - left, COVERAGE, fewest=2))


TABLE = ("task", "feature", "method", "runs", "of", "exact_match", "after", "after_low", "after_high", "verdict")


def table(effects: Sequence[Effect]) -> pa.Table:
    """The ablation table: exact match before and after, what each control leaves, and the difference within a run with its interval."""
    rows = []
    for e in effects:
        row = dict(zip(TABLE, (e.task, e.feature, e.method, e.runs, e.of, e.base, e.left, e.low, e.high, e.verdict), strict=True))
        for a in e.against:
            row |= {a.control: a.left, f"{a.control}_more": a.mean, f"{a.control}_more_low": a.low, f"{a.control}_more_high": a.high}
        rows.append(row)
    names = list(dict.fromkeys([*TABLE[:-1], *(name for row in rows for name in row if name not in TABLE), "verdict"]))
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def markdown(effects: Sequence[Effect]) -> str:
    """The ablation table for a page: means over runs with 95 % intervals; – where something was not measured."""
    head = ["task", "feature", "runs", "exact match", "feature removed", "random directions", "random minus feature", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for e in effects:
        random = next((a for a in e.against if a.control == "random"), None)
        more = ("–", "–") if random is None else (_cell(random.left), _cell(random.mean, random.low, random.high))
        cells = [e.task, e.feature if e.method == "projection" else f"{e.feature} ({e.method})", f"{e.runs} of {e.of}"]
        lines.append("| " + " | ".join([*cells, _cell(e.base), _cell(e.left, e.low, e.high), *more, e.verdict]) + " |")
    return "\n".join(lines) + "\n"


def _cell(mean: float | None, low: float | None = None, high: float | None = None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.2f}" if low is None or high is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]"
