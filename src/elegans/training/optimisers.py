"""Optimisers and schedules, as specs. Schedules are plain functions of (step, steps): both may be traced."""

from __future__ import annotations

import abc
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from elegans.errors import Invalid
from elegans.specs import Spec, field, spec, varies
from elegans.training.vectors import path_name, ravel
from elegans.types import AnyArray

Scalar = Any  # a number, or a traced one


@spec
class Schedule(Spec):
    """The learning rate's factor over a run: a linear warm-up from `start` to 1, then `shape` of the rest.

    With W warm-up steps, step s < W has the factor start + (1 - start) * s / W; a later one
    shape((s - W) / (steps - W)).
    """

    abstract: ClassVar[bool] = True
    warmup: float = field(0.0, "share of the run that warms up", ge=0, lt=1)
    warmup_steps: int | None = varies(None, "warm-up in steps instead", ge=0)
    start: float = field(0.0, "factor at step 0 where there is a warm-up", ge=0, le=1)

    def check(self) -> None:
        if self.warmup_steps is not None and self.warmup > 0:
            raise Invalid("warmup_steps", self.warmup_steps, "allowed: warmup or warmup_steps, not both")

    def factor(self, step: Int[Array, ""], steps: Scalar) -> Float[Array, ""]:
        """The factor on the learning rate at a step (from 0) of a run of `steps`."""
        steps = jnp.asarray(steps, jnp.float32)
        warm = jnp.asarray(self.warmup * steps if self.warmup_steps is None else self.warmup_steps, jnp.float32)
        step = jnp.asarray(step, jnp.float32)
        ramp = self.start + (1 - self.start) * step / jnp.maximum(warm, 1)
        rest = self.shape(jnp.clip((step - warm) / jnp.maximum(steps - warm, 1), 0, 1))
        return jnp.where(step < warm, ramp, rest)

    @abc.abstractmethod
    def shape(self, t: Float[Array, ""]) -> Float[Array, ""]:
        """The factor after warm-up, t from 0 to 1."""


@spec
class Constant(Schedule):
    """Warm-up, then constant."""

    def shape(self, t: Float[Array, ""]) -> Float[Array, ""]:
        return jnp.ones_like(t)


@spec
class Cosine(Schedule):
    """Half a cosine from 1 to `end` (Loshchilov and Hutter 2017, without restarts)."""

    end: float = field(0.1, "factor at the end", ge=0, le=1)

    def shape(self, t: Float[Array, ""]) -> Float[Array, ""]:
        return self.end + (1 - self.end) * 0.5 * (1 + jnp.cos(jnp.pi * t))


@spec
class Linear(Schedule):
    """A straight line from 1 to `end`."""

    end: float = field(0.0, "factor at the end", ge=0, le=1)

    def shape(self, t: Float[Array, ""]) -> Float[Array, ""]:
        return 1 + (self.end - 1) * t


@spec
class WSD(Schedule):
    """Warm-up, stable, then a linear decay to `end` over the last `decay` of what follows the warm-up."""

    kind: ClassVar[str] = "wsd"
    decay: float = field(0.2, "share of the steps after warm-up that decay", gt=0, le=1)
    end: float = field(0.0, "factor at the end", ge=0, le=1)

    def shape(self, t: Float[Array, ""]) -> Float[Array, ""]:
        return 1 + (self.end - 1) * jnp.clip((t - (1 - self.decay)) / self.decay, 0, 1)


class Updated(NamedTuple):
    """What one optimiser update made."""

    params: Float[AnyArray, " parameter"]
    state: Any
    grad_norm: Float[Array, ""]  # before clipping


@spec
class Optimizer(Spec):
    """How gradients change parameters. Subclass it with `transform`, an optax gradient transformation.

    The transformation sees all parameters as one vector: one update kernel and one norm instead of
    one for every matrix, which matters where a model is small.
    """

    abstract: ClassVar[bool] = True
    lr: float = field(1e-3, "peak learning rate", gt=0)
    clip: float | None = field(1.0, "largest global gradient norm; none: no clipping", gt=0)
    schedule: Schedule = field(Constant(), "the learning rate's factor over the run")

    @abc.abstractmethod
    def transform(self, lr: Scalar, matrices: Bool[np.ndarray, " parameter"]) -> optax.GradientTransformation:
        """The update rule at a learning rate; `matrices` marks the parameters of matrices: arrays of two axes or more but biases."""

    def _transform(self, lr: Scalar, like: Any) -> optax.GradientTransformation:
        named = [(path_name(path).split(".")[-1], w) for path, w in jax.tree_util.tree_leaves_with_path(like)]
        matrices = np.concatenate([np.full(w.size, w.ndim > 1 and not name.startswith("b_")) for name, w in named])  # b_Q: [head, d_head]
        rule = self.transform(lr, matrices)
        return rule if self.clip is None else optax.chain(optax.clip_by_global_norm(self.clip), rule)

    def init(self, params: Float[AnyArray, " parameter"], like: Any) -> Any:
        """The optimiser's state for a vector of parameters; `like` is their tree (arrays or shapes)."""
        return self._transform(self.lr, like).init(params)

    def update(self, grads: Any, state: Any, params: Float[AnyArray, " parameter"], step: Int[Array, ""], steps: Scalar) -> Updated:
        """One update of the vector at a step (from 0) of a run of `steps`; gradients come as a tree."""
        gradient = ravel(grads)
        rule = self._transform(self.lr * self.schedule.factor(step, steps), grads)
        change, state = rule.update(gradient, state, params)
        return Updated(params + change, state, jnp.sqrt(jnp.sum(gradient * gradient)))


@spec
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019); p <- p - lr * (m / (sqrt(v) + eps) + decay * p)."""

    kind: ClassVar[str] = "adamw"
    weight_decay: float = field(0.1, "decoupled weight decay, per unit of learning rate", ge=0)
    b1: float = field(0.9, "decay of the gradient's mean", ge=0, lt=1)
    b2: float = field(0.95, "decay of the gradient's second moment", ge=0, lt=1)
    eps: float = field(1e-8, "added to the root of the second moment", gt=0)
    decay: Literal["all", "matrices"] = field("all", "which parameters decay; matrices: no biases, no norms")

    def transform(self, lr: Scalar, matrices: Bool[np.ndarray, " parameter"]) -> optax.GradientTransformation:
        decaying = None if self.decay == "all" else matrices
        return optax.chain(optax.scale_by_adam(self.b1, self.b2, self.eps), _descend(lr, self.weight_decay, decaying))


@spec
class SGD(Optimizer):
    """Stochastic gradient descent with momentum and decoupled weight decay: v <- b v + g; p <- p - lr * (v + decay * p).

    Nesterov's (Sutskever et al. 2013, as `torch.optim.SGD` has it) steps by g + b v, with the new v, instead of v.
    """

    kind: ClassVar[str] = "sgd"
    momentum: float = field(0.9, "b, decay of the sum of gradients; 0: none", ge=0, lt=1)
    nesterov: bool = field(False, "Nesterov's momentum")
    weight_decay: float = field(0.0, "decoupled weight decay, per unit of learning rate", ge=0)

    def transform(self, lr: Scalar, matrices: Bool[np.ndarray, " parameter"]) -> optax.GradientTransformation:
        del matrices
        return optax.chain(optax.trace(self.momentum, self.nesterov), _descend(lr, self.weight_decay))


@spec
class Lion(Optimizer):
    """Lion (Chen et al. 2023): p <- p - lr * (sign(b1 m + (1 - b1) g) + decay * p); m <- b2 m + (1 - b2) g."""

    weight_decay: float = field(0.0, "decoupled weight decay, per unit of learning rate", ge=0)
    b1: float = field(0.9, "the momentum's share of the step", ge=0, lt=1)
    b2: float = field(0.99, "decay of the momentum", ge=0, lt=1)

    def transform(self, lr: Scalar, matrices: Bool[np.ndarray, " parameter"]) -> optax.GradientTransformation:
        del matrices
        return optax.chain(optax.scale_by_lion(self.b1, self.b2), _descend(lr, self.weight_decay))


def _descend(lr: Scalar, weight_decay: Scalar, decaying: Bool[np.ndarray, " parameter"] | None = None) -> optax.GradientTransformation:
    """A step down along an update, and weight decay beside it: of the parameters that decay; none: of all."""

    def step(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return -lr * (updates + weight_decay * (params if decaying is None else jnp.where(decaying, params, 0))), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), step)
