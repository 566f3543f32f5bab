"""Languages whose structure is known exactly, one file per family."""

from elegans.tasks.addition import Addition
from elegans.tasks.base import Split, Task
from elegans.tasks.parity import Parity

__all__ = ["Addition", "Parity", "Split", "Task"]
