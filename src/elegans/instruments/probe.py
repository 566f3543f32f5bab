"""Linear probes: what can be read off the network's vectors, where, and when."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Float, Int

from elegans.errors import Invalid
from elegans.instruments.base import Blocks, Layout, ReplicaInstrument
from elegans.specs import field, spec
from elegans.tasks.sampling import TaskData, draw_set
from elegans.training.run import Run
from elegans.types import Example

NEWTON_STEPS = 15  # the gradient of every probe tested is below 1e-3 of its start by then
HALVINGS = (1.0, 0.5, 0.25, 0.0625)  # step lengths tried by the line search


class Probes(NamedTuple):
    """Fitted logistic probes: score = x @ w + b."""

    w: Float[Array, "*probe d_model"]
    b: Float[Array, "*probe"]
    loss: Float[Array, "*probe"]  # training log loss, nats


def fit_logistic(x: Float[Array, "n d"], y: Float[Array, " n"], counted: Float[Array, " n"], c: float) -> Probes:
    """Logistic regression with an L2 penalty, the problem of scikit-learn's `LogisticRegression(C=c)`.

    Minimises w.w/2 + c * sum of log(1 + exp(-(2y - 1)(x.w + b))) over the counted examples by Newton's
    method with a line search; the intercept is not penalised.
    """
    design = jnp.concatenate([x, jnp.ones((x.shape[0], 1), x.dtype)], 1)
    penalty = jnp.append(jnp.ones(x.shape[1]), 1e-6) / c

    def losses(beta: Float[Array, " d1"]) -> Float[Array, ""]:
        score = design @ beta
        return (counted * (jax.nn.softplus(score) - y * score)).sum() + 0.5 * (penalty * beta * beta).sum()

    def newton(_: Int[Array, ""], beta: Float[Array, " d1"]) -> Float[Array, " d1"]:
        p = jax.nn.sigmoid(design @ beta)
        gradient = design.T @ (counted * (p - y)) + penalty * beta
        curvature = counted * jnp.maximum(p * (1 - p), 1e-6)
        hessian = (design * curvature[:, None]).T @ design + jnp.diag(penalty)
        direction = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(hessian), gradient)
        tried = jnp.stack([beta - s * direction for s in (*HALVINGS, 0.0)])
        values = jax.vmap(losses)(tried)
        return tried[jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))]

    beta = jax.lax.fori_loop(0, NEWTON_STEPS, newton, jnp.zeros(design.shape[1]))
    score = design @ beta
    nats = (counted * (jax.nn.softplus(score) - y * score)).sum() / jnp.maximum(counted.sum(), 1)
    return Probes(beta[:-1], beta[-1], nats)


class Reads(NamedTuple):
    """Everything that probes of one feature need: vectors, labels, and which examples count."""

    x: Float[Array, "site read n d_model"]
    y: Float[Array, "labels read n"]  # one set of labels, or several
    counted: Float[Array, "read n"]


def vectors(run: Run, params: Any, rows: Example, sites: tuple[str, ...]) -> Float[Array, "site n position d_model"]:
    """The vectors at some sites, at every position that predicts a token."""

    def one(tokens: Int[Array, " position"]) -> Float[Array, "site p d"]:
        trace = run.model.apply(params, tokens[:-1])[1]
        return jnp.stack([trace[s].astype(jnp.float32) for s in sites])

    return jax.vmap(one, out_axes=1, axis_name="batch")(rows.tokens)


def reads(x: Float[Array, "site n position d_model"], rows: Example, feature: str) -> Reads:
    """The vectors where a feature is read, per example, with its labels."""
    truth = rows.truth[feature]
    there = truth.positions >= 0
    index = jnp.where(there, truth.positions, 0)[None, :, :, None]
    taken = jnp.take_along_axis(x, index, 2)  # [site, n, read, d_model]
    return Reads(taken.swapaxes(1, 2), truth.values.T[None].astype(jnp.float32), there.T.astype(jnp.float32))


def fit(r: Reads, c: float) -> Probes:
    """A probe for every set of labels, site and read: [label set, site, read]."""
    over_reads = jax.vmap(fit_logistic, (0, 0, 0, None))
    over_sites = jax.vmap(over_reads, (0, None, None, None))
    return jax.vmap(over_sites, (None, 0, None, None))(r.x, r.y, r.counted, c)


def with_random_labels(key: jax.Array, r: Reads) -> Reads:
    """Two sets of labels: the true ones, and random ones of the same frequency, which have no relation to the vectors."""
    ones = (r.y[0] * r.counted).sum(1, keepdims=True) / jnp.maximum(r.counted.sum(1, keepdims=True), 1)
    return r._replace(y=jnp.stack([r.y[0], jax.random.bernoulli(key, ones, r.y[0].shape).astype(r.y.dtype)]))


def features_of(run: Run, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The features to probe: those asked for, or every binary one of the task. Raises `Invalid`."""
    truth = jax.eval_shape(lambda k: run.task.sample(k, run.task.prepare()).truth, jax.random.key(0))
    for name in asked:
        if name not in truth or truth[name].kind != "binary":
            known = [n for n, t in truth.items() if t.kind == "binary"]
            raise Invalid("features", name, f"allowed: binary truth of {run.task.kind}: {', '.join(known)}")
    return asked or tuple(n for n, t in truth.items() if t.kind == "binary")


def sites_of(run: Run, families: tuple[str, ...]) -> tuple[str, ...]:
    """The model's sites of some families. Raises `Invalid`."""
    known = run.model.probed_sites()
    for family in families:
        if family not in known:
            raise Invalid("families", family, f"allowed for {run.model.kind}: {', '.join(known)}")
    return tuple(s for family in families for s in known[family])


def reads_of(run: Run, feature: str) -> list[dict[str, Any]]:
    """Index and position of each read of a feature; the position is null where it differs between examples."""
    keys = jax.random.split(jax.random.key(0), 64)
    positions = np.asarray(jax.vmap(lambda k: run.task.sample(k, run.task.prepare()).truth[feature].positions)(keys))
    same = (positions == positions[0]).all(0)
    return [{"index": r, "position": int(positions[0, r]) if same[r] else None} for r in range(positions.shape[1])]


@spec
class Probe(ReplicaInstrument):
    """Logistic probes of every binary feature at every site and read, on held-out examples.

    `accuracy` (share, 0 to 1) and `log_loss` (nats) on the test part of the split, after fitting on the
    validation part: examples that the network was not trained on. Chance is the column `chance`
    (always guessing the more frequent label), the ceiling 1. Controls: `control`, the accuracy after
    fitting to random labels of the same frequency (Hewitt and Liang 2019), and `untrained`, that of the same probe on the
    network before training, null where step 0 was not recorded.
    """

    features: tuple[str, ...] = field((), "features to probe; empty: all binary ones")
    families: tuple[str, ...] = field(("embed", "resid"), "families of sites; see Model.probed_sites")
    fit: int = field(2048, "examples to fit on", ge=2, le=1_000_000)
    test: int = field(1024, "examples to test on", ge=1, le=1_000_000)
    c: float = field(100.0, "inverse strength of the L2 penalty, as scikit-learn's C", gt=0)
    control: bool = field(True, "also fit to random labels")

    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array) -> Blocks:
        keys = jax.random.split(key, 3)
        parts = ("validation", self.fit), ("test", self.test)
        rows = [draw_set(run.task, part, k, n, data) for (part, n), k in zip(parts, keys, strict=False)]
        seen = [vectors(run, params, r, sites_of(run, self.families)) for r in rows]
        names = features_of(run, self.features)
        train, test = (lambda name, i=i: reads(seen[i], rows[i], name) for i in (0, 1))
        return {name: self._feature(train(name), test(name), keys[2]) for name in names}

    def _feature(self, train: Reads, test: Reads, key: jax.Array) -> dict[str, Float[Array, "site read"]]:
        if self.control:
            train, test = with_random_labels(key, train), with_random_labels(key, test)
        accuracy, log_loss = _score(fit(train, self.c), test)
        count = test.counted.sum(1)
        ones = (test.y[0] * test.counted).sum(1) / jnp.maximum(count, 1)
        made = {
            "accuracy": accuracy[0],
            "log_loss": log_loss[0],
            "chance": jnp.broadcast_to(jnp.maximum(ones, 1 - ones), accuracy[0].shape),
        }
        if self.control:
            made["control"] = accuracy[1]
        return {name: jnp.where(count > 0, values, jnp.nan) for name, values in made.items()}

    def layouts(self, run: Run) -> dict[str, Layout]:
        sites = [{"site": s, "family": s.partition(".")[0], "layer": int(s.partition(".")[2] or -1)} for s in sites_of(run, self.families)]
        names = features_of(run, self.features)
        return {name: Layout({"feature": name}, [sites, reads_of(run, name)]) for name in names}

    def finish(self, table: pa.Table) -> pa.Table:
        columns = ("run", "feature", "site", "index")
        start = {key: a for *key_, a, s in _tuples(table, *columns, "accuracy", "step") if s == 0 for key in [tuple(key_)]}
        untrained = [start.get(tuple(key)) for key in _tuples(table, *columns)]
        return table.append_column("untrained", pa.array(untrained, pa.float32()))


def _score(probes: Probes, test: Reads) -> tuple[Float[Array, "labels site read"], Float[Array, "labels site read"]]:
    """Accuracy and log loss of probes on other examples."""
    scores = jnp.einsum("srnd,lsrd->lsrn", test.x, probes.w) + probes.b[..., None]
    y, counted = test.y[:, None], test.counted
    right = ((scores > 0) == (y > 0.5)) * counted
    nats = counted * (jax.nn.softplus(scores) - y * scores)
    total = jnp.maximum(counted.sum(-1), 1)
    return right.sum(-1) / total, nats.sum(-1) / total


def _tuples(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))
