"""One cohort's folder: what a store keeps of it, read and written. The files are listed in `store.py`."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Float

from elegans import specs
from elegans.errors import StoreError
from elegans.files import file_digest, read_arrays, read_json, read_json_lines, read_table, write_arrays, write_json, write_table
from elegans.sources import Mismatch, code_of, edited
from elegans.training.checkpoint import arrays_to_state, arrays_to_vectors, state_to_arrays, weights_to_arrays
from elegans.training.cohort import Programs, resolve
from elegans.training.convoy import Convoy
from elegans.training.planner import CohortPlan
from elegans.training.run import Run
from elegans.training.step import State
from elegans.training.train import Checkpoint, Compiled, Event, Rows, Weights
from elegans.training.transfer import inherited
from elegans.types import AnyArray

TABLES = ("metrics", "positions")


class Cohort:
    """One cohort's folder."""

    def __init__(self, path: Path):
        self.path, self.id = path, path.name

    def lines(self) -> list[dict[str, Any]]:
        """The lines of spec.json, in slot order."""
        return read_json_lines(self.path / "spec.json")

    def ids(self) -> set[str]:
        """The runs' ids."""
        return set(read_json(self.path / "plan.json", "runs")["runs"])

    def specs(self) -> list[Run]:
        """The runs, in slot order. Custom components must have been imported by the user."""
        return [_run(line) for line in self.lines()]

    def first(self) -> Run:
        """The first run as the engine sees it: its shapes are every run's."""
        return resolve(specs.from_dict(Run, self.lines()[0]["spec"]))

    def convoy(self) -> tuple[str, ...]:
        """The first runs of the cohorts that train in one program with this one, as planned; none: it trains by itself."""
        return tuple(read_json(self.path / "plan.json").get("convoy", ()))

    def plan(self) -> CohortPlan:
        """The stored plan."""
        runs = {line["run"]: _run(line) for line in self.lines()}
        return CohortPlan.from_dict(read_json(self.path / "plan.json"), runs)

    def status(self) -> dict[str, Any]:
        """Step, whether finished, diverged runs with their steps, whether an executable was rebuilt on resume."""
        path = self.path / "status.json"
        none = {"step": 0, "finished": False, "diverged": {}, "recompiled": False}
        return none | (read_json(path) if path.exists() else {})

    def timings(self) -> list[dict[str, Any]]:
        """Wall-clock records: of every session of training, compile and step seconds."""
        path = self.path / "timings.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line) | {"cohort": self.id})
            except json.JSONDecodeError:  # a process was killed while it wrote this line
                continue
        return rows

    def parts(self, table: str) -> list[Path]:
        """Parquet parts of a table, in step order; a finished cohort's are merged into one file."""
        merged = self.path / f"{table}.parquet"
        return [merged] if merged.exists() else sorted(self.path.glob(f"{table}-*.parquet"))

    def tidy(self) -> None:
        """Remove what a finished cohort needs no more: merged parts, files of a write that was cut short."""
        for pattern in (".*.tmp", "parts-*.json", *(f"{table}-*.parquet" for table in TABLES)):
            for path in self.path.glob(pattern):
                path.unlink()

    # ---- weights

    def weight_steps(self) -> list[int]:
        """Steps at which parameters were recorded."""
        return [_step(p) for p in sorted(self.path.glob("weights-*.safetensors"))]

    def weights(self, step: int) -> tuple[list[str], np.ndarray]:
        """Ids of the runs recorded at a step, and their parameters [replica, parameter]."""
        arrays, notes = read_arrays(self.path / f"weights-{step:010d}.safetensors")
        return json.loads(notes["runs"]), arrays_to_vectors(self.first(), arrays)

    def final(self) -> tuple[list[str], np.ndarray]:
        """Ids and final parameters [replica, parameter] of every run that ended."""
        found: dict[str, np.ndarray] = {}
        lines = self.lines()
        for path in sorted(self.path.glob("state-*.safetensors")):
            arrays, _ = read_arrays(path)
            vectors = arrays_to_vectors(self.first(), arrays)
            ended = [(line["run"], v) for line, v in zip(lines, vectors, strict=False) if line["steps"] <= _step(path)]
            found = dict(ended) | found  # the earliest state after a run's end: later ones hold the same weights
        ids = [line["run"] for line in lines if line["run"] in found]
        return ids, np.stack([found[i] for i in ids]) if ids else np.empty((0, 0))

    def has_weights(self) -> bool:
        """Whether parameters are kept: an archive may have brought the rows alone."""
        return any(self.path.glob("*.safetensors"))

    def check_code(self, slot: int = 0) -> None:
        """Raises `StoreError` where a class or a file that a run is made of was edited since it was trained; for one all of a structure."""
        line = self.lines()[slot]
        what = edited(line["code"], code_of(specs.from_dict(Run, line["spec"])))
        if what is not None:
            raise StoreError(str(Mismatch(line["run"], what)))

    def vectors(self, step: int | None) -> dict[str, np.ndarray]:
        """Parameters by run, at a recorded step or (none) at the end of each; empty where none were kept, without diverged runs."""
        if step is not None and step not in self.weight_steps():
            return {}
        ids, vectors = self.final() if step is None else self.weights(step)
        bad = self.status()["diverged"] if step is None else ()
        return {i: v for i, v in zip(ids, vectors, strict=True) if i not in bad}

    # ---- resuming

    def stops(self) -> set[int]:
        """The steps at which runs leave the cohort; the greatest is its end."""
        return {stop for _, stop, _ in read_json(self.path / "plan.json", "segments")["segments"]}

    def passing(self) -> dict[int, Path]:
        """States by step, in order, that are there to resume from alone: none of a run's end, if it keeps its weights."""
        stops = self.stops() if self.first().kept_steps else set()
        return {_step(p): p for p in sorted(self.path.glob("state-*.safetensors")) if _step(p) not in stops}

    def newest_state(self, upto: int | None = None) -> tuple[int, dict[str, np.ndarray]] | None:
        """The newest undamaged checkpoint, up to a step, whose metrics are all there; warns of every one that is passed over."""
        for path in sorted(self.path.glob("state-*.safetensors"), reverse=True):
            if upto is not None and _step(path) > upto:
                continue
            try:
                arrays, _ = read_arrays(path)
                for name, digest in read_json(_parts(path)).items():
                    if not (self.path / name).exists() or file_digest(self.path / name) != digest:
                        raise StoreError(f"{self.path / name}: missing or damaged")
                return _step(path), arrays
            except (StoreError, OSError) as error:
                warnings.warn(f"{error}; the checkpoint before it is used", stacklevel=2)
        return None

    def writer(self, step: int) -> Writer:
        """A writer that goes on from a checkpoint's step: whatever is newer is dropped."""
        return Writer(self, step)


# ---- going on


def inherit_from(
    homes: Mapping[str, Cohort], runs: Sequence[Run], own: Float[np.ndarray, "run parameter"]
) -> Float[np.ndarray, "run parameter"]:
    """What runs start from, of their own initial weights: their parents', by their homes, and NaN where the parent had diverged."""
    read: dict[Any, dict[str, np.ndarray]] = {}
    parents = [parent_of(homes[run.after.id], run, read) for run in runs if run.after is not None]
    nothing = np.full_like(own[0], np.nan)
    return np.stack([nothing if p is None else inherited(run, mine, p) for run, mine, p in zip(runs, own, parents, strict=True)])


def parent_of(cohort: Cohort, run: Run, read: dict[Any, dict[str, np.ndarray]]) -> np.ndarray | None:
    """The weights that a run starts from, None where its parent had diverged; `read` keeps what was read. Raises `StoreError`."""
    assert run.after is not None
    step = None if run.after_step == run.after.length else run.after_step
    if (cohort.id, step) not in read:
        read[cohort.id, step] = cohort.vectors(step)
    found = read[cohort.id, step].get(run.after.id)
    if found is None and run.after.id not in cohort.status()["diverged"]:
        where = f"{run.after.id} at {'its end' if step is None else f'step {step}'}"
        raise StoreError(f"{cohort.path}: no weights of {where}, from which {run.id} goes on; merge an archive made with --weights")
    return found


def resumed(cohorts: Sequence[Cohort], convoy: Convoy, device: jax.Device) -> tuple[int, dict[int, State] | None]:
    """The newest step of which all cohorts of a convoy that have not ended have a checkpoint, and their states; 0 and none: the start.

    Raises `StoreError` where one that had begun has none left.
    """
    left = [i for i, cohort in enumerate(cohorts) if not cohort.status()["finished"]]
    found = {i: cohorts[i].newest_state() for i in left}
    for i in left:
        if found[i] is None and cohorts[i].status()["step"]:
            raise StoreError(f"{cohorts[i].path}: every checkpoint is gone or damaged; start these runs afresh with --again")
    while len(steps := {state[0] if state else 0 for state in found.values()}) > 1:
        found |= {i: cohorts[i].newest_state(min(steps)) for i, state in found.items() if state and state[0] > min(steps)}
    states = {}
    for i, state in found.items():
        if state is not None:
            plan = convoy.plans[i]
            size = next(s.size for s in plan.segments if state[0] <= s.stop)
            like = Programs(plan.runs[:size], device, plan.devices).states_like
            states[i] = arrays_to_state(cohorts[i].first(), state[1], like)
    return min(steps), states or None


def _run(line: dict[str, Any]) -> Run:
    return specs.from_dict(Run, line["spec"] | {"label": line["label"]})


def _step(path: Path) -> int:
    return int(re.findall(r"\d+", path.stem)[-1])


def _parts(state: Path) -> Path:
    """Where the digests of the rows that go with a state are."""
    return state.with_name(f"parts-{_step(state):010d}.json")


class Writer:
    """Writes a cohort's events. Rows reach the disk with the checkpoint that closes them, so that a killed
    process leaves the same files as one that was never stopped."""

    def __init__(self, cohort: Cohort, step: int):
        self.cohort, self.step, self.resumed = cohort, step, step
        self.run, self.lines = cohort.first(), cohort.lines()
        self.stops = cohort.stops()
        self.rows: dict[str, list[dict[str, np.ndarray]]] = {table: [] for table in TABLES}
        for path in cohort.path.glob(".*.tmp"):
            path.unlink()
        for path in [p for pattern in ("*-*.parquet", "parts-*", "state-*", "weights-*") for p in cohort.path.glob(pattern)]:
            if _step(path) > step or (step == 0 and path.suffix == ".parquet"):
                path.unlink()
        self.digests = {p.name: file_digest(p) for table in TABLES for p in cohort.parts(table)}

    def write(self, event: Event, member: int = 0) -> None:
        """Keep of an event what is of this cohort, the so-manieth member of its convoy."""
        if isinstance(event, Rows):
            own = event.members == member
            if own.any():
                self.rows[event.table].append({name: values[own] for name, values in event.columns.items()})
        elif isinstance(event, Weights) and event.member == member:
            arrays = weights_to_arrays(self.run, event.vectors)
            write_arrays(self.cohort.path / f"weights-{event.step:010d}.safetensors", arrays, {"runs": json.dumps(event.runs)})
        elif isinstance(event, Checkpoint) and member in event.members:
            self._checkpoint(event, event.members.index(member))
        elif isinstance(event, Compiled) and event.fresh and event.step == self.resumed and event.step not in {0, *self.stops}:
            self.rebuilt()  # in the middle of a segment: what was trained of it was by another program

    def rebuilt(self) -> None:
        """Note that the cohort goes on with another program than it was planned for."""
        self._update_status(recompiled=True)

    def _checkpoint(self, event: Checkpoint, place: int) -> None:
        step = event.step
        for table, parts in self.rows.items():
            if parts:
                path = self.cohort.path / f"{table}-{self.step:010d}-{step:010d}.parquet"
                write_table(path, _arrow(parts))
                self.digests[path.name] = file_digest(path)
                parts.clear()
        if self.run.kept_steps or step != max(self.stops):  # else nobody needs the last state
            state = self.cohort.path / f"state-{step:010d}.safetensors"
            write_json(_parts(state), self.digests)  # apart from the state, whose bytes do not hang on when others were written
            write_arrays(state, state_to_arrays(self.run, event.split()[place]), {})
        self.step = step
        self.close(event.diverged[place])

    def close(self, diverged: AnyArray) -> None:
        """Bring the folder in order after a checkpoint was written, now or just before the process was killed.

        Of the states to resume from, the newest two stay; those that hold the last state of some run all do.
        """
        passing = list(self.cohort.passing().values())
        finished = self.step == max(self.stops)
        for path in passing if finished else passing[:-2]:
            path.unlink()
            _parts(path).unlink(missing_ok=True)
        now = {self.lines[slot]["run"]: int(at) for slot, at in enumerate(diverged) if at >= 0}
        if finished:
            self._merge()
        self._update_status(step=self.step, finished=finished, diverged=self.cohort.status()["diverged"] | now)
        if finished:
            self.cohort.tidy()

    def _merge(self) -> None:
        """One file for each table. The parts go only when the status says finished, so that no moment is without them."""
        for table in TABLES:
            (self.cohort.path / f"{table}.parquet").unlink(missing_ok=True)
            parts = [read_table(path) for path in self.cohort.parts(table)]
            if parts:
                write_table(self.cohort.path / f"{table}.parquet", pa.concat_tables(parts, promote_options="permissive").combine_chunks())

    def _update_status(self, **changes: Any) -> None:
        write_json(self.cohort.path / "status.json", self.cohort.status() | changes)


def _arrow(parts: list[dict[str, np.ndarray]]) -> pa.Table:
    """Rows as Arrow; NaN becomes null, and columns that some rows lack are null there."""

    def column(name: str, values: np.ndarray) -> pa.Array:
        if name in ("run", "split"):
            return pa.array(values, pa.string())
        if np.issubdtype(values.dtype, np.floating):
            return pa.array(values.astype(np.float32), from_pandas=True)
        return pa.array(values.astype(np.int64))

    tables = [pa.table({name: column(name, values) for name, values in part.items()}) for part in parts]
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()
