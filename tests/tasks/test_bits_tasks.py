"""Multiplication, majorities and inner product: laws that every row obeys, contents, and losses found twice."""

import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from elegans import BitParity, InnerProduct, Invalid, Majority, MajorityOfMajority, Multiplication, Task, check_task
from elegans.tasks import counting
from elegans.tasks.multiplication import floor_sums, high_bits
from elegans.types import Example

ROWS = 2000
COUNTED = 2e-3  # nats: about four standard errors of a plateau counted over 2^16 rows
MSB = Multiplication(length=5, inputs="msb", outputs="msb")
TASKS = [Multiplication(), Multiplication(length=3), Majority(), Majority(length=3), MajorityOfMajority(), InnerProduct(length=3)]
TASKS.append(BitParity(length=3))
every_task = pytest.mark.parametrize("task", TASKS, ids=repr)


@functools.cache
def draw(task: Task) -> Example:
    return check_task(task, ROWS).rows


def contents(task: Task, tokens: np.ndarray) -> np.ndarray:
    of = jax.jit(jax.vmap(lambda row: task.content(Example(row, jnp.ones(row.shape, bool)))))
    return np.asarray(of(jnp.asarray(tokens)))


def numbers(bits: np.ndarray) -> list[int]:
    """Rows of bits, least significant first, as Python integers."""
    return [sum(b << i for i, b in enumerate(row)) for row in bits.tolist()]


def operands(task: Multiplication | InnerProduct, tokens: np.ndarray) -> tuple[list[int], list[int]]:
    x, y = tokens[:, : task.length], tokens[:, task.length + 1 : 2 * task.length + 1]
    turned = slice(None, None, -1 if getattr(task, "inputs", "lsb") == "msb" else 1)
    return numbers(x[:, turned]), numbers(y[:, turned])


# ---- what all have in common


@every_task
def test_equals_answer_and_end_are_scored_and_nothing_follows(task) -> None:
    drawn = draw(task)
    equals = (drawn.tokens == 3).argmax(1)
    assert (drawn.scored == (np.arange(task.positions) >= equals[:, None])).all()
    assert (drawn.tokens[:, -1] == 4).all() and ((drawn.tokens == 4).sum(1) == 1).all()
    assert task.mean_positions() == task.positions
    assert task.floor() == 0 and task.symbols == ("0", "1", "+", "=", "$")


@pytest.mark.parametrize(
    "task", [Multiplication(), Majority(), MajorityOfMajority(), InnerProduct(length=3), BitParity(length=3)], ids=repr
)
def test_plateaus_are_those_of_counted_rows(task) -> None:
    assert abs(task.plateau() - counting.plateau(task)) < COUNTED


def test_sizes_are_those_of_the_published_tasks() -> None:
    found = [(t.positions, t.scored_tokens()) for t in (Multiplication(), MajorityOfMajority())]
    assert found == [(67, 34), (67, 3)]


@pytest.mark.parametrize("task", [Multiplication(length=3), InnerProduct(length=3)], ids=repr)
def test_operands_are_uniform_pairs(task) -> None:
    counts = np.array(list(Counter(zip(*operands(task, draw(task).tokens), strict=True)).values()))
    assert len(counts) == 64
    assert 1e-3 < chi2.sf(((counts - ROWS / 64) ** 2 / (ROWS / 64)).sum(), 63) < 1 - 1e-3


# ---- multiplication


@pytest.mark.parametrize("task", [Multiplication(length=1, split=None)] + [Multiplication(length=n) for n in (3, 16, 24)] + [MSB], ids=repr)
def test_the_answer_is_the_product_however_long(task) -> None:
    tokens = draw(task).tokens
    answer = tokens[:, 2 * task.length + 2 : -1]
    z = numbers(answer[:, ::-1] if task.outputs == "msb" else answer)
    assert z == [x * y for x, y in zip(*operands(task, tokens), strict=True)]


@pytest.mark.parametrize("task", [Multiplication(length=n) for n in (3, 16)] + [MSB], ids=repr)
def test_every_carry_replaces_two_ones_by_one(task) -> None:
    """Kummer: adding loses as many ones as it carries, so all carries together are ones(x) ones(y) - ones(xy)."""
    drawn = draw(task)
    carried = sum(t.values.sum(1) for name, t in drawn.truth.items() if name.startswith("carry"))
    ones = [(x.bit_count(), y.bit_count(), (x * y).bit_count()) for x, y in zip(*operands(task, drawn.tokens), strict=True)]
    assert carried.tolist() == [x * y - z for x, y, z in ones]


@pytest.mark.parametrize("task", [Multiplication(length=3), MSB], ids=repr)
def test_features_are_read_where_the_bit_that_they_decide_is_predicted(task) -> None:
    n, truth = task.length, draw(task).truth
    assert set(truth) == {"first_operand", *(f"carry_{k}" for k in range(2, n + 1))}
    place = range(2 * n) if task.outputs == "lsb" else range(2 * n)[::-1]
    where = [2 * n + 1 + p for p in place]  # the token before each answer bit, least significant first
    assert truth["first_operand"].positions[0].tolist() == where[:n]
    assert all(truth[f"carry_{k}"].positions[0].tolist() == where[k : k + n] for k in range(2, n + 1))


def test_a_partial_product_of_zero_carries_nothing() -> None:
    task = MSB
    drawn = draw(task)
    for k in range(2, task.length + 1):
        off = np.array([y >> (k - 1) & 1 == 0 for y in operands(task, drawn.tokens)[1]])
        carry = drawn.truth[f"carry_{k}"].values
        assert not carry[off].any() and carry[~off].any()


def test_the_product_that_the_docstring_draws() -> None:
    task = Multiplication(length=3)
    drawn = draw(task)
    row = next(i for i, t in enumerate(drawn.tokens) if task.text(t) == "111+110=101010$")
    assert {n: t.values[row].tolist() for n, t in drawn.truth.items()} == {
        "first_operand": [1, 1, 1],
        "carry_2": [1, 1, 1],
        "carry_3": [0, 0, 0],
    }
    assert [drawn.truth[f"carry_{k}"].positions[row].tolist() for k in (2, 3)] == [[9, 10, 11], [10, 11, 12]]


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_plateaus_of_short_products_are_those_of_all_pairs(length) -> None:
    x = np.arange(2**length)
    ones = [float((np.multiply.outer(x, x) >> r & 1).mean()) for r in range(2 * length)]
    nats = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in ones if 0 < p < 1)
    assert high_bits(length) == tuple(ones[length:])
    assert math.isclose(Multiplication(length=length).plateau(), nats / (2 * length + 2), rel_tol=1e-12)


def test_high_bits_of_sixteen_are_those_of_numpys_products_and_nearly_those_of_more() -> None:
    rng = np.random.default_rng(0)
    for length in (16, 24):
        x, y = rng.integers(0, 2**length, (2, 200_000), dtype=np.uint64)
        top = [float((x * y >> np.uint64(r) & np.uint64(1)).mean()) for r in range(2 * length - 16, 2 * length)]
        assert np.abs(np.array(top) - high_bits(16)).max() < 5 * 0.5 / math.sqrt(200_000)


def test_sums_of_floors_are_those_of_a_loop() -> None:
    slopes = np.arange(40)
    for count, modulus in itertools.product([1, 7, 32], [1, 8, 33]):
        assert floor_sums(count, modulus, slopes).tolist() == [sum(a * i // modulus for i in range(count)) for a in range(40)]


# ---- majorities and inner product


def test_running_counts_count_and_decide() -> None:
    for task in (Majority(), Majority(length=3)):
        drawn, n = draw(task), task.length
        count = drawn.truth["running_count"]
        assert count.kind == "number" and (count.positions == np.arange(2 * n)).all()
        assert (np.diff(count.values, axis=1, prepend=0) == drawn.tokens[:, : 2 * n]).all()
        assert (drawn.tokens[:, -2] == (count.values[:, -1] > n)).all()
        assert not drawn.tokens[count.values[:, -1] == n, -2].any()  # a tie


@pytest.mark.parametrize("length", [2, 6, 32])
def test_three_groups_of_four_decide(length) -> None:
    drawn = draw(MajorityOfMajority(length=length))
    groups = drawn.tokens[:, : 2 * length].reshape(ROWS, 4, -1)
    truth = drawn.truth
    assert (truth["running_count"].values.reshape(groups.shape) == groups.cumsum(2)).all()
    assert (truth["group_sum"].values == groups.sum(2)).all() and truth["group_sum"].kind == "number"
    assert (truth["group_bit"].values == (groups.mean(2) > 0.5)).all() and truth["group_bit"].kind == "binary"
    assert (drawn.tokens[:, -2] == (truth["group_bit"].values.sum(1) >= 3)).all()
    assert all((truth[name].positions == 2 * length).all() for name in ("group_sum", "group_bit"))


def test_groups_of_unequal_size_are_refused() -> None:
    with pytest.raises(Invalid, match=r"^length: 7 is not allowed; allowed: even numbers"):
        MajorityOfMajority(length=7)


def test_partial_parities_end_in_the_inner_product() -> None:
    task = InnerProduct(length=3)
    drawn = draw(task)
    partial = drawn.truth["partial"]
    assert (partial.positions == np.arange(4, 7)).all() and (partial.values[:, -1] == drawn.tokens[:, -2]).all()
    pairs = zip(*operands(task, drawn.tokens), strict=True)
    assert drawn.tokens[:, -2].tolist() == [(x & y).bit_count() % 2 for x, y in pairs]


def test_partial_parities_of_bits_end_in_their_parity() -> None:
    drawn = draw(BitParity(length=3))
    bits, partial = drawn.tokens[:, :6], drawn.truth["partial"]
    assert drawn.tokens[:, -2].tolist() == [sum(row) % 2 for row in bits.tolist()] and drawn.tokens.shape[1] == 9
    assert (partial.positions == np.arange(6)).all() and (partial.values[:, -1] == drawn.tokens[:, -2]).all()
    assert (partial.values[:, 1:] == (partial.values[:, :-1] ^ bits[:, 1:])).all() and (partial.values[:, 0] == bits[:, 0]).all()


@pytest.mark.parametrize("length", [1, 2, 4])
def test_plateaus_of_short_rows_are_those_of_all_rows(length) -> None:
    rows = np.array(list(itertools.product((0, 1), repeat=2 * length)))
    answers = {Majority: rows.sum(1) > length, BitParity: rows.sum(1) % 2, InnerProduct: (rows[:, :length] * rows[:, length:]).sum(1) % 2}
    if length % 2 == 0:
        answers[MajorityOfMajority] = (rows.reshape(len(rows), 4, -1).mean(2) > 0.5).sum(1) >= 3
    for kind, answer in answers.items():
        p = answer.mean()
        assert math.isclose(kind(length=length).plateau(), -(p * math.log(p) + (1 - p) * math.log(1 - p)) / 3, rel_tol=1e-9)


# ---- contents


def pair_row(x: int, y: int, n: int, turned: bool = False) -> list[int]:
    shown = [[v >> i & 1 for i in range(n)] for v in (x, y)]
    return [*shown[0][:: -1 if turned else 1], 2, *shown[1][:: -1 if turned else 1], 3]


@pytest.mark.parametrize("task", [Multiplication(length=4), Multiplication(length=4, inputs="msb"), InnerProduct(length=4)], ids=repr)
def test_swapped_operands_are_one_content_and_small_spaces_are_ranked(task) -> None:
    pairs = list(itertools.product(range(16), repeat=2))
    ranks = contents(task, np.array([pair_row(x, y, 4, getattr(task, "inputs", "lsb") == "msb") for x, y in pairs]))[:, 0].tolist()
    by_pair = dict(zip(pairs, ranks, strict=True))
    assert all(by_pair[x, y] == by_pair[y, x] for x, y in pairs)
    assert sorted(set(ranks)) == list(range(136)) and task.contents == 136


@pytest.mark.parametrize("task", [Multiplication(length=16), InnerProduct(length=20)], ids=repr)
def test_large_spaces_tell_pairs_apart_and_orders_not(task) -> None:
    n = task.length
    rng = np.random.default_rng(0)
    base = [0, 1, 2**n - 1, *(int(v) for v in rng.integers(0, 2**n, 8))]
    some = sorted({v ^ flip for v in base for flip in (0, 1, 1 << (n - 1))})
    found = contents(task, np.array([pair_row(x, y, n) for x in some for y in some])).reshape(len(some), len(some), -1)
    assert (found == found.swapaxes(0, 1)).all() and task.contents is None
    assert len(np.unique(found.reshape(len(some) ** 2, -1), axis=0)) == len(some) * (len(some) + 1) // 2


@pytest.mark.parametrize("kind", [BitParity, Majority, MajorityOfMajority])
def test_contents_of_bits_are_the_bits(kind) -> None:
    rows = np.array(list(itertools.product((0, 1), repeat=8)))
    assert sorted(contents(kind(length=4), rows)[:, 0].tolist()) == list(range(256)) and kind(length=4).contents == 256
    long = np.concatenate([np.zeros((1, 64), int), np.eye(64, dtype=int)])
    assert len(np.unique(contents(kind(length=32), long), axis=0)) == 65 and kind(length=32).contents is None
