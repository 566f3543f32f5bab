"""Optimisers and schedules against closed forms in float64 NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans import MLP, SGD, WSD, AdamW, Constant, Cosine, LayerNorm, Learned, Linear, Lion, Optimizer, Schedule, Transformer
from elegans.training.vectors import path_name, ravel, unravel

STEPS = 20
SHAPES = {"W": (3, 4), "b": (5,), "heads": (2, 3, 2)}  # tree order: by name; b is no matrix
IN_MATRIX = np.repeat([True, False, True], [12, 5, 12])


# ---- the oracles


def factor_of(schedule: Schedule, step: int, steps: int) -> float:
    """The docstring's formula: start + (1 - start) s / W before step W, shape((s - W) / (steps - W)) from there."""
    w = schedule.warmup * steps if schedule.warmup_steps is None else schedule.warmup_steps
    if step < w:
        return schedule.start + (1 - schedule.start) * step / w
    t = (step - w) / (steps - w)
    if isinstance(schedule, Cosine):
        return schedule.end + (1 - schedule.end) * (1 + math.cos(math.pi * t)) / 2
    if isinstance(schedule, Linear):
        return 1 - t * (1 - schedule.end)
    if isinstance(schedule, WSD):
        return 1.0 if t <= 1 - schedule.decay else 1 - (1 - schedule.end) * (t - 1 + schedule.decay) / schedule.decay
    return 1.0


def clipped(optim: Optimizer, g: np.ndarray) -> np.ndarray:
    norm = math.sqrt((g**2).sum())
    return g * optim.clip / norm if optim.clip is not None and norm > optim.clip else g


def adamw(optim: AdamW, p: np.ndarray, gradients: np.ndarray) -> list[np.ndarray]:
    """Parameters after every step."""
    m = v = np.zeros_like(p)
    path = []
    for step, g in enumerate(clipped(optim, g) for g in gradients):
        m = optim.b1 * m + (1 - optim.b1) * g
        v = optim.b2 * v + (1 - optim.b2) * g**2
        mean, square = m / (1 - optim.b1 ** (step + 1)), v / (1 - optim.b2 ** (step + 1))
        decaying = p * (IN_MATRIX if optim.decay == "matrices" else 1)
        rate = optim.lr * factor_of(optim.schedule, step, len(gradients))
        p = p - rate * (mean / (np.sqrt(square) + optim.eps) + optim.weight_decay * decaying)
        path.append(p)
    return path


def sgd(optim: SGD, p: np.ndarray, gradients: np.ndarray) -> list[np.ndarray]:
    """Parameters after every step: velocities are written out as sums over all gradients so far."""
    path, g = [], np.array([clipped(optim, g) for g in gradients])
    for step in range(len(g)):
        ages = step - np.arange(step + 1)
        weights = optim.momentum ** (ages + 1.0) + (ages == 0) if optim.nesterov else optim.momentum**ages
        rate = optim.lr * factor_of(optim.schedule, step, len(g))
        p = (1 - rate * optim.weight_decay) * p - rate * (weights[:, None] * g[: step + 1]).sum(0)
        path.append(p)
    return path


def lion(optim: Lion, p: np.ndarray, gradients: np.ndarray) -> list[np.ndarray]:
    """Parameters after every step: the momentum as a sum over all gradients before."""
    path, g = [], np.array([clipped(optim, g) for g in gradients])
    for step in range(len(g)):
        m = ((1 - optim.b2) * optim.b2 ** (step - 1.0 - np.arange(step))[:, None] * g[:step]).sum(0)
        rate = optim.lr * factor_of(optim.schedule, step, len(g))
        p = (1 - rate * optim.weight_decay) * p - rate * np.sign(optim.b1 * m + (1 - optim.b1) * g[step])
        path.append(p)
    return path


def tree_of(vector: np.ndarray) -> dict[str, jax.Array]:
    parts = np.split(vector.astype(np.float32), [12, 17])
    return {name: jnp.asarray(part.reshape(shape)) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def random_problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters, and gradients of norms from far below to far above the clipping threshold."""
    rng = np.random.default_rng(seed)
    p = rng.standard_normal(29).astype(np.float32).astype(np.float64)
    gradients = rng.standard_normal((STEPS, 29)) * 10.0 ** rng.uniform(-2, 1, (STEPS, 1))
    return p, gradients.astype(np.float32).astype(np.float64)


# ---- optimisers

WARM = Cosine(warmup=0.25, start=0.1, end=0.2)
OPTIMISERS = {
    "defaults": AdamW(lr=0.1),
    "no clipping": AdamW(lr=0.1, clip=None, schedule=WARM),
    "clipping, everything decays": AdamW(lr=0.1, clip=0.5, weight_decay=0.3, schedule=WARM),
    "clipping, matrices decay": AdamW(lr=0.1, clip=0.5, weight_decay=0.3, decay="matrices", schedule=WARM),
    "other moments": AdamW(lr=0.03, b1=0.5, b2=0.7, eps=0.1, weight_decay=0.0, schedule=Linear()),
    "no moments": AdamW(lr=0.03, b1=0.0, b2=0.0, eps=1.0, schedule=WSD(decay=0.5)),
    "SGD": SGD(lr=0.1, clip=None),
    "SGD, plain": SGD(lr=0.1, momentum=0.0, weight_decay=0.3, schedule=WARM),
    "SGD, Nesterov": SGD(lr=0.03, momentum=0.8, nesterov=True, weight_decay=0.3, clip=0.5, schedule=Linear()),
    "Lion": Lion(lr=0.01),
    "Lion, decay": Lion(lr=0.03, b1=0.5, b2=0.8, weight_decay=0.3, clip=None, schedule=WARM),
}
ORACLES = {AdamW: adamw, SGD: sgd, Lion: lion}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_are_their_formulas(name) -> None:
    optim = OPTIMISERS[name]
    p, gradients = random_problem(0)
    params = jnp.asarray(p, jnp.float32)
    state = optim.init(params, tree_of(p))
    update = jax.jit(lambda optim, g, state, params, step: optim.update(g, state, params, step, STEPS))
    for step, expected in enumerate(ORACLES[type(optim)](optim, p, gradients)):
        made = update(optim, tree_of(gradients[step]), state, params, jnp.int32(step))
        params, state = made.params, made.state
        assert np.abs(np.asarray(params) - expected).max() < 2e-6 * (step + 1)
        assert math.isclose(made.grad_norm, np.linalg.norm(gradients[step]), rel_tol=1e-5)  # before clipping


def test_decay_spares_what_is_no_matrix() -> None:
    p = np.ones(29)
    optim = AdamW(lr=0.1, weight_decay=0.5, decay="matrices")
    made = jax.jit(optim.update)(tree_of(0 * p), optim.init(jnp.ones(29), tree_of(p)), jnp.ones(29), jnp.int32(0), STEPS)
    assert np.allclose(made.params, np.where(IN_MATRIX, 1 - 0.05, 1))


def test_of_a_transformer_with_biases_the_weights_named_w_decay() -> None:
    """Biases of queries, keys and values have the axes [head, d_head], and are no matrices."""
    model = Transformer(layers=1, d_model=4, heads=2, bias=True, norm=LayerNorm(), position=Learned(), mlp=MLP())
    ones = jax.tree.map(lambda w: jnp.ones(w.shape), jax.eval_shape(lambda: model.init(jax.random.key(0), 5, 3)))
    optim = AdamW(lr=0.1, weight_decay=0.5, decay="matrices")
    made = optim.update(jax.tree.map(jnp.zeros_like, ones), optim.init(ravel(ones), ones), ravel(ones), jnp.int32(0), STEPS)
    decayed = {path_name(path): bool((w < 1).all()) for path, w in jax.tree_util.tree_leaves_with_path(unravel(made.params, ones))}
    assert decayed == {name: ".W_" in name for name in decayed} and {"blocks.0.attn.b_Q", "embed.W_E"} <= decayed.keys()


def test_gradients_below_the_threshold_are_not_clipped() -> None:
    p, gradients = random_problem(1)
    small = gradients[0] / np.linalg.norm(gradients[0]) * 0.999
    steps = []
    for clip in (None, 1.0, 0.5):
        optim = AdamW(lr=0.1, clip=clip, eps=1.0)
        start = jnp.asarray(p, jnp.float32)
        steps.append(np.asarray(optim.update(tree_of(small), optim.init(start, tree_of(p)), start, jnp.int32(0), STEPS).params))
    assert np.array_equal(steps[0], steps[1]) and not np.array_equal(steps[0], steps[2])


def test_vectors_and_trees_are_the_same_numbers() -> None:
    p, _ = random_problem(2)
    vector = ravel(tree_of(p))
    assert np.array_equal(vector, p.astype(np.float32))
    assert jax.tree.all(jax.tree.map(np.array_equal, unravel(vector, tree_of(p)), tree_of(p)))
    stacked = unravel(np.stack([p, 2 * p]), tree_of(p))
    assert stacked["heads"].shape == (2, 2, 3, 2) and np.array_equal(stacked["b"][1], 2 * p[12:17])


# ---- schedules

WARMUPS = {
    "none": {},
    "share": {"warmup": 0.1},
    "share from a start": {"warmup": 0.3, "start": 0.01},
    "steps": {"warmup_steps": 7, "start": 0.5},
}
SHAPED = {"constant": Constant(), "cosine": Cosine(end=0.1), "linear": Linear(end=0.25), "wsd": WSD(decay=0.3, end=0.05)}


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("shape", SHAPED)
def test_schedules_are_their_formulas(shape, warmup) -> None:
    schedule = dataclasses.replace(SHAPED[shape], **WARMUPS[warmup])
    factors = jax.jit(jax.vmap(lambda schedule, step, steps: schedule.factor(step, steps), (None, 0, None)))
    for steps in (1, 2, 9, 100, 61_595):
        at = np.clip([0, 1, 5, 6, 7, 8, steps // 10, steps // 2, steps - 2, steps - 1], 0, steps - 1)
        expected = [factor_of(schedule, int(s), steps) for s in at]
        assert np.abs(np.asarray(factors(schedule, jnp.asarray(at), jnp.int32(steps))) - expected).max() < 2e-6


def test_the_quiet_features_recipe() -> None:
    """A tenth of the run from 0.01 of the rate, then a cosine to 0.1 of it."""
    schedule, steps = Cosine(warmup=0.1, start=0.01, end=0.1), 1000
    factor = [float(schedule.factor(jnp.int32(s), steps)) for s in (0, 50, 100, 550, 999)]
    assert np.allclose(factor, [0.01, 0.505, 1.0, 0.55, 0.1 + 0.45 * (1 + math.cos(math.pi * 899 / 900))], atol=1e-5)
    assert abs(factor[-1] - 0.1) < 1e-5


def test_a_run_shorter_than_its_warm_up_is_all_ramp() -> None:
    schedule = Constant(warmup_steps=100)
    assert np.allclose([float(schedule.factor(jnp.int32(s), 10)) for s in (0, 5, 9)], [0, 0.05, 0.09])
