"""Where heads look: attention maps with their tokens, and scores against named patterns while a network trains."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from elegans.figures import style
from elegans.figures.catalogue import columns
from elegans.figures.curves import band, draw_band, series
from elegans.figures.maps import MAPS, bar, grid, pick

STRIPS = 6  # heads shown at several steps; more are shown at the last one
LABEL = 13  # pixels that a token's label needs
SCORES = {
    "peakiness": "share of (row, query) where the pattern's key gets more than half of the attention",
    "attention": "mean attention that the pattern's key gets",
    "invariance": "1 - standard deviation over rows of the attention that the pattern's key gets, mean over queries",
}


# ---- maps


@dataclasses.dataclass(frozen=True)
class AttentionGrid:
    """Maps [query, key] of one run on one scale: a row for every head and a column for every step, or layers by heads at the last."""

    rows: list[str]
    columns: list[str]
    maps: list[list[np.ndarray]]
    labels: list[str]  # of the tokens
    across: str  # what columns are

    def ticks(self, most: int) -> list[int]:
        """Tokens that get a label: at most so many, evenly spaced."""
        return list(range(0, len(self.labels), -(-len(self.labels) // max(most, 1))))


def attention_grid(rows: pa.Table) -> AttentionGrid:
    """Maps from the rows of one run: step, layer, head, query, key, query_label, key_label, attention."""
    data = columns(rows)
    names = dict(zip(data["query"], data["query_label"], strict=True))
    positions = np.array(sorted(names))
    heads = sorted(set(zip(data["layer"].tolist(), data["head"].tolist(), strict=True)))
    known = sorted(set(data["step"].tolist()))
    steps = sorted({0, *pick(known)[1 - MAPS :]}) if known[0] == 0 else pick(known)

    def drawn(step: int, layer: int, head: int) -> np.ndarray:
        here = (data["step"] == step) & (data["layer"] == layer) & (data["head"] == head)
        return grid(data["attention"][here].astype(float), data["query"][here], data["key"][here], positions, positions)

    labels = [style.text(names[p], 8) for p in positions]
    if len(heads) <= STRIPS and len(steps) > 1:
        maps = [[drawn(s, *head) for s in steps] for head in heads]
        return AttentionGrid([f"layer {i}, head {h}" for i, h in heads], [f"step {style.compact(s)}" for s in steps], maps, labels, "step")
    layers, numbers = (sorted({head[i] for head in heads}) for i in (0, 1))
    maps = [[drawn(steps[-1], i, h) for h in numbers] for i in layers]
    return AttentionGrid([f"layer {i}" for i in layers], [f"head {h}" for h in numbers], maps, labels, "head")


def attention_map(rows: pa.Table, who: str) -> go.Figure:
    """Attention of every head of one run, queries downwards and keys across, with the tokens that stand there."""
    made = attention_grid(rows)
    down, across = len(made.rows), len(made.columns)
    gap, side = (0.02, 0.10 / down), max(150, min(260, 900 // across))
    width, height = (1 - gap[0] * (across - 1)) / max(across, 3), (1 - gap[1] * (down - 1)) / down  # about square, also if few
    places = made.ticks(side // LABEL)
    ticks = {"tickmode": "array", "tickvals": places, "ticktext": [made.labels[i] for i in places]}
    axis = {"showgrid": False, "tickfont": {"size": 10}, "ticklen": 2, **ticks}
    layout: dict[str, Any] = {"annotations": [], "margin": {"t": 40}, "plot_bgcolor": style.MISSING}
    traces = []
    for i, j in np.ndindex(down, across):
        name, left, top = str(i * across + j + 1), j * (width + gap[0]), 1 - i * (height + gap[1])
        x, y = (f"{a}{name if name != '1' else ''}" for a in "xy")
        title = {"title": {"text": made.rows[i], "standoff": 4}} if j == 0 else {}
        layout[f"xaxis{x[1:]}"] = {
            "domain": [left, min(left + width, 1)],
            "anchor": y,
            "showticklabels": i == down - 1,
            "tickangle": -90,
            **axis,
        }
        layout[f"yaxis{y[1:]}"] = {
            "domain": [max(top - height, 0), top], "anchor": x, "showticklabels": j == 0, "autorange": "reversed", **axis, **title
        }  # fmt: skip
        if i == 0:
            place = {"xref": "paper", "yref": "paper", "x": left + width / 2, "xanchor": "center", "y": 1, "yanchor": "bottom"}
            layout["annotations"].append({**place, "text": made.columns[j], "showarrow": False})
        hover = f"{made.rows[i]}, {made.columns[j]}<br>position %{{y}} to %{{x}}: %{{z:.3f}}<extra></extra>"
        heat = {"z": made.maps[i][j].astype(np.float32), "xaxis": x, "yaxis": y, "name": f"{made.rows[i]}, {made.columns[j]}"}
        traces.append(go.Heatmap(**heat, coloraxis="coloraxis", hoverongaps=False, hovertemplate=hover))
    layout["coloraxis"] = {"colorscale": style.SCALE, "cmin": 0, "cmax": 1, "colorbar": bar("attention")}
    return style.blank(110 + down * side, map_caption(rows, made, who), **layout).add_traces(traces)


def map_caption(rows: pa.Table, made: AttentionGrid, who: str) -> str:
    """What the maps of one run's heads show."""
    length = next((n for n in rows["length"].to_pylist() if n is not None), None) if "length" in rows.column_names else None
    of = f"rows with {length} inputs" if length is not None else "rows"
    when = "at several steps" if made.across == "step" else "at the last step measured"
    return (
        f"Runs: {who}. Attention of each head {when}, mean over {of}: each query (downwards) divides an attention of 1 "
        "among the tokens up to itself (across). Grey: what it cannot see. Tokens that differ between rows are named x1, x2, ... "
        "(inputs), s1, s2, ... (states), or #0, #1, ... by position."
    )


# ---- scores


def circuit_curves(rows: pa.Table, pattern: str, score: str, who: str) -> go.Figure:
    """A score of every head against one pattern; rows: run, step, layer, head, chance and the score."""
    data = columns(rows)
    heads = sorted(set(zip(data["layer"].tolist(), data["head"].tolist(), strict=True)))
    figure = style.blank(
        380, _circuit_caption(rows, pattern, score, who), xaxis=style.step_axis(np.unique(data["step"])),
        yaxis={"title": {"text": score}, "range": [-0.02, 1.03]}, showlegend=True,
    )  # fmt: skip
    steps = np.unique(data["step"])
    first = style.first_step(steps)
    for i, (layer, head) in enumerate(heads):
        here = pa.array((data["layer"] == layer) & (data["head"] == head))
        drawn = band(list(series(rows.filter(here), score).values()))
        if drawn is not None:
            figure.add_traces(draw_band(drawn, style.NAMED[i % len(style.NAMED)], f"layer {layer}, head {head}", first))
    if len(steps) == 1:  # a line of one point would not be seen
        figure.update_traces(mode="markers")
        figure.update_xaxes(tickvals=style.step_places(steps, first), ticktext=[style.compact(s) for s in steps.tolist()])
    if score == "attention":
        style.draw_levels(figure, [("chance", float(np.nanmean(data["chance"])), "uniform attention")])
    return figure


def _circuit_caption(rows: pa.Table, pattern: str, score: str, who: str) -> str:
    runs = len(set(rows["run"].to_pylist()))
    several = " Lines are medians over runs, bands the 10 to 90 % range." if runs > 1 else ""
    return (
        f"Runs: {who}. Pattern {pattern}: {SCORES[score]}, against the optimiser step (logarithmic; 0 is the untrained network), mean "
        f"over lengths of 4 inputs and more (all, where there are none).{several} n = {runs} runs."
    )
