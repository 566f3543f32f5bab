"""Ablation of the hand-made adder: its carry is causal, its copy of the first operand is read by nobody."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans.instruments.ablate import Ablate, Removal, _measure
from elegans.models.handmade import DIRECTIONS, adder
from elegans.randomness import Purpose, key_for
from elegans.tasks import Addition
from elegans.tasks.sampling import draw_set, prepare
from elegans.training import Run


@pytest.fixture(scope="module")
def ablated():
    task = Addition(length=8)
    model, params = adder(task)
    run = Run(task, model, steps=1, data_seed=0, init_seed=0)
    ablate = Ablate(fit=512, test=256, draws=6, family="resid_mid")  # between carry and answer
    blocks = jax.jit(lambda p: ablate.apply(run, p, prepare(task), key_for(0, Purpose.INSTRUMENT)))(params)
    columns = {name: layout.columns() for name, layout in ablate.layouts(run).items()}
    return {n: {k: np.asarray(v) for k, v in b.items()} | {"direction": np.array(columns[n]["direction"])} for n, b in blocks.items()}


def test_unedited_is_perfect(ablated):
    for rows in ablated.values():
        assert (rows["base_exact_match"] == 1).all() and (rows["base_loss"] < 1e-3).all()


def test_directions_and_draws(ablated):
    kinds, counts = np.unique(ablated["carry"]["direction"], return_counts=True)
    assert dict(zip(kinds, counts, strict=True)) == {"feature": 1, "random": 6, "matched": 6, "labels": 1}


def test_the_carry_is_causal(ablated):
    rows = ablated["carry"]
    assert rows["exact_match"][rows["direction"] == "feature"] < 0.2  # 0.75^8 = 0.1 of the sums carry nothing
    assert rows["exact_match"][rows["direction"] == "random"].mean() > 0.8


@pytest.mark.parametrize(("feature", "exact_match"), [("carry", 0.0), ("first_operand", 1.0)])
def test_exact_directions(feature, exact_match):
    """At resid_mid.1 the answer is still to come: MLP 1 reads the carry there, and nothing reads the first operand."""
    task = Addition(length=8)
    model, params = adder(task)
    rows = jax.jit(lambda k: draw_set(task, "test", k, 64, prepare(task)))(jax.random.key(0))
    unit = np.zeros((8, model.d_model), np.float32)
    unit[:, DIRECTIONS[feature].coordinate] = 1
    removal = Removal(jnp.zeros(8, int), unit, unit, jnp.full(8, -0.5))  # onto the plane where the bit is a half
    run = Run(task, model, steps=1)
    measure = jax.jit(lambda p, r: _measure(run, p, rows, feature, ("resid_mid.1",), r))
    assert float(measure(params, removal)["exact_match"]) == exact_match
