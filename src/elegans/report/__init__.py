"""The report: a store as one HTML file that opens anywhere, without a network."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.io.json import to_json_plotly
from plotly.offline import get_plotlyjs

from elegans import specs
from elegans.errors import Invalid
from elegans.figures import queries, style
from elegans.figures.catalogue import Catalogue, Tables, catalogue
from elegans.figures.contrasts import Pair, contrasts_of
from elegans.figures.effects import Lead, fields_first, leads_of
from elegans.figures.scaling import Scaled, grid_of
from elegans.figures.within import within
from elegans.files import read_json, write_text
from elegans.instruments.frontier import FINAL
from elegans.report import panels, words
from elegans.report.panels import Panel
from elegans.report.runs import diverged_table, provenance, runs_table
from elegans.store import Store
from elegans.tasks import Task

__all__ = ["write"]


def write(store: Store) -> Path:
    """Write `report.html` into the store's folder, whole or not at all, and return its path.

    Everything on the page comes from the store's rows; the same rows give the same bytes.
    """
    tables = Tables(store)
    try:
        page = _render(store, tables)
    finally:
        tables.close()
    path = store.path / "report.html"
    write_text(path, page)
    return path


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading of the page with its figures."""

    title: str
    panels: list[Panel]

    @property
    def id(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower())


def _render(store: Store, tables: Tables) -> str:
    runs = catalogue(store, tables)
    found, pairs = leads_of(tables), contrasts_of(tables)
    removed = within(tables.ask(queries.ablation()), runs) if "ablate" in tables.names else []
    grid = grid_of(tables)
    sections = _sections(tables, runs, found, pairs, grid)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("elegans", "report"), autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.get_template("page.html").render(
        study=_study(store, runs, words.answer(found, pairs, removed, runs, grid), bool(found or pairs or removed)), sections=sections,
        numbers=words.key_numbers(runs) if runs.facts else [],
        runs=runs_table(runs), diverged=diverged_table(runs), provenance=provenance(store), lacking=tables.lacking,
        citations=_citations(tables, sections), embed=_embed, templates=_json({"light": _template(False), "dark": _template(True)}),
        caption=style.caption, plotly=Markup(get_plotlyjs()),
    )  # fmt: skip


def _sections(tables: Tables, runs: Catalogue, found: list[Lead], pairs: Sequence[Pair], grid: list[Scaled]) -> list[Section]:
    """The sections that have rows."""
    names = tables.names
    by = next(iter(fields_first(runs, tables)), None)
    sections = [
        Section("Lead", panels.lead_panel(found, tables)),
        Section("Groups", panels.contrast_panel(pairs)),
        Section("Scaling", panels.scaling_panel(grid, tables) if grid else []),
        Section("Learning", panels.curve_panels(tables, runs) if "metrics" in names else []),
        Section("Positions", panels.position_panel(tables, runs, by) if "positions" in names else []),
        Section("Probes", [*panels.timeline_panel(tables, runs, by), *panels.probe_panels(tables, runs, by)] if "probe" in names else []),
        Section("Attention", _attention(tables, runs, by)),
        Section("Ablation", panels.ablation_panel(tables, runs) if "ablate" in names else []),
    ]
    return [section for section in sections if section.panels]


def _attention(tables: Tables, runs: Catalogue, by: str | None) -> list[Panel]:
    scores = panels.circuit_panel(tables, runs) if "circuit" in tables.names else []
    return [*scores, *(panels.attention_panel(tables, runs, by) if "attention" in tables.names else [])]


def _study(store: Store, runs: Catalogue, answer: list[str], judged: bool) -> dict[str, Any]:
    """Name, question and answer. A written answer stands above the computed one."""
    path = store.path / "study.json"
    study = read_json(path) if path.exists() else {}
    computed = answer if runs.facts else ["The store is empty: no run is in it."]
    return {
        "name": study.get("name") or store.path.resolve().name,
        "question": study.get("question") or "",
        "written": study.get("answer") or "",
        "computed": computed,
        "learned": words.learned_sentence(runs) if runs.facts and judged else "",
        "few": words.few_held_out(_tasks(store)),
    }


def _tasks(store: Store) -> list[Task]:
    """The tasks of a store's runs, but for those of a user's own whose file is not loaded here."""
    found = []
    for data in {json.dumps(line["spec"]["task"], sort_keys=True): line["spec"]["task"] for line in store.lines()}.values():
        with contextlib.suppress(Invalid):
            found.append(specs.from_dict(Task, data))
    return found


def _citations(tables: Tables, sections: list[Section]) -> list[tuple[str, str]]:
    """Title and shell commands that give the rows behind every figure and table."""
    cited = [(panel.title, panel.query) for section in sections for panel in section.panels]
    cited += [("Table of runs", "select * from runs order by run")] if "runs" in tables.names else []
    cited += [("Final measurements", FINAL)] if "metrics" in tables.names else []
    return [(title, "\n\n".join(_command(part) for part in query.split(";\n\n"))) for title, query in cited]


def _command(query: str) -> str:
    """A query as a command for a POSIX shell."""
    quoted = re.sub(r'([\\"$`])', r"\\\1", query)
    return f'elegans sql STORE "{quoted}"'


# ---- data inside the page


def _embed(figure: go.Figure) -> Markup:
    """A figure as JSON without its template, which the page has once."""
    data = figure.to_dict()
    data["layout"].pop("template", None)
    return _json(data)


def _json(value: dict[str, Any]) -> Markup:
    """JSON that cannot end the script element that it stands in."""
    return Markup(to_json_plotly(value, engine="json").replace("<", "\\u003c"))


def _template(dark: bool) -> dict[str, Any]:
    return dict(style.template(dark).to_plotly_json())
