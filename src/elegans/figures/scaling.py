"""The best loss of a grid against training FLOPs, a panel for each task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from elegans.figures import queries, style
from elegans.figures.catalogue import Tables, columns, number

ACROSS, HIGH, GAP = 3, 230, 96  # most panels in a row, pixels of a panel, pixels between rows
VALUES = {"loss": ("loss", "low", "high"), "exact_match": ("exact_match", "exact_low", "exact_high")}
NAMES = {"loss": "test loss (nats)", "exact_match": "test exact match"}


@dataclasses.dataclass(frozen=True)
class Scaled:
    """One task: at every budget the mean of the best configuration, and the t interval over its seeds (NaN: fewer than three)."""

    task: str
    flops: np.ndarray
    values: dict[str, list[np.ndarray]]  # of `VALUES`: mean, lower and upper bound
    seeds: np.ndarray
    configuration: np.ndarray
    floor: float | None
    plateau: float | None
    half: tuple[float | None, float | None, float | None]  # FLOPs half-way from plateau to floor, its bounds


def scaled(rows: pa.Table, fits: pa.Table) -> list[Scaled]:
    """Rows of the tables `scaling` and `scaling_fit`, by task."""
    data = columns(rows)
    halves = {r["task"]: (number(r["value"]), number(r["low"]), number(r["high"])) for r in fits.to_pylist() if r["quantity"] == "half"}
    nothing = np.full(len(rows), np.nan)
    made = []
    for task in sorted(set(data["task"])):
        here = data["task"] == task
        values = {k: [np.asarray(data.get(n, nothing)[here], float) for n in names] for k, names in VALUES.items()}
        bounds = (number(data["floor"][here][0]), number(data["plateau"][here][0]))
        of = (data["flops"][here].astype(float), values, data["seeds"][here], data["configuration"][here])
        made.append(Scaled(task, *of, *bounds, halves.get(task, (None, None, None))))
    return made


def grid_of(tables: Tables) -> list[Scaled]:
    """The tasks of the table `scaling`; none where there is no such table."""
    if "scaling" not in tables.names:
        return []
    fits = queries.SCALING_FIT if "scaling_fit" in tables.names else "select '' as task, '' as quantity where false"
    return scaled(tables.ask(queries.SCALING), tables.ask(fits))


def scaling(found: Sequence[Scaled], value: str = "loss") -> go.Figure:
    """A panel for each task: means, intervals, floor and plateau, and the budgets between which the loss is half-way."""
    across = min(len(found), ACROSS)
    inner = 24 + -(-len(found) // across) * (HIGH + GAP) - GAP  # pixels within the template's margins
    figure = style.blank(inner + 80, _caption(found, value), showlegend=False)
    for i, task in enumerate(found):
        _panel(figure, task, value, i, across, inner)
    return figure


def _panel(figure: go.Figure, task: Scaled, value: str, i: int, across: int, inner: int) -> None:
    axis, (line, place) = "" if i == 0 else str(i + 1), divmod(i, across)
    x0, top = place / across, 1 - (line * (HIGH + GAP) + 24) / inner
    x = {"type": "log", "domain": [x0, x0 + 1 / across - 0.07], "anchor": f"y{axis}", "title": {"text": "training FLOPs"}, "dtick": 1}
    y = {"domain": [max(0, top - HIGH / inner), top], "anchor": f"x{axis}", "title": {"text": NAMES[value] if place == 0 else ""}}
    figure.update_layout({f"xaxis{axis}": x | {"exponentformat": "power"}, f"yaxis{axis}": y | _range(task, value)})
    title = f"<b>{style.text(task.task.replace('_', ' '), 30)}</b>"
    figure.add_annotation(text=title, x=x0, xref="paper", xanchor="left", y=top, yref="paper", yanchor="bottom")
    mean, low, high = task.values[value]
    known = np.isfinite(low) & np.isfinite(high)
    error = {"type": "data", "array": np.where(known, high - mean, 0), "arrayminus": np.where(known, mean - low, 0), "thickness": 1.6}
    notes = np.column_stack([task.seeds, task.configuration])
    hover = "%{x:.3g} FLOPs: %{y:.4f}<br>%{customdata[1]}, n = %{customdata[0]} seeds<extra></extra>"
    place_of = {"x": task.flops, "y": mean, "customdata": notes, "xaxis": f"x{axis}", "yaxis": f"y{axis}"}
    look: dict[str, Any] = {"mode": "lines+markers", "line": {"color": style.BLUE}, "error_y": error | {"color": style.BLUE}}
    figure.add_trace(go.Scatter(**place_of, **look, hovertemplate=hover, name=task.task))
    _mark(figure, task, value, axis)


def _mark(figure: go.Figure, task: Scaled, value: str, axis: str) -> None:
    """Floor and plateau of the loss, and the interval of the half-way point."""
    for level in (task.floor, task.plateau) if value == "loss" else ():
        if level is not None:
            line = {"width": 1.2, "dash": "dot", "color": style.GREY}
            figure.add_shape(type="line", xref=f"x{axis} domain", x0=0, x1=1, yref=f"y{axis}", y0=level, y1=level, line=line)
    _, low, high = task.half
    if low is not None or high is not None:
        band = {"fillcolor": style.faint(style.RED, 0.13), "line": {"width": 0}, "layer": "below"}
        start, end = (float(e) if x is None else x for x, e in ((low, task.flops.min()), (high, task.flops.max())))
        figure.add_shape(type="rect", xref=f"x{axis}", x0=start, x1=end, yref=f"y{axis} domain", y0=0, y1=1, **band)


def _range(task: Scaled, value: str) -> dict[str, Any]:
    return {"range": loss_range(task) if value == "loss" else [-0.03, 1.03]}


def loss_range(task: Scaled) -> list[float]:
    """From a little below 0 to a little above plateau and means; whiskers beyond are cut."""
    top = 1.15 * max(float(np.nanmax(task.values["loss"][0])), task.plateau or 0.0)
    return [-0.04 * top, top]


def _caption(found: Sequence[Scaled], value: str) -> str:
    what = "Test loss, nats per scored token" if value == "loss" else "Test exact match"
    seeds = sorted({int(n) for task in found for n in task.seeds})
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    none = sorted(t.task for t in found if t.half[0] is None)
    missing = f" No half-way point within the budgets: {', '.join(none)}." if none and value == "loss" else ""
    return (
        f"{what}, of the configuration with the lowest validation loss at each training budget. Whiskers: 95 % t interval over seeds "
        f"(n = {n}; none for fewer than three). Dotted: floor and plateau. Shaded: where the loss is half-way from plateau to floor, "
        f"known no closer than the two budgets around it.{missing}"
    )
