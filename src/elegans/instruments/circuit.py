"""Circuit scores: which head looks where a known circuit would."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from elegans.instruments.base import Blocks, Layout, ReplicaInstrument
from elegans.instruments.patterns import EVERYWHERE, NOWHERE, as_map, by_length, heads_of, ideals, length_axis, maps_of, names_of
from elegans.specs import field, spec
from elegans.tasks.sampling import TaskData, draw_set
from elegans.training.run import Run


@spec
class Circuit(ReplicaInstrument):
    """Every head's attention against every named pattern (see `instruments/patterns.py`), on rows drawn for the run.

    For a query and the key that the pattern names, a is the attention that the key gets (for `uniform`, which names all:
    1 less the total variation distance to it). Per pattern, layer, head and number of inputs of the rows (`length`, null
    where rows have none or `by_length` is off), of a mixture also on the rows of each task apart (pattern `parity.iteration_2`):
      attention   mean of a over rows and queries. Chance: `chance`, what a head gets whose attention is uniform; ceiling 1
      peakiness   share of (row, query) with a > 0.5. Chance 0: a uniform head gives half at most (`uniform` itself: 1); ceiling 1
      invariance  1 - mean over queries of the standard deviation of a over rows. 1: the content of a row does not matter, which
                  is so of a uniform head too; at least 0.5. Null for fewer than two rows
    """

    patterns: tuple[str, ...] = field((), "patterns to score; empty: all")
    part: Literal["train", "validation", "test"] = field("test", "part of the split that rows are from")
    examples: int = field(512, "rows, of all lengths together", ge=1, le=1_000_000)
    by_length: bool = field(True, "each length of row apart")

    def named(self, run: Run) -> dict[str, tuple[str, ...]]:
        return {"patterns": names_of(run)}

    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array) -> Blocks:
        rows = draw_set(run.task, self.part, key, self.examples, data)
        target = ideals(run, rows, names_of(run, self.patterns))  # [row, pattern, query]
        flat = as_map(jnp.full(target.shape[2], EVERYWHERE))[None, None]
        ideal = jax.vmap(jax.vmap(as_map))(target)
        a = jax.vmap(overlap)(maps_of(run, params, rows.tokens), ideal)
        chance = jax.vmap(lambda of: overlap(flat, of)[0, 0])(ideal)
        groups = by_length(run, rows) if self.by_length else jnp.ones((1, self.examples), bool)
        counted = (target != NOWHERE) & rows.scored.any(1)[:, None, None]
        made = jax.lax.map(lambda group: summary(a, chance, counted & group[:, None, None]), groups)
        return {"circuit": made}

    def layouts(self, run: Run) -> dict[str, Layout]:
        lengths = length_axis(run) if self.by_length else [{"length": None}]
        patterns = [{"pattern": name} for name in names_of(run, self.patterns)]
        return {"circuit": Layout({}, [lengths, *heads_of(run), patterns])}


def overlap(
    maps: Float[Array, "layer head query key"], ideal: Float[Array, "pattern query key"]
) -> Float[Array, "layer head pattern query"]:
    """The attention that two maps have in common, 1 - total variation distance: what the one key of an ideal map gets."""
    return jnp.minimum(maps[:, :, None], ideal).sum(-1)


def summary(
    a: Float[Array, "row layer head pattern query"], chance: Float[Array, "row pattern query"], counted: Bool[Array, "row pattern query"]
) -> dict[str, Float[Array, "layer head pattern"]]:
    """Scores over the counted rows and queries; NaN where there are none."""
    weight = counted.astype(jnp.float32)[:, None, None]
    rows = weight.sum(0)  # [1, 1, pattern, query]
    number = rows.sum(-1)
    some = jnp.where(number > 0, number, jnp.nan)
    mean = (a * weight).sum(0) / jnp.maximum(rows, 1)
    spread = jnp.sqrt((weight * (a - mean) ** 2).sum(0) / jnp.maximum(rows, 1))
    several = rows > 1
    places = several.sum(-1)
    made = {
        "attention": (a * weight).sum((0, 4)) / some,
        "peakiness": ((a > 0.5) * weight).sum((0, 4)) / some,
        "invariance": 1 - (spread * several).sum(-1) / jnp.where(places > 0, places, jnp.nan),
        "chance": (chance[:, None, None] * weight).sum((0, 4)) / some,
    }
    return {name: jnp.broadcast_to(values, a.shape[1:4]) for name, values in made.items()}
