"""What training costs, and when the runs that go on move to a smaller program."""

import dataclasses
import itertools

import pytest

import elegans as el
from elegans.training.cost import RATES, Leg, seconds, shrink

RUN = el.Run(el.Addition(length=6), el.Transformer(layers=4, d_model=32), batch=64, steps=10)
OTHER = el.replace(RUN, "task", el.Addition(length=20))


def ways(lengths, rates):
    """Every way to leave runs that have ended: some of the steps at which any ends begin a leg."""
    stops = sorted({n for each in lengths for n in each})
    for chosen in itertools.product([False, True], repeat=len(stops) - 1):
        bounds = [0, *(stop for stop, new in zip(stops, chosen, strict=False) if new), stops[-1]]
        live = [tuple(rates.size(sum(n > a for n in each), len(each)) for each in lengths) for a in bounds[:-1]]
        yield [Leg(a, b, size) for a, b, size in zip(bounds, bounds[1:], live, strict=False)]


@pytest.mark.parametrize("cores", [False, True])
@pytest.mark.parametrize("compiling", [0.0, 0.5, 8.0, 1e6])
def test_legs_take_least_time(compiling, cores):
    """Of all ways; without a price every end of a run is one, at a high price none is."""
    rates = dataclasses.replace(RATES["gpu"], compiling=compiling, cores=cores)
    lengths, runs = [[9000, 9000, 900, 880, 90, 9], [8000, 4000, 900, 3]], [RUN, OTHER]
    legs = shrink(lengths, runs, rates)
    least = min(ways(lengths, rates), key=lambda legs: seconds(runs, legs, rates))
    assert seconds(runs, legs, rates) == pytest.approx(seconds(runs, least, rates))
    assert (legs[0].start, legs[0].sizes, legs[-1].stop) == (0, (6, 4), 9000)
    for leg in legs:
        assert all(sum(n > leg.start for n in each) <= size for each, size in zip(lengths, leg.sizes, strict=True))
    if compiling == 1e6:
        assert len(legs) == 1
    if not compiling and not cores:
        assert [leg.stop for leg in legs] == [3, 9, 90, 880, 900, 4000, 8000, 9000]
