"""The tables that the command line prints, as Arrow tables or plain data."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pyarrow as pa
import pyarrow.csv

from elegans import specs
from elegans.driver import Work
from elegans.errors import Invalid, StoreError
from elegans.files import write_arrays, write_json
from elegans.instruments import Instrument
from elegans.instruments import measure as measure_rows
from elegans.instruments.base import ReplicaInstrument
from elegans.instruments.frontier import FINAL
from elegans.models import Transformer
from elegans.randomness import Purpose, key_for
from elegans.specs import find_kind, kinds
from elegans.store import Store
from elegans.sweeps import grid, replace_all
from elegans.tasks import Addition, Task
from elegans.tasks.base import PARTS
from elegans.tasks.checks import check_rows, check_task
from elegans.training import Run
from elegans.training.checkpoint import WEIGHTS, weights_to_arrays
from elegans.training.cohort import CHUNK, Programs, resolve
from elegans.training.convoy import Convoy, gather
from elegans.training.cost import rates_of
from elegans.training.device import choose
from elegans.training.planner import CohortPlan
from elegans.training.run import differing

# ---- tasks


def task_rows() -> pa.Table:
    """Name, fields with their defaults, and first line of every task."""
    rows = []
    for kind in kinds(Task):
        cls = find_kind(Task, kind)
        fields = ", ".join(f"{i.name}={_default(i.default)}" for i in cls.infos.values())
        rows.append({"name": kind, "what": (inspect.getdoc(cls) or "").split("\n")[0], "fields": fields})
    return pa.Table.from_pylist(rows)


def _default(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_default, value))}]"
    return value.kind if isinstance(value, specs.Spec) else "none" if value is None else str(value).lower()


def make_task(kind: str, overrides: Mapping[str, Sequence[Any]]) -> Task:
    """A task by name with fields replaced. Raises `Invalid`."""
    try:
        task: Task = specs.from_dict(Task, {"kind": kind})
    except Invalid as error:
        raise Invalid("task", kind, error.allowed) from None if error.field == "kind" else error
    return replace_all(task, {path: _single(task, path, values) for path, values in overrides.items()})


def _single(spec: specs.Spec, path: str, values: Sequence[Any]) -> Any:
    """One value of an override: a list where the field holds one."""
    name = path.split(".")[0]
    listing = "." not in path and name in spec.infos and any(getattr(t, "__origin__", None) is tuple for t in spec.infos[name].types)
    if listing:
        return values[0] if len(values) == 1 and isinstance(values[0], list) else list(values)
    if len(values) != 1:
        raise Invalid(path, ",".join(map(str, values)), "allowed here: one value")
    return values[0]


def describe_task(kind: str, overrides: Mapping[str, Sequence[Any]], examples: int, seed: int, check: bool = False) -> dict[str, Any]:
    """What there is to know of a task, with examples and, if asked, what was found of it by `check_task`: plain data. Raises `Invalid`."""
    task = make_task(kind, overrides)
    checks = {"checks": check_task(task, seed=seed).figures} if check else {}
    keys = jax.random.split(key_for(seed, Purpose.DATA), max(1, examples))
    rows = jax.device_get(jax.jit(jax.vmap(lambda k, data: task.sample(k, data), (0, None)))(keys, task.prepare()))
    check_rows(task, rows)
    shown = [jax.tree.map(lambda a, i=i: a[i], rows) for i in range(examples)]
    return {
        "name": task.kind,
        "fields": {k: v for k, v in specs.to_dict(task).items() if k != "kind"},
        "vocab_size": task.vocab_size,
        "vocab": list(task.symbols),
        "length": task.positions,
        "scored_tokens": task.scored_tokens(),
        "floor": task.floor(),
        "plateau": task.plateau(),
        "contents": task.contents,
        "parts": _parts(task),
        "truth": sorted(rows.truth),
        "examples": [
            {
                "text": task.text(e.tokens),
                "tokens": e.tokens.tolist(),
                "scored": e.scored.tolist(),
                "truth": {n: {"kind": t.kind, "values": t.values.tolist(), "positions": t.positions.tolist()} for n, t in e.truth.items()},
            }
            for e in shown
        ],
        **checks,
    }


def _parts(task: Task) -> list[dict[str, Any]] | None:
    """Contents of each part of the split; None where the task cannot be split as it says, which a run of it refuses."""
    try:
        return task.part_sizes()
    except Invalid:
        return None


def _part_lines(found: dict[str, Any]) -> list[str]:
    """A line of text for every row of `parts`."""
    lines = []
    for row in found["parts"] or []:
        of = " ".join([row.get("task", ""), "" if row["length"] is None else f"length {row['length']}"]).strip()
        lines.append(f"contents{of and ' of '}{of}: {', '.join(f'{row[part]} {part}' for part in PARTS)}")
    return lines


def draw_task(found: dict[str, Any]) -> str:
    """The description as text: each example with its scored tokens and truth lined up under it."""
    nats = {k: "unknown" if found[k] is None else f"{found[k]:.4f} nats" for k in ("floor", "plateau")}
    lines = [
        f"{found['name']}  vocabulary {found['vocab_size']}: {' '.join(found['vocab'])}",
        f"{found['length']} tokens, {found['scored_tokens']:g} scored; floor {nats['floor']}, plateau {nats['plateau']} per scored token",
        *_part_lines(found),
    ]
    for example in found["examples"]:
        cells = [found["vocab"][t] for t in example["tokens"]]
        truths = {name: _by_place(truth) for name, truth in example["truth"].items()}
        width = max(map(len, [*cells, *(text for at in truths.values() for text in at.values())])) + 1
        indent = max([len("scored"), *map(len, example["truth"])]) + 2
        lines += ["", " " * indent + "".join(c.ljust(width) for c in cells)]
        lines.append("scored".ljust(indent) + "".join(("." if s else "").ljust(width) for s in example["scored"]))
        lines += [name.ljust(indent) + "".join(at.get(p, "").ljust(width) for p in range(len(cells))) for name, at in truths.items()]
    return "\n".join(line.rstrip() for line in lines)


def _by_place(truth: Mapping[str, Any]) -> dict[int, str]:
    """The values of a truth, by the position where each is read, several labels as 0110."""
    pairs = zip(truth["positions"], truth["values"], strict=True)
    return {p: "".join(map(str, v)) if isinstance(v, list) else f"{v:g}" for p, v in pairs if p >= 0}


# ---- plans and runs


def plan_rows(work: Work) -> pa.Table:
    """A row per cohort to train, and one for all: runs, structures, sizes, bytes, FLOPs, rough time."""
    waiting = [(c.id, c.plan(), c.status()["step"]) for c in work.stored if not c.status()["finished"]] + [(p.id, p, 0) for p in work.new]
    took = _seconds([plan for _, plan, _ in waiting], [step for *_, step in waiting], work.device.platform)
    rows = [_plan_row(name, plan, step, spent) for (name, plan, step), spent in zip(waiting, took, strict=True)]
    structures = len({jax.tree.structure(resolve(plan.runs[0])) for _, plan, _ in waiting})
    total = {k: sum(row[k] for row in rows) for k in ("runs", "steps", "flops", "seconds")}
    total |= {
        "cohort": "all",
        "sizes": f"{len(rows)} cohorts",
        "structures": structures,
        "bytes": max([r["bytes"] for r in rows], default=0),
    }
    finished = sum(c.status()["finished"] for c in work.stored)
    names = ("cohort", "structures", "runs", "sizes", "steps", "bytes", "flops", "seconds")
    return pa.Table.from_pylist([{n: row[n] for n in names} for row in [*rows, total]]).append_column(
        "finished", pa.array([None] * len(rows) + [finished], pa.int64())
    )


def _seconds(plans: list[CohortPlan], steps: list[int], platform: str) -> list[float]:
    """Rough seconds of each cohort, those that train together in equal parts."""
    took = [0.0] * len(plans)
    for members in gather([plan.convoy for plan in plans]):
        spent = Convoy(tuple(plans[i] for i in members)).seconds(rates_of(platform), min(steps[i] for i in members))
        for i in members:
            took[i] = spent / len(members)
    return took


def _plan_row(name: str, plan: CohortPlan, step: int, took: float) -> dict[str, Any]:
    sizes = " > ".join(f"{s.size} to {s.stop}" for s in plan.segments)
    row = {"cohort": name, "structures": 1, "runs": len(plan.runs), "sizes": sizes, "steps": plan.steps - step}
    return row | {"bytes": plan.bytes, "flops": plan.flops, "seconds": round(took, 1)}


def run_rows(store: Store) -> pa.Table:
    """A row per run: state, the step of its last row of metrics, length, the fields that differ, last validation and test scores."""
    runs = store.runs()
    if not runs.num_rows:
        return runs
    heads = ["run", "cohort", "label", "state", "diverged_at", "length", "parameters", "flops_per_step"]
    differ = differing(runs.drop_columns(heads).to_pylist())
    if not store.has("metrics"):
        return runs.select(["run", "label", "state", "length", *differ])
    picked = ["r.run", "r.label", "r.state", "r.diverged_at", "now.step", *(f'r."{name}"' for name in ("length", *differ))]
    picked += [
        f"{part}.{of} as {part}_{name}" for part in ("validation", "test") for of, name in (("loss", "loss"), ("exact_match", "exact"))
    ]
    now = "left join (select run, max(step) as step from metrics group by run) now on now.run = r.run"
    joined = " ".join(f"left join last {part} on {part}.run = r.run and {part}.split = '{part}'" for part in ("validation", "test"))
    return store.sql(f"with last as ({FINAL}) select {', '.join(picked)} from runs r {now} {joined} order by r.label, r.run")


def run_summary(folder: Path, page: Path) -> pa.Table:
    """One row: what a finished command leaves behind."""
    store = Store(folder)
    states = store.runs()["state"].to_pylist()
    tests = store.sql("select exact_match from metrics where split = 'test'")["exact_match"].to_pylist() if store.has("metrics") else []
    counts = {s: states.count(s) for s in ("finished", "diverged", "unfinished")}
    learned = sum(x is not None and x > 0.95 for x in tests)
    return pa.Table.from_pylist([{"store": str(folder), **counts, "exact_match_above_0.95": learned, "report": str(page.resolve())}])


# ---- instruments, export, bench


def measure_store(
    kind: str, folder: Path, overrides: Mapping[str, Sequence[Any]], listener: Callable[[str, Any], None], again: bool = False
) -> pa.Table:
    """Measure a store with an instrument by name; a row per table written."""
    store = Store(folder)
    try:
        instrument: Instrument = specs.from_dict(Instrument, {"kind": kind})
    except Invalid as error:
        raise Invalid("instrument", kind, error.allowed) from None
    instrument = replace_all(instrument, {path: _single(instrument, path, values) for path, values in overrides.items()})
    with store.lock():
        names = measure_rows(instrument, store, listener, again)
    if not names and isinstance(instrument, ReplicaInstrument) and (again or not store.has(instrument.table)):
        raise StoreError(f"{folder}: no weights of a finished run to measure; train here, or merge an archive made with --weights")
    shown = names or [instrument.table]
    rows = [{"table": n, "rows": store.table(n).num_rows if store.has(n) else 0, "measured_now": n in names} for n in shown]
    return pa.Table.from_pylist(rows)


def export_run(store: Store, run: str, folder: Path) -> Path:
    """Write one run's final weights, spec and metrics as plain files into a new or empty folder; return it. Raises `Invalid`."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Invalid("folder", str(folder), "allowed: a new or an empty folder")
    cohort, line = store.find(run)
    vectors = cohort.vectors(None)
    if line["run"] not in vectors:
        raise Invalid("run", run, "it has no final weights to export: unfinished, diverged, or of an archive made without --weights")
    folder.mkdir(parents=True, exist_ok=True)
    arrays = weights_to_arrays(cohort.first(), vectors[line["run"]][None])
    plain = {name.removeprefix(WEIGHTS): a[0] for name, a in arrays.items()}
    write_arrays(folder / "weights.safetensors", plain, {"run": line["run"]})
    write_json(folder / "spec.json", {k: line[k] for k in ("run", "label", "length", "parameters", "code", "spec")})
    rows = store.sql(f"select * from metrics where run = '{line['run']}' order by step, split")
    pyarrow.csv.write_csv(rows, folder / "metrics.csv")
    return folder.resolve()


def bench_rows(d_model: int, layers: int, batch: int, replicas: str, dtype: str, seconds: float, device: str | None) -> pa.Table:
    """Steps per second of cohorts of several sizes, and the time to the first step."""
    if not all(part.strip().isdigit() and int(part) > 0 for part in replicas.split(",")):
        raise Invalid("replicas", replicas, "allowed: whole numbers above 0, such as 1,8")
    if not 0 < seconds < math.inf:
        raise Invalid("seconds", seconds, "allowed: a finite number above 0")
    model = specs.from_dict(Transformer, {"kind": "transformer", "d_model": d_model, "layers": layers, "dtype": dtype})
    run = Run(Addition(), model, batch=batch, steps=2**30)
    chosen = choose(device)
    return pa.Table.from_pylist([_bench(grid(run, {"seed": range(int(n))}), chosen, seconds) for n in replicas.split(",")])


def _bench(runs: list[Run], device: Any, seconds: float) -> dict[str, Any]:
    began = time.perf_counter()
    programs = Programs(runs, device)
    states, _ = programs.chunk(programs.start(), 0, 1)
    first = time.perf_counter() - began
    step, n, took = 1, 1, 0.0
    while took < seconds:
        began = time.perf_counter()
        states, _ = programs.chunk(states, step, n)
        spent = time.perf_counter() - began
        step, took = step + n, took + spent
        n = max(1, min(CHUNK, int(n * 0.25 * seconds / max(spent, 1e-6))))
    speed = (step - 1) / took
    flops = runs[0].flops_per_step * len(runs) * speed
    row = {"device": device.device_kind, "replicas": len(runs), "steps_per_s": speed, "replica_steps_per_s": speed * len(runs)}
    return row | {"model_flops_per_s": flops, "first_step_s": first, "gib": programs.bytes() / 2**30}
