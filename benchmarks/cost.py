"""What a store's training took: runs an hour, seconds of steps, of waiting for the compiler and of the rest, and FLOP/s by size.

    python benchmarks/cost.py runs/quiet_features
    python benchmarks/cost.py piece/1 piece/2 --together 2      # two processes on each device: an hour of it is two of theirs

Seconds are those of processes, from the first event of a convoy to its last; what a process does before the first and between two is in
none of them. FLOPs are of runs that had not ended yet, by the runs' own convention; seconds are predicted by the rates that plan a grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow as pa

from elegans.files import read_json
from elegans.store import Store
from elegans.training.convoy import Convoy, gather
from elegans.training.cost import rates_of

PIECES = """with pieces as (
  select cohort, from_step as start, from_step + steps as stop, training, compiling, seconds from timings)
select "model.d_model" as d_model, "model.layers" as layers, batch, count(distinct cohort) as cohorts,
  sum(ended)::bigint as runs, sum(training) as training, sum(compiling) as compiling, sum(seconds) as seconds, sum(flops) as flops
from (select p.cohort, any_value(r."model.d_model") as "model.d_model", any_value(r."model.layers") as "model.layers",
    any_value(r.batch) as batch, any_value(training) as training, any_value(compiling) as compiling, any_value(seconds) as seconds,
    count(*) filter (r.length > p.start and r.length <= p.stop) as ended,
    sum(r.flops_per_step * greatest(0, least(r.length, p.stop) - p.start)) as flops
  from pieces p join runs r on p.cohort = r.cohort group by p.cohort, p.start, p.stop)
group by all order by all"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--together", type=int, default=1, help="processes that shared a device")
    return parser.parse_args()


def predicted(store: Store, platform: str) -> dict[tuple, float]:
    """Seconds that the steps taken should have taken, by d_model, layers and batch."""
    rates, found, held = rates_of(platform), {}, store.cohorts()
    for members in gather([cohort.convoy() for cohort in held]):
        cohorts = [held[i] for i in members]
        convoy = Convoy(tuple(cohort.plan() for cohort in cohorts))
        taken = sorted({(row["from_step"], row["from_step"] + row["steps"]) for cohort in cohorts for row in cohort.timings()})
        run = convoy.runs[0]
        key = getattr(run.model, "d_model", None), getattr(run.model, "layers", None), run.batch
        loads = [plan.runs[0] for plan in convoy.plans]
        for start, stop in taken:
            spent = (
                max(0, min(leg.stop, stop) - max(leg.start, start)) * rates.step(zip(loads, leg.sizes, strict=True)) for leg in convoy.legs
            )
            found[key] = found.get(key, 0.0) + sum(spent)
    return found


def main() -> None:
    asked = parse()
    stores = [Store(path) for path in asked.stores]
    rows = pa.concat_tables([store.sql(PIECES) for store in stores]).to_pylist()
    platforms = {read_json(cohort.path / "provenance.json")["device"]["platform"] for store in stores for cohort in store.cohorts()}
    should: dict[tuple, float] = {}
    for store in stores:
        for key, spent in predicted(store, min(platforms)).items():
            should[key] = should.get(key, 0.0) + spent
    print(
        "| d_model, layers, batch | cohorts | runs ended | steps, s | predicted | waiting, s | rest, s | model FLOP/s |\n|---|" + "---|" * 7
    )
    sizes = sorted({(row["d_model"], row["layers"], row["batch"]) for row in rows}, key=str)
    for key in sizes:
        _print(", ".join(map(str, key)), [r for r in rows if (r["d_model"], r["layers"], r["batch"]) == key], should.get(key, 0.0))
    _print("all", rows, sum(should.values()))
    hours = sum(row["seconds"] for row in rows) / 3600 / asked.together
    ended = sum(row["runs"] for row in rows)
    print(f"\n{ended / hours:,.0f} runs per hour of a device ({', '.join(sorted(platforms))}), {hours:.3f} hours of it")


def _print(name: str, rows: list[dict], should: float) -> None:
    of = {n: sum(row[n] for row in rows) for n in ("cohorts", "runs", "training", "compiling", "seconds", "flops")}
    rest = of["seconds"] - of["training"] - of["compiling"]
    shares = [f"{of[n]:,.0f} ({100 * of[n] / of['seconds']:.0f} %)" for n in ("training", "compiling")]
    parts = [f"{of['cohorts']:,.0f}", f"{of['runs']:,.0f}", shares[0], f"{should:,.0f}", shares[1], f"{rest:,.0f}"]
    print(f"| {name} | {' | '.join(parts)} | {of['flops'] / of['training']:.1e} |".replace("e+", "e"))


if __name__ == "__main__":
    main()
