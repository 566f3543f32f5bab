"""Lines of runs that differ by seed alone, from rows: means with 95 % t intervals, and panels that draw them.

Intervals of shares are cut at 0 and 1 where they are drawn, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.csv
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elegans.errors import StoreError
from elegans.figures import style
from elegans.figures.catalogue import COVERAGE, natural
from elegans.figures.effects import jitter
from elegans.figures.paper import LOOK, WIDTH, diamond, name_rows, save
from elegans.instruments.crossings import SHARE, Bracket, bracket, interval, median
from elegans.store import Store

LEARNED = 0.9  # exact match that counts as learned
ENDS = ("mean", "low", "high")
Drawn = tuple[Figure, pa.Table]
Draw = Callable[[Store], Drawn]
Middle = Callable[[Sequence[float]], tuple[float, float | None, float | None]]  # with the ends of its interval
Drawing = Callable[[Store, Path], list[Path]]  # draws a store into a folder, and says which files


def drawing(**figures: Draw) -> Drawing:
    """What a study's `figures` may be: each figure, a function of the store, in PNG and PDF under its name, and its numbers in CSV."""

    def draw(store: Store, folder: Path) -> list[Path]:
        with matplotlib.rc_context(LOOK):
            return [file for name, made in figures.items() for file in _saved(*made(store), folder / name)]

    return draw


def _saved(figure: Figure, rows: pa.Table, stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = save(figure, stem)
    pyarrow.csv.write_csv(rows, stem.with_suffix(".csv"))
    return [*files, stem.with_suffix(".csv")]


# ---- from rows


@dataclasses.dataclass(frozen=True)
class Lines:
    """One quantity of the runs of one label, at every recorded moment; NaN where a run was not recorded."""

    x: Float[np.ndarray, " moment"]
    values: Float[np.ndarray, "run moment"]
    runs: tuple[str, ...]

    @property
    def mean(self) -> Float[np.ndarray, " moment"]:
        return np.nanmean(self.values, 0)

    @property
    def half(self) -> Float[np.ndarray, " moment"]:
        """Half the width of the interval; NaN for fewer than three runs."""
        found = [interval(each[np.isfinite(each)], COVERAGE) for each in self.values.T]
        return np.array([np.nan if high is None else high - mean for mean, _, high in found])

    @property
    def last(self) -> list[float]:
        """What was recorded at the last moment."""
        return [float(value) for value in self.values[:, -1] if np.isfinite(value)]

    def first(self, level: float) -> list[float | None]:
        """The first recorded moment at which each run is at a level or above."""
        return [next(iter(self.x[np.nan_to_num(v, nan=-np.inf) >= level].tolist()), None) for v in self.values]

    def brackets(self, level: float) -> list[Bracket]:
        """The recorded moments between which each run passes a level for good; infinite where it never does."""
        return [bracket(self.x[k].tolist(), v[k].tolist(), level) for v, k in zip(self.values, np.isfinite(self.values), strict=True)]


def require(store: Store, *tables: str) -> None:
    """Raises `StoreError` where a table has no rows."""
    for name in tables:
        if not store.has(name):
            raise StoreError(f"{store.path}: no rows of {name} to draw from; `elegans run` measures where runs have ended")


def lines(store: Store, table: str, value: str, where: str = "true", by: str = "r.label") -> dict[str, Lines]:
    """Lines of every label, in natural order; `value` is an aggregate over a run's rows of one moment, m, and r the run.

    Raises `StoreError` where a table by its name has no rows.
    """
    require(store, *([table] if table.isidentifier() else []))
    query = f"""select {by} as label, run, m.step * {moment(store)[0]} as x, {value} as y from runs r join {table} m using (run)
where {where} group by all having y is not null order by all"""
    found: dict[str, dict[str, dict[float, float]]] = {}
    for row in store.sql(query).to_pylist():
        found.setdefault(row["label"], {}).setdefault(row["run"], {})[row["x"]] = row["y"]
    return {label: _lines(found[label]) for label in sorted(found, key=natural)}


def exact_match(store: Store) -> dict[str, Lines]:
    """That of validation rows, while training."""
    return lines(store, "metrics", "max(exact_match)", "split = 'validation'")


def _lines(runs: dict[str, dict[float, float]]) -> Lines:
    x = sorted({x for points in runs.values() for x in points})
    return Lines(np.array(x, float), np.array([[points.get(a, np.nan) for a in x] for points in runs.values()]), tuple(runs))


def moment(store: Store) -> tuple[str, str]:
    """SQL that turns a step of run r into the axis that figures have, and its name: epochs, where there is a finite training set."""
    finite = "train_set" in store.table("runs").column_names
    return ("r.batch / r.train_set", "epoch") if finite else ("1e0", "optimiser step")  # 1.0 would be a decimal


def summary(**found: Mapping[str, Lines]) -> pa.Table:
    """Means and intervals of several quantities as rows."""
    rows = []
    for quantity, labels in found.items():
        for label, each in labels.items():
            for x, mean, half in zip(each.x.tolist(), each.mean.tolist(), each.half.tolist(), strict=True):
                ends = (mean, None, None) if np.isnan(half) else (mean, mean - half, mean + half)
                rows.append({"quantity": quantity, "label": label, "x": x, "runs": len(each.runs), **dict(zip(ENDS, ends, strict=True))})
    return pa.Table.from_pylist(rows)


# ---- panels


def panels(across: int, height: float = 1.9, down: int = 1, **grid: Any) -> tuple[Figure, list[Axes]]:
    """A figure of some panels."""
    figure = Figure(figsize=(max(WIDTH, 1.85 * across), height * down), layout="constrained")
    return figure, list(figure.subplots(down, across, squeeze=False, **grid).ravel())


def colours(labels: Iterable[str]) -> dict[str, Any]:
    """A colour for each label."""
    names = list(labels)
    shades = style.NAMED if len(names) <= len(style.NAMED) else matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    return dict(zip(names, shades, strict=False))


def draw_lines(
    axes: Axes, found: Mapping[str, Lines], ylabel: str, xlabel: str, share: bool = True, of: Mapping[str, Any] | None = None
) -> None:
    """Means with their bands; colours by label, where other panels have them too."""
    for label, each in found.items():
        colour = (of or colours(found))[label]
        low, high = each.mean - each.half, each.mean + each.half
        cut = (0, 1) if share else (-np.inf, np.inf)
        axes.fill_between(each.x, np.clip(low, *cut), np.clip(high, *cut), color=colour, alpha=0.2, linewidth=0)
        axes.plot(each.x, each.mean, color=colour, label=f"{label} ({len(each.runs)})")
    if share:
        axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)


def share_of(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and interval of what is between 0 and 1."""
    return interval(values, COVERAGE, within=SHARE)


def draw_strips(
    axes: Axes, found: Mapping[str, Sequence[float]], xlabel: str, notes: Mapping[str, str] | None = None, middle: Middle = share_of
) -> None:
    """A row for each label: its runs as points, their middle (a share's mean) as a diamond with whiskers."""
    for place, (label, each) in enumerate(found.items()):
        if there := [value for value in each if math.isfinite(value)]:
            axes.plot(there, place + jitter(len(there), 0.24), ".", color=style.GREY, alpha=0.6, markersize=4, markeredgewidth=0)
            _whiskers(axes, *middle(each), place)
        axes.text(1.02, place, (notes or {}).get(label, ""), transform=axes.get_yaxis_transform(), va="center", fontsize=6)
    name_rows(axes, list(found))
    axes.set_xlabel(xlabel)


def _whiskers(axes: Axes, middle: float, low: float | None, high: float | None, place: float) -> None:
    """A diamond; an end that is infinite is an arrow from the largest that is not, and so is a middle."""
    if high is None or math.isfinite(high):
        return diamond(axes, middle, low, high, place, style.BLUE)
    if math.isfinite(middle):
        diamond(axes, middle, low, middle, place, style.BLUE)
    start = middle if math.isfinite(middle) else low
    if start is not None and math.isfinite(start):
        arrow = {"arrowstyle": "->", "color": style.BLUE, "linewidth": 1.2}
        axes.annotate("", (1.0, place), (start, place), axes.get_yaxis_transform(), axes.transData, arrowprops=arrow)
    return None


def draw_times(axes: Axes, found: Mapping[str, Lines], unit: str) -> None:
    """When runs first had the exact match that counts as learned: medians, those that never had it later than any; and how many had."""
    times = {label: [math.inf if t is None else t for t in each.first(LEARNED)] for label, each in found.items()}
    notes = {label: f"{sum(map(math.isfinite, each))}/{len(each)}" for label, each in times.items()}
    draw_strips(axes, times, f"first {unit} of exact match {LEARNED:g}", notes, lambda each: median(each, COVERAGE))


def draw_table(axes: Axes, values: Float[np.ndarray, "row column"], rows: Sequence[str], columns: Sequence[Any], texts: Any = None) -> None:
    """Shares from 0 to 1 as a heat map with the numbers in it; grey where there is none."""
    axes.set_facecolor("#DDDDDD")
    axes.imshow(np.ma.masked_invalid(values), vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            shown = f"{value:.2f}" if texts is None else texts[i][j]
            axes.text(j, i, shown, ha="center", va="center", fontsize=5.5, color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(columns)), [str(c) for c in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
