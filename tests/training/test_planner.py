"""The plan's bound on memory: how it is made must not matter to what is planned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jex

from elegans import MLP, AdamW, Addition, Attention, FixedAttention, Learned, Parity, Run, Transformer, grid, replace, spec
from elegans.errors import Invalid
from elegans.tasks.sampling import prepare
from elegans.training import planner
from elegans.training.cohort import AHEAD, Programs, resolve
from elegans.training.device import choose
from elegans.training.step import draw_batch, draw_data, start, take

RUN = Run(Addition(length=3), Transformer(layers=3, d_model=16, heads=2), AdamW(), batch=8, steps=20)
STRUCTURES = {
    "plain": {},
    "dropout": {"model.dropout": 0.1, "model.dtype": "bfloat16"},
    "layers that differ": {"model.attention": (Attention(), FixedAttention(), Attention())},
    "wide": {"model.d_model": 256, "model.layers": 1},
    "rows": {"batch": 256, "model.layers": 1, "model.mlp": MLP()},
    "some weights": {"trained": ["blocks.1.*"], "model.position": Learned()},
    "a finite set": {"train_set": 512},
    "another task": {"task": Parity(length=6)},
}


def made(changes: dict) -> Run:
    run = RUN
    for path, value in changes.items():
        run = replace(run, path, value)
    return run


def whole(run: Run) -> int:
    """Bytes alive at a time in a step as a device trains it, every layer by itself, with whatever it calls written out."""
    task = prepare(run.task)
    leaves, treedef = jax.tree.flatten(jax.tree.map(np.asarray, resolve(run)))

    def step(*leaves):
        run = jax.tree.unflatten(treedef, leaves)
        data = draw_data(run, task)
        batches = jax.vmap(lambda step: draw_batch(run, step, data))(jnp.arange(AHEAD))
        return take(run, start(run), jnp.int32(0), jax.tree.map(lambda a: a[0], batches)), batches

    def alive(jaxpr) -> int:
        """Array by array from its birth to its last use; what is called lives beside that, its results not counted twice."""
        size = {v: v.aval.size * v.aval.dtype.itemsize for eqn in jaxpr.eqns for v in eqn.outvars}
        kept = [{v for v in jaxpr.outvars if type(v) is not jex.Literal}]
        for eqn in reversed(jaxpr.eqns):  # what is needed after each equation
            kept.append((kept[-1] - set(eqn.outvars)) | {v for v in eqn.invars if type(v) is not jex.Literal})
        most = 0
        for eqn, after, before in zip(jaxpr.eqns, kept[-2::-1], kept[::-1], strict=False):
            inner = max((alive(j) for j in jex.jaxprs_in_params(eqn.params)), default=0)
            now = sum(size.get(v, 0) for v in before | after | set(eqn.outvars))
            most = max(most, now + max(0, inner - sum(size[v] for v in eqn.outvars)))
        return most

    return alive(jax.make_jaxpr(step)(*leaves).jaxpr)


@pytest.mark.parametrize("changes", STRUCTURES.values(), ids=STRUCTURES)
def test_the_bound_is_above_the_whole_trace_and_near_it(changes):
    run = made(changes)
    assert whole(run) <= planner.traced_bytes(run) <= 1.5 * whole(run)


@pytest.mark.parametrize("budget", [3, 20])
def test_what_is_planned_is_as_by_the_whole_trace(budget, monkeypatch):
    """Cohorts, sizes and what is compiled to be measured: of structures far below the budget, and far above it."""
    runs = [run for name in ("plain", "rows", "another task") for run in grid(made(STRUCTURES[name]), {"seed": range(8)})]
    memory = budget * whole(RUN) * 2
    measured: list[str] = []

    def measure(members):
        measured.extend(run.id for run in members)
        return len(members) * whole(members[0]) // 2  # as compiled: half of the trace

    def planned():
        measured.clear()
        found = planner.plan(runs, memory, measure)
        return [(plan.id, len(plan.runs)) for plan in found], list(measured)

    quick = planned()
    monkeypatch.setattr(planner, "traced_bytes", whole)
    assert quick == planned()


@spec
class Noted(Attention):
    """Attention that says when Python runs it."""

    def apply(self, params, x, context):
        CALLS.append(x.shape)
        return super().apply(params, x, context)


CALLS: list[tuple[int, ...]] = []


def test_layers_that_are_alike_are_traced_once_and_no_program_of_a_cpu_is_made_of_that():
    run = replace(RUN, "model.attention", Noted())
    calls = {}
    for layers in (2, 9):
        CALLS.clear()
        planner.traced_bytes(replace(run, "model.layers", layers))
        calls[layers] = len(CALLS)
    assert calls == {2: 1, 9: 0}  # the deeper model's are the shallower one's
    CALLS.clear()
    whole(replace(run, "model.layers", 4))
    assert len(CALLS) == 4
    CALLS.clear()
    Programs([replace(run, "model.layers", 4)], choose(), 1).compile()
    assert len(CALLS) == 4


def test_on_a_device_a_bound_decides_and_what_one_run_needs_is_measured_where_it_leaves_none():
    runs = grid(RUN, {"seed": range(10)})
    bound = planner.traced_bytes(RUN)
    measured: list[int] = []

    def measure(members):
        measured.append(len(members))
        return len(members) * bound // 3

    def sizes(memory: int, platform: str) -> list[int]:
        measured.clear()
        return [len(plan.runs) for plan in planner.plan(runs, memory, measure, platform=platform)]

    assert sizes(4 * bound, "gpu") == [4, 3, 3] and not measured  # even, and as few as can be
    assert sizes(4 * bound, "cpu") == [10] and measured == [10]
    assert sizes(bound // 2, "gpu") == [1] * 10 and measured == [1]
    with pytest.raises(Invalid, match="one run of this structure needs"):
        sizes(bound // 4, "gpu")


@pytest.mark.parametrize("runs", [1, 7, 24, 25])
@pytest.mark.parametrize("most", [1, 3, 8, 24])
def test_what_is_left_of_a_group_is_divided_as_if_nothing_were_stored(runs, most):
    members = grid(RUN, {"seed": range(runs)})
    parts = planner.evenly(members, most)
    assert [run for part in parts for run in part] == members
    assert max(map(len, parts)) <= most and len(parts) == -(-runs // most)
    assert len({len(p) for p in parts}) <= 2 and sorted(parts, key=len, reverse=True) == parts
    done = 0
    for i, part in enumerate(parts[:-1]):
        done += len(part)
        assert planner.evenly(members[done:], most) == parts[i + 1 :]


@spec
class Remembering(Attention):
    """Attention that keeps something between layers, which no trace of one layer alone can."""

    def apply(self, params, x, context):
        y = super().apply(params, x, context)
        last, KEPT[:] = KEPT[:], [x]
        return y + last[0] if last else y


KEPT: list = []


def test_a_component_that_cannot_be_traced_alone_is_planned_all_the_same():
    run = replace(RUN, "model.attention", Remembering())
    sizes = []
    for bytes_of in (whole, planner.traced_bytes):
        KEPT.clear()
        sizes.append(bytes_of(run))
    assert sizes[0] <= sizes[1]


@pytest.mark.slow
def test_the_bound_is_above_what_is_compiled():
    for changes in ({}, {"batch": 128}, {"model.d_model": 128}):
        run = made(changes)
        assert Programs([run], choose(), 1).bytes() <= planner.traced_bytes(run)
