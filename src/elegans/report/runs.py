"""The tables of the report: runs, diverged runs, where the numbers come from."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from elegans.figures import style
from elegans.figures.catalogue import SEEDS, Catalogue, shown
from elegans.files import read_json
from elegans.store import Store

MOST_ROWS = 2000
NONE = "–"  # what a missing measurement shows as


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text, each with the number that sorts it; None sorts last."""

    names: list[tuple[str, bool]]  # and whether the column holds numbers
    rows: list[list[tuple[str, float | str | None]]]
    note: str


def runs_table(runs: Catalogue) -> Table:
    """A row for every run: state, differing fields, final measurements. Columns that hold nothing are left out."""
    facts = list(runs.facts.values())
    columns: dict[str, list[Any]] = {
        "run": [f.id for f in facts],
        "label": [f.row["label"] for f in facts],
        "state": [f.state for f in facts],
    }
    for name in [*runs.differing, *(s for s in SEEDS if len({f.fields.get(s) for f in facts}) > 1)]:
        columns[runs.short(name)] = [f.fields.get(name) for f in facts]
    columns |= {title: [getattr(f, name) for f in facts] for title, name in MEASURED.items()}
    columns |= {name: [f.row[name] for f in facts] for name in ("parameters", "length")}
    kept = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    fixed = [name for name in FIXED if len(facts) > 1 and len(set(kept.get(name, ()))) == 1]
    same = ", ".join(f"{TITLES.get(name, name)} {_cell(name, kept.pop(name)[0])[0]}" for name in fixed)
    rows = [[_cell(name, values[i]) for name, values in kept.items()] for i in range(min(len(facts), MOST_ROWS))]
    notes = [f"All runs: {same}."] if same else []
    notes += [f"The first {MOST_ROWS:,} of {len(facts):,} runs, by id; `elegans sql` gives all."] if len(facts) > MOST_ROWS else []
    numeric = [any(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values) for values in kept.values()]
    return Table(list(zip([TITLES.get(name, name) for name in kept], numeric, strict=True)), rows, " ".join(notes))


FIXED = ("label", "floor", "plateau", "parameters", "length")  # said once where they are the same for all
MEASURED = {
    "validation loss": "loss",
    "validation exact match": "exact_match",
    "test loss": "test_loss",
    "test exact match": "test_exact_match",
    "learned": "learned",
    "floor": "floor",
    "plateau": "plateau",
}
TITLES = {"length": "steps"}


def diverged_table(runs: Catalogue) -> Table:
    """Diverged runs with their step."""
    facts = sorted((f for f in runs.facts.values() if f.state == "diverged"), key=lambda f: (f.row["diverged_at"] or 0, f.id))
    rows = [[_cell("run", f.id), _cell("", runs.describe(f.id)), _cell("", f.row["diverged_at"])] for f in facts[:MOST_ROWS]]
    note = f"The first {MOST_ROWS:,} of {len(facts):,}." if len(facts) > MOST_ROWS else ""
    return Table([("run", False), ("fields", False), ("first non-finite step", True)], rows, note)


def _cell(name: str, value: Any) -> tuple[str, float | str | None]:
    if value is None:
        return NONE, None
    if isinstance(value, bool):
        return ("yes" if value else "no"), str(value)
    if isinstance(value, int):
        return (str(value) if name in SEEDS else f"{value:,}"), value
    if isinstance(value, float):
        return (style.precise(value) if name in MEASURED else shown(value)), value
    return str(value), str(value)


# ---- provenance


def provenance(store: Store) -> list[tuple[list[str], list[tuple[str, str]]]]:
    """Distinct provenances, each with its cohorts, flattened to names and values."""
    found: dict[str, list[str]] = {}
    for cohort in store.cohorts():
        path = cohort.path / "provenance.json"
        if path.exists():
            found.setdefault(json.dumps(read_json(path), sort_keys=True), []).append(cohort.id)
    return [(cohorts, _flat(json.loads(text))) for text, cohorts in found.items()]


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}" if name else key)]
    return [(name, "none" if value is None or value == {} else value if isinstance(value, str) else json.dumps(value))]
