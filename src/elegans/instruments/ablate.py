"""Ablation: what the network loses when one feature's directions are taken out of it."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from elegans.errors import Invalid
from elegans.instruments.base import Blocks, Layout, ReplicaInstrument
from elegans.instruments.linear import Probes, mean_of, one_by_one
from elegans.instruments.probe import Reads, features_of, fit, halves, meeting, reads, sites_of, vectors, with_random_labels
from elegans.specs import field, spec
from elegans.tasks.sampling import TaskData, draw_set
from elegans.training.run import Run
from elegans.training.step import tallies
from elegans.types import Edit, Example

BOOTSTRAPS = 1000
SAME = 1e-3  # squared length below which a combination of unit directions is none of its own


@spec
class Ablate(ReplicaInstrument):
    """Loss and exact match after a feature's directions are removed wherever the feature is read.

    For every read, the site of `family` whose probes have the lowest training loss is chosen; there, in every forward
    pass, the component of x in the span of the feature's probe directions (one, or as many as there are labels or
    classes, made orthonormal; those of reads at one position and site together) is replaced, by `method`:
      projection  by the point where every probe is undecided, for one probe x <- x - (w.x + b) w with unit w
                  (a number: where it predicts the mean)
      mean        by its mean over the examples that the probes were fitted to (a number: the same as projection)
      resample    by that of another test example, at the same read (its mean, where that example has no such read)

    `loss` in nats per scored token (`base_loss` without ablation, chance is the task's plateau), `exact_match` a share
    of test rows (`base_exact_match` is the ceiling); `_low` and `_high` bound their 95 % interval over test rows
    (Bayesian bootstrap; that of an exact match of 0 or 1 has no width). Controls, by `direction`: `random`, the same with
    random directions, projected to 0; `matched`, a step along random directions as long as the feature's own; `labels`, one along
    the directions of probes fitted to random labels at the same site. `draw` counts a control's repetitions.
    """

    features: tuple[str, ...] = field((), "features to ablate; empty: all")
    family: str = field("resid", "family of sites to ablate at; see Model.probed_sites")
    methods: tuple[Literal["projection", "mean", "resample"], ...] = field(("projection",), "each costs as much as all of the first")
    fit: int = field(2048, "examples to fit the probes on", ge=2, le=1_000_000)
    test: int = field(512, "rows to measure on", ge=1, le=1_000_000)
    draws: int = field(16, "random directions of each control", ge=1, le=1024)
    c: float = field(100.0, "inverse strength of the probes' L2 penalty", gt=0)

    def check(self) -> None:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise Invalid("methods", self.methods, "allowed: one or more, each once")

    def named(self, run: Run) -> dict[str, tuple[str, ...]]:
        return {"features": features_of(run, ()), "family": tuple(run.model.probed_sites())}

    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array) -> Blocks:
        keys = jax.random.split(key, 4)
        parts = ("validation", self.fit), ("test", self.test)
        train, test = (draw_set(run.task, p, k, n, data) for (p, n), k in zip(parts, keys, strict=False))
        sites = sites_of(run, (self.family,))
        seen, other = vectors(run, params, train, sites), None
        if "resample" in self.methods:
            shift = jax.random.randint(keys[2], (), 1, self.test)  # rows are independent: any other one is a random one
            rolled = jax.tree.map(lambda a: jnp.roll(a, shift, 0), test)
            other = rolled, vectors(run, params, rolled, sites)
        made, names = {}, features_of(run, self.features)
        joint = meeting(run, names)
        for i, name in enumerate(names):
            asked = Asked(name, sites, name in joint, other and reads(run, other[1], other[0], name))
            removals, for_bounds = self._planned(reads(run, seen, train, name), jax.random.fold_in(keys[3], i))
            rows = jax.lax.map(lambda removal, asked=asked: measured(run, params, test, asked, removal), removals)
            made[name] = self._summary(rows, for_bounds)
        return made

    def _planned(self, r: Reads, key: jax.Array) -> tuple[Removal, jax.Array]:
        """No removal, then all of each method, stacked; and a key for what follows."""
        for_labels, for_random, for_bounds = jax.random.split(key, 3)
        both = with_random_labels(for_labels, r)
        (true_probes, wrong_probes), (y, wrong_y) = halves(fit(both, self.c)), halves(both.y)
        true = best(true_probes, r._replace(y=y))
        wrong = found_at(true.layer, wrong_probes, r._replace(y=wrong_y))
        nothing = Removal(true.layer, *(jnp.zeros_like(a) for a in (true.basis, true.basis, true.plane, true.layer[0], true.basis)))
        removals = [nothing] + [removal for method in self.methods for removal in self._removals(method, true, wrong, for_random)]
        return jax.tree.map(lambda *v: jnp.stack(v), *removals), for_bounds

    def _summary(self, rows: dict[str, Float[Array, "removal row"]], key: jax.Array) -> dict[str, Float[Array, "method direction"]]:
        found = summary(rows, key)
        base = {f"base_{k}": jnp.broadcast_to(found[k][0], found[k][1:].shape) for k in ("loss", "exact_match", "accuracy")}
        shape = len(self.methods), len(self._directions())
        return {k: v.reshape(shape) for k, v in ({k: v[1:] for k, v in found.items()} | base).items()}

    def _removals(self, method: str, true: Found, wrong: Found, key: jax.Array) -> list[Removal]:
        """One for each of `_directions`, in the same order."""
        drawn = jax.random.normal(key, (self.draws, *true.basis.shape))  # not unit: scaled by orthonormal
        spread = jnp.abs(true.basis).max(-2, keepdims=True) > 0  # as many dimensions as the feature's own
        random = [q * spread for q in jax.vmap(lambda u: orthonormal(u, true.plane)[0])(drawn)]
        own, other = true.basis, wrong.basis

        def removal(w: Array, u: Array, plane: Array) -> Removal:
            target = plane if method == "projection" else jnp.einsum("rd,rdm->rm", true.mean, w, precision="highest")
            return Removal(true.layer, w, u, target, jnp.asarray(method == "resample", true.layer.dtype), own)

        by_chance = [removal(u, u, jnp.zeros_like(true.plane)) for u in random]
        return [removal(own, own, true.plane), *by_chance, *(removal(own, u, true.plane) for u in (*random, other))]

    def _directions(self) -> list[dict[str, Any]]:
        counts = {"feature": 1, "random": self.draws, "matched": self.draws, "labels": 1}
        return [{"direction": d, "draw": i} for d, n in counts.items() for i in range(n)]

    def layouts(self, run: Run) -> dict[str, Layout]:
        axes = [[{"method": m} for m in self.methods], self._directions()]
        features = features_of(run, self.features) if sites_of(run, (self.family,)) else ()
        return {name: Layout({"feature": name}, axes) for name in features}


class Found(NamedTuple):
    """Where a feature is read best, at every read."""

    layer: Int[Array, " read"]  # which of the family's sites
    basis: Float[Array, "read d_model dim"]  # orthonormal, or zero where directions are fewer
    plane: Float[Array, "read dim"]  # the component at which every probe is undecided
    mean: Float[Array, "read d_model"]  # of the vectors fitted to


class Removal(NamedTuple):
    """The edit x <- x - u (w'x - target) at every read, at the site chosen for it; u = w replaces the component along w."""

    layer: Int[Array, " read"]
    w: Float[Array, "read d_model dim"]
    u: Float[Array, "read d_model dim"]
    target: Float[Array, "*row read dim"]
    resample: Int[Array, ""]  # 1: the target is the component of another example, where it has one
    own: Float[Array, "read d_model dim"]  # the feature's directions, however many of which are independent so many are replaced

    def joined(self, positions: Int[Array, " read"]) -> Removal:
        """The same for an example whose reads stand at these positions: reads at one position and site are one, the first of them.

        Its directions are those of all, orthonormal: edits along correlated ones, each by itself, would add up to no projection.
        """
        same = (positions[:, None] == positions) & (self.layer[:, None] == self.layer)
        group = same & (same.argmax(1) == jnp.arange(len(positions)))[:, None]  # [first, member]

        def joint(w: Array, b: Array) -> tuple[Array, Array]:
            members = group[:, None, :, None] * w.swapaxes(0, 1)
            return orthonormal(members.reshape(*w.shape[:2], -1), (group[..., None] * b).reshape(len(w), -1))

        (w, target), (u, _), (own, _) = (joint(a, -self.target) for a in (self.w, self.u, self.own))
        spread = jnp.abs(own).max(-2, keepdims=True) > 0
        return self._replace(w=w * spread, u=u * spread, target=target, own=own)

    def edit(self, sites: tuple[str, ...], positions: Int[Array, " read"]) -> Edit:
        """The edit for an example whose reads stand at these positions (-1: not there)."""

        def moved(site: int, x: Any) -> Any:
            here = (self.layer == site) & (positions >= 0)
            place = jax.nn.one_hot(positions, x.shape[0]) * here[:, None]  # [read, position]; they stand apart, or are joined
            with jax.default_matmul_precision("highest"):
                part = jnp.einsum("rd,rdm->rm", place @ x.astype(jnp.float32), self.w[:, : x.shape[1]]) - self.target
                return x - (place.T @ jnp.einsum("rm,rdm->rd", part, self.u[:, : x.shape[1]])).astype(x.dtype)

        def edit(site: str, x: Any) -> Any:
            if site in sites:
                return moved(sites.index(site), x)
            heads = [i for i, s in enumerate(sites) if s.rpartition(".")[0] == site]
            return jnp.stack([moved(i, x[:, h]) for h, i in enumerate(heads)], 1) if heads else x

        return edit


def best(probes: Probes, r: Reads) -> Found:
    """Read by read, the site whose probes have the lowest mean training loss, and the span of their directions."""
    return found_at(jnp.argmin(probes.loss.mean(0), 0), probes, r)


def found_at(layer: Int[Array, " read"], probes: Probes, r: Reads) -> Found:
    """The span of probes' directions at some sites, read by read."""
    w = jnp.take_along_axis(probes.w, layer[None, None, :, None], 1)[:, 0]  # [label, read, d_model]
    b = jnp.take_along_axis(probes.b, layer[None, None], 1)[:, 0]
    there = r.counted > 0
    varies = (jnp.where(there, r.y, -jnp.inf).max(-1) > jnp.where(there, r.y, jnp.inf).min(-1))[..., None]  # else w is rounding
    norm = jnp.maximum(jnp.linalg.norm(w, axis=-1, keepdims=True), 1e-12)
    basis, plane = orthonormal(jnp.moveaxis(varies * w / norm, 0, -1), (b / norm[..., 0]).T)
    at = jnp.take_along_axis(r.x, layer[None, :, None, None], 0)[0]
    mean = jax.vmap(mean_of)(at, r.counted)
    plane = jnp.einsum("rd,rdm->rm", mean, basis, precision="highest") if r.kind == "number" else plane
    return Found(layer, basis, plane, mean)


def orthonormal(
    w: Float[Array, "read d_model dim"], b: Float[Array, "read dim"]
) -> tuple[Float[Array, "read d_model dim"], Float[Array, "read dim"]]:
    """An orthonormal basis of the span of some unit directions, and the component along it at which every w'x + b is 0.

    By the eigenvectors of w'w, where a label that never varies (w = 0) and repeated ones leave columns of zeros: a QR
    decomposition would fill them up with arbitrary directions. Where planes have no common point: the nearest one.
    """
    with jax.default_matmul_precision("highest"):
        size, turn = jax.vmap(one_by_one(jnp.linalg.eigh))(jnp.swapaxes(w, -1, -2) @ w)
        scale = jnp.where(size > SAME, jax.lax.rsqrt(jnp.maximum(size, SAME)), 0.0)
        basis = (w @ turn) * scale[..., None, :]
        return basis, -jnp.einsum("rlm,rl->rm", turn, b) * scale


class Asked(NamedTuple):
    """What all removals of a feature have in common."""

    feature: str
    sites: tuple[str, ...]
    joint: bool = False  # reads may share a position, in any of the rows
    donors: Reads | None = None  # those of the examples that lend their components


def measured(run: Run, params: Any, rows: Example, asked: Asked, removal: Removal) -> dict[str, Float[Array, " row"]]:
    """What is counted in every row, with an edit at every read of a feature: `tokens` and `rows` what is scored, `loss` in nats."""
    donors, positions = asked.donors, rows.truth[asked.feature].positions
    target = jnp.broadcast_to(removal.target, (len(rows.tokens), *removal.target.shape))
    if donors is not None:
        at = jnp.take_along_axis(donors.x, removal.layer[None, :, None, None], 0)[0]
        found = jnp.einsum("rnd,rdm->nrm", at, removal.w, precision="highest")
        target = jnp.where((removal.resample * donors.counted.T > 0)[..., None], found, target)

    def one(tokens: Array, positions: Array, target: Array) -> Array:
        mine = removal._replace(target=target)
        edit = (mine.joined(positions) if asked.joint else mine).edit(asked.sites, positions)
        return run.model.apply(params, tokens[:-1], edit=edit)[0]

    nats, right, counted, exact = tallies(jax.vmap(one, axis_name="batch")(rows.tokens, positions, target), rows)
    by_token = {"loss": nats * counted, "accuracy": right, "tokens": counted}
    made = {name: values.sum(1) for name, values in by_token.items()} | {"exact_match": exact, "rows": counted.any(1)}
    return {name: values.astype(jnp.float32) for name, values in made.items()}


def summary(rows: dict[str, Float[Array, "removal row"]], key: jax.Array) -> dict[str, Float[Array, " removal"]]:
    """Scores of a set from what is counted in its rows, with 95 % intervals.

    The rows are weighted anew 1000 times (Rubin 1981, "The Bayesian bootstrap"): one product, nothing to gather.
    """
    again = jax.random.exponential(key, (BOOTSTRAPS, rows["rows"].shape[1]))
    weights = jnp.concatenate([jnp.ones_like(again[:1]), again]).T  # the first: every row once
    made = {}
    for name, counts in (("loss", "tokens"), ("exact_match", "rows"), ("accuracy", "tokens")):
        total, count = (jnp.matmul(v, weights, precision="highest") for v in (rows[name], rows[counts]))
        values = total / jnp.where(count > 0, count, jnp.nan)
        made[name] = values[:, 0]
        if name != "accuracy":
            made[f"{name}_low"], made[f"{name}_high"] = jnp.quantile(values[:, 1:], jnp.array([0.025, 0.975]), axis=1)
    return made
