"""Ablation of the hand-made adder: its carry is causal, its copy of the first operand is read by nobody."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans.errors import Invalid
from elegans.instruments.ablate import Ablate, Removal, measured, orthonormal, summary
from elegans.instruments.probe import reads, vectors
from elegans.models.handmade import DIRECTIONS, adder
from elegans.randomness import Purpose, key_for
from elegans.tasks import Addition
from elegans.tasks.sampling import draw_set, prepare
from elegans.training import Run

METHODS = ("projection", "mean", "resample")


@pytest.fixture(scope="module")
def ablated():
    task = Addition(length=8)
    model, params = adder(task)
    run = Run(task, model, steps=1, data_seed=0, init_seed=0)
    ablate = Ablate(fit=512, test=256, draws=6, family="resid_mid", methods=METHODS)  # between carry and answer
    blocks = jax.jit(lambda p: ablate.apply(run, p, prepare(task), key_for(0, Purpose.INSTRUMENT)))(params)
    columns = {name: layout.columns() for name, layout in ablate.layouts(run).items()}
    names = ("direction", "method")
    return {n: {k: np.asarray(v).ravel() for k, v in b.items()} | {c: np.array(columns[n][c]) for c in names} for n, b in blocks.items()}


def test_unedited_is_perfect(ablated):
    for rows in ablated.values():
        assert (rows["base_exact_match"] == 1).all() and (rows["base_loss"] < 1e-3).all()


def test_directions_and_draws(ablated):
    kinds, counts = np.unique(ablated["carry"]["direction"], return_counts=True)
    assert dict(zip(kinds, counts, strict=True)) == {k: 3 * n for k, n in {"feature": 1, "random": 6, "matched": 6, "labels": 1}.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_carry_is_causal(ablated, method):
    rows = {name: values[ablated["carry"]["method"] == method] for name, values in ablated["carry"].items()}
    assert rows["exact_match"][rows["direction"] == "feature"] < 0.2  # 0.75^8 = 0.1 of the sums carry nothing
    assert rows["loss"][rows["direction"] == "feature"] > 0.5
    assert rows["exact_match"][rows["direction"] == "random"].mean() > 0.8


def test_intervals_hold_their_value(ablated):
    for rows in ablated.values():
        for name in ("loss", "exact_match"):
            assert (rows[f"{name}_low"] <= rows[name]).all() and (rows[name] <= rows[f"{name}_high"]).all()
        certain = (rows["exact_match"] == 0) | (rows["exact_match"] == 1)
        width = rows["exact_match_high"] - rows["exact_match_low"]
        share = rows["exact_match"]
        np.testing.assert_array_equal(width[certain], 0)
        # The normal approximation of a share over 256 rows, where it holds
        middling = (share > 0.05) & (share < 0.95)
        np.testing.assert_allclose(width[middling], 2 * 1.96 * np.sqrt(share * (1 - share) / 256)[middling], rtol=0.15)


def test_the_interval_of_a_mean_is_the_normal_one():
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(1, 400)).astype(np.float32)
    ones = jnp.ones((1, 400))
    rows = {"loss": jnp.asarray(values), "accuracy": ones, "exact_match": ones, "tokens": 3 * ones, "rows": ones}
    made = {k: float(v[0]) for k, v in jax.jit(summary)(rows, jax.random.key(0)).items()}
    half = 1.96 * values.std() / 20
    assert made["loss"] == pytest.approx(values.mean(), rel=1e-5)
    assert made["loss_high"] - made["loss_low"] == pytest.approx(2 * half, rel=0.1)


@pytest.fixture(scope="module")
def replaced():
    """Exact match of the adder with one exact direction replaced at resid_mid.1, where MLP 1 reads the carry.

    By a constant; where a shift is given, by the component of the row that many places away, if it `lends` its own.
    """
    task = Addition(length=8)
    model, params = adder(task)
    run, sites = Run(task, model, steps=1), ("resid_mid.1",)

    @functools.partial(jax.jit, static_argnums=0)
    def measure(feature, coordinate, target, resample, shift, lends):
        rows = draw_set(task, "test", jax.random.key(0), 64, prepare(task))
        unit = jnp.zeros((8, model.d_model, 1)).at[:, coordinate].set(1)
        removal = Removal(jnp.zeros(8, int), unit, unit, jnp.full((8, 1), target), resample)
        rolled = jax.tree.map(lambda a: jnp.roll(a, shift, 0), rows)
        donors = reads(run, vectors(run, params, rolled, sites), rolled, feature)
        donors = donors._replace(counted=donors.counted * lends)
        found = measured(run, params, rows, feature, sites, removal, donors)
        return found["exact_match"].mean()

    def replace(feature, target, shift=None, lends=1.0):
        return float(measure(feature, DIRECTIONS[feature].coordinate, target, jnp.int32(shift is not None), shift or 0, lends))

    return replace


@pytest.mark.parametrize(("feature", "exact_match"), [("carry", 0.0), ("first_operand", 1.0)])
def test_exact_directions(replaced, feature, exact_match):
    """The answer is still to come, and nothing reads the first operand."""
    assert replaced(feature, 0.5) == exact_match  # onto the plane where the bit is a half


def test_a_resampled_carry_is_another_rows(replaced):
    assert replaced("carry", 0.5, shift=0) == 1  # its own again
    assert replaced("carry", 0.5, shift=5) < 0.1  # eight carries of two rows are hardly ever the same
    assert replaced("first_operand", 0.5, shift=5) == 1
    assert replaced("carry", 0.5, shift=0, lends=0.0) == 0  # a row that has no such read lends nothing: the constant


def test_a_removed_subspace_is_gone_from_every_plane():
    """Two labels at an angle, one repeated, one that never varies: a plane of two dimensions, and both probes undecided on it."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 6)).astype(np.float32)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    w, offset = np.stack([a, np.zeros_like(a), a, b], 1)[None], np.array([[0.3, 0.0, 0.3, -0.7]], np.float32)
    basis, plane = (np.asarray(v[0]) for v in jax.jit(orthonormal)(w, offset))
    kept = np.abs(basis).max(0) > 0
    assert kept.sum() == 2
    np.testing.assert_allclose(basis[:, kept].T @ basis[:, kept], np.eye(2), atol=1e-5)
    x = rng.normal(size=6).astype(np.float32)
    moved = x - basis @ (basis.T @ x - plane)
    np.testing.assert_allclose(w[0].T @ moved + offset[0], 0, atol=1e-4)
    outside = np.linalg.svd(w[0])[0][:, 2:]
    np.testing.assert_allclose(outside.T @ moved, outside.T @ x, atol=1e-5)


def test_a_method_is_asked_for_once():
    for methods in ((), ("mean", "mean")):
        with pytest.raises(Invalid, match="methods"):
            Ablate(methods=methods)
    with pytest.raises(Invalid, match=r"projection.*mean.*resample"):
        Ablate(methods=("zero",))
