"""How many times fewer epochs a task takes after another: from rows, seed by seed, each known to its recordings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from elegans.figures import style
from elegans.figures.catalogue import COVERAGE
from elegans.figures.effects import jitter
from elegans.figures.lines import ENDS, LEARNED, Drawn, Lines, draw_lines, exact_match, moment, panels, summary
from elegans.figures.paper import diamond, name_rows
from elegans.instruments.crossings import Bracket, interval, spanning
from elegans.store import Store

NOTE = (
    f"seeds that end below {LEARNED:g}, from scratch or after the other task, are left out; "
    "\u25b8 at least so much: already there at the first recording"
)


def transfer(store: Store) -> Drawn:
    """Learning after another task and from scratch; and how many times fewer epochs it takes to exact match 0.9."""
    course, (epochs, unit) = exact_match(store), moment(store)
    known = {r["run"]: r for r in store.sql(f"select run, seed, coalesce(after_step, 0) * {epochs} as before from runs r").to_pylist()}
    reached = {label: {known[run]["seed"]: b for run, b in zip(each.runs, passed(each), strict=True)} for label, each in course.items()}
    children = [label for label in course if " after " in label]
    figure, axes = panels(2, 2.0, max(1, len(children)))
    tables = [summary(exact_match=course)]
    for k, label in enumerate(children):
        scratch = f"{label.split(' after ')[0]} from scratch"
        draw_lines(axes[2 * k], {name: course[name] for name in (scratch, label) if name in course}, "exact match", unit)
        axes[2 * k].legend(loc="best", fontsize=5.5)
        before = known[course[label].runs[0]]["before"]
        found = speed_ups(reached.get(scratch, {}), reached[label], before)
        rows = [{"label": label, "quantity": name, "runs": len(each)} | mean(each) for name, each in found.items() if each]
        draw_speed_ups(axes[2 * k + 1], found, len(reached[label]), unit)
        tables += [pa.Table.from_pylist(rows)] if rows else []
    figure.supxlabel(NOTE, fontsize=6, color=style.GREY)
    return figure, pa.concat_tables(tables, promote_options="permissive")


# ---- from rows


def passed(found: Lines) -> list[Bracket | None]:
    """The recorded epochs between which each run passes 0.9 for good; None where it never does. The start counts as not there yet."""
    made = [(max(low, 0.0), max(high, float(found.x[min(1, len(found.x) - 1)]))) for low, high in found.brackets(LEARNED)]
    return [None if math.isinf(high) else (low, high) for low, high in made]


def speed_ups(scratch: Mapping[int, Bracket | None], child: Mapping[int, Bracket | None], before: float) -> dict[str, list[Bracket]]:
    """Of every seed that gets there both ways, between what log10 of the epochs from scratch over those after another task is: over
    its own alone, and with those before. Without an upper bound where the child was there at its first recording."""
    both = [(a, b) for seed, b in child.items() if b is not None and (a := scratch.get(seed)) is not None]
    names = {"its own epochs alone": 0.0, f"with the {before:.3g} before": before}
    return {name: [(_decades(a[0], b[1] + n), _decades(a[1], b[0] + n)) for a, b in both] for name, n in names.items()}


def _decades(above: float, below: float) -> float:
    """log10 of a ratio, of which one side may be 0."""
    return -math.inf if above == 0 else math.inf if below == 0 else math.log10(above / below)


def mean(found: Sequence[Bracket]) -> dict[str, Any]:
    """The geometric mean of the ratio over seeds and its interval, which holds wherever in its bracket each seed is.

    Where some seeds have no upper bound it is that of the lower ones, "at least", and the other way round "at most" (`bound`).
    """
    lows, highs = zip(*found, strict=True)
    below, above = (all(map(math.isfinite, ends)) for ends in (lows, highs))
    ends: tuple[float | None, ...]
    bound: str | None
    if below and above:
        ends, bound = spanning(found, COVERAGE), None
    elif below:
        ends, bound = (*interval(lows, COVERAGE)[:2], None), "at least"
    elif above:
        ends, bound = (float(np.mean(highs)), None, interval(highs, COVERAGE)[2]), "at most"
    else:
        ends, bound = (None, None, None), "unknown"
    return dict(zip(ENDS, [None if v is None else 10**v for v in ends], strict=True)) | {"bound": bound}


# ---- the panel


def draw_speed_ups(axes: Axes, found: Mapping[str, Sequence[Bracket]], of: int, unit: str) -> None:
    """A row for each way of counting: seeds as points in the middle of what is known, as arrows at their bound where it is one."""
    titles = []
    for place, (name, each) in enumerate(found.items()):
        for marker, x in zip(".><", _places(each), strict=True):
            size = 4 if marker == "." else 3
            axes.plot(x, place + jitter(len(x), 0.24), marker, color=style.GREY, alpha=0.6, markersize=size, markeredgewidth=0)
        if each and (made := mean(each))["mean"] is not None:
            draw_mean(axes, made, place)
            titles.append(f"{name}: {said(**made)}")
    axes.axvline(0, color=style.GREY, linewidth=0.8)
    name_rows(axes, [f"{name}\n{len(each)} of {of} seeds" for name, each in found.items()])
    axes.set_title("\n".join(titles), fontsize=6)
    axes.set_xlabel(f"decades of {unit}s saved")


def _places(found: Sequence[Bracket]) -> tuple[list[float], list[float], list[float]]:
    """Middles; lower bounds of those that have no upper one; upper ones of those that have no lower one."""
    finite = [(math.isfinite(low), math.isfinite(high), low, high) for low, high in found]
    middles = [(low + high) / 2 for below, above, low, high in finite if below and above]
    return middles, [low for below, above, low, _ in finite if below and not above], [high for b, a, _, high in finite if a and not b]


def draw_mean(axes: Axes, made: Mapping[str, Any], place: float) -> None:
    """A diamond with whiskers; an arrow with one whisker where the mean is a bound."""
    centre, low, high = (None if made[end] is None else math.log10(made[end]) for end in ENDS)
    assert centre is not None
    if made["bound"] is None:
        diamond(axes, centre, low, high, place, style.BLUE)
        return
    error = [[0.0 if low is None else centre - low], [0.0 if high is None else high - centre]]
    shape = ">" if made["bound"] == "at least" else "<"
    axes.errorbar([centre], [place], xerr=error, fmt=shape, color=style.BLUE, markersize=5.5, elinewidth=1.2)


def said(mean: float, low: float | None, high: float | None, bound: str | None) -> str:
    """A ratio with its interval."""
    if low is None and high is None:
        return f"{bound or ''} {mean:.3g} x".strip()
    ends = f"{'(0' if low is None else f'[{low:.3g}'}, " + ("\u221e)" if high is None else f"{high:.3g}]")
    return f"{bound or ''} {mean:.3g} x {ends}".strip()
