"""The fused kernel's meaning, run without a GPU, against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans import ALiBi, Attention, Transformer
from elegans.models import fused
from elegans.types import no_edit

BF16 = 2.0**-8  # relative step of bfloat16


def plain(q, k, v):
    """float32 causal attention, position by position."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("qhe,khe->hqk", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(q.shape[0], dtype=bool), scores, -jnp.inf))
    return jnp.einsum("hqk,khe->qhe", weights, v)


@pytest.mark.parametrize(("length", "heads", "width"), [(51, 4, 16), (7, 2, 4), (66, 1, 24)])
def test_kernel_is_attention_forward_and_backward(length, heads, width):
    """Lengths that fill no tile, heads narrower than a product, and a row of two tiles."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, length, heads, width), jnp.bfloat16)

    def of(attention):
        return jax.value_and_grad(lambda *x: (attention(*x).astype(jnp.float32) ** 2).sum(), (0, 1, 2))(q, k, v)

    (value, gradients), (wanted, exact) = of(lambda *x: fused.attention(*x, interpret=True)), of(plain)
    assert value == pytest.approx(wanted, rel=BF16)
    for got, want in zip(gradients, exact, strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        assert np.linalg.norm(got - want) < 4 * BF16 * np.linalg.norm(want)


def test_only_unedited_bfloat16_rows_on_a_gpu_are_served(monkeypatch):
    """An edit may want to see what kernels skip, and float32 promises more than their products keep."""

    class Gpu:
        platform = "gpu"

    assert not fused.serves("bfloat16", no_edit)  # here is no GPU
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    assert fused.serves("bfloat16", no_edit)
    assert not fused.serves("float32", no_edit)
    assert not fused.serves("bfloat16", lambda site, x: x)


def test_a_model_gives_the_same_through_the_kernel(monkeypatch):
    """Scale, rotary positions and biases reach the kernel as they reach the formula; the trace still has its pattern."""
    model = Transformer(layers=1, d_model=32, heads=2, attention=Attention(scale=0.7), mlp=None, bias=True, dtype="bfloat16")
    params, tokens = model.init(jax.random.key(0), 5, 9), jnp.arange(9) % 5
    logits, trace = model.apply(params, tokens)
    kernel = fused.attention
    monkeypatch.setattr(fused, "serves", lambda dtype, edit: True)
    monkeypatch.setattr(fused, "LEAST_ROW", 9)
    monkeypatch.setattr(fused, "attention", lambda q, k, v: kernel(q, k, v, interpret=True))
    through, traced = model.apply(params, tokens)
    assert not np.array_equal(trace["z.0"], traced["z.0"])  # another order of additions: it did go through
    np.testing.assert_allclose(np.asarray(through), np.asarray(logits), atol=0.05)
    assert np.array_equal(trace["pattern.0"], traced["pattern.0"])


def test_scores_with_a_bias_never_go_through_the_kernel(monkeypatch):
    """The kernel adds nothing to scores: ALiBi must take the formula, where others are served."""
    model = Transformer(layers=1, d_model=32, heads=2, mlp=None, position=ALiBi(span=1.0), dtype="bfloat16")
    params, tokens = model.init(jax.random.key(0), 5, 9), jnp.arange(9) % 5
    logits, _ = model.apply(params, tokens)
    monkeypatch.setattr(fused, "serves", lambda dtype, edit: True)
    monkeypatch.setattr(fused, "LEAST_ROW", 9)
    monkeypatch.setattr(fused, "attention", lambda q, k, v: pytest.fail("went through the kernel"))
    assert np.array_equal(model.apply(params, tokens)[0], logits)


def test_short_rows_take_the_formula(monkeypatch):
    """They are quicker without the kernel."""
    model = Transformer(layers=1, d_model=32, heads=2, mlp=None, dtype="bfloat16")
    params, tokens = model.init(jax.random.key(0), 5, 9), jnp.arange(fused.LEAST_ROW - 1) % 5
    monkeypatch.setattr(fused, "serves", lambda dtype, edit: True)
    monkeypatch.setattr(fused, "attention", lambda q, k, v: pytest.fail("went through the kernel"))
    jax.eval_shape(model.apply, params, tokens)
