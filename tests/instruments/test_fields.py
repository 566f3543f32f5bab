"""No option of an instrument that reads networks is accepted and ignored: changing any field changes what is computed, or its rows.

A new field fails here until CASES says with which values it shows.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from elegans.folder import Cohort
from elegans.instruments import Ablate, AttentionMaps, Circuit, Dynamics, Evaluate, Patch, Probe, ReplicaInstrument
from elegans.instruments.base import silent
from elegans.models.transformer import Transformer
from elegans.specs import _KINDS, is_abstract
from elegans.tasks import Addition, Mixture, Parity
from elegans.tasks.sampling import prepare
from elegans.training import Run

RUN = Run(Addition(length=3), Transformer(layers=1, d_model=4, heads=2), steps=1, data_seed=0, init_seed=0)
ITERATIVE = dataclasses.replace(RUN, task=Parity(length=6, shortest=3))  # has lengths, and patterns of its own
ITERATIVE = dataclasses.replace(ITERATIVE, after=dataclasses.replace(RUN, task=Parity(length=5)))
DRAWS = {"part": ["train", "validation"], "examples": [5], "at": ["final"]}
CASES: dict[ReplicaInstrument, dict[str, list[Any]]] = {
    Probe(fit=8, test=4): {
        **{"features": [("carry",), ("first_operand",)], "families": [("resid",), ("resid", "embed"), ("head",)]},
        **{"fit": [9], "test": [5], "c": [1.0], "control": [False], "at": ["final"]},
    },
    Ablate(fit=8, test=4, draws=1): {
        **{"features": [("carry",)], "family": ["resid_mid", "attn_out", "mlp_out", "embed", "head"], "fit": [9], "test": [5]},
        **{"methods": [("mean",), ("resample",), ("projection", "mean"), ("mean", "projection")], "draws": [2], "c": [1.0]},
        **{"at": ["final"]},
    },
    Circuit(examples=4): {**DRAWS, "patterns": [("iteration_1",), ("first",)], "by_length": [False]},
    AttentionMaps(examples=4): {**DRAWS, "length": [4]},
    Patch(examples=4, patterns=("iteration_1",)): {**DRAWS, "patterns": [("iteration_2",), ()], "other": ["final", "seed"]},
    Dynamics(examples=4): DRAWS,
    Evaluate(task=Parity(length=5), examples=4): {**DRAWS, "task": [Parity(length=5, shortest=2), Parity(length=4)]},
    Evaluate(examples=4): {"own": [True]},
    Evaluate(task=Mixture(tasks=(Parity(length=5), Parity(length=4))), examples=4): {"apart": ["tasks"]},
}
PAIRS = [pytest.param(base, name, v, id=f"{base.kind}-{name}-{v}") for base, c in CASES.items() for name, vs in c.items() for v in vs]


@functools.cache
def does(instrument: ReplicaInstrument) -> tuple[str, str]:
    """The traced program, and what its rows are called."""
    run = RUN if isinstance(instrument, (Probe, Ablate)) else ITERATIVE
    shapes = jax.eval_shape(lambda: run.model.init(jax.random.key(0), run.task.vocab_size, run.task.positions))
    given = [shapes] * (1 if instrument.partners([], {}) is None else 2)

    def measure(key: Any, params: Any, *other: Any) -> Any:
        return instrument.apply(run, params, prepare(run.task), key, *other)

    made = jax.make_jaxpr(measure)(jax.random.key(0), *given)
    return str(made), str({name: layout.columns() for name, layout in instrument.layouts(run).items()})


def test_every_field_is_listed():
    own = {c for classes in _KINDS.values() for c in classes if issubclass(c, ReplicaInstrument) and not is_abstract(c)}
    for cls in (c for c in own if c.__module__.startswith("elegans.")):
        listed = {name for base, cases in CASES.items() if type(base) is cls for name in cases}
        assert listed == {i.name for i in cls.infos.values() if i.role != "note"}, cls


@pytest.mark.parametrize(("base", "name", "value"), PAIRS)
def test_every_field_changes_what_is_measured(base, name, value):
    changed = dataclasses.replace(base, **{name: value})
    assert changed != base
    if name == "at":
        assert steps(changed) != steps(base)
    else:
        assert does(changed) != does(base)


class OneCohort(Cohort):
    """Stands for a cohort of one run with weights at two steps besides its end."""

    def __init__(self):
        pass

    def specs(self):
        return [RUN]

    def status(self):
        return {"diverged": {}}

    def weight_steps(self):
        return [0, 3]

    def weights(self, step):
        return self.final()

    def final(self):
        return [RUN.id], np.zeros((1, 2))


def steps(instrument: ReplicaInstrument) -> list[int]:
    """The steps at which a cohort's networks are measured."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(instrument), "_over", lambda self, runs, networks, listener: iter([seen.extend(n[1] for n in networks)]))
        list(instrument._steps(OneCohort(), silent))
    return seen
