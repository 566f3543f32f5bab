"""The attention kernels, their meaning run without a GPU, against the plain formula in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import elegans as el
from elegans import ALiBi, Attention, Learned, Rotary, Transformer
from elegans.models import fused, fused_attention, fused_heads
from elegans.models.fused_heads import Blocks
from kernels import BF16, close, kernels_in, kernels_lowered, steps_of, with_and_without


def drawn(*shape):
    return 1.5 * jax.random.normal(jax.random.key(9), shape, jnp.bfloat16)


def plain(heads, scale, positions, qkv):
    """Causal attention in float32."""
    q, k, v = (y.reshape(len(qkv), heads, -1) for y in jnp.split(qkv.astype(jnp.float32), 3, -1))
    q, k = positions.rotate(q), positions.rotate(k)
    scores = jnp.einsum("qhe,khe->hqk", q, k) * scale / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(jnp.tri(len(qkv), dtype=bool), scores, -jnp.inf))
    return jnp.einsum("hqk,khe->qhe", weights, v).reshape(len(qkv), -1)


def through(heads, scale, positions, qkv, interpret=True):
    angles = positions.angles(len(qkv), qkv.shape[1] // (3 * heads))
    return fused_attention.attention(qkv, heads, scale, angles, interpret)


def gradients(block, qkv):
    """What some rows' heads mix, and the gradients of a loss to which no output is alike."""

    def loss(x):
        z = jax.vmap(block)(x)
        return (z.astype(jnp.float32) * (2 + jnp.sin(jnp.arange(z.size)).reshape(z.shape))).sum(), z

    dx, z = jax.grad(loss, has_aux=True)(qkv)
    return z, jnp.split(dx, 3, -1)


@pytest.fixture
def blocks(monkeypatch):
    """Sets how many positions a block has."""

    def of(rows):
        for width in fused_heads.BLOCKS:
            monkeypatch.setitem(fused_heads.BLOCKS, width, Blocks(rows, 4))

    return of


CASES = {
    "four heads in a tile, a block but for two": (4, 4, 18, 16, 0.7, Rotary()),
    "two tiles, the last with one head": (3, 8, 33, 32, 1.0, Rotary(theta=100.0)),
    "columns that no head has, one block": (1, 18, 20, 32, 1.3, Rotary()),
    "an odd width, nothing turned": (2, 5, 32, 16, 1.0, Learned()),
}
LARGER = {
    f"{heads} heads of {width}, {length} positions": (heads, width, length, rows, scale, positions)
    for heads, width, length, rows, scale, positions in [
        (4, 16, 51, 64, 1.0, Rotary()),
        (4, 16, 51, 16, 1.0, Learned()),
        (4, 16, 132, 64, 0.5, Rotary()),
        (4, 8, 66, 32, 1.0, Rotary()),
        (5, 7, 66, 32, 2.0, Learned()),
        (2, 32, 132, 32, 1.0, Rotary()),
        (1, 64, 66, 32, 0.5, Rotary()),
        (1, 128, 34, 16, 1.0, Rotary()),
    ]
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in LARGER)])
def test_values_and_gradients_are_the_formulas(case, blocks):
    """Rows that fill no block and ones that do, heads that fill no tile and ones that do. A query's rounding counts as scores do."""
    heads, width, length, rows, scale, positions = (CASES | LARGER)[case]
    blocks(rows)
    qkv = drawn(3, length, 3 * heads * width)
    close(
        *(jax.jit(functools.partial(gradients, functools.partial(f, heads, scale, positions)))(qkv) for f in (through, plain)),
        steps=2 * max(1, scale),
    )


def test_a_cohort_s_rows_are_each_as_if_alone(blocks):
    """Replicas of rows, whose scale is swept, in a loop inside jit, as training does it: to the bit."""
    blocks(16)
    qkv, scales = drawn(2, 3, 18, 24), jnp.asarray([0.7, 1.3])

    def of(scale, x):
        return gradients(functools.partial(through, 2, scale, Rotary()), x)

    _, cohort = jax.jit(lambda s, x: jax.lax.scan(lambda c, _: (c, jax.vmap(of)(s, x)), 0, length=1))(scales, qkv)
    alone = jax.jit(of)
    for i in range(2):
        want = alone(scales[i], qkv[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(np.asarray(a[0, i]), np.asarray(b)), cohort, want)


def test_what_nobody_reads_is_spared_and_changes_no_bit_of_the_rest(blocks):
    """Rows of three blocks that are read up to their middle, a block's end, its first position, nowhere and whole; gradients too."""
    blocks(16)
    heads, length = 2, 33
    upto = jnp.array([5, 16, 17, 0, 33])
    qkv, dz = drawn(len(upto), length, 3 * heads * 8), drawn(len(upto), length, heads * 8)
    read = jnp.arange(length) < upto[:, None]

    def of(x, upto):
        angles = Rotary().angles(length, 8)
        return jax.vmap(lambda x, upto: fused_attention.attention(x, heads, 1.0, angles, True, upto), (0, None if upto is None else 0))(
            x, upto
        )

    (some, pull), (whole, pull_all) = (jax.vjp(lambda x, upto=upto: of(x, upto), qkv) for upto in (upto, None))
    assert np.array_equal(some[read], whole[read]) and np.isfinite(np.asarray(some, np.float32)).all()
    blocks_read = -(-upto // 16)
    spared = jnp.arange(length)[None, :] >= 16 * blocks_read[:, None]
    assert spared.any() and not some[spared].any() and whole[spared].all()
    dz = jnp.where(read[..., None], dz, 0)
    for got, want in zip(pull(dz), pull_all(dz), strict=True):
        assert np.array_equal(got, want)
        assert got[read].any() and not got[~read].any()


def test_scores_and_patterns_are_never_in_memory():
    """Two replicas of three rows: one kernel forward and two backward, and outside of them no array has two axes of positions."""
    z, qkv = drawn(2, 3, 33, 24), drawn(2, 3, 33, 72)

    def both(x, dz):
        return jax.vjp(jax.vmap(jax.vmap(functools.partial(through, 3, 1.0, Rotary()))), x)[1](dz)

    program = jax.make_jaxpr(both)(qkv, z).jaxpr
    assert [len(made) for made in kernels_in(program)] == [2, 2, 1]
    assert max(v.aval.shape.count(33) for s in steps_of(program) for v in s.outvars) == 1


@pytest.mark.parametrize(("heads", "width", "length"), [(4, 4, 18), (3, 8, 51), (4, 16, 132), (1, 128, 34)])
def test_kernels_lower_for_a_gpu_without_one(heads, width, length):
    """For two replicas of rows."""
    gradient = jax.jit(jax.vmap(functools.partial(gradients, functools.partial(through, heads, 1.0, Rotary(), interpret=False))))
    assert kernels_lowered(gradient, drawn(2, 3, length, 3 * heads * width)) == 3


# ---- in the model


@pytest.fixture
def served(monkeypatch):
    """As on a GPU, the kernels interpreted; the numbers of heads that they were asked for."""
    asked, kernel = [], fused_attention.attention

    def attention(qkv, heads, *args, **more):
        asked.append(heads)
        return kernel(qkv, heads, *args, **more, interpret=True)

    monkeypatch.setattr(fused, "serves", lambda dtype, edit: dtype == "bfloat16")
    monkeypatch.setattr(fused_attention, "LEAST_ROW", 9)
    monkeypatch.setattr(fused_attention, "attention", attention)
    monkeypatch.setattr(Transformer, "_attention_kernel", lambda *_: None)  # norm and projections by the formula
    return asked


def test_a_model_gives_the_same_through_the_kernel(served, monkeypatch):
    """Scale, rotary positions and biases reach the kernel as they reach the formula; the trace still has what the kernel skips."""
    model = Transformer(layers=1, d_model=32, heads=2, attention=Attention(scale=0.7), mlp=None, bias=True, dtype="bfloat16")
    params = model.init(jax.random.key(0), 5, 9)
    params["blocks"][0]["attn"] |= {f"b_{n}": jnp.full((2, 16), 0.3) for n in "QKV"}
    (through, traced), (logits, trace) = with_and_without(model, params, monkeypatch)
    assert served == [2]
    assert np.linalg.norm(np.asarray(through - logits)) < 4 * BF16 * np.linalg.norm(np.asarray(logits))
    assert not np.array_equal(trace["z.0"], traced["z.0"])  # another order of additions: it did go through
    for site in ("q.0", "k.0", "v.0", "scores.0", "pattern.0"):
        assert np.array_equal(trace[site], traced[site])


@el.spec
class Backwards(Rotary):
    """Positions of a user's own, whose way to turn rows the kernel cannot know."""

    def rotate(self, x):
        return super().rotate(-x)


@pytest.mark.parametrize(
    "change", [{"position": Backwards()}, {"position": ALiBi(span=1.0)}, {"dtype": "float32"}, {"heads": 1, "d_head": 130}, {}], ids=str
)
def test_what_the_kernel_does_not_know_takes_the_formula(change, served, monkeypatch):
    """Biases on scores among it, and rows too short to gain."""
    monkeypatch.setattr(fused_attention, "LEAST_ROW", 9 if change else 10)
    model = Transformer(**{"layers": 1, "d_model": 16, "heads": 2, "mlp": None, "dtype": "bfloat16"} | change)
    jax.eval_shape(lambda key: model.apply(model.init(key, 5, 9), jnp.arange(9) % 5), jax.random.key(0))
    assert not served
