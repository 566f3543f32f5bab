"""Languages whose structure is known exactly, one file per family."""

from elegans.tasks.activity import ActivitySelection
from elegans.tasks.addition import Addition
from elegans.tasks.base import Split, Task
from elegans.tasks.checks import check_task
from elegans.tasks.graphs import GraphTask
from elegans.tasks.iteration import BinaryCopy, IterativeTask, Polynomial
from elegans.tasks.majority import BitParity, InnerProduct, Majority, MajorityOfMajority
from elegans.tasks.mixture import Curriculum, Mixture, Several
from elegans.tasks.multiplication import Multiplication
from elegans.tasks.ordering import TopologicalSort
from elegans.tasks.parity import Parity
from elegans.tasks.paths import ShortestPath
from elegans.tasks.sorting import Sorting
from elegans.tasks.spanning import MinimumSpanningTree
from elegans.tasks.subarray import MaximumSubarray
from elegans.tasks.subsequence import LongestCommonSubsequence
from elegans.tasks.traversal import BreadthFirstSearch, DepthFirstSearch

__all__ = [
    "ActivitySelection",
    "Addition",
    "BinaryCopy",
    "BitParity",
    "BreadthFirstSearch",
    "Curriculum",
    "DepthFirstSearch",
    "GraphTask",
    "InnerProduct",
    "IterativeTask",
    "LongestCommonSubsequence",
    "Majority",
    "MajorityOfMajority",
    "MaximumSubarray",
    "MinimumSpanningTree",
    "Mixture",
    "Multiplication",
    "Parity",
    "Polynomial",
    "Several",
    "ShortestPath",
    "Sorting",
    "Split",
    "Task",
    "TopologicalSort",
    "check_task",
]
