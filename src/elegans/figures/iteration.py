"""Figures of iteration heads, from rows: learning and attention against epochs, settings beside each other, tables, a fitted law.

Runs of one label differ by seed alone. Means are over them, bands and whiskers 95 % t intervals, cut at 0 and 1 where shares are.
"""

from __future__ import annotations

import dataclasses
import re
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
from scipy import optimize, stats

from elegans.figures import style
from elegans.figures.effects import jitter
from elegans.figures.paper import LOOK, WIDTH, diamond, name_rows, save
from elegans.instruments.crossings import crossing, interval
from elegans.store import Store

CONFIDENCE, LEARNED, LEAST = 0.95, 0.9, 4  # coverage; exact match that counts as learned; inputs of the shortest row that counts
FETCH = f"m.pattern = 'iteration_2' and m.length >= {LEAST}"
Drawn = tuple[Figure, pa.Table]
Draw = Callable[[Store], Drawn]


def save_drawn(draw: Draw, store: Store, stem: Path) -> list[Path]:
    """Draw a figure into PNG and PDF, and its numbers into CSV; return the files."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(LOOK):
        figure, rows = draw(store)
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
        n = np.isfinite(self.values).sum(0)
        several = np.where(n > 2, n, 2)
        spread = np.nanstd(self.values, 0) * np.sqrt(several / (several - 1))
        return np.where(n > 2, stats.t.ppf((1 + CONFIDENCE) / 2, several - 1) * spread / np.sqrt(several), np.nan)

    def crossings(self, level: float) -> list[float | None]:
        """Where each run passes a level for good."""
        there = np.isfinite(self.values)
        return [crossing(self.x[k].tolist(), v[k].tolist(), level) for v, k in zip(self.values, there, strict=True)]


def lines(store: Store, table: str, value: str, where: str = "true", by: str = "r.label") -> dict[str, Lines]:
    """Lines of every label, in natural order; `value` is an aggregate over a run's rows of one moment, m, and r the run."""
    query = f"""select {by} as label, run, m.step * {moment(store)[0]} as x, {value} as y from runs r join {table} m using (run)
where {where} group by all having y is not null order by all"""
    found: dict[str, dict[str, dict[float, float]]] = {}
    for row in store.sql(query).to_pylist():
        found.setdefault(row["label"], {}).setdefault(row["run"], {})[row["x"]] = row["y"]
    return {label: _lines(found[label]) for label in sorted(found, key=natural)}


def _lines(runs: dict[str, dict[float, float]]) -> Lines:
    x = sorted({x for points in runs.values() for x in points})
    return Lines(np.array(x, float), np.array([[points.get(a, np.nan) for a in x] for points in runs.values()]), tuple(runs))


def moment(store: Store) -> tuple[str, str]:
    """SQL that turns a step of run r into the axis that figures have, and its name: epochs, where there is a finite training set."""
    finite = "train_set" in store.table("runs").column_names
    return ("r.batch / r.train_set", "epoch") if finite else ("1.0", "optimiser step")


def natural(text: str) -> list[Any]:
    """A key that sorts numbers in text by size."""
    return [(0, float(part), "") if part[:1].isdigit() else (1, 0.0, part) for part in re.split(r"(\d+\.?\d*(?:e-\d+)?)", text) if part]


def summary(**found: Mapping[str, Lines]) -> pa.Table:
    """Means and intervals of several quantities as rows."""
    rows = []
    for quantity, labels in found.items():
        for label, each in labels.items():
            for x, mean, half in zip(each.x.tolist(), each.mean.tolist(), each.half.tolist(), strict=True):
                ends = {"low": None, "high": None} if np.isnan(half) else {"low": mean - half, "high": mean + half}
                rows.append({"quantity": quantity, "label": label, "x": x, "runs": len(each.runs), "mean": mean, **ends})
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


def draw_strips(axes: Axes, found: Mapping[str, Sequence[float]], xlabel: str, notes: Mapping[str, str] | None = None) -> None:
    """A row for each label: its runs as points, their mean as a diamond with whiskers."""
    for place, (label, each) in enumerate(found.items()):
        if each:
            axes.plot(each, place + jitter(len(each), 0.24), ".", color=style.GREY, alpha=0.6, markersize=4, markeredgewidth=0)
            diamond(axes, *interval(each, CONFIDENCE), place, style.BLUE)
        axes.text(1.02, place, (notes or {}).get(label, ""), transform=axes.get_yaxis_transform(), va="center", fontsize=6)
    name_rows(axes, list(found))
    axes.set_xlabel(xlabel)


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


# ---- the figures of parts


def emergence(store: Store) -> Drawn:
    """Exact match and layer-2 peakiness against epochs; and, run by run, where each is half-way."""
    figure, axes = panels(3)
    exact = lines(store, "metrics", "max(exact_match)", "split = 'validation'")
    last = f"{FETCH} and m.layer = (select max(layer) from circuit c where c.run = m.run)"
    peaked = lines(store, "circuit", "avg(peakiness)", last)
    (_, unit), of, pairs = moment(store), colours(exact), half_ways(exact, peaked)
    draw_lines(axes[0], exact, "exact match", unit, of=of)
    draw_lines(axes[1], peaked, "peakiness of the last layer", unit, of=of)
    axes[0].legend(loc="best", fontsize=5.5)
    for label, found in pairs.items():
        axes[2].plot([a for a, _ in found], [b for _, b in found], ".", color=of[label])
    known = [pair for found in pairs.values() for pair in found]
    if known:
        axes[2].axline((min(map(min, known)),) * 2, slope=1, color=style.GREY, linewidth=0.8)
        later = _interval([a - b for a, b in known])
        axes[2].set_title(f"after the head by\n{later} {unit}s", fontsize=6.5)
    axes[2].set(xlabel=f"exact match 0.5 ({unit})", ylabel=f"peakiness 0.5 ({unit})")
    return figure, summary(exact_match=exact, peakiness=peaked)


def half_ways(exact: Mapping[str, Lines], peaked: Mapping[str, Lines]) -> dict[str, list[tuple[float, float]]]:
    """Of every run that gets there, where its exact match and its peakiness pass 0.5 for good."""
    made: dict[str, list[tuple[float, float]]] = {}
    for label in (label for label in exact if label in peaked):
        accuracy, head = (dict(zip(each.runs, each.crossings(0.5), strict=True)) for each in (exact[label], peaked[label]))
        both = [(accuracy[run], head.get(run)) for run in accuracy]
        made[label] = [(a, b) for a, b in both if a is not None and b is not None]
    return made


def _interval(values: Sequence[float]) -> str:
    mean, low, high = interval(values, CONFIDENCE)
    return f"{mean:.3g}" if low is None or high is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def arms(store: Store) -> Drawn:
    """Every setting's exact match on test rows at the end, and when validation rows passed 0.9."""
    final = lines(store, "metrics", "max(exact_match)", "split = 'test'")
    course = lines(store, "metrics", "max(exact_match)", "split = 'validation'")
    times = {label: course[label].crossings(LEARNED) for label in final}
    reached = {label: [t for t in found if t is not None] for label, found in times.items()}
    figure, axes = panels(2, 0.7 + 0.17 * len(final), sharey=True)
    draw_strips(axes[0], {label: [v for v in each.values[:, -1] if np.isfinite(v)] for label, each in final.items()}, "exact match, test")
    axes[0].set_xlim(-0.03, 1.03)
    draw_strips(
        axes[1], reached, f"{moment(store)[1]} of exact match {LEARNED:g}", {k: f"{len(v)}/{len(times[k])}" for k, v in reached.items()}
    )
    return figure, summary(test_exact_match=final, exact_match=course)


def table(published: Mapping[str, Mapping[int, float]]) -> Draw:
    """Settings x lengths, measured at the end of the runs, beside the published ones."""

    def draw(store: Store) -> Drawn:
        length = """r.label || ' @ ' || "task.length" """
        found = lines(store, "metrics", "max(exact_match)", "split = 'test'", by=length)
        cells = {tuple(key.split(" @ ")): each for key, each in found.items()}
        rows = [k for k in published if any(k == a for a, _ in cells)] + sorted({a for a, _ in cells} - set(published))
        columns = sorted({int(b) for _, b in cells})
        known = {(a, int(b)): (each.mean[-1], each.half[-1]) for (a, b), each in cells.items()}
        pairs = np.array([[known.get((r, c), (np.nan, np.nan)) for c in columns] for r in rows])
        texts = [[f"{m:.2f}" + ("" if np.isnan(h) else f"\n±{h:.2f}") for m, h in row] for row in pairs.tolist()]
        theirs = np.array([[published.get(r, {}).get(c, np.nan) for c in columns] for r in rows])
        figure, axes = panels(2, 0.6 + 0.3 * len(rows), sharey=True)
        draw_table(axes[0], pairs[..., 0], rows, columns, texts)
        draw_table(axes[1], theirs, rows, columns)
        for each, title in zip(axes, ("measured, ± 95 % interval", "published"), strict=True):
            each.set_title(title)
            each.set_xlabel("inputs of the longest row")
        return figure, summary(test_exact_match=found)

    return draw


def patching(store: Store) -> Drawn:
    """Exact match while training, as it is and with the maps of a layer, or of all, replaced."""
    figure, axes = panels(3, sharey=True)
    base = {"no patch": next(iter(lines(store, "patch", "max(base_exact_match)", by="'no patch'").values()))}
    place = "coalesce('layer ' || (layer + 1), 'all')"
    ideal = "(source = 'iteration_1' and layer = 0 or source = 'iteration_2' and layer = 1)"
    titles = {"ideal": ideal, "uniform": "source = 'uniform'", "its own at the end": "source = 'final'"}
    made = {title: base | lines(store, "patch", "max(exact_match)", where, by=place) for title, where in titles.items()}
    for each, (title, found) in zip(axes, made.items(), strict=True):
        draw_lines(each, found, "exact match" if each is axes[0] else "", moment(store)[1])
        each.set_title(f"attention: {title}")
        each.legend(loc="best", fontsize=5.5)
    return figure, summary(**made)


def sharpening(store: Store) -> Drawn:
    """Exact match, mean attention to x_t, entropy and largest share of the last layer, against epochs."""
    figure, axes = panels(4)
    last = "layer = (select max(layer) from circuit)"
    made = {
        "exact match": lines(store, "metrics", "max(exact_match)", "split = 'validation'"),
        "attention to x_t": lines(store, "circuit", "avg(attention)", f"{FETCH} and {last}"),
        "entropy, nats": lines(store, "dynamics", "avg(entropy)", f"m.of = 'attention' and {last}"),
        "largest share": lines(store, "dynamics", "avg(peak)", f"m.of = 'attention' and {last}"),
    }
    for each, (name, found) in zip(axes, made.items(), strict=True):
        draw_lines(each, found, name, moment(store)[1], name != "entropy, nats")
    axes[0].legend(loc="best", fontsize=5.5)
    return figure, summary(**made)


def subtraction(store: Store) -> Drawn:
    """How well the step is read at every site, beside random labels and chance, and the exact match."""
    figure, axes = panels(2)
    read = lines(store, "probe", "avg(accuracy)", "feature = 'step'", by="m.site")
    level = {
        name: next(iter(lines(store, "probe", f"avg({name})", "feature = 'step'", by="''").values())) for name in ("control", "chance")
    }
    exact = lines(store, "metrics", "max(exact_match)", "split = 'validation'")
    draw_lines(axes[0], read | level, "accuracy of the step", moment(store)[1])
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=5.5)
    draw_lines(axes[1], exact, "exact match", moment(store)[1])
    return figure, summary(step=read, control={"": level["control"]}, chance={"": level["chance"]}, exact_match=exact)


def heads(store: Store) -> Drawn:
    """By setting, the layer whose head looks most at x_t, and how peaked the sharpest head of all is."""
    best = store.sql(f"""select r.label, run, layer, max(y) as y from (select run, layer, head, avg(attention) as y from circuit m
where {FETCH} group by all) join runs r using (run) group by all order by run, y desc""").to_pylist()
    sharp = lines(store, "(select run, step, layer, head, avg(peakiness) as y from circuit m where " + FETCH + " group by all)", "max(m.y)")
    top = {row["run"]: row for row in reversed(best)}.values()  # of each run the layer that looks most
    layers = sorted({row["layer"] for row in best})
    shares = np.array([[np.mean([row["layer"] == n for row in top if row["label"] == label]) for n in layers] for label in sharp])
    figure, axes = panels(2, 0.7 + 0.2 * len(sharp), sharey=True)
    draw_table(axes[0], shares, list(sharp), [n + 1 for n in layers])
    axes[0].set_title("share of runs in which\nthis layer looks most at x_t")
    axes[0].set_xlabel("layer")
    draw_strips(axes[1], {label: each.values[:, -1].tolist() for label, each in sharp.items()}, "peakiness of the sharpest head")
    axes[1].set_xlim(-0.03, 1.03)
    return figure, summary(peakiness=sharp)


# ---- the law of length and width


@dataclasses.dataclass(frozen=True)
class Law:
    """exact match = sigmoid(k (log d - log d_half)), d_half = c length^b."""

    c: float
    b: float
    k: float

    def half(self, length: Any) -> Any:
        """The width at which half of the rows are right."""
        return self.c * np.asarray(length, float) ** self.b

    def share(self, d: Any, length: Any) -> Any:
        """Exact match."""
        return 1 / (1 + np.exp(np.clip(-self.k * (np.log(d) - np.log(self.half(length))), -50, 50)))


def fit_law(d: Float[np.ndarray, " run"], length: Float[np.ndarray, " run"], share: Float[np.ndarray, " run"]) -> Law:
    """By least squares of shares."""

    def law(p: np.ndarray) -> Law:
        return Law(float(np.exp(p[0])), float(p[1]), float(np.exp(p[2])))

    start = np.array([np.log(d).mean(), 0.0, 1.0])
    return law(optimize.least_squares(lambda p: law(p).share(d, length) - share, start, bounds=([-5, -5, -3], [10, 5, 5])).x)


def law(store: Store, draws: int = 200) -> Drawn:
    """Exact match against width at every length, and the fitted width that a length needs, with a bootstrap over runs of each cell."""
    query = """select "model.d_model" as d, "task.length" as n, exact_match as y from runs join metrics using (run)
where split = 'test' order by all"""
    d, n, y = (np.array(store.sql(query)[name].to_pylist(), float) for name in ("d", "n", "y"))
    cells = [np.nonzero((d == a) & (n == b))[0] for a, b in sorted(set(zip(d, n, strict=True)))]
    generator, best = np.random.default_rng(0), fit_law(d, n, y)
    picks = [np.concatenate([generator.choice(cell, len(cell)) for cell in cells]) for _ in range(draws)]
    fits = [fit_law(d[i], n[i], y[i]) for i in picks]
    low, high = np.quantile([fit.b for fit in fits], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    figure, axes = panels(2)
    widths, lengths = np.geomspace(d.min(), d.max(), 50), np.unique(n)
    for colour, length in zip(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(lengths))), lengths, strict=True):
        axes[0].plot(widths, best.share(widths, length), color=colour, label=f"{length:g} inputs")
        axes[0].plot(d[n == length], y[n == length], ".", color=colour, alpha=0.6, markersize=4, markeredgewidth=0)
    axes[0].legend(loc="best", fontsize=5.5)
    axes[0].set(xscale="log", xlabel="d_model", ylabel="exact match, test", ylim=(-0.03, 1.03))
    along = np.geomspace(lengths.min(), lengths.max(), 50)
    every = np.quantile([fit.half(along) for fit in fits], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    axes[1].fill_between(along, *every, color=style.BLUE, alpha=0.2, linewidth=0)
    axes[1].plot(along, best.half(along), color=style.BLUE)
    axes[1].set(xscale="log", yscale="log", xlabel="inputs of the longest row", ylabel="width for half of the rows")
    axes[1].set_title(f"exponent {best.b:.2f} [{low:.2f}, {high:.2f}]")
    return figure, pa.Table.from_pylist([{"c": best.c, "b": best.b, "b_low": float(low), "b_high": float(high), "k": best.k}])
