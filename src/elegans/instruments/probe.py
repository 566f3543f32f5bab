"""Linear probes: what can be read off the network's vectors, where, and when."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from jaxtyping import Array, Bool, Float, Int, Num

from elegans.instruments.base import Blocks, Layout, ReplicaInstrument, those
from elegans.instruments.linear import Probes, fit_logistic, fit_squares
from elegans.specs import field, spec
from elegans.tasks import Task
from elegans.tasks.sampling import TaskData, draw_set
from elegans.training.run import Run
from elegans.types import Example, Truth, TruthKind

METRICS = ("accuracy", "log_loss", "mse", "r2", "chance", "control")
Scores = dict[str, Float[Array, "label site read"]]


class Reads(NamedTuple):
    """Everything that probes of one feature need: vectors, labels, and which examples count."""

    x: Float[Array, "site read n d_model"]
    y: Float[Array, "label read n"]  # one for each probe at a site and read: 0 or 1, or the number itself
    counted: Float[Array, "read n"]
    kind: TruthKind


def vectors(run: Run, params: Any, rows: Example, sites: tuple[str, ...]) -> Float[Array, "site n position d_model"]:
    """The vectors at some sites, at every position that predicts a token; narrower ones are filled up with zeros."""

    def one(tokens: Int[Array, " position"]) -> Float[Array, "site p d"]:
        trace = run.model.apply(params, tokens[:-1])[1]
        found = [trace[s].astype(jnp.float32) for s in sites]
        width = max(v.shape[-1] for v in found)
        return jnp.stack([jnp.pad(v, ((0, 0), (0, width - v.shape[-1]))) for v in found])

    return jax.vmap(one, out_axes=1, axis_name="batch")(rows.tokens)


def reads(run: Run, x: Float[Array, "site n position d_model"], rows: Example, feature: str) -> Reads:
    """The vectors where a feature is read, per example, with its labels."""
    truth = rows.truth[feature]
    there = truth.positions >= 0
    index = jnp.where(there, truth.positions, 0)[None, :, :, None]
    taken = jnp.take_along_axis(x, index, 2)  # [site, n, read, d_model]
    values = truth.values
    if truth.kind == "categorical":
        values = jax.nn.one_hot(values, truth.classes or run.task.vocab_size)
    values = values if values.ndim == 3 else values[..., None]
    return Reads(taken.swapaxes(1, 2), values.T.astype(jnp.float32), there.T.astype(jnp.float32), truth.kind)


def fit(r: Reads, c: Any) -> Probes:
    """A probe for every label, site and read: [label, site, read]. Labels follow one another, and share the vectors."""
    one = fit_squares if r.kind == "number" else fit_logistic
    over_reads = jax.vmap(one, (0, 0, 0, None))
    over_sites = jax.vmap(over_reads, (0, None, None, None))
    return jax.lax.map(lambda y: over_sites(r.x, y, r.counted, c), r.y)


def with_random_labels(key: jax.Array, r: Reads) -> Reads:
    """Twice the labels: the true ones, then those of random other examples, which have no relation to the vectors."""
    n = r.x.shape[2]
    keys = jax.random.split(key, r.x.shape[1])
    drawn = jax.vmap(lambda k, counted: jax.random.choice(k, n, (n,), p=counted))(keys, r.counted)
    return r._replace(y=jnp.concatenate([r.y, jnp.take_along_axis(r.y, drawn[None], 2)]))


def halves(tree: Any) -> tuple[Any, Any]:
    """What belongs to the true labels, and what to the random ones."""
    return tuple(jax.tree.map(lambda a, i=i: jnp.split(a, 2)[i], tree) for i in (0, 1))


def truth_of(run: Run) -> dict[str, Truth]:
    """The task's truth, shapes only."""
    return jax.eval_shape(lambda k: run.task.sample(k, run.task.prepare()).truth, jax.random.key(0))


def features_of(run: Run, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The features to probe that the task knows: of those asked for, or all."""
    return those(asked, tuple(truth_of(run)))


def places_of(run: Run, families: tuple[str, ...]) -> list[dict[str, Any]]:
    """The model's sites of those families that it has, with family and layer (-1: before the first)."""
    known = run.model.probed_sites()
    return [{"site": s, "family": f, "layer": int(s.split(".")[1]) if "." in s else -1} for f in families for s in known.get(f, ())]


def sites_of(run: Run, families: tuple[str, ...]) -> tuple[str, ...]:
    """Their names."""
    return tuple(place["site"] for place in places_of(run, families))


def meeting(run: Run, features: tuple[str, ...]) -> set[str]:
    """Those of some features of which two reads stand at one position in any of 1,024 drawn rows.

    Known while a program is traced, too: a leaf of the task that is traced (the chance of a part, say) counts as 1.
    """
    with jax.ensure_compile_time_eval():
        task = jax.tree.map(lambda a: np.ones((), a.dtype) if isinstance(a, jax.core.Tracer) else a, run.task)
        data, keys = task.prepare(), jax.random.split(jax.random.key(0), 1024)
        truths = jax.jit(jax.vmap(lambda key: {name: t.positions for name, t in task.sample(key, data).truth.items()}))(keys)
    ordered = {name: np.sort(np.asarray(truths[name]), 1) for name in features}
    return {name for name, p in ordered.items() if ((p[:, 1:] == p[:, :-1]) & (p[:, 1:] >= 0)).any()}


def reads_of(run: Run, feature: str) -> list[dict[str, Any]]:
    """Index and position of each read of a feature; the position is null where it differs between examples."""
    positions = _positions(run.task)[feature]
    same = (positions == positions[0]).all(0) & (positions[0] >= 0)
    return [{"index": r, "position": int(positions[0, r]) if same[r] else None} for r in range(positions.shape[1])]


@functools.lru_cache
def _positions(task: Task) -> dict[str, Int[np.ndarray, "row read"]]:
    """Where the features of 64 rows are read."""
    data, keys = task.prepare(), jax.random.split(jax.random.key(0), 64)
    return jax.device_get(jax.jit(jax.vmap(lambda key: {n: t.positions for n, t in task.sample(key, data).truth.items()}))(keys))


@spec
class Probe(ReplicaInstrument):
    """Linear probes of every feature at every site and read, fitted on the validation part of the split, scored on the test part.

    By the kind of truth, with the penalty of scikit-learn's C=100 (`c`), and the metrics that are not null:
      binary       a logistic regression: `accuracy` (share, 0 to 1), `log_loss` (nats)
      multilabel   one for each label, a row each (column `label`, null elsewhere): the same metrics
      categorical  one for each class against the rest: accuracy of the likeliest, log loss of the normalised probabilities
      number       least squares: `mse` (the number's unit squared), `r2` (share of the variance, below 0: worse than the mean)
    A probe's score is its accuracy, or its r2. `chance` is the score of always guessing the most frequent value (r2: 0),
    the ceiling 1. Controls: `control`, the score after fitting to the labels of random other examples, in training and test: what is
    above chance there comes of neither vectors nor labels; and `untrained`, that of the same probe on the network before
    training, which says what the vectors' size and the tokens in them give away, null where step 0 was not
    recorded. `index` counts the reads; what no test example has is left out.
    """

    features: tuple[str, ...] = field((), "features to probe; empty: all")
    families: tuple[str, ...] = field(("embed", "resid"), "families of sites; see Model.probed_sites")
    fit: int = field(2048, "examples to fit on", ge=2, le=1_000_000)
    test: int = field(1024, "examples to test on", ge=1, le=1_000_000)
    c: float = field(100.0, "inverse strength of the L2 penalty, as scikit-learn's C", gt=0)
    control: bool = field(True, "also fit to random labels")

    def named(self, run: Run) -> dict[str, tuple[str, ...]]:
        return {"features": features_of(run, ()), "families": tuple(run.model.probed_sites())}

    def apply(self, run: Run, params: Any, data: TaskData, key: jax.Array) -> Blocks:
        keys = jax.random.split(key, 3)
        parts = ("validation", self.fit), ("test", self.test)
        rows = [draw_set(run.task, part, k, n, data) for (part, n), k in zip(parts, keys, strict=False)]
        seen = [vectors(run, params, r, sites_of(run, self.families)) for r in rows]
        names = features_of(run, self.features)
        train, test = (lambda name, i=i: reads(run, seen[i], rows[i], name) for i in (0, 1))
        return {name: self._feature(train(name), test(name), keys[2]) for name in names}

    def _feature(self, train: Reads, test: Reads, key: jax.Array) -> dict[str, Float[Array, "site read *label"]]:
        if self.control:
            train, test = (with_random_labels(k, r) for k, r in zip(jax.random.split(key), (train, test), strict=True))
        probes = fit(train, self.c)
        if self.control:
            (probes, wrong), (y, wrong_y) = halves(probes), halves(test.y)
            made = score(probes, test._replace(y=y))
            made["control"] = _headline(score(wrong, test._replace(y=wrong_y)))
        else:
            made = score(probes, test)
        known = (train.counted.sum(1) > 0) & (test.counted.sum(1) > 0)
        made = {name: jnp.where(known, values, jnp.nan) for name, values in made.items()}
        several = test.kind == "multilabel"
        return {name: jnp.moveaxis(values, 0, -1) if several else values[0] for name, values in made.items()}

    def layouts(self, run: Run) -> dict[str, Layout]:
        truth = truth_of(run)
        sites, made = places_of(run, self.families), {}
        for name in features_of(run, self.features):
            labels = [[{"label": i} for i in range(truth[name].values.shape[1])]] if truth[name].kind == "multilabel" else []
            constant = {"feature": name} if labels else {"feature": name, "label": None}
            made[name] = Layout(constant, [sites, reads_of(run, name), *labels])
        return made

    def finish(self, table: pa.Table) -> pa.Table:
        names = [n for n in METRICS if n != "control" or self.control]
        for name, kind in (("label", pa.int32()), ("position", pa.int32()), *((n, pa.float32()) for n in names)):
            values = table[name].cast(kind) if name in table.column_names else pa.nulls(len(table), kind)
            table = table.drop_columns(name) if name in table.column_names else table
            table = table.append_column(name, values)
        columns = ("run", "feature", "site", "index", "label")
        scores = [r2 if a is None else a for a, r2 in _tuples(table, "accuracy", "r2")]
        keys = _tuples(table, *columns)
        start = {key: s for key, s, step in zip(keys, scores, table["step"].to_pylist(), strict=True) if step == 0}
        return table.append_column("untrained", pa.array([start.get(key) for key in keys], pa.float32()))


def score(probes: Probes, test: Reads) -> Scores:
    """Metrics of probes on other examples, and the chance level of the first of them."""
    count = jnp.maximum(test.counted.sum(-1), 1)

    def mean(values: Num[Array, "*any read n"] | Bool[Array, "*any read n"]) -> Float[Array, "*any read"]:
        return (values * test.counted).sum(-1) / count

    scores = jnp.einsum("srnd,lsrd->lsrn", test.x, probes.w, precision="highest") + probes.b[..., None]
    y = test.y[:, None]
    if test.kind == "number":
        mse, variance = mean((scores - y) ** 2), mean((y - mean(y)[..., None]) ** 2)
        made = {"mse": mse, "r2": jnp.where(variance > 0, 1 - mse / variance, jnp.nan), "chance": jnp.zeros(())}
    elif test.kind == "categorical":
        nats = -jax.nn.log_softmax(jax.nn.log_sigmoid(scores), 0)
        right = jnp.take_along_axis(jnp.broadcast_to(y, scores.shape), scores.argmax(0)[None], 0)
        made = {"accuracy": mean(right), "log_loss": mean((y * nats).sum(0, keepdims=True)), "chance": mean(y).max(0, keepdims=True)}
    else:
        ones = mean(y)
        right = (scores > 0) == (y > 0.5)
        made = {"accuracy": mean(right), "log_loss": mean(jax.nn.softplus(scores) - y * scores), "chance": jnp.maximum(ones, 1 - ones)}
    shape = next(iter(made.values())).shape
    return {name: jnp.broadcast_to(values, shape) for name, values in made.items()}


def _headline(made: Scores) -> Float[Array, "label site read"]:
    return made["accuracy"] if "accuracy" in made else made["r2"]


def _tuples(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))
