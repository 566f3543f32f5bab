"""A network with a known answer: binary addition in weights set by hand, the positive control of every instrument.

`adder(task)` is an ordinary `Transformer` with ordinary parameters, so what runs on a trained network runs on
it, and what an instrument must find is known beforehand. Every coordinate of the residual stream has one
meaning (y_j: the token of the second operand's bit j; r: the token before z_r, where z_r is read off):

  BIT        embed        the token is `1`
  FETCHED    attn 0       at y_j: x_j
  DIFFER     mlp 0        at y_j: x_j xor y_j
  PROPAGATE  attn 1       at r: x_r xor y_r
  FIRST      attn 1       at r: x_r. The truth `first_operand`, which no later part reads: decodable, but no cause
  CARRY      attn 1       at r: the carry into bit r, so out of bit r-1. The truth `carry`, on which the answer hangs
  ANSWER     mlp 1        at r: z_r = PROPAGATE xor CARRY
  PLACE + i  embed        the token stands at position i

Layer 0 moves nothing past the operands: up to resid.0, a token before z_r tells its position and itself, z_(r-1).
That says nothing of x_r, but something of the carry, as a bit whose sum is 0 carries more often than one whose
sum is 1: the best guess is right in exactly 3 of 4 rows, which is what a probe for the carry finds there.

Heads: 0.0 fetches x_j for y_j, 0.1 is idle (all weights zero: an ablation that must change nothing), 1.0 fetches
PROPAGATE and FIRST, 1.1 the carry. The carry into bit r was decided at the last bit below r whose operands agree:
it is the value they share. Where no bit below agrees, there is no carry, and the head looks at `+`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elegans.errors import Invalid
from elegans.models.base import Params
from elegans.models.positions import Learned
from elegans.models.transformer import MLP, Transformer
from elegans.tasks.addition import Addition
from elegans.tasks.bits import EOS, EQUALS

BIT, FETCHED, DIFFER, PROPAGATE, FIRST, CARRY, ANSWER, PLACE = range(8)
SHARP = 128.0  # between the best score and the next: exp(-128) is 0 in float32, so that not even rounding leaks to a probe
MARGIN = 20.0  # between the right logit and the next: 4 exp(-20) nats
IDLE_HEAD, LOOKUP_HEAD, CARRY_HEAD = (0, 1), (1, 0), (1, 1)  # (layer, head)


@dataclasses.dataclass(frozen=True)
class Direction:
    """Where a truth of the task stands, as 0.0 or 1.0: one coordinate, at these sites and at none before them."""

    coordinate: int
    sites: tuple[str, ...] = ("attn_out.1", "resid_mid.1", "resid.1")


DIRECTIONS = {"first_operand": Direction(FIRST), "carry": Direction(CARRY)}


def adder(task: Addition) -> tuple[Transformer, Params]:
    """A two-layer transformer that adds exactly, and its parameters: the tree that its `init` would make.

    Only for the default format. Raises `Invalid` for another.
    """
    for name, wanted in {"cot": False, "inputs": "lsb", "outputs": "lsb"}.items():
        if getattr(task, name) != wanted:
            raise Invalid(name, getattr(task, name), f"the hand-made adder knows {wanted} only")
    width = PLACE + task.positions
    # A head's keys say where a token stands, in one dimension per position, and in the last one DIFFER.
    model = Transformer(
        layers=2,
        d_model=width,
        heads=2,
        d_head=task.positions + 1,
        mlp=MLP(ratio=2 / width, activation="relu"),
        norm=None,
        position=Learned(),
        bias=True,
    )
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), task.vocab_size, task.positions))
    params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    params["embed"]["W_E"][1, BIT] = 1
    params["pos_embed"]["W_pos"][:, PLACE:] = np.eye(task.positions)
    first, second = params["blocks"]
    _fill_first(first, task)
    _fill_second(second, task)
    _fill_unembed(params["unembed"]["W_U"], task)
    return model, jax.tree.map(jnp.asarray, params)


def _places(task: Addition) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of x_j, of y_j, and of the tokens before z_r."""
    n = task.length
    bits = np.arange(n)
    return bits, n + 1 + bits, 2 * n + 1 + np.arange(n + 1)


def _rest(task: Addition) -> np.ndarray:
    """Preferences [query, key] of a head that fetches nothing: every token looks at `+`, where all that heads fetch is 0.

    The tokens before it cannot see it, and look at themselves.
    """
    prefer = np.eye(task.positions)
    prefer[task.length :] = np.eye(task.positions)[task.length]
    return prefer


def _head(attn: Any, head: int, prefer: np.ndarray, moves: dict[int, int], unless: float = 0.0) -> None:
    """One head. `prefer` gives its scores in units of SHARP, less `unless` for keys that DIFFER; `moves` {read: write} its values."""
    d_head = attn["W_Q"].shape[-1]
    unit = SHARP * d_head**0.5  # attention divides scores by the root
    attn["W_Q"][head, PLACE:, :-1] = unit * prefer
    attn["b_Q"][head, -1] = -unit * unless
    attn["W_K"][head, PLACE:, :-1] = np.eye(d_head - 1)
    attn["W_K"][head, DIFFER, -1] = 1
    for i, (read, write) in enumerate(moves.items()):
        attn["W_V"][head, read, i] = attn["W_O"][head, i, write] = 1


def _xor(mlp: Any, a: int, b: int, out: int) -> None:
    """An MLP of two units: a xor b = relu(a + b) - 2 relu(a + b - 1)."""
    mlp["W_in"][[a, b]] = 1
    mlp["b_in"][:] = 0, -1
    mlp["W_out"][:, out] = 1, -2


def _fill_first(block: Any, task: Addition) -> None:
    """At y_j: fetch x_j, and compare."""
    x, y, _ = _places(task)
    prefer = _rest(task)
    prefer[y] = np.eye(task.positions)[x]
    _head(block["attn"], 0, prefer, {BIT: FETCHED})
    _xor(block["mlp"], BIT, FETCHED, DIFFER)


def _fill_second(block: Any, task: Addition) -> None:
    """Before z_r: fetch what y_r knows and the carry, and add."""
    _, y, reads = _places(task)
    lookup, carry = _rest(task), _rest(task)
    lookup[reads[:-1]] = np.eye(task.positions)[y]
    for r, p in enumerate(reads):  # below r, the higher the better and all above the 1 of `+`; where operands differ, below it
        carry[p, y[:r]] = 2 + np.arange(r)
    _head(block["attn"], LOOKUP_HEAD[1], lookup, {DIFFER: PROPAGATE, FETCHED: FIRST})
    _head(block["attn"], CARRY_HEAD[1], carry, {FETCHED: CARRY}, unless=task.length + 1)
    _xor(block["mlp"], PROPAGATE, CARRY, ANSWER)


def _fill_unembed(w: np.ndarray, task: Addition) -> None:
    """`=` and the end by their position; an answer is `0`, unless ANSWER outvotes it."""
    _, y, reads = _places(task)
    w[PLACE + y[-1], EQUALS] = MARGIN
    w[PLACE + reads, 0] = MARGIN
    w[ANSWER, 1] = 2 * MARGIN
    w[PLACE + reads[-1] + 1, EOS] = MARGIN
