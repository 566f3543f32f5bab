"""Addition against plain Python integers: every token, every score, every carry of ten thousand rows."""

import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from elegans import Addition
from elegans.types import Example

SAMPLES = 10_000
PLUS, EQUALS, END = 2, 3, 4
VARIANTS = [(16, False, "lsb", "lsb"), *((5, *v) for v in itertools.product([False, True], ["lsb", "msb"], ["lsb", "msb"]))]


def task_of(length: int, cot: bool, inputs: str, outputs: str) -> Addition:
    return Addition(length=length, cot=cot, inputs=inputs, outputs=outputs)


def draw(task: Addition, rows: int, seed: int = 0) -> Example:
    keys = jax.random.split(jax.random.key(seed), rows)
    drawn = jax.jit(jax.vmap(lambda key: task.sample(key, ())))(keys)
    return jax.tree.map(np.asarray, drawn)


# ---- the oracle: Python integers


def bits(value: int, count: int) -> list[int]:
    """Least significant first."""
    return [value >> i & 1 for i in range(count)]


def carry_out(x: int, y: int, r: int) -> int:
    """Whether the lowest r + 1 bits of x and y overflow."""
    low = 2 ** (r + 1)
    return (x % low + y % low) // low


def written(x: int, y: int, n: int, cot: bool, inputs: str, outputs: str) -> tuple[list[int], list[int]]:
    """The row of x + y, and where in it each bit z_0 .. z_n of the sum stands."""
    z, carries = bits(x + y, n + 1), [carry_out(x, y, r) for r in range(n)]
    answer = [v for pair in zip(z, carries, strict=False) for v in pair] if cot else z
    place = [2 * r for r in range(n)] + [2 * n - 1] if cot else list(range(n + 1))
    shown = [bits(v, n) if inputs == "lsb" else bits(v, n)[::-1] for v in (x, y)]
    if outputs == "msb":
        answer, place = answer[::-1], [len(answer) - 1 - p for p in place]
    row = [*shown[0], PLUS, *shown[1], EQUALS, *answer, END]
    return row, [2 * n + 2 + p for p in place]


def operands(tokens: list[int], n: int, inputs: str) -> tuple[int, int]:
    pair = tokens[:n], tokens[n + 1 : 2 * n + 1]
    return tuple(sum(b << i for i, b in enumerate(v if inputs == "lsb" else v[::-1])) for v in pair)


@functools.cache
def expected(x: int, y: int, variant: tuple) -> tuple[list[int], ...]:
    """Tokens, then values and positions of both truths: first_operand where z_r is predicted, carry where z_(r+1) is."""
    row, places = written(x, y, *variant)
    n = variant[0]
    return row, bits(x, n), [p - 1 for p in places[:-1]], [carry_out(x, y, r) for r in range(n)], [p - 1 for p in places[1:]]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v)))
def test_rows_scores_and_truth_are_those_of_python_integers(variant) -> None:
    task = task_of(*variant)
    drawn = draw(task, SAMPLES)
    first, carry = drawn.truth["first_operand"], drawn.truth["carry"]
    rows = [expected(*operands(tokens, variant[0], variant[2]), variant) for tokens in drawn.tokens.tolist()]
    found = (drawn.tokens, first.values, first.positions, carry.values, carry.positions)
    for array, oracle in zip(found, zip(*rows, strict=True), strict=True):
        assert np.array_equal(array, np.array(oracle))
    scored = np.arange(task.positions) >= rows[0][0].index(EQUALS)  # from = to the end, both included
    assert (drawn.scored == scored).all()
    assert set(drawn.truth) == {"first_operand", "carry"} and first.kind == carry.kind == "binary"


def test_the_row_that_the_docstring_draws() -> None:
    row, _ = written(6, 7, 4, False, "lsb", "lsb")
    assert Addition(length=4).text(row) == "0110+1110=10110$"
    assert [carry_out(6, 7, r) for r in range(4)] == [0, 1, 1, 0]


# ---- the law of the operands


def p_of_chi_square(counts: np.ndarray, expected: float) -> float:
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1))


def test_operands_are_uniform() -> None:
    tokens = draw(Addition(length=4), SAMPLES).tokens
    pairs = Counter(operands(t, 4, "lsb") for t in tokens.tolist())
    counts = np.array([pairs[x, y] for x in range(16) for y in range(16)])
    assert 1e-3 < p_of_chi_square(counts, SAMPLES / 256) < 1 - 1e-3


def test_every_bit_of_long_operands_is_fair() -> None:
    tokens = draw(Addition(length=16), SAMPLES).tokens
    ones = np.delete(tokens[:, :33], 16, 1).sum(0)
    statistic = ((ones - SAMPLES / 2) ** 2 / (SAMPLES / 4)).sum()
    assert 1e-3 < chi2.sf(statistic, 32) < 1 - 1e-3
    together = np.corrcoef(np.delete(tokens[:, :33], 16, 1).T)
    assert np.abs(together - np.eye(32)).max() < 5 / math.sqrt(SAMPLES)


def test_other_keys_give_other_rows() -> None:
    task = Addition(length=16)
    assert not np.array_equal(draw(task, 50, seed=0).tokens, draw(task, 50, seed=1).tokens)
    assert np.array_equal(draw(task, 50, seed=0).tokens, draw(task, 50, seed=0).tokens)


# ---- contents


def contents_of(task: Addition, pairs: list[tuple[int, int]]) -> np.ndarray:
    rows = np.array([written(x, y, task.length, task.cot, task.inputs, task.outputs)[0] for x, y in pairs], np.int32)
    content = jax.jit(jax.vmap(lambda tokens: task.content(Example(tokens, jnp.ones(tokens.shape, bool)))))
    return np.asarray(content(jnp.asarray(rows)))


@pytest.mark.parametrize("task", [Addition(length=4), Addition(length=4, inputs="msb", outputs="msb", cot=True)], ids=["plain", "msb cot"])
def test_contents_of_a_small_space_are_ranks_of_unordered_pairs(task) -> None:
    pairs = list(itertools.product(range(16), repeat=2))
    rank = dict(zip(pairs, contents_of(task, pairs)[:, 0].tolist(), strict=True))
    assert all(rank[x, y] == rank[y, x] for x, y in pairs)
    assert sorted({rank[x, y] for x, y in pairs}) == list(range(136))
    assert task.contents == 136 == 16 * 17 // 2


@pytest.mark.parametrize("length", [9, 16, 33, 48])
def test_contents_of_a_large_space_tell_pairs_apart_and_orders_not(length) -> None:
    rng = np.random.default_rng(length)
    numbers = [0, 1, 2**length - 1, 2 ** (length - 1), *(int(v) for v in rng.integers(0, 2 ** min(length, 62), 12))]
    numbers += [v ^ 1 for v in numbers] + [v ^ 1 << (length - 1) for v in numbers]  # equal but for one end
    pairs = [(x, y) for x in sorted(set(numbers)) for y in sorted(set(numbers))]
    found = [tuple(c) for c in contents_of(Addition(length=length), pairs).tolist()]
    by_pair: dict[frozenset[int], set] = {}
    for pair, content in zip(pairs, found, strict=True):
        by_pair.setdefault(frozenset(pair), set()).add(content)
    assert all(len(c) == 1 for c in by_pair.values())
    assert len({next(iter(c)) for c in by_pair.values()}) == len(by_pair)
    assert Addition(length=length).contents is None


@pytest.mark.parametrize("length", [1, 3, 8])
def test_small_spaces_count_unordered_pairs(length) -> None:
    assert Addition(length=length).contents == len({tuple(sorted(p)) for p in itertools.product(range(2**length), repeat=2)})


# ---- losses and lengths


def entropy(counts: Counter) -> float:
    total = sum(counts.values())
    return -sum(c / total * math.log(c / total) for c in counts.values())


@pytest.mark.parametrize(("cot", "outputs"), list(itertools.product([False, True], ["lsb", "msb"])))
def test_the_plateau_is_the_mean_entropy_of_each_scored_position(cot, outputs) -> None:
    """Counted over all 256 pairs of four-bit numbers."""
    rows = [written(x, y, 4, cot, "lsb", outputs)[0] for x in range(16) for y in range(16)]
    scored = range(rows[0].index(EQUALS), len(rows[0]))
    expected = sum(entropy(Counter(row[p] for row in rows)) for p in scored) / len(scored)
    assert math.isclose(task_of(4, cot, "lsb", outputs).plateau(), expected, rel_tol=1e-12)


def test_the_plateau_of_sixteen_bits_is_the_published_one() -> None:
    assert round(Addition(length=16).plateau(), 4) == 0.6202


def test_lengths_are_those_of_the_requirement_table() -> None:
    task = Addition(length=16)
    assert task.scored_tokens() == 19 and task.positions == 52 == task.mean_positions()
    assert task.vocab_size == 5 and task.floor() == 0
    for n, cot in itertools.product([1, 4, 16], [False, True]):
        row, _ = written(0, 0, n, cot, "lsb", "lsb")
        task = Addition(length=n, cot=cot)
        assert task.positions == len(row) and task.scored_tokens() == len(row) - row.index(EQUALS)


def test_one_bit_adds_too() -> None:
    tokens = draw(Addition(length=1), 64).tokens
    assert {tuple(t) for t in tokens.tolist()} == {tuple(written(x, y, 1, False, "lsb", "lsb")[0]) for x in (0, 1) for y in (0, 1)}
