"""The selection problem in the chain form, on bare arrays."""

from __future__ import annotations

import operator
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
    """Whether the selection is proved to be the best; False only where ``max_states`` was too small."""


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
            0.9 GB and some seconds. Instances from models need thousands.

    Returns:
        The selection. With no tensors, or where not one fits (a capacity below ``dy[0]``, for example), it is
        empty, worth 0 and costs 0. Where several selections are best, the same one is returned on every run
        and every machine; which of them it is, is not specified.

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
    try:
        mask, value, cost, upper_bound, optimal = _core.solve_chain(
            *arrays, _integer("capacity", capacity, least=0), _integer("max_states", max_states, least=1)
        )
    except (ValueError, OverflowError) as error:
        raise InputError(str(error)) from None
    mask.flags.writeable = False
    return KnapsackResult(mask, value, cost, upper_bound, optimal)


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
