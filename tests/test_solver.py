"""The solver on bare arrays: the chain form against brute force, plain DP and HiGHS; what both forms accept."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gtflops.errors import InputError
from gtflops.solver import GraphKnapsack, KnapsackResult, knapsack
from highs import Answer, highs_chain
from reference import chain_cost, chain_optimum_brute_force, chain_optimum_dp

Chain = tuple[list[int], list[int], list[Any], int]


def checked(dw: Any, dy: Any, importance: Any, capacity: int, **options: Any) -> KnapsackResult:
    """The solver's answer, after its own figures were re-summed."""
    result = knapsack(dw, dy, importance, capacity, **options)
    selected = np.flatnonzero(result.mask).tolist()
    assert result.mask.dtype == bool
    assert result.mask.shape == (len(dw),)
    assert result.cost == chain_cost([int(c) for c in dw], [int(c) for c in dy], selected)
    assert result.cost <= capacity
    assert result.value == sum(float(importance[k]) for k in selected)
    assert all(importance[k] > 0 for k in selected)
    assert result.upper_bound == result.value if result.optimal else result.upper_bound >= result.value
    return result


@st.composite
def chains(draw: st.DrawFn, importances: st.SearchStrategy[float], max_size: int, largest_costs: list[int]) -> Chain:
    n = draw(st.integers(0, max_size))
    cost = st.integers(0, draw(st.sampled_from(largest_costs)))

    def several(element: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(element, min_size=n, max_size=n))

    dw, dy = several(cost), several(st.one_of(st.just(0), cost))
    return dw, dy, several(importances), draw(st.integers(0, sum(dw) + sum(dy) + 1))


def few_tensors(importances: st.SearchStrategy[float]) -> st.SearchStrategy[Chain]:
    return chains(importances, max_size=9, largest_costs=[1, 5, 40, 10**11])


def small_costs(importances: st.SearchStrategy[float]) -> st.SearchStrategy[Chain]:
    """More tensors; the plain DP has a state for each sum of costs, so these stay small."""
    return chains(importances, max_size=24, largest_costs=[1, 5, 40])


@settings(deadline=None)  # the references are slow
@given(few_tensors(st.integers(-3, 30)))
def test_integer_importances_equal_brute_force(chain: Chain) -> None:
    result = checked(*chain)
    assert result.optimal
    assert result.value == chain_optimum_brute_force(*chain) == chain_optimum_dp(*chain)


@settings(deadline=None)  # the references are slow
@given(few_tensors(st.floats(-1.0, 1e6, allow_subnormal=True)))
def test_float_importances_match_brute_force(chain: Chain) -> None:
    result = checked(*chain)
    assert result.optimal
    assert result.value == pytest.approx(chain_optimum_brute_force(*chain), rel=1e-12, abs=0)


@settings(deadline=None)  # the references are slow
@given(small_costs(st.integers(0, 4)))
def test_ties_and_small_values_equal_the_plain_dp(chain: Chain) -> None:
    result = checked(*chain)
    assert result.optimal
    assert result.value == chain_optimum_dp(*chain)
    np.testing.assert_array_equal(result.mask, knapsack(*chain).mask)


@settings(deadline=None)  # the references are slow
@given(small_costs(st.floats(-1.0, 10.0)), st.integers(1, 5))
def test_a_limit_on_states_keeps_the_bound(chain: Chain, max_states: int) -> None:
    result = checked(*chain, max_states=max_states)
    assert result.upper_bound >= chain_optimum_dp(*chain) * (1 - 1e-12)


def opt_like(layers: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The structure of OPT-2.7B at batch 4 x 512 from the loss on: 16 tensors a layer, few distinct costs."""
    rng = np.random.default_rng(seed)
    tokens, width, vocabulary = 4 * 512, 2560, 50272
    square, attention = 2 * tokens * width**2, 4 * 2 * tokens * 512 * width
    vector = tokens * width
    # (weight gradient, activation gradient): fc2, fc1, norm, out, v, k, q, norm; a bias before each weight
    layer = [
        *[(vector, 0), (4 * square, 0)],
        *[(4 * vector, 4 * square), (4 * square, 0)],
        *[(vector, 4 * square), (vector, 0)],
        *[(vector, 0), (square, 0)],
        *[(vector, square + attention), (square, 0), (vector, 0), (square, 0), (vector, 0), (square, 0)],
        *[(vector, 3 * square), (vector, 0)],
    ]
    head = [(vector, 2 * tokens * width * vocabulary), (vector, 0)]
    embedding = [(vector, 0), (2 * tokens * width * vocabulary, 0)]
    dw, dy = np.array([*head, *layer * layers, *embedding]).T
    importance = rng.lognormal(0.0, 1.5, len(dw)) if seed % 2 else rng.gamma(0.5, 1.0, len(dw))
    return dw, dy, importance * np.sqrt(dw / dw.max())


def assert_agrees_with_highs(result: KnapsackResult, answer: Answer, importance: NDArray[np.float64]) -> None:
    """Stopped by the clock, HiGHS still has a bound on each side; it works to a tolerance."""
    assert answer.mask is not None
    assert importance[answer.mask].sum() * (1 - 1e-7) <= result.value <= answer.bound * (1 + 1e-7)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [0.15, 0.5, 0.85])
def test_opt_like_instances_agree_with_highs(seed: int, budget: float) -> None:
    dw, dy, importance = opt_like(32, seed)
    assert len(dw) == 516
    capacity = int(budget * (dw.sum() + dy.sum()))
    result = checked(dw, dy, importance, capacity)
    assert result.optimal
    assert_agrees_with_highs(result, highs_chain(dw, dy, importance, capacity, seconds=10.0), importance)


@pytest.mark.parametrize("family", ["strongly correlated", "inverse strongly correlated", "subset sum"])
def test_hard_families_agree_with_highs_and_the_plain_dp(family: str) -> None:
    rng = np.random.default_rng(7)
    base = rng.integers(1, 1001, 60)
    dw, importance = {
        "strongly correlated": (base, base + 100.0),
        "inverse strongly correlated": (base + 100, base * 1.0),
        "subset sum": (base, base * 1.0),
    }[family]
    dy = rng.integers(0, 50, 60)
    capacity = int(dw.sum() + dy.sum()) // 2
    result = checked(dw, dy, importance, capacity)
    assert result.optimal
    assert result.value == chain_optimum_dp(dw.tolist(), dy.tolist(), importance.tolist(), capacity)
    assert_agrees_with_highs(result, highs_chain(dw, dy, importance, capacity, seconds=10.0), importance)


@pytest.mark.parametrize("seed", range(8))
def test_equal_densities_of_six_costs_equal_the_table_of_reachable_sums(seed: int) -> None:
    """No bound tells the selections apart, and all their costs are too many for one list: two meet in the middle."""
    rng = np.random.default_rng(seed)
    dw = rng.choice(rng.integers(1, 10**6, size=6), size=100)
    capacity = int(dw.sum() * rng.uniform(0.3, 0.7))
    reachable = 1  # bit c: some tensors cost c
    for cost in dw.tolist():
        reachable |= reachable << cost
    best = (reachable & ((1 << (capacity + 1)) - 1)).bit_length() - 1
    result = knapsack(dw, np.zeros_like(dw), dw, capacity)
    assert result.optimal
    assert result.value == result.cost == dw[result.mask].sum() == best


@pytest.mark.parametrize("distinct_costs", [6, 100])
def test_a_capacity_met_to_the_last_unit_ends_a_search_among_equal_densities(distinct_costs: int) -> None:
    """That the importances are rounded makes no density the higher one; one list alone needs more states than these."""
    costs = np.random.default_rng(1).integers(1, 10**6, size=100, endpoint=True)
    dw = costs[np.arange(100) % distinct_costs]
    capacity = int(dw.sum()) // 2
    result = knapsack(dw, np.zeros_like(dw), dw / 10**6, capacity, max_states=50_000)
    assert result.optimal
    assert result.cost == capacity == dw[result.mask].sum()
    assert result.value == pytest.approx(capacity / 10**6, rel=1e-13)


def test_when_the_states_run_out_the_answer_is_feasible_and_bounded() -> None:
    dw = np.random.default_rng(3).integers(1, 10**11, 60)
    capacity = int(dw.sum()) // 2
    result = checked(dw, np.zeros_like(dw), dw, capacity, max_states=10_000)
    assert not result.optimal
    assert result.value <= capacity <= result.upper_bound <= capacity * (1 + 1e-15)
    assert result.value > 0.999 * capacity


@pytest.mark.parametrize(
    ("dw", "dy", "importance", "capacity", "selected"),
    [
        pytest.param([], [], [], 5, [], id="no tensors"),
        pytest.param([0, 0], [0, 0], [1.0, 2.0], 0, [0, 1], id="all free"),
        pytest.param([0, 5], [0, 0], [1.0, 9.0], 0, [0], id="capacity 0"),
        pytest.param([0, 0], [3, 0], [1.0, 1.0], 2, [], id="capacity below the first dy"),
        pytest.param([0, 0], [3, 0], [1.0, 1.0], 3, [0, 1], id="capacity just the first dy"),
        pytest.param([1, 1, 1], [1, 1, 1], [0.0, -1.0, 1.0], 9, [2], id="worthless tensors"),
        pytest.param([1, 1], [0, 0], [0.0, -2.0], 9, [], id="nothing worth anything"),
        pytest.param([4, 4], [1, 1], [1.0, 1.5], 9, [1], id="deeper is better"),
        pytest.param([4, 4], [1, 3], [1.0, 1.5], 7, [0], id="deeper does not fit"),
        pytest.param([2**63 - 3, 1], [1, 0], [1.0, 1e-300], 2**63 - 1, [0, 1], id="the whole of int64"),
        pytest.param([2**63 - 3, 1], [1, 0], [1.0, 1e-300], 2**63 - 2, [0], id="the whole of int64 but one"),
        pytest.param([1, 1], [0, 0], [1e308, 5e-324], 2, [0, 1], id="the whole of float64"),
    ],
)
def test_edges(dw: list[int], dy: list[int], importance: list[float], capacity: int, selected: list[int]) -> None:
    result = checked(dw, dy, importance, capacity)
    assert result.optimal
    assert np.flatnonzero(result.mask).tolist() == selected


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.uint64, ">i4", object])
def test_any_integer_dtype_and_layout(dtype: str | type) -> None:
    spread = np.array([4, 99, 4, 99, 9, 99], dtype=dtype)
    spread.flags.writeable = False
    importance = np.array([1.0, 2.5, 3.0], dtype=np.float32)[::-1]
    result = knapsack(spread[::2], np.ones(3, dtype=dtype), importance, 11)
    assert result.mask.tolist() == [True, True, False]


@pytest.mark.parametrize("dtype", [np.float16, ">f8", np.longdouble, np.uint8, object])
def test_any_real_dtype_of_importance(dtype: str | type) -> None:
    importance = np.array([1, 9, 3, 9, 3], dtype=dtype)[::2]
    importance.flags.writeable = False
    assert knapsack([4, 4, 9], [1, 1, 1], importance, 11).mask.tolist() == [True, True, False]


def test_the_answer_is_immutable() -> None:
    result = knapsack([1], [1], [1.0], 2)
    with pytest.raises(ValueError, match="read-only"):
        result.mask[0] = False
    with pytest.raises(AttributeError):
        result.value = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dw": [1, 2]}, "dw, dy and importance have 2, 3 and 3 elements"),
        ({"dw": [[1, 2, 3]]}, r"dw has shape \(1, 3\); expected one dimension"),
        ({"dw": [[1], [2, 3], []]}, "dw is not an array of numbers"),
        ({"dw": [1, -2, 3]}, r"dw\[1\] is -2; expected 0 or more"),
        ({"dy": [1, 2, -3]}, r"dy\[2\] is -3; expected 0 or more"),
        ({"dw": None}, "dw is None; expected a sequence of numbers"),
        ({"dw": {1, 2, 3}}, r"dw is \{1, 2, 3\}; expected a sequence of numbers"),
        ({"dw": "123"}, "dw is '123'; expected a sequence of numbers"),
        ({"dw": ["1", "2", "3"]}, r"dw\[0\] is '1'; expected an integer"),
        ({"dw": [1, None, 3]}, r"dw\[1\] is None; expected an integer"),
        ({"dw": [1, 2.0, 3]}, r"dw\[1\] is 2.0; expected an integer"),
        ({"dw": np.array([1.0, 2.0, 3.0])}, r"dw has dtype float64; expected integers, such as dw.astype\(np.int64\)"),
        ({"dw": torch.ones(3, requires_grad=True)}, "dw is not an array of numbers: .* requires grad"),
        ({"dw": np.ma.array([1, 2, 3], mask=[0, 1, 0])}, r"dw is a masked array; .*such as dw.filled\(0\)"),
        ({"importance": np.ma.array([1.0, 2.0, 3.0])}, "importance is a masked array"),
        ({"dy": np.array([True, False, True])}, r"dy has dtype bool; expected integers"),
        ({"dy": [1, True, 2]}, r"dy\[1\] is True; expected a number"),
        ({"dy": np.array([1, True, 2], dtype=object)}, r"dy\[1\] is True; expected an integer"),
        ({"importance": [1.0, True, 2.0]}, r"importance\[1\] is True; expected a number"),
        ({"importance": np.array([1.0, True, 2.0], dtype=object)}, r"importance\[1\] is True; expected a number"),
        ({"importance": np.array([True, False, True])}, "importance has dtype bool; expected real numbers"),
        ({"dw": [1, 2, 2**70]}, r"dw\[2\] is 1180591620717411303424; expected at most 9223372036854775807"),
        ({"dw": [1, -(2**70), 2]}, r"dw\[1\] is -1180591620717411303424; expected 0 or more"),
        ({"dw": [1, 2, 2**63]}, r"dw\[2\] is 9223372036854775808; expected at most 9223372036854775807"),
        ({"dw": [0, 2**63, -1]}, r"dw\[1\] is 9223372036854775808; expected at most 9223372036854775807"),
        ({"dw": [10**5000, 1, 1]}, r"dw\[0\] is an integer of 16610 bits; expected at most"),
        ({"dw": np.array([1, 2**63, 3], dtype=np.uint64)}, r"dw\[1\] is 9223372036854775808; .*fit int64"),
        ({"dw": [2**62, 1, 1], "dy": [1, 2**62, 1]}, r"sum\(dw\) \+ sum\(dy\) does not fit .*dy\[1\]"),
        ({"importance": [1.0, math.nan, 1.0]}, r"importance\[1\] is nan; expected a finite number"),
        ({"importance": [1.0, 1.0, -math.inf]}, r"importance\[2\] is -inf; expected a finite number"),
        (
            {"importance": [1e308, 1e308, 1.0]},
            r"sum of the positive importances overflows float64 at importance\[1\]",
        ),
        ({"importance": [1.0, "b", 3.0]}, r"importance\[1\] is 'b'; expected a number"),
        ({"importance": np.array([1j, 2, 3])}, "importance has dtype complex128; expected real numbers"),
        ({"importance": [1.0, 2**2000, 3]}, r"importance\[1\] is too large for float64; expected a finite number"),
        ({"importance": [[1.0, 2.0, 3.0]]}, r"importance has shape \(1, 3\); expected one dimension"),
        ({"capacity": -1}, "capacity is -1; expected 0 or more"),
        ({"capacity": 2**63}, "capacity is 9223372036854775808; expected at most 9223372036854775807"),
        ({"capacity": 1.5}, "capacity is 1.5; expected an integer"),
        ({"capacity": "5"}, "capacity is '5'; expected an integer"),
        ({"capacity": True}, "capacity is True; expected an integer"),
        ({"capacity": np.True_}, "capacity is np.True_; expected an integer"),
        ({"max_states": 0}, "max_states is 0; expected 1 or more"),
        ({"max_states": True}, "max_states is True; expected an integer"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"dw": [1, 2, 3], "dy": [1, 2, 3], "importance": [1.0, 2.0, 3.0], "capacity": 5}
    with pytest.raises(InputError, match=message):
        knapsack(**(arguments | changes))


DIAMOND: dict[str, Any] = {
    "dependencies": [[], [0], [0], [1, 2]],
    "tensor_segments": [[1], [3]],
    "costs": [5, 1, 2, 4],
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dependencies": None}, "dependencies is None; expected rows of segments"),
        ({"tensor_segments": 5}, "tensor_segments is 5; expected rows of segments"),
        ({"dependencies": [[], 0, [0], [1, 2]]}, r"dependencies\[1\] is 0; expected a sequence of numbers"),
        ({"dependencies": [[], {0}, [0], [1, 2]]}, r"dependencies\[1\] is \{0\}; expected a sequence of numbers"),
        ({"dependencies": [[], [[0]], [0], [1, 2]]}, r"dependencies\[1\] has shape \(1, 1\); expected one dimension"),
        ({"dependencies": [[], [0.0], [0], [1, 2]]}, r"dependencies\[1\]\[0\] is 0.0; expected an integer"),
        ({"dependencies": [[], [False], [0], [1, 2]]}, r"dependencies\[1\]\[0\] is False; expected a number"),
        ({"dependencies": [[], [0], [0], [1, -2]]}, r"dependencies\[3\]\[1\] is -2; expected 0 or more"),
        ({"dependencies": [[], [0], [0], [1, 3]]}, r"dependencies\[3\]\[1\] is 3; .* smaller index, below 3"),
        (
            {"dependencies": [[], [], [2**70], []]},
            r"dependencies\[2\]\[0\] is 1180591620717411303424; expected at most",
        ),
        (
            {"tensor_segments": [[], [], [0, 7]]},
            r"tensor_segments\[2\]\[1\] is 7; expected one of the 4 segments, below 4",
        ),
        ({"tensor_segments": [[1], [-1]]}, r"tensor_segments\[1\]\[0\] is -1; expected 0 or more"),
        ({"costs": [5, 1, 2]}, "costs has 3 elements and dependencies 4 rows"),
        ({"costs": [5, 1, -2, 4]}, r"costs\[2\] is -2; expected 0 or more"),
        ({"costs": [5, 1, 2, 2**63 - 8]}, "the sum of costs is 9223372036854775808; expected at most 92233"),
        ({"costs": np.ones(4)}, "costs has dtype float64; expected integers"),
    ],
)
def test_bad_graphs_are_named_by_row_and_element(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GraphKnapsack(**(DIAMOND | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dependencies": (np.array(row, dtype=">i8") for row in DIAMOND["dependencies"])},
        {"dependencies": [(), range(1), np.zeros(1, dtype=np.uint8), np.array([1, 2], dtype=object)]},
        {"tensor_segments": np.array([[1], [3]])},
        {"tensor_segments": torch.tensor([[1], [3]])},
        {"costs": torch.tensor(DIAMOND["costs"])},
        {"costs": np.array(DIAMOND["costs"], dtype=object)},
        {"costs": np.array([5, 0, 1, 0, 2, 0, 4, 0])[::2]},
    ],
)
def test_any_rows_of_integers_are_a_graph(changes: dict[str, Any]) -> None:
    graph = GraphKnapsack(**(DIAMOND | changes))
    assert graph.solve([1.0, 1.5], 11).mask.tolist() == [True, False]
    assert graph.solve([1.0, 1.5], 12).cost == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 12), "importance has 1 elements; expected 2, one a tensor"),
        (([1.0, math.nan], 12), r"importance\[1\] is nan; expected a finite number"),
        (([1.0, 1.5], True), "capacity is True; expected an integer"),
        ((None, 12), "importance is None; expected a sequence of numbers"),
    ],
)
def test_bad_requests_to_a_graph_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        GraphKnapsack(**DIAMOND).solve(*arguments)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
def test_copies_of_a_graph_solve_the_same(copied: Callable[[GraphKnapsack], GraphKnapsack]) -> None:
    costs = np.array(DIAMOND["costs"])
    original = GraphKnapsack(**(DIAMOND | {"costs": costs}))
    costs[:] = 0  # what the graph was made from is the caller's again
    for capacity in range(14):
        expected, found = original.solve([1.0, 1.5], capacity), copied(original).solve([1.0, 1.5], capacity)
        assert (found.mask.tolist(), found.value, found.cost) == (expected.mask.tolist(), expected.value, expected.cost)
    assert original.solve([1.0, 1.5], 11).mask.tolist() == [True, False]
    no_segments = copied(GraphKnapsack([], [[], []], []))
    assert no_segments.solve([1.0, 2.0], 0).mask.tolist() == [True, True]


def test_importing_the_solver_does_not_import_torch() -> None:
    code = "import sys, gtflops.solver; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
