"""The C++ core: NumPy arrays in, NumPy arrays out. Dtypes are as annotated; nothing is converted."""

import numpy as np
from numpy.typing import NDArray

class ClosureCosts:
    """What the gradients of a set of tensors cost together.

    A segment is a piece of the backward pass that runs either whole or not at all; it depends only on
    segments of smaller index. ``dependencies[dependency_offsets[i]:dependency_offsets[i + 1]]`` are the
    segments that segment ``i`` needs; in the same way, ``tensor_segments`` are those that each tensor's
    gradient needs directly. ``costs`` holds one row of non-negative costs for each column of the answer,
    ``[columns, segments]``.

    Raises ValueError on malformed input, OverflowError where the total of a column does not fit int64.
    Immutable; queries release the GIL and may run in parallel.
    """

    def __init__(
        self,
        dependency_offsets: NDArray[np.int64],
        dependencies: NDArray[np.int64],
        tensor_offsets: NDArray[np.int64],
        tensor_segments: NDArray[np.int64],
        costs: NDArray[np.int64],
    ) -> None: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def num_tensors(self) -> int: ...
    @property
    def num_columns(self) -> int: ...
    def cost(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The cost of one selection, ``[tensors]`` -> ``[columns]``; O(segments + dependencies)."""

    def costs(self, masks: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The cost of each selection, ``[selections, tensors]`` -> ``[selections, columns]``."""

    def reached(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which segments a selection needs, ``[tensors]`` -> ``[segments]``."""

class GraphKnapsack:
    """The selection problem in the graph form. See gtflops.solver.GraphKnapsack; arrays as for ClosureCosts, with
    one cost a segment.

    Raises ValueError on malformed input, OverflowError where a sum is out of range. Immutable; solving releases
    the GIL.
    """

    def __init__(
        self,
        dependency_offsets: NDArray[np.int64],
        dependencies: NDArray[np.int64],
        tensor_offsets: NDArray[np.int64],
        tensor_segments: NDArray[np.int64],
        costs: NDArray[np.int64],
    ) -> None: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def num_tensors(self) -> int: ...
    def solve(
        self, importance: NDArray[np.float64], capacity: int, max_states: int
    ) -> tuple[NDArray[np.bool_], float, int, float, bool]:
        """The best selection: (mask, value, cost, upper bound, optimal). Ctrl-C ends it."""

def solve_chain(
    dw: NDArray[np.int64],
    dy: NDArray[np.int64],
    importance: NDArray[np.float64],
    capacity: int,
    max_states: int,
) -> tuple[NDArray[np.bool_], float, int, float, bool]:
    """The best selection in the chain form: (mask, value, cost, upper bound, optimal). See gtflops.knapsack.

    Raises ValueError on malformed input, OverflowError where a sum is out of range. Ctrl-C ends it.
    """
