"""No content is ever in two parts, the parts have the sizes that were asked for, and only the split's key decides."""

import dataclasses
import itertools
import math
from collections import Counter
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles_iteration import row as oracle_row
from scipy.stats import binom

from elegans import (
    Addition,
    BinaryCopy,
    Curriculum,
    Invalid,
    IterativeTask,
    Mixture,
    Parity,
    Polynomial,
    Run,
    Split,
    Transformer,
    identity,
)
from elegans.specs import to_dict
from elegans.tasks import sampling
from elegans.tasks.base import PARTS
from elegans.tasks.sampling import draw_set, prepare, train_batch
from elegans.types import Example


def pair_of(tokens: np.ndarray, length: int) -> np.ndarray:
    """Contents of additions as single numbers, by NumPy: the unordered pair."""
    weights = 1 << np.arange(length, dtype=np.uint64)
    x, y = tokens[:, :length].astype(np.uint64) @ weights, tokens[:, length + 1 : 2 * length + 1].astype(np.uint64) @ weights
    return (np.maximum(x, y) << np.uint64(length)) | np.minimum(x, y)


def draw(task: Addition, rows: int, seed: int = 0) -> Example:
    """Rows of the unsplit law."""
    return jax.jit(jax.vmap(lambda key: task.sample(key, ())))(jax.random.split(jax.random.key(seed), rows))


def leaks(task: Addition, rows: int, chunk: int) -> None:
    """Draw `rows` rows, as training and both held-out sets draw them, and look for contents in two parts."""
    data = prepare(task)
    train = jax.jit(lambda key: train_batch(task, key, 2 * chunk, 0, 0.0, data))
    held_out = {part: jax.jit(lambda key, part=part: draw_set(task, part, key, chunk, data)) for part in PARTS[1:]}
    found = {part: [] for part in PARTS}
    for i in range(rows // (4 * chunk)):
        for part, sample in {"train": train, **held_out}.items():
            drawn = sample(jax.random.key(i))
            assert np.asarray(drawn.scored).any(1).mean() > 0.999
            found[part].append(pair_of(np.asarray(drawn.tokens), task.length))
    contents = {part: np.unique(np.concatenate(v)) for part, v in found.items()}
    for a, b in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not np.intersect1d(contents[a], contents[b], assume_unique=True).size, (a, b)
    assert len(contents["train"]) < rows // 2  # pairs do come up twice, so a leak would show


def test_no_content_is_shared_in_a_hundred_thousand_rows_of_a_hashed_space() -> None:
    leaks(Addition(length=9, split=Split(0.5, 0.25)), 100_000, 25_000)


@pytest.mark.slow
def test_no_content_is_shared_in_a_million_rows() -> None:
    leaks(Addition(length=16), 1_000_000, 25_000)


def test_swapped_operands_are_on_the_same_side() -> None:
    task = Addition(length=16)
    rows = draw(task, 2000)
    x, y = rows.tokens[:, :16], rows.tokens[:, 17:33]
    swapped = jnp.concatenate([y, rows.tokens[:, 16:17], x, rows.tokens[:, 33:]], 1)
    part = jax.jit(jax.vmap(lambda tokens: task.part(Example(tokens, jnp.ones(tokens.shape, bool)), ())))
    assert np.array_equal(part(rows.tokens), part(swapped))
    assert set(np.asarray(part(swapped)).tolist()) == {0, 1, 2}


# ---- small spaces


@pytest.mark.parametrize("shares", [(0.9, 0.05), (0.5, 0.25), (0.1, 0.6)])
def test_small_spaces_are_cut_exactly(shares) -> None:
    for contents in (20, 36, 8256, 65_535):
        expected = [round(share * contents) for share in shares]
        assert np.bincount(Split(*shares).table(contents), minlength=3).tolist() == [*expected, contents - sum(expected)]


@pytest.mark.parametrize(
    ("task", "empty"), [(Addition(length=1), "validation"), (Parity(length=3), "validation"), (Parity(length=1), "validation")]
)
def test_an_empty_part_is_an_error_that_names_it(task, empty) -> None:
    with pytest.raises(Invalid, match=rf"^split: .*{empty} would be empty") as caught:
        prepare(task)
    assert "\n" not in str(caught.value)


def test_a_split_that_leaves_nothing_for_test_is_refused() -> None:
    with pytest.raises(Invalid, match=r"^validation: 0\.1 is not allowed; with train=0\.9 nothing is left for test$"):
        Split(train=0.9, validation=0.1)


def test_every_content_of_a_small_space_reaches_its_own_part() -> None:
    """Four-bit additions: the rows drawn for each part are exactly the pairs that the table gives it."""
    task = Addition(length=4)
    data = prepare(task)
    found = {}
    for part in PARTS:
        drawn = jax.jit(lambda key, part=part: draw_set(task, part, key, 4000, data))(jax.random.key(0))
        assert np.asarray(drawn.scored).any(1).all()
        found[part] = set(pair_of(np.asarray(drawn.tokens), 4).tolist())
    assert [len(found[p]) for p in PARTS] == np.bincount(data.table).tolist()
    assert len(set.union(*found.values())) == 136


# ---- every length by itself


def counted(task: IterativeTask) -> dict[int, list[int]]:
    """Contents of each part by length: every input sequence of it is written out as a row, and asked for its part."""
    values, table, found = range(task.low, task.size), prepare(task).table, {}
    part = jax.jit(jax.vmap(lambda tokens: task.part(Example(tokens, jnp.ones(tokens.shape, bool)), table)))
    for n in task.spans:
        if len(values) ** n > 2000:
            break
        symbols = [oracle_row(task.kind, list(x), task.length, modulus=task.size).symbols for x in itertools.product(values, repeat=n)]
        rows = np.array([[task.symbols.index(s) for s in row] for row in symbols])
        found[n] = np.bincount(part(np.resize(rows, (2000, rows.shape[1])))[: len(rows)], minlength=3).tolist()
    return found


def promised(contents: int, split: Split) -> list[int]:
    """The documented sizes, in fractions: shares of what is held out rounded, one content at least from three on; two: train and test."""
    if contents < 3:
        return [1, 0, contents - 1]
    shares = [Fraction(str(split.validation)), 1 - Fraction(str(split.train)) - Fraction(str(split.validation))]
    held_out = [max(1, round(share * contents)) for share in shares]
    return [contents - sum(held_out), *held_out]


BY_LENGTH = {
    "exact up to 15": BinaryCopy(length=20, shortest=1, split=Split(0.7, 0.15, key=3, by="length")),
    "exact up to 4": Polynomial(length=8, shortest=1, split=Split(by="length")),
    "exact from 2 to 3": Polynomial(length=5, shortest=2, modulus=32, split=Split(0.5, 0.2, by="length")),
}


@pytest.mark.parametrize("task", BY_LENGTH.values(), ids=BY_LENGTH.keys())
def test_every_length_is_cut_by_itself_in_the_promised_sizes(task) -> None:
    expected = counted(task)
    assert len(expected) > 1 or task.size == 32
    for n, sizes in expected.items():
        assert sizes == promised((task.size - task.low) ** n, task.split) and (sum(sizes) < 3 or min(sizes) > 0)
    shown = {row["length"]: [row[part] for part in PARTS] for row in task.part_sizes()}
    assert {n: shown[n] for n in expected} == expected
    assert set(shown) == {n for n in task.spans if (task.size - task.low) ** n < 2**16}


def test_of_few_contents_the_largest_part_gives_to_the_empty_ones() -> None:
    for split in (Split(0.9, 0.05), Split(0.05, 0.9), Split(0.01, 0.5), Split(0.34, 0.33)):
        for contents in range(1, 200):
            sizes = split.sizes(contents).tolist()
            assert sum(sizes) == contents and (min(sizes) > 0 if contents > 2 else sizes == [1, 0, contents - 1])
            shares = np.array([split.train, split.validation, 1 - split.train - split.validation])
            assert np.abs(sizes - shares * contents).max() <= 2 or contents < 3


def test_without_the_option_all_lengths_are_cut_together_as_before() -> None:
    """Bits of a cut, and ids, that were there before the option was."""
    task = Parity(length=5, shortest=1, lengths="balanced", split=Split(0.7, 0.15))
    assert counted(task) == {1: [2, 0, 0], 2: [2, 1, 1], 3: [7, 0, 1], 4: [13, 2, 1], 5: [19, 6, 7]}
    assert [[row[part] for part in PARTS] for row in task.part_sizes()] == list(counted(task).values())
    assert "by" not in to_dict(Split()) and identity(task) == "af283ee0d979"
    assert np.array_equal(prepare(task).table, task.split.table(62))


def test_a_length_has_the_same_cut_whatever_the_others_are() -> None:
    """Nothing that one task trains on is held out by another of the same inputs, and lengths are cut independently of each other."""
    split = Split(0.5, 0.25, by="length")
    long, short = (prepare(Parity(length=n, shortest=m, split=split)).table for n, m in ((12, 1), (10, 4)))
    assert np.array_equal(long[2**4 - 2 : 2**11 - 2], short)
    ten, nine = (long[2**n - 2 : 2 ** (n + 1) - 2] == 0 for n in (10, 9))
    assert abs((ten[:512] & nine).mean() - 0.25) < 0.08


MIXED = (Parity(length=4, shortest=2, lengths="balanced"), Parity(length=6, shortest=3, lengths="balanced", cot=False))


@pytest.mark.parametrize(
    "task",
    [
        Parity(length=8, shortest=2, lengths="balanced", split=Split(by="length")),
        pytest.param(Mixture(tasks=MIXED, split=Split(by="length")), marks=pytest.mark.slow),
        pytest.param(Curriculum(tasks=MIXED, split=Split(by="length"), keep=True), marks=pytest.mark.slow),
    ],
    ids=["alone", "mixture", "curriculum"],
)
def test_every_length_has_rows_of_its_own_in_every_part(task) -> None:
    """Drawn rows: no content in two parts; held out are lengths equally often, in all the contents that part has."""
    data, goal = prepare(task), getattr(task, "tasks", (task,))[-1]
    draws = lambda key: [train_batch(task, key, 400, 0, 1.0, data), *(draw_set(task, part, key, 400, data) for part in PARTS[1:])]  # noqa: E731
    found = []
    for rows in jax.jit(draws)(jax.random.key(0)):
        assert np.asarray(rows.scored).any(1).all()
        found.append([tuple(t[: t.index(":")]) for t in ([task.symbols[i] for i in row] for row in np.asarray(rows.tokens))])
    train, validation, test = map(set, found)
    assert not train & validation and not train & test and not validation & test
    for part, drawn in (("validation", found[1]), ("test", found[2])):
        held = Counter(len(x) - 1 for x in set(drawn))
        assert held == {n: m for n in range(1, 9) if n in held and (m := promised(2**n, Split())[PARTS.index(part)])}
        assert set(goal.spans) <= set(held)
    if goal is task:
        assert set(Counter(len(x) for x in found[2]).values()) == {400 // 7, 400 // 7 + 1}


def test_fresh_rows_are_enough_where_short_lengths_are_seldom_for_training() -> None:
    """The share of drawn rows that may be trained on is the mean over lengths: less than the split's."""
    task = Parity(length=3, shortest=1, split=Split(by="length"))
    data = prepare(task)
    drawn = jax.jit(jax.vmap(lambda key: task.part(task.sample(key, ()), data.table)))(jax.random.split(jax.random.key(0), 4000))
    assert math.isclose(task.train_share, (1 / 2 + 2 / 4 + 6 / 8) / 3) and abs((drawn == 0).mean() - task.train_share) < 0.04


LOPSIDED = Parity(length=8, shortest=1, split=Split(key=15))  # few rows of length 1 or 2 are for training


@pytest.mark.parametrize("task", [LOPSIDED, Polynomial(length=3, shortest=1, modulus=4, split=Split(0.6, 0.2))])
def test_the_training_share_is_that_of_rows_though_contents_are_cut_together(task) -> None:
    """Counted: lengths are drawn equally often, and of a length every content."""
    shares = [sizes[0] / sum(sizes) for sizes in counted(task).values()]
    assert len(shares) == len(task.spans) and math.isclose(task.train_share, sum(shares) / len(shares))
    assert task is not LOPSIDED or abs(task.train_share - 0.822) < 5e-4
    enough = sampling.candidates(task, 64)
    assert binom.cdf(63, enough, task.train_share) <= 1e-6 < binom.cdf(63, enough - 1, task.train_share)


def test_in_a_mixture_the_training_share_is_of_the_cut_that_decides() -> None:
    """Two tasks with lengths in common, cut as one: rows of the shorter one are for training as the joint table says."""
    short = Parity(length=3, shortest=1, split=Split(0.7, 0.15))  # by itself its 14 contents would be cut otherwise
    both = Mixture(tasks=(short, dataclasses.replace(short, length=6, cot=False)))
    counts = counted(dataclasses.replace(short, length=6))
    of = lambda most: sum(counts[n][0] / sum(counts[n]) for n in range(1, most + 1)) / most  # noqa: E731
    assert math.isclose(both.train_share, min(of(3), of(6))) and short.train_share != of(3)


def test_a_task_without_lengths_is_not_cut_by_them() -> None:
    for task in (Addition(length=4, split=Split(by="length")), Mixture(tasks=(Addition(length=4), Parity()), split=Split(by="length"))):
        with pytest.raises(Invalid, match=r"^split\.by: .*length.* is not allowed; allowed: none, since addition knows no lengths"):
            prepare(task)


# ---- shares, keys and seeds


def shares_of(task: Addition, rows: int = 20_000, seed: int = 0) -> np.ndarray:
    drawn = draw(task, rows, seed)
    table = prepare(task).table
    return np.asarray(jax.jit(jax.vmap(lambda e: task.part(e, table)))(drawn))


@pytest.mark.parametrize("shares", [(0.9, 0.05), (0.3, 0.2)])
def test_shares_of_a_large_space_are_those_asked_for(shares) -> None:
    parts = shares_of(Addition(length=16, split=Split(*shares)))
    for number, share in enumerate([*shares, 1 - sum(shares)]):
        assert abs((parts == number).mean() - share) < 5 * np.sqrt(share * (1 - share) / len(parts))


@pytest.mark.parametrize("length", [4, 16])
def test_another_key_gives_another_independent_cut(length) -> None:
    first, second = (shares_of(Addition(length=length, split=Split(0.5, 0.25, key=key))) for key in (0, 1))
    both = ((first == 0) & (second == 0)).mean()
    tolerance = 0.02 if length == 16 else 0.15  # 136 contents only
    assert abs(both - 0.25) < tolerance
    again = shares_of(Addition(length=length, split=Split(0.5, 0.25, key=0)))
    assert np.array_equal(first, again)


def test_cuts_of_large_spaces_are_independent_of_single_bits_of_the_operands() -> None:
    task = Addition(length=16, split=Split(0.5, 0.25))
    drawn = draw(task, 20_000, seed=3)
    train = np.asarray(jax.jit(jax.vmap(lambda e: task.part(e, ())))(drawn)) == 0
    tokens = np.asarray(drawn.tokens)
    symbols = np.concatenate([tokens[:, :16] + tokens[:, 17:33], tokens[:, 34:51]], 1)  # both digits of a column, and the sum
    correlation = [np.corrcoef(train, column)[0, 1] for column in symbols.T]
    assert np.abs(correlation).max() < 5 / np.sqrt(len(train))


def test_membership_does_not_depend_on_the_runs_seed() -> None:
    """What two runs of other seeds hold out never occurs in what the other trains on."""
    task = Addition(length=4)
    runs = [Run(task, Transformer(layers=1, d_model=8, heads=1), seed=seed, steps=1) for seed in (0, 1)]
    assert np.array_equal(*(prepare(run.task).table for run in runs))


# ---- training batches


@pytest.mark.parametrize("task", [Addition(length=4), Addition(length=4, split=Split(0.2, 0.4)), Parity(length=6, shortest=2)])
def test_training_batches_hold_training_contents_or_unscored_rows(task) -> None:
    data = prepare(task)
    batches = jax.jit(jax.vmap(lambda key: train_batch(task, key, 8, 0, 0.0, data)))(jax.random.split(jax.random.key(0), 500))
    parts = np.asarray(jax.jit(jax.vmap(jax.vmap(lambda e: task.part(e, data.table))))(batches))
    scored = np.asarray(batches.scored).any(-1)
    assert parts.shape == (500, 8)
    assert (parts[scored] == 0).all()
    assert scored.mean() > 0.9999


def test_a_row_that_is_not_for_training_is_never_scored_even_where_candidates_run_out(monkeypatch) -> None:
    """With no spare candidate about every tenth row is missing: it must count nowhere."""
    monkeypatch.setattr(sampling, "candidates", lambda task, rows: rows)
    task = Addition(length=4)
    data = prepare(task)
    batch = jax.jit(lambda key: train_batch(task, key, 500, 0, 0.0, data))(jax.random.key(0))
    parts = np.asarray(jax.jit(jax.vmap(lambda e: task.part(e, data.table)))(batch))
    assert np.array_equal(np.asarray(batch.scored).any(1), parts == 0)
    assert 0.02 < (parts != 0).mean() < 0.2


@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_candidates_are_just_enough(rows, share) -> None:
    """The chance of too few is at most a millionth with that many, and more with one fewer."""
    drawn = sampling.candidates(Addition(length=16, split=Split(share, 0.01)), rows)

    def shortfall(count: int) -> float:
        return sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(rows))

    assert shortfall(drawn) <= sampling.SHORTFALL <= 1e-6
    assert drawn == rows or shortfall(drawn - 1) > sampling.SHORTFALL


def test_training_batches_are_the_unsplit_law_given_that_a_content_is_for_training() -> None:
    """Every training pair of three-bit addition is as likely as any other: 1/64 for each order."""
    task = Addition(length=3, split=Split(0.5, 0.25))
    data = prepare(task)
    batches = jax.jit(jax.vmap(lambda key: train_batch(task, key, 16, 0, 0.0, data)))(jax.random.split(jax.random.key(0), 1000))
    tokens = np.asarray(batches.tokens).reshape(-1, task.positions)
    ordered = tokens[:, :3] @ [1, 2, 4] + 8 * (tokens[:, 4:7] @ [1, 2, 4])
    counts = np.bincount(ordered, minlength=64)
    present = counts[counts > 0]
    expected = len(tokens) / len(present)
    assert ((present - expected) ** 2 / expected).sum() < len(present) + 5 * np.sqrt(2 * len(present))


def test_without_a_split_every_row_counts() -> None:
    task = Addition(length=2, split=None)
    for draw in (lambda key: train_batch(task, key, 64, 0, 0.0, prepare(task)), lambda key: draw_set(task, "test", key, 64, prepare(task))):
        drawn = jax.jit(draw)(jax.random.key(0))
        assert drawn.tokens.shape == (64, task.positions)
        assert np.asarray(drawn.scored).any(1).all()
        assert len(np.unique(pair_of(np.asarray(drawn.tokens), 2))) == 10  # all of them, in either part
