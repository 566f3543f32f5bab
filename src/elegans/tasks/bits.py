"""Numbers as bits, least significant first: the vocabulary, the draws and the contents that tasks on bits share."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from elegans.tasks.base import SMALL_SPACE

SYMBOLS = ("0", "1", "+", "=", "$")
PLUS, EQUALS, EOS = 2, 3, 4
Order = Literal["lsb", "msb"]


def random_bits(key: jax.Array, *shape: int) -> Int[Array, "*shape"]:
    """Independent fair bits."""
    return jax.random.bernoulli(key, shape=shape).astype(jnp.int32)


def pack(bits: Int[Array, " bit"]) -> Int[Array, " word"]:
    """Bits as 16-bit words, least significant word first, so that int32 arithmetic never overflows."""
    padded = jnp.pad(bits, (0, -bits.shape[0] % 16)).reshape(-1, 16)
    return (padded << jnp.arange(16)).sum(1)


def unordered(x: Int[Array, " word"], y: Int[Array, " word"]) -> tuple[Array, Array]:
    """The smaller and the larger of two packed numbers: the content that x+y and y+x share."""
    less = jnp.zeros((), bool)
    for i in range(x.shape[0]):  # from the least significant word up: the last difference decides
        less = jnp.where(x[i] == y[i], less, x[i] < y[i])
    return jnp.where(less, x, y), jnp.where(less, y, x)


def pair_contents(length: int) -> int | None:
    """How many unordered pairs of numbers of `length` bits there are, or None where that is 2**16 or more."""
    pairs = 2**length * (2**length + 1) // 2
    return pairs if pairs < SMALL_SPACE else None


def pair_content(x: Int[Array, " bit"], y: Int[Array, " bit"]) -> Int[Array, " words"]:
    """The content of an unordered pair of numbers: its rank among `pair_contents`, or both numbers where that is None."""
    small, large = unordered(pack(x), pack(y))
    if pair_contents(x.shape[0]) is None:
        return jnp.concatenate([small, large])
    return large * (large + 1) // 2 + small


def answered(prompt: Int[Array, " n"], answer: Int[Array, " m"]) -> tuple[Int[Array, " position"], Bool[Array, " position"]]:
    """Tokens and scored marks of a prompt, `=`, an answer and the end."""
    tokens = jnp.concatenate([prompt, jnp.array([EQUALS]), answer, jnp.array([EOS])])
    return tokens, jnp.arange(tokens.shape[0]) >= prompt.shape[0]


def operands(x: Int[Array, " bit"], y: Int[Array, " bit"], order: Order = "lsb") -> Int[Array, " n"]:
    """The prompt `x+y`."""
    return jnp.concatenate([ordered(x, order), jnp.array([PLUS]), ordered(y, order)])


def ordered(bits: Int[Array, " bit"], order: Order) -> Int[Array, " bit"]:
    """Bits, least significant first, as an order shows them; and back."""
    return bits if order == "lsb" else bits[::-1]


def operands_content(tokens: Int[Array, " position"], length: int, order: Order = "lsb") -> Int[Array, " words"]:
    """The content of a row that begins with `operands` of `length` bits each."""
    x, y = tokens[:length], tokens[length + 1 : 2 * length + 1]
    return pair_content(ordered(x, order), ordered(y, order))


def carries(x: Int[Array, " bit"], y: Int[Array, " bit"]) -> Int[Array, " bit"]:
    """The carry out of every bit of x + y, in log2(bits) steps.

    Carry-lookahead as a prefix scan: a bit generates a carry (x and y) or propagates one (x xor y).
    """

    def join(low: tuple[Array, Array], high: tuple[Array, Array]) -> tuple[Array, Array]:
        return high[0] | (high[1] & low[0]), high[1] & low[1]

    return jax.lax.associative_scan(join, (x & y, x ^ y))[0]


def coin_entropy(p: float) -> float:
    """Entropy of a coin that falls on one side with probability p, in nats."""
    return sum(-q * math.log(q) for q in (p, 1 - p) if q > 0)
