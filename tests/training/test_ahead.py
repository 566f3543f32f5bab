"""Programs compiled in threads are the programs that would have been compiled in turn."""

import functools
import os
import subprocess
import sys

import jax
import numpy as np

from elegans import Addition, At, Record, Run, Transformer, grid
from elegans.training.ahead import Ahead
from elegans.training.cohort import Programs
from elegans.training.planner import plan
from elegans.training.train import Checkpoint, train_cohort

RUN = Run(
    Addition(length=3), Transformer(layers=1, d_model=8, heads=2), batch=2, steps=3, record=Record(evaluate=At(), train=At(), examples=4)
)


@functools.cache
def plans():
    """Two structures."""
    return plan(grid(RUN, {"model.d_model": [8, 4], "seed": [0, 1]}), 2**30)


def wanted():
    return [(p, s) for p in plans() for s in p.segments]


def final(planned, ahead):
    """The weights at the end of a cohort."""
    events = [e for e in train_cohort(planned, ahead) if isinstance(e, Checkpoint)]
    return events[-1].states.params


def test_weights_are_the_same_bits_with_and_without_threads():
    with Ahead(wanted(), jax.devices()[0], workers=2) as ahead:
        assert len(ahead.started) == 2  # both are under way before the first is asked for
        in_threads = [final(p, ahead) for p in plans()]
        assert not ahead.started
    with Ahead(wanted(), jax.devices()[0], workers=0) as ahead:
        in_turn = [final(p, ahead) for p in plans()]
    for a, b in zip(in_threads, in_turn, strict=True):
        assert np.array_equal(a, b) and np.isfinite(a).all()


def test_what_is_not_needed_is_passed_over_and_what_was_not_foreseen_is_built():
    (first, second), device = plans(), jax.devices()[0]
    with Ahead(wanted(), device, workers=1) as ahead:
        assert ahead.take(second, second.segments[0]).programs.runs.seed.shape == (2,)
        assert not ahead.started
        late = ahead.take(first, first.segments[0])
    assert late.seconds > 0 and len(late.programs.metrics) == len({"loss", "accuracy", "exact_match", "grad_norm"})


def test_on_a_device_replicas_are_taken_in_one_program_that_is_compiled_ahead(monkeypatch):
    """As from the cores of a CPU, array by array; and the states of a larger cohort are cut to its first replicas."""
    runs, slots, scores = grid(RUN, {"seed": range(9)}), np.array([7, 0, 3]), []
    for on_cpu in (True, False):
        monkeypatch.setattr(Programs, "_on_cpu", on_cpu)
        programs = Programs(runs, jax.devices()[0], 1)
        programs.compile_all()
        compiled = dict(programs._compiled)
        scores.append(programs.evaluate(programs.start().params, "test", slots))
        assert programs._compiled == compiled and ("few" in compiled) != on_cpu
    for a, b in zip(*scores, strict=True):
        assert np.array_equal(a, b, equal_nan=True) and a.shape[0] == 3
    states = programs.start()
    smaller = Programs(runs[:2], jax.devices()[0], 1).place(states)
    assert np.array_equal(smaller.params, np.asarray(states.params)[:2])


def test_threads_wait_less_for_python_s_lock_while_programs_are_compiled():
    before = sys.getswitchinterval()
    with Ahead([], jax.devices()[0], workers=1):
        assert sys.getswitchinterval() < before
    assert sys.getswitchinterval() == before
    with Ahead([], jax.devices()[0], workers=0):
        assert sys.getswitchinterval() == before


def test_every_core_is_a_device_though_loading_a_study_starts_jax(tmp_path):
    """The length of a run in FLOPs is known once rows of its task were counted, by a program."""
    file = tmp_path / "counted.py"
    file.write_text(
        "import elegans as el, jax\nrun = el.Run(el.ShortestPath(vertices=4), el.Transformer(layers=1, d_model=4, heads=1), flops=1e9)\n"
        "assert run.length > 1\nprint(len(jax.devices('cpu')))\nstudy = el.Study([run])\n"
    )
    asked = [sys.executable, "-c", f"from elegans.loading import load_study; load_study({str(file)!r})"]
    said = subprocess.run(asked, capture_output=True, text=True, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert int(said.stdout) == len(os.sched_getaffinity(0))
