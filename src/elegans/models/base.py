"""What a model is, and what its components share."""

from __future__ import annotations

import abc
import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elegans.specs import Spec, spec, structure
from elegans.types import Edit, Trace, no_edit

Params = Any
Dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "tensorfloat32": jnp.float32}


@spec
class Model(Spec):
    """A language model for one sequence: `init` makes its parameters, `apply` runs it."""

    abstract: ClassVar[bool] = True

    @abc.abstractmethod
    def init(self, key: jax.Array, vocab: int, positions: int) -> Params:
        """Parameters for a vocabulary and rows of at most `positions` tokens."""

    @abc.abstractmethod
    def apply(
        self, params: Params, tokens: Int[Array, " position"], *, edit: Edit = no_edit, key: jax.Array | None = None
    ) -> tuple[Float[Array, "position vocab"], Trace]:
        """Logits after each token, and the trace of everything on the way.

        `edit(site, x)` sees every site in order and returns what replaces it. `key` switches dropout on.
        Parts of the trace that nobody reads cost nothing once compiled.
        """

    def logits(
        self, params: Params, tokens: Int[Array, " position"], upto: Int[Array, ""], *, key: jax.Array | None = None
    ) -> Float[Array, "position vocab"]:
        """Logits after each of the first `upto` tokens as `apply` gives them, and anything finite after the others, which nobody reads."""
        del upto
        return self.apply(params, tokens, key=key)[0]

    def probed_sites(self) -> dict[str, tuple[str, ...]]:
        """Sites of one vector per position, by family: `{"resid": ("resid.0", ...), ...}`."""
        return {}

    def flops_per_token(self, vocab: int, positions: float, convention: str) -> float:
        """Training FLOPs (forward and backward) per token, by a named convention. See `Transformer`."""
        raise NotImplementedError(f"{type(self).__name__} does not count its FLOPs: set steps, examples or epochs")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a component needs to know to make its parameters."""

    vocab: int
    positions: int
    d_model: int
    heads: int
    d_head: int
    bias: bool
    std: Any  # standard deviation of every weight matrix; None: PyTorch's default for its layer type

    def weight(self, key: jax.Array, *shape: int, fan_in: int) -> Float[Array, "..."]:
        """A weight matrix: N(0, std), or U(-1/sqrt(fan_in), 1/sqrt(fan_in)) as `torch.nn.Linear` draws it."""
        if self.std is None:
            bound = fan_in**-0.5
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        return self.std * jax.random.normal(key, shape)

    def embedding(self, key: jax.Array, *shape: int) -> Float[Array, "..."]:
        """An embedding table: N(0, std), or N(0, 1) as `torch.nn.Embedding` draws it."""
        return (1.0 if self.std is None else self.std) * jax.random.normal(key, shape)

    def biases(self, **shapes: tuple[int, ...]) -> dict[str, Array]:
        """Zero biases, or none where the model has none."""
        return {name: jnp.zeros(shape) for name, shape in shapes.items()} if self.bias else {}


@dataclasses.dataclass(frozen=True)
class Context:
    """What a component may look at besides its input: the row's tokens, and where it stands in the model."""

    tokens: Int[Array, " position"]
    site: Edit  # site(name, x): offers x to the edit and to the trace, and returns what to go on with
    positions: Any = None  # the model's Positions component, or None
    key: jax.Array | None = None  # dropout is on where there is a key
    dropout: Any = None
    fused: bool = False  # kernels may stand in for formulas, and skip their sites: see models/fused.py
    upto: Int[Array, ""] | None = None  # the first positions, so many, are all that anybody reads; none: all are

    def drop(self, x: Array, purpose: int) -> Array:
        """Dropout of x, where it is on; `purpose` tells the uses of one layer apart."""
        if self.dropout is None or self.key is None:
            return x
        kept = jax.random.bernoulli(jax.random.fold_in(self.key, purpose), 1 - self.dropout, x.shape)
        return jnp.where(kept, x / jnp.asarray(1 - self.dropout, x.dtype), 0)


# ---- tracing parts that are alike once

ONCE: contextvars.ContextVar[bool] = contextvars.ContextVar("once", default=False)  # see `once`


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Within it layers that are alike are traced once, for whatever only measures a trace, and for a device's programs.

    An H100's had the same bits either way, and a model of 16 layers was ready for the compiler in 1.2 s instead of 9.7; a CPU's round
    otherwise.
    """
    token = ONCE.set(True)
    try:
        yield
    finally:
        ONCE.reset(token)


def traced_once(part: Callable[..., Array], given: tuple[Any, ...], context: Context) -> Array:
    """`part(*given, context)`. JAX keeps the trace, and its gradient's and batch's, for the next call with the same shapes."""
    moving = context.tokens, context.positions, context.key, context.dropout, context.upto
    y, seen = _traced(part, given, moving, context.fused)
    for name, value in seen.items():
        context.site(name, value)
    return y


@functools.partial(jax.jit, static_argnums=(0, 3))
def _traced(part: Callable[..., Array], given: tuple[Any, ...], moving: tuple[Any, ...], fused: bool) -> tuple[Array, dict[str, Array]]:
    tokens, positions, key, dropout, upto = moving
    seen: dict[str, Array] = {}
    y = part(*given, Context(tokens, lambda name, value: seen.setdefault(name, value), positions, key, dropout, fused, upto))
    return y, seen


@spec
class Component(Spec):
    """A part of a model, which is its own spec: `init(key, sizes) -> params`, `apply(params, x, context) -> y`.

    To change an architecture, subclass one component in your own file, decorate it with `@el.spec`,
    override `apply`, and pass it in. A new float field can be swept inside a cohort at once.
    A component has a role, which says where it fits: `Mixer`, `FeedForward` or `Norm`.
    """

    abstract: ClassVar[bool] = True

    @abc.abstractmethod
    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        """This component's parameters."""

    @abc.abstractmethod
    def apply(self, params: Params, x: Float[Array, "position d_model"], context: Context) -> Float[Array, "position d_model"]:
        """One sequence through this component. The other rows of the batch are on the axis named "batch"."""


@spec
class Mixer(Component):
    """A component that moves values between positions: what stands where attention does."""

    abstract: ClassVar[bool] = True
    products: ClassVar[int] = 2  # of [query, key] matrices, which count as FLOPs: the scores; the pattern and the values


@spec
class FeedForward(Component):
    """A component that sees each position by itself: what stands where the MLP does."""

    abstract: ClassVar[bool] = True


@spec
class Norm(Component):
    """Normalisation of each position's vector."""

    abstract: ClassVar[bool] = True
    eps: float = structure(1e-5, "added to the variance", gt=0)
