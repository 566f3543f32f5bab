"""Dynamics: how sharp attention is, how long the weights are, and which part of the loss is left."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from elegans.instruments.base import Blocks, Layout, ReplicaInstrument
from elegans.instruments.patterns import by_length, heads_of, length_axis, maps_of
from elegans.specs import field, spec
from elegans.tasks.sampling import TaskData, draw_set
from elegans.training.run import Run
from elegans.training.step import logits_of, shapes_of, token_losses
from elegans.training.vectors import path_name
from elegans.types import Example


@spec
class Dynamics(ReplicaInstrument):
    """What changes in a network while it trains, on rows drawn for the run. Three kinds of rows, by the column `of`:

      attention  per layer and head, means over queries that predict a scored token: `entropy` of the attention in nats (0: one
                 key gets all; ceiling `uniform`, that of a uniform head), `peak`, the largest share that a key gets (ceiling 1)
      weights    per named array (`array`): `norm`, the root of the sum of its squares; no chance level
      loss       per number of inputs (`length`, null where rows have none) and `position` of the predicted token: `loss` in nats
                 per scored token. Floor and chance level are the task's floor and plateau, which are means over all positions
    Columns of the other kinds are null.
    """

    part: Literal["train", "validation", "test"] = field("test", "part of the split that rows are from")
    examples: int = field(512, "rows, of all lengths together", ge=1, le=1_000_000)

    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array) -> Blocks:
        rows = draw_set(run.task, self.part, key, self.examples, data)
        nats = token_losses(logits_of(run, params, rows.tokens), rows.tokens)
        counts = by_length(run, rows)[:, :, None] & rows.scored[:, 1:]
        number = counts.sum(1)
        loss = jnp.einsum("gnp,np->gp", counts.astype(jnp.float32), nats, precision="highest")
        norms = [jnp.sqrt((w.astype(jnp.float32) ** 2).sum()) for w in jax.tree.leaves(params)]
        return {
            "attention": sharpness(maps_of(run, params, rows.tokens), rows),
            "weights": {"norm": jnp.stack(norms)},
            "loss": {"loss": loss / jnp.where(number > 0, number, jnp.nan)},
        }

    def layouts(self, run: Run) -> dict[str, Layout]:
        arrays = [{"array": path_name(path)} for path, _ in jax.tree_util.tree_flatten_with_path(shapes_of(run))[0]]
        positions = [{"position": p} for p in range(1, run.task.positions)]
        return {
            "attention": Layout({"of": "attention"}, heads_of(run)),
            "weights": Layout({"of": "weights"}, [arrays]),
            "loss": Layout({"of": "loss"}, [length_axis(run), positions]),
        }


def sharpness(maps: Float[Array, "row layer head query key"], rows: Example) -> dict[str, Float[Array, "layer head"]]:
    """Mean entropy (nats) and mean largest share of attention, over queries that predict a scored token."""
    weight = rows.scored[:, 1:].astype(jnp.float32)

    def mean(values: Float[Array, "row layer head query"]) -> Float[Array, "layer head"]:
        return jnp.einsum("nq,nlhq->lh", weight, values, precision="highest") / weight.sum()

    entropy = jax.scipy.special.entr(maps).sum(-1)  # 0 where a share is 0
    uniform = jnp.broadcast_to(jnp.log(jnp.arange(1, maps.shape[-1] + 1)), entropy.shape)
    return {"entropy": mean(entropy), "peak": mean(maps.max(-1)), "uniform": mean(uniform)}
