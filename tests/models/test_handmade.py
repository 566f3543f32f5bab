"""The hand-made adder is what it says: right, by the route it documents, and by no other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans.errors import Invalid
from elegans.models import handmade
from elegans.models.handmade import DIRECTIONS, adder
from elegans.tasks.addition import Addition
from elegans.training.step import scores as eager_scores

ROWS = 512
SITES = ("embed", "resid.0", "attn_out.1", "resid_mid.1", "resid.1")
LENGTHS = pytest.mark.parametrize("n", [3, 8, 16])


scores = jax.jit(eager_scores)
HEADS = np.ones((2, 2), np.float32)  # (layer, head): 0 ablates it


@functools.cache
def drawn(n):
    task = Addition(length=n)
    rows = jax.jit(lambda: jax.vmap(lambda key: task.sample(key, ()))(jax.random.split(jax.random.key(n), ROWS)))()
    return task, *adder(task), jax.device_get(rows)


@functools.cache
def program(n):
    """One compiled program for all that the tests do to the adder: heads that are off, values that are flipped."""
    model = drawn(n)[1]

    def one(params, tokens, heads, flipped):
        edits = {f"z.{i}": lambda x, on=on: x * on[:, None] for i, on in enumerate(heads)}
        edits["resid_mid.1"] = lambda x: jnp.where(flipped, 1 - x, x)
        logits, trace = model.apply(params, tokens[:-1], edit=lambda name, x: edits.get(name, lambda x: x)(x))
        return logits, {s: trace[s] for s in (*SITES, "pattern.0", "pattern.1")}

    return jax.jit(jax.vmap(one, (None, 0, None, None)))


def outputs(n, heads=HEADS, flipped=()):
    """Logits before every token but the first, and some of the trace, for all rows; `flipped`: (positions, coordinate)."""
    task, model, params, rows = drawn(n)
    mask = np.zeros((task.positions - 1, model.d_model), bool)
    if flipped:
        mask[flipped] = True
    return jax.device_get(program(n)(params, rows.tokens, heads, mask))


plain = functools.cache(outputs)


def read(values, truth):
    """The vectors [row, read, d_model] at a truth's positions."""
    return np.take_along_axis(values, truth.positions[..., None], 1)


def right(logits, rows):
    """Whether each scored token is the likeliest, [row, token]."""
    return (logits.argmax(-1) == rows.tokens[:, 1:])[:, rows.scored[0, 1:]]


@pytest.mark.parametrize("n", [1, 3, 8, 16])
def test_adds_exactly(n):
    loss, metrics = scores(plain(n)[0], drawn(n)[3])
    assert metrics["exact_match"] == 1
    assert loss < 1e-6


def test_adds_every_pair():
    """All 64 sums of 3 bits: no luck of the draw."""
    _, model, params, _ = drawn(3)
    sums = [(f"{a:03b}"[::-1], f"{b:03b}"[::-1], f"{a + b:04b}"[::-1]) for a in range(8) for b in range(8)]
    rows = jnp.array([[int(t) for t in f"{x}2{y}3{z}4"] for x, y, z in sums])
    logits = jax.jit(jax.vmap(lambda tokens: model.apply(params, tokens)[0]))(rows)  # as it is, without an edit
    assert (logits.argmax(-1)[:, 6:-1] == rows[:, 7:]).all()


@pytest.mark.parametrize("n", [1, 16])
def test_parameters_are_a_transformers(n):
    task, model, params, _ = drawn(n)
    made = jax.eval_shape(lambda: model.init(jax.random.key(0), task.vocab_size, task.positions))
    assert jax.tree.map(jax.typeof, params) == jax.tree.map(jax.typeof, made)


@LENGTHS
@pytest.mark.parametrize("feature", ["first_operand", "carry"])
def test_a_direction_is_the_truth(n, feature):
    direction, truth = DIRECTIONS[feature], drawn(n)[3].truth[feature]
    for site in direction.sites:
        found = read(plain(n)[1][site], truth)[..., direction.coordinate]
        assert np.abs(found - truth.values).max() < 1e-4, site


@LENGTHS
def test_before_the_last_attention_a_token_knows_itself_only(n):
    """Equal to the last bit: a probe that rescales its inputs would find a truth in the faintest trace."""
    rows = drawn(n)[3]
    for site in ("embed", "resid.0"):
        for feature, direction in DIRECTIONS.items():
            truth = rows.truth[feature]
            vectors, tokens = read(plain(n)[1][site], truth), read(rows.tokens[..., None], truth)[..., 0]
            assert (vectors[..., direction.coordinate] == 0).all()
            for place in range(n):
                for token in range(5):
                    same = vectors[tokens[:, place] == token, place]
                    assert (same == same[:1]).all(), (site, feature, place)


@LENGTHS
def test_a_token_tells_what_the_module_says_of_its_truths(n):
    """A sum bit of 0 goes with a carry out of it in 3 of 4 rows; nothing goes with the first operand."""
    truth, tokens = drawn(n)[3].truth, drawn(n)[3].tokens
    sure = 5 * (ROWS * n) ** -0.5
    carry = truth["carry"]
    answered = np.take_along_axis(tokens, carry.positions, 1)
    assert abs((answered != carry.values).mean() - 0.75) < sure
    first = truth["first_operand"].values[:, 1:]
    assert abs((answered[:, :-1] != first).mean() - 0.5) < sure


@LENGTHS
def test_attention_is_hard(n):
    for layer, head in ((0, 0), handmade.LOOKUP_HEAD, handmade.CARRY_HEAD):
        assert np.isin(plain(n)[1][f"pattern.{layer}"][:, head], (0.0, 1.0)).all()


@LENGTHS
def test_the_answer_hangs_on_the_carry(n):
    """With every carry flipped before it is added, all bits but the lowest are wrong, and only they."""
    rows = drawn(n)[3]
    logits, _ = outputs(n, flipped=(rows.truth["carry"].positions[0], DIRECTIONS["carry"].coordinate))
    good = right(logits, rows)  # `=`, z_0 ... z_n, end
    assert scores(logits, rows)[1]["exact_match"] == 0
    assert good[:, [0, 1, -1]].all()
    assert not good[:, 2:-1].any()


@LENGTHS
def test_the_answer_does_not_hang_on_the_first_operand(n):
    logits, _ = outputs(n, flipped=(slice(None), DIRECTIONS["first_operand"].coordinate))
    np.testing.assert_array_equal(logits, plain(n)[0])


@pytest.mark.parametrize("place", [(0, 0), handmade.IDLE_HEAD, handmade.LOOKUP_HEAD, handmade.CARRY_HEAD])
def test_heads_matter_as_documented(place):
    heads = HEADS.copy()
    heads[place] = 0
    exact = scores(outputs(8, heads)[0], drawn(8)[3])[1]["exact_match"]
    if place == handmade.IDLE_HEAD:
        assert exact == 1
    else:
        assert exact < 0.2  # without the carry head 0.75^8 of the sums stay right: those without a carry


@pytest.mark.parametrize("wrong", [{"cot": True}, {"inputs": "msb"}, {"outputs": "msb"}])
def test_refuses_other_formats(wrong):
    with pytest.raises(Invalid, match=next(iter(wrong))):
        adder(Addition(**wrong))
