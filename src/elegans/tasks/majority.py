"""Symmetric functions of many bits: majority, majority of majorities, and the inner product mod 2."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
from scipy.stats import binom

from elegans.errors import Invalid
from elegans.specs import field, spec
from elegans.tasks.base import SMALL_SPACE, Split, Task
from elegans.tasks.bits import EOS, EQUALS, PLUS, SYMBOLS, coin_entropy, pack, pair_content, pair_contents, random_bits
from elegans.types import Example, Truth

GROUPS, QUORUM = 4, 3  # groups that vote, and those whose bit must be 1


def answered(prompt: Int[Array, " n"], bit: Int[Array, ""] | Bool[Array, ""]) -> tuple[Int[Array, " position"], Bool[Array, " position"]]:
    """Tokens and scored marks of a prompt, `=`, one bit and the end."""
    tokens = jnp.concatenate([prompt, jnp.stack([jnp.int32(EQUALS), bit.astype(jnp.int32), jnp.int32(EOS)])])
    return tokens, jnp.arange(tokens.shape[0]) >= prompt.shape[0]


@spec
class Majority(Task):
    """Whether most of 2 `length` fair bits are 1; a tie gives 0.

    length=3:       0 1 1 0 1 1 = 1 $
    scored:                     . . .
    running_count   0 1 2 2 3 4, ones so far, read at each bit
    """

    length: int = field(32, "half the number of bits", ge=1, le=2048)
    split: Split | None = field(Split(), "how contents are divided")

    @property
    def symbols(self) -> tuple[str, ...]:
        return SYMBOLS

    @property
    def positions(self) -> int:
        return 2 * self.length + 3

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        x = random_bits(key, 2 * self.length)
        count = jnp.cumsum(x)
        tokens, scored = answered(x, count[-1] > self.length)
        return Example(tokens, scored, {"running_count": Truth(count, jnp.arange(2 * self.length), "number")})

    def content(self, example: Example) -> Int[Array, " words"]:
        return pack(example.tokens[: 2 * self.length])

    @property
    def contents(self) -> int | None:
        return 4**self.length if 4**self.length < SMALL_SPACE else None

    def scored_tokens(self) -> float:
        return 3.0

    def floor(self) -> float | None:
        """0: the answer follows from the prompt."""
        return 0.0

    def plateau(self) -> float | None:
        """Entropy of the answer over three tokens; it is 1 where a binomial count is above its middle."""
        return coin_entropy(float(binom.sf(self.length, 2 * self.length, 0.5))) / self.scored_tokens()


@spec
class MajorityOfMajority(Task):
    """Four groups of `length` / 2 fair bits vote, each by its majority; three votes of four give 1. Ties give 0.

    length=6:       0 1 1 1 0 0 1 1 0 1 1 1 = 1 $
    scored:                                 . . .
    running_count   0 1 2 1 1 1 1 2 2 1 2 3, ones so far in the group, read at each bit
    group_sum       2 1 2 3, read at =
    group_bit       1 0 1 1, read at =
    """

    length: int = field(32, "half the number of bits; even, so that groups are equal", ge=2, le=2048)
    split: Split | None = field(Split(), "how contents are divided")

    def check(self) -> None:
        if self.length % 2:
            raise Invalid("length", self.length, "allowed: even numbers, four groups share twice as many bits")

    @property
    def symbols(self) -> tuple[str, ...]:
        return SYMBOLS

    @property
    def positions(self) -> int:
        return 2 * self.length + 3

    @property
    def _group(self) -> int:
        return 2 * self.length // GROUPS

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        x = random_bits(key, 2 * self.length)
        count = jnp.cumsum(x.reshape(GROUPS, self._group), 1)
        votes = 2 * count[:, -1] > self._group
        tokens, scored = answered(x, votes.sum() >= QUORUM)
        at_equals = jnp.full(GROUPS, 2 * self.length)
        truth = {
            "running_count": Truth(count.reshape(-1), jnp.arange(2 * self.length), "number"),
            "group_sum": Truth(count[:, -1], at_equals, "number"),
            "group_bit": Truth(votes.astype(jnp.int32), at_equals),
        }
        return Example(tokens, scored, truth)

    def content(self, example: Example) -> Int[Array, " words"]:
        return pack(example.tokens[: 2 * self.length])

    @property
    def contents(self) -> int | None:
        return 4**self.length if 4**self.length < SMALL_SPACE else None

    def scored_tokens(self) -> float:
        return 3.0

    def floor(self) -> float | None:
        """0: the answer follows from the prompt."""
        return 0.0

    def plateau(self) -> float | None:
        """Entropy of the answer over three tokens: votes are independent, each 1 where a binomial count is above its middle."""
        vote = binom.sf(self._group // 2, self._group, 0.5)
        return coin_entropy(float(binom.sf(QUORUM - 1, GROUPS, vote))) / self.scored_tokens()


@spec
class InnerProduct(Task):
    """`x+y=z`, z the parity of the places where both numbers have a 1; both uniform over `length` bits.

    length=4:  1 1 0 1 + 0 1 1 1 = 0 $
    scored:                      . . .
    partial    0 1 1 0, the parity so far, read at y_0 .. y_3

    x+y and y+x are one content, which never straddles the split.
    """

    length: int = field(16, "bits of each operand", ge=1, le=4096)
    split: Split | None = field(Split(), "how contents are divided")

    @property
    def symbols(self) -> tuple[str, ...]:
        return SYMBOLS

    @property
    def positions(self) -> int:
        return 2 * self.length + 4

    def sample(self, key: jax.Array, data: Any) -> Example:
        del data
        n = self.length
        x, y = random_bits(key, 2, n)
        partial = jnp.cumsum(x & y) % 2
        tokens, scored = answered(jnp.concatenate([x, jnp.array([PLUS]), y]), partial[-1])
        return Example(tokens, scored, {"partial": Truth(partial, n + 1 + jnp.arange(n))})

    def content(self, example: Example) -> Int[Array, " words"]:
        n = self.length
        return pair_content(example.tokens[:n], example.tokens[n + 1 : 2 * n + 1])

    @property
    def contents(self) -> int | None:
        return pair_contents(self.length)

    def scored_tokens(self) -> float:
        return 3.0

    def floor(self) -> float | None:
        """0: the answer follows from the prompt."""
        return 0.0

    def plateau(self) -> float | None:
        """Entropy of the answer over three tokens.

        It is fair unless x = 0, and then 0: it is 1 with (1 - 2^-length) / 2.
        """
        return coin_entropy((1 - 2.0**-self.length) / 2) / self.scored_tokens()
