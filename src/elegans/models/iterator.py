"""An iteration head in weights set by hand: the positive control of every instrument that looks at attention.

`iterator(task, table)` is an ordinary `Transformer` that solves a task with rows `[task] x_1 .. x_L [EoI] s_1 .. s_L [EoS]`,
s_t = table[s_(t-1), x_t], at every length and without an error, by the circuit of Cabannes et al. 2024 ("Iteration
head: a mechanistic study of chain-of-thought"). The token before s_t stands at p = L + t, and EoI, at e = L + 1, plays s_0:

  attention 0   fetches e
  MLP 0         subtracts: t = p - e + 1; and sees the end of the row, p = 2e - 1
  attention 1   fetches x_t, which stands at t
  MLP 1         looks up table[s_(t-1), x_t]: the only part that depends on the task

Head 0 of each layer does this. Head 1 is idle (all weights zero): its attention is uniform. So is that of every head
at tokens before EoI. The residual stream, with N positions and a vocabulary of V:

  TOKEN + v    embed     the token is v                   AT        attn 0    e
  PLACE + p    embed     the token stands at p            TIME + t  mlp 0     s_t comes next
  FETCHED + v  attn 1    x_t is v                         END       mlp 0     the row's end comes next
  ANSWER + v   mlp 1     s_t is v
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from elegans.errors import Invalid
from elegans.models.base import Params
from elegans.models.handmade import MARGIN, SHARP
from elegans.models.transformer import MLP, Learned, Transformer
from elegans.tasks.base import Task

HEADS = {"iteration_1": (0, 0), "iteration_2": (1, 0)}  # which (layer, head) fetches e, and which x_t
IDLE_HEADS = (0, 1), (1, 1)


@dataclasses.dataclass(frozen=True)
class _Places:
    """Tokens with a role, and where the coordinates of each meaning begin."""

    vocab: int
    positions: int
    eoi: int
    eos: int
    TOKEN: int
    PLACE: int
    TIME: int
    FETCHED: int
    ANSWER: int
    AT: int
    END: int
    width: int


def iterator(
    task: Task, table: Int[np.ndarray, "state input"], first: Int[np.ndarray, " input"] | None = None
) -> tuple[Transformer, Params]:
    """A two-layer transformer that iterates a table exactly, and its parameters: the tree that its `init` would make.

    States and inputs are tokens of these ids; `first[x]` is s_1, and table[0, x], so s_0 = 0, where it is not given.
    Raises `Invalid` for a task without the row layout.
    """
    at = _places(task)
    rows = np.vstack([table, table[0] if first is None else first])  # the last state is EoI
    states = [*range(len(table)), at.eoi]
    units = max(at.positions + 5, rows.size)
    model = Transformer(
        layers=2,
        d_model=at.width,
        heads=2,
        d_head=at.positions,
        mlp=MLP(ratio=units / at.width, activation="relu"),
        norm=None,
        position=Learned(),
        bias=True,
    )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), task.vocab_size, task.positions))
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    params["embed"]["W_E"][:, at.TOKEN : at.TOKEN + at.vocab] = np.eye(at.vocab)
    params["pos_embed"]["W_pos"][:, at.PLACE : at.PLACE + at.positions] = np.eye(at.positions)
    first_block, second_block = params["blocks"]
    _find_start(first_block["attn"], at)
    _subtract(first_block["mlp"], at)
    _fetch(second_block["attn"], at)
    _look_up(second_block["mlp"], at, states, rows)
    _fill_unembed(params["unembed"]["W_U"], at)
    return model, jax.tree.map(jnp.asarray, params)


def _places(task: Task) -> _Places:
    """Token ids from a row of the task. Raises `Invalid`."""
    row = jax.device_get(jax.jit(lambda: task.sample(jax.random.key(0), jax.tree.map(jnp.asarray, task.prepare())))())
    if not {"input", "state"} <= set(row.truth) or not getattr(task, "cot", True):
        raise Invalid("task", task.kind, "the hand-made iteration head knows rows with inputs and every state only")
    v, n = task.vocab_size, task.positions
    starts = np.cumsum([0, v, n, n, v, v, 1, 1]).tolist()
    return _Places(v, n, int(row.tokens[row.truth["input"].positions[0]]), int(row.tokens[-1]), *starts)


def _find_start(attn: Any, at: _Places) -> None:
    """Fetch e. A token that cannot see EoI yet fetches a mean of positions, each with N added: its time is below 0, which is none."""
    n = at.positions
    attn["b_Q"][0, 0] = SHARP * n**0.5  # attention divides scores by the root of d_head
    attn["W_K"][0, at.TOKEN + at.eoi, 0] = 1
    attn["W_V"][0, at.PLACE : at.PLACE + n, 0] = np.arange(n)
    attn["b_V"][0, 0] = n
    attn["W_V"][0, at.TOKEN + at.eoi, 0] = -n
    attn["W_O"][0, 0, at.AT] = 1


def _subtract(mlp: Any, at: _Places) -> None:
    """TIME is one-hot of p - e + 1, END of p - 2e + 1 = 0: a spike at k is relu(d - k + 1) - 2 relu(d - k) + relu(d - k - 1)."""
    n = at.positions
    places, steps = np.arange(at.PLACE, at.PLACE + n), np.arange(n + 2)
    mlp["W_in"][places, : n + 2] = np.arange(n)[:, None]
    mlp["W_in"][at.AT, : n + 2] = -1
    mlp["b_in"][: n + 2] = 1 - steps  # unit i: relu(p - e + 1 - i)
    for t in range(1, n):
        mlp["W_out"][t - 1 : t + 2, at.TIME + t] = 1, -2, 1
    end = slice(n + 2, n + 5)
    mlp["W_in"][places, end] = np.arange(n)[:, None]
    mlp["W_in"][at.AT, end] = -2
    mlp["b_in"][end] = 2, 1, 0
    mlp["W_out"][end, at.END] = 1, -2, 1


def _fetch(attn: Any, at: _Places) -> None:
    """Fetch the token that stands at t; with no time, a little of all."""
    n, v = at.positions, at.vocab
    attn["W_Q"][0, at.TIME : at.TIME + n] = SHARP * n**0.5 * np.eye(n)
    attn["W_K"][0, at.PLACE : at.PLACE + n] = np.eye(n)
    attn["W_V"][0, at.TOKEN : at.TOKEN + v, :v] = np.eye(v)
    attn["W_O"][0, :v, at.FETCHED : at.FETCHED + v] = np.eye(v)


def _look_up(mlp: Any, at: _Places, states: list[int], rows: Int[np.ndarray, "state input"]) -> None:
    """A unit for every pair of a state and an input: relu(both - 1)."""
    for unit, (i, x) in enumerate(np.ndindex(rows.shape)):
        mlp["W_in"][[at.TOKEN + states[i], at.FETCHED + x], unit] = 1
        mlp["b_in"][unit] = -1
        mlp["W_out"][unit, at.ANSWER + rows[i, x]] = 1


def _fill_unembed(w: np.ndarray, at: _Places) -> None:
    """The answer, unless the row ends, or has ended, which outvotes it."""
    w[at.ANSWER : at.ANSWER + at.vocab] = MARGIN * np.eye(at.vocab)
    w[[at.END, at.TOKEN + at.eos], at.eos] = 2 * MARGIN
