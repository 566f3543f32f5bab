"""The MLP block's kernels, their meaning run without a GPU, against the plain formula in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elegans as el
from elegans import MLP, LayerNorm, RMSNorm, SwiGLU, Transformer
from elegans.models import fused, fused_mlp
from elegans.models.base import Context, Sizes
from elegans.models.fused_tokens import Formula
from kernels import BF16, close, kernels_in, kernels_lowered, with_and_without


def made(norm, mlp, d, bias, *lead):
    """Random weights of a block, stacked over `lead`; none is zero or one."""
    sizes = Sizes(2, 2, d, 1, d, bias, None)
    shapes = jax.eval_shape(lambda key: {"ln2": norm.init(key, sizes), "mlp": mlp.init(key, sizes)}, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(d), len(leaves))
    return jax.tree.unflatten(treedef, [jax.random.normal(k, (*lead, *a.shape)) * 0.3 + 0.1 for k, a in zip(keys, leaves, strict=True)])


def drawn(*shape):
    return jax.random.normal(jax.random.key(9), shape, jnp.bfloat16)


def plain(norm, mlp, params, x):
    """The components' own formula, in float32."""
    x, context = x.astype(jnp.float32), Context(jnp.arange(2), lambda name, y: y)
    return x + mlp.apply(params["mlp"], norm.apply(params["ln2"], x, context), context)


def through(norm, mlp, params, x, upto=None):
    formula = Formula(isinstance(norm, LayerNorm), norm.eps, mlp.activation if isinstance(mlp, MLP) else "swiglu")
    return fused_mlp.block(formula, params["ln2"], params["mlp"], x, interpret=True, upto=upto)


def rows_loss(block, params, x):
    """A loss of rows that share weights: no outputs weigh alike, and sums of their weights do not cancel."""
    y = jax.vmap(block, (None, 0))(params, x).astype(jnp.float32)
    return (y * (2 + jnp.sin(jnp.arange(y.size)).reshape(y.shape))).sum() / y.shape[0]


CASES = {
    "rms swiglu": (RMSNorm(), SwiGLU(), 20, False, 18),
    "layer gelu with biases": (LayerNorm(), MLP(), 20, True, 16),
}


@pytest.mark.parametrize("kept", [12_288, 0], ids=["one kernel backward", "two"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients_are_the_formulas(case, kept, monkeypatch):
    """54 tokens that fill no block of 16 and 48 that do but no two spans of 32, and widths that fill no tile."""
    norm, mlp, d, bias, length = CASES[case]
    monkeypatch.setitem(fused_mlp.BLOCKS, 32, fused_mlp.Blocks(rows=16, tile=32, span=32, kept=kept))
    params, x = made(norm, mlp, d, bias), drawn(3, length, d)
    blocks = [functools.partial(f, norm, mlp) for f in (through, plain)]
    close(*(jax.jit(jax.vmap(f, (None, 0)))(params, x) for f in blocks))
    close(*(jax.jit(jax.grad(functools.partial(rows_loss, f), (0, 1)))(params, x) for f in blocks))


@pytest.mark.parametrize("kept", [12_288, 0], ids=["one kernel backward", "two"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_beyond_the_longest_row_that_is_read_are_spared(case, kept, monkeypatch):
    """Programs of 16 tokens, of which four rows have four positions each: what is read and all gradients keep their bits."""
    norm, mlp, d, bias, _ = CASES[case]
    monkeypatch.setitem(fused_mlp.BLOCKS, 32, fused_mlp.Blocks(rows=16, tile=32, span=32, kept=kept))
    params, x, upto = made(norm, mlp, d, bias), drawn(4, 18, d), jnp.array([3, 9, 7, 2])
    read = jnp.arange(18) < upto[:, None]

    def loss(params, x, upto):
        y = jax.vmap(functools.partial(through, norm, mlp), (None, 0, None if upto is None else 0))(params, x, upto)
        return jnp.where(read[..., None], y.astype(jnp.float32) * jnp.sin(jnp.arange(y.size)).reshape(y.shape), 0).sum(), y

    (some, y), (whole, y_all) = (jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x, u) for u in (upto, None))
    jax.tree.map(np.testing.assert_array_equal, some, whole)
    assert np.array_equal(y[:, :12], y_all[:, :12])  # three programs: up to the end of that in which a token is read
    assert np.array_equal(y[:, 12:], x[:, 12:]) and not np.array_equal(y_all[:, 12:], x[:, 12:])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activations_and_slopes_are_jax_s(activation):
    """To a thousandth of a step of bfloat16, far tails included."""
    known = {"gelu": functools.partial(jax.nn.gelu, approximate=False), "gelu_tanh": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}
    x = jnp.linspace(-9, 9, 1000)
    for f in (lambda g: g, lambda g: jax.vmap(jax.grad(g))):
        got, want = (jax.jit(f(g))(x) for g in (fused_mlp.ACTIVATIONS[activation], known[activation]))
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-3 * BF16, atol=1e-6)


def test_a_cohort_s_gradients_are_its_replicas_own():
    """Replicas over rows, in a loop inside jit, as training does it: each replica's as if it were alone, to the bit."""
    norm, mlp, d, *_ = CASES["rms swiglu"]
    params, x = made(norm, mlp, d, False, 2), drawn(2, 3, 18, d)
    gradient = jax.grad(functools.partial(rows_loss, functools.partial(through, norm, mlp)), (0, 1))
    _, cohort = jax.jit(lambda p, x: jax.lax.scan(lambda c, _: (c, jax.vmap(gradient)(p, x)), 0, length=1))(params, x)
    alone = jax.jit(gradient)
    for i in range(2):
        want = alone(*jax.tree.map(lambda a, i=i: a[i], (params, x)))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(np.asarray(a[0, i]), np.asarray(b)), cohort, want)


def test_every_row_may_have_a_gradient_of_its_own():
    """`vmap(grad(f))` gives a gradient of the weights per row, not their sum."""
    norm, mlp, d, *_ = CASES["rms swiglu"]
    params, x = made(norm, mlp, d, False), drawn(2, 5, d)
    of = [jax.grad(lambda p, row, f=f: jnp.sin(f(norm, mlp, p, row).astype(jnp.float32)).sum()) for f in (through, plain)]
    close(*(jax.jit(jax.vmap(f, (None, 0)))(params, x) for f in of), steps=4)


def test_weights_gradients_are_summed_in_the_kernel_and_not_row_by_row():
    """Three rows, and no kernel returns three of anything but x."""
    norm, mlp, d, *_ = CASES["rms swiglu"]
    gradient = jax.grad(functools.partial(rows_loss, functools.partial(through, norm, mlp)))
    calls = kernels_in(jax.make_jaxpr(gradient)(made(norm, mlp, d, False), drawn(3, 18, d)).jaxpr)
    assert len(calls) == 3
    assert {shape for call in calls for shape in call} == {(54, 20), (1, 32), (1, 32, 64), (1, 64, 32)}


LOWERED = [(RMSNorm(), SwiGLU(), d, False) for d in (16, 20, 62, 64, 128)] + [
    (LayerNorm(), MLP(activation=a), 32, True) for a in ("gelu", "gelu_tanh")
]


@pytest.mark.parametrize(("norm", "mlp", "d", "bias"), LOWERED)
def test_kernels_lower_for_a_gpu_without_one(norm, mlp, d, bias):
    """For two replicas of rows."""

    def block(params, x):
        return fused_mlp.block(Formula(bias, norm.eps, getattr(mlp, "activation", "swiglu")), params["ln2"], params["mlp"], x)

    gradient = jax.jit(jax.vmap(jax.value_and_grad(functools.partial(rows_loss, block), (0, 1))))
    assert kernels_lowered(gradient, made(norm, mlp, d, bias, 2), drawn(2, 3, 18, d)) == (2 if d <= 16 else 3)


# ---- in the model


@pytest.fixture
def served(monkeypatch):
    """As on a GPU, the kernels interpreted; the formulas that they were asked for."""
    asked, kernel = [], fused_mlp.block

    def block(formula, norm, mlp, x, **more):
        asked.append(formula)
        return kernel(formula, norm, mlp, x, interpret=True, **more)

    monkeypatch.setattr(fused, "serves", lambda dtype, edit: dtype == "bfloat16")
    monkeypatch.setattr(fused_mlp, "block", block)
    return asked


def test_a_model_gives_the_same_through_the_kernel(served, monkeypatch):
    """The trace still has what the kernel skips."""
    model = Transformer(layers=1, d_model=20, heads=2, bias=True, norm=LayerNorm(), dtype="bfloat16")
    params = model.init(jax.random.key(0), 5, 9)
    (through, traced), (logits, trace) = with_and_without(model, params, monkeypatch)
    assert served == [Formula(True, 1e-5, "swiglu")]
    np.testing.assert_allclose(np.asarray(through), np.asarray(logits), atol=0.05)
    for site in ("ln2.0", "mlp_post.0", "mlp_out.0"):
        assert np.array_equal(trace[site], traced[site])


@el.spec
class Doubled(SwiGLU):
    """A component of a user's own, which the kernel cannot know."""

    def apply(self, params, x, context):
        return 2 * super().apply(params, x, context)


@el.spec
class Cooled(RMSNorm):
    """Another."""

    def apply(self, params, x, context):
        return super().apply(params, x, context) / 2


@pytest.mark.parametrize(
    "change",
    [{"mlp": Doubled()}, {"norm": Cooled()}, {"norm": None}, {"mlp": None}, {"dtype": "float32"}, {"d_model": 160}, {"dropout": 0.1}],
    ids=str,
)
def test_what_the_kernel_does_not_know_takes_the_formula(change, served):
    model = Transformer(**{"layers": 1, "d_model": 16, "heads": 1, "attention": None, "dtype": "bfloat16"} | change)
    jax.eval_shape(lambda key: model.apply(model.init(key, 5, 4), jnp.arange(4), key=key), jax.random.key(0))
    assert not served
