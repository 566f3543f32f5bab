"""Programs compiled in threads are the programs that would have been compiled in turn."""

import functools
import gc
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import elegans as el
from elegans import Addition, At, Record, Run, Transformer, grid, replace
from elegans.training.ahead import Ahead
from elegans.training.cohort import Programs
from elegans.training.convoy import Convoy, in_turn
from elegans.training.cost import RATES
from elegans.training.device import compiler_options
from elegans.training.planner import plan
from elegans.training.train import Checkpoint, train_convoy

RUN = Run(
    Addition(length=3), Transformer(layers=1, d_model=8, heads=2), batch=2, steps=3, record=Record(evaluate=At(), train=At(), examples=4)
)


@functools.cache
def plans():
    """Two structures."""
    return plan(grid(RUN, {"model.d_model": [8, 4], "seed": [0, 1]}), 2**30)


@functools.cache
def convoys():
    return [Convoy((p,)) for p in plans()]


def wanted():
    return [(c, leg) for c in convoys() for leg in c.legs]


def final(convoy, ahead):
    """The weights at the end of a cohort."""
    made = [e.split()[0].params for e in train_convoy(convoy, ahead) if isinstance(e, Checkpoint)]
    return made[-1]


def test_weights_are_the_same_bits_with_and_without_threads():
    with Ahead(wanted(), jax.devices()[0], workers=2) as ahead:
        assert len(ahead.started) == 1  # nothing takes the cores from the first, for which training waits
        ahead.take(*wanted()[0])
        assert len(ahead.started) == 1 and not ahead.wanted  # nor does training wait for the next
        in_threads = [final(c, ahead) for c in convoys()]
        assert not ahead.started
    with Ahead(wanted(), jax.devices()[0], workers=0) as ahead:
        in_turn = [final(c, ahead) for c in convoys()]
    for a, b in zip(in_threads, in_turn, strict=True):
        assert np.array_equal(a, b) and np.isfinite(a).all()


def test_what_is_not_needed_is_passed_over_and_what_was_not_foreseen_is_built():
    (first, second), device = convoys(), jax.devices()[0]
    with Ahead(wanted(), device, workers=1) as ahead:
        assert ahead.take(second, second.legs[0]).programs.runs.seed.shape == (2,)
        assert not ahead.started
        late = ahead.take(first, first.legs[0])
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


@el.spec
class Keeping(el.Attention):
    """Attention that adds what it read in the layer before, which no trace of one layer alone can."""

    def apply(self, params, x, context):
        CALLS.append(x)
        return super().apply(params, x, context) + (CALLS[-2] if len(CALLS) > 1 else 0)


CALLS: list = []


@pytest.mark.parametrize(("attention", "once"), [(el.Attention(), True), (Keeping(), False)], ids=["own", "custom"])
def test_for_a_device_layers_that_are_alike_are_traced_once_to_the_same_losses(attention, once, monkeypatch):
    run = replace(replace(RUN, "model.layers", 4), "model.attention", attention)
    losses, calls = [], []
    block = Transformer._block
    monkeypatch.setattr(Transformer, "_block", lambda self, *args: calls.append(1) or block(self, *args))
    for on_cpu in (True, False):
        CALLS.clear(), calls.clear()
        monkeypatch.setattr(Programs, "_on_cpu", on_cpu)
        programs = Programs([run], jax.devices()[0], 1)
        programs.compile()
        assert len(calls) == (1 if once and not on_cpu else 4)
        losses.append(programs.chunk(programs.start(), 0, 3)[1]["loss"])
    assert np.allclose(*losses, rtol=1e-5, atol=0)


def test_a_long_cohort_and_a_short_one_train_in_turn_where_programs_compile_ahead():
    runs = [replace(RUN, "steps", n) for n in (4000, 20, 300_000, 90, 10**8)]
    left = [(Convoy((one,)), 0) for run in runs for one in plan([run], 2**30)]
    steps = lambda **how: [left[i][0].steps for i in in_turn(left, RATES["cpu"], **how)]  # noqa: E731
    assert steps(ahead=False) == [10**8, 300_000, 4000, 90, 20] and steps(ahead=False, minutes=5) == steps(ahead=False)[::-1]
    assert steps(ahead=True) == [10**8, 20, 300_000, 90, 4000]
    assert steps(ahead=True, minutes=5) == [300_000, 20, 4000, 90, 10**8]  # what does not end in time comes last


def test_training_begins_with_the_program_that_compiles_soonest():
    runs = [replace(replace(RUN, "model.layers", layers), "steps", n) for layers, n in ((3, 900), (1, 500), (1, 80), (3, 20), (1, 700))]
    left = [(Convoy((one,)), 0) for run in runs for one in plan([run], 2**30)]
    assert [left[i][0].steps for i in in_turn(left, RATES["gpu"], ahead=True)] == [700, 20, 900, 80, 500]


@pytest.mark.parametrize(
    ("convoys", "first"),
    [
        ([(2, 10**7), (1, 100), (1, 500_000)], 2),  # one task is compiled sooner than two, and trains while those are compiled
        ([(2, 10**7), (1, 100)], 0),  # sooner still, but over before the other is there
        ([(3, 10**7), (2, 10**6), (1, 50_000)], 1),
    ],
)
def test_training_begins_with_what_fills_the_time_until_the_next_program(convoys, first):
    tasks = el.Addition(length=3), el.Multiplication(length=4), el.Majority(length=4)
    runs = [[replace(replace(RUN, "task", task), "steps", steps) for task in tasks[:count]] for count, steps in convoys]
    left = [(Convoy(tuple(plan(together, 2**30))), 0) for together in runs]
    assert in_turn(left, RATES["gpu"], ahead=True)[0] == first


def test_a_gpu_s_wide_models_in_bfloat16_are_compiled_without_triton_s_products():
    tried = {
        (platform, dtype, d)
        for platform in ("cpu", "gpu")
        for dtype in ("float32", "bfloat16")
        for d in (8, 64, 512)
        if not compiler_options(platform, Transformer(d_model=d, dtype=dtype))
    }
    assert len(tried) == 10 and not tried & {("gpu", "bfloat16", 64), ("gpu", "bfloat16", 512)}


@pytest.mark.parametrize(("workers", "quiet"), [(1, True), (0, False)])
def test_threads_wait_less_for_python_s_lock_and_for_its_search_for_cycles_while_programs_are_compiled(workers, quiet):
    before = sys.getswitchinterval(), gc.get_threshold()
    with Ahead([], jax.devices()[0], workers=workers):
        assert (sys.getswitchinterval() < before[0]) == quiet
        assert gc.get_threshold()[:2] == before[1][:2] and (gc.get_threshold()[2] > 10**9) == quiet
    assert (sys.getswitchinterval(), gc.get_threshold()) == before


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
