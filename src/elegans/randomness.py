"""Every random draw of elegans: keys folded from (seed, purpose, step), and keyed integer hashing.

A run's data, initial weights and dropout depend on its own seeds alone, never on its cohort.
"""

from __future__ import annotations

import enum
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from elegans.types import AnyArray


class Purpose(enum.IntEnum):
    """What a key is for. Numbers are part of the numerics: never reuse or renumber them."""

    INIT = 0
    DATA = 1
    DROPOUT = 2
    VALIDATION = 3
    TEST = 4
    INSTRUMENT = 5
    ORDER = 6


def key_for(seed: Any, purpose: Purpose, step: Any = 0) -> jax.Array:
    """The key of one draw: folded from a seed, a purpose and a step (whole numbers, traced or not)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), int(purpose)), step)


def mix(h: UInt32[AnyArray, "..."]) -> UInt32[AnyArray, "..."]:
    """A bijection of 32-bit words with full avalanche (the finaliser of MurmurHash3, A. Appleby)."""
    h = h ^ (h >> 16)
    h = h * np.uint32(0x85EBCA6B)
    h = h ^ (h >> 13)
    h = h * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def keyed_hash(words: Int[AnyArray, "... words"], key: int) -> UInt32[AnyArray, "..."]:
    """32 bits per row of words, keyed: each word is mixed into a running state seeded by the key.

    Arrays of numpy are hashed on the host, to the same bits.
    """
    words = words.astype(np.uint32)
    state: Any = np.uint32(stable_hash(f"split {key}") & 0xFFFFFFFF)
    for i in range(words.shape[-1]):
        state = mix(state ^ mix(words[..., i] + np.uint32((0x9E3779B9 * (i + 1)) & 0xFFFFFFFF)))
    return state


def stable_hash(text: str) -> int:
    """64 bits of a text, the same in every process (Python's own `hash` of a string is not)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def shuffled_index(index: Int[Array, ""], size: Int[Array, ""] | int, key: jax.Array) -> Int[Array, ""]:
    """Where place `index` of a random permutation of range(size) points, without making the permutation.

    A four-round Feistel network on the smallest even number of bits that covers `size`, walked until
    it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). `size` may vary
    inside a cohort. On average under four walks; the domain is under four times `size`.
    """
    rounds = jax.random.bits(key, (4,), jnp.uint32)
    size = jnp.asarray(size, jnp.uint32)
    bits = 32 - jax.lax.clz(jnp.maximum(size - 1, 1))
    half = ((bits + 1) // 2).astype(jnp.uint32)
    mask = (jnp.uint32(1) << half) - 1

    def permute(x: Array) -> Array:
        left, right = x >> half, x & mask
        for r in range(4):
            left, right = right, left ^ (mix(right ^ rounds[r]) & mask)
        return (left << half) | right

    return jax.lax.while_loop(lambda x: x >= size, permute, permute(index.astype(jnp.uint32))).astype(jnp.int32)
