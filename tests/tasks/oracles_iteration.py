"""Iterative tasks in plain Python, from the description of Cabannes et al. 2024, "Iteration Head"; see `oracles`.

With chain of thought a row is `[task] x_1..x_L [EoI] s_1..s_L`, without `[task] x_1..x_L [EoI] s_L`, padded with EoS to 2 Lmax + 3.
"""

from __future__ import annotations

from typing import NamedTuple

TASK = {"binary_copy": "C", "parity": "P", "polynomial": "F"}
BOS, EOI, EOS = "^", ":", "$"


class Row(NamedTuple):
    """A padded row; which tokens count; where s_1, s_2, .. are predicted; what they are."""

    symbols: list[str]
    scored: list[bool]
    reads: list[int]
    states: list[int]


def states(kind: str, x: list[int], start: str = "x", modulus: int = 11) -> list[int]:
    if kind == "binary_copy":
        return list(x)
    if kind == "parity":
        made, total = [], 0
        for bit in x:
            total = (total + bit) % 2
            made.append(total)
        return made
    made = [x[0]] if start == "x" else [(0 * x[0] + 1) % modulus]
    for value in x[1:]:
        made.append((made[-1] * value + 1) % modulus)
    return made


def row(kind: str, x: list[int], longest: int, cot: bool = True, paper: bool = False, start: str = "x", modulus: int = 11) -> Row:
    """The row of inputs x among rows of at most `longest` inputs."""
    s = states(kind, x, start, modulus)
    first = BOS if kind == "polynomial" and paper and not cot else TASK[kind]
    shown = [first, *map(str, x), EOI, *map(str, s if cot else s[-1:])]
    width = 2 * longest + 3
    eoi = shown.index(EOI)
    last = width - 1 if paper else len(shown)  # theirs: everything after EoI; ours: the states and one EoS
    reads = [eoi + t for t in range(len(x))] if cot else [1 + t for t in range(len(x))]  # EoI plays s_0; without cot at the inputs
    return Row(shown + [EOS] * (width - len(shown)), [eoi < p <= last for p in range(width)], reads, s)
