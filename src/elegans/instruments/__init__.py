"""Instruments: one file each, one protocol. They read trained networks or rows, and yield rows."""

from elegans.instruments.ablate import Ablate
from elegans.instruments.base import Instrument, Layout, ReplicaInstrument, StoreInstrument, measure
from elegans.instruments.compute import AcrossCompute
from elegans.instruments.probe import Probe
from elegans.instruments.scaling import Scaling
from elegans.instruments.transition import Transition

__all__ = [
    "Ablate", "AcrossCompute", "Instrument", "Layout", "Probe", "ReplicaInstrument", "Scaling", "StoreInstrument", "Transition", "measure",
]  # fmt: skip
