"""A second implementation of the transformer, in float64 NumPy, written from the docstrings alone."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from elegans import MLP, ALiBi, FixedAttention, LayerNorm, Learned, Rotary, Sinusoidal, Transformer

VOCAB, POSITIONS = 7, 6
ROW = np.array([3, 0, 6, 6, 1, 4], np.int32)
TOKENS = jnp.asarray(ROW)


def some_params(model: Transformer, seed: int = 0):
    """Parameters that are all away from zero and one, biases and norm weights included."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), VOCAB, POSITIONS))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.asarray(0.5 * rng.standard_normal(w.shape) + 0.5 * (w.ndim == 1), w.dtype), shapes)


@functools.cache
def forward(model: Transformer):
    """The compiled forward pass: params, tokens -> logits, trace."""
    return jax.jit(lambda params, tokens: model.apply(params, tokens))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def normalise(model: Transformer, p: dict, x: np.ndarray) -> np.ndarray:
    if model.norm is None:
        return x
    if isinstance(model.norm, LayerNorm):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.norm.eps) * p["w"]
        return y + p["b"] if model.bias else y
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + model.norm.eps) * p["w"]


def turn(x: np.ndarray, theta: float) -> np.ndarray:
    """Coordinate j < e/2 and its partner j + e/2 turn together by position * theta^(-2j/e)."""
    out, e = x.copy(), x.shape[-1]
    for t in range(x.shape[0]):
        for j in range(e // 2):
            angle = t * theta ** (-2 * j / e)
            a, b = x[t, :, j], x[t, :, j + e // 2]
            out[t, :, j] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, j + e // 2] = a * math.sin(angle) + b * math.cos(angle)
    return out


def waves(t: int, d: int, theta: float) -> list[float]:
    """Vaswani's vector of position t."""
    angles = [t / theta ** (2 * (j // 2) / d) for j in range(d)]
    return [math.cos(a) if j % 2 else math.sin(a) for j, a in enumerate(angles)]


def given(name: str, i: int) -> np.ndarray:
    """Where query i looks, among the keys up to itself."""
    return {
        "uniform": np.full(i + 1, 1 / (i + 1)),
        "self": np.eye(i + 1)[i],
        "previous": np.eye(i + 1)[max(i - 1, 0)],
        "first": np.eye(i + 1)[0],
    }[name]


def attend(model: Transformer, layer: int, p: dict, x: np.ndarray) -> np.ndarray:
    mixer = model.attention[layer] if isinstance(model.attention, tuple) else model.attention
    out = np.zeros((len(x), model.d_model)) + p.get("b_O", 0)
    for h in range(model.heads):
        if isinstance(mixer, FixedAttention):
            v = x @ p["W_V"][h] + (p["b_V"][h] if model.bias else 0)
            name = mixer.maps[h] if len(mixer.maps) > 1 else mixer.maps[0]
            for i in range(len(x)):
                out[i] += (given(name, i) @ v[: i + 1]) @ p["W_O"][h]
            continue
        q, k, v = (x @ p[f"W_{n}"][h] + (p[f"b_{n}"][h] if model.bias else 0) for n in "QKV")
        if isinstance(model.position, Rotary):
            q, k = (turn(y[:, None], model.position.theta)[:, 0] for y in (q, k))
        for i in range(len(x)):
            scores = mixer.scale * (k[: i + 1] @ q[i]) / math.sqrt(q.shape[-1])
            if isinstance(model.position, ALiBi):
                scores -= 2 ** (-model.position.span * (h + 1) / model.heads) * (i - np.arange(i + 1))
            out[i] += (softmax(scores) @ v[: i + 1]) @ p["W_O"][h]
    return out


def feed(model: Transformer, p: dict, x: np.ndarray) -> np.ndarray:
    if not isinstance(model.mlp, MLP):
        gate, value = x @ p["W_gate"], x @ p["W_in"]
        return (gate / (1 + np.exp(-gate)) * value) @ p["W_out"]
    hidden = x @ p["W_in"] + p.get("b_in", 0)
    gelu = np.vectorize(lambda u: 0.5 * u * (1 + math.erf(u / math.sqrt(2))))
    hidden = gelu(hidden) if model.mlp.activation == "gelu" else np.maximum(hidden, 0)
    return hidden @ p["W_out"] + p.get("b_out", 0)


def oracle(model: Transformer, params, tokens: np.ndarray) -> np.ndarray:
    """Logits of one row."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    x = p["embed"]["W_E"][tokens]
    if isinstance(model.position, Learned):
        x[:, : model.position.dims] += p["pos_embed"]["W_pos"][: len(tokens)]
    if isinstance(model.position, Sinusoidal):
        x = x + np.array([waves(t, model.d_model, model.position.theta) for t in range(len(tokens))])
    for i, block in enumerate(p["blocks"]):
        read = normalise(model, block["ln1"], x)
        x = (read if model.skip == "normed" else x) + attend(model, i, block["attn"], read)
        x = x + feed(model, block["mlp"], normalise(model, block["ln2"], x))
    x = normalise(model, p["ln_final"], x)
    return x @ (p["embed"]["W_E"].T if model.tied else p["unembed"]["W_U"])
