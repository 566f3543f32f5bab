"""Are a task's intermediate results readable inside a network before its loss moves?

    elegans run quiet_features --max-budget 1e13          # on a GPU
    elegans run quiet_features task=addition --max-budget 1e12
    elegans run quiet_features --share 1/4 --minutes 9    # one of four GPUs; then `elegans archive` and `elegans merge`
    elegans run quiet_features.within                     # one setting of each task, probed and ablated as it trains
    elegans run quiet_features.across                     # one architecture at ever larger budgets, probed at their ends
    elegans run quiet_features.multiplication             # the carries of a short multiplication, as it is learned
    elegans run quiet_features --small                    # two CPU cores, about five minutes

Ten algorithmic languages, each trained at 7 widths, 2 depths, 4 learning rates and 2 batch sizes for budgets of 1e9,
1e10, ... training FLOPs (6,664 configurations of 1 to 100,000 steps; multiplication has a decade more), one pass over
fresh data, AdamW with warm-up and cosine. Every configuration is a run of its own; budgets, learning rates and
seeds of one architecture and task train in one cohort, 280 in all, of which a GPU takes several tasks in one program (about 50 to
1e14 FLOPs). Three seeds up to 1e13 FLOPs, one beyond.
`scaling` takes the configuration with the smallest validation loss at every budget and reports its test loss; `seed=10..13 --best 3`, run
into the same store, trains more seeds of the three best, which then choose among them and say how sure that is.

Weights of the grid are not kept: a state of its largest model has 600 MB, and would take longer to write than most runs take to
train. Networks are probed in `within` and `across`; `record.weights=none` keeps the grid's final ones for `elegans measure`.
`elegans draw STORE` draws the paper's figures from the store's rows: scaling, quiet and loud features, ablations.

Cost: one seed to 1e14 FLOPs (`seed=0 --max-budget 1e14`, 6,192 runs) takes about an hour of an H100; four more of the three best 16
minutes; the decade above, by prediction, another hour and a half, and wide models have been slower than predicted.
Stop and go on as you like (`--minutes`); `elegans archive` takes finished cohorts to another machine, with --unfinished those cut off,
too.
Expect, from the paper: the best loss leaves its plateau at 1e11 to 1e12 FLOPs for addition; 1e12 to 1e13 for breadth-first
search, maximum subarray and activity selection; 1e13 to 1e14 for depth-first search; 1e15 to 1e16 for multiplication.

`small` asks one part of it of two CPU cores: 8-bit addition, four seeds. Its carry is readable before the loss is half-way
down, and taking the carry's direction out costs exact match that random directions do not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elegans.figures import save_quiet_figures
from elegans.instruments import Ablate, AcrossCompute, Probe, Scaling, Transition
from elegans.models import Transformer
from elegans.store import Store
from elegans.studies import Made, Parts
from elegans.study import Study
from elegans.sweeps import grid, replace, replace_all
from elegans.tasks import (
    ActivitySelection,
    Addition,
    BreadthFirstSearch,
    DepthFirstSearch,
    MajorityOfMajority,
    MaximumSubarray,
    MinimumSpanningTree,
    Multiplication,
    ShortestPath,
    Task,
    TopologicalSort,
)
from elegans.training import AdamW, At, Constant, Cosine, LogSpaced, Never, Record, Run

TASKS = (
    *(Addition(length=16), Multiplication(length=16), MajorityOfMajority(length=32)),
    *(MaximumSubarray(length=64), ActivitySelection(length=16)),
    *(BreadthFirstSearch(), DepthFirstSearch(), ShortestPath(), TopologicalSort(), MinimumSpanningTree()),
)
WIDTHS, DEPTHS = (8, 16, 32, 64, 128, 256, 512), (4, 16)
RATES, BATCHES = (1e-1, 1e-2, 1e-3, 1e-4), (8, 64)
DECADES = range(9, 16)
SEEDS, SEEDED = 3, 1e13  # seeds of every configuration, up to this many FLOPs
MOST_STEPS = 100_000
PUBLISHED = {  # FLOPs between which the paper's best-of-grid loss leaves its plateau, where it says so
    "addition": (1e11, 1e12),
    **dict.fromkeys(("breadth_first_search", "maximum_subarray", "activity_selection"), (1e12, 1e13)),
    "depth_first_search": (1e13, 1e14),
    "multiplication": (1e15, 1e16),
}
QUIET = (  # the paper's verdicts
    *(("addition", "first_operand"), ("addition", "carry"), ("multiplication", "first_operand")),
    *(("multiplication", "carry_16"), ("breadth_first_search", "queue"), ("maximum_subarray", "previous_negative")),
)
LOUD = (
    *(("breadth_first_search", "adjacency"), ("depth_first_search", "adjacency")),
    *(("maximum_subarray", "max_ending_here"), ("activity_selection", "start_time")),
)


def decades(task: Task) -> range:
    """Powers of ten of a task's budgets."""
    return range(DECADES.start, DECADES.stop + isinstance(task, Multiplication))


def configurations(task: Task) -> Iterator[Run]:
    """The grid of one task, without its seeds."""
    base = Run(
        task=task,
        model=Transformer(layers=4, d_model=8, heads=4, dtype="bfloat16"),
        optim=AdamW(schedule=Cosine(warmup=0.1, start=0.01, end=0.1)),
        flops=1e9,
        record=Record(train=LogSpaced(per_decade=10), evaluate=At(), weights=Never(), examples=1000, by_position=False),
        label="{task} d={model.d_model} L={model.layers} B={batch} lr={optim.lr} C={flops} seed={seed}",
    )
    axes = {"model.d_model": WIDTHS, "model.layers": DEPTHS, "batch": BATCHES, "optim.lr": RATES}
    for run in grid(base, axes):
        yield from filter(belongs, (replace(run, "flops", 10.0**decade) for decade in decades(task)))


def belongs(run: Run) -> bool:
    """Whether the grid has a run: at a budget of its task, and not too long."""
    return run.length <= MOST_STEPS and (run.flops is None or run.flops <= 10.0 ** decades(run.task)[-1])


def seeds(run: Run) -> list[Run]:
    """A configuration's runs."""
    return grid(run, {"seed": range(SEEDS if run.flops is not None and run.flops <= SEEDED else 1)})


def whole() -> Study:
    """The grid."""
    runs = [run for task in TASKS for configuration in configurations(task) for run in seeds(configuration)]
    return Study(name="quiet_features", question=__doc__.splitlines()[0], runs=runs, instruments=(Scaling(),), keep=belongs, figures=draw)


def draw(store: Store, folder: Path) -> list[Path]:
    """The paper's figures from what a store has: scaling 2 x 5, quiet features 2 x 3, loud ones 1 x 4, ablations with their table."""
    return save_quiet_figures(store, folder, [task.kind for task in TASKS], PUBLISHED, QUIET, LOUD)


def changed(task: Task, fields: dict[str, Any]) -> Run:
    """The grid's first run of a task, with some fields replaced."""
    return functools.reduce(lambda run, field: replace(run, *field), fields.items(), next(configurations(task)))


# ---- parts

TEN, FINE, FINER = (LogSpaced(per_decade=n) for n in (10, 20, 40))
RECORDED = Record(train=TEN, evaluate=TEN, weights=TEN, examples=1000, by_position=False)
FINELY = replace_all(RECORDED, {"evaluate": FINER, "weights": FINE})  # 0.1 decades are told from none
WITHIN = Probe(), Ablate(at="final", draws=16), Transition()
ACROSS = Probe(at="final"), AcrossCompute()
PARTS = Parts("quiet_features", lambda make, less: _smaller() if less else make())


@PARTS.part(draw)
def within() -> Made:
    """When do a task's intermediate results become readable while one network trains, and does it use them?

    One setting of each task that is learned within 2e13 FLOPs, losses recorded forty times a decade and weights twenty times, probed after
    every block and ablated. Cost: 9 structures x 8 runs (64 of addition, whose leads decide and vary most) x 7,000 to 50,000 steps, and as
    many programs for probes and ablations: 16 minutes of two processes, each on a GPU of which another had the rest; 5 GB of weights.
    """
    runs: list[Run] = []
    for task in (task for task in TASKS if not isinstance(task, Multiplication)):
        add = isinstance(task, Addition)
        setting = {"model.d_model": 32, "optim.lr": 1e-2, "flops": 1e12} if add else {"model.d_model": 64, "optim.lr": 1e-3, "flops": 2e13}
        run = changed(task, setting | {"batch": 8, "record": FINELY, "label": "{task} seed={seed}"})
        runs += grid(run, {"seed": range(64 if add else 8)})
    return runs, WITHIN


@PARTS.part(draw)
def multiplication() -> Made:
    """When do the carries of a long multiplication become readable while one network trains, and does it use them?

    Of 8-bit numbers, since 16-bit ones take 1e15 FLOPs: four layers of width 64, batches of 64, 2.2e13 FLOPs (8,000 steps) in float32,
    8 seeds, weights recorded ten times a decade, probed after every block and ablated. Cost: an hour and a half of two CPU cores.
    On a GPU 16-bit ones, of which half are learned (18 minutes of two processes, each with 8 of 16 seeds, beside another):

        elegans run quiet_features.multiplication task.length=16 model.d_model=128 model.dtype=bfloat16 flops=2e15 seed=0..15

    Expect, from the paper (16 bits, carry_16): the first operand and the last carry before the loss.
    """
    setting = {"model.d_model": 64, "model.dtype": "float32", "optim.lr": 1e-3, "flops": 2.2e13}
    run = changed(Multiplication(length=8), setting | {"batch": 64, "record": RECORDED, "label": "{task} seed={seed}"})
    return grid(run, {"seed": range(8)}), WITHIN


@PARTS.part(draw)
def across() -> Made:
    """Does one architecture know a task's intermediate results after budgets at which its loss has not moved?

    Four layers of width 64, batches of 8, trained anew for every quarter of a decade from 1e9 FLOPs to 1e12 (addition) or 1e13 (the other
    tasks with published verdicts, but multiplication), at two learning rates, the better of which counts; 12 seeds; finished networks
    probed. Cost: 5 structures x 300 to 400 runs, 2.3e15 FLOPs in all, a quarter of an hour of an H100; one task by `task=maximum_subarray`.
    Addition alone (`elegans run quiet_features.across_addition`) took two CPU cores, busy with other work, an hour and a half. Expect,
    from the paper: carry, first_operand, queue and previous_negative before the loss; adjacency, max_ending_here and start_time with it.
    """
    tasks = [task for task in TASKS if task.kind in {kind for kind, _ in QUIET + LOUD} and not isinstance(task, Multiplication)]
    return [run for task in tasks for run in _budgets(task)], ACROSS


@PARTS.part(draw)
def across_addition() -> Made:
    """Does one architecture know the carry and the first operand after budgets at which its loss has not moved?

    The runs of `across` on addition: 312 of 2 to 1,909 steps.
    """
    return list(_budgets(TASKS[0])), ACROSS


def _budgets(task: Task) -> Iterator[Run]:
    """One architecture on a task, at every quarter of a decade."""
    run = changed(task, {"model.d_model": 64, "batch": 8, "record.weights": None, "label": "{task} lr={optim.lr} C={flops} seed={seed}"})
    decades = 3 if isinstance(task, Addition) else 4
    budgets = [float(f"{10 ** (9 + n / 4):.2g}") for n in range(4 * decades + 1)]
    yield from grid(run, {"flops": budgets, "optim.lr": (1e-2, 1e-3), "seed": range(12)})


def _smaller() -> Made:
    """Small, every part is `small`."""
    return small.runs, small.instruments


def __getattr__(name: str) -> Study:
    """`study`, made when it is asked for: a grid of this size takes seconds to write down."""
    if name == "study":
        return whole()
    raise AttributeError(f"{__name__} has no {name!r}")


_small = Run(
    task=Addition(length=8),
    model=Transformer(layers=2, d_model=32, heads=4),
    optim=AdamW(lr=3e-3, schedule=Constant(warmup_steps=50)),
    batch=64,
    steps=1200,
    record=Record(evaluate=LogSpaced(per_decade=10), weights=LogSpaced(per_decade=5), examples=256),
    label="seed={seed}",
)
small = Study(
    name="quiet_features_small",
    question=__doc__.splitlines()[0],
    runs=grid(_small, {"seed": range(4)}),
    instruments=(Probe(fit=512, test=512), Ablate(fit=512, test=256, draws=8, at="final"), Transition()),
    figures=draw,
)
