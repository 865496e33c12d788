"""Selections: within budget, optimal, and clear when there is none."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gtflops
from branching_models import BATCHES, Attention, Branches, EncoderDecoder, Shared, every_mask, profile_of, with_times
from gtflops import Profile, element_limit
from gtflops.forms import GraphForm
from gtflops.graph import Phase
from gtflops.problem import layers_of
from gtflops.solver import GraphKnapsack, KnapsackResult
from highs import highs_graph
from small_models import HalfUsed, build, padded_batch


@pytest.fixture(scope="module")
def profile() -> Profile:
    return gtflops.profile(build("opt"), padded_batch())


@pytest.fixture(scope="module")
def opt_125m() -> Profile:
    return gtflops.profile("facebook/opt-125m", batch_size=4, seq_len=512)


def uniform(profile: Profile) -> dict[str, float]:
    return {tensor.name: float(tensor.numel) for tensor in profile.tensors}


@dataclass(frozen=True)
class Case:
    """A problem on any model; of its tensors by position, some must train and others freeze."""

    form: Literal["graph", "chain"]
    granularity: Literal["tensor", "layer"]
    cost: Literal["flops", "time"]
    budget: float
    seed: int
    conditions: tuple[int, ...]

    def values(self, tensors: int) -> npt.NDArray[np.float64]:
        """With negative ones, zeros and ties."""
        return np.random.default_rng(self.seed).normal(0.5, 1, tensors).round(1)

    def patterns(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Names that must train and names that must freeze."""
        marked = list(zip(names, self.conditions, strict=False))
        return [name for name, mark in marked if mark == 1], [name for name, mark in marked if mark == 2]


def cases() -> st.SearchStrategy[Case]:
    marks = st.one_of(st.just(()), st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=14, max_size=14).map(tuple))
    return st.builds(
        Case,
        form=st.sampled_from(["graph", "chain"]),
        granularity=st.sampled_from(["tensor", "layer"]),
        cost=st.sampled_from(["flops", "time"]),
        budget=st.integers(30, 100).map(lambda percent: percent / 100),
        seed=st.integers(0, 2**32 - 1),
        conditions=marks,
    )


def costs_of(profile: Profile, masks: npt.NDArray[np.bool_], form: str, cost: str) -> npt.NDArray[np.int64]:
    """What a step costs for each mask, node by node; in the chain form by the cost of each tensor."""
    of_node = profile.prices.sum(axis=0) if cost == "flops" else profile.nanoseconds
    assert of_node is not None
    tensors = len(profile.names)
    own, shared, base = np.zeros(tensors, dtype=np.int64), np.zeros(tensors, dtype=np.int64), 0
    totals = np.zeros(len(masks), dtype=np.int64)
    for node, needed, price in zip(profile.graph.nodes, profile.needed_by, of_node.tolist(), strict=True):
        users = np.array([bool(needed >> position & 1) for position in range(tensors)])
        if node.phase is Phase.FORWARD or needed >> tensors:
            base += price
        elif node.phase in (Phase.BACKWARD, Phase.RECOMPUTE) and needed:
            totals += price * masks[:, users].any(axis=1)
            (own if users.sum() == 1 else shared)[users.argmax()] += price
    if form == "graph":
        return base + totals
    down_to = np.concatenate([[0], shared.cumsum()])
    deepest = np.array([mask.nonzero()[0].max(initial=-1) + 1 for mask in masks])
    return base + masks @ own + down_to[deepest]


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


@pytest.mark.parametrize("model", BATCHES)
@given(case=cases())
def test_optimal_against_every_subset(model: Callable[[], torch.nn.Module], case: Case) -> None:
    """Each form, granularity and cost, under conditions, on models whose backward pass is no chain."""
    profile = with_times(profile_of(model))
    values = case.values(len(profile.names))
    importance = dict(zip(profile.names, values.tolist(), strict=True))
    must_train, must_freeze = case.patterns(profile.names)
    forced, frozen = (np.array([name in names for name in profile.names]) for names in (must_train, must_freeze))

    masks = every_mask(profile)
    allowed = ~(forced & ~masks).any(axis=1) & ~(frozen & masks).any(axis=1) & masks.any(axis=1)
    if case.granularity == "layer":
        layers = np.array(layers_of(profile.names))
        for layer in set(layers):
            of_layer = masks[:, (layers == layer) & ~forced & ~frozen]
            allowed &= of_layer.all(axis=1) | ~of_layer.any(axis=1)
    costs = costs_of(profile, masks, case.form, case.cost)
    full = int(costs_of(profile, np.ones((1, len(profile.names)), dtype=bool), "graph", case.cost)[0])
    limit = int(Fraction(repr(case.budget)) * full)
    fits = allowed & (costs <= limit)
    best = (masks[fits] @ values).max(initial=-math.inf)

    options: Any = {"form": case.form, "granularity": case.granularity, "cost": case.cost}
    options |= {"must_train": must_train, "must_freeze": must_freeze}
    if not forced.any() and best <= 0:
        with pytest.raises((gtflops.InfeasibleBudgetError, gtflops.InputError), match=r"smallest feasible|be empty"):
            gtflops.select(profile, importance, case.budget, **options)
        return
    if best == -math.inf:
        smallest = int(costs[allowed].min())
        exact = f"budget_flops={smallest}" if case.cost == "flops" else f"budget_seconds={smallest / 1e9!r}"
        with pytest.raises(gtflops.InfeasibleBudgetError, match=rf"what must train.*\({re.escape(exact)}\)|is below"):
            gtflops.select(profile, importance, case.budget, **options)
        return
    selection = gtflops.select(profile, importance, case.budget, **options)
    assert selection.value == selection.upper_bound == pytest.approx(best, abs=1e-12)
    assert selection.optimal
    assert allowed[(masks == selection.mask).all(axis=1)].all()
    assert selection.flops == profile.step_flops(selection.names).total
    if case.cost == "flops":
        assert selection.flops <= selection.budget_flops == limit
    else:
        assert selection.seconds <= selection.budget_seconds == limit / 1e9


@pytest.mark.parametrize("model", [model for model in BATCHES if model is not Shared])
def test_the_graph_form_is_never_worse_than_the_chain(model: Callable[[], torch.nn.Module]) -> None:
    """And better where branches are parallel."""
    profile, better = profile_of(model), 0
    rng = np.random.default_rng(1)
    for budget in np.linspace(0.5, 0.95, 40).tolist():
        importance = dict(zip(profile.names, rng.gamma(0.5, 1.0, len(profile.names)).tolist(), strict=True))
        try:
            chain = gtflops.select(profile, importance, budget, form="chain")
        except gtflops.InfeasibleBudgetError:
            continue
        graph = gtflops.select(profile, importance, budget)
        assert graph.value >= chain.value
        better += graph.value > chain.value + 1e-9
    assert better > 0


def test_an_unproved_search_falls_back_on_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits the chain form fits the graph form, and may be better than a search that was cut short."""
    profile = profile_of(Branches)
    exact_solve = GraphKnapsack.solve

    def cut_short(self: GraphKnapsack, worth: Any, capacity: int) -> KnapsackResult:
        bound = exact_solve(self, worth, capacity).upper_bound + 0.5
        return KnapsackResult(np.zeros(len(worth), dtype=bool), 0.0, 0, bound, False)

    rng, unproved = np.random.default_rng(2), 0
    for budget in np.linspace(0.6, 0.9, 40).tolist():
        importance = dict(zip(profile.names, rng.gamma(0.5, 1.0, len(profile.names)).tolist(), strict=True))
        best = gtflops.select(profile, importance, budget)
        chain = gtflops.select(profile, importance, budget, form="chain")
        with monkeypatch.context() as patched:
            patched.setattr(GraphKnapsack, "solve", cut_short)
            found = gtflops.select(profile, importance, budget)
        assert chain.value <= found.value <= best.value < found.upper_bound
        unproved += not found.optimal
    assert unproved == 40

    monkeypatch.setattr(GraphKnapsack, "solve", cut_short)
    importance = {name: 2.0 if name.startswith("a") else 0.7 for name in profile.names}
    # Forced tensors cost more in the chain form than in the graph form; the difference must not be spent.
    alone = profile.step_flops(["a.0.weight"]).total
    for budget_flops in (alone, int(0.8 * profile.full_flops)):
        forced = gtflops.select(profile, importance, budget_flops=budget_flops, must_train="a.0.weight")
        assert forced.flops <= budget_flops
        assert "a.0.weight" in forced.names
    # What still fits is added: the chain form, which charges a.0 for the other branch, has nothing here.
    importance = {name: float(name == "a.0.weight") for name in profile.names}
    assert gtflops.select(profile, importance, budget_flops=alone).names == ("a.0.weight",)


# --- a limit on trained elements ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", BATCHES)
@given(
    budget=st.floats(0.4, 1.0),
    room=st.floats(0.05, 1.0),
    seed=st.integers(0, 2**32 - 1),
    form=st.sampled_from(["graph", "chain"]),
    forced=st.lists(st.integers(0, 7), max_size=2),
)
@settings(max_examples=60)
def test_the_limit_on_elements_against_every_subset(
    model: Callable[[], torch.nn.Module],
    budget: float,
    room: float,
    seed: int,
    form: Literal["graph", "chain"],
    forced: list[int],
) -> None:
    """Feasible, and between them value and bound hold the optimum; small instances are proved."""
    profile = profile_of(model)
    masks, numel = every_mask(profile), np.array([tensor.numel for tensor in profile.tensors])
    values = np.random.default_rng(seed).normal(0.5, 1, len(numel)).round(1)
    importance = dict(zip(profile.names, values.tolist(), strict=True))
    limit, max_elements = int(budget * profile.full_flops), max(1, int(room * numel.sum()))
    fits = (costs_of(profile, masks, form, "flops") <= limit) & (masks @ numel <= max_elements) & masks.any(axis=1)
    fits &= masks[:, forced].all(axis=1)
    best = (masks[fits] @ values).max(initial=-math.inf)
    names = [profile.names[position] for position in forced]
    if best == -math.inf or (not forced and best <= 0):
        with pytest.raises(gtflops.GtflopsError, match=r"max_elements|at most|positive importance|must train|is below"):
            gtflops.select(
                profile, importance, budget_flops=limit, max_elements=max_elements, form=form, must_train=names
            )
        return
    selection = gtflops.select(
        profile, importance, budget_flops=limit, max_elements=max_elements, form=form, must_train=names
    )
    assert selection.flops <= limit
    assert numel[selection.mask].sum() <= max_elements
    assert set(names) <= set(selection.names)
    assert selection.value == selection.upper_bound == pytest.approx(best, abs=1e-12)
    assert selection.optimal


def test_without_proof_the_bound_on_elements_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one subproblem already, and with a solver of one limit that proves nothing."""
    profile = profile_of(EncoderDecoder)
    masks, numel = every_mask(profile), np.array([tensor.numel for tensor in profile.tensors])
    costs = costs_of(profile, masks, "graph", "flops")
    rng = np.random.default_rng(7)
    exact = GraphKnapsack.solve

    def doubtful(self: GraphKnapsack, worth: Any, capacity: int) -> KnapsackResult:
        """What fits of the best selection without its first half, and a bound that is too large."""
        best = exact(self, worth, capacity)
        mask = best.mask & (np.arange(len(worth)) >= len(worth) // 2)
        return KnapsackResult(mask, float(worth[mask].sum()), 0, best.upper_bound + 0.25, False)

    unproved = 0
    for doubt in (False, True):
        monkeypatch.setattr(element_limit, "MAX_SUBPROBLEMS", 1 if not doubt else 100)
        monkeypatch.setattr(GraphKnapsack, "solve", doubtful if doubt else exact)
        for _ in range(40):
            values = rng.gamma(0.5, 1.0, len(numel))
            limit, max_elements = int(rng.uniform(0.6, 1) * profile.full_flops), int(rng.uniform(0.3, 1) * numel.sum())
            best = (masks[(costs <= limit) & (masks @ numel <= max_elements)] @ values).max()
            importance = dict(zip(profile.names, values.tolist(), strict=True))
            selection = gtflops.select(profile, importance, budget_flops=limit, max_elements=max_elements)
            assert selection.flops <= limit
            assert numel[selection.mask].sum() <= max_elements
            assert selection.value <= best + 1e-12
            assert selection.upper_bound >= best - 1e-12
            assert selection.optimal == (selection.value == selection.upper_bound)
            unproved += not selection.optimal
    assert unproved > 40


def test_a_limit_on_elements_that_does_not_bind_changes_nothing(profile: Profile) -> None:
    everything = sum(tensor.numel for tensor in profile.tensors)
    free = gtflops.select(profile, uniform(profile), 0.7, form="chain")
    for limit in (everything, np.int64(everything)):
        limited = gtflops.select(profile, uniform(profile), 0.7, form="chain", max_elements=limit)
        assert limited.names == free.names


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), budget=st.floats(0.6, 1.0), room=st.floats(0.1, 0.9))
def test_the_gap_under_a_limit_on_elements(profile: Profile, seed: int, budget: float, room: float) -> None:
    """52 tensors of a transformer: proved, or within one part in a hundred."""
    numel = np.array([tensor.numel for tensor in profile.tensors])
    values = np.random.default_rng(seed).gamma(0.5, 1.0, len(numel))
    importance = dict(zip(profile.names, values.tolist(), strict=True))
    selection = gtflops.select(profile, importance, budget, form="chain", max_elements=int(room * numel.sum()))
    assert numel[selection.mask].sum() <= int(room * numel.sum())
    assert selection.upper_bound <= 1.01 * selection.value


@pytest.mark.parametrize("form", ["graph", "chain"])
@pytest.mark.parametrize(("seed", "room"), [(0, 0.3), (1, 0.1), (2, 0.3), (3, 0.1)])
def test_both_limits_in_one_prove_what_branching_does_not(
    opt_125m: Profile, form: Literal["graph", "chain"], seed: int, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = opt_125m
    numel = np.array([tensor.numel for tensor in profile.tensors])
    values = np.random.default_rng(seed).lognormal(0.0, 1.0, len(numel)) * np.sqrt(numel)
    importance = dict(zip(profile.names, values.tolist(), strict=True))
    limit, max_elements = int(0.8 * profile.full_flops), int(room * numel.sum())
    selection = gtflops.select(profile, importance, budget_flops=limit, max_elements=max_elements, form=form)
    assert selection.optimal
    assert selection.flops <= limit
    assert numel[selection.mask].sum() <= max_elements
    exact = profile.form("flops")
    graph = (exact.dependencies, exact.item_segments, exact.costs)
    answer = highs_graph(*graph, values, limit - exact.base, 10.0, numel, max_elements)
    assert selection.value <= answer.bound * (1 + 1e-7)
    if form == "graph":
        assert answer.mask is not None
        assert values[answer.mask].sum() * (1 - 1e-7) <= selection.value
    monkeypatch.setattr(element_limit, "MAX_WEIGHTS", 0)
    branched = gtflops.select(profile, importance, budget_flops=limit, max_elements=max_elements, form=form)
    assert not branched.optimal
    assert branched.value <= selection.value + 1e-9 <= branched.upper_bound + 2e-9


def test_a_surcharge_is_paid_for_each_item() -> None:
    profile = profile_of(Branches)
    masks = every_mask(profile)[::7]
    surcharge = np.arange(len(profile.names), dtype=np.int64) * 1000 + 1
    forced = np.arange(len(profile.names)) == 1
    for form in (profile.form("flops"), profile.form("flops").chain, profile.form("flops").paid(forced)):
        charged = form.surcharged(3, surcharge)
        for mask in masks:
            assert charged.total(mask) == 3 * (form.total(mask) - form.base) + surcharge[mask].sum()
            if isinstance(charged, GraphForm):
                assert charged.chain.total(mask) >= charged.total(mask)


def test_limits_on_elements_that_nothing_fits() -> None:
    profile = profile_of(Branches)
    importance = dict.fromkeys(profile.names, 1.0)
    with pytest.raises(gtflops.InfeasibleBudgetError, match=r"max_elements=255 is less than any tensor .* has 256"):
        gtflops.select(profile, importance, max_elements=255)
    with pytest.raises(gtflops.InfeasibleBudgetError, match="max_elements=1000 is less than the 1024 elements of what"):
        gtflops.select(profile, importance, must_train="a.*", max_elements=1000)
    with pytest.raises(
        gtflops.InfeasibleBudgetError, match="any layer of positive importance and at most 300 elements"
    ):
        gtflops.select(profile, importance, budget_flops=profile.forward_flops, granularity="layer", max_elements=300)


@pytest.mark.parametrize("max_elements", [0, -1, 1.5, True, "all"])
def test_limits_on_elements_that_are_none(profile: Profile, max_elements: int) -> None:
    with pytest.raises(gtflops.InputError, match="expected a positive integer"):
        gtflops.select(profile, uniform(profile), max_elements=max_elements)


# --- what must train, what must freeze, layers ------------------------------------------------------------------


def test_what_must_train_counts_whatever_it_is_worth() -> None:
    profile = profile_of(Branches)
    importance = dict.fromkeys(profile.names, -1.0)
    selection = gtflops.select(profile, importance, 1.0, must_train=["a.3.*", "b.?.weight"], must_freeze="a.0.weight")
    assert set(selection.names) == {name for name in profile.names if name.startswith("b")} | {"a.3.weight"}
    assert (selection.value, selection.upper_bound, selection.optimal) == (-5.0, -5.0, True)
    assert selection.importance_captured == 0.0


def test_what_must_train_beyond_the_budget_names_the_smallest_one() -> None:
    profile = profile_of(Branches)
    importance = dict.fromkeys(profile.names, 1.0)
    smallest = profile.step_flops(["a.0.weight", "b.0.weight"]).total
    with pytest.raises(gtflops.InfeasibleBudgetError, match=f"what must train; .*budget_flops={smallest}\\)"):
        gtflops.select(profile, importance, budget_flops=smallest - 1, must_train="*.0.weight")
    selection = gtflops.select(profile, importance, budget_flops=smallest, must_train="*.0.weight")
    assert set(selection.names) == {"a.0.weight", "b.0.weight"}


def test_patterns_that_do_not_fit(profile: Profile) -> None:
    with pytest.raises(
        gtflops.InputError, match=r"matches must_train='\*final_norm\.\*'; nearest names: .*final_layer_norm"
    ):
        gtflops.select(profile, uniform(profile), must_train="*final_norm.*")
    with pytest.raises(gtflops.InputError, match="no tensor matches must_freeze='nothing'"):
        gtflops.select(profile, uniform(profile), must_freeze=["*.bias", "nothing"])
    with pytest.raises(gtflops.InputError, match=r"tensors match must_train and must_freeze, first 'model"):
        gtflops.select(profile, uniform(profile), must_train="*.bias", must_freeze="*.layers.1.*")
    with pytest.raises(gtflops.InputError, match="must_train has 3, expected patterns"):
        gtflops.select(profile, uniform(profile), must_train=[3])  # type: ignore[list-item]
    with pytest.raises(gtflops.InputError, match="must_train is 3, expected a pattern"):
        gtflops.select(profile, uniform(profile), must_train=3)  # type: ignore[arg-type]


def test_freezing_everything_leaves_nothing_to_train(profile: Profile) -> None:
    with pytest.raises(gtflops.InputError, match=r"no layer that may be chosen .* would be empty"):
        gtflops.select(profile, uniform(profile), must_freeze="*", granularity="layer")


def test_a_tensor_that_must_train_may_have_no_gradient() -> None:
    """It is let to require one, which costs nothing; by itself it would be nothing to train."""
    profile = gtflops.profile(HalfUsed(), torch.ones(2, 3), lambda y, _: y)
    for form in ("graph", "chain"):
        selection = gtflops.select(profile, dict.fromkeys(profile.names, 1.0), 1.0, must_train="unused.*", form=form)
        assert set(selection.names) == set(profile.names)
        assert (selection.value, selection.flops) == (2.0, profile.full_flops)
    with pytest.raises(gtflops.InputError, match="would be empty"):
        gtflops.select(profile, dict.fromkeys(profile.names, 0.0), 1.0, must_train="unused.*")


def test_layers_are_trained_whole(profile: Profile) -> None:
    rng = np.random.default_rng(5)
    importance = dict(zip(profile.names, rng.normal(0.3, 1, len(profile.names)).tolist(), strict=True))
    selection = gtflops.select(profile, importance, 0.8, granularity="layer", must_freeze="*.bias")
    chosen = set(selection.names)
    assert chosen
    for layer in ("model.decoder.layers.0", "model.decoder.layers.1", "model.decoder.layers.2"):
        weights = {name for name in profile.names if name.startswith(f"{layer}.") and name.endswith(".weight")}
        assert weights <= chosen or not weights & chosen
    assert not any(name.endswith(".bias") for name in chosen)
    assert selection.value == pytest.approx(math.fsum(importance[name] for name in chosen))


def test_layers_of_real_names() -> None:
    names = {
        "model.decoder.layers.3.self_attn.q_proj.weight": "model.decoder.layers.3",
        "model.decoder.embed_tokens.weight": "model.decoder.embed_tokens",
        "model.layers.2.mlp.experts.7.w1.weight": "model.layers.2",
        "encoder.block.0.layer.1.DenseReluDense.wi.weight": "encoder.block.0",
        "vit.embeddings.patch_embeddings.projection.bias": "vit.embeddings",
        "vit.embeddings.cls_token": "vit.embeddings",
        "vit.encoder.layer.0.output.dense.weight": "vit.encoder.layer.0",
        "lm_head.weight": "lm_head",
        "model.mask_token": "model",
        "0.weight": "0",
        "temperature": "",
    }
    assert dict(zip(names, layers_of(list(names)), strict=True)) == names


# --- a budget of time -------------------------------------------------------------------------------------------


def test_a_budget_of_time_says_both() -> None:
    profile = with_times(profile_of(Attention))
    importance = uniform(profile)
    full = gtflops.select(profile, importance, 1.0, cost="time")
    assert full.mask.all()
    assert full.seconds == pytest.approx(
        sum(
            time
            for node, time in zip(profile.graph.nodes, profile.nanoseconds.tolist(), strict=True)
            if node.phase in (Phase.FORWARD, Phase.BACKWARD)
        )
        / 1e9
    )
    half = gtflops.select(profile, importance, 0.7, cost="time")
    assert half.budget_flops is None
    assert half.seconds <= half.budget_seconds == pytest.approx(0.7 * full.seconds, abs=1e-9)
    assert half.to_json()["flops"] == profile.step_flops(half.names).total
    assert half.to_json()["seconds"] == half.seconds
    same = gtflops.select(profile, importance, budget_seconds=half.budget_seconds, cost="time")
    assert (same.names, same.budget_seconds) == (half.names, half.budget_seconds)
    by_flops = gtflops.select(profile, importance, 0.7)
    assert by_flops.seconds is not None
    assert by_flops.budget_seconds is None


def test_time_and_flops_may_choose_differently() -> None:
    """An operator that is slow for its FLOPs is left out under a budget of time only."""
    profile = profile_of(Branches)
    slow = profile.names.index("b.3.weight")
    of_slow = np.array([needed == 1 << slow for needed in profile.needed_by])
    profile = replace(profile, nanoseconds=np.where(of_slow, 10**9, profile.prices.sum(axis=0)))
    importance = dict.fromkeys(profile.names, 1.0)
    assert "b.3.weight" in gtflops.select(profile, importance, 0.9).names
    assert "b.3.weight" not in gtflops.select(profile, importance, 0.9, cost="time").names


def test_an_infeasible_time_names_the_smallest_feasible_one() -> None:
    profile = with_times(profile_of(Attention))
    with pytest.raises(gtflops.InfeasibleBudgetError, match="below the forward pass alone") as raised:
        gtflops.select(profile, uniform(profile), budget_seconds=1e-9, cost="time")
    smallest = float(str(raised.value).rpartition("budget_seconds=")[2].rstrip(")"))
    found = gtflops.select(profile, uniform(profile), budget_seconds=smallest, cost="time")
    assert found.seconds == found.budget_seconds == smallest
    with pytest.raises(gtflops.InfeasibleBudgetError, match="leaves too little"):
        gtflops.select(profile, uniform(profile), budget_seconds=smallest - 1e-9, cost="time")


def test_budgets_of_time_that_do_not_fit(profile: Profile) -> None:
    timed = with_times(profile)
    with pytest.raises(gtflops.InputError, match=r"gtflops.measure_time\(profile, device\)"):
        gtflops.select(profile, uniform(profile), 0.5, cost="time")
    with pytest.raises(gtflops.InputError, match="expected cost='time'"):
        gtflops.select(timed, uniform(profile), budget_seconds=0.5)
    with pytest.raises(gtflops.InputError, match="expected budget_seconds"):
        gtflops.select(timed, uniform(profile), budget_flops=10**9, cost="time")
    for seconds in (0, -1.0, math.nan, math.inf, True, "1"):
        with pytest.raises(gtflops.InputError, match="expected a positive number"):
            gtflops.select(timed, uniform(profile), budget_seconds=seconds, cost="time")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"form": "tree"}, "form is 'tree', expected 'graph' or 'chain'"),
        ({"granularity": "block"}, "granularity is 'block', expected 'tensor' or 'layer'"),
        ({"cost": "joules"}, "cost is 'joules', expected 'flops' or 'time'"),
    ],
)
def test_options_that_are_none(profile: Profile, option: dict[str, Any], expected: str) -> None:
    with pytest.raises(gtflops.InputError, match=expected):
        gtflops.select(profile, uniform(profile), **option)


# --- budgets and models -----------------------------------------------------------------------------------------


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
    """The chain form charges a tensor for its parallel branch too, and needs a larger budget."""
    profile = profile_of(Branches)
    deepest = profile.names[-1]
    importance = {name: float(name == deepest) for name in profile.names}
    alone = profile.step_flops([deepest]).total
    in_chain = profile.forward_flops + int(profile.t_dw[-1] + profile.t_dy.sum())
    assert alone < in_chain
    selection = gtflops.select(profile, importance, budget_flops=alone)
    assert (selection.names, selection.flops, selection.optimal) == ((deepest,), alone, True)
    with pytest.raises(gtflops.InfeasibleBudgetError, match=f"budget_flops={alone}"):
        gtflops.select(profile, importance, budget_flops=alone - 1)
    assert gtflops.select(profile, importance, budget_flops=in_chain, form="chain").names == (deepest,)
    with pytest.raises(gtflops.InfeasibleBudgetError, match=f"in the chain form; .*budget_flops={in_chain}"):
        gtflops.select(profile, importance, budget_flops=in_chain - 1, form="chain")


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
    with pytest.raises(gtflops.InputError, match="given, expected one"):
        gtflops.select(profile, uniform(profile), 0.5, budget_flops=10**9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "1", 10**400, True])
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
