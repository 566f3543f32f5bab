"""Multiplication of two binary numbers: the language whose quiet features are the carries of long multiplication."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from elegans.specs import field, spec
from elegans.tasks.base import Split, Task
from elegans.tasks.bits import SYMBOLS, Order, answered, coin_entropy, operands, operands_content, ordered, pack, pair_contents, random_bits
from elegans.types import Example, Truth

WORD = 16  # bits of a word of `pack`
EXACT = 16  # bits of the longest operands whose products are counted one by one


@spec
class Multiplication(Task):
    """`x+y=z`, z = x * y in 2 `length` bits, both numbers uniform over `length` bits; least significant bit first.

    length=3, x=7, y=3:      1 1 1 + 1 1 0 = 1 0 1 0 1 0 $
    scored:                                . . . . . . . .      (from `=` to the end)
    first_operand 1 1 1, read where z_r is predicted, so at =, z_0, z_1
    carry_2       1 1 1, into columns 2, 3, 4 while x * y_1 << 1 is added, read where z_2, z_3, z_4 are predicted
    carry_3       0 0 0, into columns 3, 4, 5 while x * y_2 << 2 is added, read where z_3, z_4, z_5 are predicted

    carry_k belongs to the k-th partial product, k = 2 .. length. x+y and y+x are one content, which
    never straddles the split.
    """

    length: int = field(16, "bits of each operand", ge=1, le=512)
    inputs: Order = field("lsb", "which bit of the operands comes first")
    outputs: Order = field("lsb", "which bit of the answer comes first")
    split: Split | None = field(Split(), "how contents are divided")

    @property
    def symbols(self) -> tuple[str, ...]:
        return SYMBOLS

    @property
    def positions(self) -> int:
        return 4 * self.length + 3

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        n = self.length
        x, y = random_bits(key, 2, n)
        place = np.arange(2 * n) - np.arange(n)[:, None]  # bit of x in each column of x << i
        partial = jnp.where((place >= 0) & (place < n), x[place % n], 0) * y[:, None]
        words = jax.vmap(pack)(partial)
        answer = carried(words.sum(0))[: 2 * n]
        tokens, scored = answered(operands(x, y, self.inputs), ordered(answer, self.outputs))
        return Example(tokens, scored, self._truth(x, partial, jnp.cumsum(words, 0)))

    def _truth(self, x: Array, partial: Array, words: Array) -> dict[str, Truth]:
        """Features are read at the token before the answer bit that they decide.

        Column j receives a carry where the bits of both summands and of their sum do not cancel.
        """
        n = self.length
        sums = jax.vmap(carried)(words)[:, : 2 * n]  # [partial products added, column]
        into = sums[:-1] ^ partial[1:] ^ sums[1:]
        place = np.arange(2 * n) if self.outputs == "lsb" else np.arange(2 * n)[::-1]
        reads = jnp.asarray(2 * n + 1 + place)
        carry = {f"carry_{k}": Truth(into[k - 2, k : k + n], reads[k : k + n]) for k in range(2, n + 1)}
        return {"first_operand": Truth(x, reads[:n]), **carry}

    def content(self, example: Example) -> Int[Array, " words"]:
        return operands_content(example.tokens, self.length, self.inputs)

    @property
    def contents(self) -> int | None:
        return pair_contents(self.length)

    def scored_tokens(self) -> float:
        return float(2 * self.length + 2)

    def floor(self) -> float | None:
        """0: the answer follows from the prompt."""
        return 0.0

    def plateau(self) -> float | None:
        """Mean entropy of each answer token alone.

        Let r < length. Bit r is 0 where x divides by 2^(r+1). Elsewhere x = 2^t * odd with t <= r, and bit r of xy
        is bit r - t of odd * y, which is fair. So it is 1 with (1 - 2^-(r+1)) / 2. Higher bits are counted,
        exactly up to 16 bits. Of longer products the top 16 bits have nearly the law that they have there
        (to 1e-5) and those in between are nearly fair (to 1e-8 nats).
        """
        n = self.length
        low = [(1 - 2.0 ** -(r + 1)) / 2 for r in range(n)]
        return sum(map(coin_entropy, [*low, *high_bits(min(n, EXACT)), *[0.5] * (n - EXACT)])) / self.scored_tokens()


def carried(words: Int[Array, " word"]) -> Int[Array, " bit"]:
    """The bits of a number whose 16-bit words have overflowed (each below 2^31 - 2^16)."""
    carry = jnp.zeros((), words.dtype)
    normal = []
    for word in words:  # a 16-bit product has two
        total = word + carry
        normal.append(total)
        carry = total >> WORD
    return ((jnp.stack(normal)[:, None] >> jnp.arange(WORD)) & 1).reshape(-1)


@functools.cache
def high_bits(n: int) -> tuple[float, ...]:
    """Chance of a 1 in each of the bits n .. 2n-1 of a product of two uniform n-bit numbers, exactly.

    Bit r of m is floor(m / 2^r) - 2 floor(m / 2^(r+1)), so that sums of floors count the ones.
    """
    floors = [int(floor_sums(2**n, 2**r, np.arange(2**n)).sum()) for r in range(n, 2 * n + 1)]
    return tuple((floors[i] - 2 * floors[i + 1]) / 4**n for i in range(n))


def floor_sums(count: int, modulus: int, slopes: np.ndarray) -> np.ndarray:
    """The sum of floor(slope * i / modulus) over i < count, for every slope: Euclid's algorithm on lattice points."""
    n, m, a, b = np.full_like(slopes, count), np.full_like(slopes, modulus), slopes, np.zeros_like(slopes)
    total = np.zeros_like(slopes)
    going = np.arange(len(slopes))
    while len(going):
        total[going] += n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        more = top >= m
        going = going[more]
        n, m, a, b = (v[more] for v in (top // m, a, m, top % m))  # the same points, counted along the other axis
    return total
