"""The published selection method, for comparison: dynamic programming over backprop depth and coarse FLOPs.

Written from the description of the method (GreenTrainer, arXiv:2309.13192, section 3), not from its code.
Like it, this rounds costs down to about a thousand steps, so that what it selects may cost more than the
capacity. It is kinder than the public code in two ways: on the rounded costs it is exact, and it takes
O(tensors * steps).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def published_selection(
    dw: NDArray[np.int64],
    dy: NDArray[np.int64],
    importance: NDArray[np.float64],
    capacity: int,
    steps: int = 1000,
) -> NDArray[np.bool_]:
    """The mask of selected tensors, in backward order; the full backward pass is `steps` units of cost.

    The subproblem P[k, t] is the best importance within t steps whose deepest selected tensor is k: its
    own, and the best of the shallower depths within what its weight gradient leaves. The activation
    gradients down to k come off the budget of depth k, so that shallower depths combine by weight-gradient
    steps alone.
    """
    dw, dy = np.asarray(dw, dtype=np.int64), np.asarray(dy, dtype=np.int64)
    full = int(dw.sum() + dy.sum())
    mask = np.zeros(len(dw), dtype=bool)
    if full == 0:
        return np.asarray(importance) > 0
    dw_steps = _downscaled(dw, steps, full)
    room = min(capacity * steps // full, steps) - np.cumsum(_downscaled(dy, steps, full))

    shallower = np.zeros(steps + 1)  # [t]: the best of the depths so far within t weight-gradient steps
    raised = np.zeros((len(dw), steps + 1), dtype=bool)  # [k, t]: whether depth k is that best
    best, deepest = 0.0, -1
    for k, (cost, left) in enumerate(zip(dw_steps.tolist(), room.tolist(), strict=True)):
        if left < cost:
            continue
        exactly_k = importance[k] + shallower[: left + 1 - cost]  # [t - cost]: P[k, t] for t = cost .. left
        if exactly_k[-1] > best:
            best, deepest = float(exactly_k[-1]), k
        raised[k, cost : left + 1] = exactly_k > shallower[cost : left + 1]
        shallower[cost : left + 1] = np.maximum(shallower[cost : left + 1], exactly_k)

    if deepest < 0:
        return mask
    k, left = deepest, int(room[deepest])
    while k >= 0:
        mask[k] = True
        left -= int(dw_steps[k])
        earlier = np.flatnonzero(raised[:k, left])  # the last to raise the best at `left` holds it
        k = int(earlier[-1]) if earlier.size else -1
    return mask


def _downscaled(costs: NDArray[np.int64], steps: int, full: int) -> NDArray[np.int64]:
    """`costs * steps // full`, in Python integers, as the products may exceed int64."""
    return np.array([cost * steps // full for cost in costs.tolist()], dtype=np.int64)
