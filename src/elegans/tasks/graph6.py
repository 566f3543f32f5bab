"""Graphs from a file in graph6 format, as `geng` of nauty writes them (B. McKay, "Description of graph6")."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from elegans.errors import Invalid

HEADER = b">>graph6<<"
OFFSET = 63  # a byte is 63 + six bits, the most significant first; the first byte is 63 + the number of vertices
BLOCK = 1024  # labelled graphs looked at together
WANTED = "allowed: a graph6 file, one connected graph a line"


def read(path: str, vertices: int) -> np.ndarray:
    """The graphs of a file as bits [graph, edge], edges u < v in lexicographic order.

    Raises `Invalid`, naming the line, where the file is missing, a line is no graph6, a graph has
    another number of vertices, or a graph is not connected.
    """
    try:
        lines = Path(path).read_bytes().removeprefix(HEADER).split()
    except OSError as error:
        raise Invalid("graphs", path, f"{error.strerror}; {WANTED}") from None
    if not lines:
        raise Invalid("graphs", path, f"the file is empty; {WANTED}")
    _check_lines(path, lines, vertices)
    bits = decode(lines, vertices)
    lonely = np.flatnonzero(~reaches_all(adjacency_rows(bits, vertices)))
    if lonely.size:
        raise Invalid("graphs", path, f"line {lonely[0] + 1} is not connected; {WANTED}")
    return bits


def _check_lines(path: str, lines: list[bytes], vertices: int) -> None:
    edges = vertices * (vertices - 1) // 2
    for number, line in enumerate(lines, 1):
        found = line[0] - OFFSET
        spare = (line[-1] - OFFSET) & ((1 << -edges % 6) - 1)  # bits behind the last edge are zero
        if min(line) < OFFSET or max(line) > OFFSET + 63 or (found == vertices and (len(line) != 1 + -(-edges // 6) or spare)):
            raise Invalid("graphs", path, f"line {number} is no graph6; {WANTED}")
        if found != vertices:
            many = "63 or more" if found == 63 else found
            raise Invalid("graphs", path, f"line {number} has {many} vertices; allowed: vertices={vertices}")


def decode(lines: list[bytes], vertices: int) -> np.ndarray:
    """Bits [graph, edge], edges u < v in lexicographic order, of well-formed lines; up to 62 vertices.

    graph6 goes through the upper triangle column by column.
    """
    codes = np.frombuffer(b"".join(lines), np.uint8).reshape(len(lines), -1)[:, 1:] - OFFSET
    bits = np.unpackbits(codes[:, :, None], axis=2)[:, :, 2:].reshape(len(lines), -1)
    u, v = pairs(vertices).T
    return bits[:, v * (v - 1) // 2 + u].astype(bool)


def renamed(bits: np.ndarray, vertices: int) -> Iterator[np.ndarray]:
    """Every labelled graph that some graphs are under other names of their vertices, each once, in blocks: [graph, edge].

    Exchanges of two names that follow each other make every renaming.
    """
    u, v = pairs(vertices).T
    place = np.zeros((vertices, vertices), int)
    place[u, v] = place[v, u] = np.arange(len(u))
    swaps = [np.r_[:i, i + 1, i, i + 2 : vertices] for i in range(vertices - 1)]
    seen: set[bytes] = set()
    while len(bits):
        block, bits = np.unique(bits[:BLOCK], axis=0), bits[BLOCK:]
        new = block[[row.tobytes() not in seen for row in block]]
        seen |= {row.tobytes() for row in new}
        yield new
        bits = np.concatenate([bits, *(new[:, place[swap[u], swap[v]]] for swap in swaps)])


def pairs(vertices: int) -> np.ndarray:
    """Every pair u < v, in lexicographic order: [edge, 2]."""
    return np.stack(np.triu_indices(vertices, 1), 1).astype(np.int32)


def adjacency_rows(bits: np.ndarray, vertices: int) -> np.ndarray:
    """The neighbours of every vertex as one number, bit j for vertex j: [graph, vertex]."""
    square = np.zeros((len(bits), vertices, vertices), bool)
    u, v = pairs(vertices).T
    square[:, u, v] = square[:, v, u] = bits
    return (square << np.arange(vertices, dtype=np.int64)).sum(-1)


def reaches_all(rows: np.ndarray) -> np.ndarray:
    """Which graphs are connected, from their rows: [graph]."""
    reached = np.ones(len(rows), np.int64)  # vertex 0
    for _ in range(rows.shape[1] - 1):
        steps = np.where(reached[:, None] >> np.arange(rows.shape[1]) & 1, rows, 0)
        reached |= np.bitwise_or.reduce(steps, 1)
    return reached == (1 << rows.shape[1]) - 1
