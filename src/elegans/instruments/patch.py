"""Patching attention: what a network can do when a head looks where it is told to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from elegans.instruments.base import Blocks, Layout, ReplicaInstrument
from elegans.instruments.patterns import NOWHERE, as_map, heads_of, ideals, maps_of, names_of
from elegans.specs import field, spec
from elegans.tasks.sampling import TaskData, draw_set
from elegans.training.run import Run
from elegans.training.step import scores
from elegans.types import Edit, Example


@spec
class Patch(ReplicaInstrument):
    """Loss, accuracy and exact match after a head's attention is replaced, and everything behind it computed anew.

    By `source`, what replaces it: a named pattern (see `instruments/patterns.py`; `uniform` says what is lost without the head's
    choice) at the queries of which it says something, or the maps that another network has on the same rows: `final`, this
    run at its end, `seed`, the next run of the cohort that differs in its seeds alone, at the same step (nothing where
    there is none). One row per source, layer and head; where both are null, all heads are replaced at once.

    `loss` in nats per scored token, `accuracy` a share of scored tokens, `exact_match` of rows, each beside its value without
    a patch (`base_`). Chance levels are the task's plateau and what `uniform` leaves; the ceiling of shares is 1, and a
    patch may raise them above the base. At a run's end, `final` changes nothing: a control.
    """

    patterns: tuple[str, ...] = field((), "patterns to patch in; empty: all")
    other: Literal["final", "seed"] | None = field(None, "another network whose maps to patch in")
    part: Literal["train", "validation", "test"] = field("test", "part of the split that rows are from")
    examples: int = field(256, "rows to measure on", ge=1, le=1_000_000)

    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array, other: Any = None) -> Blocks:
        rows = draw_set(run.task, self.part, key, self.examples, data)
        masks, target = jnp.asarray(_masks(run)), ideals(run, rows, names_of(run, self.patterns))

        def told(job: tuple[Array, Array]) -> dict[str, Array]:
            mine = target[:, job[0]]
            return patched(run, params, rows, jax.vmap(as_map)(mine)[:, None, None], mine != NOWHERE, job[1])

        patterns, places = target.shape[1], len(masks)
        made = jax.lax.map(told, (jnp.repeat(jnp.arange(patterns), places), jnp.tile(masks, (patterns, 1, 1))))
        if other is not None:
            maps, everywhere = maps_of(run, other, rows.tokens), jnp.ones(target[:, 0].shape, bool)
            theirs = jax.lax.map(lambda mask: patched(run, params, rows, maps, everywhere, mask), masks)
            made = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), made, theirs)
        shaped = {name: values.reshape(-1, places) for name, values in made.items()}
        base = {f"base_{name}": jnp.broadcast_to(values[0, 0], (len(values), places - 1)) for name, values in shaped.items()}
        known = jnp.isfinite(shaped["loss"][:, 1:])  # not so where there is no other network
        return {"patch": {k: jnp.where(known, v, jnp.nan) for k, v in ({k: v[:, 1:] for k, v in shaped.items()} | base).items()}}

    def partners(self, networks: Sequence[tuple[str, int]], runs: dict[str, Run]) -> list[int | None] | None:
        if self.other is None:
            return None
        if self.other == "final":
            last = {run: i for i, (run, _) in sorted(enumerate(networks), key=lambda n: n[1][1])}
            return [last[run] for run, _ in networks]
        alike: dict[tuple[int, str], list[int]] = {}
        groups = {i: dataclasses.replace(run, seed=0, data_seed=None, init_seed=None).id for i, run in runs.items()}
        for i, (run, step) in enumerate(networks):
            alike.setdefault((step, groups[run]), []).append(i)
        following = {i: j for same in alike.values() if len(same) > 1 for i, j in zip(same, same[1:] + same[:1], strict=True)}
        return [following.get(i) for i in range(len(networks))]

    def layouts(self, run: Run) -> dict[str, Layout]:
        sources = [*names_of(run, self.patterns), *([self.other] if self.other else [])]
        places = [layer | head for layer, head in itertools.product(*heads_of(run))] + [{"layer": None, "head": None}]
        return {"patch": Layout({}, [[{"source": s} for s in sources], places])}


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
    asked: Bool[Array, "row query"],
    mask: Bool[Array, "layer head"],
) -> dict[str, Float[Array, ""]]:
    """Scores of the rows with the maps of some heads in place of the network's own, at the queries asked for."""
    sites = [f"pattern.{layer['layer']}" for layer in heads_of(run)[0]]

    def edit_of(maps: Float[Array, "#layer #head query key"], asked: Bool[Array, " query"]) -> Edit:
        def edit(site: str, x: Any) -> Any:
            if site not in sites:
                return x
            i = sites.index(site)
            chosen = mask[i][:, None, None] & asked[None, :, None]
            return jnp.where(chosen, jnp.broadcast_to(maps, (*mask.shape, *maps.shape[2:]))[i].astype(x.dtype), x)

        return edit

    def one(tokens: Array, maps: Array, asked: Array) -> Array:
        return run.model.apply(params, tokens[:-1], edit=edit_of(maps, asked))[0]

    loss, metrics = scores(jax.vmap(one, axis_name="batch")(rows.tokens, maps, asked), rows)
    return {"loss": loss, **metrics}
