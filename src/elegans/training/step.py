"""One training step of one run. The cohort is a transform of what stands here."""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from elegans.errors import Invalid
from elegans.randomness import Purpose, key_for, shuffled_index
from elegans.specs import Spec, spec
from elegans.tasks.sampling import TaskData, compact, draw_set, train_batch
from elegans.training.vectors import path_name, ravel, unravel
from elegans.types import AnyArray, Example

if TYPE_CHECKING:
    from elegans.training.run import Run

NEVER = -1e9  # logit of what is no candidate: finite, since a loss multiplies it by 0
Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a run carries from step to step (its step count is the cohort's). `params_of` gives the tree of weights."""

    params: Float[AnyArray, "*replica parameter"]  # every weight, in tree order
    opt: Any
    diverged: Int[AnyArray, "*replica"]  # the step of the first non-finite loss, gradient or parameter; -1: none


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run draws from: its task's arrays, and its finite training set if it has one."""

    task: TaskData
    finite: Example | None = None


# ---- scores


def token_losses(logits: Float[Array, "*b position vocab"], tokens: Int[Array, "*b position1"]) -> Float[Array, "*b position"]:
    """Nats of every next token. A one-hot product, whose gradient is no scatter."""
    target = jax.nn.one_hot(tokens[..., 1:], logits.shape[-1], dtype=logits.dtype)
    return jax.nn.logsumexp(logits, -1) - (target * logits).sum(-1)


class Tallies(NamedTuple):
    """What scores are sums of, token by token, or row by row."""

    nats: Float[Array, "*b position"]  # of every token, scored or not
    right: Bool[Array, "*b position"]  # scored tokens that are the likeliest
    counted: Bool[Array, "*b position"]  # scored tokens
    exact: Bool[Array, "*b"]  # rows that have scored tokens, and are right at every one


def tallies(logits: Float[Array, "*b position vocab"], rows: Example) -> Tallies:
    """Those of one row or many."""
    counted = rows.scored[..., 1:]
    right = (logits.argmax(-1) == rows.tokens[..., 1:]) & counted
    exact = (right | ~counted).all(-1) & counted.any(-1)
    return Tallies(token_losses(logits, rows.tokens), right, counted, exact)


def scores(logits: Float[Array, "batch position vocab"], example: Example) -> tuple[Float[Array, ""], Metrics]:
    """Mean nats per scored token of a batch; accuracy per scored token; share of rows right at every scored token.

    The mean is by the tokens' weights, where they have any. Rows without scored tokens count nowhere.
    """
    nats, right, counted, exact = tallies(logits, example)
    tokens = jnp.maximum(counted.sum(), 1)
    metrics = {"accuracy": right.sum() / tokens, "exact_match": exact.sum() / jnp.maximum(counted.any(1).sum(), 1)}
    if example.weights is None:
        return (nats * counted).sum() / tokens, metrics
    weights = counted * example.weights[:, 1:]
    total = weights.sum()
    return (nats * weights).sum() / jnp.where(total > 0, total, 1), metrics


def logits_of(
    run: Run,
    params: Any,
    tokens: Int[Array, "batch position"],
    key: jax.Array | None = None,
    read: Bool[Array, "batch position"] | None = None,
) -> Float[Array, "batch position-1 vocab"]:
    """Logits before every token but the first. The batch is the axis named "batch".

    `read` marks the tokens whose logits count; after a row's last one they may be anything finite.
    """

    def one(tokens: Array, row: Array, read: Array | None) -> Array:
        row_key = None if key is None else jax.random.fold_in(key, row)
        if read is None:
            return run.model.apply(params, tokens[:-1], key=row_key)[0]
        upto = jnp.where(read[1:], jnp.arange(1, len(tokens)), 0).max()
        return run.model.logits(params, tokens[:-1], upto, key=row_key)

    logits = jax.vmap(one, axis_name="batch")(tokens, jnp.arange(tokens.shape[0]), read)
    candidates = run.task.candidates
    return logits if candidates is None else jnp.where(candidates, logits, NEVER)


# ---- the step


@spec
class Update(Spec):
    """One step of training. Subclass it to change the training loop: `logits`, `loss` or the whole of `apply`."""

    def loss(self, run: Run, params: Any, batch: Example, key: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        """The loss that is differentiated, and what else to record of the batch (scalars)."""
        return scores(self.logits(run, params, batch, key), batch)

    def logits(self, run: Run, params: Any, batch: Example, key: jax.Array) -> Float[Array, "batch position vocab"]:
        """Logits that predict every token of the batch but the first; after a row's last scored one anything, if `loss` is this one."""
        return logits_of(run, params, batch.tokens, key, batch.scored if type(self).loss is Update.loss else None)

    def apply(self, run: Run, state: State, batch: Example, step: Int[Array, ""], key: jax.Array) -> tuple[State, Metrics]:
        """The next state, and the metrics: scalars, `loss` and `grad_norm` among them.

        What a run does not train stays as it is, whatever this returns; `held` keeps it out of the gradient's norm and of moments.
        """
        params = params_of(run, state.params)
        (loss, metrics), grads = jax.value_and_grad(lambda p: self.loss(run, held(run, p), batch, key), has_aux=True)(params)
        made = run.optim.update(grads, state.opt, state.params, step, run.steps)
        metrics = {"loss": loss, **metrics, "grad_norm": made.grad_norm}
        return State(made.params, made.state, state.diverged), metrics


def initial(run: Run) -> Any:
    """The tree of initial weights."""
    return run.model.init(key_for(run.init_seed, Purpose.INIT), run.task.vocab_size, run.task.positions)


_SHAPES: dict[Any, Any] = {}  # by what shapes depend on: leaves shape nothing


def shapes_of(run: Run) -> Any:
    """The tree of the weights' shapes, computing nothing."""
    key = jax.tree.structure(run.model), run.task.vocab_size, run.task.positions
    if key not in _SHAPES:
        _SHAPES[key] = jax.eval_shape(lambda: initial(run))
    return _SHAPES[key]


def params_of(run: Run, vector: Float[AnyArray, "*lead parameter"]) -> Any:
    """The tree of weights of a vector of parameters, or of many."""
    return unravel(vector, shapes_of(run))


def trained_of(run: Run) -> Any:
    """The tree of weights, each true where the run trains it: some glob of `trained` names it, and none with a "!" does.

    Raises `Invalid` for a glob that names no weight, and where nothing is left to train.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(shapes_of(run))
    names = [path_name(path) for path, _ in paths]
    allowed = "allowed: globs of the weights " + ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    globs = run.trained or ("*",)
    found = {glob: set(fnmatch.filter(names, glob.removeprefix("!"))) for glob in globs}
    for glob, matched in found.items():
        if not matched:
            raise Invalid("trained", glob, allowed)
    asked = [matched for glob, matched in found.items() if not glob.startswith("!")] or [set(names)]
    kept = set().union(*asked).difference(*(matched for glob, matched in found.items() if glob.startswith("!")))
    if not kept:
        raise Invalid("trained", list(globs), f"it leaves nothing to train; {allowed}")
    return jax.tree.unflatten(treedef, [name in kept for name in names])


def mask_of(run: Run) -> Bool[np.ndarray, " parameter"]:
    """Which of a run's parameters it trains, in tree order."""
    pairs = zip(jax.tree.leaves(shapes_of(run)), jax.tree.leaves(trained_of(run)), strict=True)
    return np.concatenate([np.full(w.size, trained) for w, trained in pairs])


def held(run: Run, params: Any) -> Any:
    """The tree of weights, without gradients for those that the run does not train: so they cost no backward pass either."""
    if run.trained is None:
        return params
    return jax.tree.map(lambda trained, w: w if trained else jax.lax.stop_gradient(w), trained_of(run), params)


def start(run: Run, vector: Float[Array, " parameter"] | None = None) -> State:
    """The untrained run, or one that starts from given parameters: where they are not finite it has diverged at step 0."""
    if vector is not None:
        diverged = jnp.where(jnp.isfinite(vector).all(), -1, 0)
        return State(vector, run.optim.init(vector, shapes_of(run)), diverged.astype(jnp.int32))
    params = initial(run)
    vector = ravel(params)
    return State(vector, run.optim.init(vector, params), jnp.int32(-1))


def draw_data(run: Run, task: TaskData) -> RunData:
    """What the run draws its batches from; a finite training set is drawn here, once."""
    if run.train_set is None:
        return RunData(task)
    rows = draw_set(run.task, "train", key_for(run.data_seed, Purpose.DATA), run.train_set, task)
    if run.order == "short_to_long":
        order = jnp.argsort(_span(rows.scored), stable=True)
        rows = jax.tree.map(lambda a: a[order], rows)
    return RunData(task, Example(compact(rows.tokens, run.task.vocab_size), rows.scored, weights=rows.weights))


def _span(scored: Bool[Array, "row position"]) -> Int[Array, " row"]:
    """A number that grows with the length of the prompt, and for one prompt's length with that of what is scored."""
    width = scored.shape[1]
    return scored.argmax(1) * width + width - scored[:, ::-1].argmax(1)


def draw_batch(run: Run, step: Int[Array, ""], data: RunData) -> Example:
    """The batch of a step: fresh rows, or the next ones of a pass over the finite training set."""
    steps: Any = run.steps
    if data.finite is None or run.train_set is None:
        key = key_for(run.data_seed, Purpose.DATA, step)
        return train_batch(run.task, key, run.batch, step, step / steps, data.task)
    size = run.train_set
    row = step * run.batch + jnp.arange(run.batch)  # below 2^31, as Run checks
    if run.order is None:
        row = jax.vmap(lambda r: shuffled_index(r % size, size, key_for(run.data_seed, Purpose.ORDER, r // size)))(row)
    else:
        row = row % size
    chosen = jax.tree.map(lambda a: a[row], data.finite)
    return dataclasses.replace(chosen, tokens=chosen.tokens.astype(jnp.int32))


def take(run: Run, state: State, step: Int[Array, ""], batch: Example) -> tuple[State, Metrics]:
    """One optimiser step, of a batch. A run past its last step, or diverged, stands still; its metrics are NaN.

    Diverged: a metric (the loss, the norm of the gradient) or a new parameter is not finite. Whether the
    metrics are is known before the update and stops it; whether the new parameters are would need a
    second pass over them, so that update is kept, and is the last one.
    """
    new, metrics = run.update.apply(run, state, batch, step, key_for(run.seed, Purpose.DROPOUT, step))
    if run.trained is not None:
        new = dataclasses.replace(new, params=jnp.where(mask_of(run), new.params, state.params))
    steps: Any = run.steps
    live = (step < steps) & (state.diverged < 0)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    kept = jax.tree.map(lambda a, b: jnp.where(live & finite, a, b), (new.params, new.opt), (state.params, state.opt))
    well = finite & jnp.isfinite(kept[0]).all()
    diverged = jnp.where(live & ~well, step, state.diverged)
    return State(*kept, diverged), {k: jnp.where(live, v, jnp.nan) for k, v in metrics.items()}
