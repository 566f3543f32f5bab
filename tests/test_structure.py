"""What of a run is a leaf, and may differ inside a cohort, and what is structure."""

import jax
import pytest

from elegans import (
    MLP,
    WSD,
    AdamW,
    Addition,
    At,
    Cosine,
    Every,
    LayerNorm,
    Learned,
    Parity,
    Record,
    Run,
    Spec,
    SwiGLU,
    Transformer,
    note,
    replace,
    spec,
    varies,
)
from elegans.specs import flat, get, to_dict
from elegans.training.cohort import resolve
from helpers import leaves

FULL = Run(
    Parity(length=6, shortest=2),
    Transformer(layers=1, d_model=8, heads=2, dropout=0.1, init_std=0.02, mlp=SwiGLU(ratio=2)),
    AdamW(schedule=WSD(warmup_steps=3)),
    batch=4,
    steps=10,
    train_set=32,
    record=Record(weights=Every(5)),
)


def structure_of(run: Run):
    return jax.tree.structure(resolve(run))


def test_leaves_are_the_floats_and_what_varies() -> None:
    expected = {"optim.lr", "optim.clip", "optim.weight_decay", "optim.b1", "optim.b2", "optim.eps"}
    expected |= {f"optim.schedule.{name}" for name in ("warmup", "warmup_steps", "start", "decay", "end")}
    expected |= {"model.attention.scale", "model.dropout", "model.init_std", "steps", "seed", "data_seed", "init_seed"}
    assert set(leaves(resolve(FULL))) == expected


@pytest.mark.parametrize("path", sorted(leaves(resolve(FULL))))
def test_changing_a_leaf_keeps_the_structure(path) -> None:
    old = get(resolve(FULL), path)
    new = old + 1 if isinstance(old, int) else old / 2 + 1e-3
    start = FULL if path not in ("optim.schedule.warmup",) else replace(FULL, "optim.schedule.warmup_steps", None)
    assert structure_of(replace(start, path, new)) == structure_of(start)


OTHERWISE = {
    "task": Addition(length=4),
    "task.length": 7,
    "task.shortest": 3,
    "task.cot": False,
    "task.compat": "paper",
    "task.split": None,
    "task.split.train": 0.8,
    "task.split.validation": 0.06,
    "task.split.key": 1,
    "model.layers": 2,
    "model.d_model": 16,
    "model.heads": 4,
    "model.d_head": 6,
    "model.attention": None,
    "model.mlp": MLP(),
    "model.mlp.ratio": 3.0,
    "model.norm": LayerNorm(),
    "model.norm.eps": 1e-3,
    "model.position": Learned(),
    "model.position.theta": 100.0,
    "model.tied": True,
    "model.bias": True,
    "model.dropout": None,
    "model.init_std": None,
    "model.dtype": "bfloat16",
    "optim.clip": None,
    "optim.decay": "matrices",
    "optim.schedule": Cosine(),
    "optim.schedule.warmup_steps": None,
    "batch": 8,
    "count": "matmul",
    "train_set": 64,
    "record.train": Every(7),
    "record.train.per_decade": 3,
    "record.evaluate": At((3,)),
    "record.evaluate.per_decade": 3,
    "record.weights.steps": 6,
    "record.weights": None,
    "record.examples": 99,
    "record.by_position": False,
}


@pytest.mark.parametrize("path", OTHERWISE)
def test_changing_structure_parts_cohorts(path) -> None:
    assert structure_of(replace(FULL, path, OTHERWISE[path])) != structure_of(FULL)


def test_every_field_is_either_a_leaf_or_listed_as_structure() -> None:
    lengths_and_words = {"examples", "epochs", "flops", "label", "update", "model", "optim", "record"}
    given = set(leaves(resolve(FULL))) | set(OTHERWISE) | lengths_and_words
    assert set(flat(to_dict(FULL))) - given == set()


def test_a_leaf_that_is_off_is_structure() -> None:
    for path in ("optim.clip", "model.dropout", "model.init_std"):
        assert structure_of(replace(FULL, path, None)) != structure_of(FULL)
        assert path not in leaves(replace(FULL, path, None))


def test_trees_of_specs_are_rebuilt_whole() -> None:
    back = jax.tree.map(lambda leaf: leaf, FULL)
    assert back == FULL
    doubled = jax.tree.map(lambda leaf: leaf * 2, AdamW(lr=1e-3))
    assert doubled.lr == 2e-3 and doubled.decay == "all"


def test_notes_do_not_reach_the_program() -> None:
    @spec
    class Noted(Spec):
        gain: float = 1.0
        seed: int = varies(0, "varies")
        size: int = 3
        word: str | None = note(None, "means nothing")

    assert jax.tree.structure(Noted(word="a")) == jax.tree.structure(Noted(word="b"))
    assert set(leaves(Noted())) == {"gain", "seed"}
    assert "word" not in to_dict(Noted(word="a"))
