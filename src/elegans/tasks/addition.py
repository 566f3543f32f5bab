"""Addition of two binary numbers: the language whose quiet feature is the carry."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from elegans.specs import field, spec
from elegans.tasks.base import Split, Task
from elegans.tasks.bits import (
    SYMBOLS,
    Order,
    answered,
    carries,
    coin_entropy,
    operands,
    operands_content,
    ordered,
    pair_contents,
    random_bits,
)
from elegans.types import Example, Truth


@spec
class Addition(Task):
    """`x+y=z`, both numbers uniform over `length` bits, z one bit longer; least significant bit first.

    length=4, x=6, y=7:      0 1 1 0 + 1 1 1 0 = 1 0 1 1 0 $
    scored:                                    . . . . . . .      (from `=` to the end)
    first_operand 0 1 1 0, read where z_r is predicted, so at =, z_0, z_1, z_2
    carry         0 1 1 0, out of bit r, read where z_(r+1) is predicted, so at z_0, z_1, z_2, z_3

    With `cot` every answer bit is followed by the carry out of it, `z_0 c_0 z_1 c_1 ...`; the last
    carry is the top bit. x+y and y+x are one content, which never straddles the split.
    """

    length: int = field(16, "bits of each operand", ge=1, le=4096)
    cot: bool = field(False, "write each carry after its answer bit")
    inputs: Order = field("lsb", "which bit of the operands comes first")
    outputs: Order = field("lsb", "which bit of the answer comes first")
    split: Split | None = field(Split(), "how contents are divided")

    @property
    def symbols(self) -> tuple[str, ...]:
        return SYMBOLS

    @property
    def positions(self) -> int:
        return 2 * self.length + 3 + self._answer_length

    @property
    def _answer_length(self) -> int:
        return 2 * self.length if self.cot else self.length + 1

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        n = self.length
        x, y = random_bits(key, 2, n)
        carry = carries(x, y)
        total = jnp.append(x ^ y ^ jnp.append(0, carry[:-1]), carry[-1])
        answer = jnp.stack([total[:n], carry], 1).reshape(-1) if self.cot else total
        tokens, scored = answered(operands(x, y, self.inputs), ordered(answer, self.outputs))
        return Example(tokens, scored, self._truth(x, carry))

    def _truth(self, x: Array, carry: Array) -> dict[str, Truth]:
        """Feature r is read at the token before the answer bit that it decides."""
        n = self.length
        place = np.arange(n + 1)  # of z_r within the answer, least significant first
        place = np.append(2 * place[:-1], 2 * n - 1) if self.cot else place
        place = place if self.outputs == "lsb" else self._answer_length - 1 - place
        reads = jnp.asarray(2 * n + 1 + place)
        return {"first_operand": Truth(x, reads[:-1]), "carry": Truth(carry, reads[1:])}

    def content(self, example: Example) -> Int[Array, " words"]:
        return operands_content(example.tokens, self.length, self.inputs)

    @property
    def contents(self) -> int | None:
        return pair_contents(self.length)

    def scored_tokens(self) -> float:
        return float(self._answer_length + 2)

    def floor(self) -> float | None:
        """0: the answer follows from the prompt."""
        return 0.0

    def plateau(self) -> float | None:
        """Mean entropy of each answer token alone: z_r is fair, the carry out of bit r is 1 with (1 - 2^-(r+1)) / 2."""
        n = self.length
        bits = n * math.log(2)
        shown = range(n) if self.cot else (n - 1,)
        return (bits + sum(coin_entropy((1 - 2.0 ** -(r + 1)) / 2) for r in shown)) / self.scored_tokens()
