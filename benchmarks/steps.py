"""What a training step of several tasks in one program is made of: milliseconds, FLOP/s, and its kernels.

    python benchmarks/steps.py                                             # the grid of quiet features, on a GPU
    python benchmarks/steps.py --settings 8,1,4,2,short --kernels 3        # a small one, for a CPU, which has no kernels

A setting is d_model, layers, batch, replicas of each task, and which tasks: those of `short` or `long` rows (up to and above 100 tokens) or
`all`. Programs compile in threads beforehand. The predicted time is that by which tasks are brought together (`training/cost.py`).
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import jax
from traces import kernel_times

from elegans.studies.quiet_features import TASKS, changed
from elegans.sweeps import grid
from elegans.training.cohort import Programs
from elegans.training.cost import flops_per_step, rates_of
from elegans.training.device import choose
from elegans.training.joint import Joint

SETTINGS = "16,16,64,4,long 32,16,64,4,long 16,16,8,4,all 64,16,8,4,short 64,4,64,4,long 128,4,8,4,long 256,4,64,4,long 512,16,8,4,long"
WARM, TRACED = 8, 8  # steps


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=SETTINGS, help="d_model,layers,batch,replicas,tasks; several")
    parser.add_argument("--steps", type=int, default=100, help="that are timed")
    parser.add_argument("--kernels", type=int, default=12, help="that are shown, those that take longest")
    parser.add_argument("--threads", type=int, default=4)
    return parser.parse_args()


def compiled(setting: str, device: jax.Device) -> tuple[Programs, list]:
    """A setting's program, and what it trains."""
    *sizes, which = setting.split(",")
    d, layers, batch, replicas = map(int, sizes)
    wanted = [task for task in TASKS if which == "all" or (task.positions > 100) == (which == "long")]
    fields = {"model.d_model": d, "model.layers": layers, "batch": batch, "flops": 1e15}
    groups = [grid(changed(task, fields), {"seed": range(replicas)}) for task in wanted]
    programs = Joint(groups, device)
    programs.compile_all(without=("evaluate", "held_out"))
    return programs, [(members[0], len(members)) for members in groups]


def main() -> None:
    asked, device = parse(), choose()
    print(device.device_kind)
    with ThreadPoolExecutor(asked.threads) as pool:
        made = [(setting, pool.submit(compiled, setting, device)) for setting in asked.settings.split()]
    for setting, future in made:
        programs, loads = future.result()
        states, step = programs.start(), 0
        states, _ = programs.chunk(states, step, WARM)
        began = time.perf_counter()
        states, _ = programs.chunk(states, WARM, asked.steps)
        spent = (time.perf_counter() - began) / asked.steps
        flops = sum(flops_per_step(run) * replicas for run, replicas in loads)
        predicted = rates_of(device.platform).step(loads)
        size = sum(replicas for _, replicas in loads)
        print(f"{setting}: {1e3 * spent:.2f} ms, predicted {1e3 * predicted:.2f}; {flops / spent:.2g} FLOP/s; {size} replicas")
        again = jax.tree.map(jax.numpy.copy, states)
        ((times, counts),) = kernel_times([lambda p=programs, s=again: p.chunk(jax.tree.map(jax.numpy.copy, s), WARM, TRACED)[1]], 1)
        for name, micros in times.most_common(asked.kernels):
            print(f"  {micros / TRACED:9.1f} us  {counts[name] / TRACED:6.1f} x  {name[:90]}")


if __name__ == "__main__":
    main()
