"""Ablation of the hand-made adder: its carry is causal, its copy of the first operand is read by nobody."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elegans as el
import elegans.instruments.ablate as module
from elegans.errors import Invalid
from elegans.instruments.ablate import SAME, Ablate, Asked, Removal, best, measured, orthonormal, summary
from elegans.instruments.probe import Reads, fit, meeting, reads, vectors
from elegans.models.handmade import DIRECTIONS, adder
from elegans.randomness import Purpose, key_for
from elegans.tasks import Addition, MajorityOfMajority, Mixture
from elegans.tasks.sampling import draw_set, prepare
from elegans.training import Run
from elegans.training.cohort import resolve

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


def test_random_labels_are_fitted_to_where_the_feature_is_removed():
    """Three sites, of which the second has the feature and the third the most directions to fit random labels by."""
    n, rng = 64, np.random.default_rng(0)
    y = rng.integers(0, 2, (1, 2, n)).astype(np.float32)
    x = rng.normal(size=(3, 2, n, 32)).astype(np.float32) * np.array([[0], [0], [1]])[..., None, None]
    x[1, ..., 0] += 3 * y[0]
    removals, _ = Ablate(draws=2)._planned(Reads(jnp.asarray(x), jnp.asarray(y), jnp.ones((2, n)), "binary"), jax.random.key(0))
    by_name = dict(zip(["nothing", *(d["direction"] for d in Ablate(draws=2)._directions())], np.asarray(removals.layer), strict=True))
    assert all((layer == 1).all() for layer in by_name.values()) and "labels" in by_name


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
    rows = {"loss": 3 * jnp.asarray(values), "accuracy": 3 * ones, "exact_match": ones, "tokens": 3 * ones, "rows": ones}
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
        removal = Removal(jnp.zeros(8, int), unit, unit, jnp.full((8, 1), target), resample, unit)
        rolled = jax.tree.map(lambda a: jnp.roll(a, shift, 0), rows)
        donors = reads(run, vectors(run, params, rolled, sites), rolled, feature)
        donors = donors._replace(counted=donors.counted * lends)
        found = measured(run, params, rows, Asked(feature, sites, donors=donors), removal)
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


def test_no_key_is_used_twice(monkeypatch):
    """Of the rows, of random labels, of the bootstrap."""
    task, ablate = Addition(length=2, split=None), Ablate(fit=8, test=8, draws=1)
    run = Run(task, el.Transformer(layers=1, d_model=4, heads=1), steps=1)
    used = []

    def spied(name, at, rows=1):
        original = getattr(module, name)

        def spy(*args):
            used.append(jax.random.split(args[at], rows) if rows > 1 else args[at][None])
            return original(*args)

        monkeypatch.setattr(module, name, spy)

    spied("draw_set", 2, rows=8)
    spied("with_random_labels", 0)
    spied("summary", 1)

    @jax.jit
    def keys(key):
        ablate.apply(run, run.model.init(key, task.vocab_size, task.positions), prepare(task), key)
        return jax.random.key_data(jnp.concatenate(used))

    found = np.asarray(keys(jax.random.key(0)))
    assert len(np.unique(found, axis=0)) == len(found) > 2 * 8


def test_a_method_is_asked_for_once():
    for methods in ((), ("mean", "mean")):
        with pytest.raises(Invalid, match="methods"):
            Ablate(methods=methods)
    with pytest.raises(Invalid, match=r"projection.*mean.*resample"):
        Ablate(methods=("zero",))


READS, WIDTH = 4, 9
TOGETHER = {
    "all": [2, 2, 2, 2],
    "two and two": [3, 1, 3, 1],
    "none": [0, 1, 2, 3],
    "some not there": [2, -1, 2, -1],
    "a pair": [0, 4, 4, 1],
}


@pytest.fixture(scope="module")
def rows_edited():
    """Rows before and after removals from correlated directions, one row for each way in which reads share positions; and directions.

    By one's own directions, by a step along others, and by fewer dimensions than directions: two reads have one direction.
    """
    rng = np.random.default_rng(1)
    w, u = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (rng.normal(size=(2, READS, WIDTH, 1)) + 0.5).astype(np.float32))
    repeated = w.copy()
    repeated[1] = w[0]
    target, x = rng.normal(size=(READS, 1)).astype(np.float32), rng.normal(size=(5, WIDTH)).astype(np.float32)
    places, layer = jnp.array(list(TOGETHER.values())), jnp.array([0, 0, 0, 0])

    @jax.jit
    def edited(w, u, target, own):
        removal = Removal(layer, w, u, target, jnp.int32(0), own)
        return jax.vmap(lambda positions: removal.joined(positions).edit(("resid.1",), positions)("resid.1", x))(places)

    cases = (w, w, target, w), (w, u, target, w), (u, u, 0 * target, repeated)
    own, step, fewer = (dict(zip(TOGETHER, np.asarray(edited(*case)), strict=True)) for case in cases)
    return {"x": x, "w": w[..., 0], "u": u[..., 0], "target": target[:, 0], "own": own, "step": step, "fewer": fewer}


@pytest.mark.parametrize("way", TOGETHER)
def test_correlated_directions_at_one_position_are_removed_together(rows_edited, way):
    """Every component has its target; what is orthogonal to all directions of a position, and every other position, stays."""
    x, w, places = rows_edited["x"], rows_edited["w"], np.array(TOGETHER[way])
    for position in range(5):
        here, moved = places == position, rows_edited["own"][way][position]
        np.testing.assert_allclose(w[here] @ moved, rows_edited["target"][here], atol=1e-4)
        outside = np.eye(WIDTH) - np.linalg.pinv(w[here]) @ w[here]
        np.testing.assert_allclose(outside @ moved, outside @ x[position], atol=1e-4)


@pytest.mark.parametrize("way", TOGETHER)
def test_controls_of_one_position_are_drawn_together(rows_edited, way):
    """A matched step is as long as the feature's own, and along the span of the random directions; as many of these are
    removed as the feature has dimensions."""
    x, u, places = rows_edited["x"], rows_edited["u"], np.array(TOGETHER[way])
    for position in range(5):
        here = places == position
        own, step = (rows_edited[name][way][position] - x[position] for name in ("own", "step"))
        assert np.linalg.norm(step) == pytest.approx(np.linalg.norm(own), abs=1e-4)
        np.testing.assert_allclose(np.linalg.pinv(u[here]) @ u[here] @ step, step, atol=1e-4)
        kept = rows_edited["fewer"][way][position]
        assert np.linalg.norm(kept) <= np.linalg.norm(x[position]) + 1e-5
        if here[:2].all():  # reads that have one direction stand together
            assert np.linalg.norm(u[here] @ kept) > 1e-3


def test_reads_apart_are_edited_as_they_were(rows_edited):
    x, w, target = (rows_edited[name] for name in ("x", "w", "target"))
    expected = x.copy()
    for read in range(READS):
        expected[read] -= w[read] * (w[read] @ x[read] - target[read])
    np.testing.assert_allclose(rows_edited["own"]["none"], expected, atol=1e-5)


def test_which_reads_meet_is_known_also_where_leaves_are_traced():
    mixed = Mixture(tasks=(MajorityOfMajority(length=4),), weights=(1.0,))
    run = Run(mixed, el.Transformer(layers=1, d_model=8, heads=2), steps=1)
    seen = []
    jax.eval_shape(lambda run: seen.append(meeting(run, ("group_sum", "group_bit", "running_count"))), resolve(run))
    assert seen == [{"group_sum", "group_bit"}]


def test_a_feature_read_at_one_position_is_ablated_as_one():
    """Four votes read at `=`: after a projection every probe is undecided there, along each combination of their directions
    that is not too short to count."""
    task = MajorityOfMajority(length=4)
    run = Run(task, el.Transformer(layers=1, d_model=8, heads=2), steps=1)
    params = run.model.init(jax.random.key(1), task.vocab_size, task.positions)
    sites = ("resid.0",)

    @jax.jit
    def components():
        rows = draw_set(task, "validation", jax.random.key(0), 64, prepare(task))
        found = reads(run, vectors(run, params, rows, sites), rows, "group_bit")
        true = best(fit(found, 100.0), found)
        removal = Removal(true.layer, true.basis, true.basis, true.plane, jnp.int32(0), true.basis)

        def left(tokens, positions):
            edit = removal.joined(positions).edit(sites, positions)
            x = run.model.apply(params, tokens[:-1], edit=edit)[1][sites[0]][positions[0]]
            return true.basis[..., 0] @ x - true.plane[:, 0]

        return true.basis[..., 0], jax.vmap(left, axis_name="batch")(rows.tokens, rows.truth["group_bit"].positions)

    directions, left = map(np.asarray, components())
    size, turn = np.linalg.eigh(directions @ directions.T)
    assert (size > SAME).sum() >= 2 and np.abs(np.triu(directions @ directions.T, 1)).max() > 0.1  # correlated
    np.testing.assert_allclose(left @ turn[:, size > SAME], 0, atol=1e-3)
