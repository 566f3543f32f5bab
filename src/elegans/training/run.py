"""A Run: everything that decides what a training produces. And when what is recorded."""

from __future__ import annotations

import abc
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from elegans.errors import Invalid
from elegans.models import Model
from elegans.specs import INT_LIMIT, Spec, field, get, identity, note, spec, varies
from elegans.tasks import Task
from elegans.training.optimisers import AdamW, Optimizer
from elegans.training.step import Update

# ---- what to record, and when


@spec
class When(Spec):
    """At which steps something happens. Step s is the state after s updates; step 0 is the untrained network."""

    abstract: ClassVar[bool] = True

    @abc.abstractmethod
    def upto(self, steps: int) -> list[int]:
        """The steps of a run of `steps` updates, ascending; 0 and the last one are always among them, but for `Never`."""


@spec
class LogSpaced(When):
    """Evenly spaced on a logarithmic axis: 0, 1, ..., the last."""

    per_decade: int = field(10, "points between 1 and 10, 10 and 100, ...", ge=1, le=1000)

    def upto(self, steps: int) -> list[int]:
        points = 10 ** (np.arange(int(math.log10(steps) * self.per_decade) + 1) / self.per_decade)
        return sorted({0, *np.rint(points).astype(int).tolist(), steps})


@spec
class Every(When):
    """Every so many steps."""

    steps: int = field(100, "distance between two of them", ge=1)

    def upto(self, steps: int) -> list[int]:
        return sorted({*range(0, steps + 1, self.steps), steps})


@spec
class At(When):
    """At given steps."""

    steps: tuple[int, ...] = field((), "the steps", ge=0)

    def upto(self, steps: int) -> list[int]:
        return sorted({0, *(s for s in self.steps if s < steps), steps})


@spec
class Never(When):
    """At no step, not even the last. `record.weights` so: rows alone, and nothing that instruments could measure later."""

    def upto(self, steps: int) -> list[int]:
        del steps
        return []


@spec
class Record(Spec):
    """What a run records. Held-out examples are drawn once a run and are the same at every evaluation."""

    train: When = field(LogSpaced(per_decade=50), "training metrics of single batches")
    evaluate: When = field(LogSpaced(per_decade=10), "metrics on validation examples; test ones at the end of the run")
    weights: When | None = field(None, "parameters for instruments; none: only the final ones; never: no file as large as a model")
    examples: int = field(512, "validation examples, and as many test examples", ge=1, le=1_000_000)
    by_position: bool = field(True, "also the loss at every position")


# ---- the run

SEEDS = ("seed", "data_seed", "init_seed")
LENGTHS = ("steps", "examples", "epochs", "flops")  # a run gives exactly one


@functools.cache
def is_seed(name: str) -> bool:
    """Whether a dotted field is a seed, the run's or a parent's."""
    return name.split(".")[-1] in SEEDS


def unseeded(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's dotted fields those that are no seeds: equal of runs that differ in seeds alone, their own or their parents'."""
    return {name: value for name, value in fields.items() if not is_seed(name)}


def holder(fields: Mapping[str, Any], name: str) -> str | None:
    """The kind of the spec that holds a dotted field; None where it is the run's own, or that spec is off."""
    return fields.get(name.rpartition(".")[0])


def differing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted fields that tell runs apart, in their order, seeds included; of each run what `specs.flat` gives.

    A field tells only runs apart in which the spec that holds it is of one kind: what differs with the kind follows from it, and what
    a parent is like tells only runs that have one. What is recorded tells none.
    """
    names = dict.fromkeys(name for fields in runs for name in fields if "record" not in name.split("."))
    return [n for n in names if len({(holder(f, n), str(f.get(n))) for f in runs}) > len({holder(f, n) for f in runs})]


@spec
class Run(Spec):
    """One training: a task, a model, an optimiser, and how long. Its length is exactly one of
    steps, examples, epochs (of a finite training set) or flops."""

    task: Task
    model: Model
    optim: Optimizer = field(AdamW(), "the optimiser")
    batch: int = field(64, "rows in a batch", ge=1, le=1_000_000)
    steps: int | None = varies(None, "length in optimiser steps", ge=1)
    examples: float | None = field(None, "length in training rows", gt=0)
    epochs: float | None = field(None, "length in passes over the finite training set", gt=0)
    flops: float | None = field(None, "length in training FLOPs", gt=0)
    count: Literal["kaplan", "matmul"] = field("kaplan", "convention of FLOPs, see `Transformer`")
    train_set: int | None = field(None, "rows of a finite training set; none: fresh rows at every step", ge=1, le=INT_LIMIT // 2)
    order: Literal["listed", "short_to_long"] | None = field(
        None, "passes over the finite training set: as it was drawn, or by length of prompt and answer; none: shuffled anew for each"
    )
    seed: int = varies(0, "seed of everything random", ge=0)
    data_seed: int | None = varies(None, "seed of the data; none: the run's", ge=0)
    init_seed: int | None = varies(None, "seed of the initial weights; none: the run's", ge=0)
    trained: tuple[str, ...] | None = field(
        None, "globs of the weights that are trained, such as blocks.1.mlp.*, and of some that are not, such as !pos_embed.*; none: all are"
    )
    update: Update = field(Update(), "one training step: loss, gradients, metrics")
    record: Record = field(Record(), "what to record, and when")
    after: Run | None = field(None, "the run whose weights this one starts from, with a new optimiser; none: from initial weights")
    after_step: int | None = field(None, "the step of those weights, one that the parent records; none: its end", ge=0)
    label: str | None = note(None, "name shown for the run, such as lr={optim.lr}")

    def check(self) -> None:
        lengths = {n: getattr(self, n) for n in LENGTHS}
        given = [n for n, v in lengths.items() if v is not None]
        if len(given) != 1:
            raise Invalid("steps", given or None, "allowed: exactly one of steps, examples, epochs, flops")
        if self.epochs is not None and self.train_set is None:
            raise Invalid("epochs", self.epochs, "needs a finite training set: give train_set")
        if self.order is not None and self.train_set is None:
            raise Invalid("order", self.order, "needs a finite training set: give train_set")
        if self.train_set is not None and self.task.scheduled:
            raise Invalid("train_set", self.train_set, f"a {self.task.kind} draws other rows as it goes; use fresh ones")
        steps = self.after.kept_steps if self.after else []
        if self.after is not None and not steps:
            raise Invalid("after", self.after.label, "allowed: a run that keeps its final weights; its record.weights is never")
        if self.after_step is not None and self.after_step not in steps:
            shown = ", ".join(map(str, steps[:8] + ["..."] * (len(steps) > 8))) or "give its parent, `after`"
            raise Invalid("after_step", self.after_step, f"allowed: a step at which the parent keeps its weights: {shown}")
        if self.trained == ():
            raise Invalid("trained", [], "allowed: one glob or more; none: every weight")
        if self.length >= INT_LIMIT:
            raise Invalid(given[0], lengths[given[0]], f"allowed: what makes fewer than {INT_LIMIT} steps")
        if self.train_set is not None and self.length * self.batch >= INT_LIMIT:
            raise Invalid("train_set", self.train_set, f"allowed: fewer than {INT_LIMIT} rows in all; use fresh rows for longer runs")

    @property
    def flops_per_step(self) -> float:
        """Training FLOPs of one step by the run's convention."""
        positions = self.task.mean_positions()
        per_token = self.model.flops_per_token(self.task.vocab_size, positions, self.count)
        return per_token * self.batch * positions

    @functools.cached_property
    def length(self) -> int:
        """Optimiser steps: the smallest number that reaches the asked length."""
        if self.steps is not None:
            return self.steps
        rows = self.examples if self.examples is not None else (self.epochs or 0) * (self.train_set or 0)
        steps = self.flops / self.flops_per_step if self.flops is not None else rows / self.batch
        return max(1, math.ceil(min(steps, INT_LIMIT)))  # beyond the limit `check` refuses

    @property
    def kept_steps(self) -> list[int]:
        """The steps at which its weights are kept; the last of them is its end. Empty where nothing is kept."""
        return [self.length] if self.record.weights is None else self.record.weights.upto(self.length)

    @functools.cached_property
    def id(self) -> str:
        return identity(self)


def fill(template: str, run: Spec) -> str:
    """A label's text: `fill("lr={optim.lr}", run)`. Raises `Invalid` for a field that there is not."""

    def shown(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else value.kind if isinstance(value, Spec) else str(value)

    return re.sub(r"\{([\w.]+)\}", lambda m: shown(get(run, m.group(1))), template)
