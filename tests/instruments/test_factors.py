"""Factors of weights against the network's own scores and logits; the step table and grafts against the hand-made network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans.errors import Invalid
from elegans.instruments import graft, ov, qk, step_table
from elegans.models.handmade import SHARP
from elegans.models.iterator import HEADS, iterator
from elegans.models.transformer import LayerNorm, Learned, Transformer
from elegans.network import Network
from elegans.tasks import Addition
from elegans.training import Run
from iterating import COPY, MOD, MODEL, NETWORKS, PERFECT, RUNS, TASK, XOR, Polynomial5

EVERY = jnp.arange(5)  # every token of the vocabulary, once


def network(model, params=None, task=TASK):
    run = Run(task, model, steps=1)
    params = model.init(jax.random.key(0), task.vocab_size, task.positions) if params is None else params
    noise = jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.key(w.size), w.shape), params)  # biases too
    return Network(run, 1, noise)


def known(name):
    return Network(RUNS[name], 2, NETWORKS[name])


@pytest.mark.parametrize("norm", [None, LayerNorm()])
def test_qk_is_the_score_of_a_token_for_another(norm):
    net = network(Transformer(layers=1, d_model=8, heads=2, mlp=None, norm=norm, position=None, bias=True))
    trace = net.trace(EVERY)[1]
    for head in (0, 1):
        found = qk(net, 0, head)
        np.testing.assert_allclose(found.values, trace["scores.0"][head], rtol=1e-4, atol=1e-5)
        assert found.rows == found.columns == TASK.symbols


def test_ov_is_what_attending_to_a_token_adds_to_the_logits():
    net = network(Transformer(layers=1, d_model=8, heads=2, mlp=None, norm=None, position=None))
    for head in (0, 1):
        for key in range(5):
            looks = jnp.zeros((2, 5, 5)).at[head, :, key].set(1)
            logits = [net.trace(EVERY, lambda s, x, p=p: p if s == "pattern.0" else x)[0] for p in (looks, 0 * looks)]
            np.testing.assert_allclose(ov(net, 0, head).values[key], (logits[0] - logits[1])[4], rtol=1e-4, atol=1e-5)


def test_positions_have_factors_where_they_are_learned():
    net = network(Transformer(layers=1, d_model=8, heads=1, mlp=None, norm=None, position=Learned()))
    net.params["embed"]["W_E"] = 0 * net.params["embed"]["W_E"]
    n = TASK.positions
    found = qk(net, 0, 0, "position", "position")
    np.testing.assert_allclose(found.values, net.trace(jnp.zeros(n, int))[1]["scores.0"][0], rtol=1e-4, atol=1e-5)
    assert found.rows == tuple(map(str, range(n))) and ov(net, 0, 0, "position").values.shape == (n, 5)
    with pytest.raises(Invalid, match="side.*learned"):
        qk(network(Transformer(layers=1, d_model=8, heads=1)), 0, 0, "position")


def test_the_iteration_heads_score_eoi_by_its_token():
    scores = qk(known("perfect"), *HEADS["iteration_1"])
    expected = np.zeros((5, 5))
    expected[:, TASK.symbols.index(":")] = SHARP
    np.testing.assert_allclose(scores.values, expected, rtol=1e-5)
    assert (qk(known("perfect"), *HEADS["iteration_2"]).values == 0).all()  # it looks by the time, which no embedding tells
    for place in ((2, 0), (0, 2)):
        with pytest.raises(Invalid, match="allowed: 0..1"):
            qk(known("perfect"), *place)


def test_the_step_table_is_the_tables():
    table = step_table(known("perfect"), 256)
    assert (table.states, table.inputs, table.tokens) == (("0", "1", ":"), ("0", "1"), TASK.symbols)
    np.testing.assert_array_equal(table.best, np.vstack([XOR, XOR[0]]))
    np.testing.assert_allclose(table.next.sum(-1), 1, rtol=1e-5)
    assert np.take_along_axis(table.next, table.best[..., None], -1).min() > 1 - 1e-6
    untrained = step_table(known("untrained"), 256)
    assert untrained.next.max() < 0.9 and (untrained.count == table.count).all()
    with pytest.raises(Invalid, match="task"):
        step_table(network(MODEL, task=Addition(length=4)), 8)


def test_the_step_table_of_a_language_that_never_shows_some_pairs():
    """Five states, four inputs: the table of the polynomial, s_0 = 0."""
    task = Polynomial5(length=4)
    model, params = iterator(task, MOD)
    table = step_table(Network(Run(task, model, steps=1), 1, params), 512)
    assert table.inputs == ("1", "2", "3", "4") and table.states == (*"01234", ":")
    np.testing.assert_array_equal(table.best, np.vstack([MOD, MOD[0]])[:, 1:])
    alone = step_table(Network(Run(task, model, steps=1), 1, params), 2)
    assert (alone.count == 0).any() and np.isnan(alone.next[alone.count == 0]).all() and (alone.best[alone.count == 0] == -1).all()


def test_a_grafted_head_brings_its_attention():
    healed = graft(known("no fetch"), known("perfect"), *HEADS["iteration_2"])
    jax.tree.map(np.testing.assert_array_equal, healed.params, PERFECT)
    still = graft(known("no fetch"), known("perfect"), 1, 1)  # the idle one
    jax.tree.map(np.testing.assert_array_equal, still.params, NETWORKS["no fetch"])
    assert known("no fetch").score(64)["exact_match"] < 0.7  # neither was changed


def test_a_grafted_mlp_brings_its_table():
    """The heads of parity with the MLP of copying: copying. The first MLP is the same in both."""
    copying = Network(RUNS["perfect"], 2, iterator(TASK, COPY)[1])
    np.testing.assert_array_equal(step_table(graft(known("perfect"), copying, 1), 256).best, np.vstack([COPY, COPY[0]]))
    np.testing.assert_array_equal(step_table(graft(known("perfect"), copying, 0), 256).best, np.vstack([XOR, XOR[0]]))


def test_parts_fit_only_networks_of_the_same_shapes():
    other = network(Transformer(layers=2, d_model=8, heads=2))
    with pytest.raises(Invalid, match="same shapes"):
        graft(known("perfect"), other, 0, 0)
    with pytest.raises(Invalid, match=r"layer.*0\.\.1"):
        graft(known("perfect"), known("untrained"), 2)
    biased = dataclasses.replace(known("perfect"), params=jax.tree.map(jnp.ones_like, PERFECT))
    kept = graft(known("perfect"), biased, 0, 0).params["blocks"][0]["attn"]
    assert (kept["b_O"] == 0).all() and (kept["b_Q"][0] == 1).all() and (kept["b_Q"][1] == 0).all()
