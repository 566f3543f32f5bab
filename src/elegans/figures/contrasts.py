"""By how much a transition comes later in one group of runs than in another: the rows of the table `contrast`, and their forest plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from elegans.figures import queries, style
from elegans.figures.catalogue import Tables
from elegans.figures.effects import MOST_ROWS, row_axis

Pair = Mapping[str, Any]  # a row of the table
POINTS = (("half", "half-way point", "diamond", -0.14), ("change", "change point", "square", 0.14))  # column, words, marker, place in a row
AXIS = "later by (decades of steps): half-way point (diamond), change point (square)"


def contrasts_of(tables: Tables) -> list[dict[str, Any]]:
    """The rows of the table `contrast` of which some run got there, of groups that are shown; none where there is no such table."""
    shown = set(tables.ask(queries.TRANSITION)["group"].to_pylist()) if "transition" in tables.names else set()
    rows = tables.ask(queries.CONTRAST).to_pylist() if "contrast" in tables.names else []
    return [row for row in rows if not shown or {row["group"], row["other"]} <= shown]


def counts(pair: Pair) -> str:
    """How many runs of either group got there."""
    return f"{pair['runs']}/{pair['of']} and {pair['other_runs']}/{pair['other_of']}"


def shift_text(pair: Pair, name: str) -> str:
    """A shift with its interval, whose ends may be open."""
    middle, low, high = (pair[f"{name}{end}"] for end in ("", "_low", "_high"))
    said = "beyond what was recorded" if middle is None else f"{middle:.2f}"
    return f"{said} [{'−∞' if low is None else f'{low:.2f}'}, {'∞' if high is None else f'{high:.2f}'}]".replace("-", "−")


def contrast_forest(pairs: Sequence[Pair]) -> go.Figure:
    """Half-way and change points with their intervals, a row for each curve and pair of groups."""
    rows = pairs[:MOST_ROWS]
    ends = [x for row in rows for name, *_ in POINTS for x in (row[name], row[f"{name}_low"], row[f"{name}_high"]) if x is not None]
    reach = 1.1 * max(map(abs, ends), default=1.0)
    figure = style.blank(
        int(120 + 60 * max(len(rows), 2)), contrast_caption(pairs), showlegend=False, margin={"r": 210},
        yaxis={**row_axis([""] * len(rows)), "ticktext": [_label(row) for row in rows]},
        xaxis={"title": {"text": AXIS}, "range": [-reach, reach]},
    )  # fmt: skip
    figure.add_shape(type="line", x0=0, x1=0, yref="paper", y0=0, y1=1, line={"width": 1.5, "color": style.GREY})
    for place, row in enumerate(rows):
        for name, words, symbol, offset in POINTS:
            _draw_shift(figure, row, name, words, symbol, place + offset, reach)
        note = f"{style.text(row['verdict'], 14)}, {counts(row)}"
        figure.add_annotation(text=note, x=1.01, xref="paper", xanchor="left", y=place, showarrow=False)
    return figure


def _label(row: Pair) -> str:
    """The name of a row, in two lines."""
    return f"{style.text(row['curve'] + ': ' + row['group'], 44)}<br>vs {style.text(row['other'], 41)}"


def _draw_shift(figure: go.Figure, row: Pair, name: str, words: str, symbol: str, place: float, reach: float) -> None:
    """A marker with whiskers; to the edge, with an arrow's head, where an end is open."""
    middle, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if middle is None and low is None and high is None:
        return
    edge = 0.98 * reach  # so that the head of an arrow is whole
    ends, heads = [-edge if low is None else low, edge if high is None else high], [low is None, high is None]
    hover = f"<b>{words}</b><br>{shift_text(row, name)} decades<extra></extra>"
    marks = [f"triangle-{side}" if head else "line-ns-open" for side, head in zip(("left", "right"), heads, strict=True)]
    figure.add_scatter(
        x=ends, y=[place] * 2, mode="lines+markers", line={"width": 2.4, "color": style.BLUE}, hovertemplate=hover, name=words,
        marker={"symbol": marks, "size": 9, "color": style.BLUE, "line": {"width": 2, "color": style.BLUE}},
    )  # fmt: skip
    if middle is not None:
        marker = {"symbol": symbol, "size": 10, "color": style.BLUE, "line": {"width": 1, "color": "white"}}
        figure.add_scatter(x=[middle], y=[place], mode="markers", marker=marker, hovertemplate=hover, name=words)


def contrast_caption(pairs: Sequence[Pair]) -> str:
    """What the forest plot shows."""
    cut = f" The first {MOST_ROWS} of {len(pairs)} rows are drawn." if len(pairs) > MOST_ROWS else ""
    return (
        "By how many decades of optimiser steps a transition comes later in one group of runs than in another that differs in one field "
        "(0.3 is a factor of two; left of zero it comes earlier). Diamonds: half-way points; squares: change points; each the median of "
        "all differences between a run of one and a run of the other (Hodges and Lehmann), with its 95 % interval. Runs that did not get "
        "there count as later than the end of their record; an arrow is an end that the data do not bound. Numbers: runs that got there, "
        f"of all in each group. A verdict is given where both intervals say so. Pairs of which no run got there are left out.{cut}"
    )
