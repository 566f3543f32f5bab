"""Training: optimisers, one run's step, the cohort, its plan and its checkpoints."""

from elegans.training.optimisers import SGD, WSD, AdamW, Constant, Cosine, Linear, Lion, Optimizer, Schedule
from elegans.training.run import At, Every, LogSpaced, Never, Record, Run, When
from elegans.training.step import State, Update
from elegans.training.transfer import follow

__all__ = [
    "SGD",
    "WSD",
    "AdamW",
    "At",
    "Constant",
    "Cosine",
    "Every",
    "Linear",
    "Lion",
    "LogSpaced",
    "Never",
    "Optimizer",
    "Record",
    "Run",
    "Schedule",
    "State",
    "Update",
    "When",
    "follow",
]
