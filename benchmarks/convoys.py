"""Cohorts of several tasks in one program, beside one program for each: seconds of a training step of all of them.

    python benchmarks/convoys.py                                              # the grid of quiet features, on a GPU
    python benchmarks/convoys.py --settings 8,1,4,2 --tasks addition,activity_selection --seconds 1   # a small one, for a CPU

A setting is d_model, layers, batch and replicas of each task. Programs run in turn, each for at least so many seconds, twice; a step of
all tasks one after the other is the sum of theirs. Both have real data, AdamW with clipping, and the metrics of every step. The last
column is what `training/cost.py` predicts of the ratio, by which tasks are brought together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from elegans.studies.quiet_features import TASKS, changed
from elegans.sweeps import grid
from elegans.training import Run
from elegans.training.cohort import CHUNK, Programs
from elegans.training.cost import rates_of
from elegans.training.device import choose
from elegans.training.joint import Joint

SETTINGS = "16,16,8,4 16,16,64,4 32,16,64,4 64,16,8,4 16,4,64,4 64,4,64,4 128,4,64,4"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=SETTINGS, help="d_model,layers,batch,replicas of each task; several")
    parser.add_argument(
        "--tasks", default=",".join(task.kind for task in TASKS), help="of quiet_features; rows up to and above 100 tokens apart"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="that a program runs at least")
    parser.add_argument("--json", type=Path, help="also write the results here")
    return parser.parse_args()


def step_seconds(programs: Programs, least: float) -> float:
    """Seconds of a training step, compiling and a first chunk apart."""
    states, _ = programs.chunk(programs.start(), 0, CHUNK)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < least:
        states, _ = programs.chunk(states, done, CHUNK)
        done += CHUNK
    return (time.perf_counter() - began) / done


def compare(groups: Sequence[Sequence[Run]], device: jax.Device, least: float) -> dict[str, Any]:
    """Seconds of a step of all groups, apart and together."""
    each, all_of = [Programs(members, device, 1) for members in groups], Joint(groups, device)
    rounds = [(sum(step_seconds(p, least / len(each)) for p in each), step_seconds(all_of, least)) for _ in range(2)]
    apart, together = (min(times) for times in zip(*rounds, strict=True))
    rates, loads = rates_of(device.platform), [(members[0], len(members)) for members in groups]
    predicted = sum(rates.step([load]) for load in loads) / rates.step(loads)
    return {"tasks": len(groups), "apart": apart, "together": together, "ratio": apart / together, "predicted": predicted}


def main() -> None:
    options = parse()
    device, rows = choose(), []
    wanted = [task for task in TASKS if task.kind in options.tasks.split(",")]
    print(device.device_kind, "\nd_model, layers, batch, replicas of each | tasks | ms apart | ms together | ratio | predicted")
    for setting in options.settings.split():
        d, layers, batch, replicas = map(int, setting.split(","))
        fields = {"model.d_model": d, "model.layers": layers, "batch": batch, "flops": 1e15}
        for long in (False, True):
            groups = [grid(changed(task, fields), {"seed": range(replicas)}) for task in wanted if (task.positions > 100) == long]
            if len(groups) > 1:
                row = compare(groups, device, options.seconds)
                rows.append({"setting": setting, **row})
                times = f"{1e3 * row['apart']:.2f} | {1e3 * row['together']:.2f}"
                print(f"{setting} | {row['tasks']} | {times} | {row['ratio']:.2f} | {row['predicted']:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"device": device.device_kind, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
