"""The figures of the report: which, for which runs, and the query that gives each one's rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import plotly.graph_objects as go

from elegans.figures import attention, effects, queries, style
from elegans.figures.catalogue import Catalogue, Tables
from elegans.figures.contrasts import Pair, contrast_forest
from elegans.figures.curves import MANY, UNITS, curves, series, timeline
from elegans.figures.effects import Lead
from elegans.figures.maps import position_map, probe_map
from elegans.figures.scaling import NAMES, Scaled, scaling
from elegans.report.words import the

MOST_FIELDS = 6  # to colour curves by
MOST_GROUPS = 8  # offered as a mean of their own
SINGLE, SINGLE_OF_MANY = 12, 6  # runs offered one by one
DRAWN = 4  # runs whose attention is drawn: maps are large
SPLITS = {"validation": "validation", "train": "training", "test": "test"}


@dataclasses.dataclass(frozen=True)
class Panel:
    """One place on the page: figures to choose between, and the query behind the first."""

    title: str
    query: str
    choices: list[tuple[str, go.Figure]]

    @property
    def caption(self) -> str:
        """Caption of the figure shown first."""
        return style.caption(self.choices[0][1])

    @property
    def height(self) -> int:
        """Pixels of the tallest figure, so that the page never jumps."""
        return max(int(figure.layout.height) for _, figure in self.choices)


@dataclasses.dataclass(frozen=True)
class View:
    """Runs that are shown together."""

    who: str
    runs: list[str]

    @property
    def label(self) -> str:
        """As shown in the list of choices."""
        return f"{self.who}, n = {len(self.runs):,}" if len(self.runs) > 1 else self.who


def views(runs: Catalogue, by: str | None) -> list[View]:
    """The runs that learned, those that did not, each group of a field, and a few single runs."""
    going = [f.id for f in runs.facts.values() if f.state != "diverged"]
    learned = set(runs.learned)
    others = [run for run in going if run not in learned]
    found = [View("those that learned", runs.learned), View("those that did not learn", others)]
    if not learned:
        found = [View("those that did not diverge", going)]
    if by and learned:
        grouping = runs.grouping(by)
        for label in grouping.labels[:MOST_GROUPS]:
            found.append(
                View(f"those that learned with {grouping.title}={label}", [run for run in runs.learned if grouping.of[run] == label])
            )
    count = SINGLE if len(runs.facts) <= MANY else SINGLE_OF_MANY
    for run in [*runs.learned, *others][:count]:
        found.append(View(f"only {run} ({runs.describe(run)})", [run]))
    return [view for view in found if view.runs]


# ---- panels


def curve_panels(tables: Tables, runs: Catalogue) -> list[Panel]:
    """Loss and accuracy against the step; differing fields can colour them."""
    rows = {split: tables.ask(queries.curves(split)) for split in ("validation", "train")}
    fields: Sequence[str | None] = effects.fields_first(runs, tables)[:MOST_FIELDS]
    panels = []
    for title, values in (("Loss", ["loss"]), ("Accuracy", ["exact_match", "accuracy"])):
        parts = [(value, split) for value in values for split, part in rows.items() if part.num_rows and series(part, value)]
        choices = [
            (_curve_label(runs, value, split, by, len(values) > 1), curves(rows[split], runs, value, split, by))
            for value, split in parts
            for by in fields or [None]
        ]
        if choices:
            panels.append(Panel(title, queries.curves(parts[0][1]), choices))
    return panels


def _curve_label(runs: Catalogue, value: str, split: str, by: str | None, several: bool) -> str:
    parts = [UNITS[value][0]] if several else []
    return ", ".join([*parts, SPLITS[split], *([f"coloured by {runs.short(by)}"] if by else [])])


def position_panel(tables: Tables, runs: Catalogue, by: str | None) -> list[Panel]:
    """Loss by position and step."""
    made = []
    for view in views(runs, by):
        query = queries.positions(queries.among(view.runs, len(runs.facts)))
        rows = tables.ask(query)
        if rows.num_rows and rows["loss"].null_count < rows.num_rows:
            made.append((view.label, query, position_map(rows, view.who)))
    return [Panel("Loss at every position", made[0][1], [(label, figure) for label, _, figure in made])] if made else []


def probe_panels(tables: Tables, runs: Catalogue, by: str | None) -> list[Panel]:
    """A probe map for every feature."""
    panels = []
    for feature in tables.ask(queries.FEATURES)["feature"].to_pylist():
        made = []
        for view in views(runs, by):
            query = queries.probe_map(feature, queries.among(view.runs, len(runs.facts)), tables.left_out)
            rows = tables.ask(query)
            if rows.num_rows:
                made.append((view.label, query, probe_map(rows, feature, view.who)))
        if made:
            panels.append(Panel(f"Where {the(feature)} can be read", made[0][1], [(label, figure) for label, _, figure in made]))
    return panels


def attention_panel(tables: Tables, runs: Catalogue, by: str | None) -> list[Panel]:
    """Attention maps of a few runs, one by one: heads of different runs are not the same heads."""
    made: list[tuple[str, str, go.Figure]] = []
    for view in [v for v in views(runs, by) if len(v.runs) == 1]:
        query = queries.attention(view.runs[0])
        rows = tables.ask(query)
        if rows.num_rows and len(made) < DRAWN:
            made.append((view.label, query, attention.attention_map(rows, view.who)))
    return [Panel("Where heads look", made[0][1], [(label, figure) for label, _, figure in made])] if made else []


def circuit_panel(tables: Tables, runs: Catalogue) -> list[Panel]:
    """Every head against every pattern, of the runs that learned (of all, where none did)."""
    view = views(runs, None)[:1]
    where = queries.among(view[0].runs, len(runs.facts)) if view else "true"
    choices, first = [], ""
    for name in sorted(tables.ask(queries.PATTERNS)["pattern"].to_pylist(), key=lambda n: not n.startswith("iteration")):
        rows = tables.ask(queries.circuit(name, where))
        first = first or queries.circuit(name, where)
        found = [score for score in attention.SCORES if rows.num_rows and rows[score].null_count < rows.num_rows]
        choices += [(f"{name}, {s}", attention.circuit_curves(rows, name, s, view[0].who if view else "all")) for s in found]
    return [Panel("Which head follows which pattern", first, choices)] if choices else []


def timeline_panel(tables: Tables, runs: Catalogue, by: str | None) -> list[Panel]:
    """Probe accuracy beside the loss."""
    sites = {row["feature"]: row["site"] for row in tables.ask(queries.SITES).to_pylist()}
    made = []
    for view in views(runs, by):
        where = queries.among(view.runs, len(runs.facts))
        query = queries.probe_curves(sites, where)
        probe = tables.ask(query)
        if probe.num_rows and "metrics" in tables.names:
            loss = queries.loss_curves(where)
            made.append((view.label, f"{query};\n\n{loss}", timeline(probe, tables.ask(loss), runs, sites, view.who)))
    return (
        [Panel("When it can be read, and when the loss falls", made[0][1], [(label, figure) for label, _, figure in made])] if made else []
    )


def scaling_panel(found: list[Scaled], tables: Tables) -> list[Panel]:
    """The best of a grid against training FLOPs."""
    query = ";\n\n".join([queries.SCALING] + [queries.SCALING_FIT] * ("scaling_fit" in tables.names))
    return [Panel("The best of the grid at every budget", query, [(name, scaling(found, value)) for value, name in NAMES.items()])]


def lead_panel(found: list[Lead], tables: Tables) -> list[Panel]:
    """The forest plot."""
    query = ";\n\n".join([queries.LEAD] + [queries.TRANSITION] * ("transition" in tables.names))
    some = any(lead.mean is not None for lead in found)
    return [Panel("Does the feature come before the loss?", query, [("", effects.lead_forest(found))])] if some else []


def contrast_panel(pairs: Sequence[Pair]) -> list[Panel]:
    """The forest plot of groups of runs."""
    return [Panel("In which group does it come later?", queries.CONTRAST, [("", contrast_forest(pairs))])] if pairs else []


def ablation_panel(tables: Tables, runs: Catalogue) -> list[Panel]:
    """What removing a direction does, in the runs that learned where there are any."""
    who, where = ("that learned", queries.among(runs.learned, len(runs.facts))) if runs.learned else ("measured", "true")
    query = queries.ablation(where)
    rows = tables.ask(query)
    choices = [(UNITS[value][0], effects.ablation(rows, value, who)) for value in effects.EFFECTS if len(effects.strips(rows, value)) > 1]
    return [Panel("Does the network use it?", query, choices)] if choices else []
