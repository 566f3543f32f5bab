"""What figures ask of a store: its tables in one database, and what is known of every run."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from elegans import specs
from elegans.errors import Invalid
from elegans.instruments.frontier import FINAL
from elegans.instruments.transition import names_of_groups, shown
from elegans.store import Store
from elegans.tasks import Task
from elegans.training.run import SEEDS, differing, is_seed

NEEDED = {
    "runs": ("run", "cohort", "label", "state", "diverged_at", "length", "parameters", "flops_per_step"),
    "metrics": ("run", "step", "split", "loss", "accuracy", "exact_match"),
    "positions": ("run", "step", "split", "position", "loss"),
    "probe": ("run", "step", "feature", "site", "family", "layer", "index", "position", "accuracy", "chance"),
    "ablate": ("run", "step", "feature", "method", "direction", "draw", "loss", "exact_match", "base_loss", "base_exact_match"),
    "attention": ("run", "step", "layer", "head", "query", "key", "query_label", "key_label", "attention"),
    "circuit": ("run", "step", "pattern", "layer", "head", "length", "attention", "chance", "peakiness", "invariance"),
    "transition": ("run", "group", "feature", "level", "loss_step", "feature_step", "lead"),
    "lead": ("group", "feature", "runs", "of", "mean", "low", "high", "verdict"),
    "change": ("group", "task", "curve", "runs", "of", "flops", "flops_low", "flops_high", "missing"),
    "contrast": (
        *("curve", "field", "group", "other", "runs", "of", "other_runs", "other_of", "half", "half_low", "half_high"),
        *("change", "change_low", "change_high", "verdict"),
    ),
    "course": ("group", "task", "curve", "step", "flops", "runs", "mean", "low", "high"),
    "scaling": ("task", "flops", "configuration", "seeds", "loss", "low", "high", "exact_match", "floor", "plateau"),
    "scaling_fit": ("task", "quantity", "value", "low", "high"),
    "across_compute": (
        *("task", "feature", "site", "configuration", "flops", "seeds", "probed", "loss", "loss_low", "loss_high"),
        *("score", "score_low", "score_high", "untrained", "chance", "floor", "plateau"),
    ),
    "across_compute_lead": (
        *("task", "feature", "loss_flops", "loss_low", "loss_high", "feature_flops", "feature_low", "feature_high"),
        *("lead", "low", "high", "loudness", "missing"),
    ),
}
OPTIONAL = {
    "probe": ("control", "untrained"),
    "lead": ("loudness",),
    "scaling": ("exact_low", "exact_high"),
}  # null where an instrument was told not to measure them
SHADES = 8  # values of a field that get a colour each; more are binned
BINS = 5
COVERAGE = 0.95  # of the intervals that figures draw
LEARNED = "the last validation loss is at or below half-way from plateau to floor (where these are unknown: exact match is 0.5 or more)"


class Tables:
    """The tables of a store, each read once. `lacking` names tables that have rows but not the columns that figures need."""

    def __init__(self, store: Store):
        self.connection = duckdb.connect(config={"enable_external_access": False})
        self.names: set[str] = set()
        self.lacking: dict[str, list[str]] = {}
        self.left_out: set[tuple[str, str]] = set()
        for name, needed in ((n, columns) for n, columns in NEEDED.items() if store.knows(n)):
            table = store.table(name)
            absent = [c for c in needed if c not in table.column_names]
            if table.num_rows and absent:
                self.lacking[name] = absent
            elif table.num_rows:
                for column in OPTIONAL.get(name, ()):
                    if column not in table.column_names:
                        self.left_out.add((name, column))
                self.connection.register(name, table)
                self.names.add(name)

    def ask(self, query: str) -> pa.Table:
        """The rows that answer a query."""
        return self.connection.sql(query).to_arrow_table()

    def close(self) -> None:
        self.connection.close()


def columns(rows: pa.Table) -> dict[str, np.ndarray]:
    """Columns as arrays; a null number is NaN, never 0."""
    return {name: _array(rows[name]) for name in rows.column_names}


def _array(column: pa.ChunkedArray) -> np.ndarray:
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan)
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or (pa.types.is_integer(kind) and column.null_count):
        return column.cast(pa.float64()).to_numpy()
    if pa.types.is_integer(kind):
        return column.to_numpy()
    return np.array(column.to_pylist(), object)


def number(value: Any) -> float | None:
    """A finite float, or None."""
    return float(value) if value is not None and np.isfinite(value) else None


# ---- runs


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of one run. Losses are nats per scored token; None is not measured or not known."""

    id: str
    row: dict[str, Any]  # of the table `runs`
    fields: dict[str, Any]  # dotted path to value; what is off is left out
    floor: float | None
    plateau: float | None
    loss: float | None
    exact_match: float | None
    test_loss: float | None
    test_exact_match: float | None

    @property
    def state(self) -> str:
        """finished, unfinished or diverged."""
        return str(self.row["state"])

    @property
    def learned(self) -> bool | None:
        """Whether the run learned, see `LEARNED`; None where nothing tells."""
        if self.state == "diverged":
            return False
        if None not in (self.loss, self.floor, self.plateau) and self.plateau > self.floor:  # type: ignore[operator]
            return self.loss <= (self.floor + self.plateau) / 2  # type: ignore[operator]
        return None if self.exact_match is None else self.exact_match >= 0.5


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Runs by the value of one field, in the order in which legends show them."""

    title: str
    labels: tuple[str, ...]
    of: dict[str, str]  # run to label
    ordered: bool  # labels are sizes of one thing, not names


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Every run of a store."""

    facts: dict[str, Facts]

    @cached_property
    def learned(self) -> list[str]:
        """Ids of the runs that learned."""
        return [f.id for f in self.facts.values() if f.learned]

    @cached_property
    def told(self) -> int:
        """How many runs are known to have learned or not; 0 where nothing but divergence tells."""
        known = [f for f in self.facts.values() if f.learned is not None]
        return len(known) if any(f.state != "diverged" for f in known) else 0

    @cached_property
    def differing(self) -> list[str]:
        """Fields that differ between runs, seeds and what is recorded apart; of fields that differ together, the first."""
        fields = [f.fields for f in self.facts.values()]
        found: dict[tuple[int, ...], str] = {}
        for name in (n for n in differing(fields) if not is_seed(n)):
            values = [f.get(name) for f in fields]
            order = {v: i for i, v in enumerate(dict.fromkeys(values))}
            found.setdefault(tuple(order[v] for v in values), name)
        return list(found.values())

    def short(self, name: str) -> str:
        """The last part of a dotted path where that is clear among the differing fields, else the path."""
        last = name.split(".")[-1]
        return last if sum(n.split(".")[-1] == last for n in self.differing) <= 1 else name

    def describe(self, run: str) -> str:
        """A run's differing fields and seeds, as text."""
        fields = self.facts[run].fields
        return ", ".join(f"{self.short(n)}={shown(fields[n])}" for n in [*self.differing, *SEEDS] if n in fields)

    def grouping(self, name: str | None) -> Grouping:
        """Runs grouped by a field; all of them in one group where it is None."""
        if name is None:
            return Grouping("", ("all runs",), dict.fromkeys(self.facts, "all runs"), True)
        values = {run: f.fields.get(name) for run, f in self.facts.items()}
        present = {v for v in values.values() if v is not None}
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in present):
            return _by_size(self.short(name), values, sorted(present))
        return _by_name(self.short(name), values)

    @cached_property
    def groups(self) -> Grouping:
        """Runs that differ by seed alone; where several fields tell them apart, under the names that the table `lead` has."""
        if len(self.differing) < 2:
            return self.grouping(next(iter(self.differing), None))
        of = names_of_groups({run: f.fields for run, f in self.facts.items()})
        return Grouping("", tuple(dict.fromkeys(of.values())), of, False)

    def levels(self, kind: str, runs: Collection[str] | None = None) -> list[tuple[float, list[str]]]:
        """Distinct floors or plateaus, each with its runs."""
        found: dict[float, list[str]] = {}
        for run in self.facts if runs is None else runs:
            value = getattr(self.facts[run], kind)
            if value is not None:
                found.setdefault(round(value, 6), []).append(run)
        return sorted(found.items())


def _by_size(title: str, values: dict[str, Any], present: Sequence[float]) -> Grouping:
    """A group for each number, or for each of a few bins of equally many runs."""
    if len(present) <= SHADES:
        of = {run: shown(v) for run, v in values.items()}
        labels = [shown(v) for v in present]
    else:
        edges = np.unique(np.quantile([v for v in values.values() if v is not None], np.linspace(0, 1, BINS + 1)))
        labels = [f"{low:.3g} to {high:.3g}" for low, high in itertools.pairwise(edges)]
        place = {run: min(int(np.searchsorted(edges, v, "right")) - 1, len(labels) - 1) for run, v in values.items() if v is not None}
        of = {run: labels[place[run]] if run in place else "none" for run in values}
    return Grouping(title, (*labels, *(["none"] if "none" in of.values() else [])), of, True)


def _by_name(title: str, values: dict[str, Any]) -> Grouping:
    counts = Counter(shown(v) for v in values.values())
    names = sorted(counts, key=lambda name: (-counts[name], name))
    kept = names if len(names) <= SHADES else names[: SHADES - 1]
    of = {run: shown(v) if shown(v) in kept else "others" for run, v in values.items()}
    return Grouping(title, (*kept, *(["others"] if len(kept) < len(names) else [])), of, False)


def catalogue(store: Store, tables: Tables) -> Catalogue:
    """Collect what is known of every run of a store."""
    bounds = _bounds(store.lines())
    final: dict[tuple[str, str], dict[str, Any]] = {}
    if "metrics" in tables.names:
        final = {(row["run"], row["split"]): row for row in tables.ask(FINAL).to_pylist()}
    rows = tables.ask("select * from runs order by run").to_pylist() if "runs" in tables.names else []
    return Catalogue({row["run"]: _facts(row, final, bounds) for row in rows})


def _facts(
    row: dict[str, Any], final: dict[tuple[str, str], dict[str, Any]], bounds: dict[str, tuple[float | None, float | None]]
) -> Facts:
    run = row["run"]
    head = {name: row[name] for name in NEEDED["runs"]}
    fields = {k: v for k, v in row.items() if k not in head and v is not None}
    ends = {} if row["state"] == "diverged" else final  # a diverged run has no final loss
    held, test = (ends.get((run, split), {}) for split in ("validation", "test"))
    measured = [number(part.get(name)) for part in (held, test) for name in ("loss", "exact_match")]
    floor, plateau = bounds.get(run, (None, None))
    return Facts(run, head, fields, floor, plateau, *measured)


def _bounds(lines: Iterable[dict[str, Any]]) -> dict[str, tuple[float | None, float | None]]:
    """Floor and plateau of every run's task; unknown where the task's class is not at hand."""
    known: dict[str, tuple[float | None, float | None]] = {}
    found = {}
    for line in lines:
        key = repr(line["spec"]["task"])
        if key not in known:
            known[key] = _task_bounds(line["spec"]["task"])
        found[line["run"]] = known[key]
    return found


def _task_bounds(spec: dict[str, Any]) -> tuple[float | None, float | None]:
    try:
        task: Task = specs.from_dict(Task, spec)
    except Invalid:
        return None, None
    return number(task.floor()), number(task.plateau())


def natural(text: str) -> list[Any]:
    """A key that sorts numbers in text by size."""
    return [(0, float(part), "") if part[:1].isdigit() else (1, 0.0, part) for part in re.split(r"(\d+\.?\d*(?:e-\d+)?)", text) if part]
