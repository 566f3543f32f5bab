"""What a person sees of a training, and when the time that is left is said."""

import re
from types import SimpleNamespace

import jax
import pytest

import elegans as el
from elegans import progress
from elegans.training.convoy import Convoy
from elegans.training.cost import RATES
from elegans.training.planner import plan
from elegans.training.train import Compiling, Progress

RUN = el.Run(el.Addition(length=3), el.Transformer(layers=1, d_model=8, heads=2), batch=4, steps=100_000)


@pytest.fixture
def clock(monkeypatch):
    """Time as the display sees it."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.seconds)
    return now


def test_the_time_left_is_said_as_soon_as_enough_was_done_and_counts_what_compiles(clock, capsys):
    """Two cohorts of equal cost by the prediction; work takes three times as long as predicted."""
    plans = plan([RUN, el.replace(RUN, "task.length", 4)], 2**34)
    first, second = (Convoy((one,)) for one in plans)
    spent = [convoy.seconds(RATES["cpu"]) for convoy in (first, second)]
    display = progress.Display()
    display("plan", SimpleNamespace(stored=[], new=plans, runs=[RUN, RUN], device=jax.devices()[0]))
    began = clock.seconds
    display("convoy", (first, 0))
    display("event", Compiling(0, 1))
    for step in (1, 50_000, 99_999):
        done = spent[0] - (first.seconds(RATES["cpu"], step) - RATES["cpu"].compiling)
        clock.seconds = began + 3 * done
        display("event", Progress(step, 1, 1.0, 1, 0.5))
    lines = [line for line in capsys.readouterr().err.splitlines() if "training" in line]
    left = [re.search(r"(\d+):(\d\d) left", line) for line in lines]
    assert len(lines) == 3 and all(left)
    minutes, seconds = map(int, left[-1].groups())
    assert 60 * minutes + seconds == pytest.approx(3 * (spent[0] + spent[1] - done), abs=1.5)


def test_nothing_is_said_of_the_time_left_at_first(clock, capsys):
    plans = plan([RUN], 2**34)
    display = progress.Display()
    display("plan", SimpleNamespace(stored=[], new=plans, runs=[RUN], device=jax.devices()[0]))
    display("convoy", (Convoy(tuple(plans)), 0))
    clock.seconds += progress.UNSURE - 1
    display("event", Progress(2, 1, 1.0, 2, None))
    clock.seconds += progress.LINE_SECONDS + 1
    display("event", Progress(20, 1, 1.0, 2, None))
    first, second = [line for line in capsys.readouterr().err.splitlines() if "training" in line]
    assert "left" not in first and "left" in second
