"""What is noted with an instrument's rows: the settings and the code that they were measured with.

A table holds rows of one instrument with one setting, so that its rows can be averaged. What a cohort's rows are of is in
the metadata of their file: `instrument`, the identity of its settings, and `code`, fingerprints of the user's classes and files.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from elegans.errors import StoreError
from elegans.files import read_notes
from elegans.folder import Cohort
from elegans.sources import code_of, edited
from elegans.specs import Spec, identity
from elegans.store import Store


@dataclasses.dataclass(frozen=True)
class Noted:
    """What rows were measured with."""

    settings: str  # identity of the instrument; a name is no part of it
    code: dict[str, Any] | None  # fingerprints as in `sources`; none: unknown, rows of an elegans that did not note it

    @classmethod
    def now(cls, instrument: Spec) -> Noted:
        """What an instrument would measure with today."""
        return cls(identity(instrument), {name: digests for name, digests in code_of(instrument).items() if name != "numerics"})

    @classmethod
    def read(cls, rows: Path) -> Noted:
        """What the rows of a file were measured with."""
        found = read_notes(rows)
        return cls(found.get("instrument", ""), json.loads(found["code"]) if "code" in found else None)

    def metadata(self) -> dict[str, str]:
        """As it is noted in the file."""
        return {"instrument": self.settings, "code": json.dumps(self.code, sort_keys=True)}

    def other(self, today: Noted) -> str | None:
        """What of today's is not what these rows were measured with, in words; none where nothing is known to differ."""
        if self.settings != today.settings:
            return "other settings"
        what = None if self.code is None or today.code is None else edited(self.code, today.code) or edited(today.code, self.code)
        return what and f"another {what}"


class Due(NamedTuple):
    """The finished cohorts of a store that an instrument has something to do with, by id; those to be measured have weights."""

    new: list[Cohort]  # without rows, or to be measured again because that was asked for
    replaced: list[Cohort]  # with rows that were measured otherwise
    stuck: list[Cohort]  # with such rows, and without weights to measure them again
    why: str | None  # what was otherwise, of one of them


def due(instrument: Spec, table: str, store: Store, again: bool = False) -> Due:
    """What there is to measure for a table; with `again` also what is measured already."""
    now, found = Noted.now(instrument), Due([], [], [], None)
    for cohort in (c for c in store.cohorts() if c.status()["finished"]):
        rows = store.path / "rows" / table / f"{cohort.id}.parquet"
        other = Noted.read(rows).other(now) if rows.exists() else None
        if other is not None:
            (found.replaced if cohort.has_weights() else found.stuck).append(cohort)
            found = found._replace(why=other)
        elif (again or not rows.exists()) and cohort.has_weights():
            found.new.append(cohort)
    return found


def mixture(table: str, store: Store, found: Due) -> StoreError:
    """The error of rows that would come beside others, measured otherwise, that cannot be measured again."""
    return StoreError(
        f"{store.path}: rows of {table} ({len(found.stuck)} cohorts) were measured with {found.why}, and without their weights that cannot "
        f"be done again; give this instrument another name, as name=..., or use another store"
    )


def in_words(table: str, found: Due, measured: bool) -> str | None:
    """What happens to rows that were measured otherwise, if there are some; `measured` says whether there is anything to measure."""
    if found.stuck:
        return f"rows of {table} ({len(found.stuck)} cohorts) stay as they were measured, with {found.why}: their weights are not here"
    if found.replaced and measured:
        keep = "; another name, as name=..., would keep both" if found.why == "other settings" else ""
        return f"rows of {table} ({len(found.replaced)} cohorts) were measured with {found.why}, and are replaced{keep}"
    return None
