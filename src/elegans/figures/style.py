"""How figures look: palettes that colour-blind readers can tell apart, a light and a dark template, axes."""

from __future__ import annotations

import functools
import html
from collections.abc import Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
import plotly.graph_objects as go

from elegans.figures.catalogue import Catalogue, Grouping, shown

NAMED = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6D31",
    "#7F7F7F",
)  # Okabe and Ito 2008, less black and yellow
GREY, BLUE, RED = "#8A8F98", NAMED[0], NAMED[1]
SCALE = "Viridis"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MISSING = "rgba(128,128,128,0.22)"  # behind heat maps, so that a cell without a value shows as none
MOST_LEVELS = 3


def palette(grouping: Grouping) -> dict[str, str]:
    """A colour for every label: viridis without its ends, the dark one lifted, for sizes, Okabe and Ito for names."""
    count = len(grouping.labels)
    if count == 1:
        return {grouping.labels[0]: BLUE}
    if grouping.ordered:
        places = np.linspace(0, 1, count)
        shades = matplotlib.colormaps["viridis"](0.15 + 0.66 * places)[:, :3]
        shades += (1 - shades) * 0.28 * (1 - places)[:, None]  # the dark end would vanish on a dark page
        return {label: matplotlib.colors.to_hex(c) for label, c in zip(grouping.labels, shades, strict=True)}
    return dict(zip(grouping.labels, NAMED, strict=False))


def faint(colour: str, opacity: float) -> str:
    """A hexadecimal colour made transparent."""
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{opacity:g})"


@functools.cache
def template(dark: bool = False) -> go.layout.Template:
    """The look of every figure, on a light or on a dark page."""
    ink, line, grid = ("#D9DCE1", "#6B7079", "#2E3239") if dark else ("#24282E", "#9AA0A8", "#E7E9EC")
    axis = {
        "gridcolor": grid, "linecolor": line, "tickcolor": line, "zeroline": False, "ticks": "outside", "ticklen": 4,
        "showline": True, "automargin": True, "title": {"standoff": 10, "font": {"size": 13}},
    }  # fmt: skip
    layout = go.Layout(
        font={"family": FONT, "size": 13, "color": ink}, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", colorway=list(NAMED),
        xaxis=axis, yaxis=axis, margin={"l": 64, "r": 24, "t": 24, "b": 56}, hovermode="closest",
        hoverlabel={"bgcolor": "#1C1F24" if dark else "#FFFFFF", "bordercolor": line, "font": {"family": FONT, "size": 12, "color": ink}},
        legend={"title": {"font": {"size": 13}}},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": line, "activecolor": ink},
        annotationdefaults={"font": {"size": 12, "color": ink}, "showarrow": False}, shapedefaults={"line": {"color": ink}},
    )  # fmt: skip
    return go.layout.Template(layout=layout)


def blank(height: int, caption: str, **layout: Any) -> go.Figure:
    """An empty figure. Its caption travels with it, in `layout.meta`."""
    return go.Figure(layout=go.Layout(template=template(), height=height, meta={"caption": caption}, **layout))


def caption(figure: go.Figure) -> str:
    """What a figure shows, in words."""
    return str(figure.layout.meta["caption"])


def text(value: object, longest: int = 60) -> str:
    """User's text for a figure: no markup, not too long."""
    words = str(value)
    return html.escape(words if len(words) <= longest else words[: longest - 1] + "…")


def precise(value: float) -> str:
    """Four decimals; a smaller number in powers of ten, since 0.0000 would say that it is 0."""
    return "0" if value == 0 else f"{value:.4f}" if abs(value) >= 0.001 else f"{value:.1e}"


def compact(step: float) -> str:
    """A step as a short label: 0, 100, 20k, 3M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if step >= size:
            return f"{step / size:.3g}{unit}"
    return f"{step:.3g}"


# ---- the step axis: logarithmic, with step 0 half a step left of the first


def step_places(steps: np.ndarray, first: float) -> np.ndarray:
    """Where steps stand on a logarithmic axis: 0 stands at half the first positive step."""
    return np.where(steps > 0, steps, first / 2)


def first_step(steps: np.ndarray) -> float:
    """The smallest positive step."""
    return float(min((s for s in steps if s > 0), default=1))


def step_ticks(steps: np.ndarray) -> tuple[list[float], list[str]]:
    """Places and labels: step 0 if it is there, and the powers of ten."""
    first = first_step(steps)
    powers = [10.0**k for k in range(int(np.ceil(np.log10(first))), int(np.floor(np.log10(max(steps.max(initial=1), 1)))) + 1)]
    zero = [0.0] if (steps == 0).any() else []
    return [first / 2] * len(zero) + powers, [compact(s) for s in (*zero, *powers)]


def step_axis(steps: np.ndarray) -> dict[str, Any]:
    """Layout of a step axis."""
    places, labels = step_ticks(steps)
    return {"type": "log", "title": {"text": "optimiser step"}, "tickmode": "array", "tickvals": places, "ticktext": labels}


# ---- floor and plateau


def level_lines(catalogue: Catalogue, runs: Sequence[str]) -> list[tuple[str, float, str]]:
    """Kind, height and label of the floors and plateaus of some runs; none of a kind that takes more than a few values."""
    lines = []
    for kind in ("floor", "plateau"):
        levels = catalogue.levels(kind, runs)
        for value, members in levels if len(levels) <= MOST_LEVELS else []:
            of = f" ({text(_whose(catalogue, members), 40)})" if len(levels) > 1 else ""
            lines.append((kind, value, f"{kind} {value:.3g}{of}"))
    return lines


def _whose(catalogue: Catalogue, members: Sequence[str]) -> str:
    """The task fields that are the same in all of these runs and differ among all."""
    names = [n for n in catalogue.differing if n.split(".")[0] == "task"]
    values = {n: {shown(catalogue.facts[run].fields.get(n)) for run in members} for n in names}
    return ", ".join(f"{catalogue.short(n)}={next(iter(v))}" for n, v in values.items() if len(v) == 1) or f"{len(members)} runs"


def level_note(catalogue: Catalogue, runs: Sequence[str]) -> str:
    """What a caption says of floor and plateau."""
    words = []
    for kind, meaning in (("floor", "irreducible loss"), ("plateau", "best loss that sees only the output position")):
        levels = catalogue.levels(kind, runs)
        if not levels:
            words.append(f"The {kind} ({meaning}) is not known.")
        elif len(levels) > MOST_LEVELS:
            words.append(f"The {kind} ({meaning}) differs from run to run, {levels[0][0]:.3g} to {levels[-1][0]:.3g}: not drawn.")
        else:
            words.append(f"Dotted: {kind}, the {meaning}.")
    return " ".join(words)


def draw_levels(figure: go.Figure, lines: Sequence[tuple[str, float, str]], axis: str = "y") -> None:
    """Dotted lines with their labels: floors at the left, where curves are high, plateaus at the right."""
    for kind, height, label in lines:
        side, x = ("left", 0) if kind == "floor" else ("right", 1)
        draw_level(figure, height, GREY, axis)
        figure.add_annotation(text=label, x=x, xref="paper", xanchor=side, y=height, yref=axis, yanchor="bottom", showarrow=False)


def draw_level(figure: go.Figure, height: float, colour: str, axis: str = "y") -> None:
    """A dotted line across the figure."""
    line = {"width": 1.2, "dash": "dot", "color": colour}
    figure.add_shape(type="line", xref="paper", x0=0, x1=1, yref=axis, y0=height, y1=height, line=line)
