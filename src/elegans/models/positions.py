"""How a model knows where a token stands: added to embeddings, turned into queries and keys, or put on the scores."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from elegans.models.base import Params, Sizes
from elegans.specs import Spec, field, spec, structure


@spec
class Positions(Spec):
    """How the model knows where a token stands; the defaults know nothing."""

    abstract: ClassVar[bool] = True

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        """Parameters of the position embedding, if it has any."""
        del key, sizes
        return {}

    def embed(self, params: Params, x: Float[Array, "position d_model"]) -> Float[Array, "position d_model"]:
        """Add positions to token embeddings."""
        del params
        return x

    def angles(self, length: int, d_head: int) -> Float[np.ndarray, "position pair"] | None:
        """How far `rotate` turns each pair of coordinates at a position, in radians; none: not at all."""
        del length, d_head
        return None

    def rotate(self, x: Float[Array, "position head d_head"]) -> Float[Array, "position head d_head"]:
        """Turn queries and keys, by `angles` in the half-split layout of Llama."""
        t, _, e = x.shape
        if (angles := self.angles(t, e)) is None:
            return x
        cos, sin = (jnp.asarray(f(angles), x.dtype)[:, None] for f in (np.cos, np.sin))
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def bias(self, length: int, heads: int) -> Float[Array, "head query key"] | None:
        """What is added to the scaled scores of a row; none: nothing. Keys after their query are masked anyway."""
        del length, heads
        return None


@spec
class Rotary(Positions):
    """Queries and keys turned by position (Su et al. 2021), in the half-split layout of Llama."""

    theta: float = structure(10_000.0, "base of the wavelengths", gt=0)

    def angles(self, length: int, d_head: int) -> Float[np.ndarray, "position pair"]:
        return np.outer(np.arange(length), self.theta ** (-np.arange(0, d_head, 2) / d_head))


@spec
class Learned(Positions):
    """A learned vector for every position."""

    dims: int | None = field(None, "how many coordinates know of it, the first ones; none: all", ge=1)
    std: float | None = field(None, "sd of the initial vectors; none: that of the token embedding", ge=0)

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        sizes = sizes if self.std is None else dataclasses.replace(sizes, std=self.std)
        return {"W_pos": sizes.embedding(key, sizes.positions, self.dims or sizes.d_model)}

    def embed(self, params: Params, x: Float[Array, "position d_model"]) -> Float[Array, "position d_model"]:
        known = params["W_pos"][: x.shape[0]].astype(x.dtype)
        return x + (known if self.dims is None else jnp.pad(known, ((0, 0), (0, x.shape[1] - self.dims))))


@spec
class Sinusoidal(Positions):
    """sin(t / theta^(2i/d)) on coordinate 2i, its cosine on 2i + 1, nothing learned (Vaswani et al. 2017).

    Of amplitude 1, as published, where tokens are embedded with sd 1: the default here too.
    """

    theta: float = structure(10_000.0, "base of the wavelengths", gt=0)

    def embed(self, params: Params, x: Float[Array, "position d_model"]) -> Float[Array, "position d_model"]:
        del params
        t, d = x.shape
        angles = np.outer(np.arange(t), self.theta ** (-np.arange(0, d, 2) / d))
        waves = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(t, -1)[:, :d]  # d may be odd
        return x + jnp.asarray(waves, x.dtype)


@spec
class ALiBi(Positions):
    """Scores less slope * distance (Press, Smith and Lewis 2022): head h of H, from 1, has the slope 2^(-span h / H).

    Their paper's formula, for any number of heads; their code interleaves two such sequences where H is no power of 2.
    """

    kind: ClassVar[str] = "alibi"
    span: float = field(8.0, "the last head's slope is 2^-span; with few heads, smaller ones look less far", gt=0)

    def bias(self, length: int, heads: int) -> Float[Array, "head query key"] | None:
        place = jnp.arange(length, dtype=jnp.float32)
        slopes = 2.0 ** (-self.span * jnp.arange(1, heads + 1) / heads)
        return -slopes[:, None, None] * (place[:, None] - place)
