"""Symmetric functions of many bits: parity, majority, majority of majorities, and the inner product mod 2."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from scipy.stats import binom

from elegans.errors import Invalid
from elegans.specs import field, spec
from elegans.tasks.base import SMALL_SPACE, Split, Task
from elegans.tasks.bits import SYMBOLS, answered, coin_entropy, operands, operands_content, pack, pair_contents, random_bits
from elegans.types import Example, Truth

GROUPS, QUORUM = 4, 3  # groups that vote, and those whose bit must be 1


@spec
class OneBit(Task):
    """A prompt of bits, `=`, one bit and the end."""

    abstract: ClassVar[bool] = True
    split: Split | None = field(Split(), "how contents are divided")

    @property
    def symbols(self) -> tuple[str, ...]:
        return SYMBOLS

    def scored_tokens(self) -> float:
        return 3.0

    def floor(self) -> float | None:
        """0: the answer follows from the prompt."""
        return 0.0


@spec
class FairBits(OneBit):
    """A prompt of 2 `length` fair bits, each row of them a content of its own."""

    abstract: ClassVar[bool] = True
    length: int = field(32, "half the number of bits", ge=1, le=2048)

    @property
    def positions(self) -> int:
        return 2 * self.length + 3

    def content(self, example: Example) -> Int[Array, " words"]:
        return pack(example.tokens[: 2 * self.length])

    @property
    def contents(self) -> int | None:
        return 4**self.length if 4**self.length < SMALL_SPACE else None


@spec
class BitParity(FairBits):
    """The parity of 2 `length` fair bits. (`Parity` is the iterative one, with or without chain of thought, of `length` bits.)

    length=3:  0 1 1 0 1 0 = 1 $
    scored:                . . .
    partial    0 1 0 0 1 1, the parity so far, read at each bit
    """

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        x = random_bits(key, 2 * self.length)
        partial = jnp.cumsum(x) % 2
        tokens, scored = answered(x, partial[-1:])
        return Example(tokens, scored, {"partial": Truth(partial, jnp.arange(2 * self.length))})

    def plateau(self) -> float | None:
        """A fair bit's entropy, ln 2, over three tokens."""
        return coin_entropy(0.5) / self.scored_tokens()


@spec
class Majority(FairBits):
    """Whether most of 2 `length` fair bits are 1; a tie gives 0.

    length=3:       0 1 1 0 1 1 = 1 $
    scored:                     . . .
    running_count   0 1 2 2 3 4, ones so far, read at each bit
    """

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        x = random_bits(key, 2 * self.length)
        count = jnp.cumsum(x)
        tokens, scored = answered(x, (count[-1:] > self.length).astype(jnp.int32))
        return Example(tokens, scored, {"running_count": Truth(count, jnp.arange(2 * self.length), "number")})

    def plateau(self) -> float | None:
        """Entropy of the answer over three tokens; it is 1 where a binomial count is above its middle."""
        return coin_entropy(float(binom.sf(self.length, 2 * self.length, 0.5))) / self.scored_tokens()


@spec
class MajorityOfMajority(FairBits):
    """Four groups of `length` / 2 fair bits vote, each by its majority; three votes of four give 1. Ties give 0.

    length=6:       0 1 1 1 0 0 1 1 0 1 1 1 = 1 $
    scored:                                 . . .
    running_count   0 1 2 1 1 1 1 2 2 1 2 3, ones so far in the group, read at each bit
    group_sum       2 1 2 3, read at =
    group_bit       1 0 1 1, read at =
    """

    length: int = field(32, "half the number of bits; even, so that groups are equal", ge=2, le=2048)

    def check(self) -> None:
        if self.length % 2:
            raise Invalid("length", self.length, "allowed: even numbers, four groups share twice as many bits")

    @property
    def _group(self) -> int:
        return 2 * self.length // GROUPS

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        x = random_bits(key, 2 * self.length)
        count = jnp.cumsum(x.reshape(GROUPS, self._group), 1)
        votes = 2 * count[:, -1] > self._group
        tokens, scored = answered(x, (votes.sum(keepdims=True) >= QUORUM).astype(jnp.int32))
        at_equals = jnp.full(GROUPS, 2 * self.length)
        truth = {
            "running_count": Truth(count.reshape(-1), jnp.arange(2 * self.length), "number"),
            "group_sum": Truth(count[:, -1], at_equals, "number"),
            "group_bit": Truth(votes.astype(jnp.int32), at_equals),
        }
        return Example(tokens, scored, truth)

    def plateau(self) -> float | None:
        """Entropy of the answer over three tokens: votes are independent, each 1 where a binomial count is above its middle."""
        vote = binom.sf(self._group // 2, self._group, 0.5)
        return coin_entropy(float(binom.sf(QUORUM - 1, GROUPS, vote))) / self.scored_tokens()


@spec
class InnerProduct(OneBit):
    """`x+y=z`, z the parity of the places where both numbers have a 1; both uniform over `length` bits.

    length=4:  1 1 0 1 + 0 1 1 1 = 0 $
    scored:                      . . .
    partial    0 1 1 0, the parity so far, read at y_0 .. y_3

    x+y and y+x are one content, which never straddles the split.
    """

    length: int = field(16, "bits of each operand", ge=1, le=4096)

    @property
    def positions(self) -> int:
        return 2 * self.length + 4

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        n = self.length
        x, y = random_bits(key, 2, n)
        partial = jnp.cumsum(x & y) % 2
        tokens, scored = answered(operands(x, y), partial[-1:])
        return Example(tokens, scored, {"partial": Truth(partial, n + 1 + jnp.arange(n))})

    def content(self, example: Example) -> Int[Array, " words"]:
        return operands_content(example.tokens, self.length)

    @property
    def contents(self) -> int | None:
        return pair_contents(self.length)

    def plateau(self) -> float | None:
        """Entropy of the answer over three tokens.

        It is fair unless x = 0, and then 0: it is 1 with (1 - 2^-length) / 2.
        """
        return coin_entropy((1 - 2.0**-self.length) / 2) / self.scored_tokens()
