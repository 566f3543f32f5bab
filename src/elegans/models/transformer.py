"""The transformer: one file, one initialiser, TransformerLens names and head axes.

Sites, in the order in which `edit` sees them (i counts layers from 0):
  embed                          [position, d_model]   after token and position embedding
  ln1.i                          [position, d_model]   what attention reads
  q.i k.i v.i                    [position, head, d_head]
  scores.i pattern.i             [head, query, key]    before and after the softmax; no q, k and scores where the pattern is given
  z.i                            [position, head, d_head]
  attn_out.i, resid_mid.i        [position, d_model]
  ln2.i                          [position, d_model]   what the MLP reads
  mlp_post.i                     [position, d_mlp]     hidden activations
  mlp_out.i, resid.i             [position, d_model]
  normed, logits                 [position, d_model], [position, vocab]
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elegans.errors import Invalid
from elegans.models import fused, fused_attention, fused_attention_block, fused_mlp, fused_projections
from elegans.models.base import ONCE, Context, Dtype, FeedForward, Mixer, Model, Norm, Params, Sizes, traced_once
from elegans.models.norms import LayerNorm, RMSNorm
from elegans.models.positions import Learned, Positions, Rotary
from elegans.sources import classes, is_custom
from elegans.specs import field, spec, structure
from elegans.types import Edit, Trace, apply_edit, no_edit

ONE_HOT_VOCAB = 512  # up to here a one-hot product beats a gather, whose gradient is a scatter-add


# ---- attention


@spec
class Attention(Mixer):
    """Causal softmax attention with full heads."""

    scale: float = field(1.0, "factor on the scores, besides 1/sqrt(d_head)")

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        h, d, e = sizes.heads, sizes.d_model, sizes.d_head
        keys = jax.random.split(key, 4)
        made = {name: sizes.weight(k, h, d, e, fan_in=d) for name, k in zip(("W_Q", "W_K", "W_V"), keys, strict=False)}
        made["W_O"] = sizes.weight(keys[3], h, e, d, fan_in=h * e)
        return made | sizes.biases(b_Q=(h, e), b_K=(h, e), b_V=(h, e), b_O=(d,))

    def apply(self, params: Params, x: Float[Array, "position d_model"], context: Context) -> Float[Array, "position d_model"]:
        site, (h, _, e) = context.site, params["W_Q"].shape
        qkv = self._project(params, x, context)
        turn = context.positions.rotate if context.positions is not None else (lambda y: y)
        q, k, v = (y.reshape(-1, h, e) for y in jnp.split(qkv, 3, -1))
        q, k, v = site("q", turn(q)), site("k", turn(k)), site("v", v)
        scores = jnp.einsum("qhe,khe->hqk", q, k, preferred_element_type=jnp.float32)
        scores = scores * (self.scale / e**0.5)
        bias = None if context.positions is None else context.positions.bias(x.shape[0], h)
        scores = site("scores", scores if bias is None else scores + bias)
        causal = jnp.tri(x.shape[0], dtype=bool)
        pattern = site("pattern", jax.nn.softmax(jnp.where(causal, scores, jnp.finfo(scores.dtype).min)).astype(x.dtype))
        if context.fused and bias is None and fused_attention.knows(context.positions, qkv, e):
            angles = None if context.positions is None else context.positions.angles(x.shape[0], e)
            return _heads_out(params, fused_attention.attention(qkv, h, self.scale, angles, upto=context.upto).reshape(v.shape), context)
        return _heads_out(params, jnp.einsum("hqk,khe->qhe", pattern, v), context)

    def _project(self, params: Params, x: Float[Array, "position d_model"], context: Context) -> Float[Array, "position projected"]:
        """Queries | keys | values of all heads, in one product, which is one large kernel instead of three."""
        return _linear(x, *fused_projections.side_by_side(params), context)


def _heads_out(params: Params, z: Float[Array, "position head d_head"], context: Context) -> Float[Array, "position d_model"]:
    """What the heads write into the residual stream."""
    z, w = context.site("z", z), params["W_O"]
    return _linear(z.reshape(z.shape[0], -1), w.reshape(-1, w.shape[-1]), params.get("b_O"), context)


@spec
class GivenAttention(Mixer):
    """Heads whose patterns are given, not learned: values and outputs only, no queries, keys or scores.

    Subclass it with `pattern`. To replace a pattern of a trained network, edit its site `pattern.i` instead.
    """

    abstract: ClassVar[bool] = True
    products: ClassVar[int] = 1

    @abc.abstractmethod
    def pattern(self, tokens: Int[Array, " position"], heads: int) -> Float[Array, "head query key"]:
        """Where each head looks in a row: for every query, weights on keys up to itself that sum to 1."""

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        h, d, e = sizes.heads, sizes.d_model, sizes.d_head
        a, b = jax.random.split(key)
        made = {"W_V": sizes.weight(a, h, d, e, fan_in=d), "W_O": sizes.weight(b, h, e, d, fan_in=h * e)}
        return made | sizes.biases(b_V=(h, e), b_O=(d,))

    def apply(self, params: Params, x: Float[Array, "position d_model"], context: Context) -> Float[Array, "position d_model"]:
        h, d, e = params["W_V"].shape
        bias = params["b_V"].reshape(-1) if "b_V" in params else None
        v = context.site("v", _linear(x, params["W_V"].swapaxes(0, 1).reshape(d, h * e), bias, context).reshape(-1, h, e))
        pattern = context.site("pattern", self.pattern(context.tokens, h).astype(x.dtype))
        return _heads_out(params, jnp.einsum("hqk,khe->qhe", pattern, v), context)


@spec
class FixedAttention(GivenAttention):
    """Heads that look at the same places in every row.

    uniform: all up to itself, alike; self: itself; previous: the one before (the first one: itself); first: the first one.
    """

    maps: tuple[Literal["uniform", "self", "previous", "first"], ...] = field(("uniform",), "where each head looks; one: where all do")

    def pattern(self, tokens: Int[Array, " position"], heads: int) -> Float[Array, "head query key"]:
        n = tokens.shape[0]
        place = jnp.arange(n)
        keys = {"self": place, "previous": jnp.maximum(place - 1, 0), "first": jnp.zeros_like(place)}
        made = {name: jax.nn.one_hot(key, n) for name, key in keys.items()} | {"uniform": jnp.tri(n) / (place[:, None] + 1)}
        return jnp.broadcast_to(jnp.stack([made[name] for name in self.maps]), (heads, n, n))


# ---- MLP

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@spec
class MLP(FeedForward):
    """Two layers with an activation between them."""

    ratio: float = structure(4.0, "hidden width over d_model", gt=0, le=64)
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = field("gelu", "gelu is the exact one")

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        d, f = sizes.d_model, max(1, round(self.ratio * sizes.d_model))
        a, b = jax.random.split(key)
        made = {"W_in": sizes.weight(a, d, f, fan_in=d), "W_out": sizes.weight(b, f, d, fan_in=f)}
        return made | sizes.biases(b_in=(f,), b_out=(d,))

    def apply(self, params: Params, x: Float[Array, "position d_model"], context: Context) -> Float[Array, "position d_model"]:
        hidden = _linear(x, params["W_in"], params.get("b_in"), context)
        hidden = context.site("mlp_post", ACTIVATIONS[self.activation](hidden))
        return _linear(hidden, params["W_out"], params.get("b_out"), context)


@spec
class SwiGLU(FeedForward):
    """silu(x W_gate) * (x W_in) W_out (Shazeer 2020); without a ratio its width is 2*ceil(floor(8d/3)/2), Llama's."""

    kind: ClassVar[str] = "swiglu"
    ratio: float | None = structure(None, "hidden width over d_model; none: Llama's 8/3, rounded to even", gt=0, le=64)

    def init(self, key: jax.Array, sizes: Sizes) -> Params:
        d = sizes.d_model
        f = 2 * -(-(8 * d // 3) // 2) if self.ratio is None else max(1, round(self.ratio * d))
        keys = jax.random.split(key, 3)
        made = {name: sizes.weight(k, d, f, fan_in=d) for name, k in zip(("W_gate", "W_in"), keys, strict=False)}
        made["W_out"] = sizes.weight(keys[2], f, d, fan_in=f)
        return made | sizes.biases(b_gate=(f,), b_in=(f,), b_out=(d,))

    def apply(self, params: Params, x: Float[Array, "position d_model"], context: Context) -> Float[Array, "position d_model"]:
        both = jnp.concatenate([params["W_gate"], params["W_in"]], 1)  # one product instead of two
        bias = jnp.concatenate([params["b_gate"], params["b_in"]]) if "b_in" in params else None
        gate, value = jnp.split(_linear(x, both, bias, context), 2, -1)
        return _linear(context.site("mlp_post", jax.nn.silu(gate) * value), params["W_out"], params.get("b_out"), context)


def _unnormed(params: Params, x: Array, context: Context) -> Array:
    del params, context
    return x


def _linear(x: Float[Array, "position a"], w: Float[Array, "a b"], b: Array | None, context: Context) -> Float[Array, "position b"]:
    y = (fused.product if context.fused else jnp.matmul)(x, w.astype(x.dtype))
    return y if b is None else y + b.astype(x.dtype)


# ---- the model


@spec
class Transformer(Model):
    """A decoder-only, pre-norm transformer. Every part can be off (none) or replaced by a component of your own.

    FLOPs per token, forward and backward, for budgets (`flops_per_token`):
      kaplan   6 * (12 * layers * d_model^2 + layers * positions * d_model), embeddings excluded, whatever
               the MLP's width (Kaplan et al. 2020, with causal attention counted once)
      matmul   6 * every weight that multiplies an activation, plus 12 * positions * heads * d_head for every layer
               with attention, half of it where the pattern is given
    """

    layers: int = field(2, "blocks", ge=1, le=256)
    d_model: int = field(64, "width of the residual stream", ge=1, le=65_536)
    heads: int = field(4, "attention heads", ge=1, le=1024)
    d_head: int | None = field(None, "width of a head; none: d_model / heads", ge=1, le=8192)
    attention: Mixer | tuple[Mixer, ...] | None = field(Attention(), "the attention component, or one for each layer")
    mlp: FeedForward | None = field(SwiGLU(), "the MLP component")
    norm: Norm | None = field(RMSNorm(), "the normalisation before each component and at the end")
    position: Positions | None = field(Rotary(), "how positions are known; none: only through the causal mask")
    tied: bool = field(False, "unembed with the embedding's weights")
    bias: bool = field(False, "biases in every linear map and LayerNorm")
    skip: Literal["normed"] | None = field(None, "normed: attention adds to what it read, not to the stream before its norm")
    dropout: float | None = field(None, "share of the residual updates dropped in training", ge=0, lt=1)
    embed_dropout: float | None = field(None, "share of the embedding dropped in training; none: dropout's", ge=0, lt=1)
    init_std: float | None = field(None, "sd of every initial weight; none: as PyTorch draws them. Biases start at 0", ge=0)
    dtype: Literal["float32", "bfloat16", "tensorfloat32"] = field("float32", "compute type; master weights are float32")

    def check(self) -> None:
        if self.d_head is None and self.d_model % self.heads:
            raise Invalid("d_model", self.d_model, f"allowed: a multiple of heads={self.heads}, or give d_head")
        if isinstance(self.attention, tuple) and len(self.attention) != self.layers:
            raise Invalid("attention", f"{len(self.attention)} components", f"allowed: one, or one for each of layers={self.layers}")
        if self.skip and not (self.norm and self.attention):
            raise Invalid("skip", self.skip, "allowed with attention and a norm only: there is no other normalised skip path")
        if isinstance(self.position, Rotary) and self._d_head % 2:
            raise Invalid("d_head", self._d_head, "allowed with rotary positions: an even width")
        if isinstance(self.position, Learned) and (self.position.dims or 0) > self.d_model:
            raise Invalid("position.dims", self.position.dims, f"allowed: at most d_model={self.d_model}")
        for mixer in self._mixers:
            if isinstance(mixer, FixedAttention) and len(mixer.maps) not in (1, self.heads):
                raise Invalid("attention.maps", mixer.maps, f"allowed: one, or one for each of heads={self.heads}")

    @property
    def _d_head(self) -> int:
        return self.d_head or self.d_model // self.heads

    @property
    def _mixers(self) -> tuple[Mixer | None, ...]:
        """The attention component of every layer."""
        return self.attention if isinstance(self.attention, tuple) else (self.attention,) * self.layers

    def init(self, key: jax.Array, vocab: int, positions: int) -> Params:
        sizes = Sizes(vocab, positions, self.d_model, self.heads, self._d_head, self.bias, self.init_std)
        keys = jax.random.split(key, self.layers + 3)
        params: dict[str, Any] = {"embed": {"W_E": sizes.embedding(keys[0], vocab, self.d_model)}}
        params["pos_embed"] = self.position.init(keys[1], sizes) if self.position else {}
        params["blocks"] = self._init_blocks(keys[3:], sizes)
        params["ln_final"] = self.norm.init(jax.random.fold_in(keys[2], 1), sizes) if self.norm else {}
        unembed = {} if self.tied else {"W_U": sizes.weight(keys[2], self.d_model, vocab, fan_in=self.d_model)}
        return params | {"unembed": unembed}

    def _init_blocks(self, keys: jax.Array, sizes: Sizes) -> list[Params]:
        if isinstance(self.attention, tuple):
            return [self._init_block(k, sizes, mixer) for k, mixer in zip(keys, self.attention, strict=True)]
        mixer = self.attention
        together = jax.vmap(lambda k: self._init_block(k, sizes, mixer))(keys)  # one by one they compile `layers` times as long
        return [jax.tree.map(lambda a, i=i: a[i], together) for i in range(self.layers)]

    def _init_block(self, key: jax.Array, sizes: Sizes, mixer: Mixer | None) -> Params:
        parts = {"ln1": self.norm, "attn": mixer, "ln2": self.norm, "mlp": self.mlp}
        keys = jax.random.split(key, 4)
        return {name: part.init(k, sizes) if part else {} for (name, part), k in zip(parts.items(), keys, strict=True)}

    def logits(
        self, params: Params, tokens: Int[Array, " position"], upto: Int[Array, ""], *, key: jax.Array | None = None
    ) -> Float[Array, "position vocab"]:
        if any(map(is_custom, classes(self))):  # the user's own may look at any position
            return super().logits(params, tokens, upto, key=key)
        return self.apply(params, tokens, key=key, upto=upto)[0]

    def apply(
        self,
        params: Params,
        tokens: Int[Array, " position"],
        *,
        edit: Edit = no_edit,
        key: jax.Array | None = None,
        upto: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "position vocab"], Trace]:
        seen: dict[str, Any] = {}

        def site(name: str, x: Any) -> Any:
            seen[name] = x = apply_edit(edit, name, x)
            return x

        kernels = fused.serves(self.dtype, edit)
        exact = jax.default_matmul_precision("highest") if self.dtype == "float32" else contextlib.nullcontext()
        with exact:
            x = site("embed", self._embed(params, tokens, key))
            for i, (block, mixer) in enumerate(zip(params["blocks"], self._mixers, strict=True)):
                layer_key = None if key is None else jax.random.fold_in(key, i + 1)
                here = Context(tokens, lambda name, y, i=i: site(f"{name}.{i}", y), self.position, layer_key, self.dropout, kernels, upto)
                if ONCE.get() and edit is no_edit:
                    alone = dataclasses.replace(self, layers=1, attention=mixer)  # is alike in models of any depth
                    x = traced_once(type(self)._block, (alone, mixer, block, x), here)
                else:
                    x = self._block(mixer, block, x, here)
            x = site("normed", self.norm.apply(params["ln_final"], x, Context(tokens, site)) if self.norm else x)
            w = params["embed"]["W_E"].T if self.tied else params["unembed"]["W_U"]
            logits = site("logits", jnp.matmul(x, w.astype(x.dtype), preferred_element_type=jnp.float32))
        return logits, Trace(seen)

    def _embed(self, params: Params, tokens: Int[Array, " position"], key: jax.Array | None) -> Float[Array, "position d_model"]:
        w, dtype = params["embed"]["W_E"], Dtype[self.dtype]
        small = w.shape[0] <= ONE_HOT_VOCAB
        x = jax.nn.one_hot(tokens, w.shape[0], dtype=dtype) @ w.astype(dtype) if small else w[tokens].astype(dtype)
        x = self.position.embed(params["pos_embed"], x) if self.position else x
        dropout = self.dropout if self.embed_dropout is None else self.embed_dropout
        return Context(tokens, no_edit, key=key, dropout=dropout).drop(x, 0)

    def _block(
        self, mixer: Mixer | None, params: Params, x: Float[Array, "position d_model"], context: Context
    ) -> Float[Array, "position d_model"]:
        site = context.site
        norm = self.norm.apply if self.norm else _unnormed
        if mixer:
            read = site("ln1", norm(params["ln1"], x, context))
            through = self._attention_kernel(mixer, x, context)
            y = mixer.apply(params["attn"], read, dataclasses.replace(context, fused=context.fused and not through))
            y = (read if self.skip == "normed" else x) + context.drop(site("attn_out", y), 0)
            x = site("resid_mid", through((params["ln1"], params["attn"]), x) if through else y)
        if self.mlp:
            y = self.mlp.apply(params["mlp"], site("ln2", norm(params["ln2"], x, context)), context)
            y = x + context.drop(site("mlp_out", y), 1)
            formula = self._mlp_kernel(x, context)
            x = fused_mlp.block(formula, params["ln2"], params["mlp"], x, upto=context.upto) if formula else y
        return site("resid", x)

    def _formula(self, x: Array, context: Context, widest: int, activation: str = "") -> fused_mlp.Formula | None:
        """What a kernel of x + part(norm(x)) should compute, where it may and knows the norm: a subclass of one may do anything else."""
        norm, drops = self.norm, self.dropout is not None and context.key is not None
        fits = x.dtype == jnp.bfloat16 and x.shape[-1] <= widest
        if not (context.fused and fits and not drops and norm and type(norm) in (RMSNorm, LayerNorm)):
            return None
        return fused_mlp.Formula(type(norm) is LayerNorm, norm.eps, activation)

    def _mlp_kernel(self, x: Array, context: Context) -> fused_mlp.Formula | None:
        """The same for an MLP of the library's own."""
        if type(self.mlp) not in (MLP, SwiGLU):
            return None
        return self._formula(x, context, fused_mlp.WIDEST, self.mlp.activation if isinstance(self.mlp, MLP) else "swiglu")

    def _attention_kernel(self, mixer: Mixer, x: Array, context: Context) -> Callable[..., Array] | None:
        """The same for attention: the kernel, of weights and x."""
        formula, positions, e = self._formula(x, context, fused_projections.WIDEST), context.positions, self._d_head
        kernel = next((kernel for kernel in (fused_attention_block, fused_projections) if kernel.fits(*x.shape, e)), None)
        knows = type(mixer) is Attention and not self.skip
        bias = None if positions is None else positions.bias(x.shape[0], self.heads)
        if not (formula and kernel and knows and isinstance(mixer, Attention) and bias is None and fused_attention.knows(positions, x, e)):
            return None
        angles = None if positions is None else positions.angles(x.shape[0], e)
        return lambda weights, x: kernel.block(formula, weights, x, mixer.scale, angles, upto=context.upto)

    def probed_sites(self) -> dict[str, tuple[str, ...]]:
        per_layer = {
            "resid": True,
            "resid_mid": self.attention is not None,
            "attn_out": self.attention is not None,
            "mlp_out": self.mlp is not None,
        }
        layers = {f: tuple(f"{f}.{i}" for i in range(self.layers)) for f, present in per_layer.items() if present}
        heads = tuple(f"z.{i}.{h}" for i in range(self.layers) for h in range(self.heads)) if self.attention else ()
        return {"embed": ("embed",), **layers, **({"head": heads} if heads else {})}

    def flops_per_token(self, vocab: int, positions: float, convention: str) -> float:
        if convention == "kaplan":
            return 6 * self.layers * (12 * self.d_model**2 + positions * self.d_model)
        shapes = jax.eval_shape(lambda: self.init(jax.random.key(0), vocab, 1))
        weights = sum(
            w.size
            for name, w in jax.tree_util.tree_leaves_with_path((shapes["blocks"], shapes["unembed"]))
            if name[-1].key.startswith("W_")
        )
        weights += vocab * self.d_model if self.tied else 0
        products = sum(mixer.products for mixer in self._mixers if mixer)
        return 6 * weights + 6 * products * positions * self.heads * self._d_head
