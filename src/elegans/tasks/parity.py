"""Parity with and without chain of thought: the simplest iterative task."""

from __future__ import annotations

from typing import Any

from elegans.specs import spec
from elegans.tasks.iteration import IterativeTask


@spec
class Parity(IterativeTask):
    """Running parity s_t = s_(t-1) xor x_t of fair bits, with the states written out or only the last one.

    length=4, cot:      P 1 0 1 1 : 1 1 0 1 $      truth: input 1 0 1 1 and state 1 1 0 1,
    scored:                         . . . . .      read at :, s_1, s_2, s_3 (where s_t is predicted)
    length=4, no cot:   P 1 0 1 1 : 1 $ $ $ $      truth: input and state, read at x_1 .. x_4
    scored:                         . .            (paper: everything after `:`)
    """

    @property
    def opening(self) -> str | None:
        return "P"

    def update(self, state: Any, x: Any) -> Any:
        return (state + x) % 2
