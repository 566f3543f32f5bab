"""Probes: the problem of scikit-learn, and the hand-made adder, whose features are known to be where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from elegans.instruments.linear import fit_logistic
from elegans.instruments.probe import Probe
from elegans.models.handmade import DIRECTIONS, adder
from elegans.randomness import Purpose, key_for
from elegans.tasks import Addition
from elegans.tasks.sampling import prepare
from elegans.training import Run

LENGTH = 8


@pytest.mark.parametrize("separable", [False, True])
def test_the_same_optimum_as_scikit_learn(separable):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 7)).astype(np.float32)
    score = x @ rng.normal(size=7) + 0.3
    y = (score + (0 if separable else 1.5) * rng.normal(size=300) > 0).astype(np.float32)
    ours = fit_logistic(jnp.asarray(x), jnp.asarray(y), jnp.ones(300), 100.0)
    theirs = LogisticRegression(C=100.0, tol=1e-10, max_iter=10_000).fit(x, y)
    np.testing.assert_allclose(ours.w, theirs.coef_[0], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(ours.b, theirs.intercept_[0], rtol=2e-3, atol=2e-3)


def test_uncounted_examples_do_not_matter():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(100, 3)).astype(np.float32), (rng.random(100) < 0.5).astype(np.float32)
    counted = (np.arange(100) < 60).astype(np.float32)
    whole = fit_logistic(jnp.asarray(x), jnp.asarray(y), jnp.asarray(counted), 1.0)
    part = fit_logistic(jnp.asarray(x[:60]), jnp.asarray(y[:60]), jnp.ones(60), 1.0)
    np.testing.assert_allclose(whole.w, part.w, atol=1e-4)
    np.testing.assert_allclose(whole.loss, part.loss, atol=1e-5)


@pytest.fixture(scope="module")
def adder_probes():
    task = Addition(length=LENGTH)
    model, params = adder(task)
    run = Run(task, model, steps=1, data_seed=0, init_seed=0)
    probe = Probe(families=("embed", "resid", "attn_out"), fit=512, test=512)
    blocks = jax.jit(lambda p: probe.apply(run, p, prepare(task), key_for(0, Purpose.INSTRUMENT)))(params)
    rows = {name: [site["site"] for site in layout.axes[0]] for name, layout in probe.layouts(run).items()}
    return {name: {s: {k: np.asarray(v[i]) for k, v in blocks[name].items()} for i, s in enumerate(rows[name])} for name in blocks}


@pytest.mark.parametrize("feature", ["carry", "first_operand"])
def test_features_are_found_where_they_are(adder_probes, feature):
    for site in ("attn_out.1", "resid.1"):
        assert site in DIRECTIONS[feature].sites
        assert adder_probes[feature][site]["accuracy"].min() > 0.995
        assert adder_probes[feature][site]["log_loss"].max() < 0.03


@pytest.mark.parametrize("site", ["embed", "resid.0"])
def test_features_are_not_found_where_they_are_not(adder_probes, site):
    # Nothing has looked back yet. The token there is the answer bit z_(r-1), independent of x_r; and z_r = 0 tells of the
    # carry out of bit r in 3 cases of 4: x_r, y_r and the carry into r are fair enough that P(carry = not z) = 3/4 at the limit.
    assert abs(adder_probes["first_operand"][site]["accuracy"].mean() - 0.5) < 0.04
    assert abs(adder_probes["carry"][site]["accuracy"].mean() - 0.75) < 0.04


def test_controls_are_at_chance(adder_probes):
    for feature in adder_probes.values():
        for scores in feature.values():
            assert scores["control"].mean() <= scores["chance"].mean() + 0.03
            assert (scores["chance"] >= 0.5).all() and (scores["chance"] < 0.85).all()
