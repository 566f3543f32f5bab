"""Patching attention: what a network can do when a head looks where it is told to."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from elegans.instruments.base import Blocks, Layout, ReplicaInstrument, those
from elegans.instruments.patterns import NOWHERE, as_map, heads_of, ideals, maps_of, names_of
from elegans.specs import field, flat, spec, to_dict
from elegans.tasks.sampling import TaskData, draw_set
from elegans.training.run import Run, unseeded
from elegans.training.step import scores
from elegans.types import Edit, Example

CIRCUIT, WHOLE = "circuit", ("iteration_1", "iteration_2")  # of the first layer, and of the last


@spec
class Patch(ReplicaInstrument):
    """Loss, accuracy and exact match after a head's attention is replaced, and everything behind it computed anew.

    By `source`, what replaces it: a named pattern (see `instruments/patterns.py`; `uniform` says what is lost without the head's
    choice) at the queries of which it says something (iteration_1: not at EoI, which keeps its own), or the maps that another
    network has on the same rows: `final`, this run at its end, `seed`, the next run of the cohort that differs in seeds alone,
    its own or its parents', at the same step (nothing where there is none). One row per source, layer and head; where both are
    null, all heads are replaced at once.

    The source `circuit` is the whole circuit of iteration, and has that last row alone: iteration_1 in every head of the first
    layer, iteration_2 in every head of the last, each at its own queries, and the layers between as they are. It says whether
    attention is all that is missing. Defined where both patterns are and there are two layers or more.

    `loss` in nats per scored token, `accuracy` a share of scored tokens, `exact_match` of rows, each beside its value without
    a patch (`base_`). Chance levels are the task's plateau and what `uniform` leaves; the ceiling of shares is 1, and a
    patch may raise them above the base. At a run's end, `final` changes nothing: a control.
    """

    patterns: tuple[str, ...] = field((), "patterns to patch in, and `circuit`; empty: all")
    other: Literal["final", "seed"] | None = field(None, "another network whose maps to patch in")
    part: Literal["train", "validation", "test"] = field("test", "part of the split that rows are from")
    examples: int = field(256, "rows to measure on", ge=1, le=1_000_000)

    def named(self, run: Run) -> dict[str, tuple[str, ...]]:
        return {"patterns": self._sources(run, ())}

    def _sources(self, run: Run, asked: tuple[str, ...]) -> tuple[str, ...]:
        """The patterns of those asked for, or all, and behind them the whole circuit where it is defined and asked for."""
        known = names_of(run)
        whole = (CIRCUIT,) if set(WHOLE) <= set(known) and len(heads_of(run)[0]) > 1 else ()
        asked = tuple(sorted(asked, key=lambda name: name == CIRCUIT))
        return those(asked, known + whole)

    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array, other: Any = None) -> Blocks:
        rows, masks = draw_set(run.task, self.part, key, self.examples, data), jnp.asarray(_masks(run))
        names = self._sources(run, self.patterns)
        patterns, made = tuple(name for name in names if name != CIRCUIT), []
        if patterns:
            made.append(_each_pattern(run, params, rows, patterns, masks))
        if CIRCUIT in names:
            maps, asked = _whole_circuit(run, rows, masks.shape[1])
            ends = jax.lax.map(lambda mask: patched(run, params, rows, maps, asked, mask), masks[jnp.array([0, -1])])
            made.append({k: jnp.full(len(masks), jnp.nan).at[jnp.array([0, -1])].set(v) for k, v in ends.items()})
        if other is not None:
            maps, everywhere = maps_of(run, other, rows.tokens), jnp.ones((self.examples, 1, rows.tokens.shape[1] - 1), bool)
            made.append(jax.lax.map(lambda mask: patched(run, params, rows, maps, everywhere, mask), masks))
        shaped = {name: jnp.concatenate([each[name] for each in made]).reshape(-1, len(masks)) for name in made[0]}
        return {"patch": _beside_base(shaped)}

    def partners(self, networks: Sequence[tuple[str, int]], runs: dict[str, Run]) -> list[int | None] | None:
        if self.other is None:
            return None
        if self.other == "final":
            last = {run: i for i, (run, _) in sorted(enumerate(networks), key=lambda n: n[1][1])}
            return [last[run] for run, _ in networks]
        alike: dict[tuple[int, str], list[int]] = {}
        groups = {i: json.dumps(unseeded(flat(to_dict(run))), sort_keys=True) for i, run in runs.items()}
        for i, (run, step) in enumerate(networks):
            alike.setdefault((step, groups[run]), []).append(i)
        following = {i: j for same in alike.values() if len(same) > 1 for i, j in zip(same, same[1:] + same[:1], strict=True)}
        return [following.get(i) for i in range(len(networks))]

    def layouts(self, run: Run) -> dict[str, Layout]:
        sources = [*self._sources(run, self.patterns), *([self.other] if self.other else [])]
        places = [layer | head for layer, head in itertools.product(*heads_of(run))] + [{"layer": None, "head": None}]
        return {"patch": Layout({}, [[{"source": s} for s in sources], places])}


Scores = dict[str, Float[Array, "..."]]


def _each_pattern(run: Run, params: Any, rows: Example, names: tuple[str, ...], masks: Bool[Array, "place layer head"]) -> Scores:
    """Scores of every pattern at every place, pattern after pattern."""
    target = ideals(run, rows, names)

    def told(job: tuple[Array, Array]) -> Scores:
        mine = target[:, job[0]]
        return patched(run, params, rows, jax.vmap(as_map)(mine)[:, None, None], (mine != NOWHERE)[:, None], job[1])

    return jax.lax.map(told, (jnp.repeat(jnp.arange(len(names)), len(masks)), jnp.tile(masks, (len(names), 1, 1))))


def _whole_circuit(run: Run, rows: Example, layers: int) -> tuple[Float[Array, "row layer 1 query key"], Bool[Array, "row layer query"]]:
    """The ideal map of every layer, and at which queries it is one: none of the layers between the first and the last."""
    first, last = jnp.moveaxis(ideals(run, rows, WHOLE), 1, 0)
    target = jnp.stack([first, *[jnp.full_like(first, NOWHERE)] * (layers - 2), last], 1)
    return jax.vmap(jax.vmap(as_map))(target)[:, :, None], target != NOWHERE


def _beside_base(found: dict[str, Float[Array, "source place"]]) -> dict[str, Float[Array, "source place-1"]]:
    """Scores at all places but the first, where nothing is replaced, beside that; missing where there was no map."""
    base = {f"base_{name}": jnp.broadcast_to(v[0, 0], (len(v), v.shape[1] - 1)) for name, v in found.items()}
    known = jnp.isfinite(found["loss"][:, 1:])
    return {k: jnp.where(known, v, jnp.nan) for k, v in ({k: v[:, 1:] for k, v in found.items()} | base).items()}


def _masks(run: Run) -> Bool[np.ndarray, "place layer head"]:
    """Which heads to replace: none, each, all."""
    shape = tuple(map(len, heads_of(run)))
    each = np.eye(int(np.prod(shape)), dtype=bool).reshape(-1, *shape)
    return np.concatenate([np.zeros((1, *shape), bool), each, np.ones((1, *shape), bool)])


def patched(
    run: Run,
    params: Any,
    rows: Example,
    maps: Float[Array, "row #layer #head query key"],
    asked: Bool[Array, "row #layer query"],
    mask: Bool[Array, "layer head"],
) -> dict[str, Float[Array, ""]]:
    """Scores of the rows with the maps of some heads in place of the network's own, at the queries asked for in their layer."""
    sites = [f"pattern.{layer['layer']}" for layer in heads_of(run)[0]]

    def edit_of(maps: Float[Array, "#layer #head query key"], asked: Bool[Array, "#layer query"]) -> Edit:
        def edit(site: str, x: Any) -> Any:
            if site not in sites:
                return x
            i = sites.index(site)
            chosen = (mask[:, :, None] & asked[:, None])[i][..., None]
            return jnp.where(chosen, jnp.broadcast_to(maps, (*mask.shape, *maps.shape[2:]))[i].astype(x.dtype), x)

        return edit

    def one(tokens: Array, maps: Array, asked: Array) -> Array:
        return run.model.apply(params, tokens[:-1], edit=edit_of(maps, asked))[0]

    loss, metrics = scores(jax.vmap(one, axis_name="batch")(rows.tokens, maps, asked), dataclasses.replace(rows, weights=None))
    return {"loss": loss, **metrics}
