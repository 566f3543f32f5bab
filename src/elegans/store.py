"""What is on disk: a folder of cohorts, few files for many runs, readable with common tools.

    store/
      format.json                        version of this layout
      cohorts/<id>/
        spec.json                        a run per line: id, label, slot, steps, fingerprints, spec
        plan.json                        members, sizes, shrink points, memory budget
        provenance.json, source/         versions, device, flags, commit; copies of the user's files
        metrics-<from>-<to>.parquet      run, step, split, loss, accuracy, exact_match, grad_norm, ...
        positions-<from>-<to>.parquet    run, step, split, position, loss
        metrics.parquet, positions.parquet  the same, merged, once the cohort is finished
        weights-<step>.safetensors       recorded parameters, stacked over replicas
        state-<step>.safetensors         parameters and optimiser: to resume from, and the final ones (but for `Never`)
        parts-<step>.json                digests of the rows that go with a state, until the cohort is finished
        status.json                      step, finished, diverged runs, whether it was recompiled
        timings.jsonl                    wall-clock, apart from everything reproducible
      rows/<instrument>/<cohort>.parquet what instruments measured
      report.html

Names derive from content, never from time. There is no pickle and no code that loading would run.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from elegans import specs
from elegans.errors import Invalid, StoreError
from elegans.files import has_columns, locked, read_json, read_table, write_json, write_table, write_text
from elegans.folder import TABLES, Cohort
from elegans.sources import code_of, custom_files
from elegans.training.cost import flops_per_step, parameters
from elegans.training.planner import CohortPlan
from elegans.training.run import Run, fill

FORMAT = 1
OWN_TABLES = ("runs", *TABLES, "timings")  # no instrument may bear such a name: its rows would never be seen


class Store:
    """A folder of cohorts. `Store(path)` opens one that exists; `Store.create(path)` makes one where there is none."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path}: a file, not a store; give a folder")
        if not (self.path / "format.json").exists():
            raise StoreError(f"{self.path}: no store here; make one with `elegans run ... --store {self.path}`")
        found = read_json(self.path / "format.json", "format")["format"]
        if not isinstance(found, int) or found > FORMAT:
            raise StoreError(f"{self.path}: written by a newer elegans (format {found}, this one reads up to {FORMAT}); upgrade elegans")
        self._shown: dict[str, str | None] | None = None  # labels of the runs that are shown; none: of all, as they were stored

    @classmethod
    def check(cls, path: str | Path) -> None:
        """Raise `StoreError` where a store could not be made or opened. Writes nothing."""
        path = Path(path)
        if (path / "format.json").exists() or (path.exists() and not path.is_dir()):
            cls(path)
        elif path.exists() and any(path.iterdir()):
            raise StoreError(f"{path}: a folder with other things in it; give an empty or a new one")
        blocked = next((p for p in path.parents if p.exists() and not p.is_dir()), None)
        if blocked is not None:
            raise StoreError(f"{path}: {blocked} is a file")
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise StoreError(f"{path}: {there} may not be written to; give another --store")

    @classmethod
    def create(cls, path: str | Path) -> Store:
        """Open the store at a path, made if there is none."""
        cls.check(path)
        path = Path(path)
        try:
            (path / "cohorts").mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a folder that seemed writable, such as one in /proc
            raise StoreError(f"{path}: no folder can be made here ({error.strerror}); give another --store") from None
        if not (path / "format.json").exists():
            write_json(path / "format.json", {"format": FORMAT})
        return cls(path)

    def only(self, runs: Iterable[Run]) -> Store:
        """The same store, showing of lines and all tables those of these runs, under the labels that they have here.

        For a study that shares a store with others. Its cohorts are those that hold some of the runs.
        """
        shown = copy.copy(self)
        shown._shown = {run.id: label_of(run) for run in runs}
        return shown

    def lock(self) -> Any:
        """A context in which this process alone writes."""
        return locked(self.path)

    # ---- cohorts

    def cohorts(self) -> list[Cohort]:
        """Every cohort whose plan was written, by id."""
        folders = sorted((self.path / "cohorts").iterdir()) if (self.path / "cohorts").exists() else []
        found = [Cohort(f) for f in folders if (f / "plan.json").exists()]
        return found if self._shown is None else [c for c in found if c.ids() & self._shown.keys()]

    def add(self, plan: CohortPlan, provenance: dict[str, Any]) -> Cohort:
        """The folder of a planned cohort, made if there is none. The plan is written last: it marks the folder as whole."""
        folder = self.path / "cohorts" / plan.id
        if (folder / "plan.json").exists():
            return Cohort(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(_line(slot, run), sort_keys=True) for slot, run in enumerate(plan.runs)]
        write_text(folder / "spec.json", "\n".join(lines) + "\n")
        files = custom_files(plan.runs)
        for file in files:
            copied = folder / "source" / file.relative_to(os.path.commonpath([f.parent for f in files]))
            copied.parent.mkdir(parents=True, exist_ok=True)
            write_text(copied, file.read_text(encoding="utf-8"))
        write_json(folder / "provenance.json", provenance)
        write_json(folder / "plan.json", plan.to_dict())
        return Cohort(folder)

    def remove(self, cohorts: Iterable[Cohort]) -> None:
        """Delete cohorts and what instruments measured of them."""
        for cohort in cohorts:
            (cohort.path / "plan.json").unlink()  # first: a half-deleted cohort is no cohort
            shutil.rmtree(cohort.path)
            for rows in self.path.glob(f"rows/*/{cohort.id}.parquet"):
                rows.unlink()

    # ---- runs

    def _told_elsewhere(self) -> dict[str, set[str]]:
        """Cohorts to those of their runs of which another cohort tells: a finished one first, then the first by id.

        Archives of stores that were planned differently bring the same run in several cohorts.
        """
        told: set[str] = set()
        left: dict[str, set[str]] = {}
        for cohort in sorted(self.cohorts(), key=lambda c: not c.status()["finished"]):
            ids = cohort.ids()
            left[cohort.id] = ids & told
            told |= ids
        return {cohort: runs for cohort, runs in left.items() if runs}

    def lines(self) -> list[dict[str, Any]]:
        """A line for every run that is shown: id, label, cohort, slot, steps, spec, code."""
        elsewhere = self._told_elsewhere()
        lines = [line | {"cohort": cohort.id} for cohort in self.cohorts() for line in cohort.lines()]
        lines = [line for line in lines if line["run"] not in elsewhere.get(line["cohort"], ())]
        shown = self._shown
        return lines if shown is None else [line | {"label": shown[line["run"]]} for line in lines if line["run"] in shown]

    def find(self, run: str) -> tuple[Cohort, dict[str, Any]]:
        """The cohort and line of a run, by its id or the start of it. Raises `StoreError`."""
        lines, homes = self.lines(), {cohort.id: cohort for cohort in self.cohorts()}
        found = [(homes[line["cohort"]], line) for line in lines if line["run"].startswith(run)]
        if len(found) != 1:
            known = ", ".join(line["run"] for line in lines[:5])
            raise StoreError(f"{self.path}: {'no' if not found else 'more than one'} run {run!r}; there are {known}, ...")
        return found[0]

    def runs(self) -> pa.Table:
        """A row for every run: id, cohort, label, state, divergence, lengths, and every field of its spec by dotted path."""
        rows = []
        statuses = {cohort.id: cohort.status() for cohort in self.cohorts()}
        for line in self.lines():
            status = statuses[line["cohort"]]
            at = status["diverged"].get(line["run"])
            done = at is not None or status["finished"] or status["step"] >= line["steps"]
            state = "diverged" if at is not None else "finished" if done else "unfinished"
            head = {"run": line["run"], "cohort": line["cohort"], "label": line["label"], "state": state, "diverged_at": at}
            rows.append(head | {k: line[k] for k in ("length", "parameters", "flops_per_step")} | specs.flat(line["spec"]))
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: _column([row.get(name) for row in rows]) for name in names})

    # ---- rows

    def table(self, name: str) -> pa.Table:
        """The rows of `runs`, `metrics`, `positions`, `timings`, or of an instrument by its name. Raises `StoreError` for another."""
        if not self.knows(name):
            raise StoreError(f"{self.path}: no table {name!r}; there are {', '.join(self._names())}")
        rows = self._table(name)
        if self._shown is None or "run" not in rows.column_names:
            return rows
        return rows.filter(pc.is_in(rows["run"], pa.array(list(self._shown), pa.string())))

    def _table(self, name: str) -> pa.Table:
        if name == "runs":
            return self.runs()
        if name == "timings":
            return pa.Table.from_pylist([row for cohort in self.cohorts() for row in cohort.timings()])
        elsewhere = self._told_elsewhere()
        tables = [_without(read_table(p), elsewhere.get(cohort)) for p, cohort in self._files(name)]
        return pa.concat_tables(tables, promote_options="permissive") if tables else pa.table({})

    def _files(self, name: str) -> list[tuple[Path, str]]:
        """The Parquet files of a table, each with the cohort of which it tells."""
        own = ((p, cohort.id) for cohort in self.cohorts() for p in cohort.parts(name))
        return list(own) if name in TABLES else [(p, p.stem) for p in self._row_files(name)]

    def _row_files(self, name: str) -> list[Path]:
        return sorted((self.path / "rows" / name).glob("*.parquet"))

    def has(self, name: str) -> bool:
        """Whether a table has rows."""
        if name in ("runs", "timings"):
            return self.table(name).num_columns > 0
        return self.knows(name) and any(has_columns(path) for path, _ in self._files(name))

    def knows(self, name: str) -> bool:
        """Whether there is a table of this name, with rows or without."""
        return name in self._names()

    def _names(self) -> list[str]:
        measured = {p.name for p in (self.path / "rows").glob("*") if p.is_dir()}
        return [*OWN_TABLES, *sorted(measured)]

    def tables(self) -> list[str]:
        """Names of the tables that have rows."""
        return [name for name in self._names() if self.has(name)]

    def add_rows(self, instrument: str, part: str, table: pa.Table) -> None:
        """Keep what an instrument measured of one cohort (or of all: part "store").

        Raises `Invalid` for a table of the store's own, and for one that holds both kinds of parts.
        """
        if instrument in OWN_TABLES or any((p.stem == "store") != (part == "store") for p in self._row_files(instrument)):
            raise Invalid("table", instrument, "allowed: a name that no other instrument's table has, nor one of the store's own")
        (self.path / "rows" / instrument).mkdir(parents=True, exist_ok=True)
        write_table(self.path / "rows" / instrument / f"{part}.parquet", table)

    def sql(self, query: str) -> pa.Table:
        """Answer a DuckDB query over the tables. Columns with dots need quotes: "optim.lr". Raises `StoreError`."""
        connection = duckdb.connect(config={"enable_external_access": False})
        named = [name for name in self._names() if name.lower() in query.lower()]  # reading the others takes longer than the answer
        tables = {name: self.table(name) for name in named or self._names()}  # none is named: it may ask which there are
        try:
            for name, rows in tables.items():
                if rows.num_columns:
                    connection.register(name, rows)
            return _distinct(connection.sql(query).to_arrow_table())
        except (duckdb.Error, AttributeError) as error:
            reason = str(error).splitlines()[0] if not isinstance(error, AttributeError) else "not a query that returns rows"
            raise StoreError(f"sql: {reason}; tables: {', '.join(self.tables())}") from None
        finally:
            connection.close()


def _distinct(rows: pa.Table) -> pa.Table:
    """Columns of one name, as those of two joined tables, told apart by number: loss, loss_1."""
    names: list[str] = []
    for name in rows.column_names:
        tries = (name if i == 0 else f"{name}_{i}" for i in itertools.count())
        names.append(next(one for one in tries if one not in names and (one == name or one not in rows.column_names)))
    return rows.rename_columns(names)


def _without(rows: pa.Table, runs: set[str] | None) -> pa.Table:
    """Rows of other runs than these."""
    return rows.filter(pc.invert(pc.is_in(rows["run"], pa.array(sorted(runs), pa.string())))) if runs else rows


def label_of(run: Run) -> str | None:
    """A run's label, its fields filled in."""
    return fill(run.label, run) if run.label else None


def _line(slot: int, run: Run) -> dict[str, Any]:
    facts = {"length": run.length, "parameters": parameters(run), "flops_per_step": flops_per_step(run)}
    head = {"run": run.id, "slot": slot, "label": label_of(run), "steps": run.length}
    return {**head, **facts, "code": code_of(run), "spec": specs.to_dict(run)}


def _column(values: list[Any]) -> pa.Array:
    kinds = {type(v) for v in values if v is not None}
    return pa.array(values) if len(kinds) <= 1 or kinds == {int, float} else pa.array([None if v is None else str(v) for v in values])
