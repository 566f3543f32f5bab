"""The kernels around attention, their meaning run without a GPU, against the plain formula in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans import Attention, LayerNorm, Learned, RMSNorm, Rotary, Transformer
from elegans.models import fused, fused_attention, fused_heads, fused_projections
from elegans.models.fused_tokens import Blocks, Formula
from kernels import BF16, Louder, by, close, drawn, gradients, kernels_in, kernels_lowered, made, plain, steps_of, with_and_without

CASES = {  # norm, scale, positions, heads, d_model, d_head, bias, length
    "rms": (RMSNorm(), 0.7, Rotary(), 4, 16, 4, False, 18),
    "columns that fill no tile, queries and values in one": (RMSNorm(), 1.0, Rotary(theta=100.0), 3, 20, 8, False, 21),
    "layer with biases, nothing turned": (LayerNorm(), 1.0, Learned(), 2, 20, 8, True, 16),
    "biases that turn": (LayerNorm(), 1.3, Rotary(), 2, 8, 4, True, 17),
}


through = functools.partial(by, fused_projections)


@pytest.fixture
def small(monkeypatch):
    """Blocks that three short rows do not fill; `kept` as wanted."""

    def of(kept):
        for width in fused_projections.BLOCKS:
            monkeypatch.setitem(fused_projections.BLOCKS, width, Blocks(16, 16, span=32, kept=kept))

    return of


@pytest.mark.parametrize("kept", [12_288, 0], ids=["one kernel backward", "two"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients_are_the_formulas(case, kept, small):
    """A block of tokens has the ends of rows in it."""
    small(kept)
    case = CASES[case]
    weights, x = made(case), drawn(3, case[-1], case[4])
    both = [jax.jit(functools.partial(gradients, functools.partial(f, case)))(weights, x) for f in (through, plain)]
    # what a bias of keys adds to a query's scores is alike but for turning, so that its gradient cancels: measured beside that of values
    got, want = (grads[0][1].pop("b_K", jnp.zeros(1)) for grads, _ in both)
    scale = np.linalg.norm(both[1][0][0][1].get("b_V", jnp.ones(1)))
    assert np.linalg.norm(got - want) < 3 * BF16 * scale
    close(*both, steps=3)


def test_a_cohort_s_gradients_are_its_replicas_own(small):
    """Replicas over rows, whose scale is swept, in a loop inside jit, as training does it: each replica's as if it were alone.

    Kernels to the bit; a plain product of a CPU adds in another order when there are several.
    """
    small(0)
    case = CASES["rms"]
    weights, x, scales = made(case, 2), drawn(2, 3, case[-1], case[4]), jnp.asarray([0.7, 1.3])

    def of(scale, weights, x):
        return gradients(functools.partial(through, (case[0], scale, *case[2:])), weights, x)

    _, cohort = jax.jit(lambda s, p, x: jax.lax.scan(lambda c, _: (c, jax.vmap(of)(s, p, x)), 0, length=1))(scales, weights, x)
    for i in range(2):
        want = jax.jit(of)(scales[i], *jax.tree.map(lambda a, i=i: a[i], (weights, x)))
        got = jax.tree.map(lambda a, i=i: a[0, i], cohort)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=1e-5)


def test_rows_that_nobody_reads_to_their_end_are_spared(small, monkeypatch):
    """Each row by its own number of positions: what is read and all gradients keep their bits."""
    small(0)
    monkeypatch.setitem(fused_heads.BLOCKS, 8, fused_heads.Blocks(16, 1))
    case = (RMSNorm(), 0.7, Rotary(), 4, 16, 4, False, 40)
    weights, x, upto = made(case), drawn(4, 40, 16), jnp.array([3, 16, 40, 20])
    read = jnp.arange(40) < upto[:, None]

    def loss(weights, x, upto):
        y = jax.vmap(lambda x, upto: through(case, weights, x, upto=upto), (0, None if upto is None else 0))(x, upto)
        return jnp.where(read[..., None], y.astype(jnp.float32) * jnp.sin(jnp.arange(y.size)).reshape(y.shape), 0).sum(), y

    (some, y), (whole, y_all) = (jax.jit(jax.grad(loss, (0, 1), has_aux=True))(weights, x, u) for u in (upto, None))
    jax.tree.map(np.testing.assert_array_equal, some, whole)
    assert np.array_equal(y[read], y_all[read]) and np.isfinite(np.asarray(y, np.float32)).all()
    assert not np.array_equal(y, y_all)  # something was spared


def test_five_kernels_and_no_projection_in_float32():
    """Two forward and three backward; of what has a position and a projected row's columns, nothing is wider than bfloat16."""
    case = CASES["rms"]
    program = jax.make_jaxpr(functools.partial(gradients, functools.partial(through, case)))(made(case), drawn(3, 18, 16)).jaxpr
    assert len(kernels_in(program)) == 5
    tall = [v.aval for s in steps_of(program) for v in s.outvars if v.aval.shape[-1:] == (48,) and np.prod(v.aval.shape) > 16 * 48]
    assert tall and all(a.dtype == jnp.bfloat16 for a in tall)


LOWERED = [(RMSNorm(), 1.0, Rotary(), 4, d, d // 4, False, 132) for d in (8, 32, 64, 128)] + [
    (LayerNorm(), 1.0, Learned(), 2, 20, 8, True, 33)
]


@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_kernels_lower_for_a_gpu_without_one(case):
    """For two replicas of rows; up to d 32 one kernel makes all gradients."""
    gradient = jax.jit(jax.vmap(functools.partial(gradients, functools.partial(through, case, interpret=False))))
    assert kernels_lowered(gradient, made(case, 2), drawn(2, 3, case[-1], case[4])) == (5 if case[4] <= 32 else 6)


# ---- in the model


@pytest.fixture
def served(monkeypatch):
    """As on a GPU, the kernels interpreted; how often the block was asked for."""
    asked, kernel, attention = [], fused_projections.block, fused_attention.attention

    def block(*args, **more):
        asked.append(args[0])
        return kernel(*args, **more, interpret=True)

    monkeypatch.setattr(fused, "serves", lambda dtype, edit: dtype == "bfloat16")
    monkeypatch.setattr(fused_attention, "LEAST_ROW", 9)
    monkeypatch.setattr(fused_attention, "attention", functools.partial(attention, interpret=True))
    monkeypatch.setattr(fused_projections, "block", block)
    return asked


def test_a_model_gives_the_same_through_the_kernels(served, monkeypatch):
    """The trace still has what the kernels skip."""
    model = Transformer(layers=1, d_model=16, heads=2, attention=Attention(scale=0.7), mlp=None, bias=True, dtype="bfloat16")
    params = model.init(jax.random.key(0), 5, 9)
    (through, traced), (logits, trace) = with_and_without(model, params, monkeypatch)
    assert served == [Formula(False, 1e-5, "")]
    assert np.linalg.norm(np.asarray(through - logits)) < 4 * BF16 * np.linalg.norm(np.asarray(logits))
    for site in ("ln1.0", "q.0", "pattern.0"):
        assert np.array_equal(trace[site], traced[site])


@pytest.mark.parametrize(
    "change",
    [
        {"attention": Louder()},
        {"norm": None},
        {"skip": "normed"},
        {"d_model": 144},
        {"heads": 1, "d_head": 34},
        {"dropout": 0.1},
    ],
    ids=str,
)
def test_what_the_kernels_do_not_know_takes_another_way(change, served):
    known = {"layers": 1, "d_model": 16, "heads": 2, "mlp": None, "dtype": "bfloat16"}
    for fields in (known | change, known):
        model = Transformer(**fields)
        assert not served
        jax.eval_shape(lambda key, model=model: model.apply(model.init(key, 5, 9), jnp.arange(9) % 5, key=key), jax.random.key(0))
    assert served  # without the change


def test_a_model_spares_what_nobody_reads_unless_some_part_is_the_user_s(served, monkeypatch):
    """What a user's own part reads of other positions nobody knows."""
    monkeypatch.setitem(fused_heads.BLOCKS, 8, fused_heads.Blocks(16, 1))
    tokens = jnp.arange(33) % 5
    for own in (False, True):
        attention = (Attention(), Louder() if own else Attention())
        model = Transformer(layers=2, d_model=16, heads=2, attention=attention, mlp=None, dtype="bfloat16")
        params = model.init(jax.random.key(0), 5, 33)
        whole = model.apply(params, tokens)[0]
        some = model.logits(params, tokens, jnp.int32(5))
        assert served and np.array_equal(some[:5], whole[:5]) and np.isfinite(some).all()
        assert np.array_equal(some[16:], whole[16:]) == own
