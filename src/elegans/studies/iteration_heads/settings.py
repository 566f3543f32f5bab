"""What the runs of iteration heads have in common: the authors' tasks, model and training, and how large everything is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from elegans.models import MLP, LayerNorm, Learned, Positions, Transformer
from elegans.sweeps import grid, replace
from elegans.tasks import BinaryCopy, Mixture, Parity, Polynomial, Split, Task
from elegans.training import AdamW, Every, Record, Run, follow

LEARNED = Learned()
PIECES = {  # globs of weights
    "embeddings": ("embed.*", "pos_embed.*", "unembed.*"),
    **{f"{name} {i + 1}": (f"blocks.{i}.{glob}.*",) for i in (0, 1) for name, glob in (("attention", "attn"), ("MLP", "mlp"))},
}


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the runs of every part are."""

    modulus: int
    length: int  # inputs of the longest row, where a part does not vary it
    d_model: int
    batch: int
    lr: float
    seeds: int
    epochs: float
    every: float  # epochs between two recordings
    lengths: tuple[int, ...]  # that grids vary
    widths: tuple[int, ...]
    rows: int = 1024  # of each length, in a training set
    examples: int = 512  # held-out rows
    small: bool = False  # grids with fewer points


FULL = Scale(11, 8, 32, 256, 3e-4, 20, 1000, 10, (5, 10, 16, 20, 30), (12, 16, 20, 24, 32))
SMALL = Scale(5, 6, 32, 64, 3e-3, 4, 10, 1, (4, 6), (16, 32), examples=256, small=True)


def polynomial(at: Scale, length: int | None = None, cot: bool = True) -> Polynomial:
    """Polynomial iteration of 1 to `length` inputs, every length equally often and cut by itself, so that each has test rows.

    The cut is the task's and the same for every seed: intervals over seeds are for one split. Another is `task.split.key=1`
    (of a mixture `task.tasks` says it, of a child also its parent), a structure and a table of its own.
    """
    return Polynomial(modulus=at.modulus, length=length or at.length, shortest=1, lengths="balanced", cot=cot, split=Split(by="length"))


def parity(at: Scale, length: int | None = None, cot: bool = True, kind: type[Parity | BinaryCopy] = Parity) -> Parity | BinaryCopy:
    """Parity, or binary copy, likewise. More is held out, since short rows are few: 62 of up to 5 bits, and of 1 bit one to test on."""
    split = Split(train=0.7, validation=0.15, by="length")
    return kind(length=length or at.length, shortest=1, lengths="balanced", cot=cot, split=split)


def model(d_model: int, layers: int = 2, heads: int = 1, position: Positions | None = LEARNED) -> Transformer:
    """The authors' transformer."""
    return Transformer(
        layers=layers, d_model=d_model, heads=heads, mlp=MLP(), norm=LayerNorm(), position=position, skip="normed", embed_dropout=0.1
    )  # fmt: skip


def setting(at: Scale, label: str, task: Task | None = None, of: Transformer | None = None, epochs: float = 1, every: float = 1) -> Run:
    """One run of the authors' training, of so many times the scale's epochs, recorded so many times as rarely.

    An epoch is 1,024 rows for every length (of several tasks: of the last one) and their finite set; tasks that change as they go
    see as many fresh rows instead. In bf16, twice as quick on a GPU; float32 where everything is small.
    """
    task = task or polynomial(at)
    goal: Any = getattr(task, "tasks", (task,))[-1]
    rows = at.rows * len(goal.spans)
    when = Every(max(1, round(every * at.every * rows / at.batch)))
    record = Record(evaluate=when, weights=when, examples=at.examples, by_position=False)
    n = epochs * at.epochs
    length: dict[str, Any] = {"examples": n * rows} if task.scheduled else {"epochs": n, "train_set": rows}
    optim = AdamW(lr=at.lr, weight_decay=0.0, b2=0.999, clip=None)
    run = Run(task=task, model=of or model(at.d_model), optim=optim, batch=at.batch, record=record, label=label, **length)
    return run if at.small else replace(run, "model.dtype", "bfloat16")


def sketched(*runs: Run) -> list[Run]:
    """The runs, keeping no weights but the final ones."""
    return [replace(run, "record.weights", None) for run in runs]


def seeded(at: Scale, *runs: Run, share: float = 1) -> list[Run]:
    """The runs with every seed, or a share of the seeds."""
    return [made for run in runs for made in grid(run, {"seed": range(max(2, round(share * at.seeds)))})]


def pair(at: Scale, share: float) -> Mixture:
    """Polynomial in this share and parity, over the symbols of both, so that a network of either reads both."""
    return Mixture(tasks=(polynomial(at), parity(at)), weights=(share, 1 - share))


def taught(at: Scale, share: float = 1) -> list[Run]:
    """Runs on polynomial iteration that others go on from."""
    return seeded(at, *sketched(setting(at, "polynomial", pair(at, 1.0))), share=share)


def after(parents: Sequence[Run], *children: Run) -> list[Run]:
    """The parents and every child after each of them, with its seed."""
    return [*parents, *(made for child in children for made in follow(parents, child))]
