"""Probes of every kind of truth: scikit-learn's problems on known vectors, and a language that has one truth of each kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import log_loss, r2_score
from sklearn.multiclass import OneVsRestClassifier

from elegans.instruments import Ablate, Probe
from elegans.instruments.linear import fit_logistic, fit_squares
from elegans.instruments.probe import Reads, fit, halves, reads, score, with_random_labels
from elegans.models.transformer import Transformer
from elegans.randomness import Purpose, key_for
from elegans.specs import field, spec
from elegans.tasks.base import Task
from elegans.tasks.sampling import prepare
from elegans.training import Run
from elegans.types import Example, Truth

N, D, CLASSES = 400, 6, 3


def drawn(rng, weights, n=N):
    """Vectors, and labels of each kind that follow from them with noise."""
    x = rng.normal(size=(n, D)).astype(np.float32) * [1, 3, 0.3, 1, 1, 1] + 2
    scores = (x - 2) @ weights + rng.logistic(size=(n, CLASSES))
    return {"x": x, "multilabel": scores > 0.4, "categorical": scores.argmax(1), "number": np.round(10 * scores[:, 0])}


def as_reads(data, kind):
    """Two reads at one site, the second missing from the last quarter of the examples."""
    y = np.eye(CLASSES)[data[kind]] if kind == "categorical" else data[kind].reshape(len(data["x"]), -1)
    counted = np.ones((2, len(y)), np.float32)
    counted[1, 3 * len(y) // 4 :] = 0
    x = np.stack([data["x"]] * 2)[None]
    return Reads(*(jnp.asarray(v, jnp.float32) for v in (x, np.stack([y.T] * 2, 1), counted)), kind)


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(D, CLASSES))
    return drawn(rng, weights), drawn(rng, weights, 300)


def fitted(sets, kind, c=100.0):
    train, test = (as_reads(s, kind) for s in sets)
    counts = [N, 3 * N // 4], [300, 225]
    made = score(fit(train, c), test)
    return [{k: np.asarray(v)[:, 0, i] for k, v in made.items()} for i in (0, 1)], list(zip(*counts, strict=True))


def test_multilabel_probes_are_scikit_learns(sets):
    made, counts = fitted(sets, "multilabel")
    for ours, (n, m) in zip(made, counts, strict=True):
        for label in range(CLASSES):
            theirs = LogisticRegression(C=100.0, tol=1e-8, max_iter=10_000).fit(sets[0]["x"][:n], sets[0]["multilabel"][:n, label])
            p, y = theirs.predict_proba(sets[1]["x"][:m]), sets[1]["multilabel"][:m, label]
            assert ours["log_loss"][label] == pytest.approx(log_loss(y, p), abs=1e-3)
            assert ours["accuracy"][label] == pytest.approx((p.argmax(1) == y).mean(), abs=0.005)
            assert ours["chance"][label] == pytest.approx(max(y.mean(), 1 - y.mean()), abs=1e-6)


def test_categorical_probes_are_scikit_learns_one_against_the_rest(sets):
    made, counts = fitted(sets, "categorical")
    for ours, (n, m) in zip(made, counts, strict=True):
        one = LogisticRegression(C=100.0, tol=1e-8, max_iter=10_000)
        theirs = OneVsRestClassifier(one).fit(sets[0]["x"][:n], sets[0]["categorical"][:n])
        p, y = theirs.predict_proba(sets[1]["x"][:m]), sets[1]["categorical"][:m]
        assert ours["log_loss"][0] == pytest.approx(log_loss(y, p), abs=1e-3)
        assert ours["accuracy"][0] == pytest.approx((p.argmax(1) == y).mean(), abs=0.005)
        assert ours["chance"][0] == pytest.approx(np.bincount(y).max() / m, abs=1e-6)


def test_number_probes_are_scikit_learns_regressions(sets):
    made, counts = fitted(sets, "number")
    probes = fit(as_reads(sets[0], "number"), 100.0)
    for i, (ours, (n, m)) in enumerate(zip(made, counts, strict=True)):
        theirs = LinearRegression().fit(sets[0]["x"][:n], sets[0]["number"][:n])
        predicted, y = theirs.predict(sets[1]["x"][:m]), sets[1]["number"][:m]
        np.testing.assert_allclose(probes.w[0, 0, i], theirs.coef_, rtol=1e-3, atol=1e-3)
        assert float(probes.b[0, 0, i]) == pytest.approx(theirs.intercept_, rel=1e-3, abs=1e-3)
        assert ours["mse"][0] == pytest.approx(((predicted - y) ** 2).mean(), rel=1e-3)
        assert ours["r2"][0] == pytest.approx(r2_score(y, predicted), abs=1e-3)
        assert set(ours) == {"mse", "r2", "chance"} and ours["chance"][0] == 0


def test_the_penalty_is_scikit_learns_and_is_seen(sets):
    """At a C that matters the answer is Ridge's, and no longer that of plain least squares: the comparison can fail."""
    x, y = sets[0]["x"], sets[0]["number"].astype(np.float32)
    ours = fit_squares(jnp.asarray(x), jnp.asarray(y), jnp.ones(N), 1e-2)
    np.testing.assert_allclose(ours.w, Ridge(alpha=100.0).fit(x, y).coef_, rtol=1e-3, atol=1e-3)
    assert np.abs(ours.w - LinearRegression().fit(x, y).coef_).max() > 0.1
    weak, strong = (fitted(sets, "multilabel", c)[0][0]["log_loss"] for c in (1e-3, 100.0))
    assert (np.abs(weak - strong) > 0.01).all()


@pytest.mark.parametrize("kind", ["multilabel", "number"])
def test_vectors_that_hardly_vary_do_not_break_a_probe(sets, kind):
    """A long common vector, and coordinates that repeat each other: nothing to read but the base rate and what varies."""
    train, test = (as_reads(s, kind) for s in sets)
    copied = [r._replace(x=jnp.concatenate([r.x, r.x, 300 * jnp.ones_like(r.x)], -1)) for r in (train, test)]
    plain, odd = score(fit(train, 100.0), test), score(fit(copied[0], 100.0), copied[1])
    for name in plain:
        np.testing.assert_allclose(plain[name], odd[name], rtol=2e-3, atol=2e-3)
    flat = [r._replace(x=jnp.full_like(r.x, 70.0)) for r in (train, test)]
    found = np.asarray(score(fit(flat[0], 100.0), flat[1])["mse" if kind == "number" else "log_loss"])[:, 0, 0]
    base, y = train.y[:, 0].mean(1, keepdims=True), test.y[:, 0]
    expected = (y - base) ** 2 if kind == "number" else -(y * jnp.log(base) + (1 - y) * jnp.log(1 - base))
    np.testing.assert_allclose(found, expected.mean(1), rtol=1e-3)


def test_a_site_that_knows_two_tokens_has_two_vectors(sets):
    """Rank one in 64 dimensions, long vectors: rounding is larger than the penalty, and the factor at risk."""
    rng = np.random.default_rng(3)
    x = (rng.normal(size=(2, 64)) * 8)[rng.integers(0, 2, (40, 512))].astype(np.float32)
    y = rng.random((40, 512)) < 0.5
    probes = jax.jit(jax.vmap(fit_logistic, (0, 0, None, None)))(x, y.astype(np.float32), jnp.ones(512), 100.0)
    for i in range(40):
        theirs = LogisticRegression(C=100.0, tol=1e-8).fit(x[i].astype(np.float64), y[i])
        assert float(probes.loss[i]) == pytest.approx(log_loss(y[i], theirs.predict_proba(x[i])), abs=1e-4)


def test_random_labels_have_the_distribution_of_the_true_ones(sets):
    for kind in ("multilabel", "categorical", "number"):
        r = as_reads(sets[0], kind)
        true, random = halves(with_random_labels(jax.random.key(0), r).y)
        np.testing.assert_array_equal(true, r.y)
        assert set(np.unique(random)) <= set(np.unique(true))
        np.testing.assert_allclose(random.mean(-1), true.mean(-1), atol=4 * float(true.std()) / N**0.5)
        assert (np.asarray(random != true).mean() > 0.2) and not np.array_equal(random[:, 0], random[:, 1])
        # Examples that do not count lend no labels.
        only = r._replace(counted=r.counted.at[:, 1:].set(0))
        lent = halves(with_random_labels(jax.random.key(0), only).y)[1]
        np.testing.assert_array_equal(lent, jnp.broadcast_to(r.y[..., :1], r.y.shape))


# ---- a language with a truth of each kind


@spec
class Dice(Task):
    """Two numbers below 6 and their sum: `d e s`. A row with d = 0 ends after `d`'s read of `low`.

    face (categorical) d, read at d; bits (multilabel) of d, read at d, the highest of which is never set;
    total (number) d + e, read at e; low (binary) d < 3, read at d, and at e only where d > 0.
    """

    sides: int = field(6, "values of a number", ge=2, le=7)

    @property
    def symbols(self):
        return tuple("0123456789abc")

    @property
    def positions(self):
        return 3

    def sample(self, key, data):
        d, e = jax.random.randint(key, (2,), 0, self.sides)
        truth = {
            "face": Truth(d[None], jnp.array([0]), "categorical", classes=self.sides),
            "bits": Truth((d >> jnp.arange(4) & 1)[None], jnp.array([0]), "multilabel"),
            "total": Truth((d + e)[None], jnp.array([1]), "number"),
            "low": Truth(jnp.stack([d < 3, d < 3]).astype(int), jnp.stack([0, jnp.where(d > 0, 1, -1)]), "binary"),
        }
        return Example(jnp.stack([d, e, d + e]), jnp.arange(3) == 2, truth)

    def content(self, example):
        return example.tokens[:2]

    @property
    def contents(self):
        return None

    def scored_tokens(self):
        return 1.0


@pytest.fixture(scope="module")
def rolled():
    """Rows of a probe of every kind on an untrained network, at three sites."""
    run = Run(Dice(split=None), Transformer(layers=1, d_model=16, heads=2), steps=1, data_seed=0, init_seed=0)
    params = run.model.init(jax.random.key(1), 13, 3)
    probe = Probe(families=("embed", "resid", "head"), fit=256, test=256)
    blocks = jax.jit(lambda p: probe.apply(run, p, prepare(run.task), key_for(0, Purpose.INSTRUMENT)))(params)
    tables = []
    for name, layout in probe.layouts(run).items():
        columns = layout.columns()
        size = len(columns["feature"])
        values = {k: pa.array(np.asarray(v).ravel(), from_pandas=True) for k, v in blocks[name].items()}
        tables.append(pa.table({"run": ["a"] * size, "step": [0] * size, **columns, **values}))
    return probe.finish(pa.concat_tables(tables, promote_options="permissive")).to_pandas()


def test_every_kind_has_its_rows_and_its_metrics_and_nulls_for_the_others(rolled):
    sites = 4  # embed, resid.0, z.0.0, z.0.1
    assert rolled.groupby("feature").size().to_dict() == {"face": sites, "bits": 4 * sites, "total": sites, "low": 2 * sites}
    by = dict(list(rolled.groupby("feature")))
    assert sorted(by["bits"]["label"].unique()) == [0, 1, 2, 3] and by["face"]["label"].isna().all()
    for name in ("face", "bits", "low"):
        assert by[name][["mse", "r2"]].isna().all(axis=None) and by[name][["accuracy", "log_loss", "chance", "control"]].notna().all(
            axis=None
        )
    assert by["total"][["accuracy", "log_loss"]].isna().all(axis=None) and by["total"][["mse", "r2", "control"]].notna().all(axis=None)
    np.testing.assert_allclose(by["total"]["untrained"], by["total"]["r2"])
    np.testing.assert_allclose(by["face"]["untrained"], by["face"]["accuracy"])
    assert set(rolled["family"]) == {"embed", "resid", "head"} and set(rolled[rolled["family"] == "head"]["site"]) == {"z.0.0", "z.0.1"}
    assert (rolled[rolled["family"] == "embed"]["layer"] == -1).all() and (rolled[rolled["family"] == "head"]["layer"] == 0).all()


def test_what_a_token_knows_of_itself_is_found_at_the_embedding(rolled):
    here = rolled[(rolled["site"] == "embed") & (rolled["index"] == 0)].set_index("feature")
    assert (here.loc[["face", "bits", "low"], "accuracy"] == 1).all()
    assert here.loc["face", "chance"] < 0.25 and here.loc["face", "control"] < 0.3
    # The second number alone: half of the variance of the sum.
    assert here.loc["total", "r2"] == pytest.approx(0.5, abs=0.1) and here.loc["total", "control"] < 0.1
    assert here.loc["total", "mse"] == pytest.approx(35 / 12, abs=0.6)  # variance of a fair die
    assert rolled[(rolled["site"] == "resid.0") & (rolled["feature"] == "total")]["r2"].item() > 0.8  # attention mixes in the first


@pytest.mark.slow
def test_every_kind_can_be_ablated():
    run = Run(Dice(split=None), Transformer(layers=1, d_model=16, heads=2), steps=1, data_seed=0, init_seed=0)
    params = run.model.init(jax.random.key(1), 13, 3)
    for family in ("embed", "head"):
        ablate = Ablate(fit=128, test=64, draws=2, methods=("projection", "mean", "resample"), family=family)
        blocks = jax.jit(lambda p, a=ablate: a.apply(run, p, prepare(run.task), key_for(0, Purpose.INSTRUMENT)))(params)
        assert set(blocks) == {"face", "bits", "total", "low"}
        for name, block in blocks.items():
            rows = {k: np.asarray(v) for k, v in block.items()}
            assert rows["loss"].shape == (3, 6) and all(np.isfinite(v).all() for v in rows.values())
            if name == "total":  # the two are one for a number, up to random directions, which projection moves to 0
                np.testing.assert_allclose(rows["loss"][0, [0, 3, 4]], rows["loss"][1, [0, 3, 4]], rtol=1e-3)
            heard = family == "embed" or name in ("total", "low")  # past attention, nobody listens to the first token
            assert (rows["loss"] != rows["base_loss"]).any() == heard, (family, name)


def test_a_categorical_truth_without_classes_has_the_vocabularys():
    """A probe for every token."""
    run = Run(Dice(split=None), Transformer(layers=1, d_model=16, heads=2), steps=1)
    keys = jax.random.split(jax.random.key(0), 8)
    rows = jax.vmap(lambda k: run.task.sample(k, ()))(keys)
    open_ended = dataclasses.replace(rows, truth={"face": dataclasses.replace(rows.truth["face"], classes=None)})
    x = jnp.zeros((1, 8, 2, 4))
    assert reads(run, x, rows, "face").y.shape == (6, 1, 8) and reads(run, x, open_ended, "face").y.shape == (13, 1, 8)
