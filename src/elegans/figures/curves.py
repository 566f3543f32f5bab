"""Curves against the optimiser step: loss, exact match, and a probe beside the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from elegans.figures import style
from elegans.figures.catalogue import Catalogue, Grouping, columns

MANY = 60  # runs: more are drawn as medians and bands
BAND = (0.1, 0.9)  # quantiles over runs
UNITS = {
    "loss": ("loss (nats per scored token)", "Loss, nats per scored token"),
    "exact_match": ("exact match", "Exact match, the share of rows that are right at every scored token"),
    "accuracy": ("token accuracy", "Accuracy, the share of scored tokens that are right"),
}
SPLITS = {"train": "training batches", "validation": "validation rows", "test": "test rows"}

Series = dict[str, tuple[np.ndarray, np.ndarray]]  # run to its steps and values, NaN where missing


def series(rows: pa.Table, value: str) -> Series:
    """Steps and values of every run that has at least one."""
    data = columns(rows.select(["run", "step", value]))
    order = np.lexsort((data["step"], data["run"].astype(str)))
    run, step, values = (data[name][order] for name in ("run", "step", value))
    starts = np.flatnonzero(np.r_[True, run[1:] != run[:-1]]) if len(run) else np.array([], int)
    found = {}
    for start, stop in zip(starts, [*starts[1:], len(run)], strict=True):
        y = np.where(np.isfinite(values[start:stop].astype(float)), values[start:stop].astype(float), np.nan)
        if not np.isnan(y).all():
            found[str(run[start])] = (step[start:stop], y)
    return found


@dataclasses.dataclass(frozen=True)
class Band:
    """Several runs at once. Quantiles are over the runs measured at a step."""

    runs: int
    step: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray


def band(members: Sequence[tuple[np.ndarray, np.ndarray]]) -> Band | None:
    """Median and quantiles, at the steps where at least half as many runs were measured as at the best covered one."""
    if not members:
        return None
    steps, values = (np.concatenate(parts) for parts in zip(*members, strict=True))
    steps, values = steps[~np.isnan(values)], values[~np.isnan(values)]
    unique, place, n = np.unique(steps, return_inverse=True, return_counts=True)
    parts = np.split(values[np.argsort(place, kind="stable")], np.cumsum(n)[:-1])
    kept = [i for i in range(len(unique)) if 2 * n[i] >= n.max()]
    low, median, high = np.array([np.quantile(parts[i], (BAND[0], 0.5, BAND[1])) for i in kept]).T
    return Band(len(members), unique[kept], median, low, high, n[kept])


def curves(rows: pa.Table, catalogue: Catalogue, value: str = "loss", split: str = "validation", by: str | None = None) -> go.Figure:
    """One metric of every run against the step; rows: run, step and the metric. Colours show the field `by`.

    More than 60 runs are drawn as their median and 10 to 90 % band in each group.
    """
    data, grouping = series(rows, value), catalogue.grouping(by)
    steps = np.unique(np.concatenate([s for s, _ in data.values()])) if data else np.array([1])
    figure = style.blank(
        420, _curves_caption(data, catalogue, value, split, grouping),
        xaxis=style.step_axis(steps), yaxis={"title": {"text": UNITS[value][0]}, "range": y_range(data, catalogue, value)},
        legend={"title": {"text": style.text(grouping.title)}}, showlegend=len(grouping.labels) > 1,
    )  # fmt: skip
    draw = _draw_bands if len(data) > MANY else _draw_runs
    figure.add_traces(draw(data, catalogue, grouping, style.first_step(steps)))
    if value == "loss":
        style.draw_levels(figure, style.level_lines(catalogue, list(data)))
    return figure


def y_range(data: Series, catalogue: Catalogue, value: str) -> list[float]:
    """0 to 1, or for a loss from 0 to a little above the first losses and the plateau; rare spikes are cut."""
    if value != "loss":
        return [-0.02, 1.03]
    plateau = max((level for level, _ in catalogue.levels("plateau", list(data))), default=0.0)
    first = float(np.median([y[~np.isnan(y)][0] for _, y in data.values()])) if data else 1.0
    highest = max((float(np.nanmax(y)) for _, y in data.values()), default=1.0)
    top = min(1.05 * highest, 1.3 * max(first, plateau))
    return [-0.03 * top, max(top, 1.1 * plateau)]


def _draw_runs(data: Series, catalogue: Catalogue, grouping: Grouping, first: float) -> list[go.Scatter]:
    colours = style.palette(grouping)
    traces: list[go.Scatter] = []
    named: set[str] = set()
    for run in sorted(data, key=lambda run: grouping.labels.index(grouping.of[run])):
        steps, values = data[run]
        label = grouping.of[run]
        hover = f"<b>{style.text(run)}</b><br>{style.text(catalogue.describe(run), 120)}<br>step %{{customdata}}: %{{y:.4f}}<extra></extra>"
        look = {"name": style.text(label, 28), "legendgroup": label, "line": {"color": colours[label], "width": 1.4}, "opacity": 0.85}
        place = {"x": style.step_places(steps, first), "y": values, "customdata": steps}
        traces.append(go.Scatter(**place, **look, mode="lines", hovertemplate=hover, showlegend=label not in named, meta=run))
        named.add(label)
        if catalogue.facts[run].state == "diverged":
            traces.append(_end(run, steps, values, colours[label], first))
    return traces


def _end(run: str, steps: np.ndarray, values: np.ndarray, colour: str, first: float) -> go.Scatter:
    """A cross at the last finite value of a diverged run."""
    last = np.flatnonzero(~np.isnan(values))[-1]
    hover = f"<b>{style.text(run)}</b><br>diverged; last finite value, step {steps[last]}<extra></extra>"
    place = {"x": style.step_places(steps[last : last + 1], first), "y": values[last : last + 1]}
    marker = {"symbol": "x", "size": 9, "color": colour}
    return go.Scatter(**place, mode="markers", marker=marker, hovertemplate=hover, showlegend=False, meta="diverged")


def _draw_bands(data: Series, catalogue: Catalogue, grouping: Grouping, first: float) -> list[go.Scatter]:
    del catalogue
    colours = style.palette(grouping)
    traces: list[go.Scatter] = []
    for label in grouping.labels:
        made = band([data[run] for run in data if grouping.of[run] == label])
        if made is not None:
            traces += draw_band(made, colours[label], f"{style.text(label, 20)} ({made.runs})", first)
    return traces


def draw_band(made: Band, colour: str, name: str, first: float, axis: str = "y") -> list[go.Scatter]:
    """A median with its band."""
    x = style.step_places(made.step, first)
    outline = {"x": np.r_[x, x[::-1]], "y": np.r_[made.high, made.low[::-1]], "fill": "toself", "fillcolor": style.faint(colour, 0.13)}
    hover = (
        f"<b>{name}</b><br>step %{{customdata[0]}}: median %{{y:.4f}}<br>10 to 90 %: %{{customdata[1]:.4f}} to %{{customdata[2]:.4f}}"
        "<br>n = %{customdata[3]} runs<extra></extra>"
    )
    notes = np.column_stack([made.step, made.low, made.high, made.n])
    shared = {"mode": "lines", "legendgroup": name, "yaxis": axis}
    return [
        go.Scatter(**outline, **shared, line={"width": 0}, hoverinfo="skip", showlegend=False),
        go.Scatter(x=x, y=made.median, customdata=notes, **shared, line={"color": colour, "width": 2.2}, name=name, hovertemplate=hover),
    ]


def about(value: str, split: str) -> str:
    """What is drawn against what, as captions begin."""
    what = f"{UNITS[value][1]}, on {SPLITS.get(split, split)}"
    return f"{what}, against the optimiser step (logarithmic; 0 is the untrained network)."


def _curves_caption(data: Series, catalogue: Catalogue, value: str, split: str, grouping: Grouping) -> str:
    runs, absent = len(data), len(catalogue.facts) - len(data)
    words = [f"{about(value, split)} n = {runs} runs."]
    if runs > MANY:
        words.append(f"{runs} runs are too many for single curves: lines are medians, bands the 10 to 90 % range over the runs of a group")
        words[-1] += " (their number in brackets)."
    if absent:
        words.append(f"{absent} runs have no such value and are not drawn.")
    crosses = sum(catalogue.facts[run].state == "diverged" for run in data)
    if crosses and runs <= MANY:
        words.append(f"A cross ends each of the {crosses} diverged runs." if crosses > 1 else "The cross ends the run that diverged.")
    if grouping.title:
        words.append(f"Colour: {grouping.title}.")
    return " ".join([*words, *([style.level_note(catalogue, list(data))] if value == "loss" else [])])


# ---- a probe beside the loss


def timeline(probe: pa.Table, loss: pa.Table, catalogue: Catalogue, sites: Mapping[str, str], who: str) -> go.Figure:
    """Probe accuracy above, validation loss below, on one step axis.

    probe: run, step, feature, accuracy, chance (at each feature's own site, averaged over bits and positions); loss: run, step, loss.
    """
    data = columns(probe)
    features = sorted(set(data["feature"]))
    parts = {f: series(probe.filter(pa.array(data["feature"] == f)), "accuracy") for f in features}
    losses = series(loss, "loss")
    all_steps = [s for part in (*parts.values(), losses) for s, _ in part.values()]
    steps = np.unique(np.concatenate(all_steps)) if all_steps else np.array([1])
    figure = style.blank(
        500, _timeline_caption(parts, losses, sites, who), xaxis={**style.step_axis(steps), "anchor": "y2"},
        yaxis={"domain": [0.5, 1], "title": {"text": "probe accuracy"}},
        yaxis2={"domain": [0, 0.44], "title": {"text": "loss (nats)"}, "range": y_range(losses, catalogue, "loss")},
    )  # fmt: skip
    first = style.first_step(steps)
    for i, feature in enumerate(features):
        colour = style.NAMED[i % len(style.NAMED)]
        figure.add_traces(_draw_set(parts[feature], style.text(feature, 24), colour, first))
        chance = data["chance"][data["feature"] == feature].astype(float)
        if not np.isnan(chance).all():
            style.draw_level(figure, float(np.nanmean(chance)), colour)
    figure.add_traces(_draw_set(losses, "validation loss", style.GREY, first, "y2"))
    style.draw_levels(figure, style.level_lines(catalogue, list(losses)), "y2")
    return figure


def _draw_set(data: Series, name: str, colour: str, first: float, axis: str = "y") -> list[go.Scatter]:
    made = band(list(data.values()))
    return [] if made is None else draw_band(made, colour, name, first, axis)


def _timeline_caption(parts: Mapping[str, Series], losses: Series, sites: Mapping[str, str], who: str) -> str:
    n = max((len(p) for p in parts.values()), default=0)
    where = ", ".join(f"{f} at {s}" for f, s in sites.items() if f in parts)
    several = "Lines are medians over runs, bands the 10 to 90 % range. " if n > 1 else ""
    return (
        f"Runs: {who}. Above: held-out accuracy of a linear probe, mean over bits and positions, at the site where it ends highest "
        f"({where}; chosen on these same rows, so slightly optimistic). Dotted: chance, the share of the majority label. "
        "Below: validation loss, nats per scored token. "
        f"{several}n = {n} probed runs, {len(losses)} with a loss."
    )
