"""Effects over runs: how long before the loss a feature is there, and what removing it does."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from elegans.figures import queries, style
from elegans.figures.catalogue import COVERAGE, Catalogue, Tables, columns, number
from elegans.figures.curves import MANY
from elegans.instruments.crossings import ANYWHERE, SHARE, interval

MOST_ROWS = 40  # of a forest plot
GOLDEN = 0.618033988749895  # its multiples spread evenly: a jitter without chance
CONTROLS = {
    "random": "random direction removed",
    "matched": "random step of equal length",
    "labels": "direction of random labels",
}
EFFECTS = {"exact_match": "exact match", "loss": "test loss (nats per scored token)"}


def jitter(count: int, half: float) -> np.ndarray:
    """Offsets between -half and half, the same at every call."""
    return half * (2 * ((np.arange(count) + 0.5) * GOLDEN % 1) - 1)


def plural(count: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# ---- lead


@dataclasses.dataclass(frozen=True)
class Lead:
    """A row of the forest plot: one group and feature, in decades of optimiser steps (log10)."""

    group: str
    feature: str
    runs: int
    of: int
    mean: float | None
    low: float | None
    high: float | None
    verdict: str
    each: np.ndarray  # the leads of the group's runs
    loudness: str = ""  # quiet, loud or undecided, by half-way and change points alike; empty where it was not asked
    missing: str = "not measured"  # why there is no mean
    ahead: int = 0  # runs that the mean leaves out, since the loss never fell, or the feature was readable before training
    behind: int = 0  # since the feature never became readable

    @property
    def name(self) -> str:
        return f"{self.feature}, {self.group}" if "=" in self.group else self.feature

    @property
    def said(self) -> str:
        """Its verdict by half-way points, and that by change points, too, where there is one."""
        return f"{self.verdict}, {self.loudness}" if self.loudness in ("quiet", "loud") else self.verdict


def leads_of(tables: Tables) -> list[Lead]:
    """The rows of the table `lead`; none where there is no such table, and no runs' own leads where there is no `transition`."""
    none = "select '' as \"group\", '' as feature, null as lead where false"
    each = tables.ask(queries.TRANSITION if "transition" in tables.names else none)
    return leads(tables.ask(queries.LEAD), each) if "lead" in tables.names else []


def leads(rows: pa.Table, each: pa.Table) -> list[Lead]:
    """Rows of the table `lead` of groups that are shown, each with its runs' own leads (rows of `transition`: group, feature, lead)."""
    shown = set(each["group"].to_pylist())
    own: dict[tuple[str, str], list[float]] = {}
    for row in each.to_pylist():
        if (value := number(row["lead"])) is not None:
            own.setdefault((row["group"], row["feature"]), []).append(value)
    found = []
    for row in (row for row in rows.to_pylist() if not shown or row["group"] in shown):
        single = np.array(own.get((row["group"], row["feature"]), []), float)
        mean, low, high = (number(row[name]) for name in ("mean", "low", "high"))
        counts = int(row["runs"] or 0), int(row["of"] or 0)
        verdict = row["verdict"] or "undecided"
        said = row.get("loudness") or "", row.get("missing") or Lead.missing
        left_out = int(row.get("ahead") or 0), int(row.get("behind") or 0)
        found.append(Lead(row["group"] or "", row["feature"], *counts, mean, low, high, verdict, single, *said, *left_out))
    return sorted(found, key=lambda lead: lead.feature)


def fields_first(catalogue: Catalogue, tables: Tables) -> list[str]:
    """Differing fields, those that the groups of the table `lead` name before the others."""
    groups = tables.ask(queries.LEAD)["group"].to_pylist() if "lead" in tables.names else []
    named = {item.split("=")[0].strip() for group in groups for item in (group or "").split(",")}
    return sorted(catalogue.differing, key=lambda name: name not in named and catalogue.short(name) not in named)


def lead_forest(found: list[Lead]) -> go.Figure:
    """A dot for each run, the mean of each group with its 95 % interval, and the line of no lead."""
    shown = found[:MOST_ROWS]
    names = dict.fromkeys(lead.feature for lead in shown)
    colour = {feature: style.NAMED[i % len(style.NAMED)] for i, feature in enumerate(names)}
    ticks = row_axis([lead.name for lead in shown])
    figure = style.blank(
        int(110 + 44 * max(len(shown), 2)), lead_caption(found, len(shown)), yaxis=ticks, showlegend=False, margin={"r": 190},
        xaxis={"title": {"text": "lead: log10(step of the loss / step of the feature), decades"}},
    )  # fmt: skip
    figure.add_shape(type="line", x0=0, x1=0, yref="paper", y0=0, y1=1, line={"width": 1.5, "color": style.GREY})
    for i, lead in enumerate(shown):
        _draw_lead(figure, lead, i, colour[lead.feature])
    return figure


def row_axis(names: list[str]) -> dict[str, Any]:
    """A row for each name, the first on top."""
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": [style.text(name, 44) for name in names]}
    return {**ticks, "range": [len(names) - 0.4, -0.6], "showgrid": False}


def _draw_lead(figure: go.Figure, lead: Lead, place: int, colour: str) -> None:
    if len(lead.each):
        y = place + jitter(len(lead.each), 0.24)
        size, opacity = (6, 0.5) if len(lead.each) <= MANY else (4, 0.2)
        dots = {"size": size, "color": style.faint(colour, opacity)}
        figure.add_scatter(
            x=lead.each, y=y, mode="markers", marker=dots, hovertemplate="one run: %{x:.3f} decades<extra></extra>", name="runs"
        )
    if lead.mean is not None:
        hover = f"<b>{style.text(lead.name)}</b><br>{interval_text(lead)}<extra></extra>"
        _draw_mean(figure, lead.mean, lead.low, lead.high, place, colour, hover)
    note = f"{style.text(lead.missing if lead.mean is None else lead.said, 26)}, n = {lead.runs} of {lead.of}"
    figure.add_annotation(text=note, x=1.01, xref="paper", xanchor="left", y=place, showarrow=False)


def _draw_mean(figure: go.Figure, mean: float, low: float | None, high: float | None, place: int, colour: str, hover: str) -> None:
    """A diamond, with whiskers where there is an interval."""
    error = None
    if low is not None and high is not None:
        error = {"type": "data", "array": [high - mean], "arrayminus": [mean - low], "thickness": 2.4, "width": 7, "color": colour}
    marker = {"symbol": "diamond", "size": 12, "color": colour, "line": {"width": 1, "color": "white"}}
    figure.add_scatter(x=[mean], y=[place], error_x=error, mode="markers", marker=marker, hovertemplate=hover, name="mean")


def interval_text(lead: Lead) -> str:
    """The mean with its interval, or that there is none."""
    if lead.mean is None:
        return lead.missing
    bounds = "no interval" if lead.low is None or lead.high is None else f"[{lead.low:.2f}, {lead.high:.2f}]"
    return f"{lead.mean:.2f} {bounds}"


def lead_caption(found: list[Lead], shown: int) -> str:
    """What the forest plot shows."""
    cut = f" The first {shown} of {len(found)} rows are drawn." if shown < len(found) else ""
    return (
        "How long before the loss falls half-way from plateau to floor the probe is half-way from its untrained level to its end, "
        "in decades of optimiser steps (0.3 is a factor of two); right of zero, the feature came first. Dots: runs that reached both. "
        "Where it forgets, its best counts instead. Diamonds: means, with their 95 % interval over runs. n: runs that reached both, of all "
        "in the group. Verdicts are by half-way points, quiet or loud by these and change points alike; they also count runs in which "
        f"only one of the two came.{cut}"
    )


# ---- ablation


@dataclasses.dataclass(frozen=True)
class Strip:
    """A row of the ablation figure. `each` holds a value for each run, draws averaged; `draws` every single draw."""

    name: str
    feature: str  # and the method; both empty for the base
    method: str
    kind: str  # base, feature, or the control's direction
    each: np.ndarray
    draws: np.ndarray
    mean: float
    low: float | None  # 95 % t interval of the mean over runs; None for a single run
    high: float | None
    spread: tuple[float, float]  # the central 95 % of a run's own draws, averaged over runs

    @property
    def repeated(self) -> bool:
        """Whether a control was drawn several times in each run."""
        return self.kind in CONTROLS and len(self.draws) > len(self.each)


def strips(rows: pa.Table, value: str = "exact_match") -> list[Strip]:
    """Rows of the figure from: run, feature, method, direction, draw, and the value with its base_ column."""
    data = columns(rows)
    several = len(set(data["method"])) > 1
    made = [_strip("nothing removed", "", "", "base", data["run"], data[f"base_{value}"], value)]
    for feature, method in sorted(set(zip(data["feature"], data["method"], strict=True))):
        here = (data["feature"] == feature) & (data["method"] == method)
        tail = f" ({method})" if several else ""
        for direction in sorted(set(data["direction"][here]), key=_place):
            part = here & (data["direction"] == direction)
            name = f"{feature} removed{tail}" if direction == "feature" else f"{feature}: {CONTROLS.get(direction, direction)}{tail}"
            made.append(_strip(name, feature, method, direction, data["run"][part], data[value][part], value))
    return [strip for strip in made if strip is not None]


def _place(direction: str) -> tuple[int, str]:
    """The feature's own direction first, then the controls."""
    order = ["feature", *CONTROLS]
    return order.index(direction) if direction in order else len(order), direction


def _strip(name: str, feature: str, method: str, kind: str, run: np.ndarray, values: np.ndarray, value: str) -> Strip | None:
    values = values.astype(float)
    run, values = run[~np.isnan(values)], values[~np.isnan(values)]
    if not len(values):
        return None
    place = np.unique(run.astype(str), return_inverse=True)[1]
    each = np.bincount(place, values) / np.bincount(place)
    mean, low, high = interval(each, COVERAGE, fewest=2, within=SHARE if value == "exact_match" else ANYWHERE)
    spread = np.mean([np.quantile(values[place == i], (0.025, 0.975)) for i in range(len(each))], axis=0)
    return Strip(name, feature, method, kind, each, values, mean, low, high, (float(spread[0]), float(spread[1])))


def ablation(rows: pa.Table, value: str = "exact_match", who: str = "measured") -> go.Figure:
    """Exact match (or loss) with nothing removed, with the feature's direction removed, and with random directions removed.

    `who` says in the caption which runs the rows are of.
    """
    made = strips(rows, value)
    across = {"title": {"text": EFFECTS[value]}, **({"range": [-0.02, 1.02]} if value == "exact_match" else {"rangemode": "tozero"})}
    height = int(110 + 46 * max(len(made), 2))
    figure = style.blank(height, ablation_caption(made, value, who), xaxis=across, yaxis=row_axis([s.name for s in made]), showlegend=False)
    for place, strip in enumerate(made):
        _draw_strip(figure, strip, place)
    return figure


def strip_colour(kind: str) -> str:
    """Grey for the base, one colour for the feature, another for every comparison."""
    return {"base": style.GREY, "feature": style.RED}.get(kind, style.BLUE)


def _draw_strip(figure: go.Figure, strip: Strip, place: int) -> None:
    colour = strip_colour(strip.kind)
    if strip.repeated:
        low, high = strip.spread
        hover = f"95 % of a run's own draws: {low:.3f} to {high:.3f}<extra></extra>"
        bar: dict[str, Any] = {"color": style.faint(colour, 0.3), "width": 14}
        figure.add_scatter(x=[low, high], y=[place, place], mode="lines", line=bar, hovertemplate=hover, name="draws")
    if len(strip.each) <= MANY:
        dots = {"size": 6, "color": style.faint(colour, 0.55)}
        y = place + jitter(len(strip.each), 0.24)
        figure.add_scatter(x=strip.each, y=y, mode="markers", marker=dots, hovertemplate="one run: %{x:.3f}<extra></extra>", name="runs")
    bounds = "" if strip.low is None else f" [{strip.low:.3f}, {strip.high:.3f}]"
    hover = f"<b>{style.text(strip.name)}</b><br>mean {strip.mean:.3f}{bounds}, n = {plural(len(strip.each), 'run')}<extra></extra>"
    _draw_mean(figure, strip.mean, strip.low, strip.high, place, colour, hover)


def ablation_caption(made: list[Strip], value: str, who: str) -> str:
    """What the figure of ablations shows."""
    runs = max((len(strip.each) for strip in made), default=0)
    draws = max((len(strip.draws) for strip in made if strip.repeated), default=0)
    many = f" {runs} runs are too many for dots." if runs > MANY else " Dots: runs, draws averaged within each."
    cut = " (cut at 0 and 1)" if value == "exact_match" else ""
    what = "Exact match on test rows" if value == "exact_match" else "Test loss, nats per scored token,"
    return (
        f"{what} when a direction is projected out of the network, at the last step measured. Diamonds: means over the runs {who}, "
        f"with their 95 % t interval{cut}; n = {plural(runs, 'run')}.{many} Pale bars: the central 95 % of a run's own draws of "
        f"a control, averaged over runs ({plural(draws, 'draw')} in all), to which the feature's own direction is to be compared."
    )
