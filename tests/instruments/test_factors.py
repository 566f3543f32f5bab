"""Factors of weights against the network's own scores and logits; the step table and grafts against the hand-made network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans.errors import Invalid
from elegans.instruments import graft, ov, qk, step_table
from elegans.models import LayerNorm, Learned, RMSNorm, Transformer
from elegans.models.handmade import SHARP
from elegans.models.iterator import HEADS, iterator
from elegans.network import Network
from elegans.tasks import Addition
from elegans.training import Run
from iterating import COPY, MOD, MODEL, NETWORKS, PERFECT, RUNS, TASK, XOR, Polynomial5

EVERY = np.arange(5)  # every token of the vocabulary, once


def network(norm=None, **zero):
    """One layer of attention with random weights, biases too, in which some embeddings are 0."""
    model = Transformer(layers=1, d_model=8, heads=2, mlp=None, norm=norm, position=Learned(), bias=True)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TASK.vocab_size, TASK.positions))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), shapes)
    for part, name in zero.items():
        params[part][name] *= 0
    return Network(Run(TASK, model, steps=1), 1, jax.tree.map(jnp.asarray, params))


@functools.cache
def program(norm):
    model = network(norm).model

    def forward(params, tokens, looks, replace):
        logits, seen = model.apply(params, tokens, edit=lambda s, x: jnp.where(replace, looks, x) if s == "pattern.0" else x)
        return logits, seen["scores.0"], seen["resid.0"]

    return jax.jit(forward)


def trace(net, tokens=EVERY, looks=None):
    """Logits, and the scores and the stream of layer 0; `looks` replaces its attention."""
    given = np.zeros((2, 5, 5), np.float32) if looks is None else looks
    return jax.device_get(program(net.model.norm)(net.params, tokens, given, looks is not None))


def length(norm, x):
    """By what a normalisation divides a stream."""
    x = x - x.mean(-1, keepdims=True) if isinstance(norm, LayerNorm) else x
    return 1 if norm is None else np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps)


def known(name):
    return Network(RUNS[name], 2, NETWORKS[name])


@pytest.mark.parametrize("norm", [None, LayerNorm()])
def test_qk_is_the_score_of_a_token_for_another(norm):
    net = network(norm, pos_embed="W_pos")
    scores = trace(net)[1]
    for head in (0, 1):
        found = qk(net, 0, head)
        np.testing.assert_allclose(found.values, scores[head], rtol=1e-4, atol=1e-5)
        assert found.rows == found.columns == TASK.symbols


def test_positions_have_factors_where_they_are_learned():
    net = network(embed="W_E")
    found = qk(net, 0, 1, "position", "position")
    np.testing.assert_allclose(found.values[:5, :5], trace(net)[1][1], rtol=1e-4, atol=1e-5)
    assert found.rows == tuple(map(str, range(TASK.positions))) and ov(net, 0, 0, "position").values.shape == (TASK.positions, 5)
    mixed = qk(net, 0, 0, "position", "token")
    assert mixed.values.shape == (TASK.positions, 5) and mixed.columns == TASK.symbols
    rotary = Transformer(layers=1, d_model=8, heads=2, mlp=None, norm=None, bias=True)
    with pytest.raises(Invalid, match=r"side.*learned"):
        qk(dataclasses.replace(net, run=Run(TASK, rotary, steps=1)), 0, 0, "position")


@pytest.mark.parametrize("norm", [None, LayerNorm(), RMSNorm()])
def test_ov_is_what_attending_to_a_token_adds_to_the_logits(norm):
    """Times the length of the stream, by which a last normalisation divides."""
    net = network(norm, pos_embed="W_pos")
    net.params["blocks"][0]["attn"]["b_V"] *= 0  # the same for every key
    if isinstance(norm, LayerNorm):
        net.params["ln_final"]["b"] *= 0
    for head in (0, 1):
        looks = np.zeros((2, 5, 5), np.float32)
        looks[head] = np.eye(5)[::-1]  # each token at another
        logits = [logits * length(norm, x) for logits, _, x in (trace(net, looks=p) for p in (looks, 0 * looks))]
        np.testing.assert_allclose(ov(net, 0, head).values[::-1], logits[0] - logits[1], rtol=1e-4, atol=1e-5)


def test_the_iteration_heads_score_eoi_by_its_token():
    scores = qk(known("perfect"), *HEADS["iteration_1"])
    expected = np.zeros((5, 5))
    expected[:, TASK.symbols.index(":")] = SHARP
    np.testing.assert_allclose(scores.values, expected, rtol=1e-5)
    assert (qk(known("perfect"), *HEADS["iteration_2"]).values == 0).all()  # it looks by the time, which no embedding tells
    for place in ((2, 0), (0, 2)):
        with pytest.raises(Invalid, match=r"allowed: 0\.\.1"):
            qk(known("perfect"), *place)


def test_the_step_table_is_the_tables():
    table = step_table(known("perfect"), 256)
    assert (table.states, table.inputs, table.tokens) == (("0", "1", ":"), ("0", "1"), TASK.symbols)
    np.testing.assert_array_equal(table.best, np.vstack([XOR, XOR[0]]))
    np.testing.assert_allclose(table.next.sum(-1), 1, rtol=1e-5)
    assert np.take_along_axis(table.next, table.best[..., None], -1).min() > 1 - 1e-6
    untrained = step_table(known("untrained"), 256)
    assert untrained.next.max() < 0.9 and (untrained.counts == table.counts).all()
    assert (step_table(known("perfect"), 256, opening="P").counts == table.counts).all()
    with pytest.raises(Invalid, match=r"opening.*P"):
        step_table(known("perfect"), 256, opening="Q")
    assert step_table(known("perfect"), 256, opening="$").counts.size == 0  # no row begins with the end
    with pytest.raises(Invalid, match="task"):
        step_table(Network(Run(Addition(length=3, split=None), MODEL, steps=1), 1, PERFECT), 2)


def test_the_step_table_of_a_language_that_never_shows_some_pairs():
    """Five states, four inputs: the table of the polynomial, s_0 = 0."""
    task = Polynomial5(length=4)
    model, params = iterator(task, MOD)
    table = step_table(Network(Run(task, model, steps=1), 1, params), 512)
    assert table.inputs == ("1", "2", "3", "4") and table.states == (*"01234", ":")
    np.testing.assert_array_equal(table.best, np.vstack([MOD, MOD[0]])[:, 1:])
    alone = step_table(Network(Run(task, model, steps=1), 1, params), 2)
    assert (alone.counts == 0).any() and np.isnan(alone.next[alone.counts == 0]).all() and (alone.best[alone.counts == 0] == -1).all()


def test_a_grafted_head_brings_its_attention():
    healed = graft(known("no fetch"), known("perfect"), *HEADS["iteration_2"])
    jax.tree.map(np.testing.assert_array_equal, healed.params, PERFECT)
    still = graft(known("no fetch"), known("perfect"), 1, 1)  # the idle one
    jax.tree.map(np.testing.assert_array_equal, still.params, NETWORKS["no fetch"])
    assert (NETWORKS["no fetch"]["blocks"][1]["attn"]["W_Q"] == 0).all()  # nothing was changed in place


def test_a_grafted_mlp_brings_its_table():
    """The heads of parity with the MLP of copying: copying. The first MLP is the same in both."""
    copying = Network(RUNS["perfect"], 2, iterator(TASK, COPY)[1])
    np.testing.assert_array_equal(step_table(graft(known("perfect"), copying, 1), 256).best, np.vstack([COPY, COPY[0]]))
    np.testing.assert_array_equal(step_table(graft(known("perfect"), copying, 0), 256).best, np.vstack([XOR, XOR[0]]))


def test_parts_fit_only_networks_of_the_same_shapes():
    with pytest.raises(Invalid, match="same shapes"):
        graft(known("perfect"), network(), 0, 0)
    with pytest.raises(Invalid, match=r"layer.*0\.\.1"):
        graft(known("perfect"), known("untrained"), 2)
    biased = dataclasses.replace(known("perfect"), params=jax.tree.map(jnp.ones_like, PERFECT))
    kept = graft(known("perfect"), biased, 0, 0).params["blocks"][0]["attn"]
    assert (kept["b_O"] == 0).all() and (kept["b_Q"][0] == 1).all() and (kept["b_Q"][1] == 0).all()
