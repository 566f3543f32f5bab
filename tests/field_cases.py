"""Of every spec that a run is made of, pairs of runs that differ in one field: see `test_every_field.py`."""

import dataclasses
from pathlib import Path
from typing import Any

from elegans import (
    MLP,
    SGD,
    WSD,
    ActivitySelection,
    AdamW,
    Addition,
    ALiBi,
    At,
    Attention,
    BinaryCopy,
    BitParity,
    BreadthFirstSearch,
    Constant,
    Cosine,
    Curriculum,
    DepthFirstSearch,
    Every,
    FixedAttention,
    InnerProduct,
    IterativeTask,
    LayerNorm,
    Learned,
    Linear,
    Lion,
    LogSpaced,
    LongestCommonSubsequence,
    Majority,
    MajorityOfMajority,
    MaximumSubarray,
    MinimumSpanningTree,
    Mixture,
    Multiplication,
    Never,
    Parity,
    Polynomial,
    Record,
    RMSNorm,
    Rotary,
    Run,
    ShortestPath,
    Sinusoidal,
    Sorting,
    Spec,
    Split,
    SwiGLU,
    TopologicalSort,
    Transformer,
    Update,
    replace,
    spec,
)


@spec
class Doubled(Update):
    """A training loop of the user's."""

    def loss(self, run, params, batch, key):
        loss, metrics = super().loss(run, params, batch, key)
        return 2 * loss, metrics


BASE = Run(
    Addition(length=3),
    Transformer(layers=1, d_model=4, heads=2, dropout=0.3, init_std=0.5),
    AdamW(lr=0.1, eps=1e-2, schedule=Cosine(warmup=0.4, start=0.1)),
    batch=4,
    steps=6,
    record=Record(examples=4, train=Every(2), evaluate=Every(3), weights=Every(3)),
)
Pair = tuple[Run, Run]
FOUR = str(Path(__file__).parent / "data" / "four.g6")  # a star and a line of four vertices


def based(**changes: Any) -> Run:
    return dataclasses.replace(BASE, **changes)


def at(path: str, alternatives: dict[str, list], *bases: Run) -> dict[str, list[Pair]]:
    """Pairs of runs that differ in one field of the spec at `path`."""

    def pairs(name: str, values: list) -> list[Pair]:
        return [(run, replace(run, f"{path}.{name}", value)) for run in bases or (BASE,) for value in values]

    return {name: pairs(name, values) for name, values in alternatives.items()}


def scheduled(kind: type[Spec], alternatives: dict[str, list], **fields: float) -> dict[str, list[Pair]]:
    share, steps = (replace(BASE, "optim.schedule", kind(start=0.1, **warm, **fields)) for warm in ({"warmup": 0.4}, {"warmup_steps": 2}))
    path = "optim.schedule"
    return at(path, {"warmup": [0.2], "start": [0.3], **alternatives}, share) | at(path, {"warmup_steps": [3, None]}, steps)


def on(path: str, value: Spec) -> Run:
    return replace(BASE, path, value)


def iterative(task: IterativeTask) -> dict[str, list[Pair]]:
    fields = {
        "length": [task.length + 2],
        "shortest": [3, None],
        "cot": [False],
        "compat": ["paper"],
        "split": [None],
        "lengths": ["balanced"],
    }
    weighted = at("task", {"final_weight": [2.0, None]}, on("task", dataclasses.replace(task, final_weight=3.0)))
    return at("task", fields, on("task", task)) | weighted


SIZED = (ActivitySelection, BitParity, InnerProduct, LongestCommonSubsequence, Majority, MajorityOfMajority, MaximumSubarray, Sorting)
SHORT = (BinaryCopy(length=4, split=Split(0.5, 0.25)), Parity(length=5, split=Split(0.5, 0.25)))
ANY_MIX = {"tag": [True], "split": [Split(0.6, 0.2)]}
APART = ("label", "after", "after_step")  # a note, and what decides the weights that the engine is given: see the end
OPTIMISED: dict[str, list] = {"lr": [0.2], "clip": [0.01, None], "schedule": [Linear(), WSD()]}
CASES: dict[type[Spec], dict[str, list[Pair]]] = {
    Addition: at("task", {"length": [4], "cot": [True], "inputs": ["msb"], "outputs": ["msb"], "split": [None, Split(0.8, 0.1)]}),
    **{kind: iterative(kind(length=5, shortest=2)) for kind in (Parity, BinaryCopy)},
    Polynomial: iterative(Polynomial(length=3, shortest=1)) | at("task", {"modulus": [7], "start": ["zero"]}, on("task", Polynomial())),
    Mixture: at("task", {"tasks": [SHORT[::-1]], "weights": [(0.2, 0.5)], **ANY_MIX}, on("task", Mixture(tasks=SHORT))),
    Curriculum: at("task", {"tasks": [SHORT[::-1]], "ends": [(0.2,)], "keep": [True], **ANY_MIX}, on("task", Curriculum(tasks=SHORT))),
    Multiplication: at(
        "task",
        {"length": [4], "inputs": ["msb"], "outputs": ["msb"], "split": [None, Split(0.8, 0.1)]},
        on("task", Multiplication(length=3)),
    ),
    **{kind: at("task", {"length": [6], "split": [None, Split(0.8, 0.1)]}, on("task", kind(length=4))) for kind in SIZED},
    **{
        kind: at(
            "task",
            {"vertices": [5], "graphs": [FOUR], "compat": ["paper"], "split": [None]},
            on("task", kind(vertices=4, split=Split(0.5, 0.25))),
        )
        for kind in (BreadthFirstSearch, DepthFirstSearch, ShortestPath, TopologicalSort, MinimumSpanningTree)
    },
    Split: at("task.split", {"train": [0.7], "validation": [0.09], "key": [1]}, BASE, on("task", Addition(length=9)))
    | at("task.split", {"by": ["length"]}, on("task", Parity(length=5, shortest=2)), on("task", Parity(length=17, shortest=14))),
    Transformer: at(
        "model",
        {
            **{"layers": [2], "d_model": [8], "heads": [1], "d_head": [4], "attention": [None, (FixedAttention(),)], "mlp": [None, MLP()]},
            **{"norm": [None, LayerNorm()], "position": [None, Learned()], "tied": [True], "bias": [True]},
            **{"skip": ["normed"], "embed_dropout": [0.2]},
            **{"dropout": [0.2, None], "init_std": [0.3, None], "dtype": ["bfloat16", "tensorfloat32"]},
        },
    ),
    Attention: at("model.attention", {"scale": [0.5]}),
    FixedAttention: at("model.attention", {"maps": [("self",), ("uniform", "first")]}, on("model.attention", FixedAttention())),
    MLP: at("model.mlp", {"ratio": [2.0], "activation": ["gelu_tanh", "relu", "silu"]}, on("model.mlp", MLP())),
    SwiGLU: at("model.mlp", {"ratio": [2.0]}),
    RMSNorm: at("model.norm", {"eps": [1e-3]}),
    LayerNorm: at("model.norm", {"eps": [1e-3]}, on("model.norm", LayerNorm())),
    Rotary: at("model.position", {"theta": [100.0]}, on("model", Transformer(layers=1, d_model=4, heads=1))),  # two wavelengths
    Learned: at("model.position", {"dims": [2], "std": [0.3]}, on("model.position", Learned())),
    Sinusoidal: at("model.position", {"theta": [100.0]}, on("model.position", Sinusoidal())),
    ALiBi: at("model.position", {"span": [4.0]}, on("model.position", ALiBi())),
    AdamW: at(
        "optim",
        {
            **{"lr": [0.2], "clip": [0.01, None], "schedule": [Constant(), Linear(), WSD()], "weight_decay": [0.2]},
            **{"b1": [0.5], "b2": [0.5], "eps": [0.1], "decay": ["matrices"]},
        },
    ),
    SGD: at("optim", OPTIMISED | {"momentum": [0.5], "nesterov": [True], "weight_decay": [0.2]}, on("optim", SGD(lr=0.1))),
    Lion: at("optim", OPTIMISED | {"b1": [0.5], "b2": [0.5], "weight_decay": [0.2]}, on("optim", Lion(lr=0.1))),
    Constant: scheduled(Constant, {}),
    Cosine: scheduled(Cosine, {"end": [0.5]}),
    Linear: scheduled(Linear, {"end": [0.5]}),
    WSD: scheduled(WSD, {"end": [0.5], "decay": [0.9]}, decay=0.5),
    Update: {},
    LogSpaced: at("record.evaluate", {"per_decade": [1]}, on("record.evaluate", LogSpaced(5))),
    Every: at("record.evaluate", {"steps": [2]}),
    At: at("record.evaluate", {"steps": [(2, 4)]}, on("record.evaluate", At((1,)))),
    Never: {},
    Record: at(
        "record",
        {"train": [Every(1)], "evaluate": [Every(2)], "weights": [Every(2), None, Never()], "examples": [5], "by_position": [False]},
    ),
    Run: {
        "task": [(BASE, on("task", Parity(length=5)))],
        "model": [(BASE, on("model", Transformer(layers=1, d_model=4, heads=1)))],
        "optim": [(BASE, on("optim", AdamW()))],
        "batch": [(BASE, based(batch=5))],
        "steps": [(BASE, based(steps=7))],
        "examples": [(based(steps=None, examples=24), based(steps=None, examples=29))],
        "epochs": [(based(steps=None, train_set=12, epochs=2), based(steps=None, train_set=12, epochs=2.5))],
        "flops": [(based(steps=None, flops=1e6), based(steps=None, flops=2e6))],
        "count": [(based(steps=None, flops=1e6), based(steps=None, flops=1e6, count="matmul"))],
        "order": [(based(train_set=12), based(train_set=12, order=order)) for order in ("listed", "short_to_long")],
        "train_set": [(BASE, based(train_set=12)), (based(train_set=12), based(train_set=13))],
        "seed": [(BASE, based(seed=1)), (based(data_seed=0, init_seed=0), based(seed=1, data_seed=0, init_seed=0))],
        "data_seed": [(BASE, based(data_seed=1))],
        "init_seed": [(BASE, based(init_seed=1))],
        "trained": [(BASE, based(trained=globs)) for globs in (("blocks.*",), ("!blocks.*",))],
        "update": [(BASE, based(update=Doubled()))],
        "record": [(BASE, based(record=Record()))],
        **{name: [] for name in APART},
    },
}
LISTED = [(f"{cls.kind}.{name}", pair) for cls, by in CASES.items() for name, pairs in by.items() for pair in pairs]
