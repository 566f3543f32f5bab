"""One run's step: scores against NumPy, passes over finite sets, and how long a run is."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elegans import WSD, AdamW, Addition, At, Every, Invalid, LogSpaced, Parity, Run, Transformer, Update, spec, varies
from elegans.randomness import shuffled_index
from elegans.tasks.sampling import prepare
from elegans.training.cohort import resolve
from elegans.training.evaluation import evaluate
from elegans.training.step import RunData, State, draw_batch, draw_data, params_of, scores, start
from elegans.training.vectors import ravel
from elegans.types import Example
from helpers import advance, as_arrays

MODEL = Transformer(layers=1, d_model=8, heads=2)


begin = jax.jit(start)


# ---- scores


def random_scores(seed: int, rows: int = 12, width: int = 7, vocab: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that are often right, tokens, and which of them count; the last row has nothing that counts."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, width))
    logits = rng.standard_normal((rows, width - 1, vocab))
    logits += 3.0 * np.eye(vocab)[tokens[:, 1:]] * rng.integers(0, 2, (rows, 1, 1))
    scored = rng.random((rows, width)) < 0.5
    scored[:, 1], scored[-1] = True, False
    return logits, tokens, scored


def by_hand(logits: np.ndarray, tokens: np.ndarray, scored: np.ndarray) -> dict[str, float]:
    """Token by token. Token 0 has nothing before it and never counts."""
    nats, right, exact, rows = [], [], [], 0
    for row in range(len(tokens)):
        hits = []
        for place in range(1, tokens.shape[1]):
            if scored[row, place]:
                z = logits[row, place - 1]
                nats.append(math.log(np.exp(z).sum()) - z[tokens[row, place]])
                hits.append(max(range(len(z)), key=lambda k, z=z: z[k]) == tokens[row, place])
        right += hits
        rows += bool(hits)
        exact.append(bool(hits) and all(hits))
    return {"loss": float(np.mean(nats)), "accuracy": float(np.mean(right)), "exact_match": sum(exact) / rows}


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_what_is_counted_by_hand(seed) -> None:
    logits, tokens, scored = random_scores(seed)
    loss, metrics = scores(jnp.asarray(logits, jnp.float32), Example(jnp.asarray(tokens), jnp.asarray(scored)))
    expected = by_hand(logits, tokens, scored)
    assert 0 < expected["exact_match"] < 1
    for name, value in {"loss": loss, **metrics}.items():
        assert math.isclose(value, expected[name], rel_tol=1e-5), name


def test_weights_of_tokens_are_those_of_a_mean_and_leave_accuracies_alone() -> None:
    logits, tokens, scored = random_scores(3)
    scored[:, 0] = False
    weights = np.random.default_rng(0).integers(0, 3, scored.shape).astype(np.float32)
    alone = [by_hand(logits, tokens, np.arange(scored.size).reshape(scored.shape) == i)["loss"] for i in np.flatnonzero(scored)]
    for given in (weights, np.full_like(weights, 0.3)):  # all weights alike are no weights
        made, metrics = scores(jnp.asarray(logits, jnp.float32), Example(jnp.asarray(tokens), jnp.asarray(scored), {}, jnp.asarray(given)))
        assert math.isclose(made, np.average(alone, weights=given[scored]), rel_tol=1e-5)
        plain = by_hand(logits, tokens, scored)
        assert all(math.isclose(value, plain[name], rel_tol=1e-5) for name, value in metrics.items())


@pytest.mark.parametrize("batch", [4, 5, 64])
def test_an_evaluation_in_blocks_is_the_same_as_by_hand(batch) -> None:
    """Twelve rows in blocks of 4 (even), 5 (padded) and 64 (one)."""
    _, tokens, scored = random_scores(9, vocab=5)
    run = as_arrays(Run(Parity(length=8), MODEL, batch=batch, steps=1))
    vector = begin(run).params
    made = jax.jit(evaluate)(run, vector, Example(jnp.asarray(tokens), jnp.asarray(scored)))
    logits = np.asarray(
        jax.jit(jax.vmap(lambda row: run.model.apply(params_of(run, vector), row[:-1])[0]))(jnp.asarray(tokens)), np.float64
    )
    expected = by_hand(logits, tokens, scored)
    assert all(math.isclose(getattr(made, name), value, rel_tol=1e-4, abs_tol=1e-7) for name, value in expected.items())
    for place in range(1, tokens.shape[1]):
        column = scored.copy()
        column[:, [p for p in range(tokens.shape[1]) if p != place]] = False
        assert math.isclose(made.position_loss[place - 1], by_hand(logits, tokens, column)["loss"], rel_tol=1e-4)


def test_a_position_that_is_never_scored_has_no_loss_rather_than_zero() -> None:
    run = as_arrays(Run(Addition(length=3), MODEL, batch=4, steps=1))
    rows = jax.jit(jax.vmap(lambda key: run.task.sample(key, ())))(jax.random.split(jax.random.key(0), 4))
    made = jax.jit(evaluate)(run, begin(run).params, rows)
    assert np.isnan(made.position_loss[:6]).all() and np.isfinite(made.position_loss[6:]).all()  # `=` is token 7


# ---- one step


@spec
class OnEveryToken(Update):
    """A loss of a user's own may look at any logits."""

    def loss(self, run, params, batch, key):
        loss, metrics = scores(self.logits(run, params, batch, key), batch)
        return loss, metrics


@spec
class Other(Transformer):
    """A model of a user's own."""

    def apply(self, params, tokens, **more):
        return super().apply(params, tokens, **more)


@spec
class Noted(Transformer):
    """What a training step says of the positions that are read, as logits."""

    def logits(self, params, tokens, upto, *, key=None):
        return 0 * self.apply(params, tokens, key=key)[0] + upto

    def apply(self, params, tokens, **more):
        logits, trace = super().apply(params, tokens, **more)
        return logits * 0 - 1, trace


def test_a_model_is_told_which_positions_are_read_unless_a_loss_may_read_more() -> None:
    """All before a row's last scored token; none of a row without one. What is not told calls `apply`."""
    scored = np.zeros((3, 5), bool)
    scored[0, 2], scored[1, [1, 4]] = True, True
    batch = Example(jnp.ones((3, 5), jnp.int32), jnp.asarray(scored))
    run = Run(Addition(length=2), Noted(layers=1, d_model=8, heads=2), steps=1)
    params = run.model.init(jax.random.key(0), 5, 8)
    for update, told in ((Update(), [2, 4, 0]), (OnEveryToken(), [-1, -1, -1])):
        logits = update.logits(run, params, batch, jax.random.key(0))
        assert (np.asarray(logits) == np.array(told)[:, None, None]).all()
    sizes = {"layers": 1, "d_model": 8, "heads": 2}
    for model in (Other(**sizes), Transformer(**sizes)):
        wanted = model.apply(params, batch.tokens[0])[0]
        assert np.array_equal(model.logits(params, batch.tokens[0], jnp.int32(2)), wanted)


def test_a_step_is_forward_backward_update_and_no_more() -> None:
    """The new weights are those of the optimiser on the gradient of the mean loss over scored tokens."""
    run = as_arrays(Run(Addition(length=3), MODEL, AdamW(lr=1e-2), batch=4, steps=5))
    data, state = draw_data(run, prepare(run.task)), begin(run)
    batch = jax.jit(draw_batch)(run, jnp.int32(2), data)
    new, metrics = jax.jit(advance)(run, state, jnp.int32(2), data)

    def loss(params) -> jax.Array:
        logits = jax.vmap(lambda row: run.model.apply(params, row[:-1])[0])(batch.tokens)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.tokens[:, 1:, None], 2)[..., 0]
        return jnp.where(batch.scored[:, 1:], nats, 0).sum() / batch.scored[:, 1:].sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(params_of(run, state.params))
    made = jax.jit(run.optim.update)(grads, state.opt, state.params, jnp.int32(2), 5)
    assert math.isclose(metrics["loss"], value, rel_tol=1e-5)
    assert math.isclose(metrics["grad_norm"], np.linalg.norm(ravel(grads)), rel_tol=1e-4)
    assert np.abs(np.asarray(new.params - made.params)).max() < 1e-5
    assert int(new.diverged) == -1


@spec
class Failing(Update):
    """Something that is not finite turns up at a step."""

    loss_at: int = varies(-1, "where the loss does")
    norm_at: int = varies(-1, "where the norm of the gradient does")
    weight_at: int = varies(-1, "where one weight does")

    def apply(self, run, state, batch, step, key):
        new, metrics = super().apply(run, state, batch, step, key)
        worse = {"loss": jnp.where(step == self.loss_at, jnp.nan, 0), "grad_norm": jnp.where(step == self.norm_at, jnp.inf, 0)}
        params = new.params.at[5].add(jnp.where(step == self.weight_at, jnp.inf, 0))
        return dataclasses.replace(new, params=params), metrics | {name: metrics[name] + v for name, v in worse.items()}


def walk(update: Update, steps: int = 6, length: int = 100) -> tuple[list, list]:
    """States and losses of some steps of a run; all runs of this test are one program."""
    run = as_arrays(Run(Addition(length=3), Transformer(layers=1, d_model=8, heads=2, mlp=None), batch=4, steps=length, update=update))
    data, states, losses = RunData(prepare(run.task)), [begin(run)], []
    for step in range(steps):
        state, metrics = STEP(run, states[-1], jnp.int32(step), data)
        states.append(jax.tree.map(np.asarray, state))
        losses.append({name: float(value) for name, value in metrics.items()})
    return states, losses


STEP = jax.jit(advance)


def same(a: State, b: State) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), (a.params, a.opt), (b.params, b.opt)))


@pytest.mark.parametrize("what", ["loss_at", "norm_at", "weight_at"])
def test_the_first_thing_that_is_not_finite_ends_a_run_at_that_step(what) -> None:
    states, metrics = walk(Failing(**{what: 3}))
    healthy, _ = walk(Failing())
    assert [int(s.diverged) for s in states] == [-1] * 4 + [3] * 3
    assert all(same(a, b) for a, b in zip(states[:4], healthy[:4], strict=True))
    assert all(same(states[4], later) for later in states[5:])  # it stands still from then on
    assert all(math.isnan(value) for later in metrics[4:] for value in later.values())
    if what == "weight_at":
        assert not np.isfinite(states[4].params).all()
    else:
        assert same(states[3], states[4])  # weights and moments are the last sound ones
        assert not all(map(math.isfinite, metrics[3].values()))


def test_a_later_accident_does_not_move_the_step_of_the_first() -> None:
    states, _ = walk(Failing(loss_at=2, norm_at=4, weight_at=1))
    assert [int(s.diverged) for s in states] == [-1, -1, 1, 1, 1, 1, 1]


def test_after_its_last_step_a_run_stands_still_and_reports_nothing() -> None:
    states, metrics = walk(Failing(loss_at=5), length=4)
    assert all(same(states[4], later) for later in states[4:]) and not same(states[3], states[4])
    assert [math.isnan(m["loss"]) for m in metrics] == [False] * 4 + [True] * 2
    assert int(states[-1].diverged) == -1  # an accident after the end is none


# ---- finite training sets


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000])
def test_a_shuffle_visits_every_row_once(size) -> None:
    shuffle = jax.jit(jax.vmap(shuffled_index, (0, None, None)))
    orders = [np.asarray(shuffle(jnp.arange(size), jnp.int32(size), jax.random.key(k))) for k in range(8)]
    assert all(np.array_equal(np.sort(order), np.arange(size)) for order in orders)
    if size >= 16:
        assert len({tuple(order.tolist()) for order in orders}) == 8
        assert all((order == np.arange(size)).mean() < 0.4 for order in orders)


def test_shuffles_of_three_are_all_six_about_equally_often() -> None:
    keys = jax.random.split(jax.random.key(0), 3000)
    orders = np.asarray(jax.jit(jax.vmap(lambda key: jax.vmap(lambda i: shuffled_index(i, 3, key))(jnp.arange(3))))(keys))
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 6 and counts.min() > 350 and counts.max() < 650


@pytest.mark.parametrize(("size", "batch"), [(6, 4), (5, 5), (3, 8), (1, 2)])
def test_every_epoch_visits_each_row_of_a_finite_set_once(size, batch) -> None:
    """Batches may straddle epochs; the stream of rows still is one permutation after another."""
    run = as_arrays(Run(Parity(length=12), MODEL, batch=batch, epochs=8, train_set=size))
    data = jax.jit(draw_data)(run, prepare(run.task))
    rows = {tuple(row): i for i, row in enumerate(np.asarray(data.finite.tokens).tolist())}
    assert len(rows) == size
    draw = jax.jit(draw_batch)
    stream = [rows[tuple(row)] for step in range(run.steps) for row in np.asarray(draw(run, jnp.int32(step), data).tokens).tolist()]
    epochs = np.array(stream[: 8 * size]).reshape(8, size)
    assert (np.sort(epochs, 1) == np.arange(size)).all()
    if size > 3:
        assert len({tuple(e) for e in epochs.tolist()}) > 4  # shuffled anew for every pass


@pytest.mark.parametrize("order", ["listed", "short_to_long"])
def test_a_set_in_order_is_passed_through_in_that_order_again_and_again(order) -> None:
    task = Parity(length=6, shortest=2, lengths="balanced", final_weight=2.0, split=None)
    run = as_arrays(Run(task, MODEL, batch=4, epochs=2, train_set=20, order=order))
    data = jax.jit(draw_data)(run, prepare(task))
    batches = jax.jit(jax.vmap(lambda step: draw_batch(run, step, data)))(jnp.arange(10))
    stream, scored, weights = (np.concatenate(a) for a in (batches.tokens, batches.scored, batches.weights))
    lengths = [tokens.index(3) - 1 for tokens in stream.tolist()]
    assert np.array_equal(stream[:20], stream[20:])
    assert lengths[:20] == ([2, 3, 4, 5, 6] * 4 if order == "listed" else np.repeat([2, 3, 4, 5, 6], 4).tolist())
    for n, counted, weight in zip(lengths, scored, weights, strict=True):
        assert np.flatnonzero(counted).tolist() == list(range(n + 2, 2 * n + 3))
        assert np.flatnonzero(weight != 1).tolist() == [2 * n + 1]


def test_an_order_without_a_finite_set_is_refused() -> None:
    with pytest.raises(Invalid, match=r"^order: 'listed' is not allowed; needs a finite training set"):
        Run(Parity(), MODEL, steps=3, order="listed")


def test_a_finite_set_keeps_its_scores_and_belongs_to_the_data_seed() -> None:
    task = Parity(length=6, shortest=2)
    sets = []
    for seed, data_seed in [(0, None), (1, 0), (1, None)]:
        run = as_arrays(Run(task, MODEL, batch=4, epochs=1, train_set=16, seed=seed, data_seed=data_seed))
        sets.append(jax.jit(draw_data)(run, prepare(task)).finite)
    for rows in sets:
        for tokens, scored in zip(np.asarray(rows.tokens).tolist(), np.asarray(rows.scored), strict=True):
            n = tokens.index(3) - 1
            assert np.nonzero(scored)[0].tolist() == list(range(n + 2, 2 * n + 3))
    assert np.array_equal(sets[0].tokens, sets[1].tokens) and not np.array_equal(sets[0].tokens, sets[2].tokens)


def test_seeds_of_data_and_of_weights_are_separate() -> None:
    run = Run(Addition(length=8), MODEL, batch=4, steps=3)
    draw = jax.jit(draw_batch)
    data = draw_data(as_arrays(run), prepare(run.task))

    def of(**seeds: int) -> tuple[bytes, bytes]:
        other = as_arrays(dataclasses.replace(run, **seeds))
        return np.asarray(draw(other, jnp.int32(0), data).tokens).tobytes(), np.asarray(begin(other).params).tobytes()

    tokens, weights = of(seed=1)
    assert of(seed=2)[0] != tokens and of(seed=2)[1] != weights
    assert of(seed=2, data_seed=1) == (tokens, of(seed=2)[1])
    assert of(seed=2, init_seed=1) == (of(seed=2)[0], weights)
    assert tokens != np.asarray(draw(as_arrays(dataclasses.replace(run, seed=1)), jnp.int32(1), data).tokens).tobytes()


# ---- lengths


QUIET = Run(Addition(length=16), Transformer(layers=4, d_model=128, heads=4), batch=64, flops=1e15)


def test_the_published_check_of_a_flop_budget() -> None:
    assert QUIET.length == resolve(QUIET).steps == 61_595
    narrow = dataclasses.replace(QUIET, model=Transformer(layers=4, d_model=64, heads=4))
    assert narrow.length == 238_568


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"steps": 7}, 7),
        ({"examples": 64}, 1),
        ({"examples": 65}, 2),
        ({"examples": 1}, 1),
        ({"examples": 6400}, 100),
        ({"epochs": 3, "train_set": 100}, 5),  # 300 rows
        ({"epochs": 0.5, "train_set": 64}, 1),
        ({"epochs": 1, "train_set": 128}, 2),
        ({"flops": 1.0}, 1),
    ],
)
def test_lengths_in_other_units_are_the_smallest_number_of_steps_that_reaches_them(given, steps) -> None:
    assert dataclasses.replace(QUIET, **{"flops": None, **given}).length == steps


def test_flop_budgets_are_reached_and_by_no_more_than_one_step() -> None:
    for flops in (1e12, 3e13, 7.7e14):
        run = dataclasses.replace(QUIET, flops=flops)
        assert (run.length - 1) * run.flops_per_step < flops <= run.length * run.flops_per_step


def test_padding_does_not_count_towards_flops() -> None:
    short, long = (dataclasses.replace(QUIET, task=Parity(length=8, shortest=s)) for s in (1, None))
    mean = sum(2 * n + 3 for n in range(1, 9)) / 8
    assert short.flops_per_step < long.flops_per_step
    assert math.isclose(short.flops_per_step, 6 * (12 * 4 * 128**2 + 4 * mean * 128) * 64 * mean)


# ---- when


@pytest.mark.parametrize(
    "when", [LogSpaced(1), LogSpaced(10), LogSpaced(50), Every(1), Every(7), Every(10**6), At(), At((3, 3, 99, 1, 0))], ids=repr
)
@pytest.mark.parametrize("steps", [1, 2, 7, 99, 1000, 61_595])
def test_moments_ascend_from_zero_to_the_last_step(when, steps) -> None:
    moments = when.upto(steps)
    assert moments[0] == 0 and moments[-1] == steps
    assert all(a < b for a, b in itertools.pairwise(moments))
    if isinstance(when, Every):
        assert moments == sorted({s for s in range(steps) if s % when.steps == 0} | {steps})
    if isinstance(when, At):
        assert set(moments) == {0, steps} | {s for s in when.steps if s < steps}


def test_logarithmic_moments_are_evenly_dense_on_a_logarithmic_axis() -> None:
    moments = LogSpaced(10).upto(100_000)
    assert {1, 10, 100, 1000, 10_000, 100_000} <= set(moments)
    for low in (10, 100, 1000, 10_000):
        assert sum(low <= m < 10 * low for m in moments) == 10
    ratios = np.diff(np.log10([m for m in moments if m >= 100]))
    assert np.abs(ratios - 0.1).max() < 0.01


def test_the_schedule_follows_the_length_of_the_run() -> None:
    short, long = (as_arrays(Run(Addition(length=3), MODEL, AdamW(schedule=WSD(decay=1.0)), batch=4, steps=s)) for s in (2, 100))
    data = draw_data(short, prepare(short.task))
    step = jax.jit(advance)
    state = begin(short)
    moved = [np.abs(np.asarray(step(run, state, jnp.int32(1), data)[0].params - state.params)).max() for run in (short, long)]
    assert math.isclose(moved[0] / moved[1], 0.5 / 0.99, rel_tol=1e-3)
