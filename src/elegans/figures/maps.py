"""Heat maps: the loss at every position, and what a probe reads at every site."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa

from elegans.figures import style
from elegans.figures.catalogue import columns

FAMILIES = ("embed", "attn_out", "resid_mid", "mlp_out", "resid")  # the order within a layer
MAPS = 5  # steps shown side by side
ACROSS = {"showgrid": False, "title": {"text": "bit", "standoff": 4}, "nticks": 4, "tickangle": 0}  # the axis of bits
MOST_SITES = 26  # more are cut down to the residual stream


# ---- loss by position


def position_map(rows: pa.Table, who: str) -> go.Figure:
    """Mean loss at every position and step; rows: step, position, loss, runs."""
    data = columns(rows)
    steps, positions = np.unique(data["step"]), np.unique(data["position"])
    z = grid(data["loss"], data["position"], data["step"], positions, steps)
    n = grid(data["runs"], data["position"], data["step"], positions, steps)
    kept = np.flatnonzero(~np.isnan(z).all(1))
    span = slice(kept[0], kept[-1] + 1) if len(kept) else slice(0, 0)
    places = sparse(steps)
    ticks = {"tickmode": "array", "tickvals": places, "ticktext": [style.compact(int(steps[i])) for i in places]}
    figure = style.blank(
        int(150 + 14 * min(max(len(positions[span]), 8), 40)), _position_caption(who, n), plot_bgcolor=style.MISSING,
        xaxis={**ticks, "title": {"text": "optimiser step"}, "showgrid": False},
        yaxis={"autorange": "reversed", "title": {"text": "token position"}, "showgrid": False},
    )  # fmt: skip
    hover = "position %{y}, step %{customdata[0]}<br>loss %{z:.4f} nats<br>n = %{customdata[1]} runs<extra></extra>"
    notes = np.dstack([np.broadcast_to(steps, z.shape), n])[span]
    look = {"zmin": 0, "colorscale": style.SCALE, "colorbar": bar("nats"), "hovertemplate": hover, "hoverongaps": False}
    figure.add_heatmap(z=z[span], x=np.arange(len(steps)), y=positions[span], customdata=notes, **look)
    return figure


def bar(title: str) -> dict[str, Any]:
    """A slim colour bar."""
    return {"title": {"text": title, "side": "top", "font": {"size": 13}}, "thickness": 12, "outlinewidth": 0}


def grid(values: np.ndarray, row: np.ndarray, column: np.ndarray, rows: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Values on a grid, NaN where there is none."""
    z = np.full((len(rows), len(across)), np.nan)
    z[np.searchsorted(rows, row), np.searchsorted(across, column)] = values
    return z


def sparse(steps: np.ndarray) -> list[int]:
    """Indices of the steps that get a label: 0, those nearest to powers of ten, the last."""
    if not len(steps):
        return []
    powers = 10.0 ** np.arange(0, np.log10(max(steps.max(), 1)) + 1e-9)
    near = [int(np.abs(np.log(np.maximum(steps, 0.1) / p)).argmin()) for p in powers]
    chosen = sorted({0, *near, len(steps) - 1})
    crowded = max(1, len(steps) // 14)  # labels closer than this would touch
    kept = [0]
    for i in chosen[1:]:
        if i == len(steps) - 1 and i - kept[-1] < crowded and len(kept) > 1:
            kept[-1] = i
        elif i - kept[-1] >= crowded or i == len(steps) - 1:
            kept.append(i)
    return kept


def _position_caption(who: str, n: np.ndarray) -> str:
    counts = n[~np.isnan(n)]
    runs = f"n = {int(counts.max())}" if len(counts) else "n = 0"
    return (
        f"Runs: {who}. Mean validation loss at each token position against the optimiser step, nats; {runs}. "
        "The step axis has one column for each evaluation, so it is logarithmic where evaluations are. Grey: not measured, or never scored."
    )


# ---- probes


@dataclasses.dataclass(frozen=True)
class ProbeMaps:
    """Panels of one feature on one scale: a few steps, then what they are to be compared with. Each is [site, index]."""

    sites: list[str]
    index: np.ndarray
    panels: list[tuple[str, np.ndarray]]
    low: float  # of the colour scale; the high end is 1
    runs: int


def probe_maps(rows: pa.Table) -> ProbeMaps:
    """Panels from rows: step, site, family, layer, index, accuracy, control, chance, untrained, runs."""
    data = columns(rows)
    sites, index = _sites(data), np.unique(data["index"])
    place = {site: i for i, site in enumerate(sites)}
    kept = np.array([s in place for s in data["site"]], bool)
    data = {name: values[kept] for name, values in data.items()}
    at = np.array([place[s] for s in data["site"]], int)

    def panel(name: str, step: int) -> np.ndarray:
        here = data["step"] == step
        return grid(data[name][here].astype(float), at[here], data["index"][here], np.arange(len(sites)), index)

    steps = _covered(data)
    untrained = panel("untrained", steps[-1])
    if np.isnan(untrained).all() and steps[0] == 0:
        untrained = panel("accuracy", 0)
    panels = [(f"step {style.compact(s)}", panel("accuracy", s)) for s in pick(steps)]
    panels += [("untrained", untrained), ("random labels", panel("control", steps[-1])), ("chance", panel("chance", steps[-1]))]
    chance = data["chance"][~np.isnan(data["chance"].astype(float))]
    low = float(np.floor(10 * chance.min() + 1e-6) / 10) if len(chance) else 0.0
    return ProbeMaps(sites, index, panels, low, int(data["runs"].max()))


def _sites(data: dict[str, np.ndarray]) -> list[str]:
    """Sites from the input upwards; of too many, those of the residual stream."""
    known = {
        s: (n, FAMILIES.index(f) if f in FAMILIES else len(FAMILIES), s)
        for s, f, n in zip(data["site"], data["family"], data["layer"], strict=True)
    }
    families = dict(zip(data["site"], data["family"], strict=True))
    sites = sorted(known, key=lambda s: known[s])
    stream = [s for s in sites if families[s] in ("embed", "resid")]
    return stream if len(sites) > MOST_SITES and stream else sites


def _covered(data: dict[str, np.ndarray]) -> list[int]:
    """Steps at which at least half as many runs were probed as at the best covered one."""
    steps = np.unique(data["step"])
    most = np.array([data["runs"][data["step"] == s].max() for s in steps])
    return [int(s) for s in steps[2 * most >= most.max()]]


def pick(steps: list[int]) -> list[int]:
    """A few steps, evenly spaced among those after 0, the last among them."""
    trained = [s for s in steps if s > 0] or steps
    return [trained[i] for i in sorted({round(x) for x in np.linspace(0, len(trained) - 1, min(MAPS, len(trained)))})]


def probe_map(rows: pa.Table, feature: str, who: str) -> go.Figure:
    """What a linear probe reads: site by bit, at a few steps, beside the untrained network, random labels and chance."""
    maps = probe_maps(rows)
    gap = 0.012
    width = (1 - gap * (len(maps.panels) - 1)) / len(maps.panels)
    layout: dict[str, Any] = {"annotations": [], "margin": {"t": 40}, "plot_bgcolor": style.MISSING}
    traces = []
    for i, (name, z) in enumerate(maps.panels):
        left, axis = i * (width + gap), str(i + 1) if i else ""
        layout[f"xaxis{axis}"] = {"domain": [left, min(left + width, 1)], "anchor": f"y{axis}", **ACROSS}
        layout[f"yaxis{axis}"] = {"anchor": f"x{axis}", "type": "category", "showgrid": False, "showticklabels": i == 0}
        place = {"xref": "paper", "yref": "paper", "x": left + width / 2, "xanchor": "center", "showarrow": False}
        layout["annotations"].append({**place, "text": name, "y": 1, "yanchor": "bottom"})
        if np.isnan(z).all():
            layout["annotations"].append({**place, "text": "not<br>measured", "y": 0.5})
        hover = f"{name}<br>%{{y}}, bit %{{x}}<br>accuracy %{{z:.3f}}<extra></extra>"
        heat = {"z": z.astype(np.float32), "x": maps.index, "y": maps.sites, "xaxis": f"x{axis}", "yaxis": f"y{axis}", "name": name}
        traces.append(go.Heatmap(**heat, coloraxis="coloraxis", hoverongaps=False, hovertemplate=hover))
    layout["coloraxis"] = {"colorscale": style.SCALE, "cmin": maps.low, "cmax": 1, "colorbar": bar("accuracy")}
    figure = style.blank(int(150 + max(15 * len(maps.sites), 90)), probe_caption(feature, f"{who}, n = {maps.runs}"), **layout)
    return figure.add_traces(traces)


def probe_caption(feature: str, who: str) -> str:
    """What a map of probes shows, and of which runs."""
    return (
        f"Runs: {who}. {feature}: held-out accuracy of a linear probe for each bit (across) at each site (upwards from the input), "
        f"mean over runs. On the same scale: the same probe on the untrained network, a probe trained on random labels, "
        f"and chance (always guessing the majority label), the last two at the last step. Grey: not measured."
    )
