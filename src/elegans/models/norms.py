"""Normalisations, as components."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elegans.models.base import Context, Norm, Params, Sizes
from elegans.specs import spec


@spec
class RMSNorm(Norm):
    """x / rms(x) * w (Zhang and Sennrich 2019)."""

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        del key
        return {"w": jnp.ones(sizes.d_model)}

    def apply(self, params: Params, x: Float[Array, "position d_model"], context: Context) -> Float[Array, "position d_model"]:
        del context
        f = x.astype(jnp.float32)
        return (f * jax.lax.rsqrt((f * f).mean(-1, keepdims=True) + self.eps) * params["w"]).astype(x.dtype)


@spec
class LayerNorm(Norm):
    """(x - mean) / sd * w + b (Ba, Kiros and Hinton 2016); b where the model has biases."""

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        del key
        return {"w": jnp.ones(sizes.d_model), **sizes.biases(b=(sizes.d_model,))}

    def apply(self, params: Params, x: Float[Array, "position d_model"], context: Context) -> Float[Array, "position d_model"]:
        del context
        f = x.astype(jnp.float32)
        f = f - f.mean(-1, keepdims=True)
        f = f * jax.lax.rsqrt((f * f).mean(-1, keepdims=True) + self.eps) * params["w"]
        return (f + params["b"] if "b" in params else f).astype(x.dtype)
