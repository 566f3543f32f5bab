"""Laws of the transformer's options; that their numbers are right is for the oracle, in `test_transformer`."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans import MLP, ALiBi, Attention, FixedAttention, GivenAttention, LayerNorm, Learned, Sinusoidal, Transformer, identity, spec
from transformer_oracle import POSITIONS, ROW, TOKENS, VOCAB, forward, some_params

SMALL = Transformer(layers=2, d_model=8, heads=2, position=None)
ITERATION_HEADS = Transformer(
    layers=2, d_model=128, heads=1, mlp=MLP(), norm=LayerNorm(), position=Learned(), skip="normed", embed_dropout=0.1
)


def test_the_model_of_iteration_heads_has_its_published_number_of_parameters() -> None:
    """Vocabulary 64, rows of up to 2 * 16 + 3 tokens; Cabannes et al. 2024."""
    shapes = jax.eval_shape(lambda: ITERATION_HEADS.init(jax.random.key(0), 64, 35))
    assert sum(w.size for w in jax.tree.leaves(shapes)) == 414_720
    reduced = dataclasses.replace(ITERATION_HEADS, position=Learned(dims=16))
    assert jax.eval_shape(lambda: reduced.init(jax.random.key(0), 64, 35))["pos_embed"]["W_pos"].shape == (35, 16)


# ---- positions


def test_alibi_has_the_published_slopes_and_sees_distances_alone() -> None:
    bias = np.asarray(ALiBi().bias(5, 8))
    distance = np.arange(5)[:, None] - np.arange(5)
    np.testing.assert_allclose(-bias[:, 1, 0], [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256], rtol=1e-6)
    np.testing.assert_allclose(-bias[:, 3, 0], -3 * bias[:, 1, 0], rtol=1e-6)
    sixteen = -np.asarray(ALiBi().bias(2, 16))[:, 1, 0]  # the paper: the eight, and their geometric means
    np.testing.assert_allclose(sixteen[1::2], -bias[:, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(sixteen[0], 1 / math.sqrt(2), rtol=1e-6)
    for d in range(-4, 5):
        assert all(len(set(head[distance == d].tolist())) == 1 for head in bias)


def test_alibi_is_added_to_the_scaled_scores_and_nothing_else() -> None:
    """Its model has the parameters of one without positions; where no token differs, moving the row along changes nothing."""
    model = dataclasses.replace(SMALL, position=ALiBi(span=2.0), attention=Attention(scale=3.0))
    params = some_params(model)
    with_bias, without = (forward(m)(params, TOKENS)[1] for m in (model, dataclasses.replace(model, position=None)))
    np.testing.assert_array_equal(with_bias["embed"], without["embed"])
    added = np.asarray(with_bias["scores.0"] - without["scores.0"])
    np.testing.assert_allclose(added[:, 5], [-(2.0**-1) * np.arange(5, -1, -1), -(2.0**-2) * np.arange(5, -1, -1)], atol=1e-5)
    same = np.asarray(forward(model)(params, jnp.full(POSITIONS, 3))[1]["scores.0"])
    np.testing.assert_allclose(same[:, 1:, 1:], same[:, :-1, :-1], atol=1e-5)


def test_sinusoids_are_fixed_and_turn_with_distance() -> None:
    """No parameters; the product of two positions' vectors is a function of their distance."""
    waves = np.asarray(Sinusoidal().embed({}, jnp.zeros((110, 8))), np.float64)
    assert some_params(dataclasses.replace(SMALL, position=Sinusoidal()))["pos_embed"] == {}
    products = waves @ waves.T
    for d in (0, 1, 7):
        assert np.ptp(np.diagonal(products, d)) < 1e-5
    assert np.ptp(products[50]) > 0.5
    np.testing.assert_allclose(waves[0], [0, 1] * 4, atol=1e-7)
    np.testing.assert_allclose(waves[3, :2], [math.sin(3), math.cos(3)], atol=1e-6)


def test_reduced_positions_reach_the_first_coordinates_alone() -> None:
    model = dataclasses.replace(SMALL, position=Learned(dims=3))
    params = some_params(model)
    embed, tokens = np.asarray(forward(model)(params, TOKENS)[1]["embed"]), np.asarray(params["embed"]["W_E"])[ROW]
    np.testing.assert_array_equal(embed[:, 3:], tokens[:, 3:])
    np.testing.assert_allclose(embed[:, :3] - tokens[:, :3], params["pos_embed"]["W_pos"], atol=1e-6)


def test_positions_have_their_own_deviation() -> None:
    model = Transformer(layers=1, d_model=64, heads=1, position=Learned(std=3.0), init_std=0.02)
    params = jax.jit(lambda key: model.init(key, 50, 60))(jax.random.key(0))
    assert abs(np.std(params["pos_embed"]["W_pos"]) / 3 - 1) < 0.05
    assert abs(np.std(params["embed"]["W_E"]) / 0.02 - 1) < 0.05


# ---- attention that is given, and attention by layer


def test_given_attention_has_no_queries_keys_or_scores() -> None:
    model = dataclasses.replace(SMALL, attention=(FixedAttention(), Attention()), bias=True)
    params = some_params(model)
    given, learned = (set(block["attn"]) for block in params["blocks"])
    assert given == {"W_V", "W_O", "b_V", "b_O"} and learned - given == {"W_Q", "W_K", "b_Q", "b_K"}
    sites = set(forward(model)(params, TOKENS)[1].sites)
    assert {f"{s}.1" for s in "qkv"} | {"v.0", "z.0", "pattern.0", "scores.1"} <= sites
    assert not {"q.0", "k.0", "scores.0"} & sites


@pytest.mark.parametrize("name", ["uniform", "self", "previous", "first"])
def test_a_map_given_to_a_model_is_the_map_put_in_place_of_its_pattern(name) -> None:
    """The same values and outputs: trained with a map, or patched with it afterwards."""
    fixed = dataclasses.replace(SMALL, attention=FixedAttention((name,)))
    params = some_params(SMALL)
    kept = [{**b, "attn": {n: b["attn"][n] for n in ("W_V", "W_O")}} for b in params["blocks"]]
    logits, trace = forward(fixed)({**params, "blocks": kept}, TOKENS)
    patched, seen = patch_patterns()(params, trace["pattern.0"])
    np.testing.assert_allclose(patched, logits, atol=1e-5)
    np.testing.assert_array_equal(seen["pattern.1"], trace["pattern.1"])
    np.testing.assert_allclose(np.asarray(trace["pattern.0"]).sum(-1), 1, atol=1e-6)


@functools.cache
def patch_patterns():
    return jax.jit(lambda p, ideal: SMALL.apply(p, TOKENS, edit=lambda site, x: ideal if site.startswith("pattern") else x))


@spec
class LooksAt(GivenAttention):
    """Every head looks at the last token 6 so far; before it, at itself."""

    def pattern(self, tokens, heads):
        place = jnp.arange(len(tokens))
        last = jax.lax.cummax(jnp.where(tokens == 6, place, -1))
        where = jax.nn.one_hot(jnp.where(last < 0, place, last), len(tokens))
        return jnp.broadcast_to(where, (heads, *where.shape))


def test_a_map_of_your_own_may_depend_on_the_tokens() -> None:
    model = dataclasses.replace(SMALL, attention=LooksAt())
    pattern = np.asarray(forward(model)(some_params(model), TOKENS)[1]["pattern.1"])
    assert pattern.argmax(-1).tolist() == [[0, 1, 2, 3, 3, 3]] * 2  # of 3 0 6 6 1 4
    assert (pattern.max(-1) == 1).all()


def test_one_attention_for_all_layers_is_the_same_for_each() -> None:
    """By layer or not: the same initial weights and the same program; another spec, since fields may then differ."""
    each = dataclasses.replace(SMALL, attention=(Attention(), Attention()))
    weights = [m.init(jax.random.key(0), VOCAB, POSITIONS) for m in (SMALL, each)]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *weights)))
    programs = [str(jax.make_jaxpr(lambda params, m=m: m.apply(params, TOKENS))(weights[0])) for m in (SMALL, each)]
    assert programs[0] == programs[1]
    assert identity(each) != identity(SMALL)


def test_given_attention_costs_half_the_mixing() -> None:
    """No product of queries and keys, and no weights for them."""
    full, half = (dataclasses.replace(SMALL, attention=a) for a in (Attention(), (FixedAttention(), Attention())))
    d, t = 8, 52
    assert full.flops_per_token(VOCAB, t, "matmul") - half.flops_per_token(VOCAB, t, "matmul") == 6 * 2 * d * d + 6 * t * d


# ---- the skip path, and dropout of the embedding


def test_with_a_normalised_skip_path_the_size_of_the_embedding_is_forgotten() -> None:
    normed = dataclasses.replace(SMALL, norm=LayerNorm(eps=1e-12), skip="normed")
    params = some_params(normed)

    def grown(model: Transformer) -> np.ndarray:
        return np.asarray(jax.jit(lambda p: model.apply(p, TOKENS, edit=lambda s, x: 4 * x if s == "embed" else x)[0])(params))

    plain = dataclasses.replace(normed, skip=None)
    np.testing.assert_allclose(grown(normed), forward(normed)(params, TOKENS)[0], atol=1e-4)
    assert np.abs(grown(plain) - forward(plain)(params, TOKENS)[0]).max() > 0.1


def test_dropout_of_the_embedding_is_there_alone() -> None:
    model = Transformer(layers=2, d_model=64, heads=2, embed_dropout=0.25)
    params, key = some_params(model), jax.random.key(1)
    logits, trace = forward(model)(params, TOKENS)
    whole = jax.jit(lambda p, x: model.apply(p, TOKENS, key=key, edit=lambda s, y: x if s == "embed" else y)[0])(params, trace["embed"])
    np.testing.assert_allclose(whole, logits, atol=1e-5)  # undone at the embedding, nothing is left of it
    dropped = np.asarray(jax.jit(lambda p: model.apply(p, TOKENS, key=key)[1]["embed"])(params))
    share = (dropped == 0).mean()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / dropped.size)
    np.testing.assert_allclose(dropped[dropped != 0], np.asarray(trace["embed"])[dropped != 0] / 0.75, rtol=1e-5)


def test_dropout_may_leave_the_embedding_alone() -> None:
    model = Transformer(layers=1, d_model=64, heads=2, dropout=0.5, embed_dropout=0.0)
    params = some_params(model)
    trace = jax.jit(lambda p: model.apply(p, TOKENS, key=jax.random.key(1))[1])(params)
    assert np.array_equal(trace["embed"], forward(model)(params, TOKENS)[1]["embed"])
    assert 0.4 < (np.asarray(trace["resid_mid.0"]) == np.asarray(trace["embed"])).mean() < 0.6
