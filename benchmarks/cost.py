"""What a store's training took: runs an hour, seconds of steps, of waiting for the compiler and of the rest, and FLOP/s by size.

    python benchmarks/cost.py runs/quiet_features
    python benchmarks/cost.py piece/1 piece/2 --together 2      # two processes on each device: an hour of it is two of theirs

Seconds are those of processes, from the first event of a convoy to its last; what a process does before the first and between two is in
none of them. FLOPs are of runs that had not ended yet, by the runs' own convention; seconds are predicted by the rates that plan a grid.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from elegans.files import read_json
from elegans.folder import Cohort
from elegans.store import Store
from elegans.training.convoy import Convoy, gather
from elegans.training.cost import flops_per_step, rates_of

HEAD = "| d_model, layers, batch | cohorts | runs ended | steps, s | predicted | waiting, s | rest, s | model FLOP/s |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", type=Path)
    parser.add_argument("--together", type=int, default=1, help="processes that shared a device")
    return parser.parse_args()


def cost(cohorts: list[Cohort]) -> Counter[str]:
    """What cohorts of a convoy took, and what their steps should have taken.

    A cohort's timings are its equal part of the convoy's, which goes on until the last of its runs has ended.
    """
    convoy, rates = Convoy(tuple(cohort.plan() for cohort in cohorts)), rates_of(platform(cohorts[0]))
    loads = [plan.runs[0] for plan in convoy.plans]
    found: Counter[str] = Counter()
    stops: Counter[int] = Counter()  # of each beginning, the last step that was taken
    for cohort, plan in zip(cohorts, convoy.plans, strict=True):
        timings = cohort.timings()
        found["cohorts"] += len(timings) > 0
        for row in timings:
            start, stop = row["from_step"], row["from_step"] + row["steps"]
            stops[start] = max(stops[start], stop)
            found.update({name: row[name] for name in ("training", "compiling", "seconds")})
            found["runs"] += sum(start < run.length <= stop for run in plan.runs)
            found["flops"] += sum(flops_per_step(run) * max(0, min(run.length, stop) - start) for run in plan.runs)
    for start, stop in stops.items():
        taken = [(max(0, min(leg.stop, stop) - max(leg.start, start)), leg.sizes) for leg in convoy.legs]
        found["predicted"] += sum(steps * rates.step(zip(loads, sizes, strict=True)) for steps, sizes in taken)
    return found


def platform(cohort: Cohort) -> str:
    return str(read_json(cohort.path / "provenance.json")["device"]["platform"])


def main() -> None:
    asked = parse()
    spent: dict[str, Counter[str]] = {}
    held = [Store(path).cohorts() for path in asked.stores]
    for cohorts in held:
        for members in gather([cohort.convoy() for cohort in cohorts]):
            run = cohorts[members[0]].first()
            size = f"{getattr(run.model, 'd_model', None)}, {getattr(run.model, 'layers', None)}, {run.batch}"
            spent.setdefault(size, Counter()).update(cost([cohorts[i] for i in members]))
    print(f"{HEAD}\n|---|{'---|' * 7}")
    for size in sorted(size for size in spent if spent[size]["cohorts"]):
        print(line(size, spent[size]))
    everything: Counter[str] = Counter()
    for each in spent.values():
        everything.update(each)
    print(line("all", everything))
    hours, devices = everything["seconds"] / 3600 / asked.together, sorted({platform(cohort) for cohorts in held for cohort in cohorts})
    print(f"\n{everything['runs'] / hours:,.0f} runs per hour of a device ({', '.join(devices)}), {hours:.3f} hours of it")


def line(name: str, of: Counter[str]) -> str:
    """A row of the table."""
    rest = of["seconds"] - of["training"] - of["compiling"]
    steps, waiting = (f"{of[n]:,.0f} ({100 * of[n] / of['seconds']:.0f} %)" for n in ("training", "compiling"))
    parts = [f"{of['cohorts']}", f"{of['runs']:,}", steps, f"{of['predicted']:,.0f}", waiting, f"{rest:,.0f}"]
    return f"| {name} | {' | '.join(parts)} | {of['flops'] / of['training']:.1e} |".replace("e+", "e")


if __name__ == "__main__":
    main()
