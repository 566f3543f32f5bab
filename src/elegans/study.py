"""A study: runs, instruments and the question they answer.

from runs to rows:  check -> plan -> train -> store -> measure -> report
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from elegans import report, specs
from elegans.driver import Listener, train
from elegans.errors import Invalid, StoreError
from elegans.figures import Drawing, save_paper_figures
from elegans.files import read_json, write_json
from elegans.instruments.base import Instrument, ReplicaInstrument, measure, silent
from elegans.instruments.frontier import key, leading
from elegans.store import Store
from elegans.sweeps import grid
from elegans.tasks.checks import check_custom
from elegans.training.cohort import group, resolve
from elegans.training.convoy import divide
from elegans.training.cost import flops_per_step
from elegans.training.run import SEEDS, Run, unseeded


@dataclasses.dataclass(frozen=True)
class Study:
    """Runs and instruments that answer one question. A `.py` file that defines `study` is run by `elegans run`."""

    runs: Sequence[Run]
    instruments: Sequence[Instrument] = ()
    name: str = "study"
    question: str = ""
    keep: Callable[[Run], bool] | None = None  # which runs belong, after overrides too; none: all
    figures: Drawing | None = None  # draws its store, see `drawing`; none: what can be drawn of any store

    def __post_init__(self) -> None:
        for name, base, such in (("runs", Run, "el.grid(run, {})"), ("instruments", Instrument, "[el.Probe()]")):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, base) for item in value):
                raise Invalid(name, value, f"allowed: a list of elegans.{base.__name__}, such as {such}")
        if self.figures is not None and not callable(self.figures):
            raise Invalid("figures", self.figures, "allowed: a function of a store and a folder, such as el.drawing makes, or None")
        tables = [instrument.table.lower() for instrument in self.instruments]
        for table in tables:
            if tables.count(table) > 1:
                raise Invalid(
                    "instruments", table, "two write one table; give one a name of its own, such as el.Probe(name='second_probe')"
                )

    def override(self, axes: Mapping[str, Sequence[Any]]) -> Study:
        """The study with fields of every run replaced; several values of a field sweep it. Equal runs become one.

        Where one of them goes on from another, the field is replaced in both, but for what a run alone decides (`after`, `after_step`,
        `trained`, `label`). A parent that is no run of the study stays as it is.
        """
        own = {run.id for run in self.runs} if any(run.after is not None for run in self.runs) else set()  # ids of thousands take a second
        made = [new for run in self.runs for new in grid(run, {_lineal(path, run, own): values for path, values in axes.items()})]
        made = [run for run in made if self.keep is None or self.keep(run)]
        if axes and not made:
            raise Invalid("runs", [], f"none of {self.name} is left after {', '.join(axes)}")
        return dataclasses.replace(self, runs=unique(made))

    def within(self, flops: float | None) -> Study:
        """The study without the runs that take more training FLOPs than this, by their own convention. Raises `Invalid`."""
        if flops is None:
            return self
        kept = [run for run in self.runs if (run.flops or run.length * flops_per_step(run)) <= flops]
        if not kept:
            raise Invalid("max-budget", flops, "allowed: at least the FLOPs of the cheapest run")
        return dataclasses.replace(self, runs=kept)

    def best(self, path: str | Path, most: int | None) -> Study:
        """The study with only so many configurations a task and budget: those whose runs in a store have the lowest validation loss.

        They are compared as `scaling` compares them, so that more seeds of them, trained into the same store, change nothing in which
        they are. Raises `Invalid` or `StoreError`.
        """
        if most is None:
            return self
        wanted = leading(Store(path), most)
        kept = [run for run in self.runs if key(specs.to_dict(run)) in wanted]
        if not kept:
            raise Invalid("best", most, f"allowed: where {path} has finished runs of {self.name}, with validation losses")
        return dataclasses.replace(self, runs=kept)

    def asked(self, axes: Mapping[str, Sequence[Any]], flops: float | None, path: str | Path, most: int | None) -> Study:
        """The study overridden, then within so many FLOPs, then the best of it in a store. Raises `Invalid` or `StoreError`.

        Seeds alone are replaced last, in the few runs that are left, and these are the same in the same order: what a run costs and which
        configurations are best does not hang on them.
        """
        if axes.keys() <= set(SEEDS) and all(run.after is None for run in self.runs):  # of a parent that is left out none are replaced
            return self.within(flops).best(path, most).override(axes)
        return self.override(axes).within(flops).best(path, most)

    def share(self, part: int, parts: int) -> Study:
        """One of several parts, counted from 1, that take about equally long: whole structures, unless halves of a costly one are quicker.

        For several devices or machines, each with a store of its own; `elegans archive` and `elegans merge` bring them together.
        Raises `Invalid`.
        """
        if not 1 <= part <= parts:
            raise Invalid("share", f"{part}/{parts}", "allowed: I/N with I from 1 to N, such as 2/4")
        runs = divide(self.runs, parts)[part - 1]
        if not runs:
            raise Invalid("share", f"{part}/{parts}", "allowed: fewer parts, there is no work for so many")
        return dataclasses.replace(self, runs=runs)


def _lineal(path: str, run: Run, own: set[str]) -> str:
    """The axis that replaces a field of a run and of those of its ancestors that are runs of the study."""
    paths = [path]
    parent = None if path.split(".")[0].split("+")[0] in ("after", "after_step", "trained", "label") else run.after
    while parent is not None and parent.id in own:
        paths.append(f"after.{paths[-1]}")
        parent = parent.after
    return "+".join(paths)


def unique(runs: Sequence[Run]) -> list[Run]:
    """The runs without repetitions, in order."""
    return list({run.id: run for run in runs}.values())


# ---- carried out


def run_study(study: Study, path: str | Path, listener: Listener = silent, **options: Any) -> Path:
    """Train what is missing, measure it, write the report; return the report's path. Options are `train`'s.

    A cohort is measured as soon as it has ended, so that what is finished when time is short has its rows. All the while no other
    process may train into the store, measure it or merge; reading it is always possible.
    """
    check_study(study)
    networks = _of_networks(study)
    if networks and not options.get("again"):
        _check_rows(networks, study.runs, Path(path))

    def look() -> None:
        if not networks:
            return
        mine = Store(path).only(study.runs)  # what else is in the store may be nothing that these can measure
        for instrument in networks:
            measure(instrument, mine, listener)
        gc.collect()  # of what that leaves in cycles; where programs compile ahead, Python does not look for it by itself

    def conclude(store: Store) -> None:
        noted = store.path / "study.json"
        before = read_json(noted) if noted.exists() else {}  # an answer written by hand stays
        write_json(noted, before | {"name": study.name, "question": study.question, "own_figures": study.figures is not None})
        look()  # what an earlier call had no time for
        for other in study.instruments:
            if other not in networks:
                with _nothing_yet(store, study.runs):
                    measure(other, store, listener)
        listener("report", store.path)
        report.write(store)

    return train(study.runs, path, listener=listener, ended=look, last=conclude, **options).path / "report.html"


@contextlib.contextmanager
def _nothing_yet(store: Store, runs: Sequence[Run]) -> Iterator[None]:
    """Lets an instrument pass that refuses a store in which none of some runs has ended: time was short."""
    try:
        yield
    except Invalid:
        if any(cohort.status()["finished"] for cohort in store.only(runs).cohorts()):
            raise


def _check_rows(networks: Sequence[ReplicaInstrument], runs: Sequence[Run], path: Path) -> None:
    """Raises `StoreError` where there is more to train and its rows would stand beside others that were measured otherwise, for good."""
    if not (path / "format.json").exists():
        return
    store = Store(path).only(runs)
    finished = {run for cohort in store.cohorts() if cohort.status()["finished"] for run in cohort.ids()}
    for instrument in networks if any(run.id not in finished for run in runs) else ():
        instrument.check_rows(store)


def check_study(study: Study) -> None:
    """Raises `Invalid` for a study without runs, and for an instrument that does not fit them; compiles next to nothing."""
    if not study.runs:
        raise Invalid("runs", [], "a study needs at least one run")
    networks = _of_networks(study)
    if not networks:
        return
    if not any(run.kept_steps for run in study.runs):
        raise Invalid("record.weights", "never", f"{networks[0].kind} measures networks: keep weights, or leave it out")
    check_custom(run.task for run in study.runs)  # instruments ask them for their truth
    structures = group(study.runs)
    for instrument in networks:
        instrument.check_names(resolve(run) for run in study.runs)
        for members in structures:
            instrument.measures(members)


def _of_networks(study: Study) -> list[ReplicaInstrument]:
    return [instrument for instrument in study.instruments if isinstance(instrument, ReplicaInstrument)]


def draw_study(study: Study, path: str | Path, folder: str | Path) -> list[Path]:
    """Draw a study's figures from a store into a folder; return the files.

    Of a store that several studies share only the study's own runs are drawn, with whatever seeds; where it has none of them, as after
    other overrides, all are.
    Raises `Invalid` or `StoreError`, before anything is written, where nothing can be drawn.
    """
    store, folder = Store(path), Path(folder)
    if any(p.exists() and not p.is_dir() for p in (folder, *folder.parents)):
        raise Invalid("folder", str(folder), "allowed: a folder, there already or not")
    own = _drawn(study, store)
    files = (study.figures or save_paper_figures)(store.only(own) if own else store, folder)
    if not files:
        raise StoreError(f"{store.path}: no rows to draw; let runs end first")
    return files


def _drawn(study: Study, store: Store) -> list[Run]:
    """The runs of a store that are a study's but for their seeds, under its labels."""
    labels = {json.dumps(unseeded(specs.flat(specs.to_dict(run))), sort_keys=True): run.label for run in study.runs}
    found = [(line["spec"], json.dumps(unseeded(specs.flat(line["spec"])), sort_keys=True)) for line in store.lines()]
    return [specs.from_dict(Run, spec | {"label": labels[like]}) for spec, like in found if like in labels]
