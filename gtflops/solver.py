"""The selection problem on bare arrays: the chain form and the graph form."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gtflops import _core
from gtflops.errors import InputError

MAX_STATES = 20_000_000
_INT64_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True, eq=False)
class KnapsackResult:
    """A selection of tensors, with the proof of how good it is."""

    mask: NDArray[np.bool_]
    """Which tensors are selected, aligned with the arguments; read-only."""
    value: float
    """Sum of the selected importances, in index order."""
    cost: int
    """What the selection costs, re-summed from the arguments; never more than the capacity."""
    upper_bound: float
    """No selection within the capacity is worth more; equal to ``value`` when ``optimal``."""
    optimal: bool
    """Whether it is proved to be the best; False where ``max_states`` or the limit on planning a graph was met."""


def knapsack(
    dw: ArrayLike,
    dy: ArrayLike,
    importance: ArrayLike,
    capacity: int,
    *,
    max_states: int = MAX_STATES,
) -> KnapsackResult:
    """The most important tensors whose backward pass fits the capacity, in the chain form of the problem.

    Tensors are in backward order, index 0 nearest to the loss. A selection S costs
    ``sum(dw[k] for k in S) + sum(dy[:max(S) + 1])``: its weight gradients, and every activation gradient
    down to its deepest tensor. Of all S that cost at most ``capacity``, the answer has the largest sum of
    importances.

    >>> best = knapsack(dw=[4, 4, 9], dy=[1, 1, 1], importance=[1.0, 2.5, 3.0], capacity=11)
    >>> best.mask.tolist(), best.value, best.cost, best.optimal
    ([True, True, False], 3.5, 10, True)

    Args:
        dw: FLOPs of each tensor's weight gradient: n integers, 0 or more.
        dy: FLOPs of the activation gradients that each tensor adds to those nearer to the loss: n integers,
            0 or more.
        importance: what each tensor is worth: n finite numbers. A tensor with 0 or less is never selected.
        capacity: FLOPs that the selection may cost, 0 or more.
        max_states: the limit on the search, in recorded partial selections; 20 million take up to about
            1.2 GB and some seconds. Instances from models need thousands.

    Returns:
        The selection. With no tensors, or where not one fits (a capacity below ``dy[0]``, for example), it is
        empty, worth 0 and costs 0. Of several best selections, always the same one: the first that the search
        finds, which goes through depths by their bound, then from the loss downwards, and through tensors by
        importance per FLOP, then larger cost first, then in backward order.

    Raises:
        InputError: an argument is not as above, or ``sum(dw) + sum(dy)`` does not fit int64, or the sum of
            the positive importances float64.

    Costs are not quantised. Importances are compared as 62-bit fixed-point numbers, finer than the rounding
    of their sum as doubles. O(n log n) to bound every depth; at the depths that the bounds leave open, O(n)
    for a greedy selection, and exact dynamic programming over a growing core (D. Pisinger, "A minimal
    algorithm for the 0-1 knapsack problem", Operations Research 45(5), 1997). The problem is that of
    GreenTrainer (arXiv:2309.13192), section 3.
    """
    arrays = _costs("dw", dw), _costs("dy", dy), _importances(importance)
    limits = _integer("capacity", capacity, least=0), _integer("max_states", max_states, least=1)
    try:
        return _result(*_core.solve_chain(*arrays, *limits))
    except (ValueError, OverflowError) as error:
        raise InputError(str(error)) from None


class GraphKnapsack:
    """The selection problem in the graph form: shared pieces of the backward pass are paid once.

    A *segment* is a piece of the backward pass that runs either whole or not at all. A tensor's gradient needs some
    segments, those need others; a selection costs every segment that it needs, once. The structure is worked out
    once, here; :meth:`solve` takes other importances and another capacity each time. Immutable; may be solved from
    several threads at a time.

    >>> diamond = GraphKnapsack(dependencies=[[], [0], [0], [1, 2]], tensor_segments=[[1], [3]], costs=[5, 1, 2, 4])
    >>> best = diamond.solve(importance=[1.0, 1.5], capacity=12)
    >>> best.mask.tolist(), best.value, best.cost
    ([True, True], 2.5, 12)
    >>> diamond.solve(importance=[1.0, 1.5], capacity=11).mask.tolist()
    [True, False]

    Args:
        dependencies: for each of the m segments, the segments that it needs, all of smaller index.
        tensor_segments: for each of the n tensors, the segments that its gradient needs directly.
        costs: FLOPs of each segment: m integers, 0 or more.

    Raises:
        InputError: an argument is not as above, or the sum of the costs does not fit int64.
    """

    def __init__(
        self, dependencies: Sequence[ArrayLike], tensor_segments: Sequence[ArrayLike], costs: ArrayLike
    ) -> None:
        rows = (*_rows("dependencies", dependencies), *_rows("tensor_segments", tensor_segments))
        try:
            self._core = _core.GraphKnapsack(*rows, _costs("costs", costs))
        except (ValueError, OverflowError) as error:
            raise InputError(str(error)) from None

    def solve(self, importance: ArrayLike, capacity: int, *, max_states: int = MAX_STATES) -> KnapsackResult:
        """The most important tensors whose segments fit the capacity.

        Arguments, result and errors as those of :func:`knapsack`.
        """
        limits = _integer("capacity", capacity, least=0), _integer("max_states", max_states, least=1)
        try:
            return _result(*self._core.solve(_importances(importance), *limits))
        except (ValueError, OverflowError) as error:
            raise InputError(str(error)) from None


def _result(mask: NDArray[np.bool_], value: float, cost: int, upper_bound: float, optimal: bool) -> KnapsackResult:
    mask.flags.writeable = False
    return KnapsackResult(mask, value, cost, upper_bound, optimal)


def _rows(name: str, rows: Sequence[ArrayLike]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offsets and concatenation of rows of indices."""
    arrays = [_costs(f"{name}[{index}]", row) for index, row in enumerate(rows)]
    offsets = np.cumsum([0, *(array.size for array in arrays)], dtype=np.int64)
    return offsets, np.concatenate([np.empty(0, dtype=np.int64), *arrays])


def _costs(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = _vector(name, values)
    if array.size == 0:  # an empty list has no dtype of its own
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} has dtype {array.dtype}; expected integers (FLOPs) that fit int64")
    index = int(array.argmax())
    if array[index] > _INT64_MAX:
        raise InputError(f"{name}[{index}] is {array[index]}; expected at most {_INT64_MAX}, to fit int64")
    return array.astype(np.int64, copy=False)


def _importances(values: ArrayLike) -> NDArray[np.float64]:
    array = _vector("importance", values)
    if array.size and array.dtype.kind not in "iuf":
        raise InputError(f"importance has dtype {array.dtype}; expected real numbers")
    return array.astype(np.float64, copy=False)


def _vector(name: str, values: ArrayLike) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise InputError(f"{name} is not an array of numbers: {error}") from None
    if array.ndim != 1:
        raise InputError(f"{name} has shape {array.shape}; expected one dimension, one element a tensor")
    return array


def _integer(name: str, value: int, *, least: int) -> int:
    try:
        integer = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}; expected an integer") from None
    if not least <= integer <= _INT64_MAX:
        raise InputError(f"{name} is {integer}; expected an integer from {least} to {_INT64_MAX}")
    return integer
