"""Languages whose structure is known exactly, one file per family."""

from elegans.tasks.addition import Addition
from elegans.tasks.base import Split, Task
from elegans.tasks.graphs import GraphTask
from elegans.tasks.ordering import TopologicalSort
from elegans.tasks.parity import Parity
from elegans.tasks.paths import ShortestPath
from elegans.tasks.spanning import MinimumSpanningTree
from elegans.tasks.traversal import BreadthFirstSearch, DepthFirstSearch

__all__ = [
    "Addition",
    "BreadthFirstSearch",
    "DepthFirstSearch",
    "GraphTask",
    "MinimumSpanningTree",
    "Parity",
    "ShortestPath",
    "Split",
    "Task",
    "TopologicalSort",
]
