"""By how much transitions come later in one group of runs than in another that differs from it in one field."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from elegans.instruments.crossings import Bracket, beyond, difference, shift, verdict

WORDS = ("later", "earlier", "no shift")
ENDS = ("", "_low", "_high")


@dataclasses.dataclass(frozen=True)
class Seen:
    """Where one run's curve is half-way and where it changes, in decades; an infinite end where the record does not reach it."""

    half: Bracket
    change: Bracket

    @property
    def reached(self) -> bool:
        """Whether the transition is within the record."""
        return bool(np.isfinite(self.half).all() and np.isfinite(self.change).all())

    @property
    def told(self) -> bool:
        """Whether anything is known of it."""
        return bool(np.isfinite(self.half).any() and np.isfinite(self.change).any())

    def before(self, other: Seen) -> Seen:
        """By how much it comes before another transition."""
        return Seen(difference(other.half, self.half), difference(other.change, self.change))


def neighbours(groups: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Pairs of groups, from the fields that tell each from others, that differ in one field, and that field: the later one first.

    The fields of a spec of another kind belong to that difference.
    """
    for (one, fields), (other, others) in itertools.combinations(groups.items(), 2):
        differ = [n for n in {**fields, **others} if n not in fields or n not in others or fields[n] != others[n]]
        top = [n for n in differ if not any(n.startswith(f"{parent}.") for parent in differ)]
        if len(top) == 1:
            yield other, one, top[0]


def contrasts(
    curves: Mapping[tuple[str, str], Sequence[Seen | None]], groups: Mapping[str, Mapping[str, Any]], confidence: float, same: float
) -> pa.Table:
    """The table `contrast` of `Transition`, from what was seen of every (group, curve); None is a run of which nothing is known.

    Pairs of too few runs for an interval have no row.
    """
    known = {key: [seen for seen in each if seen is not None] for key, each in curves.items()}
    several = {name: fields for name, fields in groups.items() if any(g == name and len(each) > 1 for (g, _), each in known.items())}
    rows = []
    for group, other, field in neighbours(several):
        for curve in [c for g, c in known if g == group and (other, c) in known]:
            pair = known[group, curve], known[other, curve]
            if beyond(len(pair[0]), len(pair[1]), confidence):
                head = {"curve": curve, "field": field, "group": group, "other": other}
                rows.append(head | _row(*pair, confidence=confidence, same=same))
    return pa.Table.from_pylist(rows, schema=_CONTRAST)


def _row(first: Sequence[Seen], second: Sequence[Seen], confidence: float, same: float) -> dict[str, Any]:
    found = {
        "half": shift([s.half for s in first], [s.half for s in second], confidence),
        "change": shift([s.change for s in first], [s.change for s in second], confidence),
    }
    said = {verdict(low, high, same, WORDS) for _, low, high in found.values()}
    counts = {
        "runs": sum(s.reached for s in first),
        "of": len(first),
        "other_runs": sum(s.reached for s in second),
        "other_of": len(second),
    }
    values = {f"{name}{end}": value for name, each in found.items() for end, value in zip(ENDS, each, strict=True)}
    return counts | values | {"verdict": said.pop() if len(said) == 1 else "undecided"}


_CONTRAST = pa.schema(
    [(n, pa.string()) for n in ("curve", "field", "group", "other")]
    + [(n, pa.int64()) for n in ("runs", "of", "other_runs", "other_of")]
    + [(f"{name}{end}", pa.float64()) for name in ("half", "change") for end in ENDS]
    + [("verdict", pa.string())]
)
