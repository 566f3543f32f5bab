"""What training costs: FLOPs, and rough seconds from measured rates, good enough to order and share work and to tell minutes from hours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from elegans.training.cohort import resolve
from elegans.training.run import Run
from elegans.training.step import shapes_of


def flops_per_step(run: Run) -> float:
    """FLOPs of a step, or of its parameters alone where a custom model does not count them."""
    try:
        return run.flops_per_step
    except NotImplementedError:
        return 6.0 * parameters(run) * run.batch * run.task.positions


def parameters(run: Run) -> int:
    """Trained numbers of a run."""
    return sum(w.size for w in jax.tree.leaves(shapes_of(resolve(run))))


def layers_of(run: Run) -> int:
    """Layers of a run's model; a custom one counts as two."""
    return getattr(run.model, "layers", 2)


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a kind of device is (docs/speed.md has the measurements)."""

    width: float  # FLOP/s for each unit of d_model, as long as products are narrow
    most: float  # FLOP/s at most
    layer: float  # seconds that a layer takes in a step besides, however small it is
    compiling: float  # seconds that the programs of one size cost, compiled beside others where threads do that
    cores: bool = False  # whether several cores share the replicas, as evenly as their number allows

    def size(self, live: int, most: int) -> int:
        """Replicas of a program for so many live runs out of the most: powers of two for cores."""
        return min(most, 1 << (live - 1).bit_length()) if self.cores and live else live

    def step(self, loads: Iterable[tuple[Run, int]]) -> float:
        """Seconds of one step of one program of so many replicas of each of some runs, their rows padded to the longest.

        A custom model counts as one of average width.
        """
        loads = [(run, replicas) for run, replicas in loads if replicas]
        model, longest = loads[0][0].model, max(run.task.positions for run, _ in loads)
        width = getattr(model, "d_model", 64)
        work = sum(flops_per_step(run) * replicas * (longest / run.task.positions) for run, replicas in loads)
        return self.layer * layers_of(loads[0][0]) + work / min(self.width * width, self.most)


RATES = {"cpu": Rates(1.2e9, 1e11, 2e-4, 8.0, cores=True), "gpu": Rates(8e11, 1.5e14, 6e-5, 8.0)}  # two cores; one H100 with 16 cores


def rates_of(platform: str) -> Rates:
    """The rates of a platform as JAX names it."""
    return RATES["cpu" if platform == "cpu" else "gpu"]


# ---- sizes over time


@dataclasses.dataclass(frozen=True)
class Leg:
    """Steps start..stop of one program: of so many first runs of each of some cohorts."""

    start: int
    stop: int
    sizes: tuple[int, ...]


def shrink(lengths: Sequence[Sequence[int]], runs: Sequence[Run], rates: Rates) -> list[Leg]:
    """The legs of cohorts of runs like these with these lengths, longest first, that train together: those that take least time.

    Where runs end, the others may move to a smaller program, which takes its time to compile.
    """
    stops = [0, *sorted({n for each in lengths for n in each})]
    sizes = [tuple(rates.size(sum(n > stop for n in each), len(each)) for each in lengths) for stop in stops[:-1]]
    steps = np.array([rates.step(zip(runs, size, strict=True)) for size in sizes])
    best, begins = np.zeros(len(stops)), [0] * len(stops)
    for i in range(1, len(stops)):
        spent = best[:i] + (stops[i] - np.array(stops[:i])) * steps[:i] + rates.compiling
        begins[i] = int(spent.argmin())
        best[i] = spent[begins[i]]
    legs, i = [], len(stops) - 1
    while i:
        legs.append(Leg(stops[begins[i]], stops[i], sizes[begins[i]]))
        i = begins[i]
    return legs[::-1]


def training(runs: Sequence[Run], legs: Sequence[Leg], rates: Rates, since: int = 0) -> list[float]:
    """Seconds of the steps of every leg that is left from step `since` on, of cohorts of runs like these together."""
    left = [leg for leg in legs if leg.stop > since]
    return [(leg.stop - max(leg.start, since)) * rates.step(zip(runs, leg.sizes, strict=True)) for leg in left]


def seconds(runs: Sequence[Run], legs: Sequence[Leg], rates: Rates, since: int = 0) -> float:
    """Seconds that they take together from step `since` on, compiling included."""
    return sum(steps + rates.compiling for steps in training(runs, legs, rates, since))
