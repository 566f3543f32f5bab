"""The attention block's kernels, their meaning run without a GPU, against the plain formula in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans import Attention, LayerNorm, Learned, RMSNorm, Rotary, Transformer
from elegans.models import fused, fused_attention, fused_attention_block, fused_projections
from elegans.models.fused_tokens import Formula
from kernels import BF16, Louder, by, close, drawn, gradients, kernels_in, kernels_lowered, made, plain, with_and_without

CASES = {  # norm, scale, positions, heads, d_model, d_head, bias, length
    "rms, one tile": (RMSNorm(), 0.7, Rotary(), 4, 16, 4, False, 18),
    "layer with biases, two tiles, the last with one head": (LayerNorm(), 1.0, Rotary(), 3, 20, 8, True, 16),
}


through = functools.partial(by, fused_attention_block)


@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients_are_the_formulas(case):
    case = CASES[case]
    weights, x = made(case), drawn(3, case[-1], case[4])
    both = (jax.jit(functools.partial(gradients, functools.partial(f, case)))(weights, x) for f in (through, plain))
    close(*both, steps=3)  # what a bias of keys adds to a query's scores is alike but for rotation, and its gradient mostly cancels


@pytest.mark.slow
def test_a_cohort_s_gradients_are_its_replicas_own():
    """Replicas over rows, in a loop inside jit, as training does it: each replica's as if it were alone, to the bit."""
    case = CASES["rms, one tile"]
    weights, x = made(case, 2), drawn(2, 3, case[-1], case[4])
    gradient = functools.partial(gradients, functools.partial(through, case))
    _, cohort = jax.jit(lambda p, x: jax.lax.scan(lambda c, _: (c, jax.vmap(gradient)(p, x)), 0, length=1))(weights, x)
    for i in range(2):
        want = jax.jit(gradient)(*jax.tree.map(lambda a, i=i: a[i], (weights, x)))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(np.asarray(a[0, i]), np.asarray(b)), cohort, want)


def test_weights_gradients_are_no_work_of_kernels():
    """Three rows: kernels give what has a row's positions, and sums of width d_model."""
    case = CASES["rms, one tile"]
    program = jax.make_jaxpr(functools.partial(gradients, functools.partial(through, case)))(made(case), drawn(3, 18, 16)).jaxpr
    calls = kernels_in(program)
    assert len(calls) == 2
    assert {shape for call in calls for shape in call} == {(54, 16), (54, 48), (3, 16)}


LOWERED = [(RMSNorm(), 1.0, Rotary(), 4, d, d // 4, False, 51) for d in (16, 64)] + [(LayerNorm(), 1.0, Learned(), 1, 32, 32, True, 33)]


@pytest.mark.parametrize("case", LOWERED, ids=str)
def test_kernels_lower_for_a_gpu_without_one(case):
    """For two replicas of rows."""
    gradient = jax.jit(jax.vmap(functools.partial(gradients, functools.partial(through, case, interpret=False))))
    assert kernels_lowered(gradient, made(case, 2), drawn(2, 3, case[-1], case[4])) == 2


# ---- in the model


@pytest.fixture
def served(monkeypatch):
    """As on a GPU, the kernels interpreted; how often the block was asked for."""
    asked, kernel, attention = [], fused_attention_block.block, fused_attention.attention

    def block(*args, **more):
        asked.append(args[0])
        return kernel(*args, **more, interpret=True)

    monkeypatch.setattr(fused, "serves", lambda dtype, edit: dtype == "bfloat16")
    monkeypatch.setattr(fused_attention, "LEAST_ROW", 9)
    monkeypatch.setattr(fused_attention, "attention", functools.partial(attention, interpret=True))
    monkeypatch.setattr(fused_projections, "block", functools.partial(fused_projections.block, interpret=True))
    monkeypatch.setattr(fused_attention_block, "block", block)
    return asked


def test_a_model_gives_the_same_through_the_kernel(served, monkeypatch):
    """The trace still has what the kernel skips."""
    model = Transformer(layers=1, d_model=40, heads=2, attention=Attention(scale=0.7), mlp=None, bias=True, dtype="bfloat16")
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
        {"d_model": 80},
        {"d_model": 32},
        {"heads": 1, "d_head": 34},
        {"dropout": 0.1},
    ],
    ids=str,
)
def test_what_the_kernel_does_not_know_takes_another_way(change, served):
    known = {"layers": 1, "d_model": 40, "heads": 2, "mlp": None, "dtype": "bfloat16"}
    for fields in (known | change, known):
        model = Transformer(**fields)
        assert not served
        jax.eval_shape(lambda key, model=model: model.apply(model.init(key, 5, 9), jnp.arange(9) % 5, key=key), jax.random.key(0))
    assert served  # without the change
