"""Where a curve changes: half-way crossings, change points, what is known of them, and which of two came first."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

Interval = tuple[float | None, float | None, float | None]  # middle, low, high; None where there is none, or where it is infinite
Bracket = tuple[float, float]  # two neighbouring points of an axis between which something happened
EARLIEST = 0.5  # where step 0 stands on a logarithmic axis
EXACT = 2500  # differences between two samples, of which the exact distribution is quickly had


def bracket(x: Sequence[float], values: Sequence[float], level: float) -> Bracket:
    """The neighbouring points between which a rising curve passes a level for good.

    (-inf, x[0]) where it is above from the start, (x[-1], inf) where it ends below.
    """
    last = _last_below(values, level)
    return -math.inf if last < 0 else float(x[last]), float(x[last + 1]) if last + 1 < len(x) else math.inf


def _last_below(values: Sequence[float], level: float) -> int:
    """The place of the last value below a level; -1 where none is."""
    return max(np.nonzero(~(np.asarray(values) >= level))[0].tolist(), default=-1)


def crossing(x: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """The first x at which a rising curve passes a level for good, interpolated on a logarithmic axis.

    None where it starts above the level, or ends below it.
    """
    last = _last_below(values, level)
    if last < 0 or last + 1 == len(x):
        return None
    s0, s1 = (math.log(max(s, EARLIEST)) for s in (x[last], x[last + 1]))
    share = (level - values[last]) / (values[last + 1] - values[last])
    return math.exp(s0 + share * (s1 - s0))


def change_point(x: Sequence[float], values: Sequence[float]) -> Bracket | None:
    """The neighbouring points between which a rising curve changes: those that the best two levels are split at.

    Least squares of one level before and a higher one after (Hinkley 1970, Biometrika 57:1; Bai 1994, J. Time Ser. Anal. 15:453),
    every point weighted by its share of the logarithmic axis, so that dense recording does not count twice. Unlike a
    crossing it needs no level and is not moved by one spike. None where no split has the higher level after it.
    """
    if len(x) < 2:
        return None
    place = np.log(np.maximum(np.asarray(x, float), EARLIEST))
    weight = np.diff(np.r_[place[0], (place[1:] + place[:-1]) / 2, place[-1]])
    heavy, total = np.cumsum(weight)[:-1], np.cumsum(weight * np.asarray(values, float))
    before, after = total[:-1] / heavy, (total[-1] - total[:-1]) / (weight.sum() - heavy)
    explained = np.where(after > before, heavy * (weight.sum() - heavy) * (after - before) ** 2, 0)
    split = int(np.argmax(explained))
    return (float(x[split]), float(x[split + 1])) if explained[split] > 0 else None


ANYWHERE = (-math.inf, math.inf)
SHARE = (0.0, 1.0)  # where an accuracy, an exact match or an r2 that counts from 0 can be


def interval(
    values: Sequence[float] | np.ndarray, confidence: float, fewest: int = 3, within: Bracket = ANYWHERE
) -> tuple[float, float | None, float | None]:
    """Mean and Student t interval over independent runs, cut to where the mean can be; none for fewer than three, or another number."""
    mean = float(np.mean(values))
    if len(values) < fewest:
        return mean, None, None
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    return mean, max(mean - half, min(mean, within[0])), min(mean + half, max(mean, within[1]))


def median(values: Sequence[float], confidence: float) -> tuple[float, float | None, float | None]:
    """The median and its interval between two of the values, whatever their distribution; infinite values are late ones, not missing.

    The order statistics that a sign test does not refuse (Conover 1999, "Practical Nonparametric Statistics", section 3.2): none
    for fewer than six values at 95 %. The middle of an infinite and a finite value is infinite.
    """
    ordered = sorted(values)
    below = int(stats.binom.ppf((1 - confidence) / 2, len(ordered), 0.5))  # values that may lie beyond either end
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return (middle, ordered[below - 1], ordered[-below]) if below > 0 else (middle, None, None)


def shift(first: Sequence[Bracket], second: Sequence[Bracket], confidence: float) -> Interval:
    """How much greater the values of one sample are than another's: the median of all differences, and its interval.

    The estimate of Hodges and Lehmann (1963) with the interval that inverts the Mann-Whitney test (Hollander, Wolfe and Chicken 2014,
    "Nonparametric Statistical Methods", section 4.3), for independent samples of one shape; see `beyond` for how few have none.
    Values are known to brackets, and it holds wherever in them they are. One whose bracket is infinite is known to be late (or
    early) alone, and an end that hangs on such values is None.
    """
    a, b = np.array(first, float), np.array(second, float)
    least, greatest = (np.sort((a[:, i, None] - b[:, 1 - i]).ravel()) for i in (0, 1))
    cut, middle = beyond(len(a), len(b), confidence), [(len(least) - 1) // 2, len(least) // 2]
    ends = (least[cut - 1], greatest[-cut]) if cut else (-math.inf, math.inf)
    middles = np.concatenate([least[middle], greatest[middle]])
    low, high = (float(end) if math.isfinite(end) else None for end in ends)
    return float(middles.mean()) if np.isfinite(middles).all() else None, low, high


@functools.cache
def beyond(first: int, second: int, confidence: float) -> int:
    """How many differences between samples of two sizes lie at or beyond either end of the interval of `shift`; 0 where there is none.

    By the exact distribution of Mann and Whitney's U, of many by its normal limit. At 95 % the smallest samples are 4 and 4, or 3 and 5.
    """
    if first * second > EXACT:
        spread = math.sqrt(first * second * (first + second + 1) / 12)
        return math.floor(first * second / 2 - stats.norm.ppf((1 + confidence) / 2) * spread)
    ways = np.zeros((first + 1, first * second + 1))  # of choosing so many ranks with such a sum above the least
    ways[0, 0] = 1
    for rank in range(first + second):
        for taken in range(min(rank + 1, first), 0, -1):
            if (above := rank + 1 - taken) <= second:
                ways[taken, above:] += ways[taken - 1, : ways.shape[1] - above]
    return int(np.searchsorted(np.cumsum(ways[first]) / ways[first].sum(), (1 - confidence) / 2, side="right"))


def verdict(low: float | None, high: float | None, same: float, words: tuple[str, str, str], blur: float = 0.0) -> str:
    """What an interval says: above zero, below it, or within `same` of it, in these words; else undecided.

    A missing bound is an infinite one. Both bounds may be wrong by `blur`.
    """
    if low is not None and low > blur:
        return words[0]
    if high is not None and high < -blur:
        return words[1]
    return words[2] if low is not None and high is not None and -same < low - blur and high + blur < same else "undecided"


def spanning(brackets: Sequence[Bracket], confidence: float) -> tuple[float, float | None, float | None]:
    """Mean of the middles, and an interval of the mean over runs that are known to their brackets only.

    From the lower bound of the lower ends' t interval to the upper bound of the upper ends': wherever in its bracket each
    run's value lies, the mean is above the first and below the second with the stated confidence. No interval below three.
    """
    lows, highs = zip(*brackets, strict=True)
    mean = float(np.mean([(a + b) / 2 for a, b in brackets]))
    return mean, interval(lows, confidence)[1], interval(highs, confidence)[2]


def among(brackets: Sequence[Bracket], confidence: float) -> tuple[float | None, float | None]:
    """An interval of the median of values that are known to their brackets only, some of which may have an infinite end.

    From the lower bound of the lower ends' `median` to the upper bound of the upper ends'; a bound is None where it is not finite.
    """
    lows, highs = zip(*brackets, strict=True)
    low, high = median(lows, confidence)[1], median(highs, confidence)[2]
    return low if low is not None and math.isfinite(low) else None, high if high is not None and math.isfinite(high) else None


def decades(found: Bracket) -> Bracket:
    """A bracket of steps or FLOPs in decades (log10); step 0 stands at half a step, what is infinite stays so."""
    low, high = found
    return low if math.isinf(low) else math.log10(max(low, EARLIEST)), math.log10(max(high, EARLIEST))


def lead_of(late: Bracket, early: Bracket) -> Bracket:
    """The least and the greatest lead, in decades, of one transition over another, both known to their brackets."""
    return difference(decades(late), decades(early))


def difference(of: Bracket, less: Bracket) -> Bracket:
    """The least and the greatest difference of two values that are known to their brackets."""
    return of[0] - less[1], of[1] - less[0]


def loudness(low: float | None, high: float | None, same: float) -> str:
    """What the interval of a feature's lead over the loss says, in decades.

    quiet: the feature could be read before the loss moved (all of it beyond `same`); loud: not before (none of it is); else
    undecided. A missing bound is an infinite one.
    """
    if low is not None and low > same:
        return "quiet"
    return "loud" if high is not None and high < same else "undecided"
