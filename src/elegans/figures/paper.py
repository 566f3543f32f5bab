"""The main figures for papers, PNG and PDF, drawn from the same numbers as the report; and their captions.

Curves, maps of probes and leads have a line or row for each group of runs that differ by seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elegans.figures import queries, style
from elegans.figures.attention import AttentionGrid, attention_grid, map_caption
from elegans.figures.catalogue import SHADES, Catalogue, Grouping, Tables, catalogue
from elegans.figures.contrasts import AXIS, POINTS, Pair, contrast_caption, contrasts_of, counts
from elegans.figures.curves import MANY, UNITS, Series, about, band, series, y_range
from elegans.figures.effects import (
    EFFECTS,
    MOST_ROWS,
    Lead,
    Strip,
    ablation_caption,
    fields_first,
    jitter,
    lead_caption,
    leads_of,
    plural,
    strip_colour,
    strips,
)
from elegans.figures.maps import ProbeMaps, probe_caption, probe_maps
from elegans.files import write_text
from elegans.store import Store

Captioned = tuple[Figure, str]
LOOK: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 8, "axes.labelsize": 8, "axes.titlesize": 8, "axes.linewidth": 0.6, "axes.spines.top": False,
    "axes.spines.right": False, "xtick.labelsize": 7, "ytick.labelsize": 7, "legend.fontsize": 7, "legend.frameon": False,
    "lines.linewidth": 1.0, "pdf.fonttype": 42, "svg.hashsalt": "elegans", "savefig.dpi": 300,
}  # fmt: skip
WIDTH = 5.5  # inches: the text width of most single-column papers
MARKERS = {"diamond": "D", "square": "s"}
LONG = 16  # letters: a legend of longer names stands below the axes


def save_paper_figures(store: Store, folder: str | Path) -> list[Path]:
    """Draw every main figure that has rows into a folder, as PNG and PDF, with `captions.md`; return the files."""
    tables, folder = Tables(store), Path(folder)
    try:
        with matplotlib.rc_context(LOOK):
            drawn = _draw_all(tables, catalogue(store, tables))
            if not drawn:
                return []
            folder.mkdir(parents=True, exist_ok=True)
            files = [path for name, (figure, _) in drawn.items() for path in save(figure, folder / name)]
        write_text(folder / "captions.md", "\n".join(f"**{name}.** {caption}\n" for name, (_, caption) in drawn.items()))
        return [*files, folder / "captions.md"]
    finally:
        tables.close()


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write PNG and PDF. The same figure gives the same bytes: no dates in the files."""
    figure.savefig(stem.with_suffix(".png"), metadata={"Software": None})
    figure.savefig(stem.with_suffix(".pdf"), metadata={"CreationDate": None})
    return [stem.with_suffix(".png"), stem.with_suffix(".pdf")]


def _draw_all(tables: Tables, runs: Catalogue) -> dict[str, Captioned]:
    drawn: dict[str, Captioned] = {}
    groups = _groups(tables, runs)
    if "metrics" in tables.names:
        rows = tables.ask(queries.curves("validation"))
        for value, name in (("loss", "loss"), ("exact_match", "exact-match")):
            drawn |= {name: curves(data, runs, value, groups)} if (data := series(rows, value)) else {}
    if "probe" in tables.names:
        for feature in tables.ask(queries.FEATURES)["feature"].to_pylist():
            maps = _maps(tables, runs, feature, groups)
            who = "of each group those that learned (all, where none did)" + _pooled(runs, groups)
            drawn |= {f"probe-{_file_name(feature)}": (probe_map(maps, feature), probe_caption(feature, who))} if maps else {}
    if found := leads_of(tables):
        drawn["lead"] = lead_forest(found), lead_caption(found, len(found))
    if pairs := contrasts_of(tables):
        drawn["contrast"] = contrast_forest(pairs), contrast_caption(pairs)
    if "ablate" in tables.names:
        who, where = ("that learned", queries.among(runs.learned, len(runs.facts))) if runs.learned else ("measured", "true")
        made = strips(tables.ask(queries.ablation(where)))
        who += ", of all groups together" if len(groups.labels) > 1 else ""
        drawn["ablation"] = ablation(made, "exact_match"), ablation_caption(made, "exact_match", who)
    if "attention" in tables.names:
        measured = [run for run in (*runs.learned, *runs.facts) if tables.ask(queries.attention(run)).num_rows]
        drawn |= {"attention": _attention(tables, runs, measured[0])} if measured else {}
    return drawn


def _groups(tables: Tables, runs: Catalogue) -> Grouping:
    """Runs that differ by seed alone; where there are more such groups than colours, runs by the first field."""
    return runs.groups if len(runs.groups.labels) <= SHADES else runs.grouping(fields_first(runs, tables)[0])


def _pooled(runs: Catalogue, groups: Grouping) -> str:
    """What a caption says of groups that hold runs which differ in more than their seed."""
    return "" if groups == runs.groups else f" (too many differ by seed alone: these are by {groups.title}, and pool what else differs)"


def _attention(tables: Tables, runs: Catalogue, run: str) -> Captioned:
    rows = tables.ask(queries.attention(run))
    made = attention_grid(rows)
    return attention_map(made), map_caption(rows, made, f"only {run} ({runs.describe(run)})")


def _maps(tables: Tables, runs: Catalogue, feature: str, groups: Grouping) -> dict[str, ProbeMaps]:
    """Probes of a feature in every group of runs, by the group and how many of its runs are averaged: those that learned, if any did."""
    found = {}
    for label in groups.labels:
        members = [run for run in runs.facts if groups.of[run] == label]
        learned = [run for run in runs.learned if groups.of[run] == label]
        rows = tables.ask(queries.probe_map(feature, queries.among(learned or members, len(runs.facts)), tables.left_out))
        if rows.num_rows:
            averaged = f"{len(learned)} of {len(members)} runs" if learned else f"{len(members)} runs, none learned"
            name = f"{groups.title} {label}".strip().replace(", ", ",\n")
            found[f"{name}\n{averaged}"] = probe_maps(rows)
    return found


def _file_name(feature: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in feature)


def _blank(height: float, **grid: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(**grid)


def curves(data: Series, runs: Catalogue, value: str, groups: Grouping) -> Captioned:
    """Every run, or the 10 to 90 % band of many, and the median of each group, against the step."""
    figure, axes = _blank(2.6)
    colours, steps = style.palette(groups), np.unique(np.concatenate([s for s, _ in data.values()]))
    first = style.first_step(steps)
    for label in groups.labels:
        members = [data[run] for run in data if groups.of[run] == label]
        for step, y in members if len(data) <= MANY else ():
            axes.plot(style.step_places(step, first), y, color=colours[label], alpha=0.4, linewidth=0.6)
        if (made := band(members)) is not None:
            x = style.step_places(made.step, first)
            if len(data) > MANY:
                axes.fill_between(x, made.low, made.high, color=colours[label], alpha=0.13, linewidth=0)
            axes.plot(x, made.median, color=colours[label], linewidth=1.4, label=f"{label} ({made.runs})")
    _step_axis(axes, steps)
    axes.set_ylabel(UNITS[value][0])
    axes.set_ylim(*y_range(data, runs, value))
    for kind, level, label in style.level_lines(runs, list(data)) if value == "loss" else ():
        axes.axhline(level, color=style.GREY, linestyle=":", linewidth=0.8)
        side = 0.01 if kind == "floor" else 0.99
        axes.text(
            side, level, label, transform=axes.get_yaxis_transform(), ha="left" if kind == "floor" else "right", va="bottom", fontsize=7
        )
    if len(groups.labels) > 1:
        below = max(map(len, groups.labels)) > LONG
        figure.legend(title=groups.title, loc="outside lower center" if below else "outside right upper", ncols=2 if below else 1)
    return figure, _curves_caption(data, runs, value, groups)


def _curves_caption(data: Series, runs: Catalogue, value: str, groups: Grouping) -> str:
    """What the curves are, and of which runs."""
    parts = "bands their 10 to 90 % range" if len(data) > MANY else "thin ones single runs"
    of = f" of a group, their number in brackets{_pooled(runs, groups)}" if len(groups.labels) > 1 else ""
    levels = " " + style.level_note(runs, list(data)) if value == "loss" else ""
    return (
        f"{about(value, 'validation')} Thick lines: medians over the runs{of}; "
        f"{parts}. n = {len(data)} of {plural(len(runs.facts), 'run')}.{levels}"
    )


def _step_axis(axes: Axes, steps: np.ndarray) -> None:
    axes.set_xscale("log")
    places, labels = style.step_ticks(steps)
    axes.set_xticks(places, labels)
    axes.minorticks_off()
    axes.set_xlabel("optimiser step")


def probe_map(groups: dict[str, ProbeMaps], feature: str) -> Figure:
    """Site by bit at a few steps, beside the untrained network, random labels and chance; a row for each group of runs."""
    across, sites = max(len(m.panels) for m in groups.values()), max(len(m.sites) for m in groups.values())
    figure, grid = _blank((0.9 + 0.14 * sites) * len(groups), nrows=len(groups), ncols=across, squeeze=False)
    low = min(maps.low for maps in groups.values())
    for row, (group, maps) in zip(grid, groups.items(), strict=True):
        for axes, (name, z) in zip(row, maps.panels, strict=False):
            image = _probe_panel(axes, maps, name, z, low)
            if axes is not row[0]:
                axes.set_yticklabels([])
        for axes in row[len(maps.panels) :]:
            axes.set_axis_off()
        row[0].set_ylabel(group, fontsize=6.5)
    figure.supxlabel(f"bit of {feature}", fontsize=8)
    figure.colorbar(image, ax=grid.ravel().tolist(), label="probe accuracy", pad=0.01, aspect=15 * len(groups))
    return figure


def _probe_panel(axes: Axes, maps: ProbeMaps, name: str, z: np.ndarray, low: float) -> Any:
    axes.set_facecolor("#DDDDDD")
    image = axes.imshow(np.ma.masked_invalid(z), origin="lower", aspect="auto", vmin=low, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_title(name.replace("random ", "random\n"), fontsize=6.5)
    shown = np.unique(np.linspace(0, len(maps.index) - 1, min(3, len(maps.index))).round().astype(int))
    axes.set_xticks(shown, [str(maps.index[i]) for i in shown])
    axes.set_yticks(range(len(maps.sites)), maps.sites)
    axes.tick_params(length=1.5)
    if np.isnan(z).all():
        axes.text(0.5, 0.5, "not\nmeasured", transform=axes.transAxes, ha="center", va="center", fontsize=6)
    return image


def attention_map(made: AttentionGrid) -> Figure:
    """Attention of every head of one run: the first that learned, where one did."""
    down, across = len(made.rows), len(made.columns)
    side = min((WIDTH - 1) / across, 2.0)  # inches
    figure, grid = _blank(0.45 + down * (side + 0.05), nrows=down, ncols=across, sharex=True, sharey=True, squeeze=False)
    figure.set_figwidth(min(WIDTH, 1.2 + across * side))
    ticks = made.ticks(int(side / 0.075))
    labels, size = [made.labels[t] for t in ticks], min(6.5, 60 * side / len(ticks))
    for (i, j), axes in np.ndenumerate(grid):
        axes.set_facecolor("#DDDDDD")
        image = axes.imshow(np.ma.masked_invalid(made.maps[i][j]), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        axes.set_xticks(ticks, labels, fontsize=size, rotation=90)
        axes.set_yticks(ticks, labels, fontsize=size)
        axes.tick_params(length=1.5)
        if i == 0:
            axes.set_title(made.columns[j], fontsize=7)
        if j == 0:
            axes.set_ylabel(made.rows[i], fontsize=7)
    figure.colorbar(image, ax=grid.ravel().tolist(), label="attention", pad=0.01, aspect=15 * down)
    return figure


def lead_forest(found: list[Lead]) -> Figure:
    """Runs, group means with their 95 % intervals, and the line of no lead."""
    figure, axes = _blank(0.8 + 0.26 * len(found))
    features = list(dict.fromkeys(lead.feature for lead in found))
    axes.axvline(0, color=style.GREY, linewidth=0.8)
    for place, lead in enumerate(found):
        colour = style.NAMED[features.index(lead.feature) % len(style.NAMED)]
        axes.plot(lead.each, place + jitter(len(lead.each), 0.24), ".", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)
        if lead.mean is not None:
            diamond(axes, lead.mean, lead.low, lead.high, place, colour)
        axes.text(1.01, place, f"{lead.said}, {lead.runs}/{lead.of}", transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    name_rows(axes, [lead.name for lead in found])
    axes.set_xlabel("lead of the feature over the loss (decades of steps)")
    return figure


def contrast_forest(pairs: Sequence[Pair]) -> Figure:
    """By how much transitions come later in one group than in another: half-way and change points with their intervals."""
    rows = pairs[:MOST_ROWS]
    figure, axes = _blank(0.9 + 0.34 * len(rows))
    axes.axvline(0, color=style.GREY, linewidth=0.8)
    for place, row in enumerate(rows):
        for name, _, marker, offset in POINTS:
            _draw_shift(axes, row[name], row[f"{name}_low"], row[f"{name}_high"], place + offset, MARKERS[marker])
        axes.text(1.01, place, f"{row['verdict']}, {counts(row)}", transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    name_rows(axes, [f"{row['curve']}: {row['group']}\nvs {row['other']}" for row in rows])
    axes.set_xlabel(AXIS)
    return figure


def _draw_shift(axes: Axes, middle: float | None, low: float | None, high: float | None, place: float, marker: str) -> None:
    """A middle with its interval; arrows to where it has no end."""
    known = [x for x in (middle, low, high) if x is not None]
    if not known:
        return
    axes.plot([min(known), max(known)], [place] * 2, color=style.BLUE, linewidth=1.2)
    axes.plot([] if middle is None else [middle], [] if middle is None else [place], marker, color=style.BLUE, markersize=4)
    arrow = {"arrowstyle": "->", "color": style.BLUE, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    for end, edge, start in ((low, 0.0, min(known)), (high, 1.0, max(known))):
        if end is None:
            axes.annotate("", (edge, place), (start, place), axes.get_yaxis_transform(), axes.transData, arrowprops=arrow)


def ablation(made: list[Strip], value: str) -> Figure:
    """Nothing, the feature's direction, or random directions removed."""
    figure, axes = _blank(0.8 + 0.26 * len(made))
    for place, strip in enumerate(made):
        colour = strip_colour(strip.kind)
        if strip.repeated:
            axes.plot(strip.spread, [place, place], color=colour, alpha=0.25, linewidth=7, solid_capstyle="butt")
        if len(strip.each) <= MANY:
            axes.plot(strip.each, place + jitter(len(strip.each), 0.24), ".", color=colour, alpha=0.4, markersize=4, markeredgewidth=0)
        diamond(axes, strip.mean, strip.low, strip.high, place, colour)
    name_rows(axes, [strip.name for strip in made])
    axes.set_xlabel(EFFECTS[value])
    axes.set_xlim(*((-0.02, 1.02) if value == "exact_match" else (0, None)))
    return figure


def diamond(axes: Axes, mean: float, low: float | None, high: float | None, place: float, colour: str) -> None:
    """A mean, with whiskers where there is an interval."""
    error = None if low is None or high is None else [[mean - low], [high - mean]]
    axes.errorbar([mean], [place], xerr=error, fmt="D", color=colour, markersize=4.5, capsize=2, elinewidth=1.2)


def name_rows(axes: Axes, names: list[str]) -> None:
    """A row for each name, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
