"""The selection problem on bare arrays: the chain form and the graph form."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gtflops import _core
from gtflops.errors import InputError

MAX_STATES = 20_000_000
_INT64_MAX = int(np.iinfo(np.int64).max)
_BOOLS = frozenset((bool, np.bool_))


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
    """No selection within the capacity is worth more, by what a sum of doubles can tell; ``value`` if ``optimal``."""
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

    Costs are not quantised. Importances are compared as 62-bit fixed-point numbers; the search ends where no
    selection is worth more by a difference that summing n doubles can tell, n / 2^53 of the value: nothing at all
    where importances are integers whose sum is below 2^53 / n. O(n log n) to bound every depth; at the depths that
    the bounds leave open, O(n) for a greedy selection, and exact dynamic programming over a growing core (D.
    Pisinger, "A minimal algorithm for the 0-1 knapsack problem", Operations Research 45(5), 1997). The problem is
    that of GreenTrainer (arXiv:2309.13192), section 3.
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
    several threads at a time. A copy, or what is read from a pickle, works the structure out again.

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
        self, dependencies: Iterable[ArrayLike], tensor_segments: Iterable[ArrayLike], costs: ArrayLike
    ) -> None:
        self._dependencies = _Rows.of("dependencies", dependencies)
        self._tensor_segments = _Rows.of("tensor_segments", tensor_segments)
        self._costs = _costs("costs", costs).copy()
        num_segments = len(self._dependencies)
        self._dependencies.require_below(np.arange(num_segments), "a segment of smaller index")
        self._tensor_segments.require_below(np.array(num_segments), f"one of the {num_segments} segments")
        if len(self._costs) != num_segments:
            raise InputError(
                f"costs has {len(self._costs)} elements and dependencies {num_segments} rows; expected one of each for "
                "a segment"
            )
        if (total := sum(self._costs.tolist())) > _INT64_MAX:
            raise InputError(f"the sum of costs is {total}; expected at most {_INT64_MAX}, to fit int64")
        self._core = _core.GraphKnapsack(
            self._dependencies.offsets,
            self._dependencies.values,
            self._tensor_segments.offsets,
            self._tensor_segments.values,
            self._costs,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphKnapsack, (list(self._dependencies), list(self._tensor_segments), self._costs)

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


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Rows of indices, one after the other in ``values``: row ``i`` is ``values[offsets[i] : offsets[i + 1]]``."""

    name: str
    offsets: NDArray[np.int64]
    values: NDArray[np.int64]

    @classmethod
    def of(cls, name: str, rows: Iterable[ArrayLike]) -> _Rows:
        try:
            listed: list[Any] = list(rows)
        except TypeError:
            raise InputError(f"{name} is {rows!r}; expected rows of segments, such as [[], [0]]") from None
        if all(isinstance(row, (list, tuple)) for row in listed):
            with suppress(InputError):  # all rows at once is faster; what is wrong is named below, by its row
                values = _costs(name, list(chain.from_iterable(listed)))
                return cls(name, np.cumsum([0, *map(len, listed)], dtype=np.int64), values)
        arrays = [_costs(f"{name}[{index}]", row) for index, row in enumerate(listed)]
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(name, offsets, np.concatenate([np.empty(0, dtype=np.int64), *arrays]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self.values[start:end] for start, end in zip(self.offsets, self.offsets[1:], strict=False))

    def require_below(self, limits: NDArray[np.intp], expected: str) -> None:
        """InputError for the first value that is not below its row's limit, by its row and place in it."""
        limit_of = np.repeat(np.broadcast_to(limits, len(self)), np.diff(self.offsets))
        if (beyond := np.flatnonzero(self.values >= limit_of)).size:
            position = beyond[0]
            row = int(np.searchsorted(self.offsets, position, side="right")) - 1
            where = f"{self.name}[{row}][{position - self.offsets[row]}]"
            raise InputError(f"{where} is {self.values[position]}; expected {expected}, below {limit_of[position]}")


def _costs(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """Integers from 0 to the largest of int64."""
    array = _vector(name, values)
    if array.size == 0:  # an empty list has no dtype of its own
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind in "iu":
        worst = int(array.argmin() if array.dtype.kind == "i" else array.argmax())
        _integer(f"{name}[{worst}]", array[worst], least=0)
        return array.astype(np.int64, copy=False)
    if isinstance(values, Sequence) or array.dtype.kind == "O":
        # Of integers that fit no dtype NumPy makes objects or floats; the elements say which is wrong.
        elements = enumerate(values if isinstance(values, Sequence) else array)
        return np.array([_integer(f"{name}[{index}]", value, least=0) for index, value in elements], dtype=np.int64)
    raise InputError(f"{name} has dtype {array.dtype}; expected integers, such as {name}.astype(np.int64)")


def _importances(values: ArrayLike) -> NDArray[np.float64]:
    """Real numbers; the core refuses those that are not finite."""
    array = _vector("importance", values)
    if array.size == 0:
        return np.empty(0, dtype=np.float64)
    if array.dtype.kind in "iuf":
        return array.astype(np.float64, copy=False)
    if isinstance(values, Sequence) or array.dtype.kind == "O":
        elements = enumerate(values if isinstance(values, Sequence) else array)
        return np.array([_real(f"importance[{index}]", value) for index, value in elements], dtype=np.float64)
    raise InputError(f"importance has dtype {array.dtype}; expected real numbers")


def _vector(name: str, values: ArrayLike) -> NDArray[Any]:
    if isinstance(values, np.ma.MaskedArray):
        raise InputError(f"{name} is a masked array; expected numbers only, such as {name}.filled(0)")
    try:
        array = np.asarray(values)
    except (RuntimeError, TypeError, ValueError) as error:  # rows of different lengths, a tensor with gradients
        raise InputError(f"{name} is not an array of numbers: {error}") from None
    if array.ndim == 0:
        raise InputError(f"{name} is {values!r}; expected a sequence of numbers")
    if array.ndim != 1:
        raise InputError(f"{name} has shape {array.shape}; expected one dimension")
    if isinstance(values, Sequence) and not _BOOLS.isdisjoint(map(type, values)):  # NumPy makes 1 and 2 of [True, 2]
        index = next(index for index, value in enumerate(values) if type(value) in _BOOLS)
        raise InputError(f"{name}[{index}] is {values[index]!r}; expected a number")
    return array


def _integer(name: str, value: Any, *, least: int) -> int:
    try:
        if type(value) in _BOOLS:
            raise TypeError
        integer = operator.index(value)
    except TypeError:
        raise InputError(f"{name} is {value!r}; expected an integer") from None
    if least <= integer <= _INT64_MAX:
        return integer
    shown = integer if integer.bit_length() < 256 else f"an integer of {integer.bit_length()} bits"
    expected = f"{least} or more" if integer < least else f"at most {_INT64_MAX}, to fit int64"
    raise InputError(f"{name} is {shown}; expected {expected}")


def _real(name: str, value: Any) -> float:
    if not isinstance(value, Real) or type(value) in _BOOLS:
        raise InputError(f"{name} is {value!r}; expected a number")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{name} is too large for float64; expected a finite number") from None
