"""Figures for papers, by task: scaling curves, quiet and loud features beside the task's loss, and what ablating them does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.csv
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elegans.figures import queries, style
from elegans.figures.catalogue import Tables, catalogue, columns, number
from elegans.figures.paper import LOOK, diamond, name_rows, save
from elegans.figures.scaling import Scaled, grid_of, loss_range
from elegans.figures.within import Effect, markdown, table, within
from elegans.files import write_text
from elegans.store import Store

PANEL = 2.2, 1.75  # inches
LEGEND = 1.5  # panels that a figure is wide at least, for its legend
PUBLISHED_COLOUR = style.NAMED[4]
Interval = tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Line:
    """A mean with its interval over seeds (NaN: fewer than three) against training FLOPs."""

    flops: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclasses.dataclass(frozen=True)
class Beside:
    """What is drawn of one feature: the task's loss, the probe's score, and where each changes."""

    loss: Line
    score: Line
    untrained: float | None
    loss_change: Interval
    feature_change: Interval
    said: str  # quiet, loud, undecided, or why there is no verdict
    note: str  # which runs


Feature = tuple[str, str]  # of a task


def save_quiet_figures(
    store: Store,
    folder: str | Path,
    tasks: Sequence[str],
    published: Mapping[str, Interval],
    quiet: Sequence[Feature],
    loud: Sequence[Feature],
) -> list[Path]:
    """Draw scaling, quiet, loud and ablation into a folder, as PNG and PDF, and the ablation table as CSV and Markdown; return the files.

    `published` maps tasks to the FLOPs of the transition that others found. Tasks of which the store has no run have no panel; what was
    not measured of the others says so in its panel, and a figure of which nothing was measured is not drawn.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = Tables(store)
    try:
        with matplotlib.rc_context(LOOK):
            here = {row["task"] for row in tables.ask("select distinct task from runs").to_pylist()}
            drawn = {}
            tasks = [task for task in tasks if task in here and "scaling" in tables.names]
            if tasks:
                drawn["scaling"] = scaling_figure(tables, tasks, published)
            for name, features, across in (("quiet", quiet, 3), ("loud", loud, 4)):
                some = {feature: beside(tables, *feature) for feature in features if feature[0] in here}
                if any(some.values()):
                    drawn[name] = _features_figure(some, across)
            effects = within(tables.ask(queries.ablation()), catalogue(store, tables)) if "ablate" in tables.names else []
            if effects:
                drawn["ablation"] = ablation_figure(effects)
            files = [path for name, figure in drawn.items() for path in save(figure, folder / name)]
    finally:
        tables.close()
    if not effects:
        return files
    pyarrow.csv.write_csv(table(effects), folder / "ablation.csv")
    write_text(folder / "ablation.md", markdown(effects))
    return [*files, folder / "ablation.csv", folder / "ablation.md"]


# ---- from rows


def beside(tables: Tables, task: str, feature: str) -> Beside | None:
    """A feature's curves across compute where they were measured, else within the runs of its best measured group; None where neither.

    Reads the tables `across_compute` and `across_compute_lead`, or `course`, `change` and `lead`.
    """
    if {"across_compute", "across_compute_lead"} <= tables.names:
        where = f"task = {queries.quoted(task)} and feature = {queries.quoted(feature)}"
        rows = columns(tables.ask(f"select * from across_compute where {where} order by flops"))
        if len(rows["flops"]) > 1:  # of a single budget there is no curve
            return _across(rows, tables.ask(f"select * from across_compute_lead where {where}").to_pylist()[0])
    return _within_runs(tables, task, feature) if {"course", "change", "lead"} <= tables.names else None


def _across(rows: dict[str, np.ndarray], lead: dict[str, Any]) -> Beside:
    def line(name: str) -> Line:
        return Line(rows["flops"].astype(float), *(rows[f"{name}{end}"].astype(float) for end in ("", "_low", "_high")))

    untrained = rows["untrained"].astype(float)
    base = None if np.isnan(untrained).all() else float(np.nanmean(untrained))
    loss, feature = ((number(lead[f"{n}_low"]), number(lead[f"{n}_high"])) for n in ("loss", "feature"))
    said = lead["loudness"] or lead["missing"] or "undecided"
    return Beside(line("loss"), line("score"), base, loss, feature, said, f"across compute, n = {max(rows['seeds'])}")


def _within_runs(tables: Tables, task: str, feature: str) -> Beside | None:
    """The group in which most runs learned both; of equal ones the first by name."""
    chosen = f"""select l.* from lead l join (select distinct "group", curve from course where task = {queries.quoted(task)}) c
on l."group" = c."group" and l.feature = c.curve where l.feature = {queries.quoted(feature)} order by l.runs desc, l."group" limit 1"""
    lead = next(iter(tables.ask(chosen).to_pylist()), None)
    if lead is None:
        return None
    where = f"""where "group" = {queries.quoted(lead["group"])} and curve in ('loss', {queries.quoted(feature)})"""
    rows = columns(tables.ask(f"select * from course {where} order by curve, step"))
    changes = {row["curve"]: row for row in tables.ask(f"select * from change {where}").to_pylist()}
    loss, seen = ((number(changes[c]["flops_low"]), number(changes[c]["flops_high"])) for c in ("loss", feature))
    untrained = [s for s, step, curve in zip(rows["mean"], rows["step"], rows["curve"], strict=True) if curve == feature and step == 0]
    said = lead.get("loudness") or lead.get("missing") or "undecided"
    lines = (_line(rows, rows["curve"] == curve) for curve in ("loss", feature))
    among = tables.ask(f'select count(distinct "group") as n from course where task = {queries.quoted(task)}').to_pylist()[0]["n"]
    which = [part for part in lead["group"].split(", ") if not part.startswith("task=") and not part.endswith("=None")]
    both = f", both in {lead['runs']}" if lead["runs"] < lead["of"] else ""  # the curves are means of all
    note = ", ".join(["within runs", *(which if among > 1 else []), f"n = {lead['of']}{both}"])
    return Beside(next(lines), next(lines), number(next(iter(untrained), None)), loss, seen, said, note)


def _line(rows: dict[str, np.ndarray], here: np.ndarray) -> Line:
    flops = rows["flops"][here].astype(float)
    after = flops > 0  # the untrained network has no place on the axis
    return Line(flops[after], *(rows[n][here].astype(float)[after] for n in ("mean", "low", "high")))


# ---- to figures


def scaling_figure(tables: Tables, tasks: Sequence[str], published: Mapping[str, Interval], across: int = 5) -> Figure:
    """Test loss and exact match of the best configuration at every budget, a panel for each task; the published transition shaded."""
    found = {s.task: s for s in grid_of(tables)}
    across = min(across, len(tasks))
    figure, panels = _grid(len(tasks), across)
    ends = [x for task in tasks for x in (*published.get(task, ()), *(found[task].flops if task in found else ())) if x is not None]
    for axes, task in zip(panels, tasks, strict=True):
        axes.set_title(task.replace("_", " "))
        low, high = published.get(task, (None, None))
        if low is not None and high is not None:
            axes.axvspan(low, high, color=PUBLISHED_COLOUR, alpha=0.25, linewidth=0)
        (_scaling_panel if task in found else _nothing)(axes, found.get(task))
        if ends:
            axes.set_xlim(min(ends) / 2, max(ends) * 2)
    keys = [("test loss", style.BLUE, "-", 1), ("exact match", style.RED, "-", 1), ("floor, plateau", style.GREY, ":", 1)]
    half = ("the loss is half-way between these budgets", style.BLUE, "-", 4)
    return _finish(figure, [*keys, half], across, [("published transition", PUBLISHED_COLOUR, 0.25)])


def _scaling_panel(axes: Axes, task: Scaled | None) -> None:
    assert task is not None
    exact = axes.twinx()
    for on, name, colour in ((axes, "loss", style.BLUE), (exact, "exact_match", style.RED)):
        mean, low, high = task.values[name]
        _draw(on, Line(task.flops, mean, low, high), colour, "o")
    for level in (task.floor, task.plateau):
        if level is not None:
            axes.axhline(level, color=style.GREY, linestyle=":", linewidth=0.8)
    _between(axes, task.half[1:], style.BLUE, task.flops)
    axes.set_ylim(*loss_range(task))
    _right(exact, (-0.035, 1.1), "exact match", style.RED)
    axes.set_ylabel("loss (nats)", color=style.BLUE)
    _flops_axis(axes)


def features_figure(tables: Tables, features: Sequence[tuple[str, str]], across: int) -> Figure:
    """The score of each feature's probe beside its task's loss, both with their change marked, and the verdict."""
    return _features_figure({feature: beside(tables, *feature) for feature in features}, across)


def _features_figure(features: Mapping[Feature, Beside | None], across: int) -> Figure:
    across = min(across, len(features))
    figure, panels = _grid(len(features), across)
    for axes, ((task, feature), found) in zip(panels, features.items(), strict=True):
        said = f"\n{found.said} ({found.note})" if found else "\n"
        axes.set_title(f"{task.replace('_', ' ')}: {feature.replace('_', ' ')}{said}", fontsize=6.5)
        (_feature_panel if found else _nothing)(axes, found)
    known = any(found and found.untrained is not None for found in features.values())  # probes at the end alone do not know
    untrained = [("untrained", style.BLUE, ":", 1)] if known else []
    keys = [("task loss", style.GREY, "-", 1), ("probe score (accuracy, or r2)", style.BLUE, "-", 1), *untrained]
    bars = [("where the loss changes", style.GREY, "-", 4), ("where the probe changes", style.BLUE, "-", 4)]
    return _finish(figure, [*keys, *bars], across)


def _feature_panel(axes: Axes, found: Beside | None) -> None:
    assert found is not None
    score = axes.twinx()
    _draw(axes, found.loss, style.GREY, "")
    _draw(score, found.score, style.BLUE, "")
    _between(axes, found.loss_change, style.GREY, found.loss.flops, 0.98)
    _between(axes, found.feature_change, style.BLUE, found.score.flops, 0.93)
    values = found.score.mean[np.isfinite(found.score.mean)]
    lowest = min([*values, *([found.untrained] if found.untrained is not None else [])], default=0.0)
    if found.untrained is not None:
        score.axhline(found.untrained, color=style.BLUE, linestyle=":", linewidth=0.8)
    _right(score, (lowest - 0.06 * (1 - lowest), 1 + 0.12 * (1 - lowest)), "probe score", style.BLUE)
    top = 1.15 * float(np.nanmax(found.loss.mean)) if len(found.loss.mean) else 1.0
    axes.set_ylim(-0.04 * top, top)
    axes.set_ylabel("loss (nats)", color=style.GREY)
    _flops_axis(axes)


def ablation_figure(effects: Sequence[Effect]) -> Figure:
    """Exact match of the runs that learned: with nothing removed, with each feature removed, and with each control removed."""
    figure = Figure(figsize=(5.5, 0.9 + 0.34 * max(len(effects), 1)), layout="constrained")
    axes = figure.subplots()
    colours = {"random": style.BLUE, "matched": style.NAMED[5], "labels": style.NAMED[2]}
    for place, effect in enumerate(effects):
        for i, control in enumerate(effect.against):
            axes.plot(control.left, place - 0.12 * (i + 1), "o", color=colours[control.control], markersize=3)
        if effect.base is not None and effect.left is not None:
            axes.plot(effect.base, place, "|", color=style.GREY, markersize=9, markeredgewidth=1.5)
            diamond(axes, effect.left, effect.low, effect.high, place, style.RED)
        said = f"{effect.verdict}, {effect.runs}/{effect.of}"
        axes.text(1.01, place, said, transform=axes.get_yaxis_transform(), va="center", fontsize=6)
    if not effects:
        axes.text(0.5, 0.5, "no ablation was measured in this store", transform=axes.transAxes, ha="center", va="center", fontsize=7)
    name_rows(axes, [f"{e.task.replace('_', ' ')}: {e.feature.replace('_', ' ')}" for e in effects])
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("exact match")
    keys = [("nothing removed", style.GREY, "|"), ("feature removed (95 % over runs)", style.RED, "D")]
    keys += [("random directions", colours["random"], "o"), ("random steps of equal length", colours["matched"], "o")]
    handles = [matplotlib.lines.Line2D([], [], color=c, marker=m, linestyle="", markersize=4, label=name) for name, c, m in keys]
    handles.append(matplotlib.lines.Line2D([], [], color=colours["labels"], marker="o", linestyle="", markersize=3, label="random labels"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=6.5)
    return figure


def _draw(axes: Axes, line: Line, colour: str, marker: str) -> None:
    """The mean; whiskers where points are few, a band where they are many."""
    known = np.isfinite(line.mean)
    axes.plot(line.flops[known], line.mean[known], color=colour, marker=marker, markersize=2.5)
    bounded = known & np.isfinite(line.low) & np.isfinite(line.high)
    x, mean, low, high = (v[bounded] for v in (line.flops, line.mean, line.low, line.high))
    if marker:
        axes.errorbar(x, mean, [mean - low, high - mean], fmt="none", ecolor=colour, elinewidth=0.8, capsize=1.5)
    else:
        axes.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)


def _between(axes: Axes, found: Interval, colour: str, flops: np.ndarray, height: float = 0.97) -> None:
    """A bar over an interval; one that is open ends where the curve does."""
    low, high = found
    if low is not None or high is not None:
        ends = [flops.min() if low is None else low, flops.max() if high is None else high]
        axes.plot(ends, [height, height], color=colour, linewidth=4, alpha=0.6, solid_capstyle="butt", transform=axes.get_xaxis_transform())


def _nothing(axes: Axes, found: object) -> None:
    del found
    axes.text(0.5, 0.5, "not measured\nin this store", transform=axes.transAxes, ha="center", va="center", fontsize=7, color=style.GREY)
    axes.set_yticks([])
    axes.set_xscale("log")
    axes.set_xlim(1e9, 1e16)
    _flops_axis(axes)


def _flops_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.tick_params(labelsize=6)
    axes.set_xlabel("training FLOPs", fontsize=7)
    axes.yaxis.label.set_fontsize(7)


def _right(axes: Axes, limits: tuple[float, float], label: str, colour: str) -> None:
    axes.spines["right"].set_visible(True)
    axes.set_ylim(*limits)
    axes.set_ylabel(label, color=colour, fontsize=7)
    axes.tick_params(labelsize=6)


def _grid(count: int, across: int) -> tuple[Figure, list[Axes]]:
    lines = -(-count // across)
    figure = Figure(figsize=(PANEL[0] * max(across, LEGEND), PANEL[1] * lines + 0.35), layout="constrained")
    panels = list(figure.subplots(lines, across, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _finish(
    figure: Figure, lines: Sequence[tuple[str, str, Any, float]], across: int, spans: Sequence[tuple[str, str, float]] = ()
) -> Figure:
    """The legend below all panels."""
    handles: list[Any] = [
        matplotlib.lines.Line2D([], [], color=colour, linestyle=look, linewidth=width, alpha=1 if width == 1 else 0.6, label=name)
        for name, colour, look, width in lines
    ]
    handles += [matplotlib.patches.Patch(color=colour, alpha=alpha, linewidth=0, label=name) for name, colour, alpha in spans]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) if across > 3 else across, fontsize=6.5, frameon=False)
    return figure
