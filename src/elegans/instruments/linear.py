"""Linear readers: logistic and least-squares regression, each written for one probe and run for all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

NEWTON_STEPS = 40  # at most; classes that a plane divides need about 25, others under 10
ENOUGH = 1e-6  # a step that promises to lower the objective by less than this part of it is the last
HALVINGS = (1.0, 0.5, 0.25, 0.0625, 0.0)  # step lengths tried by the line search
REFINEMENTS = 3  # of a least-squares solution: the factor is damped, the residual is not
DAMPING = (5e-7, 5e-5)  # of the whole curvature: a few roundings of float32; more where deficient rank leaves no factor with that


class Probes(NamedTuple):
    """Fitted probes: score = x @ w + b."""

    w: Float[Array, "*probe d_model"]
    b: Float[Array, "*probe"]
    loss: Float[Array, "*probe"]  # on what it was fitted to: mean log loss in nats, or mean squared error


def fit_logistic(x: Float[Array, "n d"], y: Float[Array, " n"], counted: Float[Array, " n"], c: Any) -> Probes:
    """Logistic regression with an L2 penalty, the problem of scikit-learn's `LogisticRegression(C=c)`.

    Minimises w.w/2 + c * sum of log(1 + exp(-(2y - 1)(x.w + b))) over the counted examples by Newton's
    method with a line search; the intercept is not penalised.
    """
    mean = mean_of(x, counted)
    design = jnp.concatenate([x - mean, jnp.ones((x.shape[0], 1), x.dtype)], 1)
    penalty = jnp.append(jnp.ones(x.shape[1]), 1e-6) / c

    def losses(beta: Float[Array, " d1"], score: Float[Array, " n"]) -> Float[Array, ""]:
        return (counted * (jax.nn.softplus(score) - y * score)).sum() + 0.5 * (penalty * beta * beta).sum()

    def newton(now: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
        count, beta, score, _ = now
        p = jax.nn.sigmoid(score)
        gradient = design.T @ (counted * (p - y)) + penalty * beta
        curvature = counted * jnp.maximum(p * (1 - p), 1e-6)
        direction = _solver((design * curvature[:, None]).T @ design, penalty)(gradient)
        along = design @ direction
        values = jnp.stack([losses(beta - s * direction, score - s * along) for s in HALVINGS])
        step = jnp.asarray(HALVINGS)[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))]
        moved = jnp.where(step > 0, beta - step * direction, beta), jnp.where(step > 0, score - step * along, score)
        more = (step > 0) & (gradient @ direction / 2 > ENOUGH * values[-1])
        return count + 1, moved[0], moved[1], more

    with jax.default_matmul_precision("highest"):
        start = jnp.int32(0), jnp.zeros(design.shape[1]), jnp.zeros(design.shape[0]), jnp.bool_(True)
        beta = jax.lax.while_loop(lambda now: now[3] & (now[0] < NEWTON_STEPS), newton, start)[1]
        score = design @ beta
        b = beta[-1] - mean @ beta[:-1]
    nats = (counted * (jax.nn.softplus(score) - y * score)).sum() / jnp.maximum(counted.sum(), 1)
    return Probes(beta[:-1], b, nats)


def fit_squares(x: Float[Array, "n d"], y: Float[Array, " n"], counted: Float[Array, " n"], c: Any) -> Probes:
    """Least squares with an L2 penalty, the problem of scikit-learn's `Ridge(alpha=1 / c)`.

    Minimises w.w/2 + c/2 * sum of (y - x.w - b)^2 over the counted examples; the intercept is not penalised.
    """
    mean, middle = mean_of(x, counted), mean_of(y, counted)
    design, target = (x - mean) * counted[:, None], (y - middle) * counted
    with jax.default_matmul_precision("highest"):
        solve = _solver(design.T @ design, jnp.full(x.shape[1], 1.0) / c)
        w = jnp.zeros(x.shape[1])
        for _ in range(REFINEMENTS):
            w = w + solve(design.T @ (target - design @ w) - w / c)
        error = target - design @ w
        b = middle - mean @ w
    return Probes(w, b, (error * error).sum() / jnp.maximum(counted.sum(), 1))


def mean_of(x: Float[Array, "n *d"], counted: Float[Array, " n"]) -> Float[Array, "*d"]:
    """Mean over the counted examples; 0 where there are none."""
    weight = counted / jnp.maximum(counted.sum(), 1)
    return jnp.tensordot(weight, x, 1, precision="highest")


def _solver(gram: Float[Array, "d d"], penalty: Float[Array, " d"]) -> Any:
    """The solution of (gram + penalty) v = g, slightly damped, as a function of g."""
    factor, steepest = one_by_one(_factored)(gram, penalty)
    return lambda g: one_by_one(_solved)(factor, steepest, g)


def _factored(gram: Float[Array, "d d"], penalty: Float[Array, " d"]) -> tuple[Float[Array, "d d"], Float[Array, ""]]:
    """The factor of the damped sum, NaN should rounding leave none; and a bound of its largest eigenvalue."""
    whole = jnp.trace(gram)
    little, more = (jnp.linalg.cholesky(gram + jnp.diag(penalty + damping * whole)) for damping in DAMPING)
    return jnp.where(jnp.isfinite(little).all(), little, more), whole + penalty.max()


def _solved(factor: Float[Array, "d d"], steepest: Float[Array, ""], g: Float[Array, " d"]) -> Float[Array, " d"]:
    """The solution; without a factor a step of steepest descent, no longer than the steepest curvature allows."""
    v = jax.scipy.linalg.cho_solve((factor, True), g)
    return jnp.where(jnp.isfinite(v).all(), v, g / steepest)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of LAPACK, which `vmap` on a CPU calls for one matrix after the other.

    A batch of them jaxlib 0.10 hands to the pool of threads in which it then waits for them: with as many such calls under way as
    there are threads nobody is left to answer, and the program stands still for good.
    """

    def plain(*args: Any) -> Any:  # with no options, which `sequential_vmap` would hand on as arrays
        return function(*args)

    return lambda *args: jax.lax.platform_dependent(*args, cpu=jax.custom_batching.sequential_vmap(plain), default=plain)
