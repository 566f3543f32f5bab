"""Maximum subarray, activity selection, sorting and subsequences: their laws, what is scored, contents, and losses found twice."""

import functools
import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from elegans import ActivitySelection, LongestCommonSubsequence, MaximumSubarray, Sorting, Task, check_task
from elegans.tasks import counting, subsequence
from elegans.tasks.sequences import shuffled_multiset
from elegans.types import Example

ROWS = 2000
COUNTED = 0.015  # nats: four standard errors of a plateau counted over 20,000 rows
EQUALS, END = 19, 20
LARGE = (MaximumSubarray(), ActivitySelection(), Sorting(), LongestCommonSubsequence())
SMALL = (MaximumSubarray(length=5), ActivitySelection(length=4), Sorting(length=4), LongestCommonSubsequence(length=4))
SIZES = {MaximumSubarray: (130, 64), ActivitySelection: (66, 32), Sorting: (34, 16), LongestCommonSubsequence: (50, 32)}  # row, prompt
every_task = pytest.mark.parametrize("task", LARGE, ids=repr)


@functools.cache
def draw(task: Task) -> Example:
    return check_task(task, ROWS).rows


def prompts(task: Task) -> np.ndarray:
    tokens = draw(task).tokens
    return tokens[:, : tokens[0].tolist().index(EQUALS)]


def answers(task: Task) -> list[list[int]]:
    return [row[row.index(EQUALS) + 1 : row.index(END)] for row in draw(task).tokens.tolist()]


# ---- what all have in common


@every_task
def test_scored_from_equals_to_the_first_end_and_padded_with_ends(task) -> None:
    drawn = draw(task)
    row, prompt = SIZES[type(task)]
    assert task.positions == row and task.vocab_size == 21
    assert (drawn.tokens[:, prompt] == EQUALS).all() and ((drawn.tokens == EQUALS).sum(1) == 1).all()
    first_end = (drawn.tokens == END).argmax(1)[:, None]
    place = np.arange(row)
    assert (drawn.scored == ((place >= prompt) & (place <= first_end))).all()
    assert ((drawn.tokens == END) == (place >= first_end)).all()
    assert task.floor() == 0


@every_task
def test_mean_lengths_are_those_of_rows(task) -> None:
    scored = draw(task).scored.sum(1)
    error = 5 * scored.std() / math.sqrt(ROWS) + 1e-9
    assert abs(task.mean_positions() - (scored.mean() + SIZES[type(task)][1])) < error


def test_mean_lengths_are_the_published_ones() -> None:
    """31.0 tokens of maximum subarray (31.15 in a million rows of NumPy's), 8.2 of activity selection: 3.09 activities."""
    assert abs(MaximumSubarray().scored_tokens() - 31.0) < 0.4
    assert round(ActivitySelection().scored_tokens(), 1) == 8.2
    assert abs((ActivitySelection().scored_tokens() - 2) / 2 - 3.09) < 0.03


# ---- the law of the prompts


def test_multisets_are_uniform_and_so_are_their_orders() -> None:
    """Four numbers below 3: 15 multisets, each equally likely, and within it every order."""
    keys = jax.random.split(jax.random.key(0), 30_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: shuffled_multiset(key, 4, 3)))(keys))
    found = Counter(map(tuple, drawn.tolist()))
    rows = list(itertools.product(range(3), repeat=4))
    orders = Counter(tuple(sorted(row)) for row in rows)
    expected = np.array([len(drawn) / 15 / orders[tuple(sorted(row))] for row in rows])
    counts = np.array([found[row] for row in rows])
    assert len(orders) == 15 and counts.sum() == len(drawn)
    assert 1e-3 < chi2.sf(((counts - expected) ** 2 / expected).sum(), 80) < 1 - 1e-3


@every_task
def test_prompts_take_every_value_equally_often(task) -> None:
    shown = prompts(task)
    if isinstance(task, ActivitySelection):  # ends are starts and durations together
        shown = np.concatenate([shown[:, :16], shown[:, 16:] - shown[:, :16]], 1)
    low, high = {MaximumSubarray: (0, 18), Sorting: (0, 15)}.get(type(task), (1, 9))
    assert shown.min() == low and shown.max() == high
    share = np.stack([(shown == v).mean(1) for v in range(low, high + 1)])  # [value, row]
    assert (np.abs(share.mean(1) - 1 / len(share)) < 5 * share.std(1) / math.sqrt(ROWS)).all()


def numpy_multisets(rng: np.random.Generator, rows: int, size: int, kinds: int) -> np.ndarray:
    """Sorted bars among places, then a shuffle."""
    places = size + kinds - 1
    bars = np.sort(rng.random((rows, places)).argsort(1)[:, : kinds - 1], 1)
    gaps = np.diff(bars, axis=1, prepend=-1, append=places) - 1  # stars of every kind
    values = np.stack([np.repeat(np.arange(kinds), g) for g in gaps])
    return rng.permuted(values, axis=1)


# ---- answers of short rows, found by trying everything


def best_run(row: list[int]) -> list[int]:
    """Of all runs with the largest sum the first to end, and of those the longest."""
    runs = [(i, j) for j in range(1, len(row) + 1) for i in range(j)]
    return row[slice(*max(runs, key=lambda r: (sum(row[slice(*r)]) - 9 * (r[1] - r[0]), -r[1], -r[0])))]


def activities(row: list[int]) -> list[int]:
    start, end = row[: len(row) // 2], row[len(row) // 2 :]
    chosen, last = [], 0
    for i in sorted(range(len(start)), key=end.__getitem__):
        if start[i] >= last:
            chosen += [start[i], end[i]]
            last = end[i]
    return chosen


def common(x: tuple, y: tuple) -> tuple:
    if not x or not y:
        return ()
    if x[-1] == y[-1]:
        return (*common(x[:-1], y[:-1]), x[-1])
    return max(common(x[:-1], y), common(x, y[:-1]), key=len)  # the first of equals: x is dropped


SOLVED = {
    MaximumSubarray: best_run,
    ActivitySelection: activities,
    Sorting: sorted,
    LongestCommonSubsequence: lambda row: list(common(tuple(row[: len(row) // 2]), tuple(row[len(row) // 2 :]))),
}


@pytest.mark.parametrize("task", SMALL, ids=repr)
def test_short_rows_are_solved(task) -> None:
    assert answers(task) == [SOLVED[type(task)](row) for row in prompts(task).tolist()]


def test_the_rows_that_the_docstrings_draw() -> None:
    drawn = {
        MaximumSubarray: "11 6 13 8 11 = 13 8 11 $ $ $",
        ActivitySelection: "1 4 2 7 3 8 9 8 = 1 3 4 8 $ $ $ $ $",
        Sorting: "7 10 2 7 = 2 7 7 10 $",
        LongestCommonSubsequence: "1 5 2 6 5 6 2 2 = 5 2 $ $ $",
    }
    for task in SMALL:
        text = drawn[type(task)]
        prompt, answer = text.split(" = ")
        solved = SOLVED[type(task)]([int(v) for v in prompt.split()])
        assert solved == [int(v) for v in answer.replace("$", "").split()]
        assert text in type(task).__doc__ and len(text.split()) == task.positions


@pytest.mark.parametrize("task", [t for t in SMALL if not isinstance(t, Sorting)], ids=repr)
def test_counted_plateaus_are_those_of_numpys_rows(task) -> None:
    """The same law drawn and solved by other means: short rows, where that is quick."""
    rows, rng = 20_000, np.random.default_rng(0)
    n = task.length
    if isinstance(task, MaximumSubarray):
        shown = numpy_multisets(rng, rows, n, 19)
    else:
        shown = 1 + numpy_multisets(rng, rows, 2 * n, 9)
    if isinstance(task, ActivitySelection):
        shown[:, n:] += shown[:, :n]
    seen: dict[int, Counter] = {}
    for row in shown.tolist():
        for place, token in enumerate([EQUALS, *SOLVED[type(task)](row), END]):
            seen.setdefault(place, Counter())[token] += 1
    scored = sum(sum(c.values()) for c in seen.values())
    nats = sum(-v * math.log(v / sum(c.values())) for c in seen.values() for v in c.values())
    assert abs(task.plateau() - nats / scored) < COUNTED
    assert abs(task.scored_tokens() - scored / rows) < 0.05


# ---- each task's truth


def test_the_running_sum_is_the_best_that_ends_there() -> None:
    task = SMALL[0]
    values, truth = prompts(task) - 9, draw(task).truth
    best = [[max(row[i:j].sum() for i in range(j)) for j in range(1, 6)] for row in values]
    running, negative = truth["max_ending_here"], truth["previous_negative"]
    assert (running.values == best).all() and (negative.values == (values < 0)).all()
    assert all((t.positions == np.arange(1, 6)).all() for t in (running, negative))
    assert (running.kind, negative.kind) == ("number", "binary")


def test_start_times_are_read_at_their_ends() -> None:
    task = LARGE[1]
    start = draw(task).truth["start_time"]
    assert (start.values == prompts(task)[:, :16]).all() and (start.positions == np.arange(16, 32)).all() and start.kind == "number"


def test_ranks_and_repeats_of_sorted_numbers() -> None:
    task = LARGE[2]
    shown, ordered, truth = prompts(task), np.array(answers(task)), draw(task).truth
    assert (ordered == np.sort(shown, 1)).all()
    ranks = [[sum(row[:i] <= row[i]) for i in range(16)] for row in shown[:200]]
    assert (truth["rank"].values[:200] == ranks).all() and (truth["rank"].positions == np.arange(16)).all()
    assert (truth["repeat"].values == (ordered[:, 1:] == ordered[:, :-1])).all()
    assert (truth["repeat"].positions == np.arange(17, 32)).all()


@pytest.mark.parametrize("size", [1, 7, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_tables_of_common_lengths_are_those_of_the_recurrence(size, share) -> None:
    """Also where rows take several words, and where all or none is equal."""
    equal = np.random.default_rng(size).random((size, size)) < share
    table = np.zeros((size + 1, size + 1), np.int32)
    for i, j in np.ndindex(size, size):
        table[i + 1, j + 1] = table[i, j] + 1 if equal[i, j] else max(table[i, j + 1], table[i + 1, j])
    found = subsequence.lengths(jnp.asarray(equal))
    assert found.dtype == np.int32 and np.array_equal(found, table)


def test_sums_of_words_carry() -> None:
    """As Python's whole numbers, of 96 bits; ones everywhere make every word carry."""
    rng, size = np.random.default_rng(0), 3
    pairs = [rng.integers(0, 2**32, (2, size), dtype=np.uint32) for _ in range(20)]
    for a, b in [*pairs, (np.full(size, 2**32 - 1, np.uint32), np.array([1, 0, 0], np.uint32))]:
        whole = (sum(int(w) << 32 * i for i, w in enumerate(a)) + sum(int(w) << 32 * i for i, w in enumerate(b))) % 2**96
        found = subsequence.sum_of_words(jnp.asarray(a), jnp.asarray(b))
        assert [int(w) for w in found] == [whole >> 32 * i & 2**32 - 1 for i in range(size)]


@pytest.mark.parametrize("task", [LARGE[3], SMALL[3], LongestCommonSubsequence(length=18)], ids=repr)
def test_common_lengths_grow_to_the_length_of_the_answer(task) -> None:
    """Also where the program loops over rows of the table (past the first 16)."""
    n, truth = task.length, draw(task).truth
    length, grows = truth["common_length"].values, truth["grows"].values
    assert (length == grows.cumsum(1)).all() and set(np.unique(grows)) <= {0, 1}
    assert length[:, -1].tolist() == [len(a) for a in answers(task)]
    assert all((t.positions == np.arange(n, 2 * n)).all() for t in truth.values())
    for row, answer in zip(prompts(task).tolist(), answers(task), strict=True):
        for sequence in (iter(row[:n]), iter(row[n:])):
            assert all(v in sequence for v in answer)  # consumes the iterator: in this order


def test_common_lengths_are_those_of_prefixes() -> None:
    task = SMALL[3]
    length = draw(task).truth["common_length"].values
    expected = [[len(common(tuple(r[:4]), tuple(r[4 : 4 + j]))) for j in range(1, 5)] for r in prompts(task)[:300].tolist()]
    assert length[:300].tolist() == expected


# ---- the closed form of sorting


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_plateau_of_sorting_is_that_of_all_rows(length) -> None:
    rows = np.sort(list(itertools.product(range(16), repeat=length)), 1)
    shares = [np.bincount(column, minlength=16) / len(rows) for column in rows.T]
    nats = sum(-p * math.log(p) for share in shares for p in share if p)
    assert math.isclose(Sorting(length=length).plateau(), nats / (length + 2), rel_tol=1e-9)


def test_the_plateau_of_sorting_is_that_of_counted_rows() -> None:
    assert abs(Sorting().plateau() - counting.plateau(Sorting())) < 3e-3


# ---- contents


def contents(task: Task, rows: np.ndarray) -> np.ndarray:
    of = jax.jit(jax.vmap(lambda row: task.content(Example(row, jnp.ones(row.shape, bool)))))
    return np.asarray(of(jnp.asarray(rows)))


@pytest.mark.parametrize(
    ("task", "low", "high"),
    [
        (MaximumSubarray(length=3), 0, 18),
        (ActivitySelection(length=2), 1, 9),
        (Sorting(length=3), 0, 15),
        (LongestCommonSubsequence(length=2), 1, 9),
    ],
    ids=repr,
)
def test_contents_of_small_spaces_are_ranks_of_prompts(task, low, high) -> None:
    digits = 4 if isinstance(task, (ActivitySelection, LongestCommonSubsequence)) else 3
    rows = np.array(list(itertools.product(range(low, high + 1), repeat=digits)))
    if isinstance(task, ActivitySelection):
        rows[:, 2:] += rows[:, :2]
    assert task.contents == len(rows)
    assert sorted(contents(task, rows)[:, 0].tolist()) == list(range(len(rows)))


@every_task
def test_contents_of_large_spaces_see_every_number_and_nothing_else(task) -> None:
    first = draw(task).tokens[0]
    prompt = SIZES[type(task)][1]
    changed = np.tile(first, (prompt + 1, 1))
    changed[np.arange(prompt), np.arange(prompt)] = (first[:prompt] - 1) % 19
    assert len(np.unique(contents(task, changed), axis=0)) == prompt + 1 and task.contents is None
    other_answer = np.where(np.arange(task.positions) > prompt, 0, first)
    assert np.array_equal(*contents(task, np.stack([first, other_answer])))
    assert len(np.unique(contents(task, draw(task).tokens), axis=0)) == ROWS
