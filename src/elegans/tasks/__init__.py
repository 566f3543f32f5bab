"""Languages whose structure is known exactly, one file per family."""

from elegans.tasks.activity import ActivitySelection
from elegans.tasks.addition import Addition
from elegans.tasks.base import Split, Task
from elegans.tasks.majority import InnerProduct, Majority, MajorityOfMajority
from elegans.tasks.multiplication import Multiplication
from elegans.tasks.parity import Parity
from elegans.tasks.sorting import Sorting
from elegans.tasks.subarray import MaximumSubarray
from elegans.tasks.subsequence import LongestCommonSubsequence

__all__ = [
    "ActivitySelection",
    "Addition",
    "InnerProduct",
    "LongestCommonSubsequence",
    "Majority",
    "MajorityOfMajority",
    "MaximumSubarray",
    "Multiplication",
    "Parity",
    "Sorting",
    "Split",
    "Task",
]
