"""The closure sets of the C++ core against plain Python."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gtflops._core import ClosureCosts
from gtflops.closure import Segments, needed_by
from gtflops.graph import Graph, Node, Phase
from gtflops.operators import Call
from reference import closure


def packed(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return offsets, np.array([index for row in rows for index in row], dtype=np.int64)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], NDArray[np.int64], NDArray[np.bool_]]:
    """Dependencies, tensor segments, costs [columns, segments] and masks [selections, tensors]."""
    num_segments = draw(st.integers(1, 12))
    below = [st.lists(st.integers(0, i - 1), max_size=3) if i else st.just([]) for i in range(num_segments)]
    dependencies = [draw(row) for row in below]
    tensors = draw(st.lists(st.lists(st.integers(0, num_segments - 1), max_size=3), max_size=8))
    column = st.lists(st.integers(0, 2**58), min_size=num_segments, max_size=num_segments)
    costs = draw(st.lists(column, min_size=1, max_size=3))
    masks = draw(st.lists(st.lists(st.booleans(), min_size=len(tensors), max_size=len(tensors)), max_size=4))
    shape = (len(masks), len(tensors))
    return dependencies, tensors, np.array(costs, dtype=np.int64), np.array(masks, dtype=bool).reshape(shape)


@settings(deadline=None)
@given(graphs())
def test_agrees_with_a_plain_search(
    graph: tuple[list[list[int]], list[list[int]], NDArray[np.int64], NDArray[np.bool_]],
) -> None:
    dependencies, tensors, costs, masks = graph
    core = ClosureCosts(*packed(dependencies), *packed(tensors), costs)
    sizes = core.num_segments, core.num_tensors, core.num_columns
    assert sizes == (len(dependencies), len(tensors), len(costs))
    expected = [sorted(closure(dependencies, tensors, np.flatnonzero(mask).tolist())) for mask in masks]
    sums = np.array([costs[:, segments].sum(axis=1) for segments in expected], dtype=np.int64)
    np.testing.assert_array_equal(core.costs(masks), sums.reshape(len(masks), len(costs)))
    for mask, segments, total in zip(masks, expected, sums, strict=True):
        np.testing.assert_array_equal(core.cost(mask), total)
        np.testing.assert_array_equal(np.flatnonzero(core.reached(mask)), segments)


def test_very_many_tensors_are_merged_in_linear_time() -> None:
    """A second for 30,000; sets of tensors are integers, of which Python's own hashes would make it quadratic."""
    nothing = Call("aten.mul.Tensor", (), (), ())
    nodes = [Node("loss", nothing, (), Phase.FORWARD, "", "", None)]
    gradients: dict[str, int | None] = {}
    for place in range(30_000):
        nodes.append(Node(f"dy{place}", nothing, (max(0, len(nodes) - 2),), Phase.BACKWARD, "", "", None))
        nodes.append(Node(f"dw{place}", nothing, (len(nodes) - 1,), Phase.BACKWARD, "", "", None))
        gradients[f"w{place}"] = len(nodes) - 1
    graph = Graph("Chain", tuple(nodes), gradients, 0, (), (), ())
    names = tuple(gradients)
    needed = needed_by(graph, names)
    start = time.process_time()
    segments = Segments.of(graph, names, needed, np.ones((2, len(nodes)), dtype=np.int64))
    assert time.process_time() - start < 5
    assert (len(segments.needed_by), segments.costs.sum()) == (2 * len(names) - 1, 4 * len(names))
    assert segments.chain_costs()[1].tolist() == [2] * (len(names) - 1) + [0]


def diamond(**changes: Any) -> ClosureCosts:
    """3 -> {1, 2} -> 0; tensor 0 needs segment 1, tensor 1 needs segment 3."""
    arguments = {
        "dependency_offsets": np.array([0, 0, 1, 2, 4]),
        "dependencies": np.array([0, 0, 1, 2]),
        "tensor_offsets": np.array([0, 1, 2]),
        "tensor_segments": np.array([1, 3]),
        "costs": np.array([[1, 10, 100, 1000]]),
    }
    return ClosureCosts(**(arguments | changes))


def test_shared_segments_are_paid_once() -> None:
    assert diamond().cost(np.array([True, False])).tolist() == [11]
    assert diamond().cost(np.array([True, True])).tolist() == [1111]


def test_strided_and_read_only_arrays() -> None:
    masks = np.array([[True, True, False, False], [False, True, True, False]])
    masks.flags.writeable = False
    costs = np.asfortranarray([[1, 10, 100, 1000], [1, 0, 0, 0]])
    assert diamond(costs=costs).costs(masks[:, ::2]).tolist() == [[11, 1], [1111, 1]]


def test_queries_run_in_parallel() -> None:
    core = diamond()
    masks = np.random.default_rng(0).random((200, 2)) < 0.5
    with ThreadPoolExecutor(4) as pool:
        parallel = list(pool.map(core.cost, masks))
    np.testing.assert_array_equal(parallel, core.costs(masks))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dependency_offsets": np.array([], dtype=np.int64)}, "dependency_offsets is empty"),
        ({"dependency_offsets": np.array([1, 1, 1, 2, 4])}, r"dependency_offsets\[0\] is 1; expected 0"),
        ({"dependency_offsets": np.array([0, 0, 2, 1, 4])}, r"dependency_offsets\[3\] is 1, less than"),
        ({"dependencies": np.array([0, 0, 1])}, "dependencies has 3 elements; expected 4"),
        ({"dependencies": np.array([0, 0, 1, -2])}, r"dependencies\[3\] is -2; expected a segment"),
        ({"dependencies": np.array([0, 2, 1, 2])}, "segment 2 depends on segment 2; expected only smaller"),
        ({"tensor_segments": np.array([1, 4])}, r"tensor_segments\[1\] is 4; expected a segment"),
        ({"costs": np.array([[1, 2]])}, "costs has 2 elements; expected 4"),
        ({"costs": np.array([[1, 10, -100, 1000]])}, r"costs\[0, 2\] is -100; expected 0 or more"),
    ],
)
def test_malformed_graphs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diamond(**changes)


def test_a_total_beyond_int64_is_refused() -> None:
    with pytest.raises(OverflowError, match=r"sum of costs\[0, :\] does not fit int64"):
        diamond(costs=np.array([[2**62, 0, 2**62, 0]]))


def test_masks_are_boolean_and_of_the_right_size() -> None:
    with pytest.raises(ValueError, match="mask has 3 elements; expected 2"):
        diamond().cost(np.array([True, False, True]))
    with pytest.raises(ValueError, match="masks has shape \\[1, 3\\]; expected one column a tensor, 2"):
        diamond().costs(np.array([[True, False, True]]))
    with pytest.raises(TypeError):  # indices would pass for a mask otherwise
        diamond().cost(np.array([0, 1]))
