"""What training costs: FLOPs, and rough seconds from measured rates, good enough to order and share work and to tell minutes from hours."""

from __future__ import annotations

import dataclasses

import jax

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


@dataclasses.dataclass(frozen=True)
class Rates:
    """How fast a kind of device is (docs/speed.md has the measurements)."""

    width: float  # FLOP/s for each unit of d_model, as long as products are narrow
    most: float  # FLOP/s at most
    layer: float  # seconds that a layer takes in a step besides, however small it is
    compiling: float  # seconds that the programs of one size cost, compiled beside others where threads do that

    def step(self, run: Run, replicas: int) -> float:
        """Seconds of one step of a cohort of runs like this one; a custom model counts as one of average width."""
        width, layers = getattr(run.model, "d_model", 64), getattr(run.model, "layers", 2)
        return self.layer * layers + flops_per_step(run) * replicas / min(self.width * width, self.most)


RATES = {"cpu": Rates(1.2e9, 1e11, 2e-4, 8.0), "gpu": Rates(8e11, 1.5e14, 6e-5, 8.0)}  # two cores; one H100 with 16 cores


def rates_of(platform: str) -> Rates:
    """The rates of a platform as JAX names it."""
    return RATES["cpu" if platform == "cpu" else "gpu"]
