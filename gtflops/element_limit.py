"""A second limit, on the number of trained elements: both limits in one, Lagrangian bounds, and branching."""

import heapq
import math
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from gtflops.forms import Form, Items, Solution, fill

#: Subproblems after which the search ends with what it has, and a bound.
MAX_SUBPROBLEMS = 100
#: Ways to weigh the two limits against each other before branching begins.
MAX_WEIGHTS = 20
#: What all costs sum to, at most, where both limits are one: far finer than either, and within int64.
_SCALE = 2**61


@dataclass(frozen=True, slots=True, eq=False)
class _Subproblem:
    """Some items are ``chosen``; of those that are ``open``, any within ``room`` elements may be."""

    form: Form
    chosen: Items
    open: Items
    room: float


def rounding_of(worth: npt.NDArray[np.float64]) -> float:
    """Differences below this are the rounding of sums of such numbers, or are left to it by the solver."""
    return max(2.0**-48, len(worth) * 2.0**-52) * math.fsum(worth)


def solve_limited(
    form: Form,
    worth: npt.NDArray[np.float64],
    elements: npt.NDArray[np.int64],
    limit: int,
    max_elements: float,
) -> Solution:
    """The items of most worth whose step costs at most ``limit`` and that hold at most ``max_elements``.

    With a price on elements the second limit is gone, and what is left is solved exactly: each price gives an upper
    bound, and the best one is found by intersecting the lines of the selections just above and just below the limit
    (the Lagrangian dual; M. Fisher, "The Lagrangian relaxation method for solving integer programming problems",
    Management Science 27(1), 1981). The selection below is feasible and is filled up. Where bound and best selection
    differ, both limits are combined in one (:func:`_combine`), which nearly always ends it. Where they still differ, an
    item is chosen in one subproblem and left out in another, the one of the largest bound first, until nothing can be
    better or :data:`MAX_SUBPROBLEMS` were looked at; then the largest bound left is the answer's.
    """
    tolerance = rounding_of(worth[worth > 0])
    best, value = np.zeros(len(worth), dtype=np.bool_), 0.0
    root = _Subproblem(form, best, worth > 0, max_elements)
    order = count()  # of equal bounds, the one met first
    queue = [(-math.inf, next(order), root)]
    unsolved = -math.inf  # the bounds of subproblems that the solver of one limit could not finish
    for _ in range(MAX_SUBPROBLEMS):
        if not queue or -queue[0][0] <= value + tolerance:
            break
        inherited, _, problem = heapq.heappop(queue)
        bound, below, above = _relax(problem, worth, elements, limit, tolerance)
        bound = min(bound, -inherited)
        within = below
        if problem is root and above.any():
            combined_bound, combined = _combine(form, worth, elements, limit, int(max_elements))
            bound, within = min(bound, combined_bound), below if combined is None else combined
        room = problem.room - int(elements[within].sum())
        filled = problem.chosen | fill(problem.form, within, np.where(problem.open, worth, 0.0), elements, limit, room)
        if (filled_value := math.fsum(worth[filled])) > value:
            best, value = filled, filled_value
        if bound <= value + tolerance:
            continue
        apart = np.flatnonzero(above & ~below)
        if not len(apart):
            unsolved = max(unsolved, bound)
            continue
        item = apart[elements[apart].argmax()]
        is_item = np.arange(len(worth)) == item
        rest = problem.open & ~is_item
        heapq.heappush(queue, (-bound, next(order), _Subproblem(problem.form, problem.chosen, rest, problem.room)))
        with_item = problem.form.paid(is_item)
        if with_item.base <= limit:
            room = problem.room - int(elements[item])
            heapq.heappush(queue, (-bound, next(order), _Subproblem(with_item, problem.chosen | is_item, rest, room)))
    upper_bound = max(unsolved, -queue[0][0] if queue else -math.inf)
    if upper_bound <= value + tolerance:
        return Solution(best, value, value, optimal=True)
    return Solution(best, value, upper_bound + tolerance, optimal=False)


def _relax(
    problem: _Subproblem,
    worth: npt.NDArray[np.float64],
    elements: npt.NDArray[np.int64],
    limit: int,
    tolerance: float,
) -> tuple[float, Items, Items]:
    """An upper bound of a subproblem, and the selections just below and just above the limit at the best price.

    Without any above, the one below is the subproblem's solution.
    """
    fits = problem.open & (elements <= problem.room)
    worth_open = np.where(fits, worth, 0.0)

    def line(items: Items) -> tuple[float, float]:
        """Worth, and elements that are free, of a selection: its worth at a price is the first plus price x second."""
        return math.fsum(worth_open[items]), problem.room - int(elements[items].sum())

    paid_worth = math.fsum(worth[problem.chosen])
    nothing = np.zeros(len(worth), dtype=np.bool_)
    best = problem.form.solve(worth_open, limit)
    bound, above, below = best.upper_bound, best.mask, nothing
    if line(above)[1] >= 0:
        return paid_worth + bound, above, nothing
    while True:
        (value_above, excess), (value_below, free) = line(above), line(below)
        # Negative only where the solver was cut short, above the limit and with less than below it.
        price = max(0.0, (value_above - value_below) / (free - excess))
        at_price = problem.form.solve(worth_open - price * elements * fits, limit)
        bound = min(bound, at_price.upper_bound + price * problem.room)
        value, slack = line(at_price.mask)
        if value + price * slack <= value_below + price * free + tolerance:  # on the line through both: the best price
            return paid_worth + bound, below, above
        if slack >= 0:
            below = at_price.mask
        else:
            above = at_price.mask


def _combine(
    form: Form, worth: npt.NDArray[np.float64], elements: npt.NDArray[np.int64], limit: int, room: int
) -> tuple[float, Items | None]:
    """An upper bound, and the best selection where one that attains a bound is within both limits.

    What is within both limits is within their sum too, at any weights: one exact problem of one limit, whose best is an
    upper bound, and the answer if it is within both (a surrogate relaxation; F. Glover, "Surrogate constraints",
    Operations Research 16(4), 1968). The weights are found by bisection: the limit that is exceeded weighs more.
    """
    fits = (worth > 0) & (elements <= room)
    worth, elements = np.where(fits, worth, 0.0), np.where(fits, elements, 0)
    total, total_elements = form.total(np.ones_like(fits)) - form.base, int(elements.sum())
    capacity, room = min(limit - form.base, total), min(room, total_elements)
    bound, least, most = math.inf, 0.0, 1.0
    for _ in range(MAX_WEIGHTS):
        share = (least + most) / 2
        weight, price = int(share * _SCALE) // max(1, total), int((1 - share) * _SCALE) // total_elements
        best = form.surcharged(weight, price * elements).solve(worth, weight * capacity + price * room)
        bound = min(bound, best.upper_bound)
        if int(elements[best.mask].sum()) > room:
            most = share
        elif form.total(best.mask) > limit:
            least = share
        else:
            return bound, best.mask
    return bound, None
