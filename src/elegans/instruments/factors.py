"""What a head's weights say by themselves, what a network computes of states and inputs, and parts moved between networks.

QK and OV circuits are those of Elhage et al. 2021, "A mathematical framework for transformer circuits".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from elegans.errors import Invalid
from elegans.instruments.patterns import heads_of, iteration
from elegans.models import Attention, LayerNorm, Learned, Transformer
from elegans.models.base import Context
from elegans.network import Network
from elegans.training.step import logits_of
from elegans.types import no_edit

Side = Literal["token", "position"]


class Factor(NamedTuple):
    """A table with names for its rows and columns."""

    values: Float[np.ndarray, "row column"]
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def qk(network: Network, layer: int, head: int, queries: Side = "token", keys: Side = "token") -> Factor:
    """The attention score (before the softmax) of every query for every key, were the residual stream their embedding alone.

    Each side is the tokens' embeddings or the positions', normalised and with biases as the head reads them; rotary
    positions do not turn them (a distance of 0). Raises `Invalid`.
    """
    attn, read = _head(network, layer, head)
    (x, rows), (y, columns) = (_side(network, side) for side in (queries, keys))
    q, k = (read(v) @ attn[f"W_{n}"][head] + (attn[f"b_{n}"][head] if f"b_{n}" in attn else 0) for n, v in (("Q", x), ("K", y)))
    model: Any = network.model
    return Factor(q @ k.T * (model.attention.scale / q.shape[-1] ** 0.5), rows, columns)


def ov(network: Network, layer: int, head: int, keys: Side = "token") -> Factor:
    """What attending fully to a key adds to every token's logit on the direct path, were the stream there its embedding alone.

    Biases, the same whatever is attended to, are left out; of the last normalisation only its centring and its weight are kept,
    not its division by the length of the stream. Raises `Invalid`.
    """
    attn, read = _head(network, layer, head)
    x, rows = _side(network, keys)
    params = jax.tree.map(np.asarray, network.params)
    model: Any = network.model
    out = read(x) @ attn["W_V"][head] @ attn["W_O"][head]
    if isinstance(model.norm, LayerNorm):
        out = out - out.mean(-1, keepdims=True)
    out = out * params["ln_final"].get("w", 1.0)
    w = params["embed"]["W_E"].T if model.tied else params["unembed"]["W_U"]
    return Factor(out @ np.asarray(w), rows, network.task.symbols)


def _head(network: Network, layer: int, head: int) -> tuple[dict[str, np.ndarray], Callable[[Array], np.ndarray]]:
    """A layer's attention weights, and what its heads read of a stream. Raises `Invalid`."""
    model = network.model
    if not isinstance(model, Transformer) or not isinstance(model.attention, Attention):
        raise Invalid("model", model.kind, "allowed: a transformer with attention")
    _check_head(network, layer, head)
    block = network.params["blocks"][layer]

    def read(x: Array) -> np.ndarray:
        return np.asarray(model.norm.apply(block["ln1"], x, Context(jnp.zeros(len(x), jnp.int32), no_edit)) if model.norm else x)

    return jax.tree.map(np.asarray, block["attn"]), read


def _check_head(network: Network, layer: int, head: int) -> None:
    layers, heads = heads_of(network.run)
    for name, value, known in (("layer", layer, layers), ("head", head, heads)):
        if {name: value} not in known:
            raise Invalid(name, value, f"allowed: 0..{len(known) - 1}")


def _side(network: Network, side: Side) -> tuple[Float[Array, "row d_model"], tuple[str, ...]]:
    """Embeddings and their names. Raises `Invalid`."""
    if side == "token":
        return network.params["embed"]["W_E"], network.task.symbols
    model: Any = network.model
    if side != "position" or not isinstance(model.position, Learned):
        raise Invalid("side", side, "allowed: token, and position where positions are learned")
    table = network.params["pos_embed"]["W_pos"]
    return table, tuple(map(str, range(len(table))))


# ---- what the network computes


class StepTable(NamedTuple):
    """The prediction after every pair of a state and an input that occurred."""

    next: Float[np.ndarray, "state input token"]  # mean probability of each token; NaN where the pair did not occur
    counts: Int[np.ndarray, "state input"]
    states: tuple[str, ...]  # symbols; EoI stands for s_0
    inputs: tuple[str, ...]
    tokens: tuple[str, ...]

    @property
    def best(self) -> Int[np.ndarray, "state input"]:
        """The likeliest next token; -1 where the pair did not occur."""
        return np.where(self.counts > 0, np.nan_to_num(self.next).argmax(-1), -1)


def step_table(network: Network, count: int = 1024, part: str = "test", seed: int = 0, opening: str | None = None) -> StepTable:
    """F(s, x) as the network computes it: its mean prediction where s_t is to come, by the token before it and by x_t.

    Measured on `count` rows of an iterative task with chain of thought; of a mixture of tasks, on those that begin with the
    symbol `opening`. A chance network predicts the same for all pairs; a perfect one has probability 1 at the task's next
    state. Raises `Invalid`.
    """
    rows = network.examples(count, part, seed)
    where, symbols = iteration(network.task, rows.truth), network.task.symbols
    if where is None:
        raise Invalid("task", network.task.kind, "allowed: tasks with inputs and every state written")
    if opening is not None and opening not in symbols:
        raise Invalid("opening", opening, f"allowed: {' '.join(symbols)}")
    logits = jax.jit(lambda params, tokens: logits_of(network.run, params, tokens))(network.params, rows.tokens)
    tokens, scored, queries, inputs = (np.asarray(a) for a in (rows.tokens, rows.scored, *where))
    asked = True if opening is None else tokens[:, :1] == symbols.index(opening)
    row, read = np.nonzero((queries >= 0) & scored.any(1, keepdims=True) & asked)
    at = tuple(tokens[row, places[row, read]] for places in (queries, inputs))
    v = network.task.vocab_size
    total, number = np.zeros((v, v, v)), np.zeros((v, v), int)
    np.add.at(total, at, np.asarray(jax.nn.softmax(logits))[row, queries[row, read]])
    np.add.at(number, at, 1)
    kept = tuple(np.flatnonzero(number.any(axis)) for axis in (1, 0))
    number = number[np.ix_(*kept)]
    mean = total[np.ix_(*kept)] / np.where(number > 0, number, np.nan)[..., None]
    return StepTable(mean, number, *(tuple(symbols[i] for i in k) for k in kept), symbols)


# ---- moving parts


def graft(network: Network, source: Network, layer: int, head: int | None = None) -> Network:
    """The network with a head of `source`, or with the MLP of its layer where no head is named, in place of its own.

    A head takes its queries, keys, values and output with it, but not the output's bias, which all heads share. Neither
    network is changed. Raises `Invalid` for networks of different shapes.
    """
    shapes = [jax.tree.map(jnp.shape, n.params) for n in (network, source)]
    if shapes[0] != shapes[1]:
        raise Invalid("source", source.run.id, f"allowed: a network of the same shapes as {network.run.id}")
    _check_head(network, layer, 0 if head is None else head)
    blocks = list(network.params["blocks"])
    mine, theirs = blocks[layer], source.params["blocks"][layer]
    if head is None:
        moved = {"mlp": theirs["mlp"]}
    else:
        moved = {"attn": {n: w if n == "b_O" else _with(w, head, theirs["attn"][n]) for n, w in mine["attn"].items()}}
    blocks[layer] = mine | moved
    return dataclasses.replace(network, params=network.params | {"blocks": blocks})


def _with(mine: Array, head: int, theirs: Array) -> Array:
    """Weights [head, ...] with one head's taken from others."""
    made = np.array(mine)
    made[head] = theirs[head]
    return jnp.asarray(made)
