"""Ablation: what the network loses when one feature's direction is taken out of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elegans.instruments.base import Blocks, Layout, ReplicaInstrument
from elegans.instruments.probe import Probes, Reads, features_of, fit, reads, sites_of, vectors, with_random_labels
from elegans.specs import field, spec
from elegans.tasks.sampling import TaskData, draw_set
from elegans.training.run import Run
from elegans.training.step import scores
from elegans.types import Edit, Example


@spec
class Ablate(ReplicaInstrument):
    """Loss and exact match after a feature's direction is removed wherever the feature is read.

    For every read, the site of `family` whose probe has the lowest training loss is chosen; there, in every forward
    pass, x <- x - (w.x + b) w with unit w, which moves x onto the probe's decision plane. `loss` in nats
    per scored token (`base_loss` without ablation, and chance is the task's plateau), `exact_match` a share
    of test rows (`base_exact_match` is the ceiling). Controls, by `direction`: `random`, the same with random
    unit directions and b = 0; `matched`, a step along a random direction as long as the feature's own;
    `labels`, the direction of a probe fitted to random labels. `draw` counts a control's repetitions.
    """

    features: tuple[str, ...] = field((), "features to ablate; empty: all binary ones")
    family: str = field("resid", "family of sites to ablate at; see Model.probed_sites")
    fit: int = field(2048, "examples to fit the probes on", ge=2, le=1_000_000)
    test: int = field(512, "rows to measure on", ge=1, le=1_000_000)
    draws: int = field(16, "random directions of each control", ge=1, le=1024)
    c: float = field(100.0, "inverse strength of the probes' L2 penalty", gt=0)

    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array) -> Blocks:
        keys = jax.random.split(key, 2)
        train, test = (
            draw_set(run.task, p, k, n, data) for p, k, n in zip(("validation", "test"), keys, (self.fit, self.test), strict=True)
        )
        seen = vectors(run, params, train, sites_of(run, (self.family,)))
        names = features_of(run, self.features)
        return {n: self._feature(run, params, reads(seen, train, n), test, n, jax.random.fold_in(key, i)) for i, n in enumerate(names)}

    def _feature(self, run: Run, params: Any, r: Reads, test: Example, name: str, key: jax.Array) -> dict[str, Float[Array, " direction"]]:
        for_labels, for_random = jax.random.split(key)
        true, wrong = _best(fit(with_random_labels(for_labels, r), self.c))
        random = jax.random.normal(for_random, (self.draws, *true.w.shape))
        random = random / jnp.linalg.norm(random, axis=-1, keepdims=True)
        nothing = Removal(true.layer, jnp.zeros_like(true.w), jnp.zeros_like(true.w), jnp.zeros_like(true.b))
        along = [Removal(true.layer, u, u, nothing.b) for u in random]
        matched = [true._replace(u=u) for u in random]
        removals = jax.tree.map(lambda *v: jnp.stack(v), nothing, true, *along, *matched, wrong)
        sites = sites_of(run, (self.family,))
        found = jax.lax.map(lambda removal: _measure(run, params, test, name, sites, removal), removals)
        base = {f"base_{k}": jnp.broadcast_to(v[0], v[1:].shape) for k, v in found.items()}
        return {k: v[1:] for k, v in found.items()} | base

    def layouts(self, run: Run) -> dict[str, Layout]:
        counts = {"feature": 1, "random": self.draws, "matched": self.draws, "labels": 1}
        entries = [{"direction": d, "draw": i} for d, n in counts.items() for i in range(n)]
        return {name: Layout({"feature": name, "method": "projection"}, [entries]) for name in features_of(run, self.features)}


class Removal(NamedTuple):
    """The edit x <- x - (w.x + b) u at every read, at the site chosen for it; u = w removes the direction w."""

    layer: Int[Array, " read"]
    w: Float[Array, "read d_model"]
    u: Float[Array, "read d_model"]
    b: Float[Array, " read"]

    def edit(self, sites: tuple[str, ...], positions: Int[Array, " read"]) -> Edit:
        """The edit for an example whose reads stand at these positions (-1: not there)."""

        def edit(site: str, x: Any) -> Any:
            if site not in sites:
                return x
            here = (self.layer == sites.index(site)) & (positions >= 0)
            place = jax.nn.one_hot(positions, x.shape[0]) * here[:, None]  # [read, position]; reads of a feature stand apart
            w, u, b = (jnp.einsum("rp,r...->p...", place, v, precision="highest") for v in (self.w, self.u, self.b))
            return (x - ((x * w).sum(-1) + b)[:, None] * u).astype(x.dtype)

        return edit


def _best(probes: Probes) -> list[Removal]:
    """For every set of labels, the removal at the site whose probe has the lowest training loss, read by read."""
    made = []
    for loss, w, b in zip(probes.loss, probes.w, probes.b, strict=True):
        layer = jnp.argmin(loss, 0)
        direction = jnp.take_along_axis(w, layer[None, :, None], 0)[0]
        norm = jnp.maximum(jnp.linalg.norm(direction, axis=-1, keepdims=True), 1e-12)
        unit = direction / norm
        made.append(Removal(layer, unit, unit, jnp.take_along_axis(b, layer[None], 0)[0] / norm[:, 0]))
    return made


def _measure(run: Run, params: Any, rows: Example, feature: str, sites: tuple[str, ...], removal: Removal) -> dict[str, Float[Array, ""]]:
    """Scores of the network with an edit at every read of a feature."""

    def one(tokens: Array, positions: Array) -> Array:
        return run.model.apply(params, tokens[:-1], edit=removal.edit(sites, positions))[0]

    logits = jax.vmap(one, axis_name="batch")(rows.tokens, rows.truth[feature].positions)
    loss, metrics = scores(logits, rows)
    return {"loss": loss, "exact_match": metrics["exact_match"], "accuracy": metrics["accuracy"]}
