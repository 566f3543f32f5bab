"""Parity against plain Python integers: every token, every score, every state of ten thousand rows."""

import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from elegans import Invalid, Parity, check_task
from elegans.types import Example

SAMPLES = 10_000
TASK, EOI, END = 2, 3, 4
VARIANTS = {
    "fixed, cot": Parity(length=8),
    "1 to 6, cot": Parity(length=6, shortest=1),
    "fixed, no cot": Parity(length=6, cot=False),
    "2 to 5, no cot": Parity(length=5, shortest=2, cot=False),
    "1 to 6, cot, paper": Parity(length=6, shortest=1, compat="paper"),
    "2 to 5, no cot, paper": Parity(length=5, shortest=2, cot=False, compat="paper"),
    "fixed, cot, paper": Parity(length=4, compat="paper"),
}
every_variant = pytest.mark.parametrize("task", VARIANTS.values(), ids=VARIANTS.keys())


@functools.cache
def draw(task: Parity) -> Example:
    return check_task(task, SAMPLES).rows


# ---- the oracle


def states(x: tuple[int, ...]) -> list[int]:
    return [sum(x[: t + 1]) % 2 for t in range(len(x))]


def written(task: Parity, x: tuple[int, ...]) -> tuple[list[int], list[bool]]:
    """A row and its scores: `[task] x_1..x_n [EoI] s_1..s_n` (or the last state alone), padded to 2 length + 3."""
    answer = states(x) if task.cot else states(x)[-1:]
    row = [TASK, *x, EOI, *answer]
    width = 2 * task.length + 3
    last = width if task.compat == "paper" else len(row) + 1  # theirs scores all of the padding, ours one end
    return row + [END] * (width - len(row)), [len(x) + 1 < p < last for p in range(width)]


@functools.cache
def expected(task: Parity, x: tuple[int, ...]) -> tuple[list, ...]:
    """Tokens, scores, where input and state are read (at `:`, s_1, ... or at x_1, x_2, ...), and what they are."""
    missing = task.length - len(x)
    reads = [(len(x) + 1 + t if task.cot else 1 + t) for t in range(len(x))] + [-1] * missing
    return *written(task, x), reads, reads, [*x] + [0] * missing, states(x) + [0] * missing


def every_input(task: Parity) -> list[tuple[int, ...]]:
    lengths = range(task.length if task.shortest is None else task.shortest, task.length + 1)
    return [x for n in lengths for x in itertools.product((0, 1), repeat=n)]


def weight(task: Parity, x: tuple[int, ...]) -> float:
    """The probability of an input: lengths uniform, bits fair."""
    lengths = task.length - (task.length if task.shortest is None else task.shortest) + 1
    return 2.0 ** -len(x) / lengths


@every_variant
def test_rows_scores_and_truth_are_those_of_python_integers(task) -> None:
    drawn = draw(task)
    rows = [expected(task, tuple(tokens[1 : tokens.index(EOI)])) for tokens in drawn.tokens.tolist()]
    given, state = drawn.truth["input"], drawn.truth["state"]
    inside = given.positions >= 0
    found = (drawn.tokens, drawn.scored, given.positions, state.positions, given.values * inside, state.values * inside)
    for array, oracle in zip(found, zip(*rows, strict=True), strict=True):
        assert np.array_equal(array, np.array(oracle))
    assert set(drawn.truth) == {"input", "state"} | ({"step"} if task.cot else set()) and given.kind == state.kind == "binary"


@every_variant
def test_lengths_are_uniform_and_bits_fair(task) -> None:
    found = Counter(tuple(t[1 : t.index(EOI)]) for t in draw(task).tokens.tolist())
    inputs = every_input(task)
    expected = np.array([SAMPLES * weight(task, x) for x in inputs])
    statistic = ((np.array([found[x] for x in inputs]) - expected) ** 2 / expected).sum()
    assert sum(found[x] for x in inputs) == SAMPLES
    assert 1e-3 < chi2.sf(statistic, len(inputs) - 1) < 1 - 1e-3


@every_variant
def test_contents_are_ranks_of_inputs(task) -> None:
    inputs = every_input(task)
    rows = jnp.array([written(task, x)[0] for x in inputs])
    content = jax.jit(jax.vmap(lambda tokens: task.content(Example(tokens, jnp.ones(tokens.shape, bool)))))
    ranks = np.asarray(content(rows))
    assert ranks.shape == (len(inputs), 1)
    assert sorted(ranks[:, 0].tolist()) == list(range(len(inputs)))
    assert task.contents == len(inputs)


def test_contents_of_a_large_space_tell_inputs_apart() -> None:
    task = Parity(length=20, shortest=14)
    rng = np.random.default_rng(0)
    inputs = {tuple(rng.integers(0, 2, n).tolist()) for n in rng.integers(14, 21, 300)}
    inputs |= (
        {(0,) * n for n in range(14, 21)} | {(1,) + (0,) * (n - 1) for n in range(14, 21)} | {(0,) * (n - 1) + (1,) for n in range(14, 21)}
    )
    rows = jnp.array([written(task, x)[0] for x in sorted(inputs)])
    content = np.asarray(jax.jit(jax.vmap(lambda tokens: task.content(Example(tokens, jnp.ones(tokens.shape, bool)))))(rows))
    assert len({tuple(c) for c in content.tolist()}) == len(inputs)
    assert task.contents is None


# ---- losses and lengths, by counting


@every_variant
def test_mean_numbers_of_tokens_are_those_of_all_inputs(task) -> None:
    inputs = every_input(task)
    scored = sum(weight(task, x) * sum(written(task, x)[1]) for x in inputs)
    before_padding = sum(weight(task, x) * (written(task, x)[0].index(END) + 1) for x in inputs)
    assert math.isclose(task.scored_tokens(), scored)
    assert math.isclose(task.mean_positions(), before_padding)
    assert task.positions == 2 * task.length + 3


@every_variant
def test_the_plateau_is_the_entropy_of_scored_tokens_at_a_distance_behind_the_input(task) -> None:
    """What is lost by a predictor that knows only how far behind `:` a scored token stands."""
    seen: dict[int, Counter] = {}
    for x in every_input(task):
        row, scored = written(task, x)
        for p, counts in enumerate(scored):
            if counts:
                seen.setdefault(p - len(x) - 1, Counter())[row[p]] += weight(task, x)
    nats = sum(-w * math.log(w / sum(c.values())) for c in seen.values() for w in c.values())
    expected = nats / sum(sum(c.values()) for c in seen.values())
    assert math.isclose(task.plateau(), expected, rel_tol=1e-9)


def test_nothing_is_irreducible() -> None:
    assert all(task.floor() == 0 for task in VARIANTS.values())


def test_the_rows_that_the_docstring_draws() -> None:
    x = (1, 0, 1, 1)
    assert Parity(length=4).text(written(Parity(length=4), x)[0]) == "P1011:1101$"
    short = Parity(length=4, cot=False)
    assert short.text(written(short, x)[0]) == "P1011:1$$$$"
    assert sum(written(short, x)[1]) == 2


def test_a_shortest_row_longer_than_the_longest_is_refused() -> None:
    with pytest.raises(Invalid, match=r"^shortest: 9 is not allowed; allowed: at most length=8$"):
        Parity(length=8, shortest=9)
