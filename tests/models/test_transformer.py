"""The transformer against the float64 NumPy of `transformer_oracle`; its options have laws of their own in `test_options`."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans import MLP, ALiBi, Attention, FixedAttention, Invalid, LayerNorm, Learned, Rotary, Sinusoidal, Transformer
from elegans.types import no_edit
from transformer_oracle import POSITIONS, ROW, TOKENS, VOCAB, forward, oracle, softmax, some_params

LLAMA = Transformer(layers=2, d_model=8, heads=2, attention=Attention(scale=0.8))
CLASSIC = Transformer(
    layers=2, d_model=6, heads=3, d_head=4, mlp=MLP(ratio=2.5), norm=LayerNorm(eps=1e-3), position=Learned(), tied=True, bias=True
)
BARE = Transformer(layers=1, d_model=8, heads=1, norm=None, position=None, mlp=MLP(activation="relu"))
MODELS = {"llama": LLAMA, "classic": CLASSIC, "bare": BARE}
NORMED = Transformer(layers=2, d_model=6, heads=1, mlp=MLP(), norm=LayerNorm(), position=Learned(dims=4), skip="normed")
LAYERED = Transformer(
    layers=2,
    d_model=8,
    heads=4,
    attention=(FixedAttention(("uniform", "self", "previous", "first")), Attention(scale=0.8)),
    mlp=MLP(ratio=1),
    position=ALiBi(span=6),
    bias=True,
)
WAVES = Transformer(layers=1, d_model=7, heads=1, d_head=4, attention=Attention(), position=Sinusoidal(theta=50))
ALL = MODELS | {"normed": NORMED, "layered": LAYERED, "waves": WAVES}


def nats(logits: np.ndarray) -> float:
    """Mean loss of every next token."""
    return float(np.mean([-np.log(softmax(row))[t] for row, t in zip(logits[:-1], ROW[1:], strict=True)]))


# ---- against the oracle


@pytest.mark.parametrize("name", ALL)
def test_a_forward_pass_is_what_the_docstrings_say(name) -> None:
    model = ALL[name]
    params = some_params(model)
    expected = oracle(model, params, ROW)
    assert np.abs(expected).max() > 0.5
    assert np.abs(np.asarray(forward(model)(params, TOKENS)[0]) - expected).max() < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_the_slopes_of_the_oracle(name) -> None:
    """Five coordinates of every parameter, against central differences in float64."""
    model = ALL[name]
    params = some_params(model)

    def loss(p) -> jax.Array:
        logits = model.apply(p, TOKENS)[0][:-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[1:, None], 1).mean()

    grads, treedef = jax.tree.flatten(jax.jit(jax.grad(loss))(params))
    values = [np.asarray(w, np.float64) for w in jax.tree.leaves(params)]
    rng, step = np.random.default_rng(1), 1e-5
    for i, grad in enumerate(grads):
        for place in rng.choice(grad.size, min(5, grad.size), replace=False):
            slope = []
            for sign in (1, -1):
                moved = [v.copy() for v in values]
                moved[i].flat[place] += sign * step
                slope.append(nats(oracle(model, jax.tree.unflatten(treedef, moved), ROW)))
            expected = (slope[0] - slope[1]) / (2 * step)
            assert abs(float(np.asarray(grad).flat[place]) - expected) < 2e-6 + 1e-4 * abs(expected)


def test_rotary_scores_depend_on_distances_alone() -> None:
    """Position 3 seen from 5 is as position 103 seen from 105."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 1, 8)), jnp.float32)
    rows = jnp.zeros((110, 2, 8)).at[:].set(x[:, 0])
    turned = np.asarray(Rotary().rotate(rows))
    near, far = turned[5, 0] @ turned[3, 1], turned[105, 0] @ turned[103, 1]
    assert abs(near - far) < 1e-4
    assert abs(near - turned[5, 0] @ turned[4, 1]) > 1e-2


# ---- causality, edits and the trace


@pytest.mark.parametrize("name", ALL)
def test_later_tokens_never_reach_earlier_logits(name) -> None:
    model = ALL[name]
    params = some_params(model)
    logits = np.asarray(forward(model)(params, TOKENS)[0])
    for i in range(1, POSITIONS):
        other = ROW.copy()
        other[i] = (other[i] + 1) % VOCAB
        changed = np.asarray(forward(model)(params, jnp.asarray(other))[0])
        assert changed[:i].tobytes() == logits[:i].tobytes()
        assert not np.array_equal(changed[i], logits[i])


def expected_sites(model: Transformer, mlp_width: int) -> dict[str, tuple[int, ...]]:
    """The table of sites in the module's docstring, in its order."""
    t, d, h, e = POSITIONS, model.d_model, model.heads, model.d_head or model.d_model // model.heads
    sites = {"embed": (t, d)}
    for i in range(model.layers):
        shapes = {"ln1": (t, d), "q": (t, h, e), "k": (t, h, e), "v": (t, h, e), "scores": (h, t, t), "pattern": (h, t, t), "z": (t, h, e)}
        shapes |= {"attn_out": (t, d), "resid_mid": (t, d), "ln2": (t, d), "mlp_post": (t, mlp_width), "mlp_out": (t, d), "resid": (t, d)}
        sites |= {f"{name}.{i}": shape for name, shape in shapes.items()}
    return sites | {"normed": (t, d), "logits": (t, VOCAB)}


@pytest.mark.parametrize(("name", "mlp_width"), [("llama", 22), ("classic", 15), ("bare", 32)])
def test_the_trace_holds_every_site_in_the_documented_order_and_shape(name, mlp_width) -> None:
    model = MODELS[name]
    order = []

    def see(site, x):
        order.append(site)
        return x

    trace = jax.eval_shape(lambda params: model.apply(params, TOKENS, edit=see)[1], some_params(model))
    expected = expected_sites(model, mlp_width)
    if model.norm is None:
        assert {s: trace.sites[s].shape for s in trace.sites}.items() <= expected.items()
    else:
        assert {s: x.shape for s, x in trace.sites.items()} == expected
        assert order == list(expected)


def test_patterns_are_causal_and_sum_to_one() -> None:
    trace = forward(LLAMA)(some_params(LLAMA), TOKENS)[1]
    pattern = np.asarray(trace["pattern.1"])
    assert np.abs(pattern.sum(-1) - 1).max() < 1e-6
    assert (pattern[:, ~np.tri(POSITIONS, dtype=bool)] == 0).all()


def test_the_residual_stream_is_the_sum_of_what_was_written() -> None:
    trace = forward(LLAMA)(some_params(LLAMA), TOKENS)[1]
    written = sum(np.asarray(trace[s], np.float64) for s in ("embed", "attn_out.0", "mlp_out.0", "attn_out.1", "mlp_out.1"))
    assert np.abs(written - np.asarray(trace["resid.1"])).max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_an_edit_that_changes_nothing_gives_the_same_bits(name) -> None:
    model = MODELS[name]
    params = some_params(model)
    plain, seen = forward(model)(params, TOKENS)
    edited = jax.jit(lambda p: model.apply(p, TOKENS, edit=no_edit)[0])(params)
    replaced = jax.jit(lambda p, seen: model.apply(p, TOKENS, edit=lambda site, x: seen[site])[0])(params, seen)
    assert np.asarray(edited).tobytes() == np.asarray(plain).tobytes()
    assert np.asarray(replaced).tobytes() == np.asarray(plain).tobytes()


@pytest.mark.parametrize("name", ["llama", "classic"])
def test_an_edit_anywhere_reaches_the_logits(name) -> None:
    model = MODELS[name]
    params = some_params(model)
    plain, trace = forward(model)(params, TOKENS)
    rng = np.random.default_rng(2)
    none = {site: jnp.zeros_like(value) for site, value in trace.sites.items()}
    noisy = jax.jit(lambda noise: model.apply(params, TOKENS, edit=lambda site, x: x + noise[site]))
    for chosen, value in trace.sites.items():
        noise = jnp.asarray(rng.standard_normal(value.shape), jnp.float32)
        edited, after = noisy({**none, chosen: noise})
        assert np.abs(np.asarray(edited - plain)).max() > 1e-3, chosen
        assert np.allclose(after[chosen] - value, noise, atol=1e-4), chosen  # the trace shows what was put there


def test_probed_sites_are_sites_of_one_vector_for_each_position() -> None:
    trace = forward(LLAMA)(some_params(LLAMA), TOKENS)[1]
    families = LLAMA.probed_sites()
    assert families["resid"] == ("resid.0", "resid.1") and families["embed"] == ("embed",)
    width = {family: LLAMA.d_model // LLAMA.heads if family == "head" else LLAMA.d_model for family in families}
    assert all(trace[site].shape == (POSITIONS, width[family]) for family, sites in families.items() for site in sites)
    assert not {"attn_out", "head"} & set(dataclasses.replace(LLAMA, attention=None).probed_sites())


def test_a_head_of_a_site_is_one_entry_of_its_head_axis_alone_and_in_batches() -> None:
    """Every site of the list in models/transformer.py that has a head axis, wherever that stands."""
    params, alone = some_params(LLAMA), forward(LLAMA)(some_params(LLAMA), TOKENS)[1]
    rows = jnp.stack([TOKENS, TOKENS[::-1], TOKENS])
    batch = jax.vmap(lambda row: LLAMA.apply(params, row))(rows)[1]
    for family, axis in (("q", 1), ("k", 1), ("v", 1), ("z", 1), ("scores", 0), ("pattern", 0)):
        one, whole = f"{family}.1.1", f"{family}.1"
        np.testing.assert_array_equal(alone[one], np.take(np.asarray(alone[whole]), 1, axis))
        np.testing.assert_array_equal(batch[one], np.take(np.asarray(batch[whole]), 1, axis + 1))
    for wrong in (f"z.1.{LLAMA.heads}", "pattern.0.-1", "z.0.x", "resid.0.1", "mlp_post.0.0", "z.9", "nowhere", "embed.0"):
        with pytest.raises(Invalid, match=r"^site: .*allowed: "):
            _ = alone[wrong]


# ---- parts that are off, compute types, dropout


def test_without_attention_positions_do_not_talk_and_without_both_the_model_is_a_bigram_table() -> None:
    deaf = dataclasses.replace(LLAMA, attention=None)
    logits = np.asarray(forward(deaf)(some_params(deaf), TOKENS)[0])
    assert np.array_equal(logits[2], logits[3])  # the same token twice
    table = Transformer(layers=1, d_model=8, heads=1, attention=None, mlp=None, norm=None)
    params = some_params(table)
    expected = np.asarray(params["embed"]["W_E"])[ROW] @ np.asarray(params["unembed"]["W_U"])
    assert np.abs(np.asarray(forward(table)(params, TOKENS)[0]) - expected).max() < 1e-5


def test_bfloat16_is_close_to_float32_and_not_the_same() -> None:
    params = some_params(LLAMA)
    exact = np.asarray(forward(LLAMA)(params, TOKENS)[0])
    rough = np.asarray(forward(dataclasses.replace(LLAMA, dtype="bfloat16"))(params, TOKENS)[0])
    assert rough.dtype == np.float32
    assert 1e-4 < np.abs(rough - exact).max() < 0.05 * np.abs(exact).max()


def test_large_vocabularies_embed_by_lookup_with_the_same_result() -> None:
    model = Transformer(layers=1, d_model=8, heads=2)
    params = jax.jit(lambda: model.init(jax.random.key(0), 600, POSITIONS))()
    rows = jnp.array([599, 3, 512])
    assert np.array_equal(forward(model)(params, rows)[1]["embed"], params["embed"]["W_E"][rows])


def test_dropout_needs_a_key_and_keeps_the_mean() -> None:
    model = dataclasses.replace(LLAMA, dropout=0.25)
    params = some_params(model)
    plain, trace = forward(LLAMA)(params, TOKENS)
    assert np.array_equal(forward(model)(params, TOKENS)[0], plain)
    assert np.array_equal(jax.jit(lambda key: LLAMA.apply(params, TOKENS, key=key)[0])(jax.random.key(0)), plain)
    draw = jax.jit(jax.vmap(lambda key: model.apply(params, TOKENS, key=key)[1]["embed"]))
    draws, embed = draw(jax.random.split(jax.random.key(1), 4000)), np.asarray(trace["embed"])
    dropped = np.asarray(draws) == 0
    assert abs(dropped.mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / dropped.size)
    error = np.abs(embed) * math.sqrt(0.25 / 0.75 / 4000)  # standard error of a mean of scaled coins
    assert (np.abs(np.asarray(draws).mean(0) - embed) < 5 * error + 1e-6).all()


def test_dropout_draws_anew_for_every_key_layer_and_use() -> None:
    model = Transformer(layers=2, d_model=64, heads=1, dropout=0.5, norm=None, position=None)
    params = some_params(model)

    def ones(site: str, x: jax.Array) -> jax.Array:
        return jnp.ones_like(x) if site.startswith(("attn_out", "mlp_out")) else x

    run = jax.jit(lambda key: model.apply(params, TOKENS, edit=ones, key=key)[1])

    def masks(seed: int) -> list[np.ndarray]:
        trace = run(jax.random.key(seed))
        stream = [np.asarray(trace[s]) for s in ("embed", "resid_mid.0", "resid.0", "resid_mid.1", "resid.1")]
        return [stream[0] != 0] + [after - before > 1 for before, after in itertools.pairwise(stream)]

    drawn = masks(0) + masks(1)
    assert all(0.35 < m.mean() < 0.65 for m in drawn)
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert 0.35 < (a == b).mean() < 0.65  # independent coins agree half the time


# ---- initial weights


@functools.cache
def wide(seed: int = 3, **changes) -> dict:
    model = Transformer(layers=2, d_model=64, heads=4, position=Learned(), **changes)
    return jax.jit(lambda key: model.init(key, 40, 50))(jax.random.key(seed))


def test_default_weights_are_drawn_as_torch_draws_them() -> None:
    """`Linear`: uniform within 1/sqrt(fan in). `Embedding`: standard normal. Norms: ones."""
    params = wide()
    block = params["blocks"][1]
    fan_in = dict.fromkeys(("W_Q", "W_K", "W_V", "W_O"), 64)
    matrices = [(block["attn"][n], f) for n, f in fan_in.items()]
    matrices += [(block["mlp"]["W_in"], 64), (block["mlp"]["W_gate"], 64), (block["mlp"]["W_out"], 170), (params["unembed"]["W_U"], 64)]
    for w, fan in matrices:
        w, bound = np.asarray(w), fan**-0.5
        assert np.abs(w).max() <= bound
        assert np.abs(w).max() > 0.99 * bound
        assert abs(w.std() / (bound / math.sqrt(3)) - 1) < 0.05
        assert abs(w.mean()) < 5 * bound / math.sqrt(3 * w.size)
    for w in (params["embed"]["W_E"], params["pos_embed"]["W_pos"]):
        assert abs(np.asarray(w).std() - 1) < 0.05 and np.abs(w).max() > 2.5
    assert all(np.array_equal(n["w"], np.ones(64)) for n in (block["ln1"], block["ln2"], params["ln_final"]))


def test_init_std_is_the_deviation_of_every_weight() -> None:
    params = wide(init_std=0.02, bias=True)
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        w, name = np.asarray(w), path[-1].key
        if name.startswith("W_"):
            assert abs(w.std() / 0.02 - 1) < 0.06, path
            assert np.abs(w).max() > 0.02 * 2.5, path
        else:
            assert np.array_equal(w, np.full(w.shape, float(name == "w"))), path


def test_matrices_of_one_model_are_drawn_independently() -> None:
    params = wide()
    a, b = (np.asarray(params["blocks"][0]["attn"][n]).ravel() for n in ("W_Q", "W_K"))
    c = np.asarray(params["blocks"][1]["attn"]["W_Q"]).ravel()
    other = np.asarray(wide(seed=4)["blocks"][0]["attn"]["W_Q"]).ravel()
    for x, y in ((a, b), (a, c), (a, other)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(a.size)


def test_parameters_are_as_many_as_the_formula_says() -> None:
    """Llama's block: 4 d^2 of attention, 3 d f of SwiGLU, two norms."""
    count = sum(w.size for w in jax.tree.leaves(some_params(LLAMA)))
    d, f = 8, 2 * math.ceil(math.floor(8 * 8 / 3) / 2)
    assert f == 22
    assert count == 2 * VOCAB * d + 2 * (4 * d * d + 3 * d * f + 2 * d) + d


# ---- FLOPs


def test_kaplan_flops_are_the_published_formula() -> None:
    model = Transformer(layers=4, d_model=128, heads=4)
    per_step = model.flops_per_token(5, 52, "kaplan") * 64 * 52
    assert per_step == 6 * (12 * 4 * 128**2 + 4 * 52 * 128) * 64 * 52
    assert math.ceil(1e15 / per_step) == 61_595


@pytest.mark.parametrize("tied", [False, True])
def test_matmul_flops_count_every_weight_that_multiplies_an_activation(tied) -> None:
    model = dataclasses.replace(LLAMA, tied=tied)
    d, f, t = 8, 22, 52
    weights = 2 * (4 * d * d + 3 * d * f) + VOCAB * d
    assert model.flops_per_token(VOCAB, t, "matmul") == 6 * weights + 12 * 2 * t * d
