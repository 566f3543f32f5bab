"""The frontier: at every training budget the configuration that is best on validation rows, and the runs that say how good it is."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from elegans import specs
from elegans.randomness import stable_hash
from elegans.specs import identity
from elegans.store import Store
from elegans.tasks import Task
from elegans.training.run import LENGTHS, is_seed, unseeded

FINAL = """select run, split, arg_max(loss, step) as loss, arg_max(exact_match, step) as exact_match
from metrics group by run, split order by run, split"""  # the last scores that are not null
FEWEST = 3  # seeds at every budget, below which nothing is called sure


@dataclasses.dataclass(frozen=True)
class Ended:
    """One finished run: its budget in FLOPs, its last scores, its seeds, its model and all its fields but seeds and lengths (JSON)."""

    task: str
    flops: float
    configuration: str  # what tables show of the fields
    run: str
    validation: float
    test: float
    exact_match: float
    seeds: str
    model: str = ""
    fields: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A configuration at one budget: its runs of the seeds by which configurations are compared there, and those of its other seeds."""

    compared: Sequence[Ended]
    others: Sequence[Ended]

    @property
    def reported(self) -> list[Ended]:
        """The other seeds, where they are enough to say how sure they are; else all."""
        return [*([] if self.seeded else self.compared), *self.others]

    @property
    def seeded(self) -> bool:
        """Whether it has enough seeds besides those by which it was compared."""
        return len(self.others) >= FEWEST

    def redrawn(self, rng: np.random.Generator) -> Candidate:
        """Its seeds drawn again, with replacement, those of either kind among themselves."""
        return Candidate(*([runs[i] for i in rng.integers(len(runs), size=len(runs))] for runs in (self.compared, self.others)))


def validation(runs: Sequence[Ended]) -> float:
    """Mean loss on the rows that choose."""
    return float(np.mean([r.validation for r in runs]))


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """From the lowest validation loss of the compared seeds."""
    return sorted(candidates, key=lambda candidate: validation(candidate.compared))


def chosen(candidates: Sequence[Candidate]) -> Candidate:
    """The first; or, of as many of the first as have enough other seeds, the best by those."""
    found = ranked(candidates)
    final = list(itertools.takewhile(lambda candidate: candidate.seeded, found))
    return min(final, key=lambda candidate: validation(candidate.others)) if final else found[0]


def by_budget(ended: Sequence[Ended]) -> dict[float, list[Candidate]]:
    """The candidates at each budget, ascending.

    Compared are the configurations that have the seed that most have, by all seeds that each of them has: more seeds of some of them, run
    later, change nobody's place.
    """
    found: dict[float, dict[str, dict[str, Ended]]] = {}  # budget to configuration to seed
    for run in sorted(ended, key=lambda e: (e.flops, e.configuration, e.run)):
        found.setdefault(run.flops, {}).setdefault(run.configuration + run.fields, {})[run.seeds] = run
    return {flops: _candidates(list(configurations.values())) for flops, configurations in found.items()}


def _candidates(configurations: list[dict[str, Ended]]) -> list[Candidate]:
    having = Counter(seed for runs in configurations for seed in runs)
    most = max(sorted(having), key=lambda seed: having[seed])
    with_it = [runs for runs in configurations if most in runs]
    shared = set.intersection(*(set(runs) for runs in with_it))
    parts = ([[r for s, r in runs.items() if (s in shared) is kind] for kind in (True, False)] for runs in with_it)
    return [Candidate(*part) for part in parts]


def ended_runs(store: Store) -> tuple[list[Ended], dict[str, Task]]:
    """Finished runs with their last scores, and their tasks by name.

    One of those that differ in nothing but what they record: they are one training, not two seeds. It is one that kept weights, if there
    is such a one, since only these can be probed.
    """
    return _ended(store, store.lines())


def _ended(store: Store, lines: list[dict[str, Any]]) -> tuple[list[Ended], dict[str, Task]]:
    scores: dict[str, dict[str, tuple[float, float]]] = {}
    for row in store.sql(FINAL).to_pylist() if store.has("metrics") else []:
        if row["loss"] is not None:
            scores.setdefault(row["run"], {})[row["split"]] = (row["loss"], row["exact_match"])
    ended: dict[tuple[str, float, str, str], tuple[bool, Ended]] = {}  # by all that a training is; whether weights are missing
    tasks: dict[str, Task] = {}
    read: dict[str, Task] = {}
    diverged = {run for cohort in store.cohorts() for run in cohort.status()["diverged"]}
    lost: set[tuple[str, float, str]] = set()  # configurations that diverged
    for line in lines:
        found = scores.get(line["run"], {})
        said = json.dumps(line["spec"]["task"])  # thousands of runs say the same
        if said not in read:
            read[said] = specs.from_dict(Task, line["spec"]["task"])
        task = read[said]
        name = task.kind if tasks.setdefault(task.kind, task) == task else f"{task.kind} {identity(task)}"
        tasks[name] = task
        budget = line["spec"].get("flops") or line["length"] * line["flops_per_step"]
        given = specs.flat(line["spec"])
        fields = _configuration(given)
        every = json.dumps({k: v for k, v in fields.items() if k not in LENGTHS}, sort_keys=True)
        if line["run"] in diverged:
            lost.add((name, budget, every))
        elif {"validation", "test"} <= set(found):
            scored = (found["validation"][0], *found["test"])
            model = json.dumps(line["spec"]["model"], sort_keys=True)
            seeds = json.dumps({k: v for k, v in given.items() if is_seed(k)}, sort_keys=True)
            one = Ended(name, budget, _shown(fields), line["run"], *scored, seeds, model, every)
            run = line["spec"]["record"].get("weights") is None, one
            ended[name, budget, every, seeds] = min(run, ended.get((name, budget, every, seeds), run), key=lambda r: (r[0], r[1].run))
    kept = [e for _, e in ended.values() if (e.task, e.flops, e.fields) not in lost]
    return kept, {name: task for name, task in tasks.items() if any(e.task == name for e in kept)}


def leading(store: Store, most: int) -> set[str]:
    """The first so many configurations of every task and budget, see `key`."""
    lines = store.lines()
    ended, tasks = _ended(store, lines)
    specs_of = {line["run"]: line["spec"] for line in lines}
    found = [by_budget([e for e in ended if e.task == name]).values() for name in tasks]
    best = [c.compared[0].run for budgets in found for candidates in budgets for c in ranked(candidates)[:most]]
    return {key(specs_of[run]) for run in best}


def key(spec: dict[str, Any]) -> str:
    """Equal of runs of one configuration at one budget."""
    return json.dumps(_configuration(specs.flat(spec)), sort_keys=True)


def _configuration(fields: dict[str, Any]) -> dict[str, Any]:
    """Of a run's dotted fields those but for seeds and what is recorded: one configuration at one budget."""
    return {k: v for k, v in unseeded(fields).items() if not k.startswith("record")}


def _shown(fields: dict[str, Any]) -> str:
    """A configuration in short, for people: others may be shown alike."""
    named = ("model.d_model", "model.layers", "batch", "optim.lr")
    label = " ".join(f"{k.rpartition('.')[2]}={fields[k]:g}" for k in named if isinstance(fields.get(k), (int, float)))
    other = json.dumps({k: v for k, v in fields.items() if k not in named and k not in LENGTHS}, sort_keys=True)
    return f"{label} {stable_hash(other) % 16**4:04x}"
