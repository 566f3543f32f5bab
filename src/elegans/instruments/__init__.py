"""Instruments: one file each, one protocol. They read trained networks or rows, and yield rows."""

from elegans.instruments.ablate import Ablate
from elegans.instruments.attention import AttentionMaps
from elegans.instruments.base import Instrument, Layout, ReplicaInstrument, StoreInstrument, measure
from elegans.instruments.circuit import Circuit
from elegans.instruments.compute import AcrossCompute
from elegans.instruments.dynamics import Dynamics
from elegans.instruments.evaluate import Evaluate
from elegans.instruments.factors import Factor, StepTable, graft, ov, qk, step_table
from elegans.instruments.patch import Patch
from elegans.instruments.probe import Probe
from elegans.instruments.scaling import Scaling
from elegans.instruments.transition import Transition

__all__ = [
    "Ablate", "AcrossCompute", "AttentionMaps", "Circuit", "Dynamics", "Evaluate", "Factor", "Instrument", "Layout", "Patch", "Probe",
    "ReplicaInstrument", "Scaling", "StepTable", "StoreInstrument", "Transition", "graft", "measure", "ov", "qk", "step_table",
]  # fmt: skip
