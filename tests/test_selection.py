"""Selections: within budget, optimal, and clear when there is none."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gtflops
from gtflops import Profile
from small_models import HalfUsed, build, padded_batch


@pytest.fixture(scope="module")
def profile() -> Profile:
    return gtflops.profile(build("opt"), padded_batch())


def uniform(profile: Profile) -> dict[str, float]:
    return {tensor.name: float(tensor.numel) for tensor in profile.tensors}


@settings(max_examples=200)
@given(st.floats(0.45, 1.0), st.integers(0, 2**32 - 1))
def test_never_over_the_budget(profile: Profile, budget: float, seed: int) -> None:
    values = np.random.default_rng(seed).gamma(0.5, 1.0, len(profile.names)) - 0.1
    importance = dict(zip(profile.names, values.tolist(), strict=True))
    selection = gtflops.select(profile, importance, budget)
    assert selection.flops == profile.step_flops(selection.names).total <= budget * profile.full_flops
    assert selection.optimal
    assert selection.upper_bound == selection.value == pytest.approx(values[selection.mask].sum())
    assert all(importance[name] > 0 for name in selection.names)
    assert 0 < selection.importance_captured <= 1 + 1e-12


def test_optimal_against_brute_force() -> None:
    """All subsets of a three-layer network, under the chain form."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 9), torch.nn.ReLU(), torch.nn.Linear(9, 5), torch.nn.Linear(5, 2))
    profile = gtflops.profile(model, torch.ones(4, 3), lambda y, _: y.sum())
    rng = np.random.default_rng(3)
    for _ in range(20):
        values = rng.normal(0.5, 1, len(profile.names)).round(2)
        importance = dict(zip(profile.names, values.tolist(), strict=True))
        if not (values > 0).any():
            continue
        for budget in (0.5, 0.65, 0.8, 1.0):
            capacity = int(budget * profile.full_flops) - profile.forward_flops
            best = 0.0
            for chosen in product([False, True], repeat=len(values)):
                mask = np.array(chosen)
                if mask.any():
                    deepest = int(mask.nonzero()[0].max())
                    cost = profile.t_dw[mask].sum() + profile.t_dy[: deepest + 1].sum()
                    if cost <= capacity:
                        best = max(best, float(values[mask].sum()))
            try:
                assert gtflops.select(profile, importance, budget).value == pytest.approx(best, abs=1e-12)
            except gtflops.InfeasibleBudgetError:
                assert best == 0.0


def test_budget_in_flops_equals_budget_as_share(profile: Profile) -> None:
    by_share = gtflops.select(profile, uniform(profile), 0.6)
    by_flops = gtflops.select(profile, uniform(profile), budget_flops=by_share.budget_flops)
    assert by_flops.names == by_share.names
    assert gtflops.select(profile, uniform(profile)).budget_flops == profile.full_flops // 2


def test_everything_at_budget_one(profile: Profile) -> None:
    assert gtflops.select(profile, uniform(profile), 1.0).mask.all()


def test_apply_freezes_and_drops_stale_gradients(profile: Profile) -> None:
    model, batch = build("opt"), padded_batch()
    model(**batch).loss.backward()
    selection = gtflops.select(profile, uniform(profile), 0.6)
    assert selection.apply(model) is model
    for name, tensor in model.named_parameters():
        assert tensor.requires_grad == (name in selection.names)
        assert (tensor.grad is None) == (name not in selection.names)
    assert profile.step_flops(model).total == selection.flops


def test_apply_to_another_model_changes_nothing(profile: Profile) -> None:
    model = build("llama")
    with pytest.raises(gtflops.InputError, match=r"'lm_head.weight'; expected the model that was profiled"):
        gtflops.select(profile, uniform(profile), 0.6).apply(model)
    assert all(tensor.requires_grad for tensor in model.parameters())


# --- bad input --------------------------------------------------------------------------------------------------


def test_an_infeasible_budget_names_the_smallest_feasible_one(profile: Profile) -> None:
    with pytest.raises(gtflops.InfeasibleBudgetError, match="below the forward pass alone") as raised:
        gtflops.select(profile, uniform(profile), 0.1)
    words = str(raised.value).split()
    share = float(words[words.index("(budget_flops=" + words[-1].removeprefix("(budget_flops=")) - 1])
    smallest = int(words[-1].removeprefix("(budget_flops=").rstrip(")"))
    assert gtflops.select(profile, uniform(profile), share).names
    assert gtflops.select(profile, uniform(profile), budget_flops=smallest).flops <= smallest
    with pytest.raises(gtflops.InfeasibleBudgetError, match="leaves too little for any tensor"):
        gtflops.select(profile, uniform(profile), budget_flops=smallest - 1)


def test_the_smallest_feasible_budget_is_exact_where_branches_are_parallel() -> None:
    """The chain form charges a tensor for its parallel branch too: what fits exactly is not refused."""

    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (
                torch.nn.Sequential(*(torch.nn.Linear(16, 16, bias=False) for _ in range(4))) for _ in range(2)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.b(x)

    profile = gtflops.profile(Branches(), torch.randn(8, 16), lambda y, _: y.sum())
    deepest = profile.names[-1]
    importance = {name: float(name == deepest) for name in profile.names}
    alone = profile.step_flops([deepest]).total
    assert alone < profile.forward_flops + profile.t_dw[-1] + profile.t_dy.sum()
    selection = gtflops.select(profile, importance, budget_flops=alone)
    assert selection.names == (deepest,)
    assert (selection.flops, selection.optimal) == (alone, False)
    assert selection.upper_bound >= selection.value
    with pytest.raises(gtflops.InfeasibleBudgetError, match=f"budget_flops={alone}"):
        gtflops.select(profile, importance, budget_flops=alone - 1)


def test_the_smallest_budget_named_is_feasible() -> None:
    """As a decimal too: 0.6 means 6/10, not the double just below it."""
    for width in range(2, 20):
        profile = gtflops.profile(torch.nn.Linear(width, width), torch.randn(1, width), lambda y, _: y.sum())
        importance = dict.fromkeys(profile.names, 1.0)
        with pytest.raises(gtflops.InfeasibleBudgetError) as raised:
            gtflops.select(profile, importance, 0.01)
        share = float(str(raised.value).rpartition(" (budget_flops")[0].rpartition(" ")[2])
        assert gtflops.select(profile, importance, share).names


@pytest.mark.parametrize("budget", [0, -0.5, 1.5, math.nan, math.inf, "half", True])
def test_budgets_outside_zero_to_one(profile: Profile, budget: float) -> None:
    with pytest.raises(gtflops.InputError, match=r"expected a share of a full step in \(0, 1\]"):
        gtflops.select(profile, uniform(profile), budget)


@pytest.mark.parametrize("budget_flops", [0, -3, 1e9, True])
def test_budgets_in_flops_that_are_none(profile: Profile, budget_flops: int) -> None:
    with pytest.raises(gtflops.InputError, match="expected a positive integer"):
        gtflops.select(profile, uniform(profile), budget_flops=budget_flops)


def test_two_budgets(profile: Profile) -> None:
    with pytest.raises(gtflops.InputError, match="expected one of them"):
        gtflops.select(profile, uniform(profile), 0.5, budget_flops=10**9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1", 10**400])
def test_importance_that_is_no_finite_number(profile: Profile, value: float) -> None:
    name = profile.names[4]
    with pytest.raises(gtflops.InputError, match=f"importance of '{name}' is .*expected a finite number"):
        gtflops.select(profile, {**uniform(profile), name: value}, 0.6)


def test_importance_with_missing_and_unknown_names(profile: Profile) -> None:
    importance = uniform(profile)
    del importance[profile.names[0]]
    importance["lm_head.wait"] = 1.0
    with pytest.raises(
        gtflops.InputError, match=rf"lacks 1 of .* first '{profile.names[0]}' and has 1 names .*'lm_head.wait'"
    ):
        gtflops.select(profile, importance, 0.6)


def test_an_empty_selection(profile: Profile) -> None:
    with pytest.raises(gtflops.InputError, match="the selection would be empty"):
        gtflops.select(profile, dict.fromkeys(profile.names, -1.0), 0.6)


def test_a_tensor_without_gradient_is_never_selected() -> None:
    profile = gtflops.profile(HalfUsed(), torch.ones(2, 3), lambda y, _: y)
    selection = gtflops.select(profile, dict.fromkeys(profile.names, 1.0), 1.0)
    assert set(selection.names) == {"used.weight", "used.bias"}
