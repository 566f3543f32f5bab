"""Every algorithmic language once more, in plain Python, from its written rules.

An oracle reads the symbols of a prompt, up to and including `=`, and says what the whole row must
be: its symbols, which of them are scored, and each named intermediate value with the token (counted
from 0) at which it is read. A prompt that its language could not have drawn raises `AssertionError`.
"""

from __future__ import annotations

from collections.abc import Callable

from oracles_graphs import GRAPH_ORACLES
from oracles_sequences import END, EQUALS, SEQUENCE_ORACLES, Reads, Row

__all__ = ["END", "EQUALS", "ORACLES", "Reads", "Row"]

ORACLES: dict[str, Callable[..., Row]] = {**SEQUENCE_ORACLES, **GRAPH_ORACLES}
