"""Specs: the identity of a run, its way to data and back, sweeps, and one-line errors."""

import dataclasses
import functools
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elegans import (
    MLP,
    AdamW,
    Addition,
    At,
    Attention,
    Cosine,
    FixedAttention,
    Invalid,
    LayerNorm,
    Learned,
    Linear,
    Lion,
    Optimizer,
    RMSNorm,
    Run,
    Spec,
    Split,
    SwiGLU,
    Task,
    Transformer,
    Update,
    field,
    grid,
    identity,
    replace,
    spec,
    specs,
)
from elegans.specs import flat, from_dict, get, to_dict
from elegans.training.run import fill

RUN = Run(Addition(length=4), Transformer(layers=1, d_model=8, heads=2), AdamW(lr=1e-3, schedule=Cosine(warmup=0.1)), batch=4, steps=10)
DATA = {
    "task": {"kind": "addition", "length": 4},
    "model": {"kind": "transformer", "layers": 1, "d_model": 8, "heads": 2},
    "optim": {"kind": "adamw", "lr": 1e-3, "schedule": {"kind": "cosine", "warmup": 0.1}},
    "batch": 4,
    "steps": 10,
}


# ---- identity


def backwards(data):
    """The same mappings, keys in the opposite order."""
    return {k: backwards(v) for k, v in reversed(data.items())} if isinstance(data, dict) else data


def test_the_order_of_keys_and_the_way_of_building_do_not_matter() -> None:
    assert from_dict(Run, DATA) == from_dict(Run, backwards(DATA)) == RUN
    assert RUN.id == identity(RUN) == from_dict(Run, backwards(DATA)).id


def test_ids_are_twelve_hexadecimal_digits_and_tell_runs_apart() -> None:
    runs = grid(RUN, {"optim.lr": [1e-3, 1.0000001e-3], "seed": range(20), "task.length": [4, 5]})
    assert len({run.id for run in runs}) == 80
    assert all(len(run.id) == 12 and set(run.id) <= set("0123456789abcdef") for run in runs)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_ids_are_the_same_in_another_process(hash_seed) -> None:
    program = (
        "import json, sys, elegans as el\nfrom elegans.specs import from_dict\n"
        "print([r.id for r in el.grid(from_dict(el.Run, json.loads(sys.argv[1])), {'seed': range(3), 'model.mlp': ['mlp', None]})])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    made = subprocess.run([sys.executable, "-c", program, json.dumps(DATA)], env=environment, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == str([run.id for run in grid(RUN, {"seed": range(3), "model.mlp": ["mlp", None]})])


def test_whole_numbers_given_for_floats_are_floats() -> None:
    assert (
        from_dict(Run, {**DATA, "optim": {"kind": "adamw", "lr": 1}}).id
        == from_dict(Run, {**DATA, "optim": {"kind": "adamw", "lr": 1.0}}).id
    )
    whole = AdamW(lr=1)
    assert type(whole.lr) is float and whole == AdamW(lr=1.0)


def test_labels_and_defaults_written_out_are_no_part_of_the_identity() -> None:
    assert dataclasses.replace(RUN, label="mine").id == RUN.id
    assert from_dict(Run, {**DATA, "seed": 0, "update": "update", "train_set": None}).id == RUN.id


def test_an_option_that_is_off_by_default_can_be_added_without_changing_ids() -> None:
    @spec
    class Before(Spec):
        kind: ClassVar[str] = "probe_of_ids"
        gain: float = 1.0

    @spec
    class After(Spec):
        kind: ClassVar[str] = "probe_of_ids"
        gain: float = 1.0
        window: int | None = None
        part: Split | None = None

    assert identity(Before(2.0)) == identity(After(2.0))
    assert len({identity(s) for s in (After(2.0), After(2.0, window=3), After(2.0, part=Split()), After(3.0))}) == 4


def test_switching_off_what_is_on_by_default_changes_the_id_and_survives_the_way_to_data() -> None:
    off = replace(RUN, "optim.clip", None)
    assert off.id != RUN.id
    assert from_dict(Run, to_dict(off)).optim.clip is None


# ---- to data and back

unit, positive, small = st.just(0.0) | st.floats(1e-30, 0.99), st.floats(1e-30, 1e30), st.integers(1, 99)


def made_of(kind: str | None = None, /, **fields: st.SearchStrategy) -> st.SearchStrategy:
    """Plain data of a spec, with any of its fields left out."""
    return st.fixed_dictionaries({"kind": st.just(kind)} if kind else {}, optional=fields)


def one_of_words(*words: str | bool | None) -> st.SearchStrategy:
    return st.sampled_from(words)


off, coin = st.none(), st.booleans()
splits = off | st.sampled_from([{}, {"train": 0.8, "validation": 0.1, "key": 7}, {"train": 0.5, "validation": 0.25}])
order = one_of_words("lsb", "msb")
tasks = made_of("addition", length=st.integers(1, 4096), cot=coin, inputs=order, outputs=order, split=splits) | made_of(
    "parity", length=st.integers(9, 15), shortest=off | st.integers(1, 9), cot=coin, compat=one_of_words("paper", None), split=splits
)
schedules = st.one_of(
    made_of("constant", warmup=unit, start=unit),
    made_of("cosine", warmup_steps=off | small, end=unit),
    made_of("linear", warmup=unit, end=unit),
    made_of("wsd", decay=st.floats(0.01, 1), end=unit),
)
maps = one_of_words("uniform", "self", "previous", "first")
models = made_of(
    "transformer",
    layers=st.integers(1, 256),
    d_model=st.sampled_from([8, 64]),
    heads=st.sampled_from([1, 2, 4]),
    d_head=off | st.sampled_from([2, 6]),
    attention=off | made_of("attention", scale=positive) | made_of("fixed_attention", maps=st.lists(maps, min_size=1, max_size=1)),
    mlp=off | made_of("swiglu", ratio=off | st.floats(0.1, 64)) | made_of("mlp", activation=one_of_words("relu", "gelu_tanh")),
    norm=off | made_of("rms_norm", eps=positive) | st.just("layer_norm"),
    position=off
    | made_of("rotary", theta=positive)
    | made_of("learned", dims=off | st.integers(1, 8))
    | st.sampled_from(["sinusoidal", "alibi"]),
    tied=coin,
    bias=coin,
    dropout=off | unit,
    embed_dropout=off | unit,
    init_std=off | unit,
    dtype=one_of_words("float32", "bfloat16", "tensorfloat32"),
)
optims = made_of("adamw", lr=positive, clip=off | positive, schedule=schedules, b1=unit, decay=one_of_words("all", "matrices"))
whens = (
    made_of("log_spaced", per_decade=small)
    | made_of("every", steps=st.integers(1, 10**9))
    | made_of("at", steps=st.lists(st.integers(0, 99)))
)
records = made_of(train=whens, evaluate=whens, weights=off | whens, examples=small, by_position=coin)
lengths = st.one_of(
    st.fixed_dictionaries({"steps": st.integers(1, 2**20)}),
    st.fixed_dictionaries({"examples": st.floats(1, 1e6) | small}),
    st.fixed_dictionaries({"epochs": st.floats(0.1, 9), "train_set": small}),
    st.fixed_dictionaries({"flops": st.floats(1, 1e9)}),
)
seed = st.integers(0, 2**31 - 1)
needed = st.fixed_dictionaries({"task": tasks, "model": models, "batch": small})
runs = st.tuples(
    needed, made_of(optim=optims, record=records, seed=seed, data_seed=off | seed, init_seed=off | seed, label=st.text()), lengths
)


def shown(data, path: str = "") -> dict[str, object]:
    """Every value of plain data by its path."""
    if isinstance(data, dict):
        return {k: v for name, inner in data.items() for k, v in shown(inner, f"{path}.{name}").items()}
    return {path: data}


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(runs)
def test_every_run_survives_the_way_to_data_and_back(parts) -> None:
    data = {k: v for part in parts for k, v in part.items()}
    run = from_dict(Run, data)
    plain = json.loads(json.dumps(to_dict(run), allow_nan=False))
    back, bare = from_dict(Run, plain), dataclasses.replace(run, label=None)
    assert back == bare and back.id == run.id and hash(back) == hash(bare)
    found = shown(plain)
    for path, value in shown({k: v for k, v in data.items() if k != "label"}).items():
        kept = found.get(path, found.get(f"{path}.kind"))  # a bare name, or none left out
        assert kept == value, path


def test_a_bare_name_stands_for_a_kind_with_its_defaults() -> None:
    assert from_dict(Optimizer, "adamw") == AdamW() == from_dict(Optimizer, {"kind": "adamw"})
    assert replace(RUN, "optim.schedule", "linear").optim.schedule == Linear()
    assert replace(RUN, "model.mlp", {"kind": "mlp", "ratio": 2}).model.mlp == MLP(ratio=2.0)


# ---- sweeps


def test_grids_are_products_with_the_last_axis_fastest() -> None:
    made = grid(RUN, {"optim.lr": [1e-3, 1e-2], "task.length": [4, 5, 6], "seed": range(4)})
    assert [(r.optim.lr, r.task.length, r.seed) for r in made] == [(lr, n, s) for lr in (1e-3, 1e-2) for n in (4, 5, 6) for s in range(4)]
    assert made[0].model is RUN.model or made[0].model == RUN.model


def test_fields_that_bind_each_other_change_together_in_any_order() -> None:
    axes = {"model.heads": [3], "model.d_model": [12], "steps": [None], "flops": [1e6], "optim.lr": [0.5], "optim": ["lion"]}
    for items in (list(axes.items()), list(axes.items())[::-1]):
        (made,) = grid(RUN, dict(items))
        assert (made.model.heads, made.model.d_model, made.steps, made.flops, made.optim) == (3, 12, None, 1e6, Lion(lr=0.5))
    with pytest.raises(Invalid, match="multiple of heads=3"):
        grid(RUN, {"model.heads": [3], "model.d_model": [8]})
    both = grid(RUN, {"model.position": [None], "model.heads+model.layers": [1, 2]})[1].model
    assert (both.position, both.heads, both.layers) == (None, 2, 2)


def test_contradictions_are_refused_in_what_came_from_a_tree_too_and_never_while_it_is_traced() -> None:
    again = jax.tree.map(lambda leaf: leaf, RUN)
    assert again == RUN
    for run in (RUN, again):
        with pytest.raises(Invalid, match="multiple of heads=2"):
            replace(run, "model.d_model", 7)
    inside = jax.jit(lambda run: replace(run, "optim.lr", run.optim.lr * 2).optim.lr)  # arrays: nothing to compare
    assert float(inside(RUN)) == pytest.approx(2e-3)


def test_grids_sweep_kinds_whole_specs_and_off() -> None:
    made = grid(RUN, {"model.norm": ["layer_norm", None, RMSNorm(eps=1e-3)]})
    assert [r.model.norm for r in made] == [LayerNorm(), None, RMSNorm(eps=1e-3)]
    assert grid(RUN, {}) == [RUN]
    assert grid(RUN, {"model.dtype": "bfloat16"})[0].model.dtype == "bfloat16"  # a word is one value, not its letters


def test_a_sweep_may_come_from_numpy() -> None:
    """`np.logspace` is how a learning rate is swept: its numbers are checked, and named, like any others."""
    made = grid(RUN, {"optim.lr": np.logspace(-4, -2, 3), "seed": np.arange(2)})
    plain = grid(RUN, {"optim.lr": np.logspace(-4, -2, 3).tolist(), "seed": [0, 1]})
    assert [r.id for r in made] == [r.id for r in plain]
    with pytest.raises(Invalid, match=r"^optim\.lr: "):
        replace(RUN, "optim.lr", np.float64(-1.0))
    with pytest.raises(Invalid, match=r"^batch: "):
        replace(RUN, "batch", np.int64(0))


@pytest.mark.parametrize("axes", [None, 3, "seed", [("seed", [0])]])
def test_a_sweep_is_a_mapping(axes) -> None:
    with pytest.raises(Invalid, match=r"^axes: "):
        inspect.unwrap(grid)(RUN, axes)  # without the types that tests check


@pytest.mark.parametrize("kind", [Callable[[float], float], dict[str, float], list[int], tuple[int, int], Any, np.ndarray], ids=str)
def test_a_field_that_no_store_can_hold_is_refused_where_it_is_declared(kind) -> None:
    made = type("Weird", (Optimizer,), {"__annotations__": {"lr": float, "own": kind | None}, "lr": 1e-3, "own": None})
    with pytest.raises(Invalid, match=r"^Weird\.own: .*allowed: int, float"):
        spec(made)


def test_replace_changes_one_field_and_nothing_else() -> None:
    made = replace(RUN, "optim.schedule.end", 0.5)
    before, after = (flat(to_dict(run)) for run in (RUN, made))
    assert {k for k in before if before[k] != after[k]} == {"optim.schedule.end"}
    assert RUN.optim.schedule.end == 0.1
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 3


def test_labels_are_filled_from_fields() -> None:
    assert fill("lr={optim.lr} d={model.d_model} {model.mlp}", RUN) == "lr=0.001 d=8 swiglu"
    assert get(RUN, "optim.schedule.warmup") == 0.1


# ---- errors: one line that names the field, the value and what is allowed

SHADOWING = type("Shadowing", (Update,), {"__annotations__": {"logits": float}, "logits": 1.0})


@spec
class Inner(Spec):
    part_gain: float = field(1.0, "a float whose name begins like the field that holds it", ge=0)


@spec
class Outer(Spec):
    part: Inner = field(Inner(), "holds it")


class Undecorated(Attention):
    pass


def overriding(base, **body):
    """A subclass with these in its body."""
    return spec(type("O", (base,), body))


BROKEN = {
    "unknown field": (lambda: from_dict(Run, {**DATA, "bach": 4}), "bach", "4", "batch"),
    "unknown nested field": (lambda: from_dict(Run, {**DATA, "optim": {"kind": "adamw", "rl": 1}}), "optim.rl", "1", "weight_decay"),
    "unknown path": (lambda: replace(RUN, "optim.rl", 1), "optim.rl", "rl", "weight_decay"),
    "a path through a number": (lambda: replace(RUN, "optim.lr.x", 1), "optim.lr.x", "x", "no spec"),
    "a path through what is off": (
        lambda: replace(replace(RUN, "task.split", None), "task.split.key", 1),
        "task.split.key",
        "1",
        "switch it on",
    ),
    "wrong type": (lambda: replace(RUN, "optim.lr", "fast"), "optim.lr", "fast", "a finite number and > 0"),
    "wrong type for a spec": (lambda: replace(RUN, "optim", 3), "optim", "3", "adamw"),
    "a list for a spec": (lambda: from_dict(Run, {**DATA, "task": [1]}), "task[0]", "1", "addition"),
    "a list for a number": (lambda: from_dict(Run, {**DATA, "batch": [4]}), "batch", "[4]", "a whole number"),
    "fraction for a whole number": (lambda: replace(RUN, "batch", 2.5), "batch", "2.5", "a whole number and >= 1"),
    "nan": (lambda: AdamW(lr=float("nan")), "lr", "nan", "a finite number"),
    "infinity": (lambda: AdamW(lr=float("inf")), "lr", "inf", "a finite number"),
    "a number too large for a float": (lambda: AdamW(lr=10**400), "lr", "1000", "a finite number"),
    "negative": (lambda: AdamW(lr=-1e-3), "lr", "-0.001", "> 0"),
    "too large for float32": (lambda: replace(RUN, "optim.lr", 1e39), "optim.lr", "1e+39", "float32"),
    "too small for float32": (lambda: replace(RUN, "optim.lr", 1e-50), "optim.lr", "1e-50", "float32"),
    "an array out of bounds": (lambda: replace(RUN, "optim.lr", np.array(-1.0)), "optim.lr", "-1.0", ">"),
    "a field that hides a method": (lambda: spec(SHADOWING), "Shadowing.logits", "field", "method of its base"),
    "a method that lacks an argument": (
        lambda: overriding(Task, sample=lambda self, key: key),
        "O.sample",
        "(self, key)",
        "data), as in Task",
    ),
    "a method that wants one more": (lambda: overriding(Cosine, shape=lambda self, t, u: t), "O.shape", "u)", "allowed: (self, t), as in"),
    "a method without what is given by name": (
        lambda: overriding(Transformer, apply=lambda self, params, tokens, key=None: params),
        "O.apply",
        "(self, params, tokens, key)",
        "(self, params, tokens, *, edit, key, upto)",
    ),
    "a method for a property": (
        lambda: overriding(Task, symbols=lambda self: ("a", "b")),
        "O.symbols",
        "a method",
        "a property, as in Task",
    ),
    "a property for a method": (lambda: overriding(Task, floor=property(lambda self: 0.0)), "O.floor", "a property", "(self), as in Task"),
    "too large a seed": (lambda: replace(RUN, "seed", 2**31), "seed", "2147483648", "<"),
    "bool for a whole number": (lambda: replace(RUN, "batch", True), "batch", "True", "a whole number"),
    "bool for a float": (lambda: replace(RUN, "optim.lr", True), "optim.lr", "True", "a finite number"),
    "number for a bool": (lambda: replace(RUN, "task.cot", 1), "task.cot", "1", "true or false"),
    "a word that is not offered": (lambda: replace(RUN, "task.inputs", "big"), "task.inputs", "big", "lsb | msb"),
    "none where it must be on": (lambda: replace(RUN, "batch", None), "batch", "None", "a whole number"),
    "bad item of a list": (lambda: At(steps=(1, -1)), "steps", "-1", ">= 0"),
    "empty sweep": (lambda: grid(RUN, {"optim.lr": []}), "optim.lr", "[]", "at least one value"),
    "a sweep that is no list": (lambda: grid(RUN, {"seed": 3}), "seed", "3", "list"),
    "bad value in a sweep": (lambda: grid(RUN, {"optim.lr": [1e-3, 0]}), "optim.lr", "0", "> 0"),
    "unknown kind": (lambda: from_dict(Run, {**DATA, "task": {"kind": "adition"}}), "task.kind", "adition", "addition, "),
    "unknown kind by name": (lambda: replace(RUN, "optim", "adamv"), "optim.kind", "adamv", "adamw"),
    "a kind of another family": (lambda: from_dict(Run, {**DATA, "task": "adamw"}), "task.kind", "adamw", "addition"),
    "a kind that is no word": (lambda: from_dict(Run, {**DATA, "task": {"kind": ["addition"]}}), "task.kind", "addition", "parity"),
    "no kind": (lambda: from_dict(Run, {**DATA, "task": {"length": 3}}), "task.kind", "None", "addition"),
    "an unknown field in Python": (lambda: Transformer(d_modell=8), "d_modell", "8", "unknown field of transformer; allowed: layers, "),
    "a missing field": (lambda: from_dict(Run, {"task": "addition", "steps": 1}), "model", "None", "transformer"),
    "no mapping": (lambda: from_dict(Run, 3), "", "3", "mapping"),
    "an undecorated subclass": (lambda: Undecorated(), "Undecorated", "undecorated", "@el.spec"),
    "a field of an undecorated subclass": (lambda: Undecorated(new=1), "Undecorated", "undecorated", "@el.spec"),
    "no length": (lambda: replace(RUN, "steps", None), "steps", "None", "exactly one of steps, examples, epochs, flops"),
    "two lengths": (lambda: replace(RUN, "flops", 1e9), "steps", "flops", "exactly one of steps, examples, epochs, flops"),
    "epochs of nothing": (lambda: dataclasses.replace(RUN, steps=None, epochs=3.0), "epochs", "3", "train_set"),
    "endless epochs": (lambda: dataclasses.replace(RUN, steps=None, epochs=1e308, train_set=1000), "epochs", "1e+308", "allowed"),
    "too many steps": (lambda: dataclasses.replace(RUN, steps=None, flops=1e30), "flops", "1e+30", "steps"),
    "two warm-ups": (lambda: Cosine(warmup=0.1, warmup_steps=5), "warmup_steps", "5", "not both"),
    "heads that do not divide": (lambda: replace(RUN, "model.heads", 3), "model.d_model", "8", "multiple of heads=3"),
    "an odd width to rotate": (lambda: replace(RUN, "model.d_head", 3), "model.d_head", "3", "even"),
    "a norm for an MLP": (lambda: Transformer(mlp=RMSNorm()), "mlp", "RMSNorm", "swiglu"),
    "a norm for an MLP by name": (lambda: replace(RUN, "model.mlp", "rms_norm"), "model.mlp.kind", "rms_norm", "mlp, "),
    "an MLP for attention": (lambda: Transformer(attention=SwiGLU()), "attention", "SwiGLU", "a Mixer (attention, "),
    "attention for some layers": (lambda: Transformer(attention=[Attention()]), "attention", "1 components", "layers=2"),
    "maps for some heads": (lambda: Transformer(attention=FixedAttention(("self",) * 3)), "attention.maps", "self", "heads=4"),
    "more positions than width": (lambda: Transformer(d_model=8, position=Learned(dims=9)), "position.dims", "9", "d_model=8"),
    "a skip path without a norm": (lambda: Transformer(norm=None, skip="normed"), "skip", "normed", "norm"),
    "a long value": (lambda: replace(RUN, "optim.lr", "x" * 500), "optim.lr", "xxx", "a finite number"),
    "a value of two lines": (lambda: replace(RUN, "task.inputs", "l\nsb"), "task.inputs", "sb", "lsb | msb"),
    "a field named like its holder": (lambda: replace(Outer(), "part.part_gain", -1), "part.part_gain", "-1", ">= 0"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_input_gets_one_line_with_the_field_the_value_and_what_is_allowed(case) -> None:
    make, name, value, allowed = BROKEN[case]
    with pytest.raises(Invalid) as caught:
        make()
    line = str(caught.value)
    assert "\n" not in line and len(line) < 1000
    assert line.startswith(f"{name}: ")
    said = line.removeprefix(f"{name}: ")
    assert value in said and allowed in said


def test_a_method_may_take_more_than_its_base_s_under_names_of_its_own() -> None:
    """And a property may be cached, or a plain value."""
    before = {kind: list(classes) for kind, classes in specs._KINDS.items()}
    try:
        overriding(Task, sample=lambda self, *rest: rest, symbols=("a", "b"), positions=functools.cached_property(lambda self: 3))
        overriding(Cosine, shape=lambda self, share, power=2: share**power, helper=lambda self: None, __call__=lambda self: None)
        overriding(Transformer, apply=lambda self, params, tokens, **rest: params)
    finally:
        specs._KINDS.clear()
        specs._KINDS.update(before)


def test_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="lr"):
        AdamW(lr=0)


def test_two_classes_of_one_name_are_refused_where_the_name_is_used() -> None:
    def make(module: str) -> None:
        body = {"__annotations__": {"gain": float}, "gain": 1.0, "__module__": module, "kind": "probe_of_kinds"}
        spec(type("Twice", (Optimizer,), body))

    make("one")
    assert from_dict(Optimizer, "probe_of_kinds").gain == 1.0
    make("one")  # the newest definition in one file wins
    from_dict(Optimizer, "probe_of_kinds")
    make("two")
    with pytest.raises(Invalid, match=r"kind: 'probe_of_kinds' .*one\.Twice and two\.Twice"):
        from_dict(Optimizer, "probe_of_kinds")


def test_abstract_classes_are_no_kinds() -> None:
    with pytest.raises(Invalid, match=r"^kind: 'task' is not allowed"):
        from_dict(Task, "task")
