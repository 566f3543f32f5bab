"""The languages of bits and of sequences in plain Python; see `oracles`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

END, EQUALS, PLUS = "$", "=", "+"
Value = int | tuple[int, ...]
Reads = list[tuple[int, Value]]


class Row(NamedTuple):
    """A row before padding: prompt, answer, `$`. `truth` lists (position, value) in reading order."""

    symbols: list[str]
    scored: list[bool]
    truth: dict[str, Reads]


def row(prompt: list[str], answer: Sequence[object], truth: dict[str, Reads] | None = None, equals_scored: bool = True) -> Row:
    """The row that answers `prompt`; scored from `=` (or from what follows it) to `$`, both included."""
    assert prompt.count(EQUALS) == 1 and prompt[-1] == EQUALS and END not in prompt, prompt
    symbols = [*prompt, *map(str, answer), END]
    first = len(prompt) - equals_scored
    return Row(symbols, [p >= first for p in range(len(symbols))], truth or {})


def numbers(prompt: Sequence[str], low: int, high: int) -> list[int]:
    """The symbols before `=` as integers within bounds."""
    values = [int(s) for s in prompt if s != EQUALS]
    assert all(low <= v <= high for v in values), prompt
    return values


# ---- bits: numbers are written least significant bit first


def operands(prompt: list[str]) -> tuple[list[int], list[int]]:
    """The bits of x and of y in `x+y=`."""
    middle = prompt.index(PLUS)
    x, y = numbers(prompt[:middle], 0, 1), numbers(prompt[middle + 1 :], 0, 1)
    assert len(x) == len(y) > 0, prompt
    return x, y


def integer(bits: Sequence[int]) -> int:
    return sum(b << i for i, b in enumerate(bits))


def written(value: int, count: int) -> list[int]:
    return [value >> i & 1 for i in range(count)]


def carry_into(column: int, a: int, b: int) -> int:
    """What the columns below `column` of a + b send into it."""
    return (a % 2**column + b % 2**column) >> column


def addition(prompt: list[str]) -> Row:
    """`x_r` where z_r is predicted; the carry out of bit r where z_(r+1) is. z_0 is predicted at `=`."""
    bits, other = operands(prompt)
    x, y, n, equals = integer(bits), integer(other), len(bits), len(prompt) - 1
    truth: dict[str, Reads] = {
        "first_operand": [(equals + r, bits[r]) for r in range(n)],
        "carry": [(equals + r + 1, carry_into(r + 1, x, y)) for r in range(n)],
    }
    return row(prompt, written(x + y, n + 1), truth)


def multiplication(prompt: list[str]) -> Row:
    """Carries into columns k .. k+n-1 while the k-th partial product joins the sum of those before it."""
    bits, multiplier = operands(prompt)
    x, n, equals = integer(bits), len(bits), len(prompt) - 1
    truth: dict[str, Reads] = {"first_operand": [(equals + r, bits[r]) for r in range(n)]}
    total = x * multiplier[0]
    for k in range(2, n + 1):
        partial = x * multiplier[k - 1] << (k - 1)
        truth[f"carry_{k}"] = [(equals + k + r, carry_into(k + r, total, partial)) for r in range(n)]
        total += partial
    return row(prompt, written(total, 2 * n), truth)


def running_count(bits: list[int]) -> Reads:
    """How many ones have been shown, each bit included where it is read."""
    return [(i, sum(bits[: i + 1])) for i in range(len(bits))]


def majority_of_majority(prompt: list[str]) -> Row:
    """Four groups; a group says 1 with more than half ones; the answer is 1 with at least three such groups."""
    bits = numbers(prompt, 0, 1)
    size, rest = divmod(len(bits), 4)
    assert size > 0 and rest == 0, prompt
    sums = tuple(sum(bits[g * size : (g + 1) * size]) for g in range(4))
    votes = tuple(int(2 * s > size) for s in sums)
    equals = len(bits)
    counts = [(i, sum(bits[i - i % size : i + 1])) for i in range(len(bits))]  # of the bit's own group
    truth: dict[str, Reads] = {"group_sum": [(equals, sums)], "group_bit": [(equals, votes)], "running_count": counts}
    return row(prompt, [int(sum(votes) >= 3)], truth)


def majority(prompt: list[str]) -> Row:
    bits = numbers(prompt, 0, 1)
    return row(prompt, [int(2 * sum(bits) > len(bits))], {"running_count": running_count(bits)})


def bit_parity(prompt: list[str]) -> Row:
    bits = numbers(prompt, 0, 1)
    return row(prompt, [sum(bits) % 2], {"partial": [(i, sum(bits[: i + 1]) % 2) for i in range(len(bits))]})


def inner_product(prompt: list[str]) -> Row:
    return row(prompt, [sum(a & b for a, b in zip(*operands(prompt), strict=True)) % 2])


# ---- sequences


def kadane(values: list[int]) -> tuple[int, int, list[int]]:
    """First and last index of the earliest best subarray, and the running sum after each value."""
    sums, start = [values[0]], 0
    best, first, last = values[0], 0, 0
    for i, value in enumerate(values[1:], 1):
        if sums[-1] < 0:
            start = i
            sums.append(value)
        else:
            sums.append(sums[-1] + value)
        if sums[-1] > best:
            best, first, last = sums[-1], start, i
    return first, last, sums


def maximum_subarray(prompt: list[str]) -> Row:
    """Token = value + 9. Both truths speak of the value before the token at which they are read; the last is `=`."""
    values = [token - 9 for token in numbers(prompt, 0, 18)]
    first, last, sums = kadane(values)
    truth: dict[str, Reads] = {
        "previous_negative": [(i + 1, int(v < 0)) for i, v in enumerate(values)],
        "max_ending_here": [(i + 1, s) for i, s in enumerate(sums)],
    }
    return row(prompt, prompt[first : last + 1], truth)


def activity_selection(prompt: list[str]) -> Row:
    """Starts, then ends. By end, first shown first; taken if it starts no earlier than the last one taken ends."""
    times = numbers(prompt, 1, 18)
    n, odd = divmod(len(times), 2)
    starts, ends = times[:n], times[n:]
    assert not odd and all(1 <= s <= 9 and 1 <= e - s <= 9 for s, e in zip(starts, ends, strict=True)), prompt
    chosen: list[int] = []
    free = 0
    for _, i in sorted((end, i) for i, end in enumerate(ends)):
        if starts[i] >= free:
            chosen += [starts[i], ends[i]]
            free = ends[i]
    return row(prompt, chosen, {"start_time": [(n + i, starts[i]) for i in range(n)]})


def sorting(prompt: list[str]) -> Row:
    return row(prompt, sorted(numbers(prompt, 0, 15)))


def longest_common_subsequence(prompt: list[str]) -> Row:
    """Lengths over prefixes, walked back from both ends; where the two lengths tie, x loses its last value."""
    values = numbers(prompt, 1, 9)
    n, odd = divmod(len(values), 2)
    assert not odd, prompt
    x, y = values[:n], values[n:]
    best = [[0] * (n + 1) for _ in range(n + 1)]
    for i in range(1, n + 1):
        for j in range(1, n + 1):
            same = x[i - 1] == y[j - 1]
            best[i][j] = best[i - 1][j - 1] + 1 if same else max(best[i - 1][j], best[i][j - 1])
    i, j, common = n, n, []
    while i and j:
        if x[i - 1] == y[j - 1]:
            common.append(x[i - 1])
            i, j = i - 1, j - 1
        elif best[i - 1][j] >= best[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return row(prompt, common[::-1])


SEQUENCE_ORACLES: dict[str, Callable[..., Row]] = {
    "addition": addition,
    "multiplication": multiplication,
    "majority_of_majority": majority_of_majority,
    "majority": majority,
    "inner_product": inner_product,
    "bit_parity": bit_parity,
    "maximum_subarray": maximum_subarray,
    "activity_selection": activity_selection,
    "sorting": sorting,
    "longest_common_subsequence": longest_common_subsequence,
}
