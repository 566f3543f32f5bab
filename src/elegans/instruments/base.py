"""What an instrument is: something that reads trained networks, or rows, and yields rows.

Two kinds share one protocol, `rows(store)`:

- a `ReplicaInstrument` is written for ONE network (`apply`) and says what the axes of its answers mean
  (`layouts`); it is run over all replicas of a cohort at once, at every recorded step, and the answers
  become rows with the columns run and step;
- a `StoreInstrument` turns rows that the store already has into others.

Every instrument's docstring gives the unit, the chance level and the ceiling of what it measures.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float

from elegans.errors import Invalid
from elegans.folder import Cohort
from elegans.instruments.noted import Noted, due, in_words, mixture
from elegans.randomness import Purpose, key_for
from elegans.specs import Spec, field, kinds, note, spec
from elegans.store import OWN_TABLES, Store
from elegans.tasks.sampling import TaskData
from elegans.training.cohort import resolve, share, stack
from elegans.training.device import choose, memory_budget
from elegans.training.run import Run
from elegans.training.spread import Spread, devices_for
from elegans.training.step import params_of

AT_ONCE = 64  # networks measured by one program; fewer where memory is short
Blocks = dict[str, dict[str, Float[Array, "..."]]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the arrays of one block mean: columns that are constant, and for every axis the columns of each entry."""

    constant: dict[str, Any]
    axes: Sequence[Sequence[dict[str, Any]]]

    def columns(self) -> dict[str, list[Any]]:
        """One value per entry of a flattened array, by column."""
        rows = [self.constant | {k: v for part in parts for k, v in part.items()} for parts in itertools.product(*self.axes)]
        return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


@spec
class Instrument(Spec):
    """Yields tables of rows for a store. What reads rows by kind, as figures do, reads those of instruments without a name."""

    abstract: ClassVar[bool] = True
    name: str | None = note(None, "its table's name, for several of a kind side by side; none: its kind")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.table.isidentifier() or self.table.lower() in OWN_TABLES:
            raise Invalid("name", self.table, f"allowed: a word of letters, digits and _ that is none of {', '.join(OWN_TABLES)}")
        if self.table != self.kind and self.table in kinds(Instrument):
            raise Invalid("name", self.name, "allowed: a name that is no other instrument's")

    @property
    def table(self) -> str:
        """The name of its rows in a store; tables of a `StoreInstrument` with a name begin with it."""
        return self.kind if self.name is None else self.name

    @abc.abstractmethod
    def rows(self, store: Store, listener: Callable[[str, Any], None]) -> Iterator[tuple[str, str, pa.Table]]:
        """(table, part, rows) for everything in the store that is not measured yet."""


@spec
class ReplicaInstrument(Instrument):
    """An instrument written for one network; the cohort is a transform of it."""

    abstract: ClassVar[bool] = True
    at: Literal["recorded", "final"] = field("recorded", "every recorded step, or the end of each run only")

    @abc.abstractmethod
    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array) -> Blocks:
        """Measure one network: arrays by block and column name. `key` is the run's, the same at every step.

        An instrument with `partners` gets the weights of another network as well, as the keyword `other`.
        """

    @abc.abstractmethod
    def layouts(self, run: Run) -> dict[str, Layout]:
        """What the axes of each block's arrays mean."""

    def named(self, run: Run) -> dict[str, tuple[str, ...]]:
        """By option that names things of a run, all that this run has.

        `layouts` and `apply` leave out what is asked for and this run has not; a name that no run of a store has is an error.
        """
        del run
        return {}

    def split(self, runs: dict[str, Run]) -> list[tuple[ReplicaInstrument, dict[str, Run]]]:
        """The runs of a cohort by what measures them, each a program of its own; those that nothing measures are left out."""
        return [(self, runs)]

    def partners(self, networks: Sequence[tuple[str, int]], runs: dict[str, Run]) -> list[int | None] | None:
        """For every network of the cohort, (run, step), the index of the one that it is measured against.

        An entry is None where there is none (its weights are NaN then), and the whole where the instrument needs no other.
        """
        del networks, runs
        return None

    def finish(self, table: pa.Table) -> pa.Table:
        """Last touch on a cohort's rows, such as a column that compares steps."""
        return table

    def rows(self, store: Store, listener: Callable[[str, Any], None], again: bool = False) -> Iterator[tuple[str, str, pa.Table]]:
        found = due(self, self.table, store, again)
        new = {cohort.id: cohort for cohort in found.new + found.replaced}
        if new:
            self.check_names(c.first() for c in sorted(store.cohorts(), key=lambda c: c.id not in new))
        todo = [new[i] for i in sorted(new) if self._has_some(new[i])]  # every cohort is looked at before the first is measured
        if found.stuck and todo:
            raise mixture(self.table, store, found)
        if said := in_words(self.table, found, bool(todo)):
            listener("note", said)
        for cohort in todo:
            listener("measure", (self.table, cohort.id))
            if tables := list(self._steps(cohort, listener)):
                yield self.table, cohort.id, self.finish(pa.concat_tables(tables, promote_options="permissive"))

    def check_rows(self, store: Store) -> None:
        """Raises `StoreError` where rows of runs to come would stand beside others that were measured otherwise."""
        if (found := due(self, self.table, store)).stuck:
            raise mixture(self.table, store, found)

    def check_names(self, runs: Iterable[Run]) -> None:
        """Raises `Invalid` for a name asked for that none of the runs has; what only some of them lack is missing there."""
        known: dict[str, dict[str, None]] = {}
        lacking: list[tuple[str, str]] = []
        for run in runs:
            known = {option: known.get(option, {}) | dict.fromkeys(names) for option, names in self.named(run).items()}
            lacking = [(option, name) for option, names in known.items() for name in _names(getattr(self, option)) if name not in names]
            if not lacking:
                return
        for option, name in lacking:
            raise Invalid(option, name, f"allowed in this store: {', '.join(known[option])}")

    def _has_some(self, cohort: Cohort) -> bool:
        """Whether there is anything to measure. Raises `Invalid` or `StoreError` for a cohort that cannot be measured."""
        cohort.check_code()
        return self.measures(cohort.specs())

    def measures(self, runs: Sequence[Run]) -> bool:
        """Whether there is anything to measure of runs of one structure. Raises `Invalid` for those that cannot be measured."""
        parts = self.split({run.id: run for run in runs})
        layouts = [layout for one, runs in parts for layout in one.layouts(resolve(next(iter(runs.values())))).values()]
        return any(all(map(len, layout.axes)) for layout in layouts)

    def _steps(self, cohort: Cohort, listener: Callable[[str, Any], None]) -> Iterator[pa.Table]:
        runs = {run.id: run for run in cohort.specs()}
        sound = set(runs) - set(cohort.status()["diverged"])
        steps = cohort.weight_steps() if self.at == "recorded" else []
        ids, vectors = cohort.final()
        lasts = {i: runs[i].length for i in ids}
        networks: list[tuple[str, int, np.ndarray]] = [(i, lasts[i], v) for i, v in zip(ids, vectors, strict=True) if i in sound]
        for step in steps:
            networks += [(i, step, v) for i, v in zip(*cohort.weights(step), strict=True) if i in sound and step != lasts.get(i)]
        yield from self._over(runs, sorted(networks, key=lambda n: (n[1], n[0])), listener)

    def _over(self, runs: dict[str, Run], networks: list[tuple[str, int, np.ndarray]], listener: Callable) -> Iterator[pa.Table]:
        """Networks of one structure."""
        for one, mine in self.split(runs):
            yield from one._alike(mine, [n for n in networks if n[0] in mine], listener)

    def _alike(self, runs: dict[str, Run], networks: list[tuple[str, int, np.ndarray]], listener: Callable) -> Iterator[pa.Table]:
        """Networks that are measured alike, in batches of equal size so that one program measures them all."""
        if not networks:
            return
        first = resolve(next(iter(runs.values())))
        layouts = self.layouts(first)
        partners = self.partners([(i, step) for i, step, _ in networks], runs)
        size, program = min(len(networks), AT_ONCE), None
        start = 0
        while start < len(networks):
            batch = networks[start : start + size]
            stacked, own, data, axes = _stacked(runs, batch + batch[-1:] * (size - len(batch)))
            vectors = own, *_others(networks, partners, start, own)
            if program is None:
                spread = Spread(devices_for(choose(), size), size)
                one = jax.vmap(functools.partial(self._one, layouts), (0, 0, axes), axis_name="replica")
                program = spread.jit(one, (0, 0, axes), 0).lower(stacked, vectors, data).compile()
                memory: Any = program.memory_analysis()
                needed, budget = memory.temp_size_in_bytes + memory.output_size_in_bytes, memory_budget(choose()) // 2
                if needed > budget and size > 1:
                    size, program = max(1, min(size - 1, int(size * budget / needed))), None
                    continue
            blocks = jax.tree.map(np.asarray, program(stacked, vectors, data))
            start += len(batch)
            listener("measured", (start, len(networks)))
            yield from (_table(batch, layouts[name], arrays) for name, arrays in blocks.items())

    def _one(self, layouts: dict[str, Layout], run: Run, vectors: tuple[Float[Array, " parameter"], ...], data: TaskData) -> Blocks:
        params, *other = (params_of(run, v) for v in vectors)
        given = {"other": other[0]} if other else {}
        blocks = self.apply(run, params, data, key_for(run.data_seed, Purpose.INSTRUMENT), **given)
        _check_blocks(self.table, layouts, blocks)
        return blocks


@spec
class StoreInstrument(Instrument):
    """An instrument that reads rows of the store, all at once."""

    abstract: ClassVar[bool] = True

    @abc.abstractmethod
    def tables(self, store: Store) -> dict[str, pa.Table]:
        """New tables by name; a name of the instrument's own is put before each."""

    def rows(self, store: Store, listener: Callable[[str, Any], None]) -> Iterator[tuple[str, str, pa.Table]]:
        listener("measure", (self.table, "the store"))
        prefix = "" if self.name is None else f"{self.name}_"
        yield from ((prefix + name, "store", table) for name, table in self.tables(store).items())


def silent(stage: str, detail: Any) -> None:
    """A listener that shows nothing."""
    del stage, detail


def measure(instrument: Instrument, store: Store, listener: Callable[[str, Any], None] = silent, again: bool = False) -> list[str]:
    """Run an instrument over a store and keep its rows there; return the tables that it wrote.

    What the same instrument measured before is measured again only where `again` asks for it. Rows that were measured with other settings,
    or with code that was edited since, are replaced, and the listener is told; a `name` keeps both. Raises `StoreError` where they
    would stand beside new ones because their weights are not here.
    """
    written, noted = [], Noted.now(instrument).metadata()
    made = instrument.rows(store, listener, again) if isinstance(instrument, ReplicaInstrument) else instrument.rows(store, listener)
    for name, part, table in made:
        store.add_rows(name, part, table.replace_schema_metadata(noted))
        written.append(name)
    return sorted(set(written))


def those(asked: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Of the names asked for those that are known; all of them where none is asked for."""
    return tuple(name for name in asked if name in known) if asked else tuple(known)


def _names(value: str | Sequence[str]) -> Sequence[str]:
    """The names that an option holds."""
    return (value,) if isinstance(value, str) else value


def _stacked(runs: dict[str, Run], networks: Sequence[tuple[str, int, np.ndarray]]) -> tuple[Run, np.ndarray, TaskData, Any]:
    """Specs, parameter vectors and task data of networks, stacked; and which of the data is shared."""
    chosen = [runs[i] for i, _, _ in networks]
    data, axes = share(chosen)
    return stack(chosen), np.stack([vector for _, _, vector in networks]), data, axes


def _others(
    networks: Sequence[tuple[str, int, np.ndarray]],
    partners: list[int | None] | None,
    start: int,
    own: Float[np.ndarray, "network parameter"],
) -> list[Float[np.ndarray, "network parameter"]]:
    """The weights of the partners of a batch that begins at `start`, in the shape of its own: one array, or none."""
    if partners is None:
        return []
    other = np.full_like(own, np.nan)
    for i, j in enumerate(partners[start : start + len(own)]):
        if j is not None:
            other[i] = networks[j][2]
    return [other]


def _check_blocks(name: str, layouts: dict[str, Layout], blocks: Any) -> None:
    """Raises `Invalid` where what `apply` gives for one network is not what `layouts` says."""
    if not isinstance(blocks, dict) or not all(isinstance(arrays, dict) and arrays for arrays in blocks.values()):
        raise Invalid(f"{name}.apply", blocks, "allowed: arrays by block and column, such as {'loss': {'nats': x}}")
    for block, arrays in blocks.items():
        if block not in layouts:
            raise Invalid(f"{name}.apply", block, f"allowed: the blocks of its `layouts`: {', '.join(layouts)}")
        shape = tuple(len(axis) for axis in layouts[block].axes)
        taken = {"run", "step", *layouts[block].columns()}
        for column, array in arrays.items():
            if np.shape(array) != shape:
                raise Invalid(f"{name}.{block}.{column}", np.shape(array), f"allowed: an array of shape {shape}, the axes of its layout")
            if column in taken:
                raise Invalid(f"{name}.{block}", column, f"allowed: a column that is none of {', '.join(sorted(taken))}")
        if bad := {"run", "step"} & {*layouts[block].columns()}:
            raise Invalid(f"{name}.{block}", bad.pop(), "allowed: another name; the columns run and step are there already")


def _table(batch: Sequence[tuple[str, int, np.ndarray]], layout: Layout, arrays: dict[str, np.ndarray]) -> pa.Table:
    """Rows of a batch of networks: arrays [network, *axes]. Rows whose every value is missing are left out."""
    columns = layout.columns()
    count = math.prod(map(len, layout.axes))
    n = len(batch)
    table: dict[str, Any] = {
        "run": np.repeat([i for i, _, _ in batch], count),
        "step": np.repeat([s for _, s, _ in batch], count),
        **{name: values * n for name, values in columns.items()},
        **{name: pa.array(a[:n].reshape(-1).astype(np.float32), from_pandas=True) for name, a in arrays.items()},
    }
    known = np.any([~np.isnan(a[:n].reshape(-1)) for a in arrays.values()], axis=0)
    return pa.table(table).filter(known)
